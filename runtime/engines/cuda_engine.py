"""Engines of the `cuda` backend: tapes played on real tensors, captured once in a CUDA graph, then replayed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel

from causal_forcing.plugins.fused_op import register_fused_ops
from causal_forcing.runtime.engine import CHANNELS_LAST
from causal_forcing.runtime.errors import EngineDamagedError
from causal_forcing.runtime.network_spec import NetworkSpec
from causal_forcing.runtime.tape import Call, Weight, read_tape

_ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
"""For cross-attention, in the order of what measured faster."""


class DeviceWeights:
    """The weights of an engine directory, mapped straight to a device; networks share what their tapes share.

    Args:
        folder: The engine directory.
        device: Where the weights go.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.device = device
        self.pools: dict[str, Any] = {}
        """Memory pools of captured graphs: those of one kind never run at the same time."""
        self._loaded: weakref.WeakValueDictionary[tuple[str, Weight], torch.Tensor] = weakref.WeakValueDictionary()

    def load(self, file: str, wanted: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
        """Return tensors of a weight file.

        Args:
            file: Its name in the engine directory.
            wanted: Name to constant.

        Raises:
            EngineDamagedError: The file is not readable, or lacks a key.
        """
        tensors: dict[str, torch.Tensor] = {}
        try:
            with safe_open(self.folder / file, framework="pt", device=str(self.device)) as opened:
                for name, weight in wanted.items():
                    tensor = self._loaded.get((file, weight))
                    if tensor is None:
                        tensor = opened.get_tensor(weight.key)
                        if weight.channels_last:
                            tensor = tensor.contiguous(memory_format=CHANNELS_LAST[tensor.dim()])
                        self._loaded[file, weight] = tensor
                    tensors[name] = tensor
        except torch.OutOfMemoryError:  # says itself what is missing, and no rebuilding would help
            raise
        except Exception as error:  # safetensors' own exception has no public base class
            raise EngineDamagedError(
                f"{self.folder / file} cannot be loaded ({error}); rebuild the engine with cf-build"
            ) from error
        return tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A call with everything resolved but its tensors."""

    operator: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    results: tuple[str | None, ...]
    released: tuple[str, ...]


class CudaEngine:
    """A tape, ready to play.

    Args:
        weights: Of the engine directory.
        spec: The network.
        path: Its tape.

    Raises:
        EngineDamagedError: The tape or its weights are not readable.
    """

    def __init__(self, weights: DeviceWeights, spec: NetworkSpec, path: Path) -> None:
        self.spec = spec
        register_fused_ops()
        tape = read_tape(path)
        self._shared = weights
        self._device = weights.device
        self._captured = tape.captured and weights.device.type == "cuda"
        self._weights = weights.load(tape.weight_file, tape.weights)
        self._input_names = tape.inputs
        self._outputs = self._constant(tape.outputs)
        self._steps = [
            self._resolve(call, released) for call, released in zip(tape.calls, tape.last_reads(), strict=True)
        ]
        self._tensors: dict[str, torch.Tensor] = {}
        self._targets: list[torch.Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None

    def bind(self, io_tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Engine.bind`. Captures the graph: what the buffers hold is overwritten."""
        inputs = [io_tensors[io_tensor.name] for io_tensor in self.spec.inputs]
        self._tensors = {**self._weights, **dict(zip(self._input_names, inputs, strict=True))}
        states = dict(self.spec.states)
        self._targets = [io_tensors[states.get(output.name, output.name)] for output in self.spec.outputs]
        self._graph = None
        if self._captured:
            self._capture()

    def enqueue(self) -> None:
        """See `Engine.enqueue`."""
        if self._graph is None:
            self._play()
        else:
            self._graph.replay()

    def _capture(self) -> None:
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            # cuDNN chooses by its rules and not by timing, which may differ between processes, and a clip's bits then.
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=False):
                self._play()  # loads kernels
                stream.synchronize()
                torch.cuda.empty_cache()  # the graph has a pool of its own: what the call worked in would stay taken
                kind = self.spec.name.partition("_")[0]
                graph = torch.cuda.CUDAGraph()
                # The mode is for NCCL, whose watchdog thread asks for events of its own meanwhile.
                with torch.cuda.graph(
                    graph, pool=self._shared.pools.get(kind), stream=stream, capture_error_mode="thread_local"
                ):
                    self._play()
            self._shared.pools.setdefault(kind, graph.pool())
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._graph = graph

    @torch.inference_mode()
    def _play(self) -> None:
        tensors = dict(self._tensors)
        with sdpa_kernel(_ATTENTION, set_priority=True):
            for step in self._steps:
                keywords = {name: _fill(value, tensors) for name, value in step.keywords.items()}
                outcome = step.operator(*_fill(step.arguments, tensors), **keywords)
                parts = (outcome,) if torch.is_tensor(outcome) else outcome
                # Trailing parts that nobody reads have no name.
                for name, part in zip(step.results, parts or (), strict=False):
                    if name is not None:
                        tensors[name] = part
                for name in step.released:
                    tensors.pop(name, None)
        for target, output in zip(self._targets, _fill(self._outputs, tensors), strict=True):
            if output is not target:
                target.copy_(output)

    def _resolve(self, call: Call, released: tuple[str, ...]) -> _Step:
        namespace, name, overload = call.operator.split(".")
        return _Step(
            operator=getattr(getattr(getattr(torch.ops, namespace), name), overload),
            arguments=self._constant(call.arguments),
            keywords={name: self._constant(value) for name, value in call.keywords.items()},
            results=call.results,
            released=released,
        )

    def _constant(self, value: Any) -> Any:
        """Return a value of a tape with everything but tensors resolved; these become `_Name`."""
        if isinstance(value, list | tuple):
            return tuple(self._constant(part) for part in value)
        if not isinstance(value, dict):
            return value
        ((kind, name),) = value.items()
        if kind == "tensor":
            return _Name(name)
        return self._device if kind == "device" else getattr(torch, name)


@dataclass(frozen=True, slots=True)
class _Name:
    """Stands for a tensor until a step runs."""

    name: str


def _fill(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, _Name):
        return tensors[value.name]
    if isinstance(value, tuple):
        return tuple(_fill(part, tensors) for part in value)
    return value
