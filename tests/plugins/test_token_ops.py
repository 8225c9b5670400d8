"""Ops around an exchange between ranks, with one process that rehearses: what it sends is what it receives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from causal_forcing.plugins.fused_op import keep_fused_ops, register_fused_ops
from causal_forcing.plugins.ranks import rehearse
from causal_forcing.plugins.token_ops import projected_exchange

RANKS, HEADS, DEPTH, EPS = 2, 4, 8, 1e-6


def call(batch: int, segments: int, tokens: int) -> tuple[Any, ...]:
    """Return arguments of `projected_exchange`."""
    share, generator = -(-tokens // RANKS), torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, segments * share, HEADS * DEPTH, generator=generator)
    weights = torch.randn(2, HEADS * DEPTH, generator=generator)
    angle = torch.randn(segments * share, DEPTH // 2, generator=generator)
    return (q, k, v, *weights, angle.cos(), angle.sin(), HEADS, EPS, RANKS, segments, tokens)


CALLS = {"shared evenly": call(1, 1, 6), "padded": call(2, 1, 5), "two segments": call(1, 2, 5)}


@pytest.mark.parametrize("name", CALLS)
def test_op_has_the_schema_and_the_shapes_that_it_says(name: str) -> None:
    register_fused_ops()
    with rehearse(RANKS):
        op = torch.ops.causal_forcing.projected_exchange.default
        torch.library.opcheck(op, CALLS[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", CALLS)
def test_op_kept_whole_gives_what_its_body_gives(name: str) -> None:
    with rehearse(RANKS):
        body = projected_exchange(*CALLS[name])
        with keep_fused_ops():
            node = projected_exchange(*CALLS[name])
    q, tokens, segments = CALLS[name][0], CALLS[name][-1], CALLS[name][-2]
    assert body.shape == (q.shape[0], segments * tokens, 3, HEADS // RANKS, DEPTH)
    assert torch.equal(node, body)


def test_rank_has_its_own_heads_values_of_every_ranks_tokens() -> None:
    """All ranks send what this one would: the values of the first half of the heads come from each."""
    q, k, v, *rest = CALLS["padded"]
    with rehearse(RANKS):
        whole = projected_exchange(q, k, v, *rest)
    by_head = torch.unflatten(v, 2, (RANKS, HEADS // RANKS, DEPTH))  # [B, S, R, n, D]
    want = torch.cat([by_head[:, :, 0], by_head[:, :, 1]], dim=1)[:, :5]
    torch.testing.assert_close(whole[:, :, 2], want, atol=0, rtol=0)
