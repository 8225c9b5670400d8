"""Tile sizes of the kernel: a table, since nothing may be tuned while a graph is captured or a plan is built."""

from __future__ import annotations

from dataclasses import dataclass

PLAIN_SHARED_BYTES = 48 * 1024
"""Shared memory a launch may use without asking the driver for more."""

MAX_FRAMES = 4
"""Most latent frames a chunk may have."""

MAX_HEAD_DIM = 128
"""Largest head dim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one program of the kernel is cut."""

    queries: int
    """Queries a program attends."""
    keys: int
    """Keys and values it loads at a time."""
    warps: int
    """Warps that run it."""
    stages: int
    """Loads of keys and values in flight, the one in use included."""
    shared_bytes: int
    """Shared memory it takes at most, as compiled for sm_90 by Triton 3.6 and 3.9."""


# Best first. For heads of 128 timed on an H100 (docs/performance.md), the others chosen by what compiles with hardly a
# spilled register.
_HALF_NARROW = (
    Tile(queries=128, keys=64, warps=4, stages=3, shared_bytes=65536),
    Tile(queries=64, keys=64, warps=4, stages=2, shared_bytes=40960),
)
_HALF_WIDE = (
    Tile(queries=128, keys=64, warps=8, stages=3, shared_bytes=131072),
    Tile(queries=64, keys=32, warps=4, stages=2, shared_bytes=49152),
)
# fp32 is multiplied exactly, outside of the tensor cores, and holds its operands in registers.
_FULL = (Tile(queries=32, keys=16, warps=4, stages=1, shared_bytes=26752),)


def padded_head_dim(head_dim: int) -> int:
    """Return the power of two from 16 on that a head of this dim is padded to."""
    return max(16, 1 << (head_dim - 1).bit_length())


def find_tile(*, element_bytes: int, head_dim: int, shared_bytes: int) -> Tile:
    """Return the best tile that fits into so much shared memory, at least `PLAIN_SHARED_BYTES`."""
    tiles = _FULL if element_bytes == 4 else _HALF_WIDE if padded_head_dim(head_dim) == 128 else _HALF_NARROW
    return next(tile for tile in tiles if tile.shared_bytes <= shared_bytes)
