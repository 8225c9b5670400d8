"""What ranks agree on and where each runs; how they meet and part is in `test_ranks_cli.py`."""

from __future__ import annotations

import re

import pytest
import torch

from causal_forcing.runtime.environment import LaunchedRank
from causal_forcing.runtime.errors import BackendUnavailableError, UsageError
from causal_forcing.runtime.process_group import rank_device
from causal_forcing.runtime.rank_store import check_agreement

PLACE = LaunchedRank(rank=2, ranks=4, address="127.0.0.1", port=1, launcher_has_store=False, attempt="0")


def test_agreement_names_the_first_difference() -> None:
    check_agreement([{"--seed": 1}, {"--seed": 1}])
    with pytest.raises(UsageError, match="--seed is 1 on rank 0 and not given on rank 2: give all of them the same"):
        check_agreement([{"--seed": 1}, {"--seed": 1}, {}])


@pytest.mark.parametrize(
    ("asked", "gpus", "device"), [("auto", 4, "cuda:2"), ("cuda", 8, "cuda:2"), ("auto", 0, "cpu"), ("cpu", 4, "cpu")]
)
def test_each_rank_has_its_own_gpu(asked: str, gpus: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert rank_device(asked, PLACE) == device


@pytest.mark.parametrize(("asked", "gpus"), [("auto", 2), ("cuda", 0)])
def test_fewer_gpus_than_ranks_are_refused(asked: str, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(BackendUnavailableError, match=re.escape(f"torch sees {gpus}, expected 4; use fewer ranks")):
        rank_device(asked, PLACE)
