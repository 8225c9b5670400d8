"""A clip made by several processes is the clip that one makes, and upstream's golden ones are upstream's."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import triton_interpreter
from tests.parity.test_golden import GOLDEN, MANIFEST
from tests.runtime.rank_process import ClipCase, make_clip, run_ranks

TOLERANCE = 1e-5
"""Largest difference allowed in fp32, where matrix products of fewer rows sum in another order."""

FP8_TOLERANCE = 2e-2
"""That a value near the edge between two codes falls on its other side moves an e4m3 value by an eighth."""

TINY = {"pixel_height": 48, "pixel_width": 80}
"""15 tokens a frame, which two ranks cannot share evenly."""

CASES = {
    2: {
        "chunkwise, outgrowing the window": ClipCase(slug="tiny", blocks=4, geometry={**TINY, "window_frames": 7}),
        "framewise, from an image": ClipCase(slug="tiny-i2v", blocks=4, geometry=TINY, image=True),
        "a cache of codes, as tapes": ClipCase(slug="tiny", blocks=2, geometry=TINY, backend="cuda", fp8_cache=True),
    },
    3: {
        "trained, framewise": ClipCase(
            slug="shapes-framewise", blocks=2, geometry={"pixel_height": 80, "pixel_width": 64}
        ),
    },
}

STORED = {
    "by stores, as tapes": ClipCase(
        slug="tiny",
        blocks=3,
        geometry={"pixel_height": 32, "pixel_width": 48, "window_frames": 6},
        backend="cuda",
        stores=True,
    ),
}
"""6 tokens a frame. The first context pass is one with the denoising pass that follows, over two segments; then the
window is full, and the second one is by itself."""

GOLDEN_CLIPS = {name: ClipCase(golden=name) for name in ("dit_b_local6_sink1_chunkwise",)}
"""Passes over a window with a sink."""

CROSSED = "decoding beside the passes"

Made = dict[tuple[int, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """What each rank made of each case."""
    results: Made = {}
    stored = STORED if triton_interpreter.is_usable() else {}
    for ranks, cases in {2: CASES[2] | GOLDEN_CLIPS | {CROSSED: ClipCase(crossed=True)} | stored, 3: CASES[3]}.items():
        folder = tmp_path_factory.mktemp("ranks")
        by_rank = run_ranks(list(cases.values()), ranks, folder)
        results |= {(ranks, name): list(clips) for name, clips in zip(cases, zip(*by_rank, strict=True), strict=True)}
        buffers = list(folder.glob("to-heads-*"))  # a buffer is a file
        assert bool(buffers) == any(case.stores for case in cases.values())
    return results


@pytest.mark.parametrize(("ranks", "name"), [(ranks, name) for ranks, cases in CASES.items() for name in cases])
def test_every_rank_has_the_clip_that_one_process_makes(ranks: int, name: str, made: Made) -> None:
    case = CASES[ranks][name]
    want = make_clip(case, 1)
    tolerance = FP8_TOLERANCE if case.fp8_cache else TOLERANCE
    assert want["latents"].isfinite().all()
    assert want["pixels"].std() > 0.01
    for got in made[ranks, name]:
        torch.testing.assert_close(got["latents"], want["latents"], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(got["pixels"], want["pixels"], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", STORED)
def test_every_rank_has_that_clip_where_layers_exchange_by_stores(name: str, made: Made) -> None:
    triton_interpreter.require()
    want = make_clip(STORED[name], 1)
    for got in made[2, name]:
        torch.testing.assert_close(got["latents"], want["latents"], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(("ranks", "name"), [(2, "framewise, from an image"), (3, "trained, framewise")])
def test_a_rank_holds_the_cache_of_its_own_heads_alone(ranks: int, name: str, made: Made) -> None:
    whole = make_clip(CASES[ranks][name], 1)["cache"]
    assert made[ranks, name][0]["cache"] == (whole[0], whole[1] // ranks, *whole[2:])


@pytest.mark.parametrize("name", GOLDEN_CLIPS)
def test_golden_clip_is_reproduced_by_every_rank(name: str, made: Made) -> None:
    case = MANIFEST["cases"][name]
    want = load_file(GOLDEN / case["file"])
    for got in made[2, name]:
        torch.testing.assert_close(got["latents"], want["latents"], **case["tolerance"])


def test_collectives_of_decoder_and_passes_need_no_common_order(made: Made) -> None:
    for got in made[2, CROSSED]:
        assert got["rows"][0, 0, 0, :, 0].tolist() == [0, 1]
        assert got["tokens"][0, :, 0].tolist() == [10, 11]
