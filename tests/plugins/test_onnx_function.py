"""The op in ONNX: what the node says, what the body is made of, and that ONNX Runtime may work in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import pytest
import torch

from causal_forcing.plugins import reference
from causal_forcing.plugins.contract import DOMAIN, INPUTS, ONNX_NAME, OUTPUTS, PLUGIN_VERSION
from causal_forcing.plugins.onnx_bodies import OPSET, function_body
from causal_forcing.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from causal_forcing.runtime.network_spec import IOTensor, NetworkSpec

OneNodeModel = Callable[..., onnx.ModelProto]

SIZES = {"B": 2, "N": 2, "L": 6, "D": 8, "S": 15, "F": 3}
SCALE = 0.4
SLOTS = {1: [4, 6, 8], 3: [12, 0, 6]}
"""First slots of three frames of two tokens: consecutive for a single write, around a ring's end for three."""


def op_spec() -> NetworkSpec:
    """Describe the one-node model as an engine of a session."""
    b, n, length, d, s, f = (SIZES[axis] for axis in "BNLDSF")
    shapes: dict[str, tuple[int, ...]] = {name: (b, n, length, d) for name in ("q", "k", "v", "out")}
    shapes |= {name: (b, n, s, d) for name in ("k_cache", "v_cache", "k_cache_out", "v_cache_out")}
    shapes |= {"slots": (f,), "valid_slots": (b,)}

    def io_tensor(name: str) -> IOTensor:
        return IOTensor(name=name, shape=shapes[name], dtype="int32" if "slots" in name else "float32")

    return NetworkSpec(
        name="op",
        inputs=tuple(map(io_tensor, INPUTS)),
        outputs=tuple(map(io_tensor, OUTPUTS)),
        states=(("k_cache_out", "k_cache"), ("v_cache_out", "v_cache")),
        in_place=True,
    )


