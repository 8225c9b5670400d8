"""The doctor's look at GPUs and at what runs on them: the driver, torch, both flavours of TensorRT and their tools.

Only the standard library is imported. TensorRT is imported in a process of its own: it loads gigabytes, and what is
wrong with it may end the process that finds out.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass

from causal_forcing.runtime.config import RTX_COMPUTE_CAPABILITIES
from causal_forcing.runtime.environment import DISTRIBUTION
from causal_forcing.runtime.probe import Probe, gib, installed_version, is_installed, load

IMPORT_TIMEOUT_S = 120
"""Longer than a first import of TensorRT from a cold disk takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU of this machine."""

    name: str
    """Its model."""
    compute_capability: int
    """Its generation, such as 89."""
    memory: str
    """How much it has, as text."""

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.compute_capability}, {self.memory})"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuList:
    """The GPUs of this machine and their driver."""

    gpus: tuple[Gpu, ...] = ()
    """As the driver counts them."""
    driver: str = ""
    """Its version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """One of the two TensorRTs, as far as the doctor is concerned."""

    name: str
    """Name of the backend, of its distribution and of its extra."""
    module: str
    """Module to import."""
    minimum: tuple[int, int]
    """Oldest version that the backend supports."""
    serves: tuple[int, ...] | None = None
    """GPU generations that it runs on; None is all of the machine's."""

    def fit(self, gpus: GpuList) -> list[int]:
        """Return the generations of this machine that it serves."""
        here = sorted({gpu.compute_capability for gpu in gpus.gpus})
        return [number for number in here if self.serves is None or number in self.serves]


TENSORRT = Flavour(name="tensorrt", module="tensorrt", minimum=(10, 15))
TENSORRT_RTX = Flavour(name="tensorrt-rtx", module="tensorrt_rtx", minimum=(1, 7), serves=RTX_COMPUTE_CAPABILITIES)


def find_gpus() -> GpuList:
    """Ask the driver, through its library or its program, for the GPUs.

    Raises:
        RuntimeError: There is a driver, and it does not work.
    """
    return _ask_nvml() or _ask_nvidia_smi() or GpuList()


def probe_gpu(gpus: GpuList) -> Probe:
    """Describe the GPUs that were found."""
    if gpus.gpus:
        return Probe(name="gpu", status="ok", detail=f"{', '.join(map(str, gpus.gpus))}, driver {gpus.driver}")
    return Probe(
        name="gpu", status="warn", detail="none: no NVIDIA GPU or driver was found; generation runs on the CPU"
    )


def _ask_nvml() -> GpuList | None:
    """Ask NVML; None where its bindings or the driver are missing."""
    if not is_installed("pynvml"):
        return None
    nvml = load("pynvml")
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
            name = _text(nvml.nvmlDeviceGetName(handle))
            gpus.append(Gpu(name=name, compute_capability=10 * major + minor, memory=gib(memory)))
        return GpuList(gpus=tuple(gpus), driver=_text(nvml.nvmlSystemGetDriverVersion())) if gpus else None
    finally:
        nvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # old bindings answer in bytes


