"""Time and memory of this process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from causal_forcing.runtime.usage import MemoryUse, process_age_s


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_process_age_counts_from_before_the_imports() -> None:
    program = (
        "import time; time.sleep(0.5)\n"
        "from causal_forcing.runtime.usage import process_age_s\n"
        "print(process_age_s(), time.perf_counter())\n"
    )
    age_s = float(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout.split()[0])
    assert 0.5 < age_s < 120
    assert age_s < (process_age_s() or 0)


def test_memory_on_the_cpu_is_the_processes() -> None:
    memory = MemoryUse(torch.device("cpu"))
    before = memory.peaks()["host"]
    block = torch.ones(2**26)  # 256 MiB, more than torch itself may have let go
    memory.look()
    assert set(memory.peaks()) == {"host"}
    assert memory.peaks()["host"] >= max(before, block.nbytes)


def test_memory_on_a_gpu_is_the_most_that_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter((90, 40, 70))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (next(free), 100))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 55)
    memory = MemoryUse(torch.device("cuda"))
    for _ in range(3):
        memory.look()
    assert (memory.peaks()["gpu"], memory.peaks()["gpu_torch"]) == (60, 55)
