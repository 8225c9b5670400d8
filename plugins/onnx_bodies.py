"""The bodies of the KVCacheAttention function that ONNX models carry: no framework but onnx is imported.

`function_body` is what every exported file holds, of standard operators, so that any runtime of ONNX opset 24 runs the
file without us. Two facts shaped it, both tried with TensorRT-RTX 1.7: `Attention`-24's `nonpad_kv_seqlen` input is
dropped without a word, so the valid length enters as a boolean mask; and `TensorScatter` becomes a native in-place
update only where it is the cache's single, linear write, so a chunk whose frames land in consecutive slots is written
at once, and only one whose frames wrap around the ring is written frame by frame. `native_function_body` takes its
place while TensorRT-RTX parses the file.
"""

from __future__ import annotations

import onnx
from onnx import helper

from causal_forcing.plugins.contract import DOMAIN, INPUTS, ONNX_NAME, OUTPUTS

OPSET = 24
"""First ONNX opset with TensorScatter."""


def function_body(*, writes: int) -> onnx.FunctionProto:
    """Build the op's body of standard operators.

    Args:
        writes: Cache writes a chunk takes: 1 where its frames always land in consecutive slots, else its number of
            frames.

    Returns:
        A function `causal_forcing.KVCacheAttention` of opset 24.
    """
    nodes = [
        helper.make_node("Shape", ["q"], ["batch"], name="batch", start=0, end=1),
        helper.make_node("Shape", ["q"], ["tokens"], name="tokens", start=2, end=3),
        helper.make_node("Shape", ["k_cache"], ["cache_slots"], name="cache_slots", start=2, end=3),
        helper.make_node("Cast", ["slots"], ["slots_int64"], name="slots_int64", to=onnx.TensorProto.INT64),
        *_constants(),
        *cache_writes(writes),
        *_valid_mask(),
    ]
    attention = helper.make_node("Attention", ["q", "k_cache_out", "v_cache_out", "mask"], ["out"], name="attention")
    attention.attribute.append(helper.make_attribute_ref("scale", onnx.AttributeProto.FLOAT))
    return _function([*nodes, attention])


def native_function_body() -> onnx.FunctionProto:
    """Build the body that TensorRT's parser turns into its native cache update and attention layers, and nothing else.

    It stands for a linear write of the whole chunk. `valid_slots` has no reader in it: no position of the attention
    operator's length input is the same in the document and in the parser, so the compiler attaches the length to the
    attention layer itself (`build_engines.plans.lowering`). The scale goes to q in fp32, before one rounding: the
    parser's own way is its square root on q and on the whole cache.
    """
    scale = helper.make_node("Constant", [], ["scale"], name="scale")
    scale.attribute.append(helper.make_attribute_ref("scale", onnx.AttributeProto.FLOAT))
    scale.attribute[0].name = "value_float"
    nodes = [
        helper.make_node("Shape", ["q"], ["batch"], name="batch", start=0, end=1),
        helper.make_node("Cast", ["slots"], ["slots_int64"], name="slots_int64", to=onnx.TensorProto.INT64),
        *cache_writes(1),
        scale,
        helper.make_node("Cast", ["q"], ["q_fp32"], name="q_fp32", to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", ["q_fp32", "scale"], ["q_scaled_fp32"], name="q_scaled_fp32"),
        helper.make_node("CastLike", ["q_scaled_fp32", "q"], ["q_scaled"], name="q_scaled"),
        helper.make_node(
            "TRT_Attention", ["q_scaled", "k_cache_out", "v_cache_out"], ["out"], name="attention", domain="trt"
        ),
    ]
    return _function(nodes, helper.make_opsetid("trt", 1))


def _function(nodes: list[onnx.NodeProto], *opsets: onnx.OperatorSetIdProto) -> onnx.FunctionProto:
    opset = helper.make_opsetid("", OPSET)
    return helper.make_function(DOMAIN, ONNX_NAME, INPUTS, OUTPUTS, nodes, [opset, *opsets], ["scale"])


def _constants() -> list[onnx.NodeProto]:
    scalars = {"zero": 0, "one": 1}
    vectors = {"axis_0": [0], "axes_123": [1, 2, 3], "one_long": [1]}
    return [
        *(helper.make_node("Constant", [], [name], value_int=value) for name, value in scalars.items()),
        *(helper.make_node("Constant", [], [name], value_ints=value) for name, value in vectors.items()),
    ]


def cache_writes(writes: int) -> list[onnx.NodeProto]:
    """Write k and v: `writes` equal runs of tokens, each to the slot of its first frame."""
    nodes: list[onnx.NodeProto] = []
    for index in range(writes):
        nodes += [
            helper.make_node("Constant", [], [f"start_{index}"], value_ints=[index]),
            helper.make_node("Constant", [], [f"stop_{index}"], value_ints=[index + 1]),
            helper.make_node(
                "Slice", ["slots_int64", f"start_{index}", f"stop_{index}"], [f"slot_{index}"], name=f"slot_{index}"
            ),
            helper.make_node("Expand", [f"slot_{index}", "batch"], [f"write_index_{index}"], name=f"write_{index}"),
        ]
    for tensor in ("k", "v"):
        parts = [tensor] if writes == 1 else [f"{tensor}_{index}" for index in range(writes)]
        if writes > 1:
            nodes.append(helper.make_node("Split", [tensor], parts, name=f"split_{tensor}", axis=2, num_outputs=writes))
        cache = f"{tensor}_cache"
        for index, part in enumerate(parts):
            written = f"{tensor}_cache_out" if index == writes - 1 else f"{tensor}_cache_{index}"
            nodes.append(
                helper.make_node(
                    "TensorScatter",
                    [cache, part, f"write_index_{index}"],
                    [written],
                    name=f"update_{tensor}_{index}",
                    axis=-2,
                    mode="linear",
                )
            )
            cache = written
    return nodes


def _valid_mask() -> list[onnx.NodeProto]:
    """Build the mask [B, 1, L, S]: slot < valid_slots."""
    return [
        helper.make_node("Squeeze", ["cache_slots", "axis_0"], ["slot_count"], name="slot_count"),
        helper.make_node("Range", ["zero", "slot_count", "one"], ["positions_int64"], name="positions_int64"),
        helper.make_node("Cast", ["positions_int64"], ["positions"], name="positions", to=onnx.TensorProto.INT32),
        helper.make_node("Unsqueeze", ["valid_slots", "axes_123"], ["valid_4d"], name="valid_4d"),
        helper.make_node("Less", ["positions", "valid_4d"], ["valid"], name="valid"),
        helper.make_node("Concat", ["batch", "one_long", "tokens", "cache_slots"], ["mask_shape"], axis=0),
        helper.make_node("Expand", ["valid", "mask_shape"], ["mask"], name="mask"),
    ]
