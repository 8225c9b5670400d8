"""Run the exchanges that are stores on the CPU, through Triton's interpreter: `interpreted_exchange.py CASES RESULTS`.

Cases are calls of the two launchers, each by every rank in turn; a result is what each rank got. A process of its own,
since Triton reads TRITON_INTERPRET when a kernel is defined, its own library's included.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch

from causal_forcing.plugins.kernels import exchange_launch
from causal_forcing.plugins.symmetric_buffer import SymmetricBuffer, view_buffers


class SharedMemory:
    """Ranks of one process, which act in turn: every rank's buffer is a part of one tensor."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.buffers: torch.Tensor | None = None

    def rank(self, index: int) -> SimpleNamespace:
        """Return what stands for one of them."""

        def symmetric_buffer(use: str, shape: Sequence[int], like: torch.Tensor) -> SymmetricBuffer:
            if self.buffers is None:
                self.buffers = torch.full((self.size, *shape), float("nan"), dtype=like.dtype)
            return view_buffers(self.buffers[index], self.buffers.unbind(), lambda: None)

        return SimpleNamespace(size=self.size, index=index, symmetric_buffer=symmetric_buffer)


def run(launch: str, calls: Sequence[tuple[Any, ...]]) -> list[torch.Tensor]:
    """Launch once for each rank; what they got is looked at when all have written."""
    memory = SharedMemory(len(calls))
    results = []
    for index, arguments in enumerate(calls):
        with mock.patch.object(exchange_launch, "current_ranks", return_value=memory.rank(index)):
            results.append(getattr(exchange_launch, launch)(*arguments))
    return results


if __name__ == "__main__":
    cases = torch.load(sys.argv[1], weights_only=True)
    torch.save([run(launch, calls) for launch, calls in cases], sys.argv[2])
