"""Launch what `dit_ops.projected_attention` is on a GPU: norms, RoPE and the cache write, then attention."""

from __future__ import annotations

import torch
import triton

from causal_forcing.plugins.kernels.projections import place_projections_kernel


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
    from causal_forcing.plugins.dit_ops import segmented_attention, split_heads

    batch, tokens, dim = q.shape
    queries = torch.empty((batch, tokens, heads, dim // heads), dtype=q.dtype, device=q.device)
    keys = torch.empty_like(queries)
    place_projections(q, k, v, q_weight, k_weight, cos, sin, queries, keys.transpose(1, 2), None, slots=None, eps=eps)
    attended = segmented_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        split_heads(v, heads),
        k_cache,
        v_cache,
        slots,
        valid_slots,
        scale,
    )
    return attended.transpose(1, 2).reshape(batch, tokens, dim)


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
    """
    batch, tokens, dim = q.shape
    frames = 1 if slots is None else slots.shape[0]
    place_projections_kernel[(tokens, 2 if v_cache is None else 3, batch)](
        *(q, k, v, q_weight, k_weight, cos, sin, cos if slots is None else slots, queries, k_cache),
        *(k_cache if v_cache is None else v_cache, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        *(queries.stride(0), *k_cache.stride()[:3], tokens // frames, k_cache.shape[2], eps),
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        D=queries.shape[3],
        HAS_SLOTS=slots is not None,
        num_warps=4,
    )
