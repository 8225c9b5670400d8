"""What is known about a plan's layers, saved beside it for `cf-build inspect`."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from causal_forcing.build_engines.plans.job import PlanJob
from causal_forcing.build_engines.plans.lowering import layers
from causal_forcing.runtime.tensorrt_library import TensorRTLibrary


def describe_network(network: Any, job: PlanJob, *, plan_bytes: int) -> dict[str, Any]:
    """Describe the network that the builder is given, as plain JSON values.

    Returns:
        `layers`: name, type, element types in and out, output shapes and ONNX origin of each layer but constants;
        `precisions`: number of layers by type and element type; `aliases`: outputs that share their input's memory;
        `memory`: bytes of io_tensors, of caches among them, and of the plan.
    """
    described = [_describe_layer(layer) for layer in layers(network) if layer.type.name != "CONSTANT"]
    sizes = {io.name: io.bytes for io in job.spec.io_tensors()}
    aliases = dict(job.spec.states) if job.spec.in_place else {}
    return {
        "network": job.spec.name,
        "layers": described,
        "precisions": {
            f"{kind} {dtype}": count
            for (kind, dtype), count in Counter((layer["type"], layer["dtype"]) for layer in described).most_common()
        },
        "aliases": aliases,
        "memory": {
            "plan_bytes": plan_bytes,
            "io_tensor_bytes": sum(size for name, size in sizes.items() if name not in aliases),
            "cache_bytes": sum(sizes[cache] for cache in aliases.values()),
        },
    }


def engine_information(library: TensorRTLibrary, plan: Any) -> dict[str, Any] | None:
    """Return what the engine inspector says of a plan: fused layers, tactics, activation memory.

    None for TensorRT-RTX: its plan becomes an engine only on the GPU that it runs on.
    """
    if library.is_rtx:
        return None
    runtime = library.trt.Runtime(library.logger)
    runtime.error_recorder = library.recorder
    engine = library.check(runtime.deserialize_cuda_engine(plan), "read the plan that it has just built")
    text = engine.create_engine_inspector().get_engine_information(library.trt.LayerInformationFormat.JSON)
    return {"activation_bytes": engine.device_memory_size_v2, "inspector": json.loads(text)}


def _describe_layer(layer: Any) -> dict[str, Any]:
    output = layer.get_output(0)
    inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
    return {
        "name": layer.name,
        "type": layer.type.name,
        "dtype": output.dtype.name if output is not None else None,
        "input_dtypes": [tensor.dtype.name for tensor in inputs if tensor is not None],
        "shape": list(output.shape) if output is not None else None,
        "origin": layer.metadata,
    }
