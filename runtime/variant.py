"""The released ways of running a model, by the slugs that stand for them, and where their files lie: plain data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from causal_forcing.runtime.errors import UnknownNameError
from causal_forcing.runtime.model_spec import SHAPES, TINY, WAN21_T2V_1_3B, ModelSpec

CHECKPOINT_REPOSITORY = "zhuhz22/Causal-Forcing"
CHECKPOINT_REVISION = "2f8eb8bb6eeb1238da9d13e5420d342a74d634a6"
"""Pinned revision of the released Causal-Forcing checkpoints."""

WAN_REPOSITORY = "Wan-AI/Wan2.1-T2V-1.3B"
WAN_REVISION = "37ec512624d61f7aa208f7ea8140a131f93afc9a"
"""Pinned revision of the Wan base files: text encoder, tokenizer, VAE."""


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
