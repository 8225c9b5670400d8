"""The op alone in an ONNX model, for ONNX Runtime; and a stand-in for TensorRT."""

from __future__ import annotations

import enum
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

from causal_forcing.plugins.contract import DOMAIN, INPUTS, ONNX_NAME, OUTPUTS, PLUGIN_VERSION
from causal_forcing.plugins.onnx_bodies import OPSET, function_body

OneNodeModel = Callable[..., onnx.ModelProto]

_CHUNK, _CACHE = ("B", "N", "L", "D"), ("B", "N", "S", "D")
_AXES: dict[str, tuple[str, ...]] = {
    "q": _CHUNK, "k": _CHUNK, "v": _CHUNK, "k_cache": _CACHE, "v_cache": _CACHE, "slots": ("F",), "valid_slots": ("B",),
    "out": _CHUNK, "k_cache_out": _CACHE, "v_cache_out": _CACHE,
}  # fmt: skip


def make_one_node_model(*, writes: int, scale: float, sizes: dict[str, int] | None = None) -> onnx.ModelProto:
    """Build a model of one KVCacheAttention node; axes that `sizes` leaves out stay symbolic."""

    def value(name: str) -> onnx.ValueInfoProto:
        kind = onnx.TensorProto.INT32 if name in ("slots", "valid_slots") else onnx.TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, [(sizes or {}).get(axis, axis) for axis in _AXES[name]])

    node = helper.make_node(
        ONNX_NAME,
        INPUTS,
        OUTPUTS,
        domain=DOMAIN,
        scale=scale,
        plugin_namespace=DOMAIN,
        plugin_version=PLUGIN_VERSION,
    )
    graph = helper.make_graph([node], "one_node", [value(name) for name in INPUTS], [value(name) for name in OUTPUTS])
    return helper.make_model(
        graph,
        functions=[function_body(writes=writes)],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=11,
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors of a few numbers are no work to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def one_node_model() -> OneNodeModel:
    return make_one_node_model


@pytest.fixture(scope="session")
def onnx_session() -> Callable[..., onnxruntime.InferenceSession]:
    """ONNX Runtime sessions of the symbolic model, one for each number of writes and each scale."""

    @functools.cache
    def session(*, writes: int, scale: float) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        content = make_one_node_model(writes=writes, scale=scale).SerializeToString()
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    return session


@pytest.fixture
def tensorrt_standin(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """TensorRT-RTX's bindings under the name `tensorrt`: the same classes and registry, where libnvinfer is not.

    `tensorrt.plugin` is that of TensorRT's own bindings, which is plain Python; of what it needs, the RTX bindings lack
    three names. Plugin modules are imported anew and what they register is taken back.
    """
    rtx = pytest.importorskip("tensorrt_rtx")
    bindings = importlib.util.find_spec("tensorrt_bindings")
    tensorrt = ModuleType("tensorrt")
    tensorrt.__dict__.update({name: value for name, value in vars(rtx).items() if not name.startswith("__")})
    tensorrt.__dict__["__path__"] = list(bindings.submodule_search_locations or []) if bindings else []
    QuickPluginCreationRequest = enum.Enum("QuickPluginCreationRequest", "STRICT_AOT STRICT_JIT PREFER_AOT PREFER_JIT")
    tensorrt.__dict__["QuickPluginCreationRequest"] = QuickPluginCreationRequest
    for name in ("ISymExpr", "IPluginV3QuickAOTBuild"):
        tensorrt.__dict__[name] = type(name, (), {})
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    _forget_plugins()
    yield tensorrt
    registry = tensorrt.get_plugin_registry()
    creator = registry.get_creator(ONNX_NAME, PLUGIN_VERSION, DOMAIN)
    if creator is not None:
        registry.deregister_creator(creator)
    _forget_plugins()


def _forget_plugins() -> None:
    for name in list(sys.modules):
        if name.startswith("tensorrt.") or (name.startswith("causal_forcing.plugins.") and name.endswith("_plugin")):
            del sys.modules[name]