def _ask_nvidia_smi() -> GpuList | None:
    """Ask the driver's own program; None where it is missing or finds nothing."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    if answer.returncode != 0:
        reason = " ".join((answer.stdout + answer.stderr).split())
        raise RuntimeError(f"nvidia-smi exited with {answer.returncode}: {reason}")
    gpus, driver = [], ""
    for line in answer.stdout.splitlines():
        name, capability, memory, driver = (field.strip() for field in line.split(","))
        gpus.append(Gpu(name=name, compute_capability=int(capability.replace(".", "")), memory=memory))
    return GpuList(gpus=tuple(gpus), driver=driver) if gpus else None


def probe_torch(gpus: GpuList) -> Probe:
    """Look at torch, and at whether it sees the GPUs that the driver does."""
    if not is_installed("torch"):
        return Probe(name="torch", status="fail", detail="not installed", fix="pip install torch")
    torch = load("torch")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            devices.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    detail = f"{torch.__version__}, {build}, {', '.join(devices) or 'no CUDA device'}"
    if gpus.gpus and not devices:
        fix = "pip install --force-reinstall torch" if not torch.version.cuda else None
        return Probe(name="torch", status="warn", detail=f"{detail}: it cannot use the GPU of this machine", fix=fix)
    return Probe(name="torch", status="ok", detail=detail)


def probe_tensorrt(flavour: Flavour, gpus: GpuList) -> Probe:
    """Look at one flavour of TensorRT: a warning where it is broken, too old, or missing on a GPU that it serves."""
    fix = f"pip install --upgrade '{_requirement(flavour.name)}'"
    fits = bool(flavour.fit(gpus))
    if not is_installed(flavour.module):
        missing = installed_version((flavour.name, f"{flavour.name}-cu13", f"{flavour.name}-cu12")) is None
        detail = "not installed" if missing else "installed without its module"
        if missing and not fits:
            return Probe(name=flavour.name, status="ok", detail=f"{detail}; {_purpose(flavour)}")
        return Probe(name=flavour.name, status="warn", detail=detail, fix=fix)
    version, fault = _try_import(flavour.module)
    if version is None:
        detail = f"installed, but it cannot be used: {fault}"
        return Probe(name=flavour.name, status="warn", detail=detail, fix=fix)
    if tuple(int(part) for part in version.split(".")[:2]) < flavour.minimum:
        oldest = ".".join(map(str, flavour.minimum))
        return Probe(name=flavour.name, status="warn", detail=f"{version}, expected {oldest} or newer", fix=fix)
    return Probe(name=flavour.name, status="ok", detail=f"{version}, {_service(flavour, gpus)}")


def _try_import(module: str) -> tuple[str | None, str]:
    """Import TensorRT in a process of its own.

    Returns:
        Its version and nothing, or None and what is wrong with it.
    """
    # A package without the library imports, empty; type stubs are such a one.
    script = f"import {module} as trt; trt.Builder; trt.Runtime; print(trt.__version__)"
    command = [sys.executable, "-c", script]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return None, f"its import takes longer than {IMPORT_TIMEOUT_S} s"
    if finished.returncode < 0:
        return None, f"its import ends with {signal.Signals(-finished.returncode).name}"
    if finished.returncode:
        lines = finished.stderr.strip().splitlines()
        return None, lines[-1] if lines else f"its import exits with {finished.returncode}"
    return finished.stdout.split()[-1], ""


def _purpose(flavour: Flavour) -> str:
    if flavour.serves is None:
        return "it builds and runs on NVIDIA GPUs only"
    return f"it builds on any machine, for {_names(flavour.serves)}"


def _service(flavour: Flavour, gpus: GpuList) -> str:
    """Say which GPUs a flavour serves, this machine's first."""
    fits, here = flavour.fit(gpus), sorted({gpu.compute_capability for gpu in gpus.gpus})
    if flavour.serves is None:
        return f"serves {_names(fits)}" if fits else "without a GPU it neither builds nor runs"
    text = f"builds for {_names(flavour.serves)}"
    others = [number for number in here if number not in fits]
    if others:
        return f"{text}; does not run on {_names(others)}"
    return text if here else f"{text}; runs on none of them here"


def _names(capabilities: tuple[int, ...] | list[int]) -> str:
    return ", ".join(f"sm_{number}" for number in capabilities)


def _requirement(extra: str) -> str:
    """Return what the package asks for under an extra, such as `tensorrt<12,>=10.15`."""
    try:
        requirements = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    for requirement in requirements:
        name, _, marker = requirement.partition(";")
        if extra in marker.replace("'", '"').split('"'):
            return name.strip()
    return extra


def probe_tool(name: str, purpose: str, *, is_needed: bool = False) -> Probe:
    """Look for a package that plans are made or examined with."""
    version = installed_version((name,))
    if version is not None:
        return Probe(name=name, status="ok", detail=version)
    if is_needed:
        return Probe(name=name, status="warn", detail=f"not installed; {purpose}", fix=f"pip install {name}")
    return Probe(name=name, status="ok", detail=f"not installed (optional: {purpose})")
