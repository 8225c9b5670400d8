"""What this machine can do, for `cf-build doctor`: one probe a topic, none of which can fail the program.

Only the standard library is imported; everything that is looked for is loaded by name inside its guarded probe, since a
broken installation may raise anything on import. No probe uses the network.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]

LOW_DISK_BYTES = 30 * 2**30
"""Less free space draws a warning: the released weights take 17 GB, exported graphs and engines the rest."""
LOW_MEMORY_BYTES = 16 * 2**30
"""Less memory draws a warning: the text encoder alone takes 11 GB."""
MINIMUM_PYTHON = (3, 11)
"""Oldest Python that the package supports."""
BACKENDS_PROBE = "backends"
"""Name of the probe that the verdict rests on."""
TABLE_HEADERS = ("status", "probe", "detail", "fix")
"""Column titles of `report_rows`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What one look at the machine found."""

    name: str
    """Topic."""
    status: Status
    """`fail` is broken or unusable, `warn` is usable but less than it could be."""
    detail: str
    """What was found, one line."""
    fix: str | None = None
    """A command to paste, if one would help."""


def run_probes(cache_folder: Path) -> list[Probe]:
    """Look at everything; never raises.

    Args:
        cache_folder: Where weights and engines are kept; it need not exist yet.
    """
    gpu = _guard("gpu", _probe_gpu)
    has_gpu = gpu.status == "ok"
    torch = _guard("torch", lambda: _probe_torch(has_gpu))
    onnxruntime = _guard("onnxruntime", _probe_onnxruntime)
    tensorrt = _guard("tensorrt", lambda: _probe_package("tensorrt", (10, 15), has_gpu))
    tensorrt_rtx = _guard("tensorrt-rtx", lambda: _probe_package("tensorrt-rtx", (1, 7), has_gpu))
    return [
        _guard("python", _probe_python),
        _guard("platform", lambda: Probe(name="platform", status="ok", detail=_describe_platform())),
        _guard("cpu", _probe_cpu),
        _guard("memory", _probe_memory),
        _guard("disk", lambda: _probe_disk(cache_folder)),
        gpu,
        torch,
        onnxruntime,
        tensorrt,
        tensorrt_rtx,
        _guard("video", _probe_video),
        _guard("ffmpeg", _probe_ffmpeg),
        _guard("hub", _probe_hub),
        _guard(BACKENDS_PROBE, lambda: _probe_backends(gpu, torch, onnxruntime, tensorrt, tensorrt_rtx)),
    ]


def verdict(probes: Iterable[Probe]) -> bool:
    """Return whether at least one backend is usable; the programs exit with 0 if so, else with 3."""
    return any(probe.name == BACKENDS_PROBE and probe.status != "fail" for probe in probes)


def report_json(probes: Sequence[Probe]) -> dict[str, object]:
    """Return the report of `cf-build doctor --json`."""
    return {"usable": verdict(probes), "probes": [dataclasses.asdict(probe) for probe in probes]}


def report_rows(probes: Iterable[Probe]) -> list[tuple[str, str, str, str | None]]:
    """Return one row a probe, under `TABLE_HEADERS`."""
    return [(probe.status, probe.name, probe.detail, probe.fix) for probe in probes]


def _guard(name: str, look: Callable[[], Probe]) -> Probe:
    try:
        return look()
    except Exception as error:
        text = " ".join(str(error).split())
        return Probe(
            name=name, status="fail", detail=f"{type(error).__name__}: {text}" if text else type(error).__name__
        )


def _load(module: str) -> Any:
    """Import by name: a plain import statement would make the module a dependency of this one."""
    return importlib.import_module(module)


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _installed_version(packages: Iterable[str]) -> str | None:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _probe_python() -> Probe:
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


def _describe_platform() -> str:
    return f"{platform.platform(terse=True)}, {platform.machine()}"


def _probe_cpu() -> Probe:
    total = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else total
    return Probe(name="cpu", status="ok", detail=f"{usable} of {total} cores usable")


def _probe_memory() -> Probe:
    total, available = _memory_bytes()
    detail = f"{_gib(total)} in total, {_gib(available)} available"
    if total < LOW_MEMORY_BYTES:
        return Probe(
            name="memory", status="warn", detail=f"{detail}; the full-size model wants {_gib(LOW_MEMORY_BYTES)}"
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


def _probe_disk(folder: Path) -> Probe:
    existing = folder.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    detail = f"{_gib(free)} free for {folder}"
    if not existing.is_dir():
        fix = "export CAUSAL_FORCING_HOME=FOLDER"
        return Probe(name="disk", status="fail", detail=f"{existing} is a file, expected a folder", fix=fix)
    if not os.access(existing, os.W_OK):
        return Probe(name="disk", status="fail", detail=f"{detail}, but {existing} is not writable")
    if free < LOW_DISK_BYTES:
        fix = f"du -sh {shlex.quote(str(existing))}/*"
        return Probe(
            name="disk", status="warn", detail=f"{detail}; released weights want {_gib(LOW_DISK_BYTES)}", fix=fix
        )
    return Probe(name="disk", status="ok", detail=detail)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"


def _probe_gpu() -> Probe:
    detail = _ask_nvml() or _ask_nvidia_smi()
    if detail:
        return Probe(name="gpu", status="ok", detail=detail)
    return Probe(
        name="gpu", status="warn", detail="none: no NVIDIA GPU or driver was found; generation runs on the CPU"
    )


def _ask_nvml() -> str | None:
    """Return driver and GPUs through NVML; None where its bindings or the driver are missing."""
    if not _is_installed("pynvml"):
        return None
    nvml = _load("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        gpus = []
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle).total
            gpus.append(f"{_text(nvml.nvmlDeviceGetName(handle))} (sm_{major}{minor}, {_gib(memory)})")
        return f"{', '.join(gpus)}, driver {_text(nvml.nvmlSystemGetDriverVersion())}" if gpus else None
    finally:
        nvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # old bindings answer in bytes


def _ask_nvidia_smi() -> str | None:
    """Return driver and GPUs through the driver's own program; None where it is missing or finds nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    if answer.returncode != 0:
        reason = " ".join((answer.stdout + answer.stderr).split())
        raise RuntimeError(f"nvidia-smi exited with {answer.returncode}: {reason}")
    gpus = []
    for line in answer.stdout.splitlines():
        name, capability, memory, driver = (field.strip() for field in line.split(","))
        gpus.append(f"{name} (sm_{capability.replace('.', '')}, {memory}), driver {driver}")
    return "; ".join(gpus) or None


