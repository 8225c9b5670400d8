"""Launchers of the exchanges by Triton's interpreter: stores into other ranks' memory, and collectives."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from causal_forcing.plugins.dit_ops import norm_rope
from causal_forcing.plugins.token_ops import share_of
from tests.triton_interpreter import interpret

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

EPS, DEPTH = 1e-6, 8
CASES = {
    # Name: ranks, heads, segments, tokens of each, whether ranks store.
    "two ranks, by stores": (2, 4, 1, 6, True),
    "three ranks, two segments, by stores": (3, 6, 2, 9, True),
    "one head a rank, by stores": (2, 2, 1, 4, True),
    "tokens that do not divide, which are not stored": (2, 4, 2, 5, True),
    "two ranks, by collectives": (2, 4, 1, 6, False),
    "three ranks, two segments, by collectives": (3, 6, 2, 9, False),
    "three ranks, padded, by collectives": (3, 6, 2, 8, False),
}
STORED = [name for name, (ranks, _, _, tokens, stores) in CASES.items() if stores and tokens % ranks == 0]


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def share(x: torch.Tensor, rank: int, ranks: int, segments: int) -> torch.Tensor:
    """Return a rank's tokens [..., G·S, D] of all, [..., G·L, D]: its part of each segment, padded with zeros."""
    by_segment = torch.unflatten(x, -2, (segments, -1))
    tokens = by_segment.shape[-2]
    padded = F.pad(by_segment, (0, 0, 0, share_of(tokens, ranks) * ranks - tokens))
    return padded.chunk(ranks, -2)[rank].flatten(-3, -2).contiguous()


def make_projections(ranks: int, heads: int, segments: int, tokens: int, batch: int) -> tuple[torch.Tensor, ...]:
    """Make q, k, v [B, G·L, N·D], weights, cosines and sines of all ranks' tokens."""
    dim, everything = heads * DEPTH, segments * tokens
    angle = rand(everything, DEPTH // 2, seed=2)
    return (*rand(3, batch, everything, dim, seed=0), *rand(2, dim, seed=1), angle.cos(), angle.sin())


@pytest.fixture(scope="module", params=[1, 2])
def batch(request: pytest.FixtureRequest) -> int:
    """One clip at a time arrives in its place, two are put in order."""
    return int(request.param)


@pytest.fixture(scope="module")
def results(batch: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what each rank got, by launcher and case."""
    cases: list[tuple[str, bool, Any]] = []
    for ranks, heads, segments, tokens, stores in CASES.values():
        q, k, v, q_weight, k_weight, cos, sin = make_projections(ranks, heads, segments, tokens, batch)
        to_heads = []
        for rank in range(ranks):
            queries, keys, values, own_cos, own_sin = (share(x, rank, ranks, segments) for x in (q, k, v, cos, sin))
            place = (own_cos, own_sin, heads, EPS, ranks, segments, tokens)
            to_heads.append((queries, keys, values, q_weight, k_weight, *place))
        cases.append(("launch_projected_exchange", stores, to_heads))
    for name in STORED:
        ranks, heads, segments, tokens, _ = CASES[name]
        q, *_ = make_projections(ranks, heads, segments, tokens, batch)
        attended = torch.unflatten(q, 2, (ranks, -1, DEPTH)).unbind(2)  # each [B, G·L, n, D]
        to_tokens = [(attended[rank].contiguous().transpose(1, 2), ranks, segments) for rank in range(ranks)]
        cases.append(("launch_exchange_to_tokens", True, to_tokens))
    script = Path(__file__).with_name("interpreted_exchange.py")
    got = interpret(script, cases, tmp_path_factory.mktemp("exchange"))
    return {
        "to heads": dict(zip(CASES, got[: len(CASES)], strict=True)),
        "to tokens": dict(zip(STORED, got[len(CASES) :], strict=True)),
    }


@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_all_tokens_of_its_heads(name: str, batch: int, results: dict[str, Any]) -> None:
    ranks, heads, segments, tokens, _ = CASES[name]
    q, k, v, q_weight, k_weight, cos, sin = make_projections(ranks, heads, segments, tokens, batch)
    queries, keys = (
        norm_rope(x, weight, cos, sin, heads, EPS) for x, weight in ((q, q_weight), (k, k_weight))
    )  # each [B, N, G·L, D]
    values = torch.unflatten(v, 2, (heads, DEPTH)).transpose(1, 2)
    own = heads // ranks
    for rank, got in enumerate(results["to heads"][name]):
        want = torch.stack([x[:, rank * own : (rank + 1) * own] for x in (queries, keys, values)], dim=2)
        torch.testing.assert_close(got.permute(0, 3, 2, 1, 4), want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", STORED)
def test_every_rank_has_all_heads_of_its_tokens(name: str, batch: int, results: dict[str, Any]) -> None:
    ranks, heads, segments, tokens, _ = CASES[name]
    q, *_ = make_projections(ranks, heads, segments, tokens, batch)
    for rank, got in enumerate(results["to tokens"][name]):
        want = share(torch.unflatten(q, 2, (heads, DEPTH)).transpose(1, 2), rank, ranks, segments)
        torch.testing.assert_close(got, want, atol=0, rtol=0)
