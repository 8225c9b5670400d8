"""What only full TensorRT goes through, against stand-ins: flags, configuration, timing cache, the plugin's checks."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from causal_forcing.build_engines.plans import compiler
from causal_forcing.build_engines.plans.checks import check_network
from causal_forcing.build_engines.plans.compiler import (
    _configure,
    _load_timing_cache,
    _network_flags,
    _save_timing_cache,
)
from causal_forcing.build_engines.plans.job import PlanJob
from causal_forcing.plugins.contract import DOMAIN, ONNX_NAME
from causal_forcing.runtime.config import PlanOptions
from causal_forcing.runtime.errors import PlanError
from causal_forcing.runtime.network_spec import IOTensor, NetworkSpec
from causal_forcing.runtime.tensorrt_library import TensorRTLibrary, load_library

MakeJob = Callable[..., PlanJob]


class Flag(IntEnum):
    STRONGLY_TYPED = 1
    PREFER_AOT_PYTHON_PLUGINS = 4


class Config:
    """Records what a builder configuration is told."""

    builder_optimization_level: int
    profiling_verbosity: str

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.cache = b"earlier"

    def set_memory_pool_limit(self, pool: str, size_bytes: int) -> None:
        self.calls.append((pool, size_bytes))

    def set_preview_feature(self, feature: str, is_on: bool) -> None:
        self.calls.append((feature, is_on))

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> None:
        self.calls.append(("timing cache", cache, ignore_mismatch))

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: self.cache)


def tensorrt(version: str = "11.4.0.106") -> TensorRTLibrary:
    module = SimpleNamespace(
        __name__="tensorrt",
        __version__=version,
        NetworkDefinitionCreationFlag=Flag,
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        PreviewFeature=SimpleNamespace(ALIASED_PLUGIN_IO_10_03="aliases"),
    )
    return TensorRTLibrary(backend="tensorrt", trt=module, logger=None, recorder=SimpleNamespace(text=lambda: ""))


@pytest.fixture
def job(make_plan_job: MakeJob, tmp_path: Path) -> PlanJob:
    options = PlanOptions(compute_capabilities=(90,), optimization_level=4, workspace_mib=512, plugin="python")
    return dataclasses.replace(
        make_plan_job(), backend="tensorrt", options=options, timing_cache=tmp_path / "caches" / "t.cache"
    )


@pytest.mark.parametrize(
    ("version", "plugin", "flags"),
    [("10.16.1.11", "python", 2), ("10.16.1.11", "quick", 2 + 16), ("11.4.0", "python", 0), ("11.4.0", "quick", 16)],
)
def test_networks_are_strongly_typed_in_every_version(version: str, plugin: str, flags: int, job: PlanJob) -> None:
    job = dataclasses.replace(job, options=dataclasses.replace(job.options, plugin=plugin))
    assert _network_flags(tensorrt(version), job) == flags


def test_configuration_has_level_memory_layer_information_and_aliases(job: PlanJob) -> None:
    config = Config()
    configured = _configure(tensorrt(), SimpleNamespace(create_builder_config=lambda: config), job)
    assert configured is config
    assert (configured.builder_optimization_level, configured.profiling_verbosity) == (4, "detailed")
    assert config.calls == [("workspace", 512 << 20), ("aliases", True)]


def test_timing_cache_is_given_to_the_builder_and_kept_for_the_next(job: PlanJob) -> None:
    config = Config()
    path = _load_timing_cache(config, job)
    assert path is not None
    _save_timing_cache(config, path)
    assert _load_timing_cache(config, job) == path
    assert config.calls == [("timing cache", b"", False), ("timing cache", b"earlier", False)]
    assert sorted(file.name for file in path.parent.iterdir() if file.suffix != ".lock") == ["t.cache"]


def test_rtx_has_no_timing_cache_and_gets_its_targets(make_plan_job: MakeJob) -> None:
    library = load_library("tensorrt-rtx")
    job = make_plan_job()
    builder = library.trt.Builder(library.logger)
    config = _configure(library, builder, job)
    assert _load_timing_cache(config, job) is None
    assert [str(config.get_compute_capability(index)) for index in range(config.num_compute_capabilities)] == [
        "ComputeCapability.SM89",
        "ComputeCapability.SM120",
    ]
    assert config.builder_optimization_level == 3


@pytest.mark.parametrize("kind", ["python", "quick"])
def test_the_plugin_that_was_asked_for_is_registered(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[tuple[str, object]] = []
    # By name: tests of the plugins import these modules anew.
    plugins = "causal_forcing.plugins"
    for name, module, function in (
        ("python", "tensorrt_plugin", "register_plugin"),
        ("quick", "quick_plugin", "register_quick_plugin"),
    ):
        note = functools.partial(lambda name, trt: registered.append((name, trt)), name)
        monkeypatch.setattr(importlib.import_module(f"{plugins}.{module}"), function, note)
    trt = tensorrt().trt
    compiler._register_plugin(trt, kind)
    assert registered == [(kind, trt)]


class Network:
    """A parsed network of one plugin layer, as full TensorRT would have it."""

    def __init__(self, spec: NetworkSpec, *, kind: str = "PLUGIN_V3", swapped: bool = False) -> None:
        self._inputs = [self._tensor(io_tensor) for io_tensor in spec.inputs]
        self._outputs = [self._tensor(io_tensor) for io_tensor in spec.outputs]
        order = [0, 1, 2, 4, 3, 5, 6] if swapped else range(7)
        inputs = [self._inputs[index] for index in order]
        layer = SimpleNamespace(
            name="attention",
            type=SimpleNamespace(name=kind),
            num_inputs=7,
            num_outputs=3,
            get_input=lambda index: inputs[index],
            get_output=lambda index: self._outputs[index],
        )
        self._layers = [layer]
        self.num_inputs, self.num_outputs, self.num_layers = 7, 3, 1

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]

    def get_layer(self, index: int) -> Any:
        return self._layers[index]

    @staticmethod
    def _tensor(io_tensor: IOTensor) -> Any:
        names = {"bfloat16": "BF16", "int32": "INT32"}
        return SimpleNamespace(
            name=io_tensor.name, dtype=SimpleNamespace(name=names[io_tensor.dtype]), shape=io_tensor.shape
        )


@pytest.fixture
def one_plugin(job: PlanJob) -> tuple[PlanJob, onnx.ModelProto]:
    """The job and the graph of a network that is nothing but the op."""
    chunk, cache = (1, 2, 6, 32), (1, 2, 12, 32)
    inputs = [IOTensor(name=name, shape=chunk, dtype="bfloat16") for name in "qkv"]
    inputs += [IOTensor(name=name, shape=cache, dtype="bfloat16") for name in ("k_cache", "v_cache")]
    inputs += [
        IOTensor(name="slots", shape=(1,), dtype="int32"),
        IOTensor(name="valid_slots", shape=(1,), dtype="int32"),
    ]
    outputs = [IOTensor(name="out", shape=chunk, dtype="bfloat16")]
    outputs += [IOTensor(name=f"{name}_out", shape=cache, dtype="bfloat16") for name in ("k_cache", "v_cache")]
    states = (("k_cache_out", "k_cache"), ("v_cache_out", "v_cache"))
    spec = NetworkSpec(name="one", inputs=tuple(inputs), outputs=tuple(outputs), states=states, in_place=True)
    model = onnx.ModelProto()
    model.graph.node.append(onnx.helper.make_node(ONNX_NAME, [], [], domain=DOMAIN))
    return dataclasses.replace(job, spec=spec), model


def test_network_whose_op_became_the_plugin_passes(one_plugin: tuple[PlanJob, onnx.ModelProto]) -> None:
    job, model = one_plugin
    check_network(tensorrt(), Network(job.spec), model, job)


def test_network_whose_op_was_inlined_is_refused(one_plugin: tuple[PlanJob, onnx.ModelProto]) -> None:
    """As it would be if the plugin's creator were not found."""
    job, model = one_plugin
    with pytest.raises(PlanError, match=r"k_cache is not updated in place.*SCATTER.*0 attention layers are our plugin"):
        check_network(tensorrt(), Network(job.spec, kind="SCATTER"), model, job)


def test_plugin_whose_caches_are_exchanged_is_refused(one_plugin: tuple[PlanJob, onnx.ModelProto]) -> None:
    job, model = one_plugin
    with pytest.raises(PlanError, match="output k_cache_out does not alias k_cache but v_cache"):
        check_network(tensorrt(), Network(job.spec, swapped=True), model, job)
