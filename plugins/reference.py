"""KVCacheAttention in plain PyTorch: the oracle that every other body is compared with."""

from __future__ import annotations

import torch


def kv_cache_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    valid_slots: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Write k and v into their slots of the caches, in place, and attend q to the valid slots.

    Args:
        q: [B, N, L, D] float, any device.
        k: [B, N, L, D], as q.
        v: [B, N, L, D], as q.
        k_cache: [B, N, S, D], as q; changed in place.
        v_cache: [B, N, S, D], as q; changed in place.
        slots: [F] int32, first slot of each frame of the chunk.
        valid_slots: [B] int32, number of slots attended to.
        scale: Factor on q·k.

    Returns:
        [B, N, L, D], as q.
    """
    own_slots = token_slots(slots, q.shape[2])
    k_cache.index_copy_(2, own_slots, k)
    v_cache.index_copy_(2, own_slots, v)
    return attend(q, k_cache, v_cache, valid_slots, scale)


def attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, valid_slots: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attend q to the valid slots of caches that are written already; shapes as of `kv_cache_attention`."""
    positions = torch.arange(k_cache.shape[2], device=q.device)
    mask = positions[None, None, None, :] < valid_slots[:, None, None, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k_cache, v_cache, attn_mask=mask, scale=scale)


def token_slots(slots: torch.Tensor, tokens: int) -> torch.Tensor:
    """Expand [F] first slots of frames to [L] slots of tokens, int64."""
    tokens_per_frame = tokens // slots.shape[0]
    offsets = torch.arange(tokens_per_frame, device=slots.device)
    return (slots.to(torch.int64)[:, None] + offsets).flatten()
