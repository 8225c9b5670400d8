"""The store by which the ranks of a clip agree: torch's, over TCP, and what they put into it first."""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from causal_forcing.runtime.environment import LaunchedRank
from causal_forcing.runtime.errors import BackendUnavailableError, UsageError
from causal_forcing.runtime.rank_monitor import Store


def open_store(place: LaunchedRank, *, serves: bool, timeout_s: float, part: str = "clip") -> Store:
    """Connect to the store; `serves` makes this process the one that holds it.

    Args:
        place: Where it is.
        serves: Whether to hold it.
        timeout_s: How long to look for it.
        part: Keys of different parts do not meet.

    Raises:
        BackendUnavailableError: Its port is in use, or nobody answers.
    """
    opened: list[Store] = []

    def connect() -> None:
        limit = datetime.timedelta(seconds=timeout_s)
        with contextlib.suppress(RuntimeError):  # torch's errors of networks and stores derive from it
            store = dist.TCPStore(  # type: ignore[attr-defined]  # documented, and not exported by name
                place.address, place.port, is_master=serves, wait_for_workers=False, timeout=limit
            )
            opened.append(dist.PrefixStore(f"{part}-{place.attempt}", store))  # type: ignore[attr-defined]

    # In a thread: what listens on the port may be no store, and torch waits without limit for its first answer.
    opening = threading.Thread(target=connect, daemon=True)
    opening.start()
    opening.join(timeout_s + 1)
    if opened:
        return opened[0]
    if serves:
        raise BackendUnavailableError(
            f"rank 0 cannot listen on port {place.port} of {place.address}, is it in use? name another: "
            "MASTER_PORT, or torchrun --master-port"
        )
    raise BackendUnavailableError(
        f"rank {place.rank} finds no rank 0 at {place.address}:{place.port}: start all ranks together"
    )


def check_agreement(asked: Sequence[Mapping[str, object]]) -> None:
    """Check that all ranks were asked for the same.

    Args:
        asked: Of each rank in order, names to plain JSON values.

    Raises:
        UsageError: Two of them were not; names the first difference.
    """
    for rank, own in enumerate(asked):
        for name in {**asked[0], **own}:
            first, other = asked[0].get(name), own.get(name)
            if first != other:
                raise UsageError(
                    f"the ranks were asked for different clips: {name} is {_shown(first)} on rank 0 and "
                    f"{_shown(other)} on rank {rank}: give all of them the same"
                )


def _shown(value: object) -> str:
    return "not given" if value is None else json.dumps(value, ensure_ascii=False)
