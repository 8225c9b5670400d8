"""Linear layers in fp8 (e4m3): weights and inputs quantised, the product and everything around it in the carrier type.

A layer is one torch op, `causal_forcing::fp8_linear`. Its torch body is exact fake quantisation; its translation to
ONNX emits what compilers know as a quantised product:

    x ─[Mul multiplier]─ QuantizeLinear ─ DequantizeLinear ─┐
                    weight (FLOAT8E4M3FN) ─ DequantizeLinear ─┴ MatMul ─ Add bias

Every scale is a power of two. A floating-point code has the same relative precision all over its range, so that this
costs nothing but a place at the lower end of the range, and scaling by it is exact in every type: it makes no
difference whether a runtime divides by a scale or multiplies by its reciprocal, and a scale in bf16 is the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import onnx
import torch
from onnxscript import opset23 as op
from torch import nn

from causal_forcing.plugins.contract import DOMAIN
from causal_forcing.plugins.fp8_ops import E4M3_MAX, quantize_e4m3


def power_of_two_scale(peak: torch.Tensor) -> torch.Tensor:
    """Return the smallest power of two by which a peak magnitude, any shape, fits e4m3: peak / scale ≤ 448.

    Computed in fp32; a peak of 0 gets scale 1.
    """
    peak = peak.float()
    mantissa, exponent = torch.frexp(peak / E4M3_MAX)  # peak / 448 = mantissa · 2^exponent, mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    # The smallest scale is far above fp32's and bf16's smallest number: dequantised values stay normal there.
    return torch.where(peak == 0, 1.0, torch.ldexp(torch.ones_like(peak), exponent.clamp(-60, 60)))


def fake_quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round `x` to what e4m3 can hold at this scale; same shape and dtype."""
    return quantize_e4m3(x, scale).to(x.dtype) * scale.to(x.dtype)


@torch.library.custom_op(f"{DOMAIN}::fp8_linear", mutates_args=())
def fp8_linear(
    x: torch.Tensor,
    multiplier: torch.Tensor | None,
    input_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Multiply quantised inputs by quantised weights.

    Args:
        x: [..., in], the carrier type.
        multiplier: [in], the carrier type: evens the channels out before they are quantised; None is 1.
        input_scale: [], the carrier type.
        weight: [in, out] e4m3.
        weight_scale: [out], the carrier type.
        bias: [out], the carrier type.

    Returns:
        [..., out], the carrier type.
    """
    even = x if multiplier is None else x * multiplier
    return fake_quantize(even, input_scale) @ (weight.to(x.dtype) * weight_scale) + bias


@fp8_linear.register_fake
def _(
    x: torch.Tensor,
    multiplier: torch.Tensor | None,
    input_scale: torch.Tensor,
    weight: torch.Tensor,
    *rest: torch.Tensor,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def translation_table() -> Mapping[Any, Callable[..., Any]]:
    """Return the op's translation, for `torch.onnx.export(custom_translation_table=…)`."""

    def translate(x: Any, multiplier: Any, input_scale: Any, weight: Any, weight_scale: Any, bias: Any) -> Any:
        even = x if multiplier is None else op.Mul(x, multiplier)
        quantised = op.QuantizeLinear(even, input_scale, output_dtype=onnx.TensorProto.FLOAT8E4M3FN, saturate=1)
        factors: tuple[Any, Any] = (
            op.DequantizeLinear(quantised, input_scale),
            op.DequantizeLinear(weight, weight_scale, axis=1),
        )
        return op.Add(op.MatMul(*factors), bias)

    return {torch.ops.causal_forcing.fp8_linear.default: translate}


class QuantizedLinear(nn.Module):
    """A linear layer in fp8, made from one in the carrier type.

    Args:
        linear: The layer; its weights may be on the meta device.
        input_scale: Static scale of its inputs, a power of two.
        multiplier: [in] fp32 powers of two by which inputs are multiplied before they are quantised; the weights' rows
            are divided by them, exactly. None is 1.
    """

    def __init__(self, linear: nn.Linear, input_scale: float, multiplier: torch.Tensor | None = None) -> None:
        super().__init__()
        carrier, device = linear.weight.dtype, linear.weight.device
        weight = linear.weight.detach().float().t()  # [in, out]: the graph needs no transpose
        if multiplier is not None:
            multiplier = multiplier.to(device)
            weight = weight / multiplier[:, None]
        scale = power_of_two_scale(weight.abs().amax(dim=0))
        self.weight = nn.Parameter(quantize_e4m3(weight, scale), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.weight_scale: torch.Tensor
        self.input_scale: torch.Tensor
        self.multiplier: torch.Tensor | None
        self.register_buffer("weight_scale", scale.to(carrier))
        self.register_buffer("input_scale", torch.tensor(input_scale, dtype=carrier, device=device))
        self.register_buffer("multiplier", None if multiplier is None else multiplier.to(carrier))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project [..., in] to [..., out]."""
        projected: torch.Tensor = fp8_linear(
            x, self.multiplier, self.input_scale, self.weight, self.weight_scale, self.bias
        )
        return projected
