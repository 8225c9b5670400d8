"""Shapes that are upstream's, and shapes that cannot be."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_forcing.runtime.errors import UsageError
from causal_forcing.runtime.geometry import Geometry, frame_count


def geometry(**changes: int) -> Geometry:
    values = {"chunk_frames": 3, "pixel_height": 480, "pixel_width": 832, "window_frames": 21}
    return Geometry(**{**values, **changes})


def test_default_geometry_has_upstreams_token_counts() -> None:
    shapes = geometry()
    assert (shapes.latent_height, shapes.latent_width) == (60, 104)
    assert (shapes.tokens_per_frame, shapes.chunk_tokens, shapes.cache_slots) == (1560, 4680, 32760)


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