def make_buffers(slots: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    buffers = {io.name: torch.randn(io.shape, generator=generator) for io in op_spec().io_tensors()}
    buffers["slots"] = torch.tensor(slots, dtype=torch.int32)
    buffers["valid_slots"] = torch.tensor([14, 15], dtype=torch.int32)
    return buffers


def share_caches(buffers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**buffers, "k_cache_out": buffers["k_cache"], "v_cache_out": buffers["v_cache"]}


def referred(buffers: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what the reference makes of copies of the buffers."""
    tensors = {name: tensor.clone() for name, tensor in buffers.items()}
    q, k, v, k_cache, v_cache, slots, valid_slots = (tensors[name] for name in INPUTS)
    tensors["out"] = reference.kv_cache_attention(q, k, v, k_cache, v_cache, slots, valid_slots, SCALE)
    return tensors


@pytest.mark.parametrize("writes", [1, 2, 3, 4])
@pytest.mark.parametrize("static", [False, True], ids=["symbolic", "static"])
def test_one_node_model_passes_the_checker(writes: int, static: bool, one_node_model: OneNodeModel) -> None:
    sizes = {**SIZES, "F": writes, "L": 2 * writes} if static else None
    onnx.checker.check_model(one_node_model(writes=writes, scale=SCALE, sizes=sizes), full_check=True)


@pytest.mark.parametrize("writes", [1, 3])
def test_function_body_keeps_the_contracts_names_and_opset(writes: int) -> None:
    function = function_body(writes=writes)
    assert (function.domain, function.name) == (DOMAIN, ONNX_NAME)
    assert tuple(function.input) == INPUTS
    assert tuple(function.output) == OUTPUTS
    assert list(function.attribute) == ["scale"]
    assert [(opset.domain, opset.version) for opset in function.opset_import] == [("", OPSET)]


@pytest.mark.parametrize("writes", [1, 3])
def test_function_body_writes_each_cache_linearly_and_as_often_as_asked(writes: int) -> None:
    scatters = [node for node in function_body(writes=writes).node if node.op_type == "TensorScatter"]
    assert len(scatters) == 2 * writes
    for node in scatters:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes == {"axis": -2, "mode": b"linear"}


def test_function_body_with_one_write_has_each_cache_read_by_its_write_alone() -> None:
    """TensorRT-RTX updates a cache natively only where the write is its single consumer."""
    nodes = function_body(writes=1).node
    for cache in ("k_cache", "v_cache"):
        readers = [node.op_type for node in nodes if cache in node.input and node.op_type != "Shape"]
        assert readers == ["TensorScatter"]


def test_function_body_masks_by_valid_slots_and_not_by_nonpad_kv_seqlen() -> None:
    """TensorRT-RTX drops Attention-24's own length input without a word."""
    (attention,) = [node for node in function_body(writes=1).node if node.op_type == "Attention"]
    assert list(attention.input) == ["q", "k_cache_out", "v_cache_out", "mask"]
    needed = {"mask"}
    for node in reversed(function_body(writes=1).node):
        if needed & set(node.output):
            needed |= set(node.input)
    assert "valid_slots" in needed


def test_onnx_name_is_no_name_of_a_standard_operator() -> None:
    """TensorRT's parser ignores domains, so the bare name must be ours alone."""
    assert ONNX_NAME not in {schema.name for schema in onnx.defs.get_all_schemas()}
    assert "." not in DOMAIN


@pytest.mark.parametrize("network", ["dit_step", "dit_context"])
def test_exported_dit_graph_carries_the_node_and_the_function(network: str, tiny_engine: Path) -> None:
    model = onnx.load(tiny_engine / f"{network}.onnx")
    assert {opset.domain: opset.version for opset in model.opset_import}[""] == 24
    ours = [node for node in model.graph.node if node.op_type == ONNX_NAME]
    assert len(ours) == 2, "a node for each layer of tiny"
    for node in ours:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert node.domain == DOMAIN
        assert attributes["plugin_namespace"] == DOMAIN.encode()
        assert attributes["plugin_version"] == PLUGIN_VERSION.encode()
        assert attributes["scale"] == pytest.approx(32**-0.5)
        assert len(node.input) == len(INPUTS)
        assert len(node.output) == len(OUTPUTS)
    keys = [(function.domain, function.name) for function in model.functions]
    assert keys.count((DOMAIN, ONNX_NAME)) == 1
    assert [name for _, name in keys].count(ONNX_NAME) == 1
    inner = {opset.domain: opset.version for f in model.functions if f.name == ONNX_NAME for opset in f.opset_import}
    assert inner == {"": 24}


def test_exported_graph_without_the_op_carries_no_function(tiny_engine: Path) -> None:
    model = onnx.load(tiny_engine / "prompt_kv.onnx")
    assert not [function for function in model.functions if function.name == ONNX_NAME]


@pytest.mark.parametrize("writes", [1, 3])
def test_onnxruntime_with_a_cache_bound_to_both_ends_updates_it_in_place(
    writes: int, one_node_model: OneNodeModel, tmp_path: Path
) -> None:
    path = tmp_path / "op.onnx"
    onnx.save(one_node_model(writes=writes, scale=SCALE, sizes=SIZES), path)
    buffers = share_caches(make_buffers(SLOTS[writes]))
    engine = OnnxRuntimeEngine(op_spec(), path)
    engine.bind(buffers)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for name in ("q", "k", "v"):
            buffers[name].normal_(generator=generator)
        want = referred(buffers)
        addresses = {name: tensor.data_ptr() for name, tensor in buffers.items()}
        engine.enqueue()
        torch.testing.assert_close(buffers["out"], want["out"], atol=2e-6, rtol=2e-6)
        assert torch.equal(buffers["k_cache"], want["k_cache"])
        assert torch.equal(buffers["v_cache"], want["v_cache"])
        assert {name: tensor.data_ptr() for name, tensor in buffers.items()} == addresses
        buffers["slots"].copy_(buffers["slots"].roll(1) if writes == 3 else buffers["slots"] - 2)


@pytest.mark.parametrize("writes", [1, 3])
def test_onnxruntime_with_caches_bound_apart_leaves_the_inputs_alone(
    writes: int, one_node_model: OneNodeModel, tmp_path: Path
) -> None:
    path = tmp_path / "op.onnx"
    onnx.save(one_node_model(writes=writes, scale=SCALE, sizes=SIZES), path)
    buffers = make_buffers(SLOTS[writes])
    before, want = {name: tensor.clone() for name, tensor in buffers.items()}, referred(buffers)
    engine = OnnxRuntimeEngine(op_spec(), path)
    engine.bind(buffers)
    engine.enqueue()
    torch.testing.assert_close(buffers["out"], want["out"], atol=2e-6, rtol=2e-6)
    for name in INPUTS:
        assert torch.equal(buffers[name], before[name]), name
    assert torch.equal(buffers["k_cache_out"], want["k_cache"])
    assert torch.equal(buffers["v_cache_out"], want["v_cache"])
