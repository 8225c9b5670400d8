"""Ops that split pictures [..., H, W] by rows over ranks (`ranks.py`), and put them together again.

All ranks have as many rows. Which ones is in a list of every rank's first row: only a process that runs knows its rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from causal_forcing.plugins.custom_op import define_op
from causal_forcing.plugins.ranks import current_ranks, decoding_ranks


def _window_rows(x: torch.Tensor, starts: Sequence[int], height: int) -> torch.Tensor:
    start = starts[current_ranks(len(starts)).index]
    return x.narrow(-2, start, height).clone()  # with the order of axes in memory that `x` has


def _fake_window_rows(x: torch.Tensor, starts: Sequence[int], height: int) -> torch.Tensor:
    return torch.empty_like(x.narrow(-2, 0, height))


window_rows = define_op("window_rows", _window_rows, fake=_fake_window_rows)
"""window_rows(x, starts, height): [..., height, W] of `x`, from this rank's start on; memory stays channels-last."""


def _gather_rows(x: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
    parts = decoding_ranks(len(starts)).gather(x.contiguous())
    height = x.shape[-2]
    # A rank may begin in rows of the one before: these are the same, and are left out.
    ends = [0] + [start + height for start in starts[:-1]]
    own = [part[..., end - start :, :] for part, start, end in zip(parts, starts, ends, strict=True)]
    return torch.cat(own, dim=-2)


def _fake_gather_rows(x: torch.Tensor, starts: Sequence[int]) -> torch.Tensor:
    return x.new_empty((*x.shape[:-2], starts[-1] + x.shape[-2], x.shape[-1]))


gather_rows = define_op("gather_rows", _gather_rows, fake=_fake_gather_rows)
"""gather_rows(x, starts): the whole picture [..., H, W], on every rank, of each rank's rows from its start on.

Starts ascend from 0, and leave no row out.
"""
