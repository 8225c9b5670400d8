"""The ring: which frames it holds, and where."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.kv_cache import CacheRing

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    chunk_frames, sink_frames = draw(st.integers(1, 5)), draw(st.integers(0, 6))
    return Geometry(
        chunk_frames=chunk_frames,
        pixel_height=16,
        pixel_width=16 * draw(st.integers(1, 3)),
        window_frames=sink_frames + chunk_frames + draw(st.integers(0, 12)),
        sink_frames=sink_frames,
    )


def frames_upstream_keeps(geometry: Geometry, chunks: int) -> list[int]:
    """Shift frames as upstream does; returns those held after that many chunks, oldest first."""
    held: list[int] = []
    for chunk in range(chunks):
        fresh = range(chunk * geometry.chunk_frames, (chunk + 1) * geometry.chunk_frames)
        evicted = max(0, len(held) + len(fresh) - geometry.window_frames)
        held = held[: geometry.sink_frames] + held[geometry.sink_frames + evicted :] + list(fresh)
    return held


@PROPERTY
@given(geometry=geometries(), chunks=st.integers(1, 30))
def test_ring_after_any_number_of_chunks_holds_what_upstreams_cache_holds(geometry: Geometry, chunks: int) -> None:
    ring = CacheRing(geometry)
    slots: dict[int, int] = {}
    for chunk in range(chunks):
        start = chunk * geometry.chunk_frames
        slots |= {slot: start + frame for frame, slot in enumerate(ring.slots(start))}
        valid = ring.valid_slots(start)
        assert sorted(slots) == list(range(0, valid, geometry.tokens_per_frame))
    assert sorted(slots.values()) == frames_upstream_keeps(geometry, chunks)


@PROPERTY
@given(geometry=geometries(), chunk=st.integers(0, 10**6))
def test_ring_slots_of_any_chunk_are_distinct_frame_aligned_and_valid(geometry: Geometry, chunk: int) -> None:
    ring, start = CacheRing(geometry), chunk * geometry.chunk_frames
    slots = ring.slots(start)
    assert len(set(slots)) == geometry.chunk_frames
    for slot in slots:
        assert slot % geometry.tokens_per_frame == 0
        assert 0 <= slot < ring.valid_slots(start) <= geometry.cache_slots


@PROPERTY
@given(geometry=geometries())
def test_ring_is_called_chunk_aligned_exactly_where_no_chunk_wraps(geometry: Geometry) -> None:
    ring, tokens = CacheRing(geometry), geometry.tokens_per_frame
    ring_frames = geometry.window_frames - geometry.sink_frames
    period = geometry.sink_frames + math.lcm(ring_frames, geometry.chunk_frames) + geometry.chunk_frames
    wraps = False
    for start in range(0, period, geometry.chunk_frames):
        slots = ring.slots(start)
        wraps |= slots != list(range(slots[0], slots[0] + geometry.chunk_frames * tokens, tokens))
    assert geometry.ring_is_chunk_aligned == (not wraps)


def test_ring_with_the_defaults_goes_round_after_seven_chunks() -> None:
    geometry = Geometry(chunk_frames=3, pixel_height=480, pixel_width=832, window_frames=21)
    ring = CacheRing(geometry)
    assert ring.slots(18) == [18 * 1560, 19 * 1560, 20 * 1560]
    assert ring.valid_slots(15) == 18 * 1560
    assert ring.valid_slots(18) == ring.valid_slots(21) == 32760
    assert ring.slots(21) == [0, 1560, 3120]


def test_ring_with_a_sink_never_writes_it_again() -> None:
    geometry = Geometry(chunk_frames=1, pixel_height=16, pixel_width=16, window_frames=4, sink_frames=2)
    ring = CacheRing(geometry)
    assert [ring.slots(frame)[0] for frame in range(9)] == [0, 1, 2, 3, 2, 3, 2, 3, 2]
