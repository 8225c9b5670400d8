"""Plans behind the `Engine` protocol, with a stand-in for TensorRT and for CUDA: no GPU has executed any of this.

The stand-in's plans are JSON, and a run adds 1 to the first element of every state through the bound addresses alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import enum
import importlib.machinery
import json
import logging
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from causal_forcing.runtime.backends import Backend
from causal_forcing.runtime.config import PlanOptions
from causal_forcing.runtime.engine import IOTensors
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.engines import tensorrt_runtime
from causal_forcing.runtime.engines.tensorrt_engine import TensorRTEngine
from causal_forcing.runtime.errors import (
    BackendUnavailableError,
    EngineDamagedError,
    EngineMismatchError,
    TensorRTError,
)
from causal_forcing.runtime.loading import EngineSet, load_engines
from causal_forcing.runtime.manifest import Manifest, check_files, describe_files
from causal_forcing.runtime.network_spec import IOTensor, NetworkSpec
from causal_forcing.runtime.resolution import resolve_engine
from causal_forcing.runtime.tensorrt_library import DTYPES, TensorRTLibrary, load_library

VERSION = "11.4.0.106"
GPU = 89
CPU = torch.device("cpu")


def io(name: str, *shape: int, dtype: str = "float32") -> IOTensor:
    return IOTensor(name=name, shape=shape, dtype=dtype)


STEP = NetworkSpec(
    name="dit_step",
    inputs=(io("latent", 2, 3), io("slots", 2, dtype="int32"), io("cache", 4)),
    outputs=(io("flow", 2, 3, dtype="bfloat16"), io("cache_out", 4)),
    states=(("cache_out", "cache"),),
    in_place=True,
)
CONTEXT = dataclasses.replace(
    STEP, name="dit_context", inputs=(io("latent", 2, 3), io("cache", 4)), outputs=(io("cache_out", 4),)
)
DECODER = NetworkSpec(
    name="vae_decoder",
    inputs=(io("latent", 2, 3), io("carry", 7)),
    outputs=(io("pixels", 6), io("carry_out", 7)),
    states=(("carry_out", "carry"),),
)
MEMORY_BYTES = {"dit_step": 4096, "dit_context": 1024, "vae_decoder": 8192}


def plan_of(spec: NetworkSpec) -> dict[str, Any]:
    """Return what the stand-in's plan of a network holds."""
    tensors = {
        io_tensor.name: {"mode": mode, "dtype": DTYPES[io_tensor.dtype], "shape": io_tensor.shape, "location": "DEVICE"}
        for mode, io_tensors in (("INPUT", spec.inputs), ("OUTPUT", spec.outputs))
        for io_tensor in io_tensors
    }
    aliases = dict(spec.states) if spec.in_place else {}
    return {"name": spec.name, "tensors": tensors, "aliases": aliases, "memory": MEMORY_BYTES[spec.name]}


Strategy = enum.Enum("Strategy", "STATIC USER_MANAGED")
CudaGraphStrategy = enum.Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE")
Validity = enum.Enum("Validity", "VALID SUBOPTIMAL INVALID")
Diagnostics = enum.IntEnum(
    "Diagnostics", {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2, "OLD_CUDA_DRIVER": 4, "MALFORMED_ENGINE": 32}
)


