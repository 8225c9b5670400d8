"""Why a clip of several ranks ends before its time, as all of them learn it."""

from __future__ import annotations

from dataclasses import dataclass

from causal_forcing.runtime import console


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Why a clip ends before its time, for all ranks."""

    code: int
    """What all ranks leave with."""
    line: str
    """What the user is told; empty if there is nothing left to say."""
    speaker: int
    """The rank that tells it."""
    stopped: bool = False
    """Whether it was a stop that somebody asked for."""


def stop_ending(number: int) -> Ending:
    """Return the ending that a stop signal makes; rank 0 says so, as a program of one process does."""
    return Ending(code=128 + number, line="interrupted", speaker=0, stopped=True)


def ending_of(error: BaseException, rank: int, *, speaker: int | None = None) -> Ending:
    """Return the ending that an error on a rank makes; the rank speaks itself unless another is to."""
    line, code = console.explain(error)
    if rank:
        line = line.replace("error: ", f"error: rank {rank}: ", 1)
    return Ending(code=code or 1, line=line, speaker=rank if speaker is None else speaker)


def gone_ending(rank: int, speaker: int) -> Ending:
    """Return the ending that a rank makes whose process is gone without one."""
    line = f"error: rank {rank} ended without a word: was it killed, for want of memory? run it again"
    return Ending(code=1, line=line, speaker=speaker)
