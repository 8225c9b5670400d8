"""How the work of attention is cut evenly over the programs of a persistent grid, when its size is known on the device.

A tile is some queries of one head; a unit is one tile against one block of keys. All tiles of the last segment come
first, then those of the one before: programs that run at the same time then read the same keys, out of the L2 cache.
Whole rounds of tiles go one to a program; the units of the rest are cut into as many equal runs as there are programs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def count_blocks(valid_ptr, segment, cache_slots, KEYS: gl.constexpr):
    """Return the slots a segment attends to, at least 1, and the blocks they take."""
    valid = gl.minimum(gl.maximum(gl.load(valid_ptr + segment), 1), cache_slots)
    return valid, (valid + KEYS - 1) // KEYS


@gluon.jit
def units_before(tile, segment_tiles, first_blocks, second_blocks):
    """Return the units of all tiles before this one."""
    return gl.minimum(tile, segment_tiles) * first_blocks + gl.maximum(tile - segment_tiles, 0) * second_blocks


@gluon.jit
def tile_of(unit, segment_tiles, first_blocks, second_blocks):
    """Return the tile that a unit belongs to."""
    first = segment_tiles * first_blocks
    return gl.where(unit < first, unit // first_blocks, segment_tiles + (unit - first) // second_blocks)


@gluon.jit
def count_parts(program, programs, tiles, segment_tiles, first_blocks, second_blocks):
    """Return how many parts a program works on: whole tiles, and then what its run of the rest holds of tiles."""
    whole = tiles // programs
    base = units_before(whole * programs, segment_tiles, first_blocks, second_blocks)
    rest = units_before(tiles, segment_tiles, first_blocks, second_blocks) - base
    start = rest * program // programs
    end = rest * (program + 1) // programs
    first_tile = tile_of(base + start, segment_tiles, first_blocks, second_blocks)
    last_tile = tile_of(base + end - 1, segment_tiles, first_blocks, second_blocks)
    return whole + gl.where(end > start, last_tile - first_tile + 1, 0)


@gluon.jit
def find_part(part, program, programs, tiles, segment_tiles, first_blocks, second_blocks):
    """Return the tile of a program's part, its blocks [first, last) and how many blocks the tile has."""
    whole = tiles // programs
    base = units_before(whole * programs, segment_tiles, first_blocks, second_blocks)
    rest = units_before(tiles, segment_tiles, first_blocks, second_blocks) - base
    start = rest * program // programs
    end = rest * (program + 1) // programs
    rest_tile = tile_of(base + start, segment_tiles, first_blocks, second_blocks) + part - whole
    tile = gl.where(part < whole, part * programs + program, rest_tile)
    blocks = gl.where(tile < segment_tiles, first_blocks, second_blocks)
    offset = units_before(tile, segment_tiles, first_blocks, second_blocks) - base
    first = gl.where(part < whole, 0, gl.maximum(start - offset, 0))
    last = gl.where(part < whole, blocks, gl.minimum(end - offset, blocks))
    return tile, first, last, blocks