class FakeTensorRT(types.ModuleType):
    """A module with as much of TensorRT as an engine calls; `failing` names the calls that fail."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="fake")
        self.__version__ = VERSION
        self.calls: list[tuple[Any, ...]] = []
        self.failing: set[str] = set()
        self.validity = ("VALID", 0)
        self.recorder: Any = None
        self.ILogger = type(
            "ILogger", (), dict(zip(("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"), range(5), strict=True))
        )
        self.IErrorRecorder = type("IErrorRecorder", (), {})
        self.Runtime = lambda logger: self.answer("runtime", result=FakeRuntime(self))
        self.ExecutionContextAllocationStrategy = Strategy
        self.CudaGraphStrategy = CudaGraphStrategy
        self.EngineValidity = Validity
        self.EngineInvalidityDiagnostics = Diagnostics

    def answer(self, call: str, *arguments: Any, result: Any = True) -> Any:
        """Note a call; a failing one gives False and tells the recorder."""
        self.calls.append((call, *arguments))
        if call in self.failing:
            self.recorder.report_error(7, f"{call}\n  went wrong")
            return False if result is True else None
        return result

    def named(self, call: str) -> list[tuple[Any, ...]]:
        return [tuple(arguments) for name, *arguments in self.calls if name == call]


class FakeRuntime:
    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt = trt

    @property
    def error_recorder(self) -> Any:
        return self.trt.recorder

    @error_recorder.setter
    def error_recorder(self, recorder: Any) -> None:
        self.trt.recorder = recorder

    def get_engine_validity(self, plan: Any) -> tuple[Any, int]:
        validity, diagnostics = self.trt.validity
        return self.trt.EngineValidity[validity], diagnostics

    def deserialize_cuda_engine(self, plan: Any) -> Any:
        return self.trt.answer("deserialize", result=FakeEngine(self.trt, json.loads(plan[:])))


class FakeEngine:
    def __init__(self, trt: FakeTensorRT, plan: dict[str, Any]) -> None:
        self.trt, self.plan, self.tensors = trt, plan, plan["tensors"]
        self.num_io_tensors, self.device_memory_size_v2 = len(self.tensors), plan["memory"]

    def get_tensor_name(self, index: int) -> str:
        return str(list(self.tensors)[index])

    def get_tensor_mode(self, name: str) -> Any:
        return types.SimpleNamespace(name=self.tensors[name]["mode"])

    def get_tensor_dtype(self, name: str) -> Any:
        return types.SimpleNamespace(name=self.tensors[name]["dtype"])

    def get_tensor_location(self, name: str) -> Any:
        return types.SimpleNamespace(name=self.tensors[name]["location"])

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        return tuple(self.tensors[name]["shape"])

    def get_aliased_input_tensor(self, name: str) -> Any:
        return self.plan["aliases"].get(name)

    def create_runtime_config(self) -> Any:
        return FakeConfig(self.trt)

    def create_execution_context(self, how: Any) -> Any:
        how = how if isinstance(how, enum.Enum) else (how.strategy, how.cuda_graph_strategy)
        return self.trt.answer("create_context", self.plan["name"], how, result=FakeContext(self))


class FakeConfig:
    """TensorRT-RTX's runtime configuration and, in one object, its runtime cache."""

    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt, self.strategy, self.cuda_graph_strategy = trt, None, None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        return self

    def set_runtime_cache(self, cache: Any) -> bool:
        return bool(self.trt.answer("set_runtime_cache"))

    def deserialize(self, content: bytes) -> bool:
        if content != b"kernels":
            self.trt.recorder.report_error(3, "corrupt blob")
        return content == b"kernels"

    def serialize(self) -> Any:
        return self.trt.answer("serialize", result=b"kernels")


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.trt, self.addresses = engine, engine.trt, dict[str, int]()

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return bool(self.trt.answer("set_tensor_address", self.engine.plan["name"], name, address))

    def set_device_memory(self, address: int, size: int) -> None:
        self.trt.answer("set_device_memory", self.engine.plan["name"], address, size)

    def execute_async_v3(self, stream: int) -> bool:
        assert set(self.addresses) == set(self.engine.tensors), "an io_tensor has no address"
        if FakeGraph.capturing is not None:
            FakeGraph.capturing.work.append(self.run)
        else:
            self.run()
        return bool(self.trt.answer("execute", self.engine.plan["name"], stream))

    def run(self) -> None:
        for output in (name for name in self.addresses if name.endswith("_out")):
            source = ctypes.c_float.from_address(self.addresses[output.removesuffix("_out")])
            ctypes.c_float.from_address(self.addresses[output]).value = source.value + 1


