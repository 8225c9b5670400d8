"""Variants against the released models' table."""

from __future__ import annotations

import re

import pytest

from causal_forcing.runtime.errors import UnknownNameError
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.model_spec import SHAPES, TINY, WAN21_T2V_1_3B
from causal_forcing.runtime.variant import VARIANTS, Variant, find_variant

FOUR = (1000, 750, 500, 250)

# One row a release: upstream's README and configs (slug, file, chunk, steps, first chunk's steps, EMA, image).
RELEASES = [
    ("t2v-1.3b-chunkwise", "chunkwise/causal_forcing.pt", 3, FOUR, None, False, False),
    ("t2v-1.3b-framewise", "framewise/causal_forcing.pt", 1, FOUR, None, True, False),
    ("t2v-1.3b-framewise-2step", "causal-forcing++/framewise-2step.pt", 1, (1000, 500), FOUR, True, False),
    ("t2v-1.3b-framewise-1step", "causal-forcing++/framewise-1step.pt", 1, (1000,), FOUR, True, False),
    ("i2v-1.3b-framewise", "framewise/causal_forcing.pt", 1, FOUR, None, True, True),
]

# The same for the model that comes with the package (slug, chunk, steps, first chunk's steps, image).
INCLUDED = [
    ("shapes", 3, FOUR, None, False),
    ("shapes-framewise", 1, FOUR, None, False),
    ("shapes-framewise-2step", 1, (1000, 500), FOUR, False),
    ("shapes-framewise-1step", 1, (1000,), FOUR, False),
    ("shapes-i2v", 1, FOUR, None, True),
]


@pytest.mark.parametrize(("name", "file", "chunk", "steps", "first_steps", "ema", "image"), RELEASES)
def test_variant_of_a_release_has_upstreams_settings(
    name: str,
    file: str,
    chunk: int,
    steps: tuple[int, ...],
    first_steps: tuple[int, ...] | None,
    ema: bool,
    image: bool,
) -> None:
    variant = find_variant(f"causal-forcing-wan2.1-{name}")
    assert (variant.checkpoint_file, variant.chunk_frames, variant.denoising_steps) == (file, chunk, steps)
    assert (variant.first_chunk_denoising_steps, variant.use_ema, variant.takes_image) == (first_steps, ema, image)
    assert (variant.timestep_shift, variant.context_timestep, variant.warp_steps) == (5.0, 0.0, True)
    assert (variant.window_frames, variant.sink_frames, variant.fps) == (21, 0, 16)
    assert (variant.pixel_height, variant.pixel_width) == (480, 832)
    assert variant.model is WAN21_T2V_1_3B


@pytest.mark.parametrize(("slug", "chunk", "steps", "first_steps", "image"), INCLUDED)
def test_variant_of_the_included_model_mirrors_the_releases(
    slug: str, chunk: int, steps: tuple[int, ...], first_steps: tuple[int, ...] | None, image: bool
) -> None:
    variant, released = find_variant(slug), find_variant(f"causal-forcing-wan2.1-{RELEASES[0][0]}")
    assert (variant.chunk_frames, variant.denoising_steps) == (chunk, steps)
    assert (variant.first_chunk_denoising_steps, variant.use_ema, variant.takes_image) == (first_steps, False, image)
    for field in ("timestep_shift", "context_timestep", "warp_steps", "fps"):
        assert getattr(variant, field) == getattr(released, field)
    assert (variant.pixel_height, variant.pixel_width) == (128, 128)
    assert (variant.window_frames, variant.sink_frames) == (9, 3)
    assert (variant.model, variant.checkpoint_file) == (SHAPES, "causal_forcing.safetensors")
    assert re.fullmatch(r"shapes@[0-9a-f]{12}", variant.included_weights or "")


def test_variants_are_the_included_the_releases_and_two_test_models() -> None:
    included = [row[0] for row in INCLUDED]
    releases = [f"causal-forcing-wan2.1-{release[0]}" for release in RELEASES]
    assert list(VARIANTS) == [*included, *releases, "tiny", "tiny-i2v"]
    assert {slug for slug, variant in VARIANTS.items() if variant.included_weights} == set(included)
    assert all(variant.slug == slug for slug, variant in VARIANTS.items())
    for slug in ("tiny", "tiny-i2v"):
        assert VARIANTS[slug].model is TINY
        assert VARIANTS[slug].checkpoint_file is None


def test_wan_model_has_the_released_sizes() -> None:
    dit, text, vae = WAN21_T2V_1_3B.dit, WAN21_T2V_1_3B.text, WAN21_T2V_1_3B.vae
    assert (dit.dim, dit.ffn_dim, dit.num_heads, dit.head_dim, dit.num_layers) == (1536, 8960, 12, 128, 30)
    assert (dit.freq_dim, dit.text_dim, dit.text_len, dit.latent_channels, dit.patch_size) == (256, 4096, 512, 16, 2)
    assert dit.eps == 1e-6
    assert (text.vocab_size, text.dim, text.ffn_dim, text.num_heads, text.num_layers) == (256384, 4096, 10240, 64, 24)
    assert (vae.base_dim, vae.dim_mult, vae.num_res_blocks) == (96, (1, 2, 4, 4), 2)
    assert len(vae.latent_mean) == len(vae.latent_std) == 16


@pytest.mark.parametrize("slug", list(VARIANTS))
def test_default_geometry_of_every_variant_is_valid_and_takes_one_cache_write(slug: str) -> None:
    variant = VARIANTS[slug]
    shapes = Geometry(
        chunk_frames=variant.chunk_frames,
        pixel_height=variant.pixel_height,
        pixel_width=variant.pixel_width,
        window_frames=variant.window_frames,
        sink_frames=variant.sink_frames,
    )
    assert shapes.ring_is_chunk_aligned


def test_find_variant_with_a_typo_offers_the_nearest_and_lists_all() -> None:
    with pytest.raises(UnknownNameError, match="unknown slug 'tinny': did you mean 'tiny'\\?") as caught:
        find_variant("tinny")
    assert all(slug in str(caught.value) for slug in VARIANTS)


def test_variant_default_prompts_suit_the_model() -> None:
    prompts = {variant.model.name: variant.default_prompt for variant in VARIANTS.values()}
    assert prompts["shapes"] == "an orange star moves to the right over a checkered background"
    assert prompts["tiny"] == prompts["wan2.1-t2v-1.3b"]
    assert prompts["tiny"].startswith("A paper boat drifts")


def test_variant_summaries_are_one_line_each() -> None:
    for variant in VARIANTS.values():
        assert isinstance(variant, Variant)
        assert variant.summary
        assert "\n" not in variant.summary
