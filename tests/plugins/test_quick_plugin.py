"""The quick plugin through TensorRT's own decorators and templates, up to the PTX that a plan would carry."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from causal_forcing.plugins.contract import DOMAIN, INPUTS, ONNX_NAME, OUTPUTS, PLUGIN_VERSION
from causal_forcing.plugins.kernels.tiles import PLAIN_SHARED_BYTES

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_bindings") is None, reason="needs tensorrt-cu13-bindings"
)

SCALE = 0.25
CHUNK, CACHE = (2, 3, 96, 64), (2, 3, 192, 64)
SHAPES = [CHUNK, CHUNK, CHUNK, CACHE, CACHE, (3,), (2,), CHUNK, CACHE, CACHE]


class Constants:
    """An expression builder that knows constants alone, as themselves."""

    def constant(self, value: int) -> int:
        return value


@pytest.fixture
def trt(tensorrt_standin: ModuleType) -> Any:
    return tensorrt_standin


@pytest.fixture
def quick_plugin(trt: Any) -> Any:
    module = importlib.import_module("causal_forcing.plugins.quick_plugin")
    module.register_quick_plugin(trt)
    return module


@pytest.fixture
def creator(trt: Any, quick_plugin: Any) -> Any:
    return trt.get_plugin_registry().get_creator(ONNX_NAME, PLUGIN_VERSION, DOMAIN)


@pytest.fixture
def plugin(trt: Any, creator: Any) -> Any:
    """The plugin as TensorRT's parser has it made: from the node's attribute, ahead of time."""
    field = trt.PluginField("scale", np.array([SCALE], dtype=np.float32), trt.PluginFieldType.FLOAT32)
    fields = trt.PluginFieldCollection([field])
    request = trt.QuickPluginCreationRequest.PREFER_AOT
    return creator.create_plugin(ONNX_NAME, DOMAIN, fields, trt.TensorRTPhase.BUILD, request)


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Compile for an H100, whatever GPU is at hand."""
    from triton.backends.compiler import GPUTarget

    from causal_forcing.plugins.kernels import ahead_of_time

    compile_ahead_of_time = ahead_of_time.compile_ahead_of_time
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        ahead_of_time,
        "compile_ahead_of_time",
        lambda **geometry: compile_ahead_of_time(**geometry, target=GPUTarget("cuda", 90, 32)),
    )


def types_of(trt: Any, floating: str) -> list[Any]:
    kinds = {True: trt.DataType.INT32, False: getattr(trt.DataType, floating)}
    return [kinds[name in ("slots", "valid_slots")] for name in (*INPUTS, *OUTPUTS)]


def described(trt: Any, types: list[Any], shapes: list[tuple[int, ...]]) -> list[Any]:
    descriptions = []
    for kind, shape in zip(types, shapes, strict=True):
        description = trt.DynamicPluginTensorDesc()
        description.desc.type = kind
        description.desc.format = trt.TensorFormat.LINEAR
        description.desc.dims = trt.Dims(shape)
        descriptions.append(description)
    return descriptions


def built(trt: Any, plugin: Any, floating: str, shapes: list[tuple[int, ...]] = SHAPES) -> tuple[Any, Any, Any]:
    """Drive the plugin as the builder does; returns its launch, its extra arguments, and its kernel."""
    types = types_of(trt, floating)
    in_out = described(trt, types, shapes)
    plugin.get_output_data_types(types[:7], [len(shape) for shape in shapes[:7]])
    plugin.get_output_shapes([[None] * len(shape) for shape in shapes[:7]], [], Constants())
    plugin.get_supported_format_combinations(in_out, 7)
    plugin.configure_plugin(in_out[:7], in_out[7:])
    plugin.set_tactic(0)
    launched, extra = SimpleNamespace(), SimpleNamespace()
    plugin.get_launch_params(None, in_out, 7, launched, extra, Constants())
    descriptions = [description.desc for description in in_out]
    return launched, extra, plugin.get_kernel(descriptions[:7], descriptions[7:])


def test_creator_is_registered_under_the_names_that_the_exported_node_asks_for(creator: Any) -> None:
    assert (creator.name, creator.plugin_namespace, creator.plugin_version) == (ONNX_NAME, DOMAIN, PLUGIN_VERSION)
    assert [field.name for field in creator.field_names] == ["scale"]


