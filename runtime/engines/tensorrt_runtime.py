"""What the TensorRT engines of one directory share, made once: the runtime, activation memory and a stream."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from causal_forcing.runtime.backends import BACKENDS, capability
from causal_forcing.runtime.config import FP8_COMPUTE_CAPABILITY, PlanOptions
from causal_forcing.runtime.errors import EngineMismatchError
from causal_forcing.runtime.manifest import Manifest, rebuild_command
from causal_forcing.runtime.tensorrt_library import TensorRTLibrary, load_library


def check_plans(folder: Path, manifest: Manifest, device: torch.device) -> None:
    """Check that plans run with the TensorRT and on the GPU that are here; no plan is read and nothing imported.

    Raises:
        EngineMismatchError: They are of another version of TensorRT, or for other GPUs.
    """
    config, plan = manifest.config, _plan_options(manifest)
    installed = BACKENDS[config.backend].artefact_version()
    if config.backend_version != installed:
        raise EngineMismatchError(
            "backend_version",
            got=f"{config.backend} {config.backend_version}",
            expected=installed,
            fix=rebuild_command(folder, config.fields()),
        )
    here = capability(str(device))
    if here not in plan.compute_capabilities:
        # A tensorrt plan is for the GPU that builds it; one of tensorrt-rtx must be told.
        more = dataclasses.replace(plan, compute_capabilities=tuple(sorted({*plan.compute_capabilities, here})))
        precision = "bf16" if config.precision == "fp8" and here < FP8_COMPUTE_CAPABILITY else config.precision
        wanted = dataclasses.replace(config, plan=more, precision=precision)
        raise EngineMismatchError(
            "compute_capabilities",
            got=", ".join(f"sm_{number}" for number in plan.compute_capabilities),
            expected=f"sm_{here}, the GPU of this machine",
            fix=rebuild_command(folder, wanted.fields()),
        )


class TensorRTRuntime:
    """Made once for all engines of a directory, which it must outlive; each of them holds it.

    Args:
        folder: The engine directory.
        manifest: Its manifest.
        device: The GPU.

    Raises:
        EngineMismatchError: The plans are of another version of TensorRT, or for other GPUs.
        BackendUnavailableError: TensorRT cannot be loaded.
        TensorRTError: Its runtime does not start.
    """

    def __init__(self, folder: Path, manifest: Manifest, device: torch.device) -> None:
        check_plans(folder, manifest, device)
        config = manifest.config
        self.device = device
        self.rebuild_command = rebuild_command(folder, config.fields())
        self.library: TensorRTLibrary = load_library(config.backend)
        self.memory = ActivationMemory(device)
        trt = self.library.trt
        if config.backend == "tensorrt" and _plan_options(manifest).plugin == "python":
            # A plan names the plugin's creator, and TensorRT looks it up while it deserializes.
            from causal_forcing.plugins.tensorrt_plugin import register_plugin

            register_plugin(trt)
        with torch.cuda.device(device):
            self.handle: Any = self.library.attempt(lambda: trt.Runtime(self.library.logger), "start its runtime")
            # What a runtime makes inherits its recorder: engines, and their contexts.
            self.library.perform(
                lambda: setattr(self.handle, "error_recorder", self.library.recorder), "record its runtime's errors"
            )
            self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._before, self._after = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def stream(self) -> Iterator[torch.cuda.Stream]:
        """Make a stream current that TensorRT can use, in order with the one that was current; the host never waits.

        The default stream cannot be captured, and TensorRT synchronises the whole device after a call on it.
        """
        current = torch.cuda.current_stream(self.device)
        if current != torch.cuda.default_stream(self.device):
            yield current
            return
        self._before.record(current)
        self._stream.wait_event(self._before)
        with torch.cuda.stream(self._stream):
            yield self._stream
        self._after.record(self._stream)
        current.wait_event(self._after)


class ActivationMemory:
    """One piece of GPU memory that every engine of a set keeps its activations in while it runs.

    That is safe because nothing in it outlives a call, and no two calls overlap: the engines of a session run one after
    another on one stream, their captured graphs too. Engines that run side by side need a `TensorRTRuntime` each.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._bytes = 1
        self._tensor: torch.Tensor | None = None

    def reserve(self, size_bytes: int) -> None:
        """Make room for an engine of that need; called when it is loaded."""
        self._bytes = max(self._bytes, size_bytes)

    def take(self) -> torch.Tensor:
        """Return the memory, [bytes] uint8; allocated when the first engine is bound, when all are loaded.

        Whoever takes it keeps it: should a larger engine be loaded later, what is here stays where it is.
        """
        if self._tensor is None or self._tensor.nbytes < self._bytes:
            self._tensor = torch.empty(self._bytes, dtype=torch.uint8, device=self._device)
        return self._tensor


def _plan_options(manifest: Manifest) -> PlanOptions:
    plan = manifest.config.plan
    assert plan is not None, f"{manifest.config.backend} makes plans, and its configuration says how"
    return plan
