"""The processes that make one clip together, one a GPU, and what they hand each other.

Data goes through torch's process groups: NCCL between GPUs, gloo between CPUs. Everything here can be captured in a
CUDA graph, once it has run before.

The collectives of a group have one order on all ranks. Passes use torch's default group. The decoder has one of its
own, for it runs beside the passes: which of them comes first may differ from rank to rank.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.distributed as dist


class Ranks(Protocol):
    """All processes, as one of them sees them."""

    @property
    def index(self) -> int:
        """This process's rank, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def exchange(self, blocks: torch.Tensor) -> torch.Tensor:
        """Send block r of [size, …], contiguous, to rank r; returns what the ranks sent here, in their order."""

    def gather(self, block: torch.Tensor) -> torch.Tensor:
        """Return the blocks […] of all ranks, [size, …]."""

    def share(self, x: torch.Tensor) -> None:
        """Give every rank what the first one has in `x`, in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessGroup:
    """All ranks, through a process group of torch's."""

    index: int
    """See `Ranks`."""
    size: int
    """See `Ranks`."""
    group: dist.ProcessGroup | None = None
    """That process group; None is the default one."""

    def exchange(self, blocks: torch.Tensor) -> torch.Tensor:
        """See `Ranks.exchange`."""
        received = torch.empty_like(blocks)
        dist.all_to_all_single(received, blocks, group=self.group)
        return received

    def gather(self, block: torch.Tensor) -> torch.Tensor:
        """See `Ranks.gather`."""
        # torch 2.13 deprecates all_gather_into_tensor for what 2.11 does not have; this sends as much.
        return self.exchange(block.expand(self.size, *block.shape).contiguous())

    def share(self, x: torch.Tensor) -> None:
        """See `Ranks.share`."""
        dist.broadcast(x, src=0, group=self.group)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """The first of several ranks, alone: what the others would send is what it would send them.

    For running networks where only shapes count, as when a build compiles kernels.
    """

    size: int
    """See `Ranks`."""
    index: int = 0
    """See `Ranks`."""

    def exchange(self, blocks: torch.Tensor) -> torch.Tensor:
        """See `Ranks.exchange`."""
        return blocks.clone()

    def gather(self, block: torch.Tensor) -> torch.Tensor:
        """See `Ranks.gather`."""
        return torch.stack([block] * self.size)

    def share(self, x: torch.Tensor) -> None:
        """See `Ranks.share`."""


_rehearsal = contextvars.ContextVar[Rehearsal | None]("rehearsal", default=None)


@contextlib.contextmanager
def rehearse(size: int) -> Iterator[None]:
    """Let this process stand for the first of `size` ranks inside."""
    token = _rehearsal.set(Rehearsal(size=size))
    try:
        yield
    finally:
        _rehearsal.reset(token)


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


def decoding_ranks(size: int) -> Ranks:
    """Return what `current_ranks` does, for the decoder: with a process group of its own.

    The first call makes that group. All ranks must make it at the same point, and not while a CUDA graph is captured.
    """
    ranks = current_ranks(size)
    if not isinstance(ranks, ProcessGroup):
        return ranks
    default = dist.group.WORLD
    assert default is not None, "ranks without a process group rehearse"
    if default not in _decoding_groups:
        _decoding_groups[default] = dist.new_group()
    return replace(ranks, group=_decoding_groups[default])
