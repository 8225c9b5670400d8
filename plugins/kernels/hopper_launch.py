"""Launch attention for Hopper GPUs over torch tensors: two kernels, no allocation, no synchronisation.

`attend` takes bf16 or fp16 and `attend_fp8` e4m3, whose values lie in memory as `split_v` lays them. The first launch
of a type compiles; so run once before capturing a graph. One captured launch serves every fill level of the cache.
"""

from __future__ import annotations

import functools
import importlib
import math
from types import ModuleType

import torch

LOG2_E = math.log2(math.e)
HEAD_DIM = 128
TILE_QUERIES = 128
TILE_KEYS = 128
MAX_SEGMENTS = 2
MAX_PROGRAMS = 256
"""Multiprocessors that the second kernel can look through; an H100 has 132 at most."""
COMBINED_QUERIES = 16
"""Queries that a program of the second kernel combines."""
_STAGES = {1: 4, 2: 3}
"""Blocks of keys, and as many of values, in shared memory at a time, by the bytes of an element."""
_ALIGNED_BYTES = 16
"""What TMA asks of addresses and strides."""


@functools.cache
def _attention() -> ModuleType | None:
    """Import the first kernel; None where Triton is missing or too old for it."""
    try:
        return importlib.import_module("causal_forcing.plugins.kernels.hopper_attention")
    except (ImportError, AttributeError):
        return None


