"""Exchanges by stores without a GPU: their kernels by Triton's interpreter, their buffers in files that ranks share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from causal_forcing.plugins import ranks, token_ops  # noqa: F401  # registers the ops
from causal_forcing.plugins.symmetric_buffer import SymmetricBuffer, view_buffers


def exchange_by_stores_on_cpu(folder: Path) -> None:
    """Let this process's ranks do on the CPU what they do on GPUs inside `exchanging_by_stores`, from now on."""
    assert os.environ["TRITON_INTERPRET"] == "1", "Triton reads it when it is imported, as tracing does"
    from causal_forcing.plugins.kernels import exchange_launch

    made: dict[str, SymmetricBuffer] = {}
    exchanges = 0  # that all ranks have been through
    begun: dict[str, int] = {}  # by buffer, `exchanges` when it was last written
    collective = ranks.ProcessGroup.exchange

    def count_exchange() -> None:
        nonlocal exchanges
        exchanges += 1

    def barrier() -> None:
        count_exchange()
        dist.barrier()

    def exchange(group: ranks.ProcessGroup, blocks: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        count_exchange()
        return collective(group, blocks, into)

    def symmetric_buffer(
        group: ranks.ProcessGroup, use: str, shape: Sequence[int], like: torch.Tensor
    ) -> SymmetricBuffer | None:
        name = "-".join(map(str, (use, *shape))).replace(" ", "-")
        if name not in made:
            elements = torch.Size(shape).numel()
            path = str(folder / name)
            memory = torch.from_file(path, shared=True, size=group.size * elements, dtype=like.dtype)
            buffers = memory.view(group.size, *shape)
            made[name] = view_buffers(buffers[group.index], buffers.unbind(), barrier)
        assert exchanges >= begun.get(name, -2) + 2, f"another rank may not have read what it got in {name}"
        begun[name] = exchanges
        return made[name]

    def meet(group: ranks.ProcessGroup, like: torch.Tensor) -> None:
        barrier()

    for patch in (symmetric_buffer, exchange, meet):
        setattr(ranks.ProcessGroup, patch.__name__, patch)
    for name, launch in (
        ("projected_exchange", exchange_launch.launch_projected_exchange),
        ("exchange_to_tokens", exchange_launch.launch_exchange_to_tokens),
    ):
        torch.library.impl(f"causal_forcing::{name}", "cpu", launch)