def _probe_torch(has_gpu: bool) -> Probe:
    if not _is_installed("torch"):
        return Probe(name="torch", status="fail", detail="not installed", fix="pip install torch")
    torch = _load("torch")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            devices.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    detail = f"{torch.__version__}, {build}, {', '.join(devices) or 'no CUDA device'}"
    if has_gpu and not devices:
        fix = "pip install --force-reinstall torch" if not torch.version.cuda else None
        return Probe(name="torch", status="warn", detail=f"{detail}: it cannot use the GPU of this machine", fix=fix)
    return Probe(name="torch", status="ok", detail=detail)


def _probe_onnxruntime() -> Probe:
    if not _is_installed("onnxruntime"):
        return Probe(name="onnxruntime", status="fail", detail="not installed", fix="pip install onnxruntime")
    onnxruntime = _load("onnxruntime")
    providers = ", ".join(onnxruntime.get_available_providers())
    return Probe(name="onnxruntime", status="ok", detail=f"{onnxruntime.__version__}, providers: {providers}")


def _probe_package(name: str, minimum: tuple[int, int], has_gpu: bool) -> Probe:
    """Look for a TensorRT by its package alone: importing it would load gigabytes of libraries."""
    version = _installed_version((name, f"{name}-cu13", f"{name}-cu12"))
    fix = f"pip install --upgrade 'causal-forcing-engine[{name}]'"
    if version is None:
        if not has_gpu:
            return Probe(name=name, status="ok", detail="not installed; its engines run on NVIDIA GPUs only")
        return Probe(name=name, status="warn", detail="not installed", fix=fix)
    if tuple(int(part) for part in version.split(".")[:2]) < minimum:
        detail = f"{version}, expected {minimum[0]}.{minimum[1]} or newer"
        return Probe(name=name, status="warn", detail=detail, fix=fix)
    return Probe(name=name, status="ok", detail=version)


def _probe_video() -> Probe:
    if not _is_installed("av"):
        return Probe(
            name="video", status="fail", detail="PyAV is not installed: no mp4 can be written", fix="pip install av"
        )
    av = _load("av")
    if "libx264" in av.codecs_available:
        return Probe(name="video", status="ok", detail=f"PyAV {av.__version__} with H.264 (libx264)")
    detail = f"PyAV {av.__version__} without libx264: videos are MPEG-4 part 2, larger and refused by browsers"
    return Probe(name="video", status="warn", detail=detail, fix="pip install --force-reinstall --only-binary av av")


def _probe_ffmpeg() -> Probe:
    program = shutil.which("ffmpeg")
    return Probe(name="ffmpeg", status="ok", detail=program or "not on PATH (optional: PyAV brings its own)")


def _probe_hub() -> Probe:
    offline = os.environ.get("HF_HUB_OFFLINE", "")
    if offline.upper() in ("1", "ON", "YES", "TRUE"):
        detail = f"HF_HUB_OFFLINE={offline}: weights come from the local cache only"
        return Probe(name="hub", status="warn", detail=detail, fix="unset HF_HUB_OFFLINE")
    return Probe(name="hub", status="ok", detail="HF_HUB_OFFLINE is not set: missing weights are downloaded")


def _probe_backends(gpu: Probe, torch: Probe, onnxruntime: Probe, tensorrt: Probe, tensorrt_rtx: Probe) -> Probe:
    """Sum up, best backend first."""
    has_gpu, has_torch, has_onnxruntime = gpu.status == "ok", torch.status != "fail", onnxruntime.status != "fail"
    candidates = {
        "tensorrt": has_gpu and tensorrt.status == "ok",
        "tensorrt-rtx": has_gpu and tensorrt_rtx.status == "ok",
        "cuda": has_torch and _load("torch").cuda.is_available(),
        "onnxruntime": has_onnxruntime,
        "torch": has_torch,
    }
    if not (has_torch or has_onnxruntime):
        detail = "none usable: neither torch nor onnxruntime works here"
        return Probe(name=BACKENDS_PROBE, status="fail", detail=detail, fix="pip install torch onnxruntime")
    usable = ", ".join(name for name, is_usable in candidates.items() if is_usable)
    return Probe(name=BACKENDS_PROBE, status="ok", detail=f"usable: {usable}")
