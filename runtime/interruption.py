"""Where a program may be stopped, and where it first finishes what it is at.

Ctrl-C, SIGTERM (container runtimes, batch systems) and SIGHUP (a closed terminal) all raise KeyboardInterrupt, so that
whoever writes files has one thing to clean up after.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType

STOP_SIGNALS = tuple(
    signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__
)
"""Signals that ask a program to stop; Windows lacks the last."""


@contextlib.contextmanager
def stoppable() -> Iterator[list[int]]:
    """Let every stop signal raise KeyboardInterrupt; gives the list that received signals are added to."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    # Ignored signals stay ignored: that is what `nohup` and the shell's background jobs are for.
    handlers = (signal.SIG_DFL, signal.default_int_handler)
    with handled(stop, tuple(number for number in STOP_SIGNALS if signal.getsignal(number) in handlers)):
        yield received


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Hold back stop signals until the block is through: files that belong together are written together."""
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        noted.append(number)

    with handled(note, heeded()):
        yield
    if noted:
        signal.raise_signal(noted[0])


def heeded() -> tuple[signal.Signals, ...]:
    """Return the stop signals that this process does not ignore."""
    return tuple(number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN)


@contextlib.contextmanager
def handled(handler: object, numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Handle signals in another way for a while; in threads, which get no signals, there is nothing to do."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            signal.signal(number, handler)  # type: ignore[arg-type]  # of typeshed's private handler type
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
