"""The thread that lets ranks end together, against a store in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from causal_forcing.runtime.errors import UsageError
from causal_forcing.runtime.rank_ending import Ending, ending_of, stop_ending
from causal_forcing.runtime.rank_monitor import RankMonitor

FAULT = Ending(code=3, line="error: rank 1: out of memory", speaker=1)
BEAT_S = 0.02


class MemoryStore:
    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.is_lost = False

    def set(self, key: str, value: str) -> None:
        self._require()
        self.values[key] = value

    def get(self, key: str) -> bytes:
        self._require()
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        self._require()
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        self._require()
        if self.values.get(key, "") == expected:
            self.values[key] = desired
        return self.values[key].encode()

    def _require(self) -> None:
        if self.is_lost:
            raise RuntimeError("connection reset")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def monitors(store: MemoryStore) -> Iterator[Callable[[int], tuple[RankMonitor, list[int]]]]:
    """Make monitors of rank 1 and above of three; each with the list of codes that it ended its process with."""
    made: list[RankMonitor] = []

    def make(rank: int) -> tuple[RankMonitor, list[int]]:
        left: list[int] = []
        monitor = RankMonitor(store, rank, 3, beat_s=BEAT_S, stale_beats=10, grace_s=0.2, leave=left.append)
        made.append(monitor)
        return monitor, left

    yield make
    for monitor in made:
        if monitor._thread.is_alive():
            monitor.stop()


def wait_for(condition: Callable[[], object], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


Make = Callable[[int], tuple[RankMonitor, list[int]]]


def test_first_ending_counts_for_all(store: MemoryStore, monitors: Make) -> None:
    (first, _), (second, _) = monitors(1), monitors(2)
    assert first.end(FAULT) == FAULT
    assert second.end(stop_ending(15)) == FAULT
    assert second.look() == FAULT
    assert first.may_speak(FAULT)
    assert not first.may_speak(FAULT), "once"
    assert not second.may_speak(FAULT)


def test_rank_follows_an_ending_and_is_ended_after_its_grace(store: MemoryStore, monitors: Make) -> None:
    monitor, left = monitors(2)
    seen: list[Ending] = []
    monitor.before_leaving = seen.append
    monitor.start()
    wait_for(lambda: "beat/2" in store.values)
    assert not left
    store.set("ending", json.dumps({"code": 3, "line": "error", "speaker": 0, "stopped": False}))
    wait_for(lambda: left)
    assert left == [3]
    assert [ending.code for ending in seen] == [3]
    assert store.values["knows/2"] == "1"


def test_rank_that_stops_beating_is_gone(
    store: MemoryStore, monitors: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor, left = monitors(1)
    store.set("beat/2", "7")
    monitor.start()
    wait_for(lambda: left)
    assert left == [1]
    assert "error: rank 2 ended without a word" in capsys.readouterr().err


def test_process_that_ends_is_seen_at_once_unless_it_was_done(store: MemoryStore, monitors: Make) -> None:
    (first, _), (second, _) = monitors(1), monitors(2)
    process = subprocess.Popen([sys.executable, "-c", ""])
    first.watch(0, process.pid)
    second.watch(0, process.pid)
    process.wait()
    store.set("done/0", "1")
    assert first.look() is None
    del store.values["done/0"]
    ending = second.look()
    assert ending is not None
    assert ending.line.startswith("error: rank 0 ended without a word")
    assert ending.speaker == 2


def test_store_that_is_lost_ends_the_clip_and_one_rank_says_so(store: MemoryStore, monitors: Make) -> None:
    endings = []
    for rank in (1, 2):
        monitor, _ = monitors(rank)
        store.is_lost = True
        endings.append(monitor.look())
    assert endings[0] == endings[1]
    assert endings[0] is not None
    assert endings[0].speaker == 0


def test_waiting_for_an_ending_has_a_limit(store: MemoryStore, monitors: Make) -> None:
    monitor, _ = monitors(1)
    assert monitor.await_ending(0.05) is None
    threading.Timer(0.05, store.set, ("ending", '{"code": 1, "line": "x", "speaker": 0}')).start()
    assert monitor.await_ending(5.0) == Ending(code=1, line="x", speaker=0)


def test_monitor_stops_with_the_clip(store: MemoryStore, monitors: Make) -> None:
    monitor, left = monitors(1)
    monitor.start()
    monitor.finish()
    monitor.stop()
    assert store.values["done/1"] == "1"
    assert not left


def test_endings_say_what_the_program_would_have_said() -> None:
    assert ending_of(UsageError("no"), 0) == Ending(code=2, line="error: no", speaker=0)
    assert ending_of(UsageError("no"), 2, speaker=0) == Ending(code=2, line="error: rank 2: no", speaker=0)
    said = UsageError("no")
    said.said = True
    assert ending_of(said, 0).line == ""
    assert stop_ending(15) == Ending(code=143, line="interrupted", speaker=0, stopped=True)
