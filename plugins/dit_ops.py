"""Fused ops of the causal DiT: what lies between its matrix products, each a plain-torch body and a kernel.

The model calls the small ones (`modulated_norm`, `gated_add`, `rms_norm`, `norm_rope`); the build of the `cuda` backend
merges neighbours into the larger ones (`build_engines/cuda/fusion.py`). Bodies round where the model always has, after
every operator; kernels compute in fp32 and round once, so that they differ by rounding alone.

A tensor of per-segment modulation is [dim], or [G, dim] where the L tokens are G equal segments at different timesteps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from causal_forcing.plugins.fused_op import fused_op, kernel_of
from causal_forcing.plugins.torch_op import kv_cache_attention_in_place


def by_segment(x: torch.Tensor, modulation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shape tokens [B, L, dim] and modulation so that they broadcast: [B, G, L/G, dim] and [G, 1, dim]."""
    if modulation.dim() == 1:
        return x, modulation
    batch, _, dim = x.shape
    return x.reshape(batch, modulation.shape[0], -1, dim), modulation[:, None]


@fused_op(kernel=kernel_of("norm_launch", "launch_norm"))
def modulated_norm(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise tokens [B, L, dim] over dim, then scale by 1 + `scale` and add `shift`."""
    normed, scale = by_segment(F.layer_norm(x, (x.shape[-1],), None, None, eps), scale)
    _, shift = by_segment(x, shift)
    return (normed * (1 + scale) + shift).reshape(x.shape)


@fused_op(kernel=kernel_of("norm_launch", "launch_gated_add"))
def gated_add(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Return `x` + `gate` · `branch`, tokens [B, L, dim]."""
    segments, gate = by_segment(branch, gate)
    return x + (gate * segments).reshape(x.shape)


@fused_op(kernel=kernel_of("norm_launch", "launch_add_norm"))
def add_norm(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a branch to the residual stream and normalise the sum.

    Args:
        x: [B, L, dim].
        branch: [B, L, dim].
        gate: Factor on the branch; None is 1.
        weight: [dim], factor on what is normalised; None with `scale`.
        bias: [dim], likewise.
        shift: Added to what is normalised; None with `weight`.
        scale: 1 + `scale` is a factor on what is normalised.
        eps: Of the norm.

    Returns:
        The sum, and the normalised sum, both [B, L, dim].
    """
    if gate is None:
        total = x + branch
    else:
        segments, gate = by_segment(branch, gate)
        total = x + (gate * segments).reshape(x.shape)
    normed = F.layer_norm(total, (x.shape[-1],), weight, bias, eps)
    if scale is not None and shift is not None:
        segments, scale = by_segment(normed, scale)
        normed = (segments * (1 + scale) + by_segment(normed, shift)[1]).reshape(x.shape)
    return total, normed


@fused_op(kernel=kernel_of("norm_launch", "launch_rms_norm"))
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalise the last axis by its root mean square, statistics in fp32, and multiply by `weight` [dim]."""
    x_fp32 = x.float()
    normalised = x_fp32 * torch.rsqrt(x_fp32.square().mean(dim=-1, keepdim=True) + eps)
    return normalised.to(x.dtype) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply RoPE to interleaved pairs.

    Args:
        x: [B, N, L, D], any dtype; rotated in fp32.
        cos: [L, D/2] fp32.
        sin: [L, D/2] fp32.
    """
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Turn [B, L, N·D] into [B, N, L, D]."""
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).transpose(1, 2)


@fused_op()
def norm_rope(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, eps: float
) -> torch.Tensor:
    """Turn projected queries or keys [B, L, N·D] into [B, N, L, D]: RMS norm over all heads, then RoPE.

    Args:
        x: [B, L, N·D].
        weight: [N·D], of the norm.
        cos: [L, D/2] fp32.
        sin: [L, D/2] fp32.
        heads: N.
        eps: Of the norm.
    """
    return rotate(split_heads(rms_norm(x, weight, eps), heads), cos, sin)


@fused_op(kernel=kernel_of("projected_launch", "launch_projected_attention"), mutates=("k_cache", "v_cache"))
def projected_attention(
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
) -> torch.Tensor:
    """Run KVCacheAttention on what the projections gave: norms, RoPE, the write to the cache, attention.

    Args:
        q: [B, L, N·D], before norm and RoPE.
        k: [B, L, N·D], likewise.
        v: [B, L, N·D].
        q_weight: [N·D], of the queries' norm.
        k_weight: [N·D], of the keys' norm.
        cos: [L, D/2] fp32.
        sin: [L, D/2] fp32.
        k_cache: [B, N, S, D], changed in place.
        v_cache: [B, N, S, D], changed in place.
        slots: [G·F] int32, first slot of each frame of every segment.
        valid_slots: [B] int32; [G] where there are G > 1 segments and B is 1. Later segments lie in slots that no
            earlier one counts as valid.
        heads: N.
        eps: Of the norms.
        scale: Factor on q·k.

    Returns:
        [B, L, N·D].
    """
    queries, keys = norm_rope(q, q_weight, cos, sin, heads, eps), norm_rope(k, k_weight, cos, sin, heads, eps)
    attended = segmented_attention(queries, keys, split_heads(v, heads), k_cache, v_cache, slots, valid_slots, scale)
    return attended.transpose(1, 2).flatten(2)


@fused_op(kernel=kernel_of("projected_launch", "launch_segmented_attention"), mutates=("k_cache", "v_cache"))
def segmented_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    valid_slots: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Run KVCacheAttention in place for one segment after the other; shapes as in `projected_attention`."""
    segments = max(1, valid_slots.shape[0] // q.shape[0])
    attended = [
        kv_cache_attention_in_place(*chunk, k_cache, v_cache, *place, scale)
        for *chunk, place in zip(
            q.chunk(segments, dim=2),
            k.chunk(segments, dim=2),
            v.chunk(segments, dim=2),
            zip(slots.chunk(segments), valid_slots.chunk(segments), strict=True),
            strict=True,
        )
    ]
    return torch.cat(attended, dim=2) if segments > 1 else attended[0]
