# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What several programs of `hopper_attention` found for one tile, made one result by a second kernel."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from causal_forcing.plugins.kernels.hopper_attention import KEYS, ROWS, SIZES, D, attention_kernel, store_rows
from causal_forcing.plugins.kernels.hopper_schedule import count_rounds, measure, run_start, units_before

__all__ = ["attention_kernel", "combine_kernel"]


@gluon.jit(do_not_specialize=SIZES)
def combine_kernel(
    valid_ptr,
    out_ptr,
    pieces_ptr,
    statistics_ptr,
    value_scales_ptr,
    programs,
    segment_tokens,
    row_tiles,
    heads,
    cache_slots,
    out_head,
    out_row,
    SEGMENTS: gl.constexpr,
    FP8: gl.constexpr,
    LINES: gl.constexpr,
    MAX_PROGRAMS: gl.constexpr,
):
    """Combine the pieces of one tile, for some of its queries, if there are any."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    segment_tiles = row_tiles * heads
    sizes = measure(valid_ptr, cache_slots, segment_tiles, SEGMENTS, KEYS)
    rounds = count_rounds(programs, sizes)
    tile = rounds * programs + gl.program_id(0)
    base = units_before(rounds * programs, sizes)
    start = units_before(tile, sizes) - base
    end = units_before(tile + 1, sizes) - base
    others = 1 + gl.arange(0, MAX_PROGRAMS, gl.BlockedLayout([1], [32], [4], [0]))
    starts = run_start(others, programs, rounds, sizes)
    first_program = gl.sum(((others < programs) & (starts <= start)).to(gl.int32), 0)
    last_program = gl.sum(((others < programs) & (starts < end)).to(gl.int32), 0)
    if (tile < segment_tiles * SEGMENTS) & (first_program < last_program):
        lane = gl.program_id(1) * LINES + gl.arange(0, LINES, by_row)
        column = gl.arange(0, D, gl.SliceLayout(0, layout))
        top = gl.full([LINES], float("-inf"), gl.float32, by_row)
        total = gl.full([LINES], 0.0, gl.float32, by_row)
        acc = gl.zeros([LINES, D], gl.float32, layout)
        for program in range(first_program, last_program + 1):
            own_start = run_start(program, programs, rounds, sizes)
            if own_start < run_start(program + 1, programs, rounds, sizes):
                line = (program * 2 + gl.where(own_start <= start, 1, 0)) * (2 * ROWS) + lane
                piece_top = gl.load(statistics_ptr + line * 2)
                new_top = gl.maximum(top, piece_top)
                decay = gl.exp2(top - new_top)
                weight = gl.exp2(piece_top - new_top)
                top = new_top
                total = total * decay + gl.load(statistics_ptr + line * 2 + 1) * weight
                piece = gl.load(pieces_ptr + line[:, None] * D + column[None, :])
                acc = acc * decay[:, None] + piece * weight[:, None]
        head = tile % segment_tiles // row_tiles
        segment = SEGMENTS - 1 - tile // segment_tiles
        token = tile % row_tiles * (2 * ROWS) + lane
        store_rows(acc, total, token, segment, head, segment_tokens, out_ptr, out_head, out_row, value_scales_ptr, FP8)
