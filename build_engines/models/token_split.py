"""How a pass of the DiT is split over ranks: tokens outside of self-attention, heads inside.

Exact: norms, projections, cross-attention and the feed-forward work token by token, and attention head by head. What
travels in a layer is the chunk's queries, keys and values, and its attention, each once; the cache stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from causal_forcing.plugins.token_ops import exchange_to_heads, exchange_to_tokens, gather_tokens, own_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSplit:
    """The split of passes over one chunk, or over several that follow each other."""

    ranks: int
    """How many ranks share a pass: a divisor of the heads."""
    tokens: int
    """L of a chunk."""

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's tokens [B, G·S, dim] of G chunks [B, G·L, dim]; S is L/ranks, rounded up."""
        own: torch.Tensor = own_tokens(x, self.ranks, x.shape[1] // self.tokens)
        return own

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """Return all tokens [B, L, dim] of a chunk, of every rank's own [B, S, dim]."""
        whole: torch.Tensor = gather_tokens(x, self.ranks, self.tokens)
        return whole

    def to_heads(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Turn this rank's tokens of all heads [B, N, G·S, D] into all tokens of its heads [B, N/ranks, G·L, D]."""
        q, k, v = exchange_to_heads(q, k, v, self.ranks, chunks, self.tokens).permute(2, 0, 3, 1, 4).unbind()
        return q, k, v

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Go the way back, [B, N/ranks, G·L, D] to [B, N, G·S, D]."""
        back: torch.Tensor = exchange_to_tokens(x, self.ranks, x.shape[2] // self.tokens)
        return back
