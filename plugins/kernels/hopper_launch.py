"""Launches the sm_90a attention kernels over torch tensors: no allocation, no synchronisation, safe to capture."""

from __future__ import annotations

import functools

import torch
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from causal_forcing.plugins.kernels.hopper_attention import attention_kernel, combine_kernel

LOG2_E = 1.4426950408889634
HEAD_DIM = 128
TILE_QUERIES = 128
TILE_KEYS = 128
COMBINE_LINES = 16
_SLOT_FLOATS = 2 * TILE_QUERIES * (HEAD_DIM + 2)
_STAGES = {1: 4, 2: 2}
"""Blocks of keys, and as many of values, in shared memory at a time, by bytes of an element."""


@functools.cache
def count_programs(device: int) -> int:
    """Return the programs of the persistent grid: one for each multiprocessor of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def workspace_bytes(programs: int) -> int:
    """Return the size of the workspace: two pieces of a tile for each program, with their maxima and sums."""
    return programs * _SLOT_FLOATS * 4


def split_v(values: torch.Tensor, *, columns: int | None = None) -> torch.Tensor:
    """Convert values to the layout that `attend_fp8` reads.

    Values are transposed, and the slots of each group of 16 permuted: slot 16a + 8b + 2t + e (b, e in 0..1, t in 0..3)
    is column 16a + 4t + 2b + e. So the slots 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 are the columns
    0 1 4 5 8 9 12 13 2 3 6 7 10 11 14 15.

    Args:
        values: [B, N, S, D].
        columns: S', a multiple of 16 from S on; None for the least.

    Returns:
        [B, N, D, S'], contiguous, of the type of values; columns of slots from S on are 0.
    """
    batch, heads, slots, head_dim = values.shape
    columns = -(-slots // 16) * 16 if columns is None else columns
    padded = values.new_zeros(batch, heads, columns, head_dim)
    padded[:, :, :slots] = values
    groups = padded.view(batch, heads, columns // 16, 2, 4, 2, head_dim)
    return groups.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, heads, head_dim, columns)


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    valid: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor,
    *,
    scale: float,
) -> None:
    """Attend to the first slots of a cache."""
    _launch(q, k_cache, v_cache, valid, out, workspace, scale=scale * LOG2_E, fp8=None)


def attend_fp8(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    valid: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor,
    *,
    factors: torch.Tensor,
    value_scales: torch.Tensor,
) -> None:
    """Attend to the first slots of a cache in e4m3."""
    _launch(q, k_cache, v_cache, valid, out, workspace, scale=0.0, fp8=(factors, value_scales))


def _launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    valid: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor,
    *,
    scale: float,
    fp8: tuple[torch.Tensor, torch.Tensor] | None,
    turns: bool = True,
    stages: int | None = None,
    emulated: int = 0,
) -> None:
    _, heads, tokens, _ = q.shape
    segments, slots = valid.shape[0], k_cache.shape[2]
    programs = count_programs(q.device.index)
    floats = workspace.view(torch.float32)
    pieces = floats[: programs * 2 * TILE_QUERIES * HEAD_DIM]
    statistics = floats[programs * 2 * TILE_QUERIES * HEAD_DIM :]
    factors, value_scales = fp8 or (statistics, statistics)
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=q.itemsize * 8, rank=2)
    if q.stride(1) == HEAD_DIM:  # heads beside each other in a row
        q_rows, q_width, q_row, head_row, head_column = tokens, heads * HEAD_DIM, q.stride(2), 0, HEAD_DIM
    else:
        head_row, head_column, q_row, q_width = q.stride(1) // q.stride(2), 0, q.stride(2), HEAD_DIM
        q_rows = (heads - 1) * head_row + tokens
    v_rows, v_width = (HEAD_DIM, v_cache.shape[3]) if fp8 else (slots, HEAD_DIM)
    block = [TILE_KEYS, HEAD_DIM]
    row_tiles = -(-(tokens // segments) // TILE_QUERIES)
    attention_kernel[(programs,)](
        TensorDescriptor(q, [q_rows, q_width], [q_row, 1], [TILE_QUERIES // 2, HEAD_DIM], layout),
        TensorDescriptor(k_cache, [heads * slots, HEAD_DIM], [HEAD_DIM, 1], block, layout),
        TensorDescriptor(v_cache, [heads * v_rows, v_width], [v_width, 1], block, layout),
        *(valid, out, pieces, statistics, factors, value_scales, scale),
        *(tokens // segments, row_tiles, heads, head_row, head_column, slots, v_rows, out.stride(1), out.stride(2)),
        SEGMENTS=segments,
        STAGES=stages or _STAGES[q.itemsize],
        FP8=fp8 is not None,
        TURNS=turns,
        EMULATED=emulated,
        num_warps=4,
    )
    rest = row_tiles * heads * segments % programs
    if rest:
        combine_kernel[(rest, TILE_QUERIES // COMBINE_LINES)](
            *(valid, out, pieces, statistics, value_scales, programs, tokens // segments, row_tiles, heads, slots),
            *(out.stride(1), out.stride(2)),
            SEGMENTS=segments,
            FP8=fp8 is not None,
            LINES=COMBINE_LINES,
            num_warps=4,
        )
