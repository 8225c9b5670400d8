"""What must hold of a parsed network before a plan is made of it.

A parser that leaves something out says so in a warning at best, and the plan computes something else. So everything the
graph was exported for is looked up in the network that came of it, and a build in which anything is missing fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx

from causal_forcing.build_engines.plans.job import COMPUTE_DTYPES, HEAVY_LAYERS, PlanJob
from causal_forcing.build_engines.plans.lowering import (
    LENGTH_TENSOR,
    cache_attentions,
    count_cache_attention,
    layers,
)
from causal_forcing.runtime.errors import PlanError
from causal_forcing.runtime.network_spec import IOTensor
from causal_forcing.runtime.tensorrt_library import DTYPES, TensorRTLibrary

_FLOATS = ("FLOAT", "BF16", "HALF", "FP8", "INT8", "FP4", "INT4", "UINT8", "E8M0")


def check_network(library: TensorRTLibrary, network: Any, model: onnx.ModelProto, job: PlanJob) -> None:
    """Check that a network is what its graph was exported for.

    Args:
        library: The flavour of TensorRT.
        network: The parsed and lowered network.
        model: The graph that was parsed.
        job: What was asked for.

    Raises:
        PlanError: Something is missing or other than asked; the message names it all.
    """
    faults = [
        *_io_tensor_faults(network, job),
        *_dropped_input_faults(network, job),
        *_alias_faults(library, network, job),
        *_attention_faults(library, network, model),
        *_precision_faults(network, job),
        *_quantiser_faults(network, model),
    ]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise PlanError(
            f"the plan of {job.spec.name} would not compute what was exported: {'; '.join(faults[:3])}{more}"
        )


def _io_tensor_faults(network: Any, job: PlanJob) -> Iterator[str]:
    got = {tensor.name: _describe(tensor) for tensor in (*_inputs(network), *_outputs(network))}
    for io_tensor in job.spec.io_tensors():
        wanted = _describe_spec(io_tensor)
        if got.get(io_tensor.name) != wanted:
            yield f"io_tensor {io_tensor.name} is {got.get(io_tensor.name, 'not there')}, expected {wanted}"


def _dropped_input_faults(network: Any, job: PlanJob) -> Iterator[str]:
    """Find inputs that no output depends on."""
    made_by = {layer.get_output(i).name: layer for layer in layers(network) for i in range(layer.num_outputs)}
    reached: set[str] = set()
    waiting = [tensor.name for tensor in _outputs(network)]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            if name in made_by:
                waiting += [tensor.name for tensor in _layer_inputs(made_by[name])]
    for io_tensor in job.spec.inputs:
        # A context pass ends with the last layer's cache write, which needs no length.
        if io_tensor.name not in reached:
            yield f"input {io_tensor.name} was dropped: no output depends on it"


def _alias_faults(library: TensorRTLibrary, network: Any, job: PlanJob) -> Iterator[str]:
    if not job.spec.in_place:
        return
    made_by = {layer.get_output(i).name: (layer, i) for layer in layers(network) for i in range(layer.num_outputs)}
    writer = "KV_CACHE_UPDATE" if library.is_rtx else "PLUGIN_V3"
    # The plugin's caches are its outputs 1 and 2 and its inputs 3 and 4; a native update is of one cache.
    offset = 0 if library.is_rtx else 2
    for output, cache in job.spec.states:
        layer, index = made_by.get(output, (None, 0))
        if layer is None or layer.type.name != writer:
            found = "nothing" if layer is None else f"a layer of type {layer.type.name}"
            yield f"cache {cache} is not updated in place: {output} comes from {found}, expected {writer}"
        elif layer.get_input(index + offset).name != cache:
            yield f"output {output} does not alias {cache} but {layer.get_input(index + offset).name}"


def _attention_faults(library: TensorRTLibrary, network: Any, model: onnx.ModelProto) -> Iterator[str]:
    expected = count_cache_attention(model)
    if not library.is_rtx:
        plugins = sum(layer.type.name == "PLUGIN_V3" for layer in layers(network))
        if plugins != expected:
            yield f"{plugins} attention layers are our plugin, expected {expected}"
        return
    attentions = cache_attentions(library, network)
    if len(attentions) != expected:
        yield f"{len(attentions)} attention layers read a cache, expected {expected}"
    for attention in attentions:
        length = attention.key_value_lengths
        if length is None or length.name != LENGTH_TENSOR:
            got = "none" if length is None else length.name
            yield f"attention layer {attention.name} has key length {got}, expected {LENGTH_TENSOR}"
        if attention.mask is not None:
            yield f"attention layer {attention.name} has a mask beside its key length"


def _precision_faults(network: Any, job: PlanJob) -> Iterator[str]:
    compute = DTYPES[COMPUTE_DTYPES[job.precision]]
    allowed = {compute, "FLOAT", *(["FP8"] if job.precision == "fp8" else [])}
    for layer in layers(network):
        kind = layer.type.name
        outputs = [layer.get_output(index) for index in range(layer.num_outputs)]
        got = {tensor.dtype.name for tensor in (*_layer_inputs(layer), *outputs)} & set(_FLOATS)
        wrong = got - ({compute} if kind in HEAVY_LAYERS else allowed)
        if wrong:
            yield f"layer {layer.name} ({kind}) is in {', '.join(sorted(wrong))}, expected {compute} ({job.precision})"


def _quantiser_faults(network: Any, model: onnx.ModelProto) -> Iterator[str]:
    for kind, operator in (("QUANTIZE", "QuantizeLinear"), ("DEQUANTIZE", "DequantizeLinear")):
        bodies = {body.name: sum(node.op_type == operator for node in body.node) for body in model.functions}
        expected = sum((node.op_type == operator) + bodies.get(node.op_type, 0) for node in model.graph.node)
        got = sum(layer.type.name == kind for layer in layers(network))
        if got != expected:
            yield f"the graph has {expected} {operator} nodes, the network {got} {kind} layers"


def _inputs(network: Any) -> Iterator[Any]:
    for index in range(network.num_inputs):
        yield network.get_input(index)


def _outputs(network: Any) -> Iterator[Any]:
    for index in range(network.num_outputs):
        yield network.get_output(index)


def _layer_inputs(layer: Any) -> Iterator[Any]:
    for index in range(layer.num_inputs):
        tensor = layer.get_input(index)
        if tensor is not None:  # an optional input that is not given
            yield tensor


def _describe(tensor: Any) -> str:
    return f"{tensor.dtype.name} {list(tensor.shape)}"


def _describe_spec(io_tensor: IOTensor) -> str:
    return f"{DTYPES[io_tensor.dtype]} {list(io_tensor.shape)}"
