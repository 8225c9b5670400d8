"""Launch the exchanges around attention: by stores into the other ranks' memory, or from blocks that are sent."""

from __future__ import annotations

import torch
import triton

from causal_forcing.plugins.kernels.exchange import send_tokens_kernel
from causal_forcing.plugins.kernels.placement_launch import place_projections
from causal_forcing.plugins.ranks import Ranks, current_ranks
from causal_forcing.plugins.symmetric_buffer import SymmetricBuffer
from causal_forcing.plugins.token_ops import exchange_segments

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
    share, depth, own_heads = shares // segments, dim // heads, heads // ranks

    def place(target: torch.Tensor, rows: slice, part_offsets: torch.Tensor | None = None) -> None:
        """Write these rows, queries and keys normalised and rotated, into [3, B, S, R, n·D]."""
        queries, keys, values = target.unbind()
        caches = (keys.transpose(1, 2), values.transpose(1, 2))
        norms = (q_weight, k_weight, cos[rows], sin[rows])
        projections = (q[:, rows], k[:, rows], v[:, rows])
        place_projections(
            *(*projections, norms, queries, *caches), slots=None, eps=eps, head_dim=depth, part_offsets=part_offsets
        )

    def fill(blocks: torch.Tensor, rows: slice) -> None:
        # What goes to a rank is one block, in which a token's own heads of q, k and v follow each other.
        place(blocks.flatten(4).permute(3, 1, 2, 0, 4), rows)

    group = current_ranks(ranks)
    buffer = _find_buffer(group, "to heads", (batch, segments * tokens, 3, own_heads, depth), q, tokens)
    if buffer is None:
        return exchange_segments(fill, q, (ranks, batch, share, 3, own_heads, depth), segments, tokens)
    for segment in range(segments):
        first = segment * tokens + group.index * share
        own = buffer.own.flatten(3)[:, first : first + share].permute(2, 0, 1, 3)  # [3, B, S, n·D]
        target = own.unsqueeze(3).expand(-1, -1, -1, ranks, -1)  # as if what goes to all ranks were here
        place(target, slice(segment * share, (segment + 1) * share), buffer.offsets)
    buffer.barrier()
    return buffer.own


def launch_exchange_to_tokens(x: torch.Tensor, ranks: int, segments: int) -> torch.Tensor | None:
    """Run `token_ops.exchange_to_tokens`; None where ranks do not write into each other's memory."""
    batch, own_heads, everything, depth = x.shape
    tokens, width = everything // segments, own_heads * depth
    group = current_ranks(ranks)
    buffer = _find_buffer(group, "to tokens", (batch, everything // ranks, ranks, own_heads, depth), x, tokens)
    if buffer is None:
        return None
    rows = x.transpose(1, 2).reshape(batch, everything, width)  # a view of what attention writes
    own = buffer.own[:, :, group.index]
    send_tokens_kernel[(everything, batch)](
        *(rows, own, buffer.offsets, *rows.stride()[:2], *own.stride()[:2], tokens, tokens // ranks),
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=2,
    )
    buffer.barrier()
    return buffer.own.flatten(2, 3).transpose(1, 2)


def _find_buffer(
    group: Ranks, use: str, shape: tuple[int, ...], like: torch.Tensor, tokens: int
) -> SymmetricBuffer | None:
    """Return a buffer of heads [..., n, D] to store into; None where ranks write into none, or not so."""
    stores = tokens % group.size == 0 and shape[-2] * shape[-1] % _ALIGNED == 0
    return group.symmetric_buffer(use, shape, like) if stores else None
