"""How ranks hand each other data: as the user chose, where the machine lets them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric_memory

from causal_forcing.plugins import ranks
from causal_forcing.plugins.ranks import ProcessGroup
from causal_forcing.runtime.environment import EXCHANGE_VARIABLE
from causal_forcing.runtime.errors import BackendUnavailableError
from causal_forcing.runtime.rank_process import chosen_exchange


def test_gpus_whose_memory_cannot_be_mapped_are_said_to_need_collectives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*shape: int, **options: object) -> torch.Tensor:
        raise RuntimeError("CUDA driver error: operation not permitted")

    monkeypatch.setattr(symmetric_memory, "empty", refuse)
    monkeypatch.setattr(ranks, "reach_each_other", lambda size: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: torch.Stream("cpu"))
    monkeypatch.setenv(EXCHANGE_VARIABLE, "stores")
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.float32, device=torch.device("cpu"))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with pytest.raises(BackendUnavailableError) as raised, chosen_exchange():
            ProcessGroup(index=0, size=1).symmetric_buffer("use", (1,), on_gpu)  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()
    said = "ranks cannot map each other's GPU memory (CUDA driver error: operation not permitted): unset "
    assert str(raised.value) == f"{said}{EXCHANGE_VARIABLE}, and they use collectives"
    assert raised.value.exit_code == 3


@pytest.mark.parametrize("way", ["collectives", None])
def test_collectives_write_into_no_buffers(monkeypatch: pytest.MonkeyPatch, way: str | None) -> None:
    monkeypatch.delenv(EXCHANGE_VARIABLE, raising=False)
    if way is not None:
        monkeypatch.setenv(EXCHANGE_VARIABLE, way)
    monkeypatch.setattr(ranks, "reach_each_other", lambda size: True)
    on_gpu = SimpleNamespace(is_cuda=True)
    with chosen_exchange():
        assert ProcessGroup(index=0, size=2).symmetric_buffer("use", (1,), on_gpu) is None  # type: ignore[arg-type]
