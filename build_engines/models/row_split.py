"""How the Wan VAE's decoder is split over ranks: by rows of the picture, after its middle block.

That block attends to all of a frame, at the coarsest resolution, and runs whole on every rank. After it a rank decodes
a window: its own rows, and a halo of rows around them, as if that were the picture. Where a window ends inside the
picture a 3×3 convolution sees zeros instead of the next row, so each spoils one more row, of the halo; towards the own
rows fewer convolutions are left, so windows shrink from stage to stage. Where a window ends with the picture, zeros are
what the unsplit decoder sees too. Windows never move, so each rank's convolution caches are those of its windows.

All ranks run the same network: windows are of one height, and a rank with less of a halo, at the picture's edge, has
its window moved inwards, over more true rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from causal_forcing.plugins.row_ops import gather_rows, window_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Every rank's part of a picture."""

    starts: tuple[int, ...]
    """Each rank's first row."""
    height: int
    """How many rows a rank has."""

    def doubled(self) -> Rows:
        """Return the same part of a picture of twice the height."""
        return Rows(starts=tuple(2 * start for start in self.starts), height=2 * self.height)

    def cut_from(self, x: torch.Tensor, outer: Rows) -> torch.Tensor:
        """Return this rank's rows [..., height, W] of what it has of the same picture, `x` [..., outer.height, W]."""
        if self == outer:
            return x
        starts = [start - outer_start for start, outer_start in zip(self.starts, outer.starts, strict=True)]
        cut: torch.Tensor = window_rows(x, starts, self.height)
        return cut


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSplit:
    """The split of decoding over ranks; one rank has everything."""

    whole: Rows
    """What the middle block runs on."""
    entries: tuple[Rows, ...]
    """What the residual blocks of each stage run on."""
    exits: tuple[Rows, ...]
    """What is left after them; of the last stage, after the head: own rows."""

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the first stage takes of a whole picture."""
        return self.entries[0].cut_from(x, self.whole)

    def leave(self, x: torch.Tensor, stage: int) -> torch.Tensor:
        """Return what is left of a stage's rows after its last convolution."""
        return self.exits[stage].cut_from(x, self.entries[stage])

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """Return the whole of all ranks' own rows of pixels."""
        starts = self.exits[-1].starts
        if not any(starts):
            return own
        whole: torch.Tensor = gather_rows(own, starts)
        return whole


def split_rows(convs: Sequence[int], height: int, ranks: int) -> RowSplit:
    """Split pictures over ranks.

    Args:
        convs: 3×3 convolutions of each stage, coarsest first, between which height doubles, by one more.
        height: Rows of the first stage.
        ranks: How many share a picture.
    """
    halos = stage_halos(convs)
    own, own_rows = _own_rows(height, ranks), height
    entry = _with_halo(own, halos[0][0], height)
    entries, exits = [], []
    for _, halo in halos:
        left = _with_halo(own, halo, own_rows)
        entries.append(entry)
        exits.append(left)
        # Nothing is cut after the doubling: at most one row more than is needed.
        entry, own, own_rows = left.doubled(), own.doubled(), 2 * own_rows
    return RowSplit(whole=Rows(starts=(0,) * ranks, height=height), entries=tuple(entries), exits=tuple(exits))


def stage_halos(convs: Sequence[int]) -> list[tuple[int, int]]:
    """Return how many rows beyond its own a rank needs before and after each stage's convolutions, for `split_rows`."""
    halos: list[tuple[int, int]] = []
    after = 0
    for count in reversed(convs):
        halos.insert(0, (after + count, after))
        after = -(-(after + count + 1) // 2)  # the convolution that follows the doubling has one row too
    return halos


def _own_rows(height: int, ranks: int) -> Rows:
    own = -(-height // ranks)
    return Rows(starts=tuple(min(rank * own, height - own) for rank in range(ranks)), height=own)


def _with_halo(own: Rows, halo: int, height: int) -> Rows:
    """Return windows of one height, in a picture of `height`, that have every row up to `halo` rows from the own."""
    firsts = [max(0, start - halo) for start in own.starts]
    ends = [min(height, start + own.height + halo) for start in own.starts]
    most = max(end - first for first, end in zip(firsts, ends, strict=True))
    return Rows(starts=tuple(min(first, height - most) for first in firsts), height=most)
