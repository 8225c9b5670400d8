"""What figures were taken with: the half of every record without which the other half means nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from causal_forcing.runtime.config import EngineConfig


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Describe the device and the libraries on it."""
    conditions: dict[str, Any] = {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        conditions |= {
            "device_memory_bytes": properties.total_memory,
            "compute_capability": 10 * properties.major + properties.minor,
            "driver": driver_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    for name in ("triton", "onnxruntime", "tensorrt", "tensorrt-rtx"):
        conditions[name.replace("-", "_")] = installed_version(name)
    return {key: value for key, value in conditions.items() if value is not None}


def describe_engine(config: EngineConfig) -> dict[str, Any]:
    """Describe what an engine was built for."""
    return {
        "slug": config.variant.slug,
        "weights": config.weights,
        "geometry": asdict(config.geometry),
        "precision": config.precision,
        "decoder": config.decoder,
        "backend": config.backend,
        "backend_version": config.backend_version,
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return models[0].partition(":")[2].strip() if models else platform.processor() or platform.machine()


def device_slug(device: torch.device) -> str:
    """Return a device's name for file names: `h100`, `rtx-4090`, `cpu`."""
    if device.type != "cuda":
        return device.type
    words = device_name(device).lower().replace("nvidia", "").replace("geforce", "").split()
    return "-".join(word for word in words if not word.endswith("gb") and not word.startswith("hbm")) or "cuda"


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, where its tool is installed."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    return shown[0] if shown else None


def installed_version(distribution: str) -> str | None:
    """Return a distribution's version, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
