"""Ops that split the tokens of a pass over ranks (`ranks.py`), and bring them together around attention.

Outside attention a rank has an equal share of every segment's tokens, in order, padded with zeros to the same number on
every rank; inside it has all tokens of its own heads. One exchange turns one into the other, so that each rank holds
the cache of its own heads and nothing but the chunk ever travels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from causal_forcing.plugins.custom_op import define_op
from causal_forcing.plugins.dit_ops import norm_rope, split_heads
from causal_forcing.plugins.fused_op import fused_op, kernel_of, kernel_or_body
from causal_forcing.plugins.ranks import current_ranks


def share_of(tokens: int, ranks: int) -> int:
    """Return how many tokens a rank has of a segment, padding included."""
    return -(-tokens // ranks)


def _own_tokens(x: torch.Tensor, ranks: int, segments: int) -> torch.Tensor:
    tokens = x.shape[1] // segments
    group = current_ranks(ranks)
    group.meet(x)  # a pass begins: the one before may have ended with keys and values, which nothing follows
    share, rank = share_of(tokens, ranks), group.index
    padded = F.pad(torch.unflatten(x, 1, (segments, tokens)), (0, 0, 0, share * ranks - tokens))
    return padded[:, :, rank * share : (rank + 1) * share].flatten(1, 2).clone()


def _fake_own_tokens(x: torch.Tensor, ranks: int, segments: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], segments * share_of(x.shape[1] // segments, ranks), x.shape[2])


own_tokens = define_op("own_tokens", _own_tokens, fake=_fake_own_tokens)
"""own_tokens(x, ranks, segments): this rank's tokens [B, G·S, …] of all, [B, G·L, dim]; S is L/ranks, rounded up."""


def _gather_tokens(x: torch.Tensor, ranks: int, tokens: int) -> torch.Tensor:
    everything = current_ranks(ranks).gather(x)  # [R, B, S, dim]
    return everything.transpose(0, 1).flatten(1, 2)[:, :tokens].contiguous()


def _fake_gather_tokens(x: torch.Tensor, ranks: int, tokens: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], tokens, x.shape[2])


gather_tokens = define_op("gather_tokens", _gather_tokens, fake=_fake_gather_tokens)
"""gather_tokens(x, ranks, tokens): all tokens [B, L, dim] of one segment, of each rank's [B, S, dim]."""


def _exchange_to_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranks: int, segments: int, tokens: int
) -> torch.Tensor:
    batch, heads, shares, depth = q.shape
    share, own_heads = shares // segments, heads // ranks

    def fill(blocks: torch.Tensor, rows: slice) -> None:
        for index, x in enumerate((q, k, v)):
            blocks[:, :, :, index] = torch.unflatten(x[:, :, rows], 1, (ranks, own_heads)).permute(1, 0, 3, 2, 4)

    return exchange_segments(fill, q, (ranks, batch, share, 3, own_heads, depth), segments, tokens)


def exchange_segments(
    fill: Callable[[torch.Tensor, slice], None], like: torch.Tensor, shape: Sequence[int], segments: int, tokens: int
) -> torch.Tensor:
    """Send each rank its tokens of every segment, one by one: each arrives where it belongs, and nothing is reordered.

    Args:
        fill: Writes what goes to each rank, [R, B, S, …] of `shape`, of these rows of this rank's tokens.
        like: Gives type and device.
        shape: The same for all segments.
        segments: G.
        tokens: L of a segment, of which S are this rank's, padding included.

    Returns:
        What came here, [B, G·L, …].
    """
    ranks, batch, share, *rest = shape
    group = current_ranks(ranks)
    whole = like.new_empty(batch, segments * tokens, *rest)
    for segment in range(segments):
        blocks = like.new_empty(shape)
        fill(blocks, slice(segment * share, (segment + 1) * share))
        arrived = whole[:, segment * tokens : (segment + 1) * tokens]
        if batch == 1 and tokens == ranks * share:
            group.exchange(blocks, into=arrived.view(blocks.shape))
        else:
            arrived.copy_(group.exchange(blocks).transpose(0, 1).flatten(1, 2)[:, :tokens])
    return whole