def test_plugin_made_of_the_nodes_attribute_has_its_scale_and_is_ahead_of_time(plugin: Any) -> None:
    assert plugin.attrs == {"scale": SCALE}
    assert type(plugin).__name__ == "_TemplateAOTPlugin"


def test_outputs_have_the_types_of_queries_and_caches_which_are_aliased(trt: Any, plugin: Any) -> None:
    types = types_of(trt, "BF16")
    types[3:5] = [trt.DataType.HALF, trt.DataType.FLOAT]
    outputs = plugin.get_output_data_types(types[:7], [4, 4, 4, 4, 4, 1, 1])
    assert outputs == [trt.DataType.BF16, trt.DataType.HALF, trt.DataType.FLOAT]
    aliases = {OUTPUTS[output]: plugin.get_aliased_input(output) for output in range(len(OUTPUTS))}
    assert aliases == {"out": -1, "k_cache_out": INPUTS.index("k_cache"), "v_cache_out": INPUTS.index("v_cache")}


@pytest.mark.parametrize("floating", ["BF16", "HALF", "FLOAT"])
def test_formats_are_the_networks_own_types_and_linear(floating: str, trt: Any, plugin: Any) -> None:
    types = types_of(trt, floating)
    plugin.get_output_data_types(types[:7], [4, 4, 4, 4, 4, 1, 1])
    plugin.get_output_shapes([[None] * len(shape) for shape in SHAPES[:7]], [], Constants())
    formats = plugin.get_supported_format_combinations(described(trt, types, SHAPES), 7)
    assert [(one.type, one.format) for one in formats] == [(kind, trt.TensorFormat.LINEAR) for kind in types]


@pytest.mark.usefixtures("h100")
@pytest.mark.parametrize("floating", ["BF16", "HALF", "FLOAT"])
def test_plan_gets_ptx_and_a_launch_without_extra_arguments(floating: str, trt: Any, plugin: Any) -> None:
    launched, extra, (name, code) = built(trt, plugin, floating)
    numbers = {axis: expression.expr for axis, expression in vars(launched).items()}
    queries = 32 if floating == "FLOAT" else 64
    assert (numbers["grid_x"], numbers["grid_y"], numbers["grid_z"]) == (-(-96 // queries), 3, 2)
    assert (numbers["block_x"], numbers["block_y"], numbers["block_z"]) == (128, 1, 1)
    assert 0 < numbers["shared_mem"] <= PLAIN_SHARED_BYTES
    assert extra.nbSymExprs == 0
    assert f".visible .entry {name}(".encode() in code
    assert code.count(b".param .u64") == len(INPUTS) + len(OUTPUTS)


@pytest.mark.usefixtures("h100")
def test_dynamic_shapes_are_refused(trt: Any, plugin: Any) -> None:
    shapes = [(-1, *shape[1:]) if len(shape) == 4 else shape for shape in SHAPES]
    with pytest.raises(ValueError, match="dynamic shape, expected static ones"):
        built(trt, plugin, "BF16", shapes)


def test_register_quick_plugin_twice_registers_once(trt: Any, quick_plugin: Any, creator: Any) -> None:
    quick_plugin.register_quick_plugin(trt)
    assert trt.get_plugin_registry().get_creator(ONNX_NAME, PLUGIN_VERSION, DOMAIN) is creator


def test_register_plugin_beside_the_quick_one_is_refused(trt: Any, quick_plugin: Any) -> None:
    tensorrt_plugin = importlib.import_module("causal_forcing.plugins.tensorrt_plugin")
    with pytest.raises(RuntimeError, match=r"already \(quick\), expected none before IPluginV3 is registered"):
        tensorrt_plugin.register_plugin(trt)


def test_register_quick_plugin_beside_the_other_is_refused(trt: Any) -> None:
    importlib.import_module("causal_forcing.plugins.tensorrt_plugin").register_plugin(trt)
    quick_plugin = importlib.import_module("causal_forcing.plugins.quick_plugin")
    with pytest.raises(RuntimeError, match=r"already \(IPluginV3\), expected none before quick is registered"):
        quick_plugin.register_quick_plugin(trt)


def test_register_quick_plugin_for_rtx_is_refused(trt: Any) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    quick_plugin = importlib.import_module("causal_forcing.plugins.quick_plugin")
    with pytest.raises(RuntimeError, match=r"^tensorrt_rtx runs no plugins"):
        quick_plugin.register_quick_plugin(rtx)
    assert trt.get_plugin_registry().get_creator(ONNX_NAME, PLUGIN_VERSION, DOMAIN) is None
