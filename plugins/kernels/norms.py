# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Norms between matrix products, one program a token: residual add, layer or RMS norm, modulation, e4m3 rounding.

Everything is computed in fp32. Each tensor is read and written once; a token's row stays in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def quantised(x, multiplier_ptr, columns, inside, inverse_scale, HAS_MULTIPLIER: tl.constexpr):
    """Scale fp32 values into e4m3's range, saturating."""
    if HAS_MULTIPLIER:
        x *= tl.load(multiplier_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    return tl.minimum(tl.maximum(x * inverse_scale, -E4M3_MAX), E4M3_MAX)


@triton.jit(do_not_specialize=["tokens", "segment_tokens"])
def add_norm_kernel(
    x_ptr, branch_ptr, gate_ptr, weight_ptr, bias_ptr, shift_ptr, scale_ptr, multiplier_ptr, total_ptr, out_ptr,
    gate_stride, shift_stride, scale_stride, tokens, segment_tokens, eps, inverse_scale,
    DIM: tl.constexpr, BLOCK: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_GATE: tl.constexpr,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, MODULATED: tl.constexpr,
    QUANTISED: tl.constexpr, HAS_MULTIPLIER: tl.constexpr,
):  # fmt: skip
    """Add a gated branch to a row, then normalise: NORM is "layer", "rms" or "none"."""
    token = tl.program_id(0).to(tl.int64)
    segment = (token % tokens) // segment_tokens
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    row = token * DIM + columns
    x = tl.load(x_ptr + row, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + row, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            branch *= tl.load(gate_ptr + segment * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = (x + branch).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if NORM != "none":
        if NORM == "layer":
            x = tl.where(inside, x - tl.sum(x, 0) / DIM, 0.0)
        y = x * tl.rsqrt(tl.sum(x * x, 0) / DIM + eps)
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if MODULATED:
            y *= 1.0 + tl.load(scale_ptr + segment * scale_stride + columns, mask=inside, other=0.0).to(tl.float32)
            y += tl.load(shift_ptr + segment * shift_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if QUANTISED:
            y = quantised(y, multiplier_ptr, columns, inside, inverse_scale, HAS_MULTIPLIER)
        tl.store(out_ptr + row, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def quantize_kernel(
    x_ptr, multiplier_ptr, out_ptr, row_stride, inverse_scale,
    DIM: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, HAS_MULTIPLIER: tl.constexpr,
):  # fmt: skip
    """Round rows to e4m3, after the tanh form of GELU where asked for; a program takes BLOCK columns of a row."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < DIM
    x = tl.load(x_ptr + token * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-2.0 * inner))  # x · (1 + tanh(inner)) / 2
    x = quantised(x, multiplier_ptr, columns, inside, inverse_scale, HAS_MULTIPLIER)
    tl.store(out_ptr + token * DIM + columns, x.to(out_ptr.dtype.element_ty), mask=inside)