class FakeGraph(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A CUDA graph: what is done while it captures is kept and not done."""

    capturing: FakeGraph | None = None

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work: list[Callable[[], Any]] = []
        self.replays = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.work.append(lambda: func(*args, **(kwargs or {})))
        return args[0]

    def replay(self) -> None:
        self.replays += 1
        for work in self.work:
            work()


@dataclasses.dataclass(eq=False)
class FakeStream:
    cuda_stream: int

    def wait_event(self, event: object) -> None:
        pass


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """Stand in for CUDA; returns the graphs that are captured. The host may not wait: nothing synchronises here."""
    current = [FakeStream(0)]
    graphs: list[FakeGraph] = []

    @contextlib.contextmanager
    def use(stream: FakeStream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    @contextlib.contextmanager
    def capture(graph: FakeGraph, *, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        assert stream.cuda_stream, "the default stream cannot be captured"
        graphs.append(graph)
        FakeGraph.capturing = graph
        try:
            with use(stream), graph:
                yield
        finally:
            FakeGraph.capturing = None

    event = types.SimpleNamespace(record=lambda stream: None)
    for name, stand_in in {
        "device": lambda device: contextlib.nullcontext(),
        "Stream": lambda device: FakeStream(77),
        "Event": lambda: event,
        "current_stream": lambda device: current[-1],
        "default_stream": lambda device: current[0],
        "stream": use,
        "CUDAGraph": FakeGraph,
        "graph": capture,
        "get_device_name": lambda device: "NVIDIA GeForce RTX 4090",
        "is_available": lambda: True,
        "get_device_capability": lambda device: divmod(GPU, 10),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return graphs


def install(monkeypatch: pytest.MonkeyPatch, backend: str) -> FakeTensorRT:
    trt = FakeTensorRT(backend.replace("-", "_"))
    monkeypatch.setitem(sys.modules, trt.__name__, trt)
    # Not through its cache, which would keep the stand-in.
    library: TensorRTLibrary = load_library.__wrapped__(backend)
    monkeypatch.setattr(tensorrt_runtime, "load_library", lambda backend: library)
    monkeypatch.setattr(Backend, "artefact_version", lambda self: VERSION)
    return trt


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch, cuda: list[FakeGraph]) -> FakeTensorRT:
    return install(monkeypatch, "tensorrt")


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch, cuda: list[FakeGraph]) -> FakeTensorRT:
    return install(monkeypatch, "tensorrt-rtx")


def write_engine(
    folder: Path,
    *specs: NetworkSpec,
    backend: str = "tensorrt",
    plugin: str | None = "quick",
    change: Callable[[dict[str, Any]], object] = lambda plan: None,
) -> Manifest:
    """Write an engine directory of the stand-in's plans, each of them changed by `change`."""
    folder.mkdir(exist_ok=True)
    for spec in specs:
        plan = plan_of(spec)
        change(plan)
        (folder / f"{spec.name}.plan").write_text(json.dumps(plan))
    options = EngineOptions(slug="tiny", backend="torch", random_weights=0)
    is_rtx = backend == "tensorrt-rtx"
    config = dataclasses.replace(
        resolve_engine(options, weights="random:0", device="cpu"),
        backend=backend,
        backend_version=VERSION,
        precision="bf16",
        plan=PlanOptions(compute_capabilities=(86, 89, 120) if is_rtx else (GPU,), plugin=None if is_rtx else plugin),
    )
    manifest = Manifest(
        config=config,
        networks=specs,
        artefacts={spec.name: f"{spec.name}.plan" for spec in specs},
        files=describe_files(folder),
    )
    manifest.write(folder)
    return manifest


def load(folder: Path, *specs: NetworkSpec, **options: Any) -> tuple[EngineSet, IOTensors]:
    """Load the engines of some networks, on the CPU's memory, and bind them."""
    manifest = write_engine(folder, *specs, **options)
    loader = tensorrt_runtime.TensorRTRuntime(folder, manifest, torch.device("cuda"))
    loader.memory._device = CPU
    engines = {spec.name: TensorRTEngine(loader, spec, folder / manifest.artefacts[spec.name]) for spec in specs}
    io_tensors = IOTensors(specs, CPU)
    for engine in engines.values():
        engine.bind(io_tensors)
    return EngineSet(folder=folder, manifest=manifest, engines=engines, device=CPU), io_tensors


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_engines_of_a_directory_share_one_runtime(
    backend: str, monkeypatch: pytest.MonkeyPatch, cuda: list[FakeGraph], tmp_path: Path
) -> None:
    trt = install(monkeypatch, backend)
    write_engine(tmp_path / "engine", STEP, CONTEXT, DECODER, backend=backend)
    monkeypatch.setattr(Backend, "installed", lambda self: True)
    loaded = load_engines(tmp_path / "engine")
    assert [engine.spec for engine in loaded.engines.values()] == [STEP, CONTEXT, DECODER]
    assert len(trt.named("runtime")) == 1
    assert len(trt.named("deserialize")) == 3


@pytest.mark.parametrize(
    ("backend", "plugin", "registered"),
    [("tensorrt", "python", True), ("tensorrt", "quick", False), ("tensorrt-rtx", None, False)],
)
def test_plugin_is_registered_before_plans_that_need_it_and_for_no_others(
    backend: str, plugin: str | None, registered: bool, monkeypatch: pytest.MonkeyPatch, cuda: object, tmp_path: Path
) -> None:
    trt = install(monkeypatch, backend)
    module = types.ModuleType("causal_forcing.plugins.tensorrt_plugin")
    vars(module)["register_plugin"] = lambda given: trt.answer("register_plugin", given.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    load(tmp_path / "engine", STEP, backend=backend, plugin=plugin)
    calls = [call for call, *_ in trt.calls]
    assert trt.named("register_plugin") == ([("tensorrt",)] if registered else [])
    if registered:
        assert calls.index("register_plugin") < calls.index("deserialize")


def test_engine_is_bound_once_and_its_aliased_pair_to_one_buffer(trt: FakeTensorRT, tmp_path: Path) -> None:
    loaded, io_tensors = load(tmp_path / "engine", STEP)
    for _ in range(4):
        loaded.engines["dit_step"].enqueue()
    addresses = {name: address for _, name, address in trt.named("set_tensor_address")}
    assert len(trt.named("set_tensor_address")) == len(list(STEP.io_tensors()))
    assert addresses["cache"] == addresses["cache_out"] == io_tensors["cache"].data_ptr()
    assert addresses["flow"] == io_tensors["flow"].data_ptr()


def test_engine_states_in_place_that_are_two_buffers_are_our_bug(trt: FakeTensorRT, tmp_path: Path) -> None:
    loaded, io_tensors = load(tmp_path / "engine", STEP)
    apart = {**io_tensors, "cache_out": torch.zeros(4)}
    with pytest.raises(AssertionError, match="cache_out and cache of dit_step are one buffer: False"):
        loaded.engines["dit_step"].bind(apart)


def test_engines_of_a_set_share_activation_memory_of_the_largest_need(trt: FakeTensorRT, tmp_path: Path) -> None:
    load(tmp_path / "engine", STEP, CONTEXT, DECODER)
    given = trt.named("set_device_memory")
    assert [name for name, _, _ in given] == ["dit_step", "dit_context", "vae_decoder"]
    assert {size for _, _, size in given} == {8192}
    assert len({address for _, address, _ in given}) == 1
    strategies = {strategy for _, strategy in trt.named("create_context")}
    assert strategies == {Strategy.USER_MANAGED}


def test_activation_memory_that_was_taken_stays_when_a_larger_engine_comes() -> None:
    memory = tensorrt_runtime.ActivationMemory(CPU)
    memory.reserve(100)
    first = memory.take()
    assert memory.take() is first
    memory.reserve(200)
    assert (first.nbytes, memory.take().nbytes) == (100, 200)


def test_engine_captures_its_second_call_and_replays_from_then_on(
    trt: FakeTensorRT, cuda: list[FakeGraph], tmp_path: Path
) -> None:
    loaded, io_tensors = load(tmp_path / "engine", STEP)
    engine = loaded.engines["dit_step"]
    for call in range(1, 6):
        engine.enqueue()
        assert io_tensors["cache"][0] == call, "every call runs the network once, the captured one too"
        assert len(trt.named("execute")) == min(call, 2)
        assert [graph.replays for graph in cuda] == ([call - 1] if call > 1 else [])
    assert {stream for _, stream in trt.named("execute")} == {77}


def test_engine_carries_states_that_are_not_in_place_inside_its_graph(
    trt: FakeTensorRT, cuda: list[FakeGraph], tmp_path: Path
) -> None:
    loaded, io_tensors = load(tmp_path / "engine", DECODER)
    for call in range(1, 5):
        loaded.engines["vae_decoder"].enqueue()
        assert io_tensors["carry"][0] == io_tensors["carry_out"][0] == call
    assert len(cuda[0].work) == 2, "the network and the copy"


def test_engines_of_a_session_run_on_one_stream_in_order(trt: FakeTensorRT, tmp_path: Path) -> None:
    loaded, io_tensors = load(tmp_path / "engine", STEP, CONTEXT)
    for _ in range(3):
        for engine in loaded.engines.values():
            engine.enqueue()
    assert io_tensors["cache"][0] == 6
    assert {stream for _, stream in trt.named("execute")} == {77}


def test_engine_on_a_stream_of_the_callers_stays_there(trt: FakeTensorRT, tmp_path: Path) -> None:
    loaded, _ = load(tmp_path / "engine", STEP)
    with torch.cuda.stream(FakeStream(5)):  # type: ignore[arg-type]
        loaded.engines["dit_step"].enqueue()
    assert [stream for _, stream in trt.named("execute")] == [5]


def test_engine_that_is_bound_again_captures_anew(trt: FakeTensorRT, cuda: list[FakeGraph], tmp_path: Path) -> None:
    loaded, _ = load(tmp_path / "engine", STEP)
    engine = loaded.engines["dit_step"]
    other = IOTensors([STEP], CPU)
    for _ in range(2):
        engine.enqueue()
    engine.bind(other)
    for _ in range(3):
        engine.enqueue()
    assert other["cache"][0] == 3
    assert [graph.replays for graph in cuda] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: plan["tensors"].pop("slots"), "io_tensor slots is not there, expected input int32 [2]"),
        (
            lambda plan: plan["tensors"]["latent"].update(shape=[2, 4]),
            "io_tensor latent is input float32 [2, 4], expected input float32 [2, 3]",
        ),
        (
            lambda plan: plan["tensors"]["flow"].update(dtype="HALF"),
            "io_tensor flow is output float16 [2, 3], expected output bfloat16 [2, 3]",
        ),
        (
            lambda plan: plan["tensors"]["slots"].update(location="HOST"),
            "io_tensor slots is input int32 [2] on the host, expected input int32 [2]",
        ),
        (
            lambda plan: plan["tensors"].update(extra={**plan["tensors"]["flow"], "dtype": "UINT8"}),
            "io_tensor extra is output UINT8 [2, 3], expected none of that name",
        ),
        (lambda plan: plan["aliases"].update(cache_out="latent"), "alias of cache_out is latent, expected cache"),
        (lambda plan: plan["aliases"].update(flow="latent"), "alias of flow is latent, expected none"),
    ],
)
def test_plan_unlike_its_network_is_refused_with_the_command_that_rebuilds_it(
    trt: FakeTensorRT, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(EngineMismatchError) as caught:
        load(tmp_path / "engine", STEP, change=change)
    assert f"dit_step: {message}; rebuild it: cf-build tiny --backend tensorrt --precision bf16" in str(caught.value)


def test_alias_of_a_plugin_may_go_unreported_but_not_that_of_a_native_update(
    monkeypatch: pytest.MonkeyPatch, cuda: list[FakeGraph], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(monkeypatch, "tensorrt")
    with caplog.at_level(logging.INFO, "causal_forcing.tensorrt"):
        load(tmp_path / "plugin", STEP, change=lambda plan: plan["aliases"].clear())
    assert "dit_step does not report the aliases of cache_out" in caplog.text
    install(monkeypatch, "tensorrt-rtx")
    with pytest.raises(EngineMismatchError, match="alias of cache_out is none, expected cache"):
        load(tmp_path / "native", STEP, backend="tensorrt-rtx", change=lambda plan: plan["aliases"].clear())


@pytest.mark.parametrize(
    ("call", "error", "what"),
    [
        ("deserialize", EngineDamagedError, r"load .*dit_step\.plan"),
        ("create_context", TensorRTError, "make a context of dit_step"),
        ("set_tensor_address", TensorRTError, "bind io_tensor latent of dit_step"),
        ("set_device_memory", TensorRTError, "give dit_step its activation memory"),
    ],
)
def test_call_that_fails_at_load_says_which_and_what_the_recorder_noted(
    trt: FakeTensorRT, tmp_path: Path, call: str, error: type[Exception], what: str
) -> None:
    trt.failing.add(call)
    with pytest.raises(error, match=f"tensorrt cannot {what}: {call} went wrong") as caught:
        load(tmp_path / "engine", STEP)
    assert "\n" not in str(caught.value)


def test_call_that_fails_in_a_clip_says_which_and_what_the_recorder_noted(trt: FakeTensorRT, tmp_path: Path) -> None:
    loaded, _ = load(tmp_path / "engine", STEP)
    engine = loaded.engines["dit_step"]
    trt.failing.add("execute")
    with pytest.raises(TensorRTError, match="tensorrt cannot run dit_step: execute went wrong"):
        engine.enqueue()
    trt.failing.clear()
    engine.enqueue()
    trt.failing.add("execute")
    with pytest.raises(TensorRTError, match="tensorrt cannot capture dit_step in a CUDA graph: execute went wrong"):
        engine.enqueue()


def test_rtx_engine_captures_by_itself_and_is_called_every_time(
    rtx: FakeTensorRT, cuda: list[FakeGraph], tmp_path: Path
) -> None:
    loaded, io_tensors = load(tmp_path / "engine", STEP, backend="tensorrt-rtx")
    for _ in range(3):
        loaded.engines["dit_step"].enqueue()
    assert io_tensors["cache"][0] == 3
    assert not cuda
    how = Strategy.USER_MANAGED, CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert rtx.named("create_context") == [("dit_step", how)]


CACHE = f"dit_step.nvidia-geforce-rtx-4090.{VERSION}.runtime_cache"


def test_rtx_runtime_cache_is_kept_beside_the_plan_and_used_again(rtx: FakeTensorRT, tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    loaded, _ = load(folder, STEP, backend="tensorrt-rtx")
    assert not (folder / CACHE).exists(), "nothing is worth keeping before the first call"
    for _ in range(3):
        loaded.engines["dit_step"].enqueue()
    assert (folder / CACHE).read_bytes() == b"kernels"
    check_files(folder, loaded.manifest)
    again, _ = load(folder, STEP, backend="tensorrt-rtx")
    again.engines["dit_step"].enqueue()
    assert len(rtx.named("serialize")) == 1, "what came from the file is not written again"
    assert len(rtx.named("set_runtime_cache")) == 2


def test_rtx_runtime_cache_that_is_damaged_is_ignored_with_a_warning_and_replaced(
    rtx: FakeTensorRT, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / CACHE).write_bytes(b"cut off")
    loaded, _ = load(folder, STEP, backend="tensorrt-rtx")
    (record,) = caplog.records
    assert (record.levelname, record.getMessage().partition(":")[0]) == ("WARNING", "compiling again")
    assert "corrupt blob" in record.getMessage()
    loaded.engines["dit_step"].enqueue()
    assert (folder / CACHE).read_bytes() == b"kernels"
    rtx.failing.add("execute")
    with pytest.raises(TensorRTError) as caught:
        loaded.engines["dit_step"].enqueue()
    assert "corrupt blob" not in str(caught.value), "what is over is not blamed for what comes later"


@pytest.mark.parametrize("obstacle", ["a folder that cannot be written", "another process writes", "no serializing"])
def test_rtx_runtime_cache_that_cannot_be_kept_is_no_error(
    rtx: FakeTensorRT, tmp_path: Path, obstacle: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "engine"
    loaded, io_tensors = load(folder, STEP, backend="tensorrt-rtx")
    if obstacle == "no serializing":
        rtx.failing.add("serialize")
    elif obstacle == "a folder that cannot be written":

        def refuse(self: Path, content: bytes) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "write_bytes", refuse)
    lock = filelock.FileLock(folder / f".{CACHE}.lock")
    with caplog.at_level(logging.INFO), lock if obstacle == "another process writes" else contextlib.nullcontext():
        loaded.engines["dit_step"].enqueue()
    assert io_tensors["cache"][0] == 1
    assert "compiled kernels are not kept" in caplog.text
    assert [path.name for path in folder.iterdir() if "runtime_cache" in path.name and path.suffix != ".lock"] == []


@pytest.mark.parametrize(
    ("reason", "error"),
    [
        ("VERSION_MISMATCH", EngineMismatchError),
        ("UNSUPPORTED_CC", EngineMismatchError),
        ("MALFORMED_ENGINE", EngineDamagedError),
        ("OLD_CUDA_DRIVER", BackendUnavailableError),
    ],
)
def test_rtx_plan_that_is_invalid_here_is_refused_before_it_is_loaded(
    rtx: FakeTensorRT, tmp_path: Path, reason: str, error: type[Exception]
) -> None:
    rtx.validity = ("INVALID", int(Diagnostics[reason]))
    with pytest.raises(error, match=f"{reason}.*cf-build"):
        load(tmp_path / "engine", STEP, backend="tensorrt-rtx")
    assert not rtx.named("deserialize")
