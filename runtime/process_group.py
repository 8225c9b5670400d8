"""The ranks of one clip from one rank's side: they meet, agree, share what rank 0 finds, and leave together.

What takes long, such as a build, is waited for at a store and not in a collective: there signals and the faults of
others are seen. Torch's process group exists only while networks run.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from causal_forcing.runtime.environment import LaunchedRank
from causal_forcing.runtime.errors import BackendUnavailableError, RanksEndedError
from causal_forcing.runtime.interruption import STOP_SIGNALS, heeded
from causal_forcing.runtime.rank_ending import ending_of, stop_ending
from causal_forcing.runtime.rank_monitor import RankMonitor, Store
from causal_forcing.runtime.rank_store import check_agreement, open_store

JOIN_S = 60.0
"""How long ranks wait for each other at the start: they load the same libraries."""
CONNECT_S = 20.0
"""How long a rank looks for the store."""
COLLECTIVE_S = 600.0
"""Limit of one collective: only a bug reaches it, a rank that is gone is noticed by the monitors."""
LEAVE_S = 10.0
"""How long leaving torch's process group may take."""

_POLL_S = 0.05


class RankGroup:
    """All ranks of a clip.

    Args:
        place: This process's place among them.
        store: A connection to the store, for the main thread.
        monitor: Started; with a connection of its own.
    """

    def __init__(self, place: LaunchedRank, store: Store, monitor: RankMonitor) -> None:
        self.rank, self.ranks = place.rank, place.ranks
        self._place = place
        self.monitor = monitor
        self._store = store
        self._judged: BaseException | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes and talks."""
        return self.rank == 0

    def agree(self, decisive: Mapping[str, object]) -> None:
        """Make sure that all ranks were asked for the same clip.

        Args:
            decisive: What decides the clip, by the names that the user knows.

        Raises:
            UsageError: They were not, on rank 0, which then ends all.
            RanksEndedError: A rank ended, or did not come.
        """
        self._store.set(f"hello/{self.rank}", json.dumps({"pid": os.getpid(), "decisive": decisive}, default=str))
        everybody: list[dict[str, Any]] = []
        for rank in range(self.ranks):
            content = self._await(f"hello/{rank}", JOIN_S, f"rank {rank} did not come within {JOIN_S:.0f} s")
            everybody.append(json.loads(content))
            self.monitor.watch(rank, everybody[-1]["pid"])
        if self.is_first:
            check_agreement([hello["decisive"] for hello in everybody])

    def share(self, find: Callable[[], Path]) -> Path:
        """Return the path that rank 0 finds, however long it takes."""
        if self.is_first:
            path = find()
            self._store.set("path", str(path.absolute()))
            return path
        return Path(self._await("path"))

    def connect(self, device: str) -> None:
        """Make torch's process group: NCCL between GPUs, gloo between CPUs.

        Raises:
            BackendUnavailableError: This build of torch has no NCCL.
        """
        loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
        if loopback is not None:  # all ranks are here: a machine's name and its routes play no part
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
        # NCCL's own watch would abort this process over a rank that is gone, before its clip is closed.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
        on_gpu = device.startswith("cuda")
        if on_gpu:
            if not dist.is_nccl_available():
                raise BackendUnavailableError("this torch has no NCCL, which GPUs share a clip by: install another")
            torch.cuda.set_device(device)
        # A connection of its own: what is blocked in it is blocked alone.
        store: Any = open_store(self._place, serves=False, timeout_s=CONNECT_S, part="collectives")
        # Ranks also meet at it when they map each other's memory, before which each has loaded its engine.
        store.set_timeout(datetime.timedelta(seconds=COLLECTIVE_S))
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.ranks,
            timeout=datetime.timedelta(seconds=COLLECTIVE_S),
            device_id=torch.device(device) if on_gpu else None,
        )

    def leave(self) -> None:
        """Wait until all ranks are done, and leave torch's process group together with them."""
        self.monitor.finish()
        for rank in range(self.ranks):
            self._await(f"done/{rank}")
        gc.collect()  # NCCL waits for the CUDA graphs that hold its collectives
        leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(LEAVE_S)  # one that is still at it ends with the process, see `must_exit_at_once`
        self.monitor.stop()
        self._store.set(f"left/{self.rank}", "1")
        if self.is_first:  # the store may go with this process
            deadline_s = time.monotonic() + LEAVE_S
            while time.monotonic() < deadline_s and not self._store.check([f"left/{r}" for r in range(self.ranks)]):
                time.sleep(_POLL_S)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """End all ranks where this one ends by an error, and this one as another has: nests.

        Raises:
            RanksEndedError: Another rank was first to end, in place of what that led to here.
            KeyboardInterrupt: A stop that reached any rank.
        """
        try:
            yield
        except BaseException as error:
            if error is self._judged:
                raise
            try:
                self._judged = self._judge(error)
            except KeyboardInterrupt:  # a stop in the moment before they are ignored
                self._judged = self._judge(error)
            if self._judged is error:
                raise
            raise self._judged from error

    def _judge(self, error: BaseException) -> BaseException:
        """Return what this rank ends by: the error, or what another rank ended by before."""
        self.monitor.main_ends()
        for number in STOP_SIGNALS:  # it is ending already; a launcher may send more of them
            signal.signal(number, signal.SIG_IGN)
        ending = self.monitor.look()
        if ending is None and _is_of_collective(error):  # another rank is behind it; which is known in a moment
            ending = self.monitor.await_ending(self.monitor.patience_s)
        if ending is None:
            is_stop = isinstance(error, KeyboardInterrupt)
            own = stop_ending(signal.SIGINT) if is_stop else ending_of(error, self.rank)
            ending = self.monitor.end(own)
            if ending == own and self.is_first:
                self.monitor.may_speak(ending)  # said where the error arrives, after everything is closed
                return error
        if not self.is_first:
            self.monitor.speak(ending)
            return RanksEndedError(ending.line, exit_code=ending.code, said=True)
        tells = self.monitor.may_speak(ending)
        if ending.stopped:
            return error if isinstance(error, KeyboardInterrupt) else KeyboardInterrupt()
        return RanksEndedError(ending.line.removeprefix("error: "), exit_code=ending.code, said=not tells)

    def _await(self, key: str, timeout_s: float | None = None, missing: str = "") -> str:
        """Return what a rank puts into the store, once it is there.

        Raises:
            RanksEndedError: The clip ended, or it took too long.
        """
        started_s = time.monotonic()
        while not self._store.check([key]):
            ending = self.monitor.look()
            if ending is not None:
                raise RanksEndedError(ending.line, exit_code=ending.code, said=True)
            if timeout_s is not None and time.monotonic() - started_s > timeout_s:
                raise RanksEndedError(f"{missing}: start all ranks together", exit_code=3, said=False)
            time.sleep(_POLL_S)
        content: bytes = self._store.get(key)
        return content.decode()


