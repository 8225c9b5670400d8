"""Quantised attention for TensorRT-RTX: Q/DQ between the cache and the native attention layer, while a file is parsed.

The file's node gets queries, keys and values that have been through Q/DQ, and its cache is in the carrier type. For the
compiler to multiply in fp8, Q/DQ must stand right before its attention layer: on the cache, where quantising again
changes nothing, and on queries that are multiplied by the op's factor already. That factor is a power of two, so that
it becomes part of the scale that the queries are dequantised with.

The nodes take the place of the op's node itself. In a function body, TensorRT-RTX 1.7 gives Q/DQ the same layer name
at every call and refuses the second: `Failed attempt to rename a layer`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from causal_forcing.plugins.contract import DOMAIN, INPUTS, ONNX_NAME, OUTPUTS
from causal_forcing.plugins.onnx_bodies import cache_writes


def lower_quantised_attention(model: onnx.ModelProto) -> int:
    """Exchange the op's nodes whose inputs are quantised for native layers with Q/DQ; changes `model`.

    The native layers stand for a linear write of the whole chunk. `valid_slots` has no reader among them, as in
    `plugins.onnx_bodies.native_function_body`.

    Returns:
        How many nodes they were.
    """
    made_by = {output: node for node in model.graph.node for output in node.output}
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in model.graph.node:
        sources = [made_by[name] for name in node.input[:3] if name in made_by]
        is_quantised = [source.op_type for source in sources] == ["DequantizeLinear"] * 3
        if (node.domain, node.op_type) != (DOMAIN, ONNX_NAME) or not is_quantised:
            nodes.append(node)
            continue
        prefix = node.name or node.output[0]
        factor = next(attribute.f for attribute in node.attribute if attribute.name == "scale")
        scale = numpy_helper.to_array(initializers[sources[0].input[1]])
        scaled = np.asarray(scale.astype(np.float32) * factor).astype(scale.dtype)
        model.graph.initializer.append(numpy_helper.from_array(scaled, f"{prefix}_q_scale"))
        names = dict(zip((*INPUTS, *OUTPUTS), (*node.input, *node.output), strict=True))
        names |= {"k_scale": sources[1].input[1], "v_scale": sources[2].input[1]}
        sources[0].input[1] = f"{prefix}_q_scale"
        nodes += [_placed(native, prefix, names) for native in _native_nodes()]
        count += 1
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return count


def _native_nodes() -> list[onnx.NodeProto]:
    nodes = [
        helper.make_node("Shape", ["q"], ["batch"], start=0, end=1),
        helper.make_node("Cast", ["slots"], ["slots_int64"], to=onnx.TensorProto.INT64),
        *cache_writes(1),
    ]
    for tensor in ("k", "v"):
        cache, scale, code = f"{tensor}_cache_out", f"{tensor}_scale", f"{tensor}_code"
        nodes += [
            helper.make_node("QuantizeLinear", [cache, scale], [code], output_dtype=onnx.TensorProto.FLOAT8E4M3FN),
            helper.make_node("DequantizeLinear", [code, scale], [f"{tensor}_rounded"]),
        ]
    attention = helper.make_node("TRT_Attention", ["q", "k_rounded", "v_rounded"], ["out"], name="attention")
    attention.domain = "trt"
    return [*nodes, attention]


def _placed(node: onnx.NodeProto, prefix: str, names: Mapping[str, str]) -> onnx.NodeProto:
    """Give a node's tensors the names they have in the graph, and the others and itself names of their own."""
    placed = onnx.NodeProto()
    placed.CopyFrom(node)
    placed.name = f"{prefix}_{node.name or node.output[0]}"
    del placed.input[:], placed.output[:]
    placed.input.extend(names.get(name, f"{prefix}_{name}") for name in node.input)
    placed.output.extend(names.get(name, f"{prefix}_{name}") for name in node.output)
    return placed
