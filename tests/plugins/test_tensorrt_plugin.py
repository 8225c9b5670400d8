"""The IPluginV3 through the classes and the registry of TensorRT's bindings: all but the kernel and the builder."""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from causal_forcing.plugins.contract import DOMAIN, INPUTS, ONNX_NAME, OUTPUTS, PLUGIN_VERSION

pytest.importorskip("triton")

STUBS = Path(__file__).parents[2] / ".typing" / "tensorrt" / "__init__.pyi"
SCALE = 0.25
CHUNK, CACHE = (1, 2, 6, 32), (1, 2, 24, 32)
SHAPES = [CHUNK, CHUNK, CHUNK, CACHE, CACHE, (3,), (1,), CHUNK, CACHE, CACHE]


@pytest.fixture
def trt(tensorrt_standin: ModuleType) -> Any:
    return tensorrt_standin


@pytest.fixture
def tensorrt_plugin(trt: Any) -> Any:
    return importlib.import_module("causal_forcing.plugins.tensorrt_plugin")


@pytest.fixture
def creator(trt: Any, tensorrt_plugin: Any) -> Any:
    return tensorrt_plugin.plugin_creator(trt)


@pytest.fixture
def plugin(trt: Any, creator: Any) -> Any:
    return creator.create_plugin("layer 7", scale_fields(trt, SCALE), trt.TensorRTPhase.BUILD)


def scale_fields(trt: Any, scale: float) -> Any:
    """Fields as TensorRT's parser makes them of the node's attribute."""
    field = trt.PluginField("scale", np.array([scale], dtype=np.float32), trt.PluginFieldType.FLOAT32)
    return trt.PluginFieldCollection([field])


def described(trt: Any, *, types: Sequence[Any], formats: Sequence[Any] | None = None) -> list[Any]:
    """Describe all inputs and outputs, as the builder does."""
    descriptions = []
    for index, (kind, shape) in enumerate(zip(types, SHAPES, strict=True)):
        description = trt.DynamicPluginTensorDesc()
        description.desc.type = kind
        description.desc.format = formats[index] if formats else trt.TensorFormat.LINEAR
        description.desc.dims = trt.Dims(shape)
        descriptions.append(description)
    return descriptions


def types_of(trt: Any, floating: Any) -> list[Any]:
    return [trt.DataType.INT32 if name in ("slots", "valid_slots") else floating for name in (*INPUTS, *OUTPUTS)]


def registered(trt: Any) -> Any:
    return trt.get_plugin_registry().get_creator(ONNX_NAME, PLUGIN_VERSION, DOMAIN)


def test_creator_has_the_names_that_the_exported_node_asks_for(trt: Any, creator: Any) -> None:
    assert (creator.name, creator.plugin_version, creator.plugin_namespace) == (ONNX_NAME, PLUGIN_VERSION, DOMAIN)
    assert [(field.name, field.type) for field in creator.field_names] == [("scale", trt.PluginFieldType.FLOAT32)]


def test_plugin_has_the_names_of_its_creator(plugin: Any) -> None:
    assert (plugin.plugin_name, plugin.plugin_version, plugin.plugin_namespace) == (ONNX_NAME, PLUGIN_VERSION, DOMAIN)
    assert plugin.num_outputs == len(OUTPUTS)
    assert plugin.get_capability_interface(None) is plugin


@pytest.mark.parametrize("phase", ["BUILD", "RUNTIME"])
def test_plugin_made_from_its_serialised_fields_is_the_same(phase: str, trt: Any, creator: Any, plugin: Any) -> None:
    restored = creator.create_plugin("again", plugin.get_fields_to_serialize(), getattr(trt.TensorRTPhase, phase))
    assert restored.scale == SCALE
    assert restored.timing_cache_id == plugin.timing_cache_id
    (field,) = restored.get_fields_to_serialize()
    assert (field.name, field.type, field.data.tolist()) == ("scale", trt.PluginFieldType.FLOAT32, [SCALE])


def test_serialised_field_outlives_the_call_that_made_it(plugin: Any) -> None:
    """The field points to the number; it does not hold it."""
    fields = [plugin.get_fields_to_serialize() for _ in range(100)]
    gc.collect()
    assert all(collection[0].data[0] == SCALE for collection in fields)


