"""What the environment says of the cache folder and of the ranks."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from causal_forcing.runtime.environment import LaunchedRank, cache_folder, launched_rank
from causal_forcing.runtime.errors import UsageError


def test_cache_folder_follows_the_environment_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAUSAL_FORCING_HOME", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder() == Path("/a")
    monkeypatch.setenv("CAUSAL_FORCING_HOME", "")
    assert cache_folder() == Path("/b/causal-forcing")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "causal-forcing"


def test_launched_rank_is_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    assert launched_rank() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched_rank() is None, "one process, and no launcher's rank"
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert launched_rank() == LaunchedRank(
        rank=3, ranks=4, address="127.0.0.1", port=29500, launcher_has_store=False, attempt="0"
    )
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    place = launched_rank()
    assert place is not None
    assert (place.address, place.launcher_has_store) == ("localhost", True)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "several"}, "WORLD_SIZE is 'several', expected a number of processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "4"}, "RANK is 4, expected one below WORLD_SIZE, 4: use torchrun --nproc_per_node=4"),
        ({"LOCAL_WORLD_SIZE": "2"}, "4 processes share a clip, 2 of them on this machine: start all of them on one"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is '', expected a port"),
    ],
)
def test_launched_rank_incomplete_or_on_other_machines_is_refused(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"WORLD_SIZE": "4", "RANK": "0", "MASTER_PORT": "29500"} | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=re.escape(said)):
        launched_rank()
