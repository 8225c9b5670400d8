"""KVCacheAttention as TensorRT's IPluginV3, whose body is the kernel in `kernels/`.

A plan that holds this plugin needs Python where it runs, with a creator registered before the plan is read; the kernel
is compiled when it first runs, so TensorRT's usual run before a graph is captured serves the plugin too. For plans
without Python see `quick_plugin`. Import this through `tensorrt_plugin`, which refuses TensorRT-RTX.
"""

from __future__ import annotations

import numpy as np
import tensorrt as trt
import torch

from causal_forcing.plugins.contract import DOMAIN, INPUTS, ONNX_NAME, OUTPUTS, PLUGIN_VERSION
from causal_forcing.plugins.kernels.launch import AddressedTensor, launch, shared_bytes_of

FLOATS = {
    trt.DataType.BF16: torch.bfloat16,
    trt.DataType.HALF: torch.float16,
    trt.DataType.FLOAT: torch.float32,
}
"""Types of activations and caches."""

ALIASES = {OUTPUTS.index(f"{cache}_out"): INPUTS.index(cache) for cache in ("k_cache", "v_cache")}
"""Outputs that share the memory of an input, by index."""

_INTEGERS = (INPUTS.index("slots"), INPUTS.index("valid_slots"))


class KVCacheAttentionPlugin(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime):
    """The op in a network that is built, or in a plan that runs."""

    def __init__(self, scale: float) -> None:
        if not scale > 0.0:
            raise ValueError(f"scale is {scale}, expected a factor above 0")
        trt.IPluginV3.__init__(self)
        trt.IPluginV3OneCore.__init__(self)
        trt.IPluginV3OneBuildV2.__init__(self)
        trt.IPluginV3OneRuntime.__init__(self)
        self.plugin_name = ONNX_NAME
        self.plugin_version = PLUGIN_VERSION
        self.plugin_namespace = DOMAIN
        self.num_outputs = len(OUTPUTS)
        # Layers that differ in nothing but the scale would else share a timing.
        self.timing_cache_id = f"scale={scale!r}"
        self.scale = scale
        self._serialized_scale = np.array([scale], dtype=np.float32)  # outlives the field that points to it

    def get_capability_interface(self, type: trt.PluginCapabilityType, /) -> KVCacheAttentionPlugin:
        """Return this object, which has all capabilities."""
        return self

    def clone(self) -> KVCacheAttentionPlugin:
        """Return a plugin that does the same; it holds nothing but the scale."""
        return KVCacheAttentionPlugin(self.scale)

    def attach_to_context(self, resource_context: trt.IPluginResourceContext, /) -> KVCacheAttentionPlugin:
        """Return the plugin of an execution context."""
        return self.clone()

    def get_fields_to_serialize(self) -> trt.PluginFieldCollection:
        """Return what `KVCacheAttentionCreator` needs to make this plugin again."""
        return trt.PluginFieldCollection([_scale_field(self._serialized_scale)])

    def get_output_data_types(self, input_types: list[trt.DataType], /) -> list[trt.DataType]:
        """Return the types of out and of the caches."""
        return [input_types[0], *(input_types[source] for source in ALIASES.values())]

    def get_output_shapes(
        self, inputs: list[trt.DimsExprs], shape_inputs: list[trt.DimsExprs], expr_builder: trt.IExprBuilder, /
    ) -> list[trt.DimsExprs]:
        """Return the shapes of out and of the caches."""
        return [trt.DimsExprs(inputs[source]) for source in (0, *ALIASES.values())]

    def get_aliased_input(self, output_index: int, /) -> int:
        """Return the input whose memory an output shares, or -1."""
        return ALIASES.get(output_index, -1)

    def supports_format_combination(
        self, pos: int, in_out: list[trt.DynamicPluginTensorDesc], num_inputs: int, /
    ) -> bool:
        """Accept linear tensors: slots and lengths in int32, all others of one floating type."""
        described = in_out[pos].desc
        if described.format != trt.TensorFormat.LINEAR:
            return False
        if pos in _INTEGERS:
            return described.type == trt.DataType.INT32
        return described.type in FLOATS and described.type == in_out[0].desc.type

    def configure_plugin(
        self, inputs: list[trt.DynamicPluginTensorDesc], outputs: list[trt.DynamicPluginTensorDesc], /
    ) -> None:
        """Do nothing: shapes come with every launch."""

    def get_valid_tactics(self) -> list[int]:
        """Return no tactics: tiles come from a table."""
        return []

    def set_tactic(self, tactic: int, /) -> None:
        """Do nothing: there is one way to run."""

    def get_workspace_size(
        self, inputs: list[trt.DynamicPluginTensorDesc], outputs: list[trt.DynamicPluginTensorDesc], /
    ) -> int:
        """Return 0: the kernel needs no workspace."""
        return 0

    def on_shape_change(self, inputs: list[trt.PluginTensorDesc], outputs: list[trt.PluginTensorDesc], /) -> None:
        """Do nothing: shapes come with every launch."""

    def enqueue(
        self,
        input_desc: list[trt.PluginTensorDesc],
        output_desc: list[trt.PluginTensorDesc],
        inputs: list[int],
        outputs: list[int],
        workspace: int,
        stream: int,
        /,
    ) -> None:
        """Launch the kernel on TensorRT's stream; nothing is allocated, waited for or read back."""
        for output, source in ALIASES.items():
            if outputs[output] != inputs[source]:
                raise RuntimeError(
                    f"TensorRT gave {OUTPUTS[output]} memory of its own, expected that of {INPUTS[source]}: build with "
                    "PreviewFeature.ALIASED_PLUGIN_IO_10_03 and bind both names to one buffer"
                )
        q, k, v, k_cache, v_cache, slots, valid_slots = map(_tensor, input_desc, inputs)
        out = _tensor(output_desc[0], outputs[0])
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)):  # type: ignore[no-untyped-call]
            shared_bytes = shared_bytes_of(torch.cuda.current_device())
            launch(q, k, v, k_cache, v_cache, slots, valid_slots, out, scale=self.scale, shared_bytes=shared_bytes)


class KVCacheAttentionCreator(trt.IPluginCreatorV3One):
    """Makes the plugin: from an ONNX node's attributes while building, from serialised fields while a plan is read."""

    def __init__(self) -> None:
        trt.IPluginCreatorV3One.__init__(self)
        self.name = ONNX_NAME
        self.plugin_version = PLUGIN_VERSION
        self.plugin_namespace = DOMAIN
        self.field_names = trt.PluginFieldCollection([_scale_field(np.array([], dtype=np.float32))])

    def create_plugin(
        self, name: str, field_collection: trt.PluginFieldCollection, phase: trt.TensorRTPhase, /
    ) -> KVCacheAttentionPlugin:
        """Return the plugin that these fields describe, in either phase."""
        fields = {field.name: field for field in field_collection}
        if "scale" not in fields:
            raise ValueError(f"{ONNX_NAME} has the fields {', '.join(fields) or 'none'}, expected scale")
        return KVCacheAttentionPlugin(float(fields["scale"].data[0]))


def _scale_field(values: np.ndarray[tuple[int], np.dtype[np.float32]]) -> trt.PluginField:
    return trt.PluginField("scale", values, trt.PluginFieldType.FLOAT32)


def _tensor(described: trt.PluginTensorDesc, address: int) -> AddressedTensor:
    return AddressedTensor(address=address, dtype=FLOATS.get(described.type, torch.int32), shape=tuple(described.dims))
