"""Layers of the causal Wan DiT: self-attention over the cache, cross-attention, feed-forward, and the head.

Source of the maths: thu-ml/Causal-Forcing@1fc7bbc wan/modules/causal_model.py and wan/modules/model.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from causal_forcing.build_engines.models.token_split import TokenSplit
from causal_forcing.plugins.dit_ops import (
    gated_add,
    modulated_norm,
    norm_rope,
    rms_norm,
    segmented_attention,
    split_heads,
)
from causal_forcing.plugins.fused_op import keeps_fused_ops
from causal_forcing.plugins.torch_op import kv_cache_attention
from causal_forcing.runtime.model_spec import DiTSpec


class RMSNorm(nn.Module):
    """RMS norm over the full width, all heads together; statistics in fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis of `x`, any dtype."""
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Projections and norms that self- and cross-attention have in common."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.heads = spec.num_heads
        self.scale = spec.head_dim**-0.5
        self.q, self.k, self.v, self.o = (nn.Linear(spec.dim, spec.dim) for _ in range(4))
        self.norm_q, self.norm_k = (RMSNorm(spec.dim, spec.eps) for _ in range(2))

    def merge_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Turn [B, N, L, D] into [B, L, N·D]."""
        return x.transpose(1, 2).flatten(2)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Project [B, L, dim] to normalised queries [B, N, L, D]."""
        return split_heads(self.norm_q(self.q(x)), self.heads)

    def keys_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project [B, L, dim] to normalised keys and raw values, each [B, N, L, D]."""
        return split_heads(self.norm_k(self.k(x)), self.heads), split_heads(self.v(x), self.heads)

    def rotated(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Project [B, L, dim] to queries and keys after norm and RoPE, and to values, each [B, N, L, D]."""
        q = norm_rope(self.q(x), self.norm_q.weight, *rope, self.heads, self.norm_q.eps)
        k = norm_rope(self.k(x), self.norm_k.weight, *rope, self.heads, self.norm_k.eps)
        return q, k, split_heads(self.v(x), self.heads)


class CacheAttention(nn.Module):
    """The op: a chunk's keys and values into the cache, its queries over the valid slots. A module, to be exchanged."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.ranks = 1  # how many share the heads; every head is treated alike here

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots: torch.Tensor,
        valid_slots: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the op; see `plugins.contract` for shapes. Returns (attention, k_cache, v_cache).

        With more `valid_slots` than clips, the tokens are that many segments, each run in turn.
        """
        if keeps_fused_ops() or valid_slots.shape[0] > q.shape[0]:
            return segmented_attention(q, k, v, k_cache, v_cache, slots, valid_slots, self.scale), k_cache, v_cache
        return kv_cache_attention(q, k, v, k_cache, v_cache, slots, valid_slots, self.scale)


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.eps = spec.eps
        self.self_attn = Attention(spec)
        self.cache_attention = CacheAttention(self.self_attn.scale)
        self.split: TokenSplit | None = None
        self.norm3 = nn.LayerNorm(spec.dim, spec.eps)
        self.cross_attn = Attention(spec)
        self.ffn = nn.Sequential(
            nn.Linear(spec.dim, spec.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(spec.ffn_dim, spec.dim)
        )
        self.modulation = nn.Parameter(torch.zeros(1, 6, spec.dim))

    def attend_self(
        self,
        x: torch.Tensor,
        modulation: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        caches: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        valid_slots: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Write the chunk's keys and values and attend; returns (attention [B, N, L, D], k_cache, v_cache)."""
        normed = modulated_norm(x, modulation.select(-2, 0), modulation.select(-2, 1), self.eps)
        q, k, v = self.self_attn.rotated(normed, rope)
        if self.split is not None:
            q, k, v = self.split.to_heads(q, k, v, max(1, valid_slots.shape[0] // q.shape[0]))
        attention, k_cache, v_cache = self.cache_attention(q, k, v, *caches, slots, valid_slots)
        if self.split is not None:
            attention = self.split.to_tokens(attention)
        return attention, k_cache, v_cache

    def finish(
        self,
        x: torch.Tensor,
        attention: torch.Tensor,
        modulation: torch.Tensor,
        cross: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Add self-attention, cross-attention and feed-forward to the residual stream [B, L, dim]."""
        _, _, gate_attention, shift_ffn, scale_ffn, gate_ffn = modulation.unbind(-2)
        x = gated_add(x, self.self_attn.o(self.self_attn.merge_heads(attention)), gate_attention)
        queries = self.cross_attn.queries(self.norm3(x))
        # Padding rows of the prompt take part: upstream passes no mask and no lengths.
        attended = F.scaled_dot_product_attention(queries, *cross, scale=self.cross_attn.scale)
        x = x + self.cross_attn.o(self.cross_attn.merge_heads(attended))
        hidden: torch.Tensor = self.ffn(modulated_norm(x, shift_ffn, scale_ffn, self.eps))
        return gated_add(x, hidden, gate_ffn)


class Head(nn.Module):
    """Final norm, modulation and projection to patches."""

    def __init__(self, spec: DiTSpec) -> None:
        super().__init__()
        self.eps = spec.eps
        self.head = nn.Linear(spec.dim, spec.latent_channels * spec.patch_size**2)
        self.modulation = nn.Parameter(torch.zeros(1, 2, spec.dim))

    def forward(self, x: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """Project [B, L, dim] to patches [B, L, p·p·C]."""
        patches: torch.Tensor = self.head(modulated_norm(x, modulation[0], modulation[1], self.eps))
        return patches
