"""Backends: which exist, which are usable here, and which one `auto` takes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass

from causal_forcing.runtime.config import (
    FP8_COMPUTE_CAPABILITY,
    RTX_COMPUTE_CAPABILITIES,
    PlanOptions,
    default_compute_capabilities,
)
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.errors import BackendUnavailableError, UnknownNameError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A way of running engines."""

    name: str
    """Name on the command line."""
    module: str
    """Module that it needs."""
    distributions: tuple[str, ...]
    """Distributions that the module may come in; the first is the one to install."""
    precisions: tuple[str, ...]
    """Precisions that it runs, the default on a CPU first."""
    runs_on: tuple[str, ...]
    """Kinds of device: cpu, cuda."""
    builds_without_gpu: bool = True
    """Whether a machine without a GPU can build its engines."""
    shares_clips: bool = False
    """Whether several processes can run its engines together."""
    compute_capabilities: tuple[int, ...] | None = None
    """GPU generations that it runs on; None is all."""

    def installed(self) -> bool:
        """Return whether its module is here: more than a folder of type stubs, which has no origin."""
        spec = importlib.util.find_spec(self.module)
        return spec is not None and spec.origin is not None

    @property
    def makes_plans(self) -> bool:
        """Whether its engines are TensorRT plans."""
        return self.name in ("tensorrt", "tensorrt-rtx")

    def artefact_version(self) -> str:
        """Return what its artefacts are tied to: plans to the very build of the library."""
        if self.name == "onnxruntime":
            return "opset24"
        version = self._installed_version()
        if self.name == "cuda":  # tapes hold torch's operators, the kernels beside them are Triton's
            return "+".join(f"{name}{_minor(importlib.metadata.version(name))}" for name in ("torch", "triton"))
        return version if self.makes_plans else _minor(version)

    def runs_on_device(self, device: str) -> bool:
        """Return whether its engines run on a device that is there: `cpu`, `cuda` or `cuda:N`."""
        kind = device.partition(":")[0]
        if kind not in self.runs_on:
            return False
        return kind == "cpu" or self.compute_capabilities is None or capability(device) in self.compute_capabilities

    def _installed_version(self) -> str:
        for distribution in self.distributions:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                return importlib.metadata.version(distribution)
        raise BackendUnavailableError(
            f"the version of {self.module} cannot be told: install it with pip install {self.distributions[0]}"
        )


_PLAN_PRECISIONS = ("bf16", "fp16", "fp8")

BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            name="tensorrt",
            module="tensorrt",
            distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
            precisions=_PLAN_PRECISIONS,
            runs_on=("cuda",),
            builds_without_gpu=False,
        ),
        Backend(
            name="tensorrt-rtx",
            module="tensorrt_rtx",
            distributions=("tensorrt-rtx", "tensorrt-rtx-cu13"),
            precisions=_PLAN_PRECISIONS,
            runs_on=("cuda",),
            compute_capabilities=RTX_COMPUTE_CAPABILITIES,
        ),
        Backend(
            name="cuda",
            module="triton",
            distributions=("triton",),
            precisions=("bf16", "fp16", "fp8"),
            runs_on=("cuda",),
            builds_without_gpu=False,
            shares_clips=True,
        ),
        Backend(
            name="onnxruntime",
            module="onnxruntime",
            distributions=("onnxruntime",),
            precisions=("fp32", "fp8"),
            runs_on=("cpu",),
        ),
        Backend(
            name="torch",
            module="torch",
            distributions=("torch",),
            precisions=("fp32", "bf16", "fp16"),
            runs_on=("cpu", "cuda"),
            shares_clips=True,
        ),
    )
}
"""In the order in which `auto` takes them."""


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def choose_backend(name: str, device: str, *, for_build: bool = False, ranks: int = 1) -> tuple[Backend, str]:
    """Choose a backend.

    Args:
        name: A backend's name, or `auto`.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        for_build: Whether engines are only built here: a named backend need not run on this machine then.
        ranks: Processes that are to run the engines together.

    Returns:
        The backend, and the reason in a few words.

    Raises:
        BackendUnavailableError: None is usable, or the named one is not.
        UnknownNameError: There is no backend of that name.
        UsageError: The named one does not run on the named device, or in several processes together.
    """
    # Names first: looking for a GPU means importing torch.
    if name not in ("auto", *BACKENDS):
        raise UnknownNameError("backend", name, ("auto", *BACKENDS))
    if name == "auto":
        device = choose_device(device)
        for backend in BACKENDS.values():
            if backend.installed() and backend.runs_on_device(device) and (ranks == 1 or backend.shares_clips):
                return backend, f"first backend installed here that runs on {device}"
        raise BackendUnavailableError(
            f"no usable backend for {device}: got none of {', '.join(BACKENDS)}; install one: pip install onnxruntime"
        )
    backend = BACKENDS[name]
    if ranks > 1 and not backend.shares_clips:
        sharing = " or ".join(other.name for other in BACKENDS.values() if other.shares_clips)
        raise UsageError(f"backend {name!r} runs a clip on one device, got {ranks}: use --backend {sharing}")
    if not backend.installed():
        raise BackendUnavailableError(f"backend {name!r} is not installed: pip install {backend.distributions[0]}")
    if for_build and backend.builds_without_gpu and backend.makes_plans:
        return backend, "chosen by name"
    _check_runs_on(backend, choose_device(device))
    return backend, "chosen by name"


