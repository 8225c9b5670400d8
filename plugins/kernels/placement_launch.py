"""Launch what lies between projections and attention, or the exchange before it: norms, RoPE, and where rows go."""

from __future__ import annotations

import torch
import triton

from causal_forcing.plugins.kernels.projections import place_projections_kernel

Norms = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Weights of the queries' and keys' norm, cosines and sines."""


def place_projections(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    norms: Norms | None,
    queries: torch.Tensor | None,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    *,
    slots: torch.Tensor | None,
    eps: float,
    codes: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    head_dim: int | None = None,
    part_offsets: torch.Tensor | None = None,
) -> None:
    """Launch `place_projections_kernel`.

    What is written has a token's columns in heads, or in parts of several heads each, N·D columns in all.

    Args:
        q: [B, L, N·D], last axis dense; k and v likewise.
        k: See q.
        v: See q.
        norms: Weights [N·D] of the queries' and keys' norm, cosines and sines [L, D/2] fp32; None where q and k have
            been normalised and rotated.
        queries: [B, L, N, D], last axis dense; written. None leaves queries alone.
        k_cache: [B, N, S, D], last axis dense; written.
        v_cache: [B, N, S, D], with the strides of k_cache; None leaves values alone.
        slots: First slot of each frame; None puts token i into slot i.
        eps: Of the norms.
        codes: For e4m3 queries and keys: their scales [N] and the keys' offset [N, D], fp32.
        head_dim: D, where what is written has parts of several heads.
        part_offsets: [parts] int64, what each part lies further away than its strides say, in elements; multiples of 8.
    """
    batch, tokens, dim = q.shape
    q_weight, k_weight, cos, sin = norms or (q, q, q, q)  # in the second case never read
    q_scale, k_scale, k_offset = codes or (q, q, q)
    kinds = sum(target is not None for target in (queries, k_cache, v_cache))
    parts, width = k_cache.shape[1], k_cache.shape[3]
    frames = 1 if slots is None else slots.shape[0]
    queries_strides = (0, 0, 0) if queries is None else queries.stride()[:3]
    place_projections_kernel[(tokens, kinds, batch)](
        *(q, k, v, q_weight, k_weight, cos, sin, q if slots is None else slots),
        *(k_cache if queries is None else queries, k_cache, k_cache if v_cache is None else v_cache),
        *(q_scale, k_scale, k_offset, q if part_offsets is None else part_offsets),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
        *(*queries_strides, *k_cache.stride()[:3], tokens // frames, k_cache.shape[2], eps),
        DIM=parts * width,
        BLOCK=triton.next_power_of_2(dim),
        D=head_dim or width,
        PART=width,
        HAS_SLOTS=slots is not None,
        FP8=codes is not None,
        NORM=norms is not None,
        FIRST=0 if queries is not None else 1,
        SCATTERED=part_offsets is not None,
        num_warps=4,
    )
