"""What lets the ranks of a clip end together: a thread in each that talks to the others while its rank cannot.

A rank may be blocked in a collective, where Python handles no signal and raises nothing. Its monitor beats in a store
that all share, sees ranks die and signals arrive, and learns why the clip ends. Why is decided once, by who is first to
put it into the store; that rank tells the user. Each rank then has a grace to end by itself before it is ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Protocol

from causal_forcing.runtime import console
from causal_forcing.runtime.interruption import heeded
from causal_forcing.runtime.rank_ending import Ending, gone_ending, stop_ending

BEAT_S = 0.5
"""Time between two beats of a rank."""
STALE_BEATS = 24
"""Own beats after which a rank that has not beaten meanwhile counts as gone; no time, for all may be suspended."""
GRACE_S = 5.0
"""How long a rank may take to end by itself once the clip has ended."""

_ENDING = "ending"


class Store(Protocol):
    """What ranks share: torch's key-value stores."""

    def set(self, key: str, value: str) -> None:
        """Set a key."""

    def get(self, key: str) -> bytes:
        """Return a key that is there."""

    def check(self, keys: list[str]) -> bool:
        """Return whether all keys are there."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set a key to `desired` if it is `expected`, or not there and nothing is expected; returns what it is then."""


class RankMonitor:
    """Watch over one rank and the others.

    Args:
        store: A connection that nobody else uses: another may be blocked.
        rank: This rank.
        ranks: How many there are.
        beat_s: See `BEAT_S`.
        stale_beats: See `STALE_BEATS`.
        grace_s: See `GRACE_S`.
        leave: Ends this process at once with an exit code.

    Attributes:
        before_leaving: Called with the ending before this process is ended by force; rank 0 saves its clip there.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        ranks: int,
        *,
        beat_s: float = BEAT_S,
        stale_beats: int = STALE_BEATS,
        grace_s: float = GRACE_S,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self._store = store
        self._rank, self._ranks = rank, ranks
        self._beat_s, self._stale_beats, self._grace_s = beat_s, stale_beats, grace_s
        self._leave = leave
        self.before_leaving: Callable[[Ending], None] = lambda ending: None
        self._lock = threading.RLock()  # of the store and of everything below
        self._ending: Ending | None = None
        self._said = self._main_ends = False
        self._beats: dict[int, tuple[str, int]] = {}
        self._processes: dict[int, int] = {}
        self._stopping = threading.Event()
        self._wake_reader, self._wake_writer = os.pipe()
        for end in (self._wake_reader, self._wake_writer):
            os.set_blocking(end, False)
        self._main_thread = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, name="rank-monitor", daemon=True)

    def start(self) -> None:
        """Begin to watch; from the main thread, whose signals are seen here from now on."""
        # A signal's byte is written by whichever thread gets it, in C: also while the main thread is blocked.
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        self._thread.start()

    def stop(self) -> None:
        """End the watch: the clip is done."""
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
        self._stopping.set()
        with contextlib.suppress(OSError):
            os.write(self._wake_writer, b"\0")
        self._thread.join(self._grace_s)

    def watch(self, rank: int, pid: int) -> None:
        """See at once when another rank's process ends, where the system can tell; beats tell it everywhere."""
        if rank != self._rank and sys.platform == "linux":
            with contextlib.suppress(OSError), self._lock:
                self._processes[rank] = os.pidfd_open(pid)

    def finish(self) -> None:
        """Say that this rank's part is done: its process may be gone from now on."""
        with self._lock:
            self._store.set(f"done/{self._rank}", "1")

    def look(self) -> Ending | None:
        """Return why the clip ends, as far as it can be told now."""
        with self._lock:
            if self._ending is None:
                try:
                    self._look()
                except Exception:  # torch's errors of a store, whose classes vary
                    self._without_store()
            return self._ending

    def end(self, ending: Ending) -> Ending:
        """End the clip for all ranks, unless it has ended already; returns why it ends."""
        with self._lock:
            found = self.look()
            if found is not None:
                return found
            try:
                return self._propose(ending)
            except Exception:
                self._without_store()
                assert self._ending is not None, "a lost store ends the clip"
                return self._ending

    def await_ending(self, timeout_s: float) -> Ending | None:
        """Wait until it is known why the clip ends; None if nobody knew in time."""
        waiting = threading.Event()
        for _ in range(max(1, round(timeout_s / self._beat_s))):
            ending = self.look()
            if ending is not None:
                return ending
            waiting.wait(self._beat_s)
        return None

    def main_ends(self) -> None:
        """Say that the main thread is ending by itself: it needs no signal to do so."""
        with self._lock:
            self._main_ends = True

    def may_speak(self, ending: Ending) -> bool:
        """Return whether this rank is the one that tells the user, and has not yet; asking counts as telling."""
        with self._lock:
            told, self._said = self._said, True
            return ending.speaker == self._rank and not told

    def speak(self, ending: Ending) -> None:
        """Tell the user, if it is this rank that does."""
        if self.may_speak(ending) and ending.line:
            console.narrate(ending.line, aloud=True)

    def linger(self, timeout_s: float) -> None:
        """Wait, before this process ends, until all whom that could mislead know why or are gone."""
        waiting = threading.Event()
        # The store goes with rank 0; of the others only rank 0 must not take the end for a fault or a stop.
        others = range(1, self._ranks) if self._rank == 0 else (0,)
        for _ in range(max(1, round(timeout_s / 0.05))):
            with self._lock:
                try:
                    if all(self._is_gone(rank) or self._knows(rank) for rank in others):
                        return
                except Exception:
                    return  # the store went with rank 0
            waiting.wait(0.05)

    @property
    def patience_s(self) -> float:
        """Time after which a rank that has died or hangs is known to, in seconds."""
        return (self._stale_beats + 2) * self._beat_s

    @property
    def grace_s(self) -> float:
        """See `GRACE_S`."""
        return self._grace_s

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake_reader, select.POLLIN)
        beat, watched = 0, set[int]()
        while not self._stopping.is_set():
            with self._lock:
                new = set(self._processes.values()) - watched
            for descriptor in new:
                poll.register(descriptor, select.POLLIN)
            watched |= new
            ready = [descriptor for descriptor, _ in poll.poll(self._beat_s * 1000)]
            for descriptor in set(ready) & watched:  # it stays readable: once is enough
                poll.unregister(descriptor)
            stops = self._drain() if self._wake_reader in ready else []
            if self._stopping.is_set():
                return
            beat += 1
            with self._lock:
                with contextlib.suppress(Exception):  # `look` finds out
                    self._store.set(f"beat/{self._rank}", str(beat))
                ending = self.look()
                if ending is None and stops:
                    ending = self.end(stop_ending(stops[0]))
            if ending is not None:
                self._follow(ending, nudge=not stops)
                return

    def _drain(self) -> list[int]:
        """Return the stop signals that came, as far as this process does not ignore them."""
        with contextlib.suppress(BlockingIOError):
            return [number for number in os.read(self._wake_reader, 64) if number in heeded()]
        return []

    def _follow(self, ending: Ending, *, nudge: bool) -> None:
        """Let this rank end: by itself, or by force when its grace is over."""
        if self._rank != 0:
            self.speak(ending)
            self.linger(self._grace_s)
        else:
            with self._lock:
                if nudge and not self._main_ends and self._main_thread is not None:
                    signal.pthread_kill(self._main_thread, signal.SIGTERM)  # interrupts what it waits for
            self._stopping.wait(self._grace_s)
            if self._main_ends:  # and is not blocked, but closing files
                self._stopping.wait(self._grace_s)
        if self._stopping.is_set():
            return
        self.before_leaving(ending)
        self.speak(ending)
        if self._rank == 0:
            self.linger(self._grace_s)
        console.flush()
        self._leave(ending.code)

    def _look(self) -> None:
        found = self._store.get(_ENDING) if self._store.check([_ENDING]) else b""
        if found:
            self._learn(found)
            return
        for rank in range(self._ranks):
            if rank != self._rank and self._is_gone(rank) and not self._store.check([f"done/{rank}"]):
                # It may have had the time to say why between the two looks.
                self._propose(gone_ending(rank, self._rank))
                return

    def _propose(self, ending: Ending) -> Ending:
        found = self._store.compare_set(_ENDING, "", json.dumps(dataclasses.asdict(ending)))
        self._learn(found)
        assert self._ending is not None, "there is an ending now"
        return self._ending

    def _learn(self, content: bytes) -> None:
        self._ending = Ending(**json.loads(content))
        self._store.set(f"knows/{self._rank}", "1")

    def _knows(self, rank: int) -> bool:
        return self._store.check([f"knows/{rank}"])

    def _is_gone(self, rank: int) -> bool:
        """Return whether a rank's process has ended, or has not beaten for long."""
        process = self._processes.get(rank)
        if process is not None and select.select([process], [], [], 0)[0]:
            return True
        return self._is_stale(rank)

    def _is_stale(self, rank: int) -> bool:
        key, own = f"beat/{rank}", f"beat/{self._rank}"
        if not self._store.check([key, own]):
            return False  # it has not begun
        now, value = int(self._store.get(own)), self._store.get(key).decode()
        seen, since = self._beats.get(rank, ("", now))
        if value != seen:
            self._beats[rank] = (value, now)
            return False
        return now - since > self._stale_beats

    def _without_store(self) -> None:
        """Conclude from a store that is gone; nobody can be told, so the first rank that is left speaks."""
        if self._ending is not None:
            return
        gone = [rank for rank, process in self._processes.items() if select.select([process], [], [], 0.2)[0]]
        speaker = min(rank for rank in range(self._ranks) if rank not in gone)
        if gone:
            self._ending = gone_ending(min(gone), speaker)
        else:
            line = "error: the launcher of the ranks is gone, and with it what they agree by: run it again"
            self._ending = Ending(code=1, line=line, speaker=speaker)
