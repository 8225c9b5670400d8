# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""KVCacheAttention as one Triton kernel in one launch, shared by the torch op and both TensorRT plugins.

A program attends a block of queries of one head to the cached slots, the chunk's own left out, and then to the chunk's
k and v as they came in; before that it writes its block's rows of k and v to their slots. Nothing that one program
writes is read by another, so one launch is enough, with no workspace: what an ahead-of-time plugin is limited to.

The own slots are left out by counting, not by a mask: the i-th cached slot that is not the chunk's own is
i + tokens_per_frame · (number of the chunk's frames that lie before it), so that a full window costs no wasted tile.
Slots and lengths are read on the device, and loops are bounded by them: a captured launch serves every fill level.
Whatever they say, nothing outside of the caches is read or written: while it builds, TensorRT may time a plugin over
inputs that hold anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_HOLE = tl.constexpr(2**31 - 1)


@triton.jit
def _hole(slots_ptr, tokens_per_frame, FRAME: tl.constexpr, FRAMES: tl.constexpr):
    """Return the first cached index, own slots left out, that lies behind this frame of the chunk."""
    if FRAME < FRAMES:
        first = tl.load(slots_ptr + FRAME)
        hole = first
        for other in tl.static_range(FRAMES):
            hole -= tl.where(tl.load(slots_ptr + other) < first, tokens_per_frame, 0)
    else:
        hole = NO_HOLE
    return hole


@triton.jit
def _rows(ptr, rows, row_stride, seen, MASKED: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr):
    """Load rows [ROWS, PADDED_D]; what lies outside of `seen` or D is zero."""
    depth = tl.arange(0, PADDED_D)
    offsets = rows[:, None] * row_stride + depth[None, :]
    if MASKED and D < PADDED_D:
        loaded = tl.load(ptr + offsets, mask=seen[:, None] & (depth[None, :] < D), other=0.0)
    elif MASKED:
        loaded = tl.load(ptr + offsets, mask=seen[:, None], other=0.0)
    elif D < PADDED_D:
        loaded = tl.load(ptr + offsets, mask=depth[None, :] < D, other=0.0)
    else:
        loaded = tl.load(ptr + offsets)
    return loaded


@triton.jit
def _attend(
    weighted, total, peak, q, k_ptr, v_ptr, k_stride, v_stride, begin, end,
    slots_ptr, valid, tokens_per_frame, cache_slots, hole_0, hole_1, hole_2, hole_3, scale,
    OWN: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Fold keys and values [begin, end) into a running softmax: of the chunk if OWN, else of the cache.

    Without MASKED, end - begin is a multiple of BLOCK_N and all of them count.
    """
    columns = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        index = start + columns
        seen = index < end
        rows = index
        if OWN:
            if MASKED:
                slot = tl.load(slots_ptr + index // tokens_per_frame, mask=seen, other=0) + index % tokens_per_frame
                seen = seen & (slot < valid)
        else:
            rows += tl.where(index >= hole_0, tokens_per_frame, 0)
            rows += tl.where(index >= hole_1, tokens_per_frame, 0)
            rows += tl.where(index >= hole_2, tokens_per_frame, 0)
            rows += tl.where(index >= hole_3, tokens_per_frame, 0)
            rows = tl.minimum(rows, cache_slots - 1)
        k = _rows(k_ptr, rows, k_stride, seen, MASKED, D, PADDED_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            scores = tl.where(seen[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        base = new_peak
        if MASKED:  # a row that has seen no key yet has a peak of -inf
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.math.exp2(scores * scale - base[:, None])
        correction = tl.math.exp2(peak - base)
        total = total * correction + tl.sum(weights, 1)
        v = _rows(v_ptr, rows, v_stride, seen, MASKED, D, PADDED_D)
        weighted = tl.dot(weights.to(v.dtype), v, weighted * correction[:, None], input_precision="ieee")
        peak = new_peak
    return weighted, total, peak


@triton.jit
def _write(ptr, cache_ptr, tokens, slots, stride, cache_stride, live, D: tl.constexpr, PADDED_D: tl.constexpr):
    """Copy the chunk's rows `tokens` to the cache's rows `slots`."""
    depth = tl.arange(0, PADDED_D)
    rows = _rows(ptr, tokens, stride, live, True, D, PADDED_D)
    mask = live[:, None] & (depth[None, :] < D)
    tl.store(cache_ptr + slots[:, None] * cache_stride + depth[None, :], rows, mask=mask)


@triton.jit(do_not_specialize=["tokens", "tokens_per_frame", "cache_slots"])  # one kernel for all geometries
def kv_cache_attention_kernel(
    q_ptr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slots_ptr, valid_slots_ptr,
    out_ptr, k_cache_out_ptr, v_cache_out_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    out_batch, out_head, out_row, cache_batch, cache_head, cache_row,
    tokens, tokens_per_frame, cache_slots, scale,
    FRAMES: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Run the op of `plugins.contract` on a grid of (⌈L / BLOCK_M⌉, N, B) programs.

    Pointers come as a plan passes them, inputs first, then outputs; the caches' outputs are their inputs. Strides count
    elements, the last axis is dense. `scale` holds the factor of exp2's base already: scale · log2(e), above 0.
    """
    batch = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    out_ptr += batch * out_batch + head * out_head
    cache = batch * cache_batch + head * cache_head

    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = token < tokens
    slot = tl.load(slots_ptr + token // tokens_per_frame, mask=live, other=0) + token % tokens_per_frame
    inside = live & (slot >= 0) & (slot < cache_slots)
    _write(k_ptr, k_cache_out_ptr + cache, token, slot, k_row, cache_row, inside, D, PADDED_D)
    _write(v_ptr, v_cache_out_ptr + cache, token, slot, v_row, cache_row, inside, D, PADDED_D)

    valid = tl.minimum(tl.load(valid_slots_ptr + batch), cache_slots)
    cached = valid
    for frame in tl.static_range(FRAMES):
        cached -= tl.minimum(tl.maximum(valid - tl.load(slots_ptr + frame), 0), tokens_per_frame)
    hole_0 = _hole(slots_ptr, tokens_per_frame, 0, FRAMES)
    hole_1 = _hole(slots_ptr, tokens_per_frame, 1, FRAMES)
    hole_2 = _hole(slots_ptr, tokens_per_frame, 2, FRAMES)
    hole_3 = _hole(slots_ptr, tokens_per_frame, 3, FRAMES)

    q = _rows(q_ptr, token, q_row, live, True, D, PADDED_D)
    weighted = tl.zeros([BLOCK_M, PADDED_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)

    whole = cached // BLOCK_N * BLOCK_N
    weighted, total, peak = _attend(
        weighted, total, peak, q, k_cache_ptr + cache, v_cache_ptr + cache, cache_row, cache_row, 0, whole,
        slots_ptr, valid, tokens_per_frame, cache_slots, hole_0, hole_1, hole_2, hole_3, scale,
        OWN=False, MASKED=False, D=D, PADDED_D=PADDED_D, BLOCK_N=BLOCK_N, STAGES=STAGES,
    )  # fmt: skip
    weighted, total, peak = _attend(
        weighted, total, peak, q, k_cache_ptr + cache, v_cache_ptr + cache, cache_row, cache_row, whole, cached,
        slots_ptr, valid, tokens_per_frame, cache_slots, hole_0, hole_1, hole_2, hole_3, scale,
        OWN=False, MASKED=True, D=D, PADDED_D=PADDED_D, BLOCK_N=BLOCK_N, STAGES=1,
    )  # fmt: skip
    # Usually all of the chunk's own slots are valid, and only its last tile needs a mask.
    whole = tl.where(valid - cached == tokens, tokens // BLOCK_N * BLOCK_N, 0)
    weighted, total, peak = _attend(
        weighted, total, peak, q, k_ptr, v_ptr, k_row, v_row, 0, whole,
        slots_ptr, valid, tokens_per_frame, cache_slots, hole_0, hole_1, hole_2, hole_3, scale,
        OWN=True, MASKED=False, D=D, PADDED_D=PADDED_D, BLOCK_N=BLOCK_N, STAGES=STAGES,
    )  # fmt: skip
    weighted, total, peak = _attend(
        weighted, total, peak, q, k_ptr, v_ptr, k_row, v_row, whole, tokens,
        slots_ptr, valid, tokens_per_frame, cache_slots, hole_0, hole_1, hole_2, hole_3, scale,
        OWN=True, MASKED=True, D=D, PADDED_D=PADDED_D, BLOCK_N=BLOCK_N, STAGES=1,
    )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # no valid slot at all: zeros, as in the reference
    depth = tl.arange(0, PADDED_D)
    out = (weighted / total[:, None]).to(out_ptr.dtype.element_ty)
    mask = live[:, None] & (depth[None, :] < D)
    tl.store(out_ptr + token[:, None] * out_row + depth[None, :], out, mask=mask)