@contextlib.contextmanager
def joined(place: LaunchedRank, *, connect_s: float = CONNECT_S) -> Iterator[RankGroup]:
    """Meet the other ranks, and leave together with them, or as they do.

    Raises:
        BackendUnavailableError: The store cannot be reached, or its port is in use.
    """
    first = place.rank == 0
    serves = first and not place.launcher_has_store
    try:
        store = open_store(place, serves=serves, timeout_s=connect_s)
        monitor = RankMonitor(open_store(place, serves=False, timeout_s=connect_s), place.rank, place.ranks)
    except BackendUnavailableError as error:
        if first:
            raise
        # Rank 0 has refused, and said why.
        raise RanksEndedError(str(error), exit_code=error.exit_code, said=True) from error
    group = RankGroup(place, store, monitor)
    if not first:
        # Its monitor sees them; a terminal's Ctrl-C is for rank 0.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for number in heeded():
            signal.signal(number, lambda number, frame: None)
    monitor.start()
    try:
        with group.together():
            yield group
            group.leave()
    except BaseException:
        monitor.linger(monitor.grace_s)
        raise


def refuse(place: LaunchedRank, error: BaseException, *, connect_s: float = CONNECT_S) -> None:
    """Let rank 0 say why this rank refuses, as it perhaps does not itself; then wait for it to have said so."""
    with contextlib.suppress(BackendUnavailableError, RuntimeError):
        store = open_store(place, serves=False, timeout_s=connect_s)
        RankMonitor(store, place.rank, place.ranks).end(ending_of(error, place.rank, speaker=0))
        deadline_s = time.monotonic() + connect_s
        while time.monotonic() < deadline_s and not store.check(["knows/0"]):
            time.sleep(_POLL_S)
        time.sleep(1.0)  # launchers stop all ranks when one leaves, and rank 0 is about to speak


def rank_device(device: str, place: LaunchedRank) -> str:
    """Return the device of this rank: a GPU of its own where there are any, or the CPU that all share.

    Raises:
        BackendUnavailableError: There are fewer GPUs than ranks, or none though they were asked for.
    """
    count = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cpu" or (device == "auto" and not count):
        return "cpu"
    if count < place.ranks:
        raise BackendUnavailableError(
            f"each rank needs a GPU of its own: torch sees {count}, expected {place.ranks}; use fewer ranks, or "
            "--device cpu"
        )
    return f"cuda:{place.rank}"


def must_exit_at_once() -> bool:
    """Return whether torch's process group was not left: its threads and collectives could hold up an orderly exit."""
    return bool(dist.is_initialized())


def _is_of_collective(error: BaseException) -> bool:
    # Gloo has no class of its own; its messages name its sources.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
