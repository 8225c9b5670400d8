# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Attention to a cache of keys and values for sm_90a: wgmma, TMA and warps of their own for it, in Triton's Gluon.

A program is two warpgroups of consumers, each with 64 queries of one head, and a warp that loads keys and values for
both. A consumer starts the next block's scores and this block's product with the values together, and computes the
softmax of the scores while the product runs. `hopper_schedule` says what a program works on.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from causal_forcing.plugins.kernels.hopper_schedule import (
    count_blocks,
    find_part,
    measure,
    plan_program,
    store_schedule,
)

SIZES = ("segment_tokens", "row_tiles", "heads", "q_head_row", "q_head_column", "cache_slots", "value_rows")
"""Parameters whose values change nothing in the code."""
D = gl.constexpr(128)
ROWS = gl.constexpr(64)
"""Queries of a consumer: the rows of one wgmma."""
KEYS = gl.constexpr(128)
"""Keys of a block."""
P_SHIFT = gl.constexpr(8.0)
"""Weights become e4m3 times 2^8, so that the largest is 256, and the smallest that counts 2^-18 of it."""
PACK_E4M3 = gl.constexpr(
    "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f32 low, $2, $1; cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;"
    " mov.b32 $0, {low, high}; }"
)
"""Four floats to one register. What Triton makes of its own cast takes 3 times the instructions."""

load_async = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""The name changed after Triton 3.6."""


@gluon.constexpr_function
def result_layout(bits):
    """Return how four warps hold the result of a wgmma of 64 rows and 128 columns of operands of so many bits."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 256 // bits])


