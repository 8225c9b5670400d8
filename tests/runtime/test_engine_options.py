"""Options of an engine: what they become, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.errors import UnknownNameError, UsageError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimization_level": 6}, "--optimization-level 6 is out of range: use 0 to 5"),
        ({"optimization_level": -1}, "--optimization-level -1 is out of range"),
        ({"workspace_mib": 0}, "--workspace-mib 0 leaves no memory: use 1 or more"),
        ({"plugin": "pyhton"}, "unknown plugin 'pyhton': did you mean 'python'"),
    ],
)
def test_plan_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EngineOptions(slug="tiny", **options)


def test_options_without_any_take_the_variants_shapes() -> None:
    shapes = EngineOptions(slug="tiny").geometry()
    assert (shapes.pixel_height, shapes.pixel_width, shapes.window_frames, shapes.sink_frames) == (96, 160, 21, 0)


def test_options_that_are_given_override_the_variants_shapes_even_with_0() -> None:
    options = EngineOptions(slug="tiny", pixel_height=32, pixel_width=48, window_frames=9, sink_frames=3)
    shapes = options.geometry()
    assert (shapes.pixel_height, shapes.pixel_width, shapes.window_frames, shapes.sink_frames) == (32, 48, 9, 3)
    with pytest.raises(UsageError, match="window_frames 0"):
        EngineOptions(slug="tiny", window_frames=0).geometry()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp23"}, "unknown precision 'fp23': did you mean 'fp32'?.*valid: fp32, bf16, fp16"),
        ({"decoder": "van"}, "unknown decoder 'van': did you mean 'wan'"),
    ],
)
def test_options_with_an_unknown_name_offer_the_nearest(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        EngineOptions(**options)


@pytest.mark.parametrize("files", [{"checkpoint": Path("a.pt")}, {"wan_folder": Path("wan")}, {"taehv": Path("a.pth")}])
def test_options_with_random_weights_and_files_are_refused(files: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--random-weights excludes --checkpoint, --wan-folder and --taehv"):
        EngineOptions(random_weights=0, **files)


def test_options_with_an_unknown_field_are_refused() -> None:
    with pytest.raises(TypeError, match="pixel_heigth"):
        EngineOptions(**{"pixel_heigth": 480})  # type: ignore[arg-type]