@functools.cache
def count_programs(device: int) -> int:
    """Return how many programs attend on a CUDA device: one for each multiprocessor."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def workspace_bytes(programs: int) -> int:
    """Return the size of the workspace.

    For each program it holds two pieces of a tile, with a maximum and a sum for each query, and its part of the
    schedule.
    """
    return programs * 2 * TILE_QUERIES * (HEAD_DIM + 2) * 4 + (programs + 4) * 4


def split_v(values: torch.Tensor, *, columns: int | None = None) -> torch.Tensor:
    """Lay out values as `attend_fp8` reads them: transposed, the slots of every group of 16 split among 4 threads.

    Slot 16a + 8b + 2t + e, with b and e in 0..1 and t in 0..3, becomes column 16a + 4t + 2b + e: slots 0 to 15 become
    the columns 0 1 4 5 8 9 12 13 2 3 6 7 10 11 14 15.

    Args:
        values: [B, N, S, D].
        columns: S', a multiple of 16 from S on; None for the smallest.

    Returns:
        [B, N, D, S'], contiguous, the dtype of values; 0 from slot S on.
    """
    batch, heads, slots, head_dim = values.shape
    columns = columns or -(-slots // 16) * 16
    padded = values.new_zeros(batch, heads, columns, head_dim)
    padded[:, :, :slots] = values
    groups = padded.view(batch, heads, columns // 16, 2, 4, 2, head_dim)
    return groups.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, heads, head_dim, columns)


def accepts(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    valid: torch.Tensor,
    out: torch.Tensor,
    *,
    capability: tuple[int, int],
) -> bool:
    """Say whether `attend`, or for e4m3 `attend_fp8`, can run these on a GPU of this compute capability."""
    batch, heads, tokens, head_dim = q.shape
    fp8 = q.dtype == torch.float8_e4m3fn
    slots = k_cache.shape[2]
    v_shape = (1, heads, head_dim, v_cache.shape[3]) if fp8 else (1, heads, slots, head_dim)
    segments = valid.shape[0]
    return (
        capability == (9, 0)
        and batch == 1
        and head_dim == HEAD_DIM
        and q.dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
        and k_cache.dtype == v_cache.dtype == q.dtype
        and out.dtype in ((torch.bfloat16, torch.float16, torch.float8_e4m3fn) if fp8 else (q.dtype,))
        and valid.dtype == torch.int32
        and 1 <= segments <= MAX_SEGMENTS
        and tokens % segments == 0
        and k_cache.shape == (1, heads, slots, head_dim)
        and v_cache.shape == v_shape
        and (not fp8 or (v_cache.shape[3] >= slots and v_cache.shape[3] % 16 == 0))
        and k_cache.is_contiguous()
        and v_cache.is_contiguous()
        and valid.is_contiguous()
        and out.shape == q.shape
        and out.stride(3) == 1
        and _loads_queries(q)
        and all(tensor.data_ptr() % _ALIGNED_BYTES == 0 for tensor in (q, k_cache, v_cache))
        and _attention() is not None
    )


def _loads_queries(q: torch.Tensor) -> bool:
    """Say whether a head's queries are a box of a matrix: heads beside each other in a row, or below each other."""
    _, head, row, column = q.stride()
    aligned = row * q.itemsize % _ALIGNED_BYTES == 0
    return column == 1 and aligned and row > 0 and (head == HEAD_DIM or (head > 0 and head % row == 0))


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
    """Attend to the first slots of a cache, on torch's current stream; only what `accepts` says yes to.

    The queries are as many equal segments as `valid` has elements, and each segment has a number of slots of its own.

    Args:
        q: [1, N, L, 128] bf16 or fp16.
        k_cache: [1, N, S, 128], as q, contiguous.
        v_cache: [1, N, S, 128], as q, contiguous. Whatever lies beyond the valid slots must be finite.
        valid: [G] int32, G 1 or 2; slots that each segment attends to, 1 at least.
        out: [1, N, L, 128], as q; written.
        workspace: [W] uint8, W from `workspace_bytes` for `count_programs` on; overwritten. Launches that follow each
            other on one stream can share it.
        scale: Factor on q·k, above 0.
    """
    _launch(q, k_cache, v_cache, valid, out, workspace, scale=scale * LOG2_E, head_scales=None)


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
    """Attend to the first slots of a cache in e4m3, accumulated in fp32; otherwise as `attend`.

    Args:
        q: [1, N, L, 128] e4m3.
        k_cache: [1, N, S, 128] e4m3, contiguous.
        v_cache: [1, N, 128, S'] e4m3, contiguous, in the layout of `split_v`.
        valid: [G] int32, as in `attend`.
        out: [1, N, L, 128] bf16, fp16 or e4m3; written.
        workspace: [W] uint8, as in `attend`.
        factors: [N] float32, above 0: scale of q times scale of k times the factor on q·k times log2(e).
        value_scales: [N] float32: scale of v, over that of out where out has one.
    """
    _launch(q, k_cache, v_cache, valid, out, workspace, scale=1.0, head_scales=(factors, value_scales))


def _launch(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    valid: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor,
    *,
    scale: float,
    head_scales: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from causal_forcing.plugins.kernels.hopper_combine import combine_kernel

    kernels = _attention()
    assert kernels is not None, "attention for Hopper needs Triton 3.6 or newer; ask accepts() first"
    _, heads, tokens, _ = q.shape
    segments, slots = valid.shape[0], k_cache.shape[2]
    segment_tokens = tokens // segments
    row_tiles = -(-segment_tokens // TILE_QUERIES)
    programs = count_programs(q.device.index)
    lines = programs * 2 * TILE_QUERIES
    pieces = workspace.view(torch.float32)
    statistics = pieces[lines * HEAD_DIM :]
    schedule = statistics[lines * 2 :].view(torch.int32)
    factors, value_scales = head_scales or (statistics, statistics)  # in the second case never read

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=q.itemsize * 8, rank=2)
    _, q_head, q_row, _ = q.stride()
    if q_head == HEAD_DIM:
        q_shape, head_row, head_column = [tokens, heads * HEAD_DIM], 0, HEAD_DIM
    else:
        head_row, head_column = q_head // q_row, 0
        q_shape = [(heads - 1) * head_row + tokens, HEAD_DIM]
    v_rows, v_width = (HEAD_DIM, v_cache.shape[3]) if head_scales else (slots, HEAD_DIM)
    block = [TILE_KEYS, HEAD_DIM]
    kernels.attention_kernel[(programs,)](
        TensorDescriptor(q, q_shape, [q_row, 1], [TILE_QUERIES // 2, HEAD_DIM], layout),
        TensorDescriptor(k_cache, [heads * slots, HEAD_DIM], [HEAD_DIM, 1], block, layout),
        TensorDescriptor(v_cache, [heads * v_rows, v_width], [v_width, 1], block, layout),
        *(valid, out, schedule, pieces, statistics, factors, value_scales, scale),
        *(segment_tokens, row_tiles, heads, slots, head_row, head_column, v_rows, *out.stride()[1:3]),
        SEGMENTS=segments,
        STAGES=_STAGES[q.itemsize],
        FP8=head_scales is not None,
        num_warps=4,
        enable_fp_fusion=True,  # Triton's default, which it means to change
    )
    # The longest segment alone fills these rounds; what else goes in whole rounds, only the device knows.
    shared_tiles = row_tiles * heads * segments - row_tiles * heads // programs * programs
    if shared_tiles:
        combine_kernel[(shared_tiles, TILE_QUERIES // COMBINED_QUERIES)](
            *(schedule, out, pieces, statistics, value_scales),
            *(programs, segment_tokens, row_tiles, heads, *out.stride()[1:3]),
            SEGMENTS=segments,
            FP8=head_scales is not None,
            LINES=COMBINED_QUERIES,
            TILE=TILE_QUERIES,
            D=HEAD_DIM,
            MAX_PROGRAMS=MAX_PROGRAMS,
            num_warps=4,
            enable_fp_fusion=True,
        )
