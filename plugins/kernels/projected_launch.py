"""Launch what `dit_ops.projected_attention` is on a GPU: norms, RoPE and the cache write, then attention."""

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
from causal_forcing.plugins.kernels.projections import place_projections_kernel, place_values_kernel

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
    capability = torch.cuda.get_device_capability(q.device)
    if accepts(by_head, k_cache, v_cache, valid_slots, out.transpose(1, 2), capability=capability):
        place_projections(q, k, v, *norms, queries, k_cache, v_cache, slots=slots, eps=eps)
        attend(by_head, k_cache, v_cache, valid_slots, out.transpose(1, 2), workspace(q.device), scale=scale)
        return out.view(batch, tokens, dim)
    from causal_forcing.plugins.dit_ops import segmented_attention, split_heads

    keys = out.transpose(1, 2)  # which KVCacheAttention's own kernel writes to the cache
    place_projections(q, k, v, *norms, queries, keys, None, slots=None, eps=eps)
    attended = segmented_attention(by_head, keys, split_heads(v, heads), k_cache, v_cache, slots, valid_slots, scale)
    return attended.transpose(1, 2).reshape(batch, tokens, dim)


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
    batch, tokens, dim = q.shape
    queries = torch.empty((batch, tokens, heads, dim // heads), dtype=k_cache.dtype, device=q.device)
    out = torch.empty_like(queries, dtype=q.dtype)
    by_head, out_by_head = queries.transpose(1, 2), out.transpose(1, 2)
    capability = torch.cuda.get_device_capability(q.device)
    if any(tensor.stride(2) != 1 for tensor in (q, k, v)) or not accepts(
        by_head, k_cache, v_cache, valid_slots, out_by_head, capability=capability
    ):
        return None
    place_projections(
        *(q, k, v, q_weight, k_weight, cos, sin, queries, k_cache, None),
        slots=slots,
        eps=eps,
        codes=(head_scales[0], head_scales[1], k_offset),
    )
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


def workspace(device: torch.device) -> torch.Tensor:
    """Return room for the attention kernels' partial sums: of a graph's own pool while one is captured."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.empty(workspace_bytes(count_programs(index)), dtype=torch.uint8, device=device)


def place_projections(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    queries: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    *,
    slots: torch.Tensor | None,
    eps: float,
    codes: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Launch `place_projections_kernel`.

    Args:
        q: [B, L, N·D], last axis dense; k and v likewise.
        k: See q.
        v: See q.
        q_weight: [N·D], of the queries' norm.
        k_weight: [N·D], of the keys' norm.
        cos: [L, D/2] fp32.
        sin: [L, D/2] fp32.
        queries: [B, L, N, D], contiguous; written.
        k_cache: [B, N, S, D], last axis dense; written.
        v_cache: [B, N, S, D], with the strides of k_cache; None leaves values alone.
        slots: First slot of each frame; None puts token i into slot i.
        eps: Of the norms.
        codes: For e4m3 queries and keys: their scales [N] and the keys' offset [N, D], fp32.
    """
    batch, tokens, dim = q.shape
    q_scale, k_scale, k_offset = codes or (cos, cos, cos)
    frames = 1 if slots is None else slots.shape[0]
    place_projections_kernel[(tokens, 2 if v_cache is None else 3, batch)](
        *(q, k, v, q_weight, k_weight, cos, sin, cos if slots is None else slots, queries, k_cache),
        *(
            k_cache if v_cache is None else v_cache,
            q_scale,
            k_scale,
            k_offset,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
        ),
        *(queries.stride(0), *k_cache.stride()[:3], tokens // frames, k_cache.shape[2], eps),
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        D=queries.shape[3],
        HAS_SLOTS=slots is not None,
        FP8=codes is not None,
        num_warps=4,
    )