def _check_runs_on(backend: Backend, device: str) -> None:
    if backend.runs_on_device(device):
        return
    kind = device.partition(":")[0]
    if kind == "cuda" and "cuda" not in backend.runs_on:
        raise UsageError(f"backend {backend.name!r} runs on the CPU only: use --device cpu or --backend torch")
    if kind == "cpu":
        raise BackendUnavailableError(
            f"backend {backend.name!r} needs a CUDA GPU and torch sees none: use --backend onnxruntime"
        )
    known = ", ".join(f"sm_{number}" for number in backend.compute_capabilities or ())
    raise BackendUnavailableError(
        f"backend {backend.name!r} does not run on sm_{capability(device)}, expected one of {known}: "
        "use --backend tensorrt or torch"
    )


def choose_precision(backend: Backend, precision: str | None, device: str) -> str:
    """Return the precision to use: the given one, else bf16 on a GPU and fp32 on a CPU.

    Raises:
        UsageError: The backend does not run the given precision.
    """
    if precision is None:
        if backend.makes_plans or (choose_device(device).startswith("cuda") and "bf16" in backend.precisions):
            return "bf16"
        return "fp32"
    if precision not in backend.precisions:
        raise UsageError(
            f"backend {backend.name!r} does not run {precision}: use --precision {' or '.join(backend.precisions)}"
        )
    if backend.name == "cuda" and precision == "fp8":
        here = capability(choose_device(device))
        if here < FP8_COMPUTE_CAPABILITY:
            raise UsageError(
                f"--precision fp8 needs compute capability {FP8_COMPUTE_CAPABILITY} or above, got {here}: use bf16"
            )
    return precision


def choose_plan(backend: Backend, options: EngineOptions, precision: str, device: str) -> PlanOptions | None:
    """Complete the options that only plans have; None for other backends.

    Raises:
        UsageError: An option that the backend does not have, or GPUs that it does not serve.
        BackendUnavailableError: The backend compiles for the GPU of this machine and there is none.
    """
    given = {
        "--compute-capability": options.compute_capability,
        "--optimization-level": options.optimization_level,
        "--workspace-mib": options.workspace_mib,
        "--plugin": options.plugin,
    }
    if not backend.makes_plans:
        for option, value in given.items():
            if value is not None:
                raise UsageError(f"{option} is for TensorRT plans, not for {backend.name!r}: leave it out")
        return None
    is_rtx = backend.name == "tensorrt-rtx"
    if is_rtx and options.plugin is not None:
        raise UsageError("--plugin is for the tensorrt backend: TensorRT-RTX takes no plugins, leave it out")
    if is_rtx:
        capabilities = tuple(options.compute_capability or default_compute_capabilities(precision))
        for number in capabilities:
            if number not in RTX_COMPUTE_CAPABILITIES:
                known = ", ".join(map(str, RTX_COMPUTE_CAPABILITIES))
                raise UsageError(f"--compute-capability {number} is not one that TensorRT-RTX serves: use {known}")
    else:
        here = capability(choose_device(device))
        if options.compute_capability not in (None, [here]):
            raise UsageError(
                f"--compute-capability: a tensorrt plan is for the GPU that builds it, sm_{here}: leave it out"
            )
        capabilities = (here,)
    if precision == "fp8" and min(capabilities) < FP8_COMPUTE_CAPABILITY:
        raise UsageError(
            f"--precision fp8 needs compute capability {FP8_COMPUTE_CAPABILITY} or above, got {min(capabilities)}: "
            "use bf16"
        )
    return PlanOptions(
        compute_capabilities=capabilities,
        optimization_level=3 if options.optimization_level is None else options.optimization_level,
        workspace_mib=options.workspace_mib,
        plugin=None if is_rtx else options.plugin or "python",
    )


def capability(device: str) -> int:
    """Return the compute capability of a GPU, such as 89; 0 for the CPU."""
    if not device.startswith("cuda"):
        return 0
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose_device(device: str) -> str:
    """Return `cpu`, `cuda` or `cuda:N`; `auto` is the GPU where there is one.

    Raises:
        BackendUnavailableError: A GPU was asked for and there is none.
        UnknownNameError: No such kind of device.
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (":" in device and not (kind == "cuda" and index.isdecimal())):
        raise UnknownNameError("device", device, ("auto", "cpu", "cuda", "cuda:N"))
    if kind == "cpu":
        return device
    if importlib.util.find_spec("torch") is not None:
        import torch  # only now: a CPU run by name must not pay for it

        if torch.cuda.is_available():
            if index and int(index) >= torch.cuda.device_count():
                count = torch.cuda.device_count()
                raise BackendUnavailableError(f"--device {device} is not there, torch sees {count}: use --device cuda")
            return "cuda" if kind == "auto" else device
    if kind == "cuda":
        raise BackendUnavailableError(f"--device {device} needs a CUDA GPU and torch sees none: use --device cpu")
    return "cpu"
