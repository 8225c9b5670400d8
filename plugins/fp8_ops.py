"""Fused ops in e4m3: values quantised where they are made, and the matrix product that takes them.

Scales are static and powers of two (`build_engines/quantization`): a quantised value stands for its code times a scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from causal_forcing.plugins.dit_ops import add_norm
from causal_forcing.plugins.fused_op import fused_op, kernel_of

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
"""Largest finite e4m3 number; there is no infinity, and torch's own conversion makes NaN of what lies beyond."""


def quantize_e4m3(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Quantise to e4m3, rounding to nearest even and saturating at ±448, as ONNX's QuantizeLinear does.

    Args:
        x: Any shape and float dtype.
        scale: What a code of 1 stands for; a tensor broadcasts against `x`.
    """
    divisor = scale.float() if isinstance(scale, torch.Tensor) else scale
    return (x.float() / divisor).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def to_e4m3(x: torch.Tensor, multiplier: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Quantise `x` times `multiplier`."""
    return quantize_e4m3(x if multiplier is None else x * multiplier, scale)


@fused_op(kernel=kernel_of("norm_launch", "run_quantize"))
def quantize(x: torch.Tensor, multiplier: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Quantise `x` [..., dim] to e4m3.

    Args:
        x: [..., dim], the carrier type.
        multiplier: [dim], evens the channels out before; None is 1.
        scale: What a code of 1 stands for.
    """
    return to_e4m3(x, multiplier, scale)


@fused_op(kernel=kernel_of("norm_launch", "launch_gelu_quantize"))
def gelu_quantize(x: torch.Tensor, multiplier: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Quantise the GELU, in its tanh form, of `x`; arguments as of `quantize`."""
    return to_e4m3(F.gelu(x, approximate="tanh"), multiplier, scale)


@fused_op(kernel=kernel_of("norm_launch", "launch_add_norm_quantize"))
def add_norm_quantize(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    multiplier: torch.Tensor | None,
    quantised_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run `add_norm` and quantise what it normalised; returns the sum in the carrier type, and codes."""
    total, normed = add_norm(x, branch, gate, weight, bias, shift, scale, eps)
    return total, to_e4m3(normed, multiplier, quantised_scale)


def _launch_product(
    codes: torch.Tensor, weight: torch.Tensor, input_scale: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    product = torch._scaled_mm(
        codes.flatten(0, -2), weight.t(), input_scale, weight_scale, bias, out_dtype=bias.dtype, use_fast_accum=True
    )
    return product.view(*codes.shape[:-1], weight.shape[0])


@fused_op(kernel=_launch_product)
def fp8_product(
    codes: torch.Tensor, weight: torch.Tensor, input_scale: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Multiply e4m3 codes by a weight in e4m3.

    Args:
        codes: [..., in] e4m3.
        weight: [out, in] e4m3.
        input_scale: [] fp32, what a code of 1 stands for.
        weight_scale: [] fp32, the same of the weight.
        bias: [out], the carrier type.

    Returns:
        [..., out], the carrier type; added up in fp32.
    """
    product = F.linear(codes.float() * input_scale, weight.float() * weight_scale)
    return (product + bias.float()).to(bias.dtype)
