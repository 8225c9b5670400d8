"""Self-attention over the cache in fp8: queries, keys and values rounded to e4m3, the cache itself in the carrier type.

Keys and values are quantised before they enter the cache. Scales are static and powers of two, so that quantising them
again where they are read changes nothing: the graph and every body of the op stay as they are, and a compiler that
multiplies in fp8 may put the same Q/DQ between the cache and its attention layer.

For the queries' scale to be one too, the factor on q·k is split: its power of two stays with the op, the rest, between
0.7 and 1.42, goes to the queries before they are quantised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from onnxscript import opset23 as op
from torch import nn

from causal_forcing.build_engines.models.dit_layers import CacheAttention
from causal_forcing.build_engines.quantization.fp8_linear import fake_quantize
from causal_forcing.plugins import reference
from causal_forcing.plugins.contract import DOMAIN
from causal_forcing.plugins.torch_op import kv_cache_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionScales:
    """Static scales of an attention layer's inputs, each a power of two."""

    q: float
    """Of the queries, multiplied by `query_factor`."""
    k: float
    """Of the keys, after RoPE."""
    v: float
    """Of the values."""

    def fields(self) -> dict[str, Any]:
        """Return what the manifest records."""
        return {"q": self.q, "k": self.k, "v": self.v}

    def attend(self, attention: CacheAttention, *args: torch.Tensor) -> torch.Tensor:
        """Return what attention gives for rounded inputs; arguments as of `CacheAttention`, caches left alone."""
        q, k, v, k_cache, v_cache, slots, valid_slots = args
        factor = query_factor(attention.scale)

        def rounded(x: torch.Tensor, scale: float) -> torch.Tensor:
            return fake_quantize(x, torch.tensor(scale, device=x.device))

        return reference.kv_cache_attention(
            *(rounded(q * factor, self.q), rounded(k, self.k), rounded(v, self.v)),
            *(rounded(k_cache, self.k), rounded(v_cache, self.v), slots, valid_slots),
            attention.scale / factor,
        )


@torch.library.custom_op(f"{DOMAIN}::fp8_round", mutates_args=())
def fp8_round(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round `x`, any shape, to what e4m3 can hold at a scale [] of its dtype."""
    return fake_quantize(x, scale)


@fp8_round.register_fake
def _(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def translation_table() -> Mapping[Any, Callable[..., Any]]:
    """Return the op's translation, for `torch.onnx.export(custom_translation_table=…)`."""

    def translate(x: Any, scale: Any) -> Any:
        quantised = op.QuantizeLinear(x, scale, output_dtype=onnx.TensorProto.FLOAT8E4M3FN, saturate=1)
        return op.DequantizeLinear(quantised, scale)

    return {torch.ops.causal_forcing.fp8_round.default: translate}


def query_factor(scale: float) -> float:
    """Return what queries are multiplied by, so that the rest of the factor on q·k is a power of two."""
    return float(scale / 2.0 ** round(math.log2(scale)))


class QuantizedCacheAttention(nn.Module):
    """Cache attention in fp8, made from one in the carrier type.

    Args:
        attention: The module whose place it takes.
        scales: Scales of its inputs.
        like: Any tensor of the carrier type, on the device to be on.
    """

    def __init__(self, attention: CacheAttention, scales: AttentionScales, like: torch.Tensor) -> None:
        super().__init__()
        self.factor = query_factor(attention.scale)
        self.scale = attention.scale / self.factor
        self.q_scale: torch.Tensor
        self.k_scale: torch.Tensor
        self.v_scale: torch.Tensor
        for name in ("q", "k", "v"):
            scale = torch.tensor(getattr(scales, name), dtype=like.dtype, device=like.device)
            self.register_buffer(f"{name}_scale", scale)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots: torch.Tensor,
        valid_slots: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the op as `CacheAttention` does, on rounded inputs."""
        q = fp8_round(q * self.factor, self.q_scale)
        k, v = fp8_round(k, self.k_scale), fp8_round(v, self.v_scale)
        return kv_cache_attention(q, k, v, k_cache, v_cache, slots, valid_slots, self.scale)
