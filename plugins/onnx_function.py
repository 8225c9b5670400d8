"""KVCacheAttention for ONNX: the node that exported graphs hold in its place. Its body: `onnx_bodies`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx
import torch
from onnxscript import values

from causal_forcing.plugins.contract import DOMAIN, INPUTS, ONNX_NAME, OUTPUTS, PLUGIN_VERSION


def translation_table() -> Mapping[Any, Callable[..., Any]]:
    """Return the functional torch op's translation, for `torch.onnx.export(custom_translation_table=…)`."""
    node = values.Op(values.Opset(DOMAIN, 1), ONNX_NAME, _schema())

    def translate(
        q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, slots: Any, valid_slots: Any, scale: float
    ) -> Any:
        # With `plugin_namespace` on the node, TensorRT takes our plugin if one is registered and the body otherwise.
        return node(
            *(q, k, v, k_cache, v_cache, slots, valid_slots),
            scale=scale,
            plugin_namespace=DOMAIN,
            plugin_version=PLUGIN_VERSION,
        )

    return {torch.ops.causal_forcing.kv_cache_attention.default: translate}


def _schema() -> onnx.defs.OpSchema:
    """Describe the node to the exporter."""
    parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
    types = onnx.defs.OpSchema.AttrType
    return onnx.defs.OpSchema(
        ONNX_NAME,
        DOMAIN,
        1,
        inputs=[parameter(name, "I" if name in ("slots", "valid_slots") else "T") for name in INPUTS],
        outputs=[parameter(name, "T") for name in OUTPUTS],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "activations and caches"),
            ("I", ["tensor(int32)"], "slots and lengths"),
        ],
        attributes=[
            attribute("scale", types.FLOAT, "factor on q·k"),
            attribute("plugin_namespace", types.STRING, "TensorRT plugin namespace", required=False),
            attribute("plugin_version", types.STRING, "TensorRT plugin version", required=False),
        ],
    )
