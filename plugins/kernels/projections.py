# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What lies between the projections of q, k, v and attention: RMS norm, RoPE and the write to the KV cache.

One program a token and a kind (queries, keys, values): reads a row of one projection, writes it where attention reads.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row(ptr, weight_ptr, cos_ptr, sin_ptr, token, eps, DIM: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr):  # fmt: skip  # noqa: E501
    """Load a row, fp32 [BLOCK]; with NORM, normalised and rotated."""
    if NORM:
        return _normed_rotated(ptr, weight_ptr, cos_ptr, sin_ptr, token, eps, DIM, BLOCK, D)
    columns = tl.arange(0, BLOCK)
    return tl.load(ptr + columns, mask=columns < DIM, other=0.0).to(tl.float32)


@triton.jit
def _normed_rotated(ptr, weight_ptr, cos_ptr, sin_ptr, token, eps, DIM: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr):  # fmt: skip  # noqa: E501
    """Load a row, normalise it over all heads, rotate its pairs; fp32 [BLOCK]."""
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    x = tl.load(ptr + columns, mask=inside, other=0.0).to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / DIM + eps)
    x *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    pairs = tl.arange(0, BLOCK // 2)
    phase = token * (D // 2) + pairs % (D // 2)
    cos = tl.load(cos_ptr + phase, mask=pairs < DIM // 2, other=0.0)
    sin = tl.load(sin_ptr + phase, mask=pairs < DIM // 2, other=0.0)
    even, odd = tl.split(tl.reshape(x, [BLOCK // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK])


@triton.jit
def _codes(x, scale_ptr, columns, inside, D: tl.constexpr):
    """Scale fp32 values into e4m3's range, a head at a time, saturating."""
    x /= tl.load(scale_ptr + columns // D, mask=inside, other=1.0)
    return tl.minimum(tl.maximum(x, -448.0), 448.0)


@triton.jit(do_not_specialize=["tokens_per_frame", "cache_slots"])
def place_projections_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, slots_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    q_scale_ptr, k_scale_ptr, k_offset_ptr, part_offsets_ptr,
    q_batch, q_row, k_batch, k_row, v_batch, v_row,
    out_batch, out_row, out_part, cache_batch, cache_part, cache_row,
    tokens_per_frame, cache_slots, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, PART: tl.constexpr, HAS_SLOTS: tl.constexpr,
    FP8: tl.constexpr, NORM: tl.constexpr, FIRST: tl.constexpr, SCATTERED: tl.constexpr,
):  # fmt: skip
    """Run on a grid of (L, K, B) programs: of queries, keys and values, the FIRST-th kind and K - 1 that follow.

    A row of DIM columns is written in parts of PART columns, each dense. Queries go to [B, L, parts, PART], keys and
    values to [B, parts, S, PART] at `slots`, or at their own places without slots. What lies outside of the cache is
    dropped. Without NORM rows are taken as they are. With FP8, queries and keys become codes, keys less their offset
    first; a part is a head then. With SCATTERED, parts lie at offsets of their own, and PART, rows and offsets are
    multiples of 8 elements: stores stay 16 bytes wide.
    """
    token = tl.program_id(0)
    kind = tl.program_id(1) + FIRST
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < DIM
    part = columns // PART
    if SCATTERED:
        scattered = tl.load(part_offsets_ptr + part, mask=inside, other=0)
    if kind == 0:
        x = _row(
            q_ptr + batch * q_batch + token.to(tl.int64) * q_row, q_weight_ptr, cos_ptr, sin_ptr, token, eps,
            DIM, BLOCK, D, NORM,
        )  # fmt: skip
        if FP8:
            x = _codes(x, q_scale_ptr, columns, inside, D)
        target = batch * out_batch + token.to(tl.int64) * out_row + part * out_part + columns % PART
        if SCATTERED:
            target = tl.max_contiguous(tl.multiple_of(target + scattered, 8), 8)
        tl.store(q_out_ptr + target, x.to(q_out_ptr.dtype.element_ty), mask=inside)
    else:
        slot = token
        if HAS_SLOTS:
            slot = tl.load(slots_ptr + token // tokens_per_frame) + token % tokens_per_frame
        stored = columns < tl.where((slot >= 0) & (slot < cache_slots), DIM, 0)
        place = batch * cache_batch + part * cache_part + slot.to(tl.int64) * cache_row + columns % PART
        if SCATTERED:
            place = tl.max_contiguous(tl.multiple_of(place + scattered, 8), 8)
        if kind == 1:
            x = _row(
                k_ptr + batch * k_batch + token.to(tl.int64) * k_row, k_weight_ptr, cos_ptr, sin_ptr, token, eps,
                DIM, BLOCK, D, NORM,
            )  # fmt: skip
            if FP8:
                x = _codes(x - tl.load(k_offset_ptr + columns, mask=inside, other=0.0), k_scale_ptr, columns, inside, D)
            tl.store(k_out_ptr + place, x.to(k_out_ptr.dtype.element_ty), mask=stored)
        else:
            row = v_ptr + batch * v_batch + token.to(tl.int64) * v_row + columns
            tl.store(v_out_ptr + place, tl.load(row, mask=inside, other=0.0), mask=stored)


@triton.jit(do_not_specialize=["tokens_per_frame", "cache_slots"])
def place_values_kernel(
    v_ptr, slots_ptr, v_scale_ptr, v_out_ptr, v_row, tokens_per_frame, cache_slots, columns,
    D: tl.constexpr, PADDED_D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write values as codes into a transposed cache [N, D, columns].

    Runs on a grid of (⌈(tokens_per_frame + 15) / COLUMNS⌉, F, N) programs, each of which fills columns that lie beside
    each other in memory: which slot each column holds is `fp8_attention_ops.value_column` turned around.
    """
    frame, head = tl.program_id(1), tl.program_id(2)
    first = tl.load(slots_ptr + frame)
    column = first // 16 * 16 + tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    slot = column // 16 * 16 + column % 4 // 2 * 8 + column % 16 // 4 * 2 + column % 2
    stored = (slot >= first) & (slot < first + tokens_per_frame) & (slot >= 0) & (slot < cache_slots)
    token = (frame * tokens_per_frame + slot - first).to(tl.int64)
    depth = tl.arange(0, PADDED_D)
    row = v_ptr + token[:, None] * v_row + head * D + depth[None, :]
    v = tl.load(row, mask=stored[:, None] & (depth[None, :] < D), other=0.0).to(tl.float32)
    v = tl.minimum(tl.maximum(v / tl.load(v_scale_ptr + head), -448.0), 448.0).to(v_out_ptr.dtype.element_ty)
    target = v_out_ptr + (head * D + depth)[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(target, tl.trans(v), mask=(depth[:, None] < D) & stored[None, :])