def test_creator_without_a_scale_is_refused(trt: Any, creator: Any) -> None:
    with pytest.raises(ValueError, match="has the fields none, expected scale"):
        creator.create_plugin("layer 7", trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_creator_with_a_scale_that_the_kernel_cannot_take_is_refused(scale: float, trt: Any, creator: Any) -> None:
    with pytest.raises(ValueError, match="expected a factor above 0"):
        creator.create_plugin("layer 7", scale_fields(trt, scale), trt.TensorRTPhase.BUILD)


@pytest.mark.parametrize("copy", ["clone", "attach_to_context"])
def test_clone_is_another_plugin_that_does_the_same(copy: str, plugin: Any) -> None:
    cloned = plugin.clone() if copy == "clone" else plugin.attach_to_context(None)
    assert cloned is not plugin
    assert type(cloned) is type(plugin)
    for name in ("scale", "timing_cache_id", "num_outputs", "plugin_name", "plugin_version", "plugin_namespace"):
        assert getattr(cloned, name) == getattr(plugin, name), name


def test_timings_of_plugins_with_different_scales_are_kept_apart(trt: Any, creator: Any, plugin: Any) -> None:
    other = creator.create_plugin("layer 8", scale_fields(trt, 0.5), trt.TensorRTPhase.BUILD)
    assert other.timing_cache_id not in ("", plugin.timing_cache_id)


def test_outputs_have_the_types_of_queries_and_caches(trt: Any, plugin: Any) -> None:
    distinct = [trt.DataType.BF16, *[trt.DataType.INT32] * 2, trt.DataType.HALF, trt.DataType.FLOAT]
    types = plugin.get_output_data_types([*distinct, trt.DataType.INT32, trt.DataType.INT32])
    assert types == [trt.DataType.BF16, trt.DataType.HALF, trt.DataType.FLOAT]


def test_outputs_have_the_shapes_of_queries_and_caches(trt: Any, plugin: Any) -> None:
    """Expressions cannot be made without a builder, so each input is told by its number of dimensions."""
    inputs = [trt.DimsExprs(rank) for rank in range(1, 8)]
    shapes = plugin.get_output_shapes(inputs, [], None)
    assert [len(shape) for shape in shapes] == [1, 4, 5]
    assert all(isinstance(shape, trt.DimsExprs) for shape in shapes)


def test_caches_share_the_memory_of_their_inputs(plugin: Any) -> None:
    names = {OUTPUTS[output]: plugin.get_aliased_input(output) for output in range(len(OUTPUTS))}
    assert names == {"out": -1, "k_cache_out": INPUTS.index("k_cache"), "v_cache_out": INPUTS.index("v_cache")}


@pytest.mark.parametrize("floating", ["BF16", "HALF", "FLOAT"])
def test_formats_of_one_floating_type_are_taken(floating: str, trt: Any, plugin: Any) -> None:
    in_out = described(trt, types=types_of(trt, getattr(trt.DataType, floating)))
    assert all(plugin.supports_format_combination(pos, in_out, len(INPUTS)) for pos in range(len(in_out)))


@pytest.mark.parametrize("floating", ["FP8", "INT8", "INT32", "INT64", "BOOL"])
def test_formats_of_another_type_are_refused(floating: str, trt: Any, plugin: Any) -> None:
    in_out = described(trt, types=types_of(trt, getattr(trt.DataType, floating)))
    taken = [plugin.supports_format_combination(pos, in_out, len(INPUTS)) for pos in range(len(in_out))]
    assert taken == [False] * 5 + [True] * 2 + [False] * 3


@pytest.mark.parametrize("pos", range(len(SHAPES)))
def test_format_of_one_tensor_that_differs_is_refused(pos: int, trt: Any, plugin: Any) -> None:
    types = types_of(trt, trt.DataType.BF16)
    others = [trt.DataType.FLOAT if index == pos else kind for index, kind in enumerate(types)]
    if pos != 0:  # the others follow queries
        assert not plugin.supports_format_combination(pos, described(trt, types=others), len(INPUTS))
    formats = [trt.TensorFormat.CHW32 if index == pos else trt.TensorFormat.LINEAR for index in range(len(SHAPES))]
    assert not plugin.supports_format_combination(pos, described(trt, types=types, formats=formats), len(INPUTS))


def test_plugin_wants_no_workspace_and_offers_no_tactics(plugin: Any) -> None:
    assert plugin.get_workspace_size([], []) == 0
    assert plugin.get_valid_tactics() == []
    assert plugin.set_tactic(0) is None
    assert plugin.configure_plugin([], []) is None
    assert plugin.on_shape_change([], []) is None


ADDRESSES = [1000, 2000, 3000, 4000, 5000, 6000, 7000, 8000, 4000, 5000]


@pytest.fixture
def launches(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What enqueue launches: the arguments, and the stream that was current."""
    module = sys.modules[type(plugin).__module__]
    recorded: list[dict[str, Any]] = []
    current: list[int] = []

    @contextlib.contextmanager
    def use(stream: int) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def launch(*tensors: Any, **options: Any) -> None:
        recorded.append({"tensors": tensors, "stream": current[-1], **options})

    cuda = SimpleNamespace(stream=use, ExternalStream=lambda stream: stream, current_device=lambda: 3)
    # Whatever else of torch.cuda enqueue called would not be there.
    monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=cuda, int32=torch.int32))
    monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(module, "shared_bytes_of", lambda device: {3: 232448}[device])
    return recorded


def test_enqueue_launches_once_on_the_given_stream_over_the_given_addresses(
    trt: Any, plugin: Any, launches: list[dict[str, Any]]
) -> None:
    descriptions = [description.desc for description in described(trt, types=types_of(trt, trt.DataType.BF16))]
    plugin.enqueue(descriptions[:7], descriptions[7:], ADDRESSES[:7], ADDRESSES[7:], 0, 77)
    (launched,) = launches
    assert (launched["stream"], launched["scale"], launched["shared_bytes"]) == (77, SCALE, 232448)
    tensors = launched["tensors"]
    assert [tensor.data_ptr() for tensor in tensors] == ADDRESSES[:8]
    assert [tensor.shape for tensor in tensors] == SHAPES[:8]
    assert [tensor.dtype for tensor in tensors] == [torch.bfloat16] * 5 + [torch.int32] * 2 + [torch.bfloat16]
    assert tensors[3].stride() == (2 * 24 * 32, 24 * 32, 32, 1)


@pytest.mark.parametrize("output", [1, 2])
def test_enqueue_with_a_cache_that_was_not_aliased_is_refused(
    output: int, trt: Any, plugin: Any, launches: list[dict[str, Any]]
) -> None:
    """The kernel writes a chunk's slots alone; the rest of such an output would be chance."""
    descriptions = [description.desc for description in described(trt, types=types_of(trt, trt.DataType.BF16))]
    outputs = [9000 if index == output else address for index, address in enumerate(ADDRESSES[7:])]
    with pytest.raises(RuntimeError, match=f"{OUTPUTS[output]} memory of its own.*ALIASED_PLUGIN_IO_10_03"):
        plugin.enqueue(descriptions[:7], descriptions[7:], ADDRESSES[:7], outputs, 0, 77)
    assert not launches


def test_register_plugin_puts_its_creator_into_the_registry(trt: Any, tensorrt_plugin: Any) -> None:
    assert registered(trt) is None
    tensorrt_plugin.register_plugin(trt)
    creator = registered(trt)
    assert type(creator).__name__ == "KVCacheAttentionCreator"
    made = creator.create_plugin("layer 7", scale_fields(trt, SCALE), trt.TensorRTPhase.RUNTIME)
    assert made.scale == SCALE


def test_register_plugin_twice_registers_once(trt: Any, tensorrt_plugin: Any) -> None:
    tensorrt_plugin.register_plugin(trt)
    creator = registered(trt)
    tensorrt_plugin.register_plugin(trt)
    assert registered(trt) is creator
    assert [known.name for known in trt.get_plugin_registry().all_creators].count(ONNX_NAME) == 1


def test_registered_creator_is_kept_alive(trt: Any, tensorrt_plugin: Any) -> None:
    tensorrt_plugin.register_plugin(trt)
    alive = weakref.ref(registered(trt))
    gc.collect()
    assert alive() is not None


def test_register_plugin_for_rtx_is_refused_before_anything_is_made(tensorrt_plugin: Any, trt: Any) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    for function in (tensorrt_plugin.register_plugin, tensorrt_plugin.plugin_creator):
        with pytest.raises(RuntimeError, match=r"^tensorrt_rtx runs no plugins"):
            function(rtx)
    assert registered(trt) is None
    assert "causal_forcing.plugins.v3_plugin" not in sys.modules


def test_register_plugin_beside_a_foreign_one_is_refused(trt: Any, tensorrt_plugin: Any, creator: Any) -> None:
    trt.get_plugin_registry().register_creator(creator, DOMAIN)
    with pytest.raises(RuntimeError, match="has a plugin causal_forcing::KVCacheAttention already"):
        tensorrt_plugin.register_plugin(trt)


def test_type_stubs_name_nothing_that_the_bindings_lack(trt: Any) -> None:
    checked = 0
    for statement in ast.parse(STUBS.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.FunctionDef) and statement.name != "__getattr__":
            assert hasattr(trt, statement.name), statement.name
        if not isinstance(statement, ast.ClassDef):
            continue
        described_class = getattr(trt, statement.name)
        for member in statement.body:
            name = getattr(member, "name", None) or getattr(getattr(member, "target", None), "id", None)
            if name is not None and not name.startswith("__"):
                assert hasattr(described_class, name), f"{statement.name}.{name}"
                checked += 1
    assert checked > 40