@gluon.jit
def sum_own(p):
    """Sum along rows what each thread holds itself: [M, N] becomes [M, 4], a sum for each of the 4 threads of a row."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def round_weights(p, dtype: gl.constexpr, FP8: gl.constexpr):
    """Round weights; for e4m3, pack the 4 of every 16 columns that a thread holds into an int32."""
    if FP8:
        even, odd = gl.split(p.reshape([p.shape[0], p.shape[1] // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]))
        even_0, even_1 = gl.split(even)
        odd_0, odd_1 = gl.split(odd)
        weights = [even_0, odd_0, even_1, odd_1]
        return gl.inline_asm_elementwise(PACK_E4M3, "=r,r,r,r,r", weights, dtype=gl.int32, is_pure=True, pack=1)
    else:
        return p.to(dtype)


@gluon.jit
def as_operand(p, layout: gl.constexpr, FP8: gl.constexpr):
    """Make rounded weights an operand of the next product, without moving any between threads.

    For e4m3 a thread holds 4 columns in a row of an operand but 2 and 2 of a result: so the columns are permuted, as
    are those of the values (`hopper_launch.split_v`). All of this becomes no instruction: kept packed, the weights are
    carried through the loop as they are multiplied.
    """
    if FP8:
        low = gl.join(p.to(gl.int8), (p >> 8).to(gl.int8))
        high = gl.join((p >> 16).to(gl.int8), (p >> 24).to(gl.int8))
        columns = gl.join(low, high).permute([0, 1, 2, 4, 3]).reshape([p.shape[0], p.shape[1] * 16])
        return gl.convert_layout(columns.to(gl.float8e4nv, bitcast=True), layout)
    else:
        return gl.convert_layout(p, layout)


@gluon.jit
def start_product(p, v_smem, stage, acc, FP8: gl.constexpr):
    """Start weights times values; added to acc, but for e4m3, whose products the tensor cores add up too coarsely."""
    layout: gl.constexpr = acc.type.layout
    if FP8:
        p = as_operand(p, gl.DotOperandLayout(0, layout, k_width=4), FP8)
        v = v_smem.index(stage).permute((1, 0))
        return warpgroup_mma(p, v, gl.zeros_like(acc), use_acc=False, is_async=True)
    else:
        p = as_operand(p, gl.DotOperandLayout(0, layout, k_width=2), FP8)
        return warpgroup_mma(p, v_smem.index(stage), acc, is_async=True)


@gluon.jit
def load_tiles(q_desc, k_desc, v_desc, buffers, barriers, plan, sizes, geometry, places, STAGES: gl.constexpr):
    """Load the queries of each part, and then its keys and values block by block, the last one first."""
    q_smem, k_smem, v_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    segments, segment_tokens, row_tiles, cache_slots = geometry
    q_head_row, q_head_column, value_rows, value_columns = places
    segment_tiles, _tiles, _first_blocks, _second_blocks = sizes
    _program, _programs, _rounds, _start, _end, parts = plan
    index = 0
    for part in range(parts):
        tile, first, last, _blocks = find_part(part, plan, sizes)
        head = tile % segment_tiles // row_tiles
        row = (segments - 1 - tile // segment_tiles) * segment_tokens + tile % row_tiles * (2 * ROWS)
        for consumer in gl.static_range(2):
            mbarrier.wait(q_empty.index(consumer), (part & 1) ^ 1)
            mbarrier.expect(q_full.index(consumer), q_desc.block_type.nbytes)
            place = [head * q_head_row + row + consumer * ROWS, head * q_head_column]
            load_async(q_desc, place, q_full.index(consumer), q_smem.index(consumer))
        for step in range(last - first):
            key = (last - 1 - step) * KEYS
            stage = index % STAGES
            phase = ((index // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            load_async(k_desc, [head * cache_slots + key, 0], k_full.index(stage), k_smem.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            place = [head * value_rows + key * (1 - value_columns), key * value_columns]
            load_async(v_desc, place, v_full.index(stage), v_smem.index(stage))
            index += 1


@gluon.jit
def attend_blocks(
    q, buffers, barriers, index, steps, last_key, valid, factor, q_empty, STAGES: gl.constexpr, FP8: gl.constexpr
):
    """Attend 64 queries to blocks of keys; return their weighted values, largest logits and sums of weights.

    Logits are in powers of 2; weights are relative to the largest, and shifted for e4m3.
    """
    _q_smem, k_smem, v_smem = buffers
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty = barriers
    layout: gl.constexpr = result_layout(q.dtype.primitive_bitwidth)
    nothing = gl.zeros([ROWS, D], gl.float32, layout)
    shift: gl.constexpr = P_SHIFT if FP8 else 0.0
    stage = index % STAGES
    mbarrier.wait(k_full.index(stage), (index // STAGES) & 1)
    s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(stage))
    if not FP8:
        # Not right after they were loaded into registers: the next queries may land before all of that is done. Scores
        # that were computed from them say that it is.
        mbarrier.arrive(q_empty)
    key = last_key + gl.arange(0, KEYS, gl.SliceLayout(0, layout))
    s = gl.where((key < valid)[None, :], s, float("-inf"))
    top = gl.max(s, 1)
    weights = gl.exp2(s * factor - (top * factor - shift)[:, None])
    total = sum_own(weights)
    p = round_weights(weights, q.dtype, FP8)
    acc = nothing
    decay = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, layout))

    next_stage = (index + 1) % STAGES
    mbarrier.wait(k_full.index(next_stage), ((index + 1) // STAGES) & 1, pred=steps > 1)
    for step in range(1, steps):
        s = warpgroup_mma(q, k_smem.index(next_stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(stage), (index // STAGES) & 1)
        product = start_product(p, v_smem, stage, acc, FP8)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(next_stage))
        new_top = gl.maximum(top, gl.max(s, 1))
        new_decay = gl.exp2((top - new_top) * factor)
        top = new_top
        weights = gl.exp2(s * factor - (top * factor - shift)[:, None])
        total = total * gl.convert_layout(new_decay, gl.SliceLayout(1, total.type.layout))[:, None] + sum_own(weights)
        # To wait here for the next step's keys keeps ptxas from waiting for the product before all of the above.
        later_stage = (index + 2) % STAGES
        mbarrier.wait(k_full.index(later_stage), ((index + 2) // STAGES) & 1, pred=step + 1 < steps)
        product, weights = warpgroup_mma_wait(0, deps=[product, weights])
        mbarrier.arrive(v_empty.index(stage))
        if FP8:
            acc = acc * decay[:, None] + product
            decay = new_decay
        else:
            acc = product * new_decay[:, None]
        p = round_weights(weights, q.dtype, FP8)
        index += 1
        stage = next_stage
        next_stage = later_stage

    if FP8:
        mbarrier.arrive(q_empty)
    mbarrier.wait(v_full.index(stage), (index // STAGES) & 1)
    product = warpgroup_mma_wait(0, deps=[start_product(p, v_smem, stage, acc, FP8)])
    mbarrier.arrive(v_empty.index(stage))
    if FP8:
        product = acc * decay[:, None] + product
    return product, top * factor, gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, layout))


@gluon.jit
def skip_blocks(barriers, index, steps, q_empty, STAGES: gl.constexpr):
    """Let go of blocks as they come: there are no queries to attend to them."""
    _q_full, _q_empty, k_full, k_empty, v_full, v_empty = barriers
    mbarrier.arrive(q_empty)
    for _step in range(steps):
        stage = index % STAGES
        phase = (index // STAGES) & 1
        mbarrier.wait(k_full.index(stage), phase)
        mbarrier.arrive(k_empty.index(stage))
        mbarrier.wait(v_full.index(stage), phase)
        mbarrier.arrive(v_empty.index(stage))
        index += 1


@gluon.jit
def store_rows(acc, total, token, segment, head, segment_tokens, outputs, FP8: gl.constexpr):
    """Divide by the sums of weights, apply the scale of the values and store those rows that exist."""
    out_ptr, out_head, out_row, _pieces_ptr, _statistics_ptr, _scale, _factors_ptr, value_scales_ptr = outputs
    inverse = 1.0 / total
    if FP8:
        inverse = inverse * gl.load(value_scales_ptr + head)
    row = (segment * segment_tokens + token).to(gl.int64) * out_row + head.to(gl.int64) * out_head
    place = out_ptr + row[:, None] + gl.arange(0, D, gl.SliceLayout(0, acc.type.layout))[None, :]
    gl.store(place, (acc * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=(token < segment_tokens)[:, None])


@gluon.jit
def consume_tiles(
    buffers, barriers, plan, sizes, geometry, outputs, valid_ptr,
    consumer: gl.constexpr, STAGES: gl.constexpr, FP8: gl.constexpr,
):  # fmt: skip
    """Attend 64 queries of each part: whole tiles end in out, pieces of tiles in the workspace."""
    q_smem, _k_smem, _v_smem = buffers
    q_full, q_empty, _k_full, _k_empty, _v_full, _v_empty = barriers
    segments, segment_tokens, row_tiles, cache_slots = geometry
    _out_ptr, _out_head, _out_row, pieces_ptr, statistics_ptr, scale, factors_ptr, _value_scales_ptr = outputs
    segment_tiles, _tiles, _first_blocks, _second_blocks = sizes
    program, _programs, _rounds, _start, _end, parts = plan
    layout: gl.constexpr = result_layout(q_smem.dtype.primitive_bitwidth)
    lane = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    free = q_empty.index(consumer)
    index = 0
    for part in range(parts):
        tile, first, last, blocks = find_part(part, plan, sizes)
        steps = last - first
        segment = segments - 1 - tile // segment_tiles
        head = tile % segment_tiles // row_tiles
        row = tile % row_tiles * (2 * ROWS) + consumer * ROWS
        mbarrier.wait(q_full.index(consumer), part & 1)
        if row < segment_tokens:
            valid, _ = count_blocks(valid_ptr, segment, cache_slots, KEYS)
            factor = gl.load(factors_ptr + head) if FP8 else scale
            q = q_smem.index(consumer)
            if not FP8:  # fewer reads of shared memory, so less power: 2 to 4 % faster on an H100 at its power limit
                q = q.load(gl.DotOperandLayout(0, layout, k_width=2))
            acc, top, total = attend_blocks(
                q, buffers, barriers, index, steps, (last - 1) * KEYS, valid, factor, free, STAGES, FP8
            )
            if steps == blocks:
                store_rows(acc, total, row + lane, segment, head, segment_tokens, outputs, FP8)
            else:
                line = (program * 2 + gl.where(first == 0, 1, 0)) * (2 * ROWS) + consumer * ROWS + lane
                gl.store(pieces_ptr + line[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, layout))[None, :], acc)
                gl.store(statistics_ptr + line * 2, top)
                gl.store(statistics_ptr + line * 2 + 1, total)
        else:
            skip_blocks(barriers, index, steps, free, STAGES)
        index += steps


@gluon.jit(do_not_specialize=SIZES)
def attention_kernel(
    q_desc, k_desc, v_desc, valid_ptr, out_ptr, schedule_ptr, pieces_ptr, statistics_ptr, factors_ptr, value_scales_ptr,
    scale, segment_tokens, row_tiles, heads, cache_slots, q_head_row, q_head_column, value_rows, out_head, out_row,
    SEGMENTS: gl.constexpr, STAGES: gl.constexpr, FP8: gl.constexpr,
):  # fmt: skip
    """Attend all queries; what programs share of a tile is left to `combine_kernel`."""
    sizes = measure(valid_ptr, cache_slots, row_tiles * heads, SEGMENTS, KEYS)
    plan = plan_program(gl.program_id(0), gl.num_programs(0), sizes)
    store_schedule(schedule_ptr, plan, sizes)
    value_columns = 1 if FP8 else 0
    places = (q_head_row, q_head_column, value_rows, value_columns)
    geometry = (SEGMENTS, segment_tokens, row_tiles, cache_slots)
    outputs = (out_ptr, out_head, out_row, pieces_ptr, statistics_ptr, scale, factors_ptr, value_scales_ptr)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, KEYS, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, KEYS, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    buffers = (q_smem, k_smem, v_smem)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    gl.warp_specialize(
        [
            (
                consume_tiles,
                (buffers, barriers, plan, sizes, geometry, outputs, valid_ptr, gl.constexpr(0), STAGES, FP8),
            ),
            (
                consume_tiles,
                (buffers, barriers, plan, sizes, geometry, outputs, valid_ptr, gl.constexpr(1), STAGES, FP8),
            ),
            (load_tiles, (q_desc, k_desc, v_desc, buffers, barriers, plan, sizes, geometry, places, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
