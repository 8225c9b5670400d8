"""What this process was started in: its installation, its cache folder, and its place among ranks.

Environment variables are read here and nowhere else: `CAUSAL_FORCING_HOME` moves the cache folder,
`CAUSAL_FORCING_EXCHANGE` says how ranks hand each other data. No framework is imported here.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from causal_forcing.runtime.errors import UsageError

DISTRIBUTION = "causal-forcing-engine"
LOCALHOST = "127.0.0.1"
EXCHANGE_VARIABLE = "CAUSAL_FORCING_EXCHANGE"
EXCHANGES = ("collectives", "stores")
"""How the layers of several ranks exchange, the default first."""


def cache_folder() -> Path:
    """Return the folder for engines and caches: `$CAUSAL_FORCING_HOME`, else `causal-forcing` in the user's cache."""
    home = os.environ.get("CAUSAL_FORCING_HOME")
    if home:
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "causal-forcing"


def package_version() -> str:
    """Return this distribution's version."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"


def rank_exchange() -> str:
    """Return which of `EXCHANGES` the layers of several ranks are to use.

    Raises:
        UsageError: The variable names another.
    """
    way = os.environ.get(EXCHANGE_VARIABLE) or EXCHANGES[0]
    if way not in EXCHANGES:
        raise UsageError(f"{EXCHANGE_VARIABLE} is {way!r}, expected {' or '.join(EXCHANGES)}: unset it for the first")
    return way


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedRank:
    """This process's place among those that a launcher such as torchrun started for one clip."""

    rank: int
    """From 0, which writes the clip."""
    ranks: int
    """How many there are, all on this machine."""
    address: str
    """Host of the store that they meet at."""
    port: int
    """Its port."""
    launcher_has_store: bool
    """Whether the launcher serves the store; else rank 0 does."""
    attempt: str
    """Which of the launcher's attempts this is: its store outlives them."""


def launched_rank() -> LaunchedRank | None:
    """Return the place that a launcher's environment variables give this process; None without a launcher.

    Raises:
        UsageError: They are incomplete, or those of several machines.
    """
    if not os.environ.get("WORLD_SIZE"):
        return None
    ranks = _launch_number("WORLD_SIZE", "a number of processes")
    if ranks < 1:
        raise UsageError("WORLD_SIZE is '0', expected a number of processes: unset WORLD_SIZE")
    if ranks == 1 and not os.environ.get("RANK"):
        return None
    rank, local = _launch_number("RANK", "a rank"), os.environ.get("LOCAL_WORLD_SIZE")
    if rank >= ranks:
        raise UsageError(
            f"RANK is {rank}, expected one below WORLD_SIZE, {ranks}: use torchrun --nproc_per_node={ranks}"
        )
    if local and local != str(ranks):
        raise UsageError(f"{ranks} processes share a clip, {local} of them on this machine: start all of them on one")
    return LaunchedRank(
        rank=rank,
        ranks=ranks,
        address=os.environ.get("MASTER_ADDR") or LOCALHOST,
        port=_launch_number("MASTER_PORT", "a port") if ranks > 1 else 0,
        launcher_has_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT") or "0",
    )


def _launch_number(name: str, expected: str) -> int:
    given = os.environ.get(name)
    if given is None:
        raise UsageError(f"WORLD_SIZE is set, as by torchrun, but {name} is not: use torchrun, or unset WORLD_SIZE")
    if not given.isdecimal():
        raise UsageError(f"{name} is {given!r}, expected {expected}: unset WORLD_SIZE, or use torchrun")
    return int(given)
