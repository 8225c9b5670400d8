"""Launch self-attention on a GPU: the write to the cache, in 16 bits or as codes, then attention.

From the projections (`dit_ops.projected_attention`), or, where ranks exchanged heads, from queries, keys and values
that are normalised and rotated (`segmented_attention`).
"""

from __future__ import annotations

import torch
import triton

from causal_forcing.plugins.fp8_attention_ops import SLOT_GROUP
from causal_forcing.plugins.kernels.hopper_launch import (
    LOG2_E,
    accepts,
    attend,
    attend_fp8,
    count_programs,
    workspace_bytes,
)
from causal_forcing.plugins.kernels.placement_launch import Norms, place_projections
from causal_forcing.plugins.kernels.projections import place_values_kernel

_VALUE_COLUMNS = 64
"""Columns of the values' cache that a program fills."""


def launch_projected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    valid_slots: torch.Tensor,
    heads: int,
    eps: float,
    scale: float,
) -> torch.Tensor | None:
    """Run `dit_ops.projected_attention`; None where the projections' last axis is not dense."""
    if any(tensor.stride(2) != 1 for tensor in (q, k, v)):
        return None
    batch, tokens, dim = q.shape
    queries = torch.empty((batch, tokens, heads, dim // heads), dtype=q.dtype, device=q.device)
    norms = (q_weight, k_weight, cos, sin)
    by_head, out = queries.transpose(1, 2), torch.empty_like(queries)
    if _accepts(by_head, k_cache, v_cache, valid_slots, out.transpose(1, 2)):
        place_projections(q, k, v, norms, queries, k_cache, v_cache, slots=slots, eps=eps)
        attend(by_head, k_cache, v_cache, valid_slots, out.transpose(1, 2), workspace(q.device), scale=scale)
        return out.view(batch, tokens, dim)
    from causal_forcing.plugins.dit_ops import segmented_attention, split_heads

    keys = out.transpose(1, 2)  # which KVCacheAttention's own kernel writes to the cache
    place_projections(q, k, v, norms, queries, keys, None, slots=None, eps=eps)
    attended = segmented_attention(by_head, keys, split_heads(v, heads), k_cache, v_cache, slots, valid_slots, scale)
    return attended.transpose(1, 2).reshape(batch, tokens, dim)


def launch_segmented_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    valid_slots: torch.Tensor,
    scale: float,
) -> torch.Tensor | None:
    """Run `dit_ops.segmented_attention`; None where the GPU or the tensors are not for the kernel."""
    batch, heads, tokens, depth = q.shape
    out = torch.empty((batch, tokens, heads, depth), dtype=q.dtype, device=q.device).transpose(1, 2)
    if not (_accepts(q, k_cache, v_cache, valid_slots, out) and all(map(_is_rows, (k, v)))):
        return None
    place_projections(_rows(k), _rows(k), _rows(v), None, None, k_cache, v_cache, slots=slots, eps=0.0)
    attend(q, k_cache, v_cache, valid_slots, out, workspace(q.device), scale=scale)
    return out


def launch_projected_attention_fp8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    valid_slots: torch.Tensor,
    heads: int,
    eps: float,
    scale: float,
    head_scales: torch.Tensor,
    k_offset: torch.Tensor,
) -> torch.Tensor | None:
    """Run `fp8_attention_ops.projected_attention_fp8`; None where the GPU or the tensors are not for the kernel."""
    norms = (q_weight, k_weight, cos, sin)
    return _attend_codes(q, k, v, norms, k_cache, v_cache, slots, valid_slots, heads, eps, scale, head_scales, k_offset)


def launch_segmented_attention_fp8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    valid_slots: torch.Tensor,
    scale: float,
    head_scales: torch.Tensor,
    k_offset: torch.Tensor,
) -> torch.Tensor | None:
    """Run `fp8_attention_ops.segmented_attention_fp8`; None where the GPU or the tensors are not for the kernel."""
    if not all(map(_is_rows, (q, k, v))):
        return None
    batch, heads, tokens, depth = q.shape
    places = (k_cache, v_cache, slots, valid_slots)
    codes = (head_scales, k_offset)
    attended = _attend_codes(_rows(q), _rows(k), _rows(v), None, *places, heads, 0.0, scale, *codes)
    return None if attended is None else attended.view(batch, tokens, heads, depth).transpose(1, 2)


def _attend_codes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    norms: Norms | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    valid_slots: torch.Tensor,
    heads: int,
    eps: float,
    scale: float,
    head_scales: torch.Tensor,
    k_offset: torch.Tensor,
) -> torch.Tensor | None:
    """Write codes of q, k, v [B, L, N·D] where attention reads them, and attend."""
    batch, tokens, dim = q.shape
    queries = torch.empty((batch, tokens, heads, dim // heads), dtype=k_cache.dtype, device=q.device)
    out = torch.empty_like(queries, dtype=q.dtype)
    by_head, out_by_head = queries.transpose(1, 2), out.transpose(1, 2)
    if any(tensor.stride(2) != 1 for tensor in (q, k, v)) or not _accepts(
        by_head, k_cache, v_cache, valid_slots, out_by_head
    ):
        return None
    codes = (head_scales[0], head_scales[1], k_offset)
    place_projections(q, k, v, norms, queries, k_cache, None, slots=slots, eps=eps, codes=codes)
    tokens_per_frame = tokens // slots.shape[0]
    place_values_kernel[(triton.cdiv(tokens_per_frame + SLOT_GROUP - 1, _VALUE_COLUMNS), slots.shape[0], heads)](
        *(v, slots, head_scales[2], v_cache, v.stride(1), tokens_per_frame, k_cache.shape[2], v_cache.shape[3]),
        D=dim // heads,
        PADDED_D=triton.next_power_of_2(dim // heads),
        COLUMNS=_VALUE_COLUMNS,
        num_warps=4,
    )
    attend_fp8(
        *(by_head, k_cache, v_cache, valid_slots, out_by_head, workspace(q.device)),
        factors=head_scales[0] * head_scales[1] * (scale * LOG2_E),
        value_scales=head_scales[2],
    )
    return out.view(batch, tokens, dim)


def _accepts(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, valid_slots: torch.Tensor, out: torch.Tensor
) -> bool:
    return accepts(q, k_cache, v_cache, valid_slots, out, capability=torch.cuda.get_device_capability(q.device))


def _is_rows(x: torch.Tensor) -> bool:
    """Say whether [B, N, L, D] lies in memory with a token's heads beside each other."""
    return x.stride(3) == 1 and x.stride(1) == x.shape[3]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return such a tensor as [B, L, N·D]."""
    return x.transpose(1, 2).flatten(2)


def workspace(device: torch.device) -> torch.Tensor:
    """Return room for the attention kernels' partial sums: of a graph's own pool while one is captured."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.empty(workspace_bytes(count_programs(index)), dtype=torch.uint8, device=device)
