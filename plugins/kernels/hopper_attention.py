"""Attention over a cache of keys and values for sm_90a: wgmma, TMA and one producer warp, in Triton's Gluon dialect.

A program is two warpgroups of consumers, each with 64 queries of the same head, and a warp that loads keys and values
for both. While one consumer's products run, the other's softmax does: they take turns to issue.
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
    count_parts,
    find_part,
    tile_of,
    units_before,
)

load_async = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""Called so from Triton 3.7 on."""

SIZES = ("segment_tokens", "row_tiles", "heads", "q_head_row", "q_head_column", "cache_slots", "value_rows", "programs")
"""Parameters whose values change nothing in the code."""

D = gl.constexpr(128)
ROWS = gl.constexpr(64)
"""Queries of one consumer: the rows of one wgmma."""
KEYS = gl.constexpr(128)
PACK_E4M3 = gl.constexpr(
    """{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
    }"""
)
"""Four floats to one register. Triton's own conversion packs two, and then takes them apart again."""
P_SHIFT = gl.constexpr(8.0)
"""Weights become e4m3 times 2^8, so that the largest is 256 and the smallest that counts 2^-18 of it."""


POLYNOMIALS = {
    2: ("0f04800E87", "0f0434152D", "0f03742665"),
    3: ("0f047FFB49", "0f0431798E", "0f03786F0E", "0f0261FB83"),
}
"""2^(f - 118) for f in [-0.5, 0.5], off by 1.7e-3 and 7.5e-5 of it at most: coefficients from the constant one on."""


