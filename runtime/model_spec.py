"""The sizes of a model's networks, and the models that there are: plain data, no framework."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTSpec:
    """Sizes of the causal Wan DiT."""

    dim: int
    """Width of the residual stream."""
    ffn_dim: int
    """Hidden width of the feed-forward network."""
    num_heads: int
    """Attention heads N; the head dim D is `dim / num_heads`."""
    num_layers: int
    """Transformer layers."""
    freq_dim: int
    """Width of the sinusoidal timestep embedding."""
    text_dim: int
    """Width of the prompt embedding."""
    text_len: int = 512
    """Rows of the prompt embedding; padding rows are zero and are attended to."""
    latent_channels: int = 16
    """Channels of a latent frame."""
    patch_size: int = 2
    """Latent cells per token, both directions (1 in time)."""
    eps: float = 1e-6
    """Epsilon of every norm."""

    @property
    def head_dim(self) -> int:
        """Head dim D."""
        return self.dim // self.num_heads


@dataclass(frozen=True, slots=True, kw_only=True)
class VAESpec:
    """Sizes and latent statistics of the Wan VAE."""

    base_dim: int
    """Channels of the finest stage."""
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channel multiple of each stage, finest first."""
    num_res_blocks: int = 2
    """Residual blocks of an encoder stage; a decoder stage has one more."""
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    """Whether each encoder downsampling halves time too."""
    latent_channels: int = 16
    """Channels of a latent frame."""
    latent_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    """Mean of each latent channel (Causal-Forcing utils/wan_wrapper.py, WanVAEWrapper)."""
    latent_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip
    """Standard deviation of each latent channel (same source)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TAEHVSpec:
    """Sizes of TAEHV, the tiny decoder (madebyollin/taehv@1f14a56 taehv.py, TAEHV)."""

    widths: tuple[int, ...] = (256, 128, 64, 64)
    """Channels of each stage, coarsest first; the last stage has no blocks."""
    temporal_upsample: tuple[bool, ...] = (False, True, True)
    """Whether the step from each stage to the next doubles the frame rate too."""
    latent_channels: int = 16
    """Channels of a latent frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec:
    """Sizes of the UMT5 encoder."""

    vocab_size: int
    """Rows of the token embedding."""
    dim: int
    """Width of the residual stream, and of the prompt embedding."""
    attention_dim: int
    """Heads times head dim."""
    ffn_dim: int
    """Hidden width of the gated feed-forward network."""
    num_heads: int
    """Attention heads."""
    num_layers: int
    """Transformer layers."""
    num_buckets: int = 32
    """Relative-position buckets; every layer has its own table."""
    max_distance: int = 128
    """Distance from which on all positions share the last bucket."""
    eps: float = 1e-6
    """Epsilon of the RMS norms."""
    pad_id: int = 0
    """Token id of padding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The three networks that make up a model."""

    name: str
    """Short name, part of every fingerprint."""
    dit: DiTSpec
    """The denoiser."""
    vae: VAESpec
    """Pixels to latents and back."""
    text: TextSpec
    """Prompts to embeddings."""
    taehv: TAEHVSpec | None = None
    """Latents to pixels, at less cost; None where no such decoder was trained."""


WAN21_T2V_1_3B = ModelSpec(
    name="wan2.1-t2v-1.3b",
    # Wan-AI/Wan2.1-T2V-1.3B config.json; text_dim and text_len: wan/modules/causal_model.py defaults.
    dit=DiTSpec(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, freq_dim=256, text_dim=4096),
    # Causal-Forcing wan/modules/vae.py, _video_vae.
    vae=VAESpec(base_dim=96),
    # Causal-Forcing wan/modules/t5.py, umt5_xxl.
    text=TextSpec(vocab_size=256384, dim=4096, attention_dim=4096, ffn_dim=10240, num_heads=64, num_layers=24),
    taehv=TAEHVSpec(),
)

TINY = ModelSpec(
    name="tiny",
    # Head dim 32 splits unevenly into 12 + 10 + 10 for RoPE, as 128 does into 44 + 42 + 42.
    dit=DiTSpec(dim=64, ffn_dim=160, num_heads=2, num_layers=2, freq_dim=48, text_dim=32),
    vae=VAESpec(base_dim=8),
    text=TextSpec(vocab_size=259, dim=32, attention_dim=32, ffn_dim=64, num_heads=4, num_layers=2),
    taehv=TAEHVSpec(widths=(16, 8, 8, 8)),
)

SHAPES = ModelSpec(
    name="shapes",
    dit=DiTSpec(dim=192, ffn_dim=640, num_heads=6, num_layers=6, freq_dim=256, text_dim=128, text_len=64),
    # Its training leaves latents with mean 0 and deviation 1.
    vae=VAESpec(base_dim=16, num_res_blocks=1, latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16),
    text=TextSpec(vocab_size=192, dim=128, attention_dim=128, ffn_dim=256, num_heads=4, num_layers=3),
)
