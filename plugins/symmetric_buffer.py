"""Buffers that all ranks of a clip write into, each GPU straight into the memory of the others.

An exchange then needs no copies and no kernels of its own: the kernel that makes what another rank reads stores it
there, and a barrier tells when all have. The memory, its mapping and the barrier are torch's symmetric memory
(`torch.distributed._symmetric_memory`, documented, alpha as of torch 2.13), and can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


class MemoryNotMappedError(RuntimeError):
    """The driver or the container does not let processes map each other's GPU memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SymmetricBuffer:
    """One rank's view of the buffers that all ranks have, of one shape."""

    own: torch.Tensor
    """This rank's: the others write into it."""
    offsets: torch.Tensor
    """[ranks] int64: how many elements lie between this rank's buffer and that of each, as mapped here."""
    barrier: Callable[[], None]
    """Has the GPU wait until every rank's GPU has come here: what was stored before, anywhere, is there after it."""


def make_symmetric_buffer(shape: Sequence[int], like: torch.Tensor, group: dist.ProcessGroup) -> SymmetricBuffer:
    """Make a buffer on every rank of `group`, which all call this at the same point, outside of CUDA graphs.

    Args:
        shape: The same on all ranks.
        like: Gives type and device.
        group: Its ranks' GPUs reach each other's memory, see `reach_each_other`.

    Raises:
        MemoryNotMappedError: See there.
    """
    from torch.distributed import _symmetric_memory as symmetric_memory  # alpha: met by those alone who use it

    # Torch 2.11 puts all buffers' addresses into memory that was freed on this stream, at once and not in the stream's
    # order: what the stream has still to do must not be written there afterwards.
    torch.cuda.current_stream(like.device).synchronize()
    try:
        own = symmetric_memory.empty(*shape, dtype=like.dtype, device=like.device)
        handle = symmetric_memory.rendezvous(own, group)
    except RuntimeError as error:
        raise MemoryNotMappedError(f"ranks cannot map each other's GPU memory ({error})") from error
    buffers = [handle.get_buffer(rank, own.shape, own.dtype) for rank in range(handle.world_size)]
    return view_buffers(own, buffers, handle.barrier)


def view_buffers(own: torch.Tensor, buffers: Sequence[torch.Tensor], barrier: Callable[[], None]) -> SymmetricBuffer:
    """Return the view of a rank that has this buffer of its own, and those of all ranks as mapped here, in order."""
    offsets = [(buffer.data_ptr() - own.data_ptr()) // own.element_size() for buffer in buffers]
    return SymmetricBuffer(own=own, offsets=torch.tensor(offsets, device=own.device), barrier=barrier)


@functools.cache
def reach_each_other(ranks: int) -> bool:
    """Return whether the first GPUs of this machine, one a rank, can all write into each other's memory."""
    if torch.cuda.device_count() < ranks:
        return False
    pairs = ((one, other) for one in range(ranks) for other in range(ranks) if one != other)
    return all(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