@gluon.constexpr_function
def result_layout(bits):
    """Return how four warps hold the result of a product of 64 rows whose operands have so many bits."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 256 // bits])


@gluon.constexpr_function
def exp2_assembly(emulated, degree):
    """Return what computes 2^(s·factor - shift) of 4 elements, `emulated` of them without the special function unit.

    Operands: 4 results, 4 each of s, -shift, (118 - shift)/128, factor and factor/128.
    """
    lines = ["{", ".reg .f32 x, t, n, f, p;", ".reg .b32 i, j;"]
    for i in range(4):
        s, minus, offset, factor, part = (f"${4 * k + i}" for k in range(1, 6))
        if i < 4 - emulated:
            lines += [f"fma.rn.ftz.f32 x, {s}, {factor}, {minus};", f"ex2.approx.ftz.f32 ${i}, x;"]
            continue
        lines += [
            f"fma.rn.ftz.sat.f32 x, {s}, {part}, {offset};",
            "fma.rn.ftz.f32 t, x, 0f43000000, 0f4B400000;",
            "sub.rn.ftz.f32 n, 0f4B400000, t;",
            "fma.rn.ftz.f32 f, x, 0f43000000, n;",
        ]
        coefficients = POLYNOMIALS[degree]
        lines.append(f"fma.rn.ftz.f32 p, f, {coefficients[-1]}, {coefficients[-2]};")
        lines += [f"fma.rn.ftz.f32 p, p, f, {c};" for c in reversed(coefficients[:-2])]
        lines += ["mov.b32 i, t;", "mov.b32 j, p;", "shl.b32 i, i, 23;", "add.s32 j, i, j;", f"mov.b32 ${i}, j;"]
    return " ".join([*lines, "}"])


@gluon.jit
def exp2_shifted(s, factor, shift, EMULATED: gl.constexpr, DEGREE: gl.constexpr):
    """Compute 2^(s·factor - shift), at least 2^-118, for a shift a row."""
    if EMULATED == 0:
        return gl.exp2(s * factor - shift[:, None])
    else:
        assembly: gl.constexpr = exp2_assembly(EMULATED, DEGREE)
        return gl.inline_asm_elementwise(
            assembly,
            "=f,=f,=f,=f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f,f",
            [s, (-shift)[:, None], (118.0 / 128 - shift * (1.0 / 128))[:, None], factor, factor * (1.0 / 128)],
            dtype=gl.float32,
            is_pure=True,
            pack=4,
        )


@gluon.jit
def load_tiles(
    q_desc,
    k_desc,
    v_desc,
    buffers,
    barriers,
    plan,
    geometry,
    STAGES: gl.constexpr,
    FP8: gl.constexpr,
):
    """Load queries once a part, then keys and values block by block, last block first."""
    program, programs, tiles, segment_tiles, first_blocks, second_blocks = plan
    segments, segment_tokens, row_tiles, q_head_row, q_head_column, cache_slots, value_rows = geometry
    q_smem, k_smem, v_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    index = 0
    parts = count_parts(program, programs, tiles, segment_tiles, first_blocks, second_blocks)
    for part in range(parts):
        tile, first, last, _blocks = find_part(
            part, program, programs, tiles, segment_tiles, first_blocks, second_blocks
        )
        segment = segments - 1 - tile // segment_tiles
        head = tile % segment_tiles // row_tiles
        row = segment * segment_tokens + tile % row_tiles * (2 * ROWS)
        for consumer in gl.static_range(2):
            mbarrier.wait(q_empty.index(consumer), (part & 1) ^ 1)
            mbarrier.expect(q_full.index(consumer), q_desc.block_type.nbytes)
            load_async(
                q_desc,
                [head * q_head_row + row + consumer * ROWS, head * q_head_column],
                q_full.index(consumer),
                q_smem.index(consumer),
            )
        for step in range(last - first):
            key = (last - 1 - step) * KEYS
            stage = index % STAGES
            phase = ((index // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            load_async(k_desc, [head * cache_slots + key, 0], k_full.index(stage), k_smem.index(stage))
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            if FP8:
                value = [head * value_rows, key]
            else:
                value = [head * value_rows + key, 0]
            load_async(v_desc, value, v_full.index(stage), v_smem.index(stage))
            index += 1


@gluon.jit
def sum_own(p):
    """Sum along rows what each thread holds itself: [M, N] becomes [M, 4], the sums of the 4 threads of a row."""
    parts = p.reshape([p.shape[0], p.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(parts, 3), 1)


@gluon.jit
def pack_weights(p, FP8: gl.constexpr, dtype: gl.constexpr):
    """Round weights, and for e4m3 pack the 4 of each group of 16 columns that a thread holds into an int32."""
    if FP8:
        even, odd = gl.split(p.reshape([p.shape[0], p.shape[1] // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]))
        low_even, high_even = gl.split(even)
        low_odd, high_odd = gl.split(odd)
        return gl.inline_asm_elementwise(
            PACK_E4M3, "=r,r,r,r,r", [low_even, low_odd, high_even, high_odd], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return p.to(dtype)


@gluon.jit
def as_operand(p, FP8: gl.constexpr, layout: gl.constexpr):
    """Make packed weights an operand of the next product without moving any between threads.

    For e4m3 an operand's thread holds 4 columns in a row where a result's holds 2 and 2, so the columns are permuted in
    groups of 16; the values' columns are stored permuted likewise.
    """
    if FP8:
        low = gl.join((p & 255).to(gl.int8), ((p >> 8) & 255).to(gl.int8))
        high = gl.join(((p >> 16) & 255).to(gl.int8), ((p >> 24) & 255).to(gl.int8))
        joined = gl.join(low, high).permute([0, 1, 2, 4, 3]).reshape([p.shape[0], p.shape[1] * 16])
        return gl.convert_layout(joined.to(gl.float8e4nv, bitcast=True), layout)
    else:
        return gl.convert_layout(p, layout)


@gluon.jit
def consume_tiles(
    buffers,
    barriers,
    plan,
    geometry,
    outputs,
    valid_ptr,
    consumer: gl.constexpr,
    STAGES: gl.constexpr,
    FP8: gl.constexpr,
    TURNS: gl.constexpr,
    EMULATED: gl.constexpr,
):
    """Attend 64 queries a part to the part's keys; a whole tile ends in out, a piece of one in the workspace."""
    program, programs, tiles, segment_tiles, first_blocks, second_blocks = plan
    segments, segment_tokens, row_tiles, _q_head_row, _q_head_column, cache_slots, _value_rows = geometry
    out_ptr, out_head, out_row, workspace_ptr, statistics_ptr, factors_ptr, value_scales_ptr, scale = outputs
    q_smem, k_smem, v_smem = buffers
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    dtype: gl.constexpr = q_smem.dtype
    layout: gl.constexpr = result_layout(dtype.primitive_bitwidth)
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, k_width=32 // dtype.primitive_bitwidth)
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    columns = gl.arange(0, KEYS, gl.SliceLayout(0, layout))
    nothing = gl.zeros([ROWS, D], gl.float32, layout)
    q = q_smem.index(consumer)

    index = 0
    turn = 0
    parts = count_parts(program, programs, tiles, segment_tiles, first_blocks, second_blocks)
    for part in range(parts):
        tile, first, last, blocks = find_part(
            part, program, programs, tiles, segment_tiles, first_blocks, second_blocks
        )
        segment = segments - 1 - tile // segment_tiles
        head = tile % segment_tiles // row_tiles
        valid, _ = count_blocks(valid_ptr, segment, cache_slots, KEYS)
        if FP8:
            factor = gl.load(factors_ptr + head)
        else:
            factor = scale

        mbarrier.wait(q_full.index(consumer), part & 1)
        stage = index % STAGES
        mbarrier.wait(k_full.index(stage), (index // STAGES) & 1)
        s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(stage))
        s = gl.where((columns + (last - 1) * KEYS < valid)[None, :], s, float("-inf"))
        top = gl.max(s, 1)
        shifted = top * factor - P_SHIFT if FP8 else top * factor
        p = gl.exp2(s * factor - shifted[:, None])
        total = sum_own(p)
        p = pack_weights(p, FP8, dtype)
        acc = nothing
        last_decay = gl.full([ROWS], 1.0, gl.float32, rows)

        steps = last - first - 1
        next_stage = (index + 1) % STAGES
        mbarrier.wait(k_full.index(next_stage), ((index + 1) // STAGES) & 1, pred=steps > 0)
        for step in range(steps):
            if TURNS:
                mbarrier.wait(turns.index(consumer), (turn & 1) ^ (1 - consumer))
            s = warpgroup_mma(q, k_smem.index(next_stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(stage), (index // STAGES) & 1)
            if FP8:
                product = warpgroup_mma(
                    as_operand(p, FP8, operand),
                    v_smem.index(stage).permute((1, 0)),
                    nothing,
                    use_acc=False,
                    is_async=True,
                )
            else:
                product = warpgroup_mma(as_operand(p, FP8, operand), v_smem.index(stage), acc, is_async=True)
            if TURNS:
                mbarrier.arrive(turns.index(1 - consumer))
            s = warpgroup_mma_wait(1, deps=[s])
            mbarrier.arrive(k_empty.index(next_stage))
            new_top = gl.maximum(top, gl.max(s, 1))
            decay = gl.exp2((top - new_top) * factor)
            top = new_top
            shifted = top * factor - P_SHIFT if FP8 else top * factor
            weights = exp2_shifted(s, factor, shifted, EMULATED, 2 if FP8 else 3)
            total = total * gl.convert_layout(decay, gl.SliceLayout(1, total.type.layout))[:, None] + sum_own(weights)
            # Waiting here for the keys of the next step keeps ptxas from waiting for the product before all of the above.
            later_stage = (index + 2) % STAGES
            mbarrier.wait(k_full.index(later_stage), ((index + 2) // STAGES) & 1, pred=step + 1 < steps)
            product, weights = warpgroup_mma_wait(0, deps=[product, weights])
            mbarrier.arrive(v_empty.index(stage))
            if FP8:
                acc = acc * last_decay[:, None] + product
                last_decay = decay
            else:
                acc = product * decay[:, None]
            p = pack_weights(weights, FP8, dtype)
            index += 1
            turn += 1
            stage = next_stage
            next_stage = later_stage

        mbarrier.arrive(q_empty.index(consumer))
        mbarrier.wait(v_full.index(stage), (index // STAGES) & 1)
        if FP8:
            product = warpgroup_mma(
                as_operand(p, FP8, operand), v_smem.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            acc = acc * last_decay[:, None] + warpgroup_mma_wait(0, deps=[product])
        else:
            product = warpgroup_mma(as_operand(p, FP8, operand), v_smem.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[product])
        mbarrier.arrive(v_empty.index(stage))
        index += 1

        own_total = gl.convert_layout(gl.sum(total, 1), rows)
        lanes = gl.arange(0, ROWS, rows)
        column = gl.arange(0, D, gl.SliceLayout(0, layout))
        if last - first == blocks:
            token = tile % row_tiles * (2 * ROWS) + consumer * ROWS + lanes
            inverse = 1.0 / own_total
            if FP8:
                inverse = inverse * gl.load(value_scales_ptr + head)
            place = (
                out_ptr
                + head.to(gl.int64) * out_head
                + (segment * segment_tokens + token).to(gl.int64)[:, None] * out_row
            )
            result = (acc * inverse[:, None]).to(out_ptr.dtype.element_ty)
            gl.store(place + column[None, :], result, mask=(token < segment_tokens)[:, None])
        else:
            slot = program * 2 + gl.where(first == 0, 1, 0)
            line = slot * (2 * ROWS) + consumer * ROWS + lanes
            gl.store(workspace_ptr + line[:, None] * D + column[None, :], acc)
            gl.store(statistics_ptr + line * 2, top * factor)
            gl.store(statistics_ptr + line * 2 + 1, own_total)


@gluon.jit(do_not_specialize=SIZES)
def attention_kernel(
    q_desc,
    k_desc,
    v_desc,
    valid_ptr,
    out_ptr,
    workspace_ptr,
    statistics_ptr,
    factors_ptr,
    value_scales_ptr,
    scale,
    segment_tokens,
    row_tiles,
    heads,
    q_head_row,
    q_head_column,
    cache_slots,
    value_rows,
    out_head,
    out_row,
    SEGMENTS: gl.constexpr,
    STAGES: gl.constexpr,
    FP8: gl.constexpr,
    TURNS: gl.constexpr,
    EMULATED: gl.constexpr,
):
    """Attend all queries; what is cut between programs is left in the workspace for `combine_kernel`."""
    segment_tiles = row_tiles * heads
    _, first_blocks = count_blocks(valid_ptr, SEGMENTS - 1, cache_slots, KEYS)
    _, second_blocks = count_blocks(valid_ptr, 0, cache_slots, KEYS)
    tiles = segment_tiles * SEGMENTS
    plan = (gl.program_id(0), gl.num_programs(0), tiles, segment_tiles, first_blocks, second_blocks)
    geometry = (SEGMENTS, segment_tokens, row_tiles, q_head_row, q_head_column, cache_slots, value_rows)
    outputs = (out_ptr, out_head, out_row, workspace_ptr, statistics_ptr, factors_ptr, value_scales_ptr, scale)

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
        mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()

    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)
    buffers = (q_smem, k_smem, v_smem)
    gl.warp_specialize(
        [
            (
                consume_tiles,
                (buffers, barriers, plan, geometry, outputs, valid_ptr, gl.constexpr(0), STAGES, FP8, TURNS, EMULATED),
            ),
            (
                consume_tiles,
                (buffers, barriers, plan, geometry, outputs, valid_ptr, gl.constexpr(1), STAGES, FP8, TURNS, EMULATED),
            ),
            (load_tiles, (q_desc, k_desc, v_desc, buffers, barriers, plan, geometry, STAGES, FP8)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit(do_not_specialize=SIZES)
def combine_kernel(
    valid_ptr,
    out_ptr,
    workspace_ptr,
    statistics_ptr,
    value_scales_ptr,
    programs,
    segment_tokens,
    row_tiles,
    heads,
    cache_slots,
    out_head,
    out_row,
    SEGMENTS: gl.constexpr,
    FP8: gl.constexpr,
    LINES: gl.constexpr,
):
    """Combine what several programs of `attention_kernel` found for one tile."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    segment_tiles = row_tiles * heads
    tiles = segment_tiles * SEGMENTS
    _, first_blocks = count_blocks(valid_ptr, SEGMENTS - 1, cache_slots, KEYS)
    _, second_blocks = count_blocks(valid_ptr, 0, cache_slots, KEYS)
    whole = tiles // programs * programs
    tile = whole + gl.program_id(0)
    base = units_before(whole, segment_tiles, first_blocks, second_blocks)
    rest = units_before(tiles, segment_tiles, first_blocks, second_blocks) - base
    start = units_before(tile, segment_tiles, first_blocks, second_blocks) - base
    end = units_before(tile + 1, segment_tiles, first_blocks, second_blocks) - base
    first_program = ((start + 1) * programs - 1) // rest
    last_program = (end * programs - 1) // rest
    if first_program < last_program:
        lanes = gl.program_id(1) * LINES + gl.arange(0, LINES, gl.SliceLayout(1, layout))
        column = gl.arange(0, D, gl.SliceLayout(0, layout))
        top = gl.full([LINES], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
        total = gl.full([LINES], 0.0, gl.float32, gl.SliceLayout(1, layout))
        acc = gl.zeros([LINES, D], gl.float32, layout)
        for program in range(first_program, last_program + 1):
            slot = program * 2 + gl.where(rest * program // programs <= start, 1, 0)
            line = slot * (2 * ROWS) + lanes
            # With fewer units than programs, some programs in between have none.
            busy = (rest * program // programs < rest * (program + 1) // programs) & (lanes >= 0)
            part_top = gl.load(statistics_ptr + line * 2, mask=busy, other=float("-inf"))
            part_total = gl.load(statistics_ptr + line * 2 + 1, mask=busy, other=0.0)
            part = gl.load(workspace_ptr + line[:, None] * D + column[None, :], mask=busy[:, None], other=0.0)
            new_top = gl.maximum(top, part_top)
            decay = gl.exp2(top - new_top)
            weight = gl.exp2(part_top - new_top)
            total = total * decay + part_total * weight
            acc = acc * decay[:, None] + part * weight[:, None]
            top = new_top
        head = tile % segment_tiles // row_tiles
        segment = SEGMENTS - 1 - tile // segment_tiles
        token = tile % row_tiles * (2 * ROWS) + lanes
        inverse = 1.0 / total
        if FP8:
            inverse = inverse * gl.load(value_scales_ptr + head)
        place = (
            out_ptr + head.to(gl.int64) * out_head + (segment * segment_tokens + token).to(gl.int64)[:, None] * out_row
        )
        result = (acc * inverse[:, None]).to(out_ptr.dtype.element_ty)
        gl.store(place + column[None, :], result, mask=(token < segment_tokens)[:, None])
