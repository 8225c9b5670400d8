"""Start the ranks of one clip as processes of this program, watch over them, and end as they do.

No framework is imported here: the ranks import theirs at the same time, and this process keeps its memory small. Each
rank runs in a process group of its own, so that Ctrl-C reaches it through this program, and once.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

from causal_forcing.runtime import console
from causal_forcing.runtime.environment import LOCALHOST
from causal_forcing.runtime.interruption import handled, heeded

POLL_S = 0.05
"""Time between two looks at the ranks."""
FOLLOW_S = 3.0
"""How long ranks may take to notice by themselves that one has ended, and then to stop when they are asked to."""
END_S = 20.0
"""How long ranks may take to end after a stop or a fault, before they are killed."""

_LAUNCH_VARIABLES = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
_LAUNCH_PREFIXES = ("LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
_PR_SET_PDEATHSIG = 1
_FORWARDED = signal.SIGTERM
"""What any stop signal is sent on as: a rank that is only starting leaves by it without a traceback."""


def run_ranks(
    command: Sequence[str], ranks: int, *, poll_s: float = POLL_S, follow_s: float = FOLLOW_S, end_s: float = END_S
) -> int:
    """Run a command as so many ranks until all have ended; stop signals go to rank 0, which tells the others.

    Args:
        command: What each rank runs; stdout is rank 0's alone.
        ranks: How many.
        poll_s: See `POLL_S`.
        follow_s: See `FOLLOW_S`.
        end_s: See `END_S`.

    Returns:
        The exit code of the rank that failed first, 0 if none did; 128 + the signal's number if it was killed.
    """
    port = free_port()
    environments = [_environment(rank, ranks, port) for rank in range(ranks)]
    processes: list[subprocess.Popen[bytes]] = []
    with _forwarding(processes) as forwarded:
        try:
            for rank, environment in enumerate(environments):
                processes.append(_start(command, rank, environment))
            if forwarded:  # perhaps before rank 0 was there to have it
                processes[0].send_signal(_FORWARDED)
            return _watch(processes, forwarded, poll_s=poll_s, follow_s=follow_s, end_s=end_s)
        finally:
            for process in processes:
                process.kill()  # nothing happens to one that has ended
                process.wait()


def environment_without_ranks() -> dict[str, str]:
    """Return this process's environment for a program that is no rank, though this one may be."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCH_VARIABLES and not name.startswith(_LAUNCH_PREFIXES)
    }


def free_port() -> int:
    """Return a port of this machine that nobody uses now."""
    with socket.socket() as listening:
        listening.bind((LOCALHOST, 0))
        port: int = listening.getsockname()[1]
        return port


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return a rank's environment: torchrun's variables, so that a rank need not know who started it."""
    # Each rank would take all cores, and they would wait for each other.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks))}
    return (
        threads
        | environment_without_ranks()
        | {
            "WORLD_SIZE": str(ranks),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": LOCALHOST,
            "MASTER_PORT": str(port),
        }
    )


def _start(command: Sequence[str], rank: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        list(command),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=None if rank == 0 else subprocess.DEVNULL,
        process_group=0,
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )


def _end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when the one that started it is gone, killed perhaps."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def _forwarding(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Send stop signals on to rank 0 meanwhile; gives the list of those that came."""
    forwarded: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        forwarded.append(number)
        if processes and processes[0].poll() is None:
            processes[0].send_signal(_FORWARDED)

    with handled(forward, heeded()):
        yield forwarded


def _watch(
    processes: list[subprocess.Popen[bytes]],
    forwarded: list[int],
    *,
    poll_s: float,
    follow_s: float,
    end_s: float,
) -> int:
    """Wait for the ranks; one that fails, or a stop, sets a limit for all others."""
    first: int | None = None
    failed_s: float | None = None
    asked = False
    while any([process.poll() is None for process in processes]):  # a list: all are looked at
        codes = [process.returncode for process in processes]
        now_s = time.monotonic()
        if first is None:
            first = _first_failed(codes)
        if failed_s is None and (first is not None or forwarded):
            failed_s = now_s
        # Once rank 0 is gone the others have nothing to wait for; before, they are given the time to tell it why.
        if first is not None and failed_s is not None and (codes[0] is not None or now_s - failed_s > follow_s):
            if not asked:
                for process in processes:
                    process.terminate()
            asked = True
        # Only rank 0 may need longer: it has files to close.
        limit_s = 2 * follow_s if asked and codes[0] is not None else end_s
        if failed_s is not None and now_s - failed_s > limit_s:
            for process in processes:
                process.kill()
        time.sleep(poll_s)
    return _outcome([process.returncode for process in processes], first, forwarded)


def _first_failed(codes: Sequence[int | None]) -> int | None:
    """Return which rank failed first, of those that have by now: one that was killed has not followed another."""
    failed = [rank for rank, code in enumerate(codes) if code]
    return min(failed, key=lambda rank: ((codes[rank] or 0) > 0, rank), default=None)


def _outcome(codes: Sequence[int], first: int | None, forwarded: Sequence[int]) -> int:
    """Return the exit code of a run whose ranks left with these, and say what none of them could."""
    first = _first_failed(codes) if first is None else first
    if forwarded and (first is None or codes[first] in (-_FORWARDED, 128 + _FORWARDED)):
        if first is None or codes[first] < 0:
            console.narrate("interrupted")
        return 128 + forwarded[0]
    if first is None:
        return 0
    if all(code <= 0 for code in codes):  # nobody who could have said so was left
        name = signal.Signals(-codes[first]).name
        console.narrate(f"error: rank {first} was killed by {name}: is there enough memory? run it again")
    return codes[first] if codes[first] > 0 else 128 - codes[first]
