"""RoPE phases against complex128 arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_forcing.plugins.dit_ops import rotate
from causal_forcing.runtime.rope import RopePhases, axis_dims


def upstream_rope(x: torch.Tensor, frames: int, rows: int, columns: int, start_frame: int) -> torch.Tensor:
    """Rotate [B, N, L, D] as upstream's causal_rope_apply does: complex128, interleaved pairs, three tables."""
    dim = x.shape[-1]
    parts = (dim - 4 * (dim // 6), 2 * (dim // 6), 2 * (dim // 6))
    time, height, width = (
        torch.polar(
            torch.ones(start_frame + 64, part // 2, dtype=torch.float64),
            torch.outer(
                torch.arange(start_frame + 64, dtype=torch.float64),
                1.0 / torch.pow(10000.0, torch.arange(0, part, 2, dtype=torch.float64).div(part)),
            ),
        )
        for part in parts
    )
    factors = torch.cat(
        [
            time[start_frame : start_frame + frames].view(frames, 1, 1, -1).expand(frames, rows, columns, -1),
            height[:rows].view(1, rows, 1, -1).expand(frames, rows, columns, -1),
            width[:columns].view(1, 1, columns, -1).expand(frames, rows, columns, -1),
        ],
        dim=-1,
    ).reshape(frames * rows * columns, -1)
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * factors).flatten(-2)


def phases(
    head_dim: int, frames: int, rows: int, columns: int, *, places: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = (torch.full((frames * rows * columns, head_dim // 2), float("nan")) for _ in range(2))
    rope = RopePhases(cos, sin, frames=frames, rows=rows, columns=columns)
    for place in places:
        rope.place(place)
    return cos, sin


@pytest.mark.parametrize(("head_dim", "dims"), [(128, (44, 42, 42)), (32, (12, 10, 10)), (24, (8, 8, 8))])
def test_axis_dims_split_the_head_as_upstream_does(head_dim: int, dims: tuple[int, int, int]) -> None:
    assert axis_dims(head_dim) == dims


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    head_dim=st.sampled_from([8, 24, 32, 64, 128]),
    frames=st.integers(1, 3),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    start_frame=st.one_of(st.integers(0, 30), st.integers(1000, 1100), st.just(20_000)),
)
def test_rotation_at_any_position_equals_complex128(
    head_dim: int, frames: int, rows: int, columns: int, start_frame: int
) -> None:
    x = torch.randn(1, 2, frames * rows * columns, head_dim, generator=torch.Generator().manual_seed(start_frame))
    got = rotate(x, *phases(head_dim, frames, rows, columns, places=(start_frame,)))
    torch.testing.assert_close(got.double(), upstream_rope(x, frames, rows, columns, start_frame), atol=2e-6, rtol=0)


def test_phases_beyond_upstreams_1024_positions_go_on_without_repeating() -> None:
    seen = [phases(32, 1, 1, 1, places=(frame,))[0] for frame in (0, 1023, 1024, 1025, 2048)]
    for index, cos in enumerate(seen):
        assert cos.isfinite().all()
        assert not any(torch.equal(cos, other) for other in seen[:index])


def test_place_changes_the_time_part_only() -> None:
    frames, rows, columns, time_pairs = 2, 3, 4, 6
    for before, after in zip(
        phases(32, frames, rows, columns, places=(3,)),
        phases(32, frames, rows, columns, places=(3, 9)),
        strict=True,
    ):
        assert torch.equal(before[:, time_pairs:], after[:, time_pairs:])
        assert not torch.equal(before[:, :time_pairs], after[:, :time_pairs])
        per_frame = after[:, :time_pairs].view(frames, rows * columns, -1)
        assert torch.equal(per_frame, per_frame[:, :1].expand_as(per_frame))


def test_place_twice_leaves_nothing_of_the_first() -> None:
    for once, twice in zip(phases(32, 3, 2, 2, places=(40,)), phases(32, 3, 2, 2, places=(7, 40)), strict=True):
        assert torch.equal(once, twice)
        assert once.isfinite().all()


def test_phases_of_a_chunks_later_frame_equal_those_of_a_chunk_that_starts_there() -> None:
    chunk = phases(32, 3, 2, 2, places=(5,))[1].view(3, 4, -1)
    assert torch.equal(chunk[2], phases(32, 1, 2, 2, places=(7,))[1])
