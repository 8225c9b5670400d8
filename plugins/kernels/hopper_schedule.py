# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""How attention's work is cut evenly over the programs of a persistent grid, though only the device knows its size.

A tile is 128 queries of one head; a unit is a tile against one block of keys. Tiles of the last segment come first, and
within a segment those of a head follow each other, so that programs at work at the same time read the same keys, out of
the L2 cache. Whole rounds of tiles go one to a program. The units of the tiles left over, in a row, are cut into one
run a program, of such lengths that all programs have the same number of units in the end: 156 tiles cost 132
multiprocessors 1.18 rounds instead of 2.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def count_blocks(valid_ptr, segment, cache_slots, KEYS: gl.constexpr):
    """Return how many slots a segment attends to, at least 1, and how many blocks they take."""
    valid = gl.minimum(gl.maximum(gl.load(valid_ptr + segment), 1), cache_slots)
    return valid, (valid + KEYS - 1) // KEYS


@gluon.jit
def units_before(tile, sizes):
    """Return how many units the tiles before this one have."""
    segment_tiles, _tiles, first_blocks, second_blocks = sizes
    return gl.minimum(tile, segment_tiles) * first_blocks + gl.maximum(tile - segment_tiles, 0) * second_blocks


@gluon.jit
def tile_of(unit, sizes):
    """Return the tile that a unit belongs to."""
    segment_tiles, _tiles, first_blocks, second_blocks = sizes
    of_second = segment_tiles + (unit - segment_tiles * first_blocks) // second_blocks
    return gl.where(unit < segment_tiles * first_blocks, unit // first_blocks, of_second)


@gluon.jit
def measure(valid_ptr, cache_slots, segment_tiles, SEGMENTS: gl.constexpr, KEYS: gl.constexpr):
    """Return the sizes of all work: tiles of a segment, tiles, blocks of the last segment and of the one before it."""
    _, first_blocks = count_blocks(valid_ptr, SEGMENTS - 1, cache_slots, KEYS)
    _, second_blocks = count_blocks(valid_ptr, 0, cache_slots, KEYS)
    return segment_tiles, segment_tiles * SEGMENTS, first_blocks, second_blocks


@gluon.jit
def count_rounds(programs, sizes):
    """Return how many whole rounds of tiles no program has too much of."""
    _segment_tiles, tiles, first_blocks, second_blocks = sizes
    return gl.minimum(tiles, units_before(tiles, sizes) // gl.maximum(first_blocks, second_blocks)) // programs


@gluon.jit
def run_start(program, programs, rounds, sizes):
    """Return the first of the units left over from whole rounds that a program has."""
    _segment_tiles, tiles, _first_blocks, _second_blocks = sizes
    start = units_before(tiles, sizes) * program // programs
    for i in range(rounds):
        start -= units_before(i * programs + program, sizes) - units_before(i * programs, sizes)
    return start


@gluon.jit
def plan_program(program, programs, sizes):
    """Return a program's rounds, its run of what is left over, [start, end), and how many parts it has in all."""
    rounds = count_rounds(programs, sizes)
    start = run_start(program, programs, rounds, sizes)
    end = run_start(program + 1, programs, rounds, sizes)
    base = units_before(rounds * programs, sizes)
    pieces = gl.where(end > start, tile_of(base + end - 1, sizes) - tile_of(base + start, sizes) + 1, 0)
    return program, programs, rounds, start, end, rounds + pieces


@gluon.jit
def store_schedule(schedule_ptr, plan, sizes):
    """Leave a program's part of the schedule to the kernel that combines, which says what it holds."""
    program, programs, rounds, start, end, _parts = plan
    _segment_tiles, _tiles, first_blocks, second_blocks = sizes
    gl.store(schedule_ptr + 3 + program, start)
    if program == programs - 1:
        gl.store(schedule_ptr, rounds)
        gl.store(schedule_ptr + 1, first_blocks)
        gl.store(schedule_ptr + 2, second_blocks)
        gl.store(schedule_ptr + 3 + programs, end)


@gluon.jit
def find_part(part, plan, sizes):
    """Return the tile of a part, its blocks [first, last), and how many blocks the tile has."""
    program, programs, rounds, start, end, _parts = plan
    segment_tiles, _tiles, first_blocks, second_blocks = sizes
    base = units_before(rounds * programs, sizes)
    whole = part < rounds
    tile = gl.where(whole, part * programs + program, tile_of(base + start, sizes) + part - rounds)
    blocks = gl.where(tile < segment_tiles, first_blocks, second_blocks)
    offset = units_before(tile, sizes) - base
    first = gl.where(whole, 0, gl.maximum(start - offset, 0))
    last = gl.where(whole, blocks, gl.minimum(end - offset, blocks))
    return tile, first, last, blocks
