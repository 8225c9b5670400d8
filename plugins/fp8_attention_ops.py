"""Attention over a KV cache of e4m3 codes, as fused ops.

Queries, keys and values have a static scale a head; keys are stored less an offset a channel, which attention does not
notice: it adds the same to all of a query's products. Values are stored transposed, their slots in the order in which
the tensor cores of a Hopper GPU take them, so that a tile needs no shuffle (`value_column`).
"""

from __future__ import annotations

import torch

from causal_forcing.plugins import reference
from causal_forcing.plugins.dit_ops import norm_rope, split_heads
from causal_forcing.plugins.fp8_ops import quantize_e4m3
from causal_forcing.plugins.fused_op import fused_op, kernel_of

SLOT_GROUP = 16
"""Slots whose order is changed among themselves."""


def value_column(slot: torch.Tensor) -> torch.Tensor:
    """Return where a slot's values lie: slot 16a + 8b + 2t + e at column 16a + 4t + 2b + e (b, e < 2; t < 4)."""
    return slot // 16 * 16 + slot % 8 // 2 * 4 + slot % 16 // 8 * 2 + slot % 2


@fused_op(kernel=kernel_of("projected_launch", "launch_segmented_attention_fp8"), mutates=("k_cache", "v_cache"))
def segmented_attention_fp8(
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
) -> torch.Tensor:
    """Run KVCacheAttention on e4m3 caches, for one segment after the other.

    Args:
        q: [B, N, L, D], the carrier type, after norm and RoPE.
        k: [B, N, L, D], likewise.
        v: [B, N, L, D].
        k_cache: [B, N, S, D] e4m3, changed in place.
        v_cache: [B, N, D, S'] e4m3, changed in place; S' is S rounded up to `SLOT_GROUP`.
        slots: [G·F] int32, first slot of each frame of every segment.
        valid_slots: [B] int32, or [G] where B is 1; see `dit_ops.projected_attention`.
        scale: Factor on q·k.
        head_scales: [3, N] fp32: what a code of 1 stands for in queries, keys and values.
        k_offset: [N, D] fp32, taken off the keys.

    Returns:
        [B, N, L, D], the carrier type.
    """
    q_scale, k_scale, v_scale = (scales[:, None, None] for scales in head_scales)
    slot = reference.token_slots(slots, q.shape[2])
    k_codes = quantize_e4m3(k.float() - k_offset[:, None], k_scale)
    v_codes = quantize_e4m3(v, v_scale).transpose(2, 3)
    # As bytes, since torch does not index e4m3 everywhere.
    k_cache.view(torch.uint8).index_copy_(2, slot, k_codes.view(torch.uint8))
    v_cache.view(torch.uint8).index_copy_(3, value_column(slot), v_codes.contiguous().view(torch.uint8))
    keys = (k_cache.float() * k_scale).to(q.dtype)
    columns = value_column(torch.arange(k_cache.shape[2], device=slots.device))
    values = (v_cache.float()[..., columns].transpose(2, 3) * v_scale).to(q.dtype)
    queries = (quantize_e4m3(q, q_scale).float() * q_scale).to(q.dtype)
    segments = max(1, valid_slots.shape[0] // q.shape[0])
    attended = [
        reference.attend(chunk, keys, values, valid, scale)
        for chunk, valid in zip(queries.chunk(segments, dim=2), valid_slots.chunk(segments), strict=True)
    ]
    return torch.cat(attended, dim=2) if segments > 1 else attended[0]


@fused_op(kernel=kernel_of("projected_launch", "launch_projected_attention_fp8"), mutates=("k_cache", "v_cache"))
def projected_attention_fp8(
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
) -> torch.Tensor:
    """Run `segmented_attention_fp8` on what the projections gave, as `dit_ops.projected_attention` does its own.

    Returns:
        [B, L, N·D], the carrier type.
    """
    queries, keys = norm_rope(q, q_weight, cos, sin, heads, eps), norm_rope(k, k_weight, cos, sin, heads, eps)
    attended = segmented_attention_fp8(
        queries, keys, split_heads(v, heads), k_cache, v_cache, slots, valid_slots, scale, head_scales, k_offset
    )
    return attended.transpose(1, 2).flatten(2)
