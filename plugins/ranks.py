"""The processes that make one clip together, one a GPU, and what they hand each other.

Data goes through torch's process groups: NCCL between GPUs, gloo between CPUs. What every layer exchanges can go
through memory that all ranks write into instead, see `exchanging_by_stores`. Everything here can be captured in a CUDA
graph, once it has run before.

The collectives of a group have one order on all ranks. Passes use torch's default group. The decoder has one of its
own, for it runs beside the passes: which of them comes first may differ from rank to rank.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist

from causal_forcing.plugins.symmetric_buffer import SymmetricBuffer, make_symmetric_buffer, reach_each_other


class Ranks(Protocol):
    """All processes, as one of them sees them."""

    @property
    def index(self) -> int:
        """This process's rank, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def exchange(self, blocks: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """Send block r of [size, …] to rank r; returns what the ranks sent here, in their order.

        Both are contiguous; `into` is where it goes, else it comes in a tensor of its own.
        """

    def gather(self, block: torch.Tensor) -> torch.Tensor:
        """Return the blocks […] of all ranks, [size, …]."""

    def share(self, x: torch.Tensor) -> None:
        """Give every rank what the first one has in `x`, in place."""

    def symmetric_buffer(self, use: str, shape: Sequence[int], like: torch.Tensor) -> SymmetricBuffer | None:
        """Return the buffer of a use, shape and type, on the device of `like`; None where ranks write into none.

        What it holds stays until it is written again. Between two times that a use is written all ranks meet once
        more, in another exchange or by `meet`: who came there has read what it got before.
        """

    def meet(self, like: torch.Tensor) -> None:
        """Wait until all ranks have come here, where they write into buffers on the device of `like`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessGroup:
    """All ranks, through a process group of torch's."""

    index: int
    """See `Ranks`."""
    size: int
    """See `Ranks`."""
    group: dist.ProcessGroup | None = None
    """That process group; None is the default one."""

    def exchange(self, blocks: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """See `Ranks.exchange`."""
        received = torch.empty_like(blocks) if into is None else into
        dist.all_to_all_single(received, blocks, group=self.group)
        return received

    def gather(self, block: torch.Tensor) -> torch.Tensor:
        """See `Ranks.gather`."""
        # torch 2.13 deprecates all_gather_into_tensor for what 2.11 does not have; this sends as much.
        return self.exchange(block.expand(self.size, *block.shape).contiguous())

    def share(self, x: torch.Tensor) -> None:
        """See `Ranks.share`."""
        dist.broadcast(x, src=0, group=self.group)

    def symmetric_buffer(self, use: str, shape: Sequence[int], like: torch.Tensor) -> SymmetricBuffer | None:
        """See `Ranks.symmetric_buffer`. The first call for a buffer is made by all ranks at the same point."""
        if not (_by_stores.get() and like.is_cuda and reach_each_other(self.size)):
            return None
        group = self.group or _default_group()
        buffers = _symmetric_buffers.setdefault(group, {})
        key = (use, tuple(shape), like.dtype)
        if key not in buffers:
            buffers[key] = make_symmetric_buffer(shape, like, group)
        return buffers[key]

    def meet(self, like: torch.Tensor) -> None:
        """See `Ranks.meet`."""
        buffer = self.symmetric_buffer("meeting", (1,), like)
        if buffer is not None:
            buffer.barrier()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """The first of several ranks, alone: what the others would send is what it would send them.

    For running networks where only shapes count, as when a build compiles kernels.
    """

    size: int
    """See `Ranks`."""
    index: int = 0
    """See `Ranks`."""

    def exchange(self, blocks: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """See `Ranks.exchange`."""
        return blocks.clone() if into is None else into.copy_(blocks)

    def gather(self, block: torch.Tensor) -> torch.Tensor:
        """See `Ranks.gather`."""
        return torch.stack([block] * self.size)

    def share(self, x: torch.Tensor) -> None:
        """See `Ranks.share`."""

    def symmetric_buffer(self, use: str, shape: Sequence[int], like: torch.Tensor) -> None:
        """See `Ranks.symmetric_buffer`."""

    def meet(self, like: torch.Tensor) -> None:
        """See `Ranks.meet`."""


_rehearsal = contextvars.ContextVar[Rehearsal | None]("rehearsal", default=None)
_by_stores = contextvars.ContextVar("by stores", default=False)


@contextlib.contextmanager
def rehearse(size: int) -> Iterator[None]:
    """Let this process stand for the first of `size` ranks inside."""
    token = _rehearsal.set(Rehearsal(size=size))
    try:
        yield
    finally:
        _rehearsal.reset(token)


@contextlib.contextmanager
def exchanging_by_stores(wanted: bool = True) -> Iterator[None]:
    """Let GPUs write what every layer exchanges into each other's memory inside, where all of them reach it."""
    token = _by_stores.set(wanted)
    try:
        yield
    finally:
        _by_stores.reset(token)


def count_ranks() -> int:
    """Return how many processes are here to make clips together: 1 without a process group."""
    rehearsal = _rehearsal.get()
    if rehearsal is not None:
        return rehearsal.size
    return dist.get_world_size() if dist.is_initialized() else 1


def current_ranks(size: int) -> Ranks:
    """Return the ranks that run a network which was built for `size` of them."""
    rehearsal = _rehearsal.get()
    assert count_ranks() == size, f"a network for {size} ranks runs on {count_ranks()}"
    return rehearsal or ProcessGroup(index=dist.get_rank(), size=size)


# By the default group that a group belongs to: one that is made after that was left has another.
_decoding_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()
_BufferKey = tuple[str, tuple[int, ...], torch.dtype]
_symmetric_buffers: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[_BufferKey, SymmetricBuffer]] = (
    weakref.WeakKeyDictionary()
)


def decoding_ranks(size: int) -> Ranks:
    """Return what `current_ranks` does, for the decoder: with a process group of its own.

    The first call makes that group. All ranks must make it at the same point, and not while a CUDA graph is captured.
    """
    ranks = current_ranks(size)
    if not isinstance(ranks, ProcessGroup):
        return ranks
    default = _default_group()
    if default not in _decoding_groups:
        _decoding_groups[default] = dist.new_group()
    return replace(ranks, group=_decoding_groups[default])


def _default_group() -> dist.ProcessGroup:
    default = dist.group.WORLD
    assert default is not None, "ranks without a process group rehearse"
    return default
