# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What several programs of `hopper_attention` found for one tile, made one result by a second kernel.

The first kernel leaves its schedule in the workspace, as int32: how many whole rounds of tiles went one to a program,
the blocks of a tile of the last segment and of the one before it, and then, for each program and for the end, the
first of the units left over from these rounds that the program worked on.
"""

from __future__ import annotations

import triton
import triton.language as tl

SCHEDULE_HEADER = tl.constexpr(3)
"""Numbers before the first program's."""
PIECES = tl.constexpr(4)
"""Pieces that are loaded at a time, as one alone would leave the kernel to wait for memory."""
FAR = tl.constexpr(2**31 - 1)


@triton.jit
def units_before(tile, segment_tiles, first_blocks, second_blocks):
    """Return how many units the tiles before this one have."""
    return tl.minimum(tile, segment_tiles) * first_blocks + tl.maximum(tile - segment_tiles, 0) * second_blocks


@triton.jit
def find_piece(program, last_program, runs_ptr, tile_start, lane, TILE: tl.constexpr):
    """Return the lines of the workspace where a program left a tile's rows, and whether it did."""
    start = tl.load(runs_ptr + program, mask=program <= last_program, other=FAR)
    end = tl.load(runs_ptr + program + 1, mask=program <= last_program, other=FAR)
    slot = program * 2 + tl.where(start <= tile_start, 1, 0)
    return slot * TILE + lane, lane * 0 + start < end


@triton.jit(do_not_specialize=("programs", "segment_tokens", "row_tiles", "heads"))
def combine_kernel(
    schedule_ptr, out_ptr, pieces_ptr, statistics_ptr, value_scales_ptr,
    programs, segment_tokens, row_tiles, heads, out_head, out_row,
    SEGMENTS: tl.constexpr, FP8: tl.constexpr, LINES: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Combine the pieces of one tile, for some of its queries, if there is more than one."""
    segment_tiles = row_tiles * heads
    rounds = tl.load(schedule_ptr)
    first_blocks = tl.load(schedule_ptr + 1)
    second_blocks = tl.load(schedule_ptr + 2)
    runs_ptr = schedule_ptr + SCHEDULE_HEADER
    tile = rounds * programs + tl.program_id(0)
    base = units_before(rounds * programs, segment_tiles, first_blocks, second_blocks)
    start = units_before(tile, segment_tiles, first_blocks, second_blocks) - base
    end = units_before(tile + 1, segment_tiles, first_blocks, second_blocks) - base
    every = tl.arange(0, MAX_PROGRAMS)
    starts = tl.load(runs_ptr + every, mask=every < programs, other=FAR)
    first_program = tl.sum((starts <= start).to(tl.int32), 0) - 1
    last_program = tl.sum((starts < end).to(tl.int32), 0) - 1
    if (tile < segment_tiles * SEGMENTS) & (first_program < last_program):
        lane = tl.program_id(1) * LINES + tl.arange(0, LINES)
        column = tl.arange(0, D)
        top = tl.full([LINES], float("-inf"), tl.float32)
        for some in range(first_program, last_program + 1, PIECES):
            for i in tl.static_range(PIECES):
                line, there = find_piece(some + i, last_program, runs_ptr, start, lane, TILE)
                top = tl.maximum(top, tl.load(statistics_ptr + line * 2, mask=there, other=float("-inf")))
        total = tl.zeros([LINES], tl.float32)
        weighted = tl.zeros([LINES, D], tl.float32)
        for some in range(first_program, last_program + 1, PIECES):
            for i in tl.static_range(PIECES):
                line, there = find_piece(some + i, last_program, runs_ptr, start, lane, TILE)
                piece_top = tl.load(statistics_ptr + line * 2, mask=there, other=float("-inf"))
                piece_total = tl.load(statistics_ptr + line * 2 + 1, mask=there, other=0.0)
                piece = tl.load(pieces_ptr + line[:, None] * D + column[None, :], mask=there[:, None], other=0.0)
                weight = tl.exp2(piece_top - top)
                total += piece_total * weight
                weighted += piece * weight[:, None]
        head = tile % segment_tiles // row_tiles
        segment = SEGMENTS - 1 - tile // segment_tiles
        token = tile % row_tiles * TILE + lane
        inverse = 1.0 / total
        if FP8:
            inverse *= tl.load(value_scales_ptr + head)
        row = (segment * segment_tokens + token).to(tl.int64) * out_row + head.to(tl.int64) * out_head
        result = (weighted * inverse[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row[:, None] + column[None, :], result, mask=(token < segment_tokens)[:, None])
