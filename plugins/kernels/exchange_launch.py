"""Launch the exchanges around attention: by stores into the other ranks' memory, or from blocks that are sent."""

from __future__ import annotations

from typing import Any

import torch
import triton

from causal_forcing.plugins.kernels.exchange import send_tokens_kernel
from causal_forcing.plugins.kernels.placement_launch import place_projections
from causal_forcing.plugins.ranks import current_ranks
from causal_forcing.plugins.token_ops import exchange_blocks

_ALIGNED = 8
"""Elements that are stored at once, and must lie together."""


def launch_projected_exchange(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    eps: float,
    ranks: int,
    segments: int,
    tokens: int,
) -> torch.Tensor | None:
    """Run `token_ops.projected_exchange`; None where the projections' last axis is not dense."""
    if any(tensor.stride(2) != 1 for tensor in (q, k, v)):
        return None
    batch, shares, dim = q.shape
    share, width, depth = shares // segments, dim // ranks, dim // heads
    group = current_ranks(ranks)
    if share * ranks == tokens and width % _ALIGNED == 0:
        buffer = group.symmetric_buffer("to heads", (batch, segments * tokens, 3, heads // ranks, depth), q)
        if buffer is not None:
            for segment in range(segments):
                rows = slice(segment * share, (segment + 1) * share)
                first = segment * tokens + group.index * share
                own = buffer.own.flatten(3)[:, first : first + share, :, None].expand(-1, -1, -1, ranks, -1)
                queries, keys, values = own.unbind(2)  # each [B, S, R, n·D], as if R were all here
                norms = (q_weight, k_weight, cos[rows], sin[rows])
                caches = (keys.transpose(1, 2), values.transpose(1, 2))
                places: dict[str, Any] = {"slots": None, "head_dim": depth, "part_offsets": buffer.offsets}
                place_projections(q[:, rows], k[:, rows], v[:, rows], norms, queries, *caches, eps=eps, **places)
            buffer.barrier()
            return buffer.own
    # What goes to a rank is one block, in which a token's own heads of q, k and v follow each other.
    blocks = q.new_empty(ranks, batch, shares, 3, width)
    queries, keys, values = blocks.permute(3, 1, 2, 0, 4).unbind()  # each [B, G·S, R, n·D]
    norms = (q_weight, k_weight, cos, sin)
    caches = (keys.transpose(1, 2), values.transpose(1, 2))
    place_projections(q, k, v, norms, queries, *caches, slots=None, eps=eps, head_dim=depth)
    return exchange_blocks(blocks.view(ranks, batch, segments, share, 3, heads // ranks, depth), tokens)


def launch_exchange_to_tokens(x: torch.Tensor, ranks: int, segments: int) -> torch.Tensor | None:
    """Run `token_ops.exchange_to_tokens`; None where ranks do not write into each other's memory."""
    batch, own_heads, everything, depth = x.shape
    tokens, width = everything // segments, own_heads * depth
    if tokens % ranks or width % _ALIGNED:
        return None
    group = current_ranks(ranks)
    buffer = group.symmetric_buffer("to tokens", (batch, everything // ranks, ranks * width), x)
    if buffer is None:
        return None
    rows = x.transpose(1, 2).reshape(batch, everything, width)  # a view of what attention writes
    own = buffer.own[:, :, group.index * width :]
    send_tokens_kernel[(everything, batch)](
        *(rows, own, buffer.offsets, *rows.stride()[:2], *own.stride()[:2], tokens, tokens // ranks),
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=2,
    )
    buffer.barrier()
    return buffer.own.view(batch, everything // ranks, ranks * own_heads, depth).transpose(1, 2)
