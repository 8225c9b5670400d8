"""Backends: which exist, which are usable here, and which one `auto` takes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass

from causal_forcing.runtime.errors import BackendUnavailableError, UnknownNameError, UsageError

PLANNED_BACKENDS = ("tensorrt", "tensorrt-rtx", "cuda")
"""Backends of the design that this release does not carry yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A way of running engines."""

    name: str
    """Name on the command line."""
    package: str
    """Distribution that it needs."""
    precisions: tuple[str, ...]
    """Precisions that it runs, the default on a CPU first."""
    runs_on_gpu: bool
    """Whether it can use a CUDA GPU."""

    def installed(self) -> bool:
        """Return whether its package is here."""
        return importlib.util.find_spec(self.package) is not None

    def artefact_version(self) -> str:
        """Return what its artefacts are tied to."""
        if self.name == "onnxruntime":
            return "opset24"
        return ".".join(importlib.metadata.version(self.package).split("+")[0].split(".")[:2])


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(name="onnxruntime", package="onnxruntime", precisions=("fp32",), runs_on_gpu=False),
        Backend(name="torch", package="torch", precisions=("fp32", "bf16", "fp16"), runs_on_gpu=True),
    )
}


def choose_backend(name: str, device: str) -> tuple[Backend, str]:
    """Choose a backend.

    Args:
        name: A backend's name, or `auto`.
        device: `auto`, `cpu` or `cuda`.

    Returns:
        The backend, and the reason in a few words.

    Raises:
        BackendUnavailableError: None is usable, or the named one is not.
        UnknownNameError: There is no backend of that name.
    """
    # Names first: looking for a GPU means importing torch.
    if name in PLANNED_BACKENDS:
        raise BackendUnavailableError(
            f"backend {name!r} is not part of this release: use --backend {' or '.join(BACKENDS)}"
        )
    if name not in ("auto", *BACKENDS):
        raise UnknownNameError("backend", name, ("auto", *BACKENDS))
    device = choose_device(device)
    if name == "auto":
        wants_gpu = device.startswith("cuda")
        for backend in BACKENDS.values():
            if backend.installed() and (backend.runs_on_gpu or not wants_gpu):
                return backend, f"first backend installed here that runs on {device}"
        raise BackendUnavailableError(
            f"no usable backend for {device}: got none of {', '.join(BACKENDS)}; install one: pip install onnxruntime"
        )
    backend = BACKENDS[name]
    if not backend.installed():
        raise BackendUnavailableError(f"backend {name!r} is not installed: pip install {backend.package}")
    if device.startswith("cuda") and not backend.runs_on_gpu:
        raise UsageError(f"backend {name!r} runs on the CPU only: use --device cpu or --backend torch")
    return backend, "chosen by name"


def choose_precision(backend: Backend, precision: str | None, device: str) -> str:
    """Return the precision to use: the given one, else bf16 on a GPU and fp32 on a CPU.

    Raises:
        UsageError: The backend does not run the given precision.
    """
    if precision is None:
        return "bf16" if choose_device(device).startswith("cuda") and "bf16" in backend.precisions else "fp32"
    if precision not in backend.precisions:
        raise UsageError(
            f"backend {backend.name!r} does not run {precision}: use --precision {' or '.join(backend.precisions)}"
        )
    return precision


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
