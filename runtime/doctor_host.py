"""The doctor's look at everything but GPUs: the system, memory and disk, ONNX Runtime, video encoders, the hub.

Only the standard library is imported.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from pathlib import Path

from causal_forcing.runtime.probe import Probe, gib, is_installed, load

LOW_DISK_BYTES = 30 * 2**30
"""Less free space draws a warning: the released weights take 17 GB, exported graphs and engines the rest."""
LOW_MEMORY_BYTES = 16 * 2**30
"""Less memory draws a warning: the text encoder alone takes 11 GB."""
MINIMUM_PYTHON = (3, 11)
"""Oldest Python that the package supports."""


def probe_python() -> Probe:
    """Look at the interpreter."""
    detail = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < MINIMUM_PYTHON:
        expected = ".".join(map(str, MINIMUM_PYTHON))
        return Probe(
            name="python",
            status="fail",
            detail=f"{detail}, expected {expected} or newer",
            fix=f"uv python install {expected}",
        )
    return Probe(name="python", status="ok", detail=detail)


def probe_platform() -> Probe:
    """Name the system."""
    return Probe(name="platform", status="ok", detail=f"{platform.platform(terse=True)}, {platform.machine()}")


def probe_cpu() -> Probe:
    """Count the cores that this process may use."""
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    return Probe(name="cpu", status="ok", detail=f"{usable} of {total} cores usable")


def probe_memory() -> Probe:
    """Look at the memory, within the container's limit where there is one."""
    total, available = _memory_bytes()
    detail = f"{gib(total)} in total, {gib(available)} available"
    if total < LOW_MEMORY_BYTES:
        return Probe(
            name="memory", status="warn", detail=f"{detail}; the full-size model wants {gib(LOW_MEMORY_BYTES)}"
        )
    return Probe(name="memory", status="ok", detail=detail)


def _memory_bytes() -> tuple[int, int]:
    """Return total and available memory, within the container's limit where there is one."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    else:
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        total = available = os.sysconf("SC_PHYS_PAGES") * page_bytes
        if "SC_AVPHYS_PAGES" in os.sysconf_names:
            available = os.sysconf("SC_AVPHYS_PAGES") * page_bytes
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and (limit_text := limit.read_text().strip()).isdigit():
        total = min(total, int(limit_text))
        available = min(available, max(0, int(limit_text) - int(used.read_text())))
    return total, available


def probe_disk(folder: Path) -> Probe:
    """Look at the room for weights and engines, and at whether it can be written."""
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    detail = f"{gib(free)} free for {folder}"
    if not existing.is_dir():
        fix = "export CAUSAL_FORCING_HOME=FOLDER"
        return Probe(name="disk", status="fail", detail=f"{existing} is a file, expected a folder", fix=fix)
    if not os.access(existing, os.W_OK):
        return Probe(name="disk", status="fail", detail=f"{detail}, but {existing} is not writable")
    if free < LOW_DISK_BYTES:
        fix = f"du -sh {shlex.quote(str(existing))}/*"
        return Probe(
            name="disk", status="warn", detail=f"{detail}; released weights want {gib(LOW_DISK_BYTES)}", fix=fix
        )
    return Probe(name="disk", status="ok", detail=detail)


def probe_onnxruntime() -> Probe:
    """Look at ONNX Runtime and at where it can run."""
    if not is_installed("onnxruntime"):
        return Probe(name="onnxruntime", status="fail", detail="not installed", fix="pip install onnxruntime")
    onnxruntime = load("onnxruntime")
    providers = ", ".join(onnxruntime.get_available_providers())
    return Probe(name="onnxruntime", status="ok", detail=f"{onnxruntime.__version__}, providers: {providers}")


def probe_video() -> Probe:
    """Look at PyAV and its encoders."""
    if not is_installed("av"):
        return Probe(
            name="video", status="fail", detail="PyAV is not installed: no mp4 can be written", fix="pip install av"
        )
    av = load("av")
    if "libx264" in av.codecs_available:
        return Probe(name="video", status="ok", detail=f"PyAV {av.__version__} with H.264 (libx264)")
    detail = f"PyAV {av.__version__} without libx264: videos are MPEG-4 part 2, larger and refused by browsers"
    return Probe(name="video", status="warn", detail=detail, fix="pip install --force-reinstall --only-binary av av")


def probe_ffmpeg() -> Probe:
    """Look for the program."""
    program = shutil.which("ffmpeg")
    return Probe(name="ffmpeg", status="ok", detail=program or "not on PATH (optional: PyAV brings its own)")


def probe_hub() -> Probe:
    """Look at whether weights may be downloaded."""
    offline = os.environ.get("HF_HUB_OFFLINE", "")
    if offline.upper() in ("1", "ON", "YES", "TRUE"):
        detail = f"HF_HUB_OFFLINE={offline}: weights come from the local cache only"
        return Probe(name="hub", status="warn", detail=detail, fix="unset HF_HUB_OFFLINE")
    return Probe(name="hub", status="ok", detail="HF_HUB_OFFLINE is not set: missing weights are downloaded")
