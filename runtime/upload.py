"""Host values into device buffers, without a wait: the host may run as far ahead of the device as it likes."""

from __future__ import annotations

import torch


def host_buffer(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return an fp32 CPU tensor to fill and `upload` once; for a GPU in page-locked memory, which torch recycles."""
    return torch.empty(shape, dtype=torch.float32, pin_memory=device.type == "cuda")


def upload(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy CPU values into a contiguous buffer of the same shape, in stream order; they must not change afterwards.

    Page-locked memory is what makes the copy asynchronous; torch lets nobody else have it until the copy is done.
    """
    values = values.to(target.dtype)
    if target.is_cuda and not values.is_pinned():
        values = values.pin_memory()
    target.copy_(values, non_blocking=True)
