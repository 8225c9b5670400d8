"""An exported graph to a TensorRT network: with the op as our plugin, or lowered to TensorRT's own layers.

TensorRT-RTX has no plugins. There the function body that every file carries is exchanged, in memory, for one that its
parser turns into a native cache update and a native attention layer; and what no ONNX operator can say in a way that
every version of the parser reads, the number of valid slots, is attached to the attention layers afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
from onnx import helper

from causal_forcing.build_engines.plans.job import PlanJob
from causal_forcing.build_engines.quantization.native_attention import lower_quantised_attention
from causal_forcing.plugins.contract import DOMAIN, ONNX_NAME
from causal_forcing.plugins.onnx_bodies import native_function_body
from causal_forcing.runtime.errors import PlanError
from causal_forcing.runtime.tensorrt_library import TensorRTLibrary

LENGTH_TENSOR = "valid_slots"
"""Network input that holds the number of slots attended to."""


def parse(library: TensorRTLibrary, network: Any, job: PlanJob) -> tuple[onnx.ModelProto, Any]:
    """Fill a TensorRT network from the job's file.

    Returns:
        The graph as it was parsed, its large weights not loaded; and the parser, whose memory the network's weights lie
        in: it must outlive the build.

    Raises:
        PlanError: The parser refuses it.
    """
    model = onnx.load(job.onnx, load_external_data=False)
    if library.is_rtx:
        _exchange_body(model)
    parser = library.trt.OnnxParser(network, library.logger)
    if not parser.parse(model.SerializeToString(), str(job.onnx)):
        reasons = "; ".join(" ".join(error.desc().split()) for error in _parser_errors(parser))
        raise PlanError(f"{library.trt.__name__} cannot parse {job.spec.name}: {reasons or library.recorder.text()}")
    if library.is_rtx:
        attach_lengths(library, network)
    return model, parser


def count_cache_attention(model: onnx.ModelProto) -> int:
    """Return how many KVCacheAttention nodes a graph holds, those that have been lowered included."""
    nodes = [(node.domain, node.op_type) for node in model.graph.node]
    return nodes.count((DOMAIN, ONNX_NAME)) + nodes.count(("trt", "TRT_Attention"))


def attach_lengths(library: TensorRTLibrary, network: Any) -> None:
    """Tell every attention layer that reads a cache how many of its slots are valid, by the device's own count."""
    inputs = {network.get_input(index).name: network.get_input(index) for index in range(network.num_inputs)}
    for attention in cache_attentions(library, network):
        attention.key_value_lengths = inputs[LENGTH_TENSOR]


def cache_attentions(library: TensorRTLibrary, network: Any) -> list[Any]:
    """Return the attention layers whose keys are a cache that this network writes."""
    kinds = library.trt.LayerType
    caches = {layer.get_output(0).name for layer in layers(network) if layer.type == kinds.KV_CACHE_UPDATE}
    found = []
    for layer in layers(network):
        if layer.type == kinds.ATTENTION_INPUT:
            # The bindings hand out the base class; this is how they give the attention that a boundary layer is of.
            layer.__class__ = library.trt.IAttentionInputLayer
            if caches & upstream_names(network, layer.attention.get_input(1).name, through=_TRANSPARENT):
                found.append(layer.attention)
    return found


_TRANSPARENT = ("QUANTIZE", "DEQUANTIZE", "CAST", "SHUFFLE")
"""Layers that a cache may pass on its way to attention."""


def upstream_names(network: Any, name: str, *, through: tuple[str, ...]) -> set[str]:
    """Return a tensor's name and those that it comes from by layers of the given types alone, first inputs only."""
    made_by = {layer.get_output(0).name: layer for layer in layers(network) if layer.num_outputs}
    names = {name}
    while (layer := made_by.get(name)) is not None and layer.type.name in through:
        name = layer.get_input(0).name
        names.add(name)
    return names


def layers(network: Any) -> Iterator[Any]:
    """Yield the layers of a network, in order."""
    for index in range(network.num_layers):
        yield network.get_layer(index)


def _exchange_body(model: onnx.ModelProto) -> None:
    lower_quantised_attention(model)
    for function in model.functions:
        if (function.domain, function.name) == (DOMAIN, ONNX_NAME):
            function.CopyFrom(native_function_body())
            model.opset_import.append(helper.make_opsetid("trt", 1))


def _parser_errors(parser: Any) -> Iterator[Any]:
    for index in range(parser.num_errors):
        yield parser.get_error(index)
