"""Variants against the released models' table, and shapes that cannot be."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_forcing.runtime.errors import UnknownNameError, UsageError
from causal_forcing.runtime.spec import (
    SHAPES,
    TINY,
    VARIANTS,
    WAN21_T2V_1_3B,
    Geometry,
    IOTensor,
    NetworkSpec,
    Variant,
    find_variant,
    frame_count,
)

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


def geometry(**changes: int) -> Geometry:
    values = {"chunk_frames": 3, "pixel_height": 480, "pixel_width": 832, "window_frames": 21}
    return Geometry(**{**values, **changes})


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


def test_default_geometry_has_upstreams_token_counts() -> None:
    shapes = geometry()
    assert (shapes.latent_height, shapes.latent_width) == (60, 104)
    assert (shapes.tokens_per_frame, shapes.chunk_tokens, shapes.cache_slots) == (1560, 4680, 32760)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_height": 481}, "pixel height 481 is not a positive multiple of 16: use --pixel-height 480"),
        ({"pixel_width": 830}, "pixel width 830 is not a positive multiple of 16: use --pixel-width 832"),
        ({"pixel_width": 0}, "pixel width 0 is not a positive multiple of 16: use --pixel-width 16"),
        ({"pixel_height": -32}, "pixel height -32 is not a positive multiple of 16: use --pixel-height 16"),
        ({"pixel_height": 8}, "use --pixel-height 16"),
        ({"pixel_height": 4112}, "pixel height 4112 is above 4096"),
        ({"sink_frames": -1}, "window_frames 21 and sink_frames -1 must be at least 1 and 0"),
        ({"window_frames": 0}, "window_frames 0 and sink_frames 0 must be at least 1 and 0"),
        ({"window_frames": 2}, "cannot hold 0 sink frames and a chunk of 3: use --window-frames 3 or more"),
        ({"sink_frames": 19}, "cannot hold 19 sink frames and a chunk of 3: use --window-frames 22 or more"),
    ],
)
def test_geometry_that_cannot_be_says_what_to_use(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        geometry(**changes)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    chunk=st.integers(1, 5),
    height=st.integers(-20, 4096),
    width=st.integers(-20, 4096),
    window=st.integers(1, 30),
    sink=st.integers(0, 30),
)
def test_geometry_with_what_its_errors_suggest_is_accepted(
    chunk: int, height: int, width: int, window: int, sink: int
) -> None:
    values = {"chunk_frames": chunk, "pixel_height": height, "pixel_width": width}
    values |= {"window_frames": window, "sink_frames": sink}
    for _ in range(4):
        with contextlib.suppress(UsageError):
            Geometry(**values)
            return
        with pytest.raises(UsageError) as caught:
            Geometry(**values)
        suggested = re.search(r"use --([a-z-]+) (\d+)", str(caught.value))
        assert suggested is not None, str(caught.value)
        values[suggested[1].replace("-", "_")] = int(suggested[2])
    pytest.fail("four suggestions, one for each wrong value at most, did not make a geometry")


@pytest.mark.parametrize(("latent_frames", "frames"), [(1, 1), (2, 5), (3, 9), (21, 81)])
def test_frame_count_of_latent_frames_is_1_and_4_more_for_each_after_the_first(latent_frames: int, frames: int) -> None:
    assert frame_count(latent_frames) == frames


def test_network_spec_lists_inputs_before_outputs() -> None:
    a, b = (IOTensor(name=name, shape=(2, 3), dtype="float32") for name in "ab")
    assert list(NetworkSpec(name="n", inputs=(a,), outputs=(b,)).io_tensors()) == [a, b]
    assert a.elements == 6


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
