"""What a model, a variant of it, and a compiled network are: plain data, no framework.

Dimension letters, here and in every docstring: B batch, F latent frames, T pixel frames, C channels, H and W height and
width (h and w in latents), L tokens of a chunk, N attention heads, D head dim, S cache slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from causal_forcing.runtime.errors import UnknownNameError, UsageError

LATENT_STRIDE = 8
"""Pixels per latent cell, both directions (Wan VAE stride 4, 8, 8)."""

FRAMES_PER_LATENT = 4
"""Pixel frames per latent frame; the first latent frame of a clip gives one."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One released way of running a model: what a slug stands for."""

    slug: str
    """Name on the command line."""
    summary: str
    """One line for `cf-generate --list`."""
    model: ModelSpec
    """The networks."""
    chunk_frames: int
    """Latent frames denoised together (upstream `num_frame_per_block`)."""
    denoising_steps: tuple[int, ...] = (1000, 750, 500, 250)
    """Unwarped timesteps of a chunk's denoising passes (upstream `denoising_step_list`)."""
    first_chunk_denoising_steps: tuple[int, ...] | None = None
    """The same for the first generated chunk, where it differs."""
    timestep_shift: float = 5.0
    """Shift of the flow-matching schedule."""
    warp_steps: bool = True
    """Whether the step lists are mapped to the shifted schedule (upstream `warp_denoising_step`)."""
    context_timestep: float = 0.0
    """Timestep of the context pass (upstream `context_noise`)."""
    takes_image: bool = False
    """Whether the clip starts from an image (I2V)."""
    checkpoint_file: str | None = None
    """File in the checkpoint repository or folder; None where weights are random by design."""
    included_weights: str | None = None
    """Weights that come with the package, as `FOLDER@DIGEST`; another digest means other files."""
    use_ema: bool = False
    """Whether `generator_ema` is the set to load (upstream README, `--use_ema`)."""
    pixel_height: int = 480
    """Default height of the video."""
    pixel_width: int = 832
    """Default width of the video."""
    window_frames: int = 21
    """Latent frames that the KV cache holds, sink and chunk included (upstream `local_attn_size`)."""
    sink_frames: int = 0
    """First latent frames of the clip that never leave the cache (upstream `sink_size`)."""
    fps: int = 16
    """Playback rate."""
    default_prompt: str = (
        "A paper boat drifts down a rain-soaked street at dusk, lantern light rippling in the puddles around it."
    )
    """Used when no prompt is given."""


_FOUR_STEPS = (1000, 750, 500, 250)

_SHAPES = Variant(
    slug="shapes",
    summary="moving shapes from text: small, trained, comes with the package; 3 latent frames a chunk, 4 steps",
    model=SHAPES,
    chunk_frames=3,
    checkpoint_file="causal_forcing.safetensors",
    # The start of a SHA-256 over the files' own, as `weights/provenance.json` lists them; a test holds it to them.
    included_weights="shapes@810d55df8c88",
    pixel_height=128,
    pixel_width=128,
    window_frames=9,
    sink_frames=3,
    default_prompt="an orange star moves to the right over a checkered background",
)

VARIANTS: dict[str, Variant] = {
    variant.slug: variant
    for variant in (
        _SHAPES,
        replace(
            _SHAPES,
            slug="shapes-framewise",
            summary="the same, 1 latent frame a chunk, 4 steps",
            chunk_frames=1,
        ),
        replace(
            _SHAPES,
            slug="shapes-framewise-2step",
            summary="the same, 1 latent frame a chunk, 2 steps after a 4-step first chunk",
            chunk_frames=1,
            denoising_steps=(1000, 500),
            first_chunk_denoising_steps=_FOUR_STEPS,
        ),
        replace(
            _SHAPES,
            slug="shapes-framewise-1step",
            summary="the same, 1 latent frame a chunk, 1 step after a 4-step first chunk",
            chunk_frames=1,
            denoising_steps=(1000,),
            first_chunk_denoising_steps=_FOUR_STEPS,
        ),
        replace(
            _SHAPES,
            slug="shapes-i2v",
            summary="moving shapes from an image and text, 1 latent frame a chunk, 4 steps",
            chunk_frames=1,
            takes_image=True,
        ),
        Variant(
            slug="causal-forcing-wan2.1-t2v-1.3b-chunkwise",
            summary="text to video, 3 latent frames a chunk, 4 steps",
            model=WAN21_T2V_1_3B,
            chunk_frames=3,
            checkpoint_file="chunkwise/causal_forcing.pt",
        ),
        Variant(
            slug="causal-forcing-wan2.1-t2v-1.3b-framewise",
            summary="text to video, 1 latent frame a chunk, 4 steps",
            model=WAN21_T2V_1_3B,
            chunk_frames=1,
            checkpoint_file="framewise/causal_forcing.pt",
            use_ema=True,
        ),
        Variant(
            slug="causal-forcing-wan2.1-t2v-1.3b-framewise-2step",
            summary="text to video, 1 latent frame a chunk, 2 steps after a 4-step first chunk",
            model=WAN21_T2V_1_3B,
            chunk_frames=1,
            denoising_steps=(1000, 500),
            first_chunk_denoising_steps=_FOUR_STEPS,
            checkpoint_file="causal-forcing++/framewise-2step.pt",
            use_ema=True,
        ),
        Variant(
            slug="causal-forcing-wan2.1-t2v-1.3b-framewise-1step",
            summary="text to video, 1 latent frame a chunk, 1 step after a 4-step first chunk",
            model=WAN21_T2V_1_3B,
            chunk_frames=1,
            denoising_steps=(1000,),
            first_chunk_denoising_steps=_FOUR_STEPS,
            checkpoint_file="causal-forcing++/framewise-1step.pt",
            use_ema=True,
        ),
        Variant(
            slug="causal-forcing-wan2.1-i2v-1.3b-framewise",
            summary="image to video, 1 latent frame a chunk, 4 steps",
            model=WAN21_T2V_1_3B,
            chunk_frames=1,
            takes_image=True,
            checkpoint_file="framewise/causal_forcing.pt",
            use_ema=True,
        ),
        Variant(
            slug="tiny",
            summary="test model with seeded random weights: its pictures are noise",
            model=TINY,
            chunk_frames=3,
            pixel_height=96,
            pixel_width=160,
        ),
        Variant(
            slug="tiny-i2v",
            summary="the same, framewise from an image: its pictures are noise",
            model=TINY,
            chunk_frames=1,
            takes_image=True,
            pixel_height=96,
            pixel_width=160,
        ),
    )
}


