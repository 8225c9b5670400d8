"""Run the exchanges' launchers on the CPU, through Triton's interpreter: `interpreted_exchange.py CASES RESULTS`.

Cases are calls of a launcher, one a rank, all in this process; a result is what each rank got. A process of its own,
since Triton reads TRITON_INTERPRET when a kernel is defined, its own library's included.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch

from causal_forcing.plugins import token_ops
from causal_forcing.plugins.kernels import exchange_launch
from causal_forcing.plugins.symmetric_buffer import SymmetricBuffer, view_buffers


class RanksInTurn:
    """Ranks that act one after the other, in two rounds: what they send in the first they receive in the second.

    Args:
        size: How many there are.
        stores: Whether they have buffers to store into; each is a part of one tensor.
    """

    def __init__(self, size: int, *, stores: bool) -> None:
        self.size, self.stores = size, stores
        self.buffers: torch.Tensor | None = None
        self.sent: dict[tuple[int, int], torch.Tensor] = {}  # by rank and number of the exchange

    def rank(self, index: int) -> SimpleNamespace:
        """Return what stands for one of them in a round."""
        numbers = itertools.count()

        def symmetric_buffer(use: str, shape: Sequence[int], like: torch.Tensor) -> SymmetricBuffer | None:
            if not self.stores:
                return None
            if self.buffers is None:
                self.buffers = torch.full((self.size, *shape), float("nan"), dtype=like.dtype)
            return view_buffers(self.buffers[index], self.buffers.unbind(), lambda: None)

        def exchange(blocks: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
            number = next(numbers)
            self.sent[index, number] = blocks.clone()
            arrived = [self.sent.get((rank, number), torch.full_like(blocks, torch.nan)) for rank in range(self.size)]
            received = torch.stack([blocks_of_rank[index] for blocks_of_rank in arrived])
            return received if into is None else into.copy_(received)

        return SimpleNamespace(size=self.size, index=index, symmetric_buffer=symmetric_buffer, exchange=exchange)


def run(launch: str, stores: bool, calls: Sequence[tuple[Any, ...]]) -> list[torch.Tensor]:
    """Launch for each rank, in both rounds; returns what they got in the second."""
    ranks = RanksInTurn(len(calls), stores=stores)

    def launch_all() -> list[torch.Tensor]:
        results = []
        for index, arguments in enumerate(calls):
            rank = ranks.rank(index)
            with (
                mock.patch.object(exchange_launch, "current_ranks", return_value=rank),
                mock.patch.object(token_ops, "current_ranks", return_value=rank),
            ):
                results.append(getattr(exchange_launch, launch)(*arguments))
        return results

    launch_all()
    return launch_all()


if __name__ == "__main__":
    cases = torch.load(sys.argv[1], weights_only=True)
    torch.save([run(*case) for case in cases], sys.argv[2])