def _fake_exchange_to_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranks: int, segments: int, tokens: int
) -> torch.Tensor:
    batch, heads, _, depth = q.shape
    return q.new_empty(batch, segments * tokens, 3, heads // ranks, depth)


exchange_to_heads = define_op("exchange_to_heads", _exchange_to_heads, fake=_fake_exchange_to_heads)
"""exchange_to_heads(q, k, v, ranks, segments, tokens): all tokens of this rank's heads, [B, G·L, 3, N/R, D] in memory.

From this rank's tokens of all heads, each [B, N, G·S, D]; heads go to the ranks in order.
"""


@fused_op(kernel=kernel_of("exchange_launch", "launch_projected_exchange"))
def projected_exchange(
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
) -> torch.Tensor:
    """Run `exchange_to_heads` on what the projections gave: norms and RoPE, written where they are sent from.

    Args:
        q: [B, G·S, N·D], before norm and RoPE.
        k: [B, G·S, N·D], likewise.
        v: [B, G·S, N·D].
        q_weight: [N·D], of the queries' norm.
        k_weight: [N·D], of the keys' norm.
        cos: [G·S, D/2] fp32.
        sin: [G·S, D/2] fp32.
        heads: N.
        eps: Of the norms.
        ranks: R.
        segments: G.
        tokens: L of a segment, of which S are this rank's, padding included.

    Returns:
        [B, G·L, 3, N/R, D].
    """
    queries, keys = norm_rope(q, q_weight, cos, sin, heads, eps), norm_rope(k, k_weight, cos, sin, heads, eps)
    whole: torch.Tensor = exchange_to_heads(queries, keys, split_heads(v, heads), ranks, segments, tokens)
    return whole


def _exchange_to_tokens(x: torch.Tensor, ranks: int, segments: int) -> torch.Tensor:
    batch, own_heads, everything, depth = x.shape
    tokens = everything // segments
    share = share_of(tokens, ranks)
    received = x.new_empty(segments, ranks, batch, share, own_heads, depth)
    for segment, attended in enumerate(x.chunk(segments, dim=2)):
        if share * ranks > tokens:
            attended = F.pad(attended, (0, 0, 0, share * ranks - tokens))
        blocks = torch.unflatten(attended, 2, (ranks, share)).permute(2, 0, 3, 1, 4)  # [R, B, S, n, D]
        current_ranks(ranks).exchange(blocks.contiguous(), into=received[segment])
    by_token = received.permute(2, 0, 3, 1, 4, 5)  # [B, G, S, R, n, D]
    return by_token.reshape(batch, segments * share, ranks * own_heads, depth).transpose(1, 2)


def _fake_exchange_to_tokens(x: torch.Tensor, ranks: int, segments: int) -> torch.Tensor:
    batch, own_heads, everything, depth = x.shape
    shares = segments * share_of(everything // segments, ranks)
    return x.new_empty(batch, shares, ranks * own_heads, depth).transpose(1, 2)


exchange_to_tokens = define_op(
    "exchange_to_tokens",
    _exchange_to_tokens,
    fake=_fake_exchange_to_tokens,
    on_gpu=kernel_or_body(kernel_of("exchange_launch", "launch_exchange_to_tokens"), _exchange_to_tokens),
)
"""exchange_to_tokens(x, ranks, segments): the way back, [B, N/R, G·L, D] to [B, N, G·S, D]."""


def _own_heads(x: torch.Tensor, ranks: int, axis: int) -> torch.Tensor:
    return x.chunk(ranks, dim=axis)[current_ranks(ranks).index].clone()


def _fake_own_heads(x: torch.Tensor, ranks: int, axis: int) -> torch.Tensor:
    return torch.empty_like(x.chunk(ranks, dim=axis)[0])


own_heads = define_op("own_heads", _own_heads, fake=_fake_own_heads)
"""own_heads(x, ranks, axis): this rank's part of an axis that runs over heads."""