def find_variant(slug: str) -> Variant:
    """Return the variant of a slug.

    Raises:
        UnknownNameError: There is none; the message offers the nearest name.
    """
    try:
        return VARIANTS[slug]
    except KeyError:
        raise UnknownNameError("slug", slug, VARIANTS) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The fixed shapes that an engine is compiled for."""

    chunk_frames: int
    """Latent frames of a chunk."""
    pixel_height: int
    """Height of the video, a multiple of 16."""
    pixel_width: int
    """Width of the video, a multiple of 16."""
    window_frames: int
    """Latent frames that the KV cache holds."""
    sink_frames: int = 0
    """Latent frames that never leave the cache."""
    batch: int = 1
    """Clips generated side by side."""
    patch_size: int = 2
    """Latent cells per token, both directions."""

    def __post_init__(self) -> None:
        multiple = LATENT_STRIDE * self.patch_size
        for name, value in (("height", self.pixel_height), ("width", self.pixel_width)):
            if value < multiple or value % multiple:
                nearest = max(multiple, round(value / multiple) * multiple)
                raise UsageError(
                    f"pixel {name} {value} is not a positive multiple of {multiple}: use --pixel-{name} {nearest}"
                )
            if value > 4096:
                raise UsageError(f"pixel {name} {value} is above 4096: the model was trained at 480×832")
        if self.sink_frames < 0 or self.window_frames < 1:
            raise UsageError(
                f"window_frames {self.window_frames} and sink_frames {self.sink_frames} must be at least 1 and 0"
            )
        if self.sink_frames + self.chunk_frames > self.window_frames:
            raise UsageError(
                f"a window of {self.window_frames} latent frames cannot hold {self.sink_frames} sink frames and a "
                f"chunk of {self.chunk_frames}: use --window-frames {self.sink_frames + self.chunk_frames} or more"
            )

    @property
    def latent_height(self) -> int:
        """Rows h of a latent frame."""
        return self.pixel_height // LATENT_STRIDE

    @property
    def latent_width(self) -> int:
        """Columns w of a latent frame."""
        return self.pixel_width // LATENT_STRIDE

    @property
    def token_rows(self) -> int:
        """Rows of tokens of a latent frame."""
        return self.latent_height // self.patch_size

    @property
    def token_columns(self) -> int:
        """Columns of tokens of a latent frame."""
        return self.latent_width // self.patch_size

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame (upstream `frame_seq_length`): 1560 at 480×832."""
        return self.token_rows * self.token_columns

    @property
    def chunk_tokens(self) -> int:
        """Tokens L of a chunk."""
        return self.chunk_frames * self.tokens_per_frame

    @property
    def cache_slots(self) -> int:
        """Token slots S of the KV cache."""
        return self.window_frames * self.tokens_per_frame

    @property
    def ring_is_chunk_aligned(self) -> bool:
        """Whether every chunk lands in consecutive slots, so that one linear write places it."""
        ring_frames = self.window_frames - self.sink_frames
        return self.chunk_frames == 1 or (
            ring_frames % self.chunk_frames == 0 and self.sink_frames % self.chunk_frames == 0
        )


def frame_count(latent_frames: int) -> int:
    """Return how many pixel frames a clip of that many latent frames has: 1 + 4(F − 1)."""
    return 1 + FRAMES_PER_LATENT * (latent_frames - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class IOTensor:
    """One named input or output of a network."""

    name: str
    """Name in the graph. Tensors of one name are one buffer in all engines of a session."""
    shape: tuple[int, ...]
    """Static shape."""
    dtype: str
    """Element type, spelled as torch and numpy do: float32, bfloat16, float16, float8_e4m3fn, int32, int64."""
    channels_last: bool = False
    """Whether its memory has channels, axis 1, innermost."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in memory."""
        return (
            self.elements
            * {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "int32": 4, "int64": 8}[self.dtype]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSpec:
    """What a compiled network takes and gives.

    A state is an output that is the next call's input: `k_cache_00_out` of `k_cache_00`. Where the pair is in
    `in_place`, the op itself updates the input's buffer and both names are bound to it; other pairs are carried over by
    the engine after each call.
    """

    name: str
    """Network name, also its file's stem."""
    inputs: tuple[IOTensor, ...]
    """Inputs in the order of the graph."""
    outputs: tuple[IOTensor, ...]
    """Outputs in the order of the graph."""
    states: tuple[tuple[str, str], ...] = ()
    """Pairs (output, input) of states."""
    in_place: bool = False
    """Whether states are updated in place by the op's contract."""

    def io_tensors(self) -> Iterator[IOTensor]:
        """Yield inputs, then outputs."""
        yield from self.inputs
        yield from self.outputs
