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

    def symmetric_buffer(
        group: ranks.ProcessGroup, use: str, shape: Sequence[int], like: torch.Tensor
    ) -> SymmetricBuffer | None:
        name = "-".join(map(str, (use, *shape))).replace(" ", "-")
        if name not in made:
            elements = torch.Size(shape).numel()
            path = str(folder / name)
            memory = torch.from_file(path, shared=True, size=group.size * elements, dtype=like.dtype)
            buffers = memory.view(group.size, *shape)
            made[name] = view_buffers(buffers[group.index], buffers.unbind(), dist.barrier)
        return made[name]

    setattr(ranks.ProcessGroup, ranks.ProcessGroup.symmetric_buffer.__name__, symmetric_buffer)
    for name, launch in (
        ("projected_exchange", exchange_launch.launch_projected_exchange),
        ("exchange_to_tokens", exchange_launch.launch_exchange_to_tokens),
    ):
        torch.library.impl(f"causal_forcing::{name}", "cpu", launch)
