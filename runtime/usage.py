"""What this process has taken so far: time since it started, and memory."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch


class MemoryUse:
    """The most memory that was in use, in bytes.

    Args:
        device: Where the engines run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gpu_bytes = 0

    def look(self) -> None:
        """Look at what is in use on the GPU now; peaks between two looks are torch's own only."""
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            self._gpu_bytes = max(self._gpu_bytes, total - free)

    def peaks(self) -> dict[str, int]:
        """Return the peaks so far.

        Returns:
            `host`: of this process. On a GPU `gpu`: of everything on it, other processes and all libraries included, at
            the moments that were looked at; `gpu_torch`: of torch's allocator, at any moment.
        """
        peaks = {}
        if sys.platform != "win32":
            import resource

            unit = 1 if sys.platform == "darwin" else 1024
            peaks["host"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if self._device.type == "cuda":
            peaks |= {"gpu": self._gpu_bytes, "gpu_torch": torch.cuda.max_memory_reserved(self._device)}
        return peaks


def process_age_s() -> float | None:
    """Return the seconds since this process started, imports included; None where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
