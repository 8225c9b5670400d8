"""Engines of the backends `tensorrt` and `tensorrt-rtx`: plans, bound once and replayed as CUDA graphs.

Written from NVIDIA's documentation and tested with stand-ins for the library: no GPU has executed this yet.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from causal_forcing.runtime.engines.runtime_cache import RuntimeCache, runtime_cache_path
from causal_forcing.runtime.engines.tensorrt_runtime import TensorRTRuntime
from causal_forcing.runtime.errors import (
    BackendUnavailableError,
    EngineDamagedError,
    EngineMismatchError,
    TensorRTError,
)
from causal_forcing.runtime.network_spec import NetworkSpec
from causal_forcing.runtime.tensorrt_library import DTYPES, LOGGER

_DTYPE_NAMES = {name: dtype for dtype, name in DTYPES.items()}


class TensorRTEngine:
    """A plan, deserialized, with one execution context.

    Its first call runs the network as it is, which lets TensorRT finish what it does lazily. On TensorRT the second
    call captures a CUDA graph, which runs nothing, and replays it; TensorRT-RTX captures one inside its context. Either
    way every call runs the network once, so that caches updated in place are right from the first on.

    Args:
        runtime: What the engines of a directory share.
        spec: The network.
        path: Its `.plan` file.

    Raises:
        EngineMismatchError: The plan is not of this network, or TensorRT-RTX says it is of another version or GPU.
        EngineDamagedError: TensorRT cannot load the file.
        BackendUnavailableError: TensorRT-RTX says that this machine's driver or memory does not do.
        TensorRTError: No context can be made.
    """

    def __init__(self, runtime: TensorRTRuntime, spec: NetworkSpec, path: Path) -> None:
        self.spec = spec
        self._runtime = runtime
        self._library = runtime.library
        self._cache: RuntimeCache | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_warm = False
        self._bound: list[torch.Tensor] = []
        self._carries: list[tuple[torch.Tensor, torch.Tensor]] = []
        with torch.cuda.device(runtime.device):
            self._engine = self._deserialize(path)
            self._check_io_tensors()
            self._check_aliases()
            self._context = self._make_rtx_context(path) if self._library.is_rtx else self._make_context()
        runtime.memory.reserve(self._engine.device_memory_size_v2)

    def bind(self, io_tensors: Mapping[str, torch.Tensor]) -> None:
        """See `Engine.bind`.

        Raises:
            TensorRTError: TensorRT refuses an address.
        """
        # A graph holds the addresses that it was captured with.
        self._graph, self._is_warm = None, False
        for io_tensor in self.spec.io_tensors():
            address = io_tensors[io_tensor.name].data_ptr()
            self._library.attempt(
                lambda name=io_tensor.name, address=address: self._context.set_tensor_address(name, address),  # type: ignore[misc]
                f"bind io_tensor {io_tensor.name} of {self.spec.name}",
            )
        for output, source in self.spec.states:
            is_one = io_tensors[output].data_ptr() == io_tensors[source].data_ptr()
            assert is_one == self.spec.in_place, f"{output} and {source} of {self.spec.name} are one buffer: {is_one}"
        carried = () if self.spec.in_place else self.spec.states
        self._carries = [(io_tensors[source], io_tensors[output]) for output, source in carried]
        memory = self._runtime.memory.take()
        self._library.perform(
            lambda: self._context.set_device_memory(memory.data_ptr(), memory.nbytes),
            f"give {self.spec.name} its activation memory",
        )
        # TensorRT knows addresses alone: the tensors live as long as the engine.
        self._bound = [memory, *(io_tensors[io_tensor.name] for io_tensor in self.spec.io_tensors())]

    def enqueue(self) -> None:
        """See `Engine.enqueue`.

        Raises:
            TensorRTError: TensorRT does not take the call.
        """
        if self._graph is not None:
            self._graph.replay()
            return
        with self._runtime.stream() as stream:
            if self._is_warm and not self._library.is_rtx:
                self._graph = self._capture(stream)
                self._graph.replay()
                return
            self._library.check(self._execute(stream), f"run {self.spec.name}")
        if not self._is_warm:
            self._is_warm = True
            if self._cache is not None:
                self._cache.save()

    def _execute(self, stream: torch.cuda.Stream) -> bool:
        is_enqueued: bool = self._context.execute_async_v3(stream.cuda_stream)
        for state, new_state in self._carries:
            state.copy_(new_state)
        return is_enqueued

    def _capture(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        """Record a call, carried states included, without running it."""

        def record() -> torch.cuda.CUDAGraph | None:
            graph = torch.cuda.CUDAGraph()
            # Other threads go on with their own work meanwhile, such as copying frames to the host.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                is_enqueued = self._execute(stream)
            return graph if is_enqueued else None

        graph = self._library.attempt(record, f"capture {self.spec.name} in a CUDA graph")
        assert graph is not None, "attempt raises where a call returns None"
        return graph

    def _deserialize(self, path: Path) -> Any:
        """Load a plan from its file's pages: it is read once, and never a second time into memory."""

        def deserialize() -> Any:
            with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                if self._library.is_rtx:
                    self._check_validity(path, plan)
                return self._runtime.handle.deserialize_cuda_engine(plan)

        try:
            return self._library.attempt(deserialize, f"load {path}")
        except TensorRTError as error:
            raise EngineDamagedError(
                f"{error}; if the GPU has memory to spare, rebuild it: {self._runtime.rebuild_command}"
            ) from error

    def _check_validity(self, path: Path, plan: mmap.mmap) -> None:
        """Ask TensorRT-RTX about a plan before it is loaded."""
        trt = self._library.trt
        validity, diagnostics = self._runtime.handle.get_engine_validity(plan)
        if validity != trt.EngineValidity.INVALID:
            return
        members = trt.EngineInvalidityDiagnostics.__members__
        reasons = [name for name, member in members.items() if diagnostics & int(member)]
        text, fix = ", ".join(reasons), self._runtime.rebuild_command
        if "MALFORMED_ENGINE" in reasons:
            raise EngineDamagedError(f"{path} is not a plan of TensorRT-RTX ({text}); rebuild it: {fix}")
        if {"VERSION_MISMATCH", "UNSUPPORTED_CC"} & set(reasons):
            raise EngineMismatchError(path.name, got=f"invalid here ({text})", expected="a valid plan", fix=fix)
        if reasons:
            raise BackendUnavailableError(
                f"TensorRT-RTX cannot run {path} on this machine: {text}; see cf-build doctor"
            )
        # Without a reason, loading it will say more.

    def _check_io_tensors(self) -> None:
        """Compare the io_tensors that the plan has with those of the network."""
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        got = {name: self._describe(name) for name in names}
        expected = {
            io_tensor.name: f"{mode} {io_tensor.dtype} {list(io_tensor.shape)}"
            for mode, io_tensors in (("input", self.spec.inputs), ("output", self.spec.outputs))
            for io_tensor in io_tensors
        }
        for name in (*expected, *got):
            if got.get(name) != expected.get(name):
                self._refuse(f"io_tensor {name}", got.get(name, "not there"), expected.get(name, "none of that name"))

    def _describe(self, name: str) -> str:
        engine = self._engine
        dtype = engine.get_tensor_dtype(name).name
        text = f"{engine.get_tensor_mode(name).name.lower()} {_DTYPE_NAMES.get(dtype, dtype)}"
        text += f" {list(engine.get_tensor_shape(name))}"
        return text if engine.get_tensor_location(name).name == "DEVICE" else f"{text} on the host"

    def _check_aliases(self) -> None:
        """Compare the outputs that the plan says it writes into an input's buffer with the states updated in place."""
        aliases = dict(self.spec.states) if self.spec.in_place else {}
        unreported = []
        for output in self.spec.outputs:
            # Native cache updates report theirs. Whether a plugin's alias is reported is not documented; where it is
            # not, both names are bound to one buffer all the same, which is what the plugin asks for.
            got = self._engine.get_aliased_input_tensor(output.name) or None
            expected = aliases.get(output.name)
            if got is None and expected is not None and not self._library.is_rtx:
                unreported.append(output.name)
            elif got != expected:
                self._refuse(f"alias of {output.name}", got or "none", expected or "none")
        if unreported:
            LOGGER.info("%s does not report the aliases of %s", self.spec.name, ", ".join(unreported))

    def _refuse(self, field: str, got: str, expected: str) -> None:
        raise EngineMismatchError(
            f"{self.spec.name}: {field}", got=got, expected=expected, fix=self._runtime.rebuild_command
        )

    def _make_context(self) -> Any:
        strategy = self._library.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self._library.attempt(
            lambda: self._engine.create_execution_context(strategy), f"make a context of {self.spec.name}"
        )

    def _make_rtx_context(self, path: Path) -> Any:
        """Make a context that compiles its kernels for this GPU, or finds them in the cache, and captures its graph."""
        library, trt, name = self._library, self._library.trt, self.spec.name
        config = library.attempt(self._engine.create_runtime_config, f"configure {name}")
        library.perform(
            lambda: config.set_execution_context_allocation_strategy(
                trt.ExecutionContextAllocationStrategy.USER_MANAGED
            ),
            f"leave the activation memory of {name} to us",
        )
        library.perform(
            lambda: setattr(config, "cuda_graph_strategy", trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE),
            f"capture {name} in a CUDA graph",
        )
        handle = library.attempt(config.create_runtime_cache, f"make a runtime cache of {name}")
        gpu = torch.cuda.get_device_name(self._runtime.device)
        self._cache = RuntimeCache(library, handle, runtime_cache_path(path, gpu=gpu, version=trt.__version__))
        library.attempt(lambda: config.set_runtime_cache(handle), f"use a runtime cache of {name}")
        return library.attempt(lambda: self._engine.create_execution_context(config), f"make a context of {name}")
