"""Exchanges that are stores into the other ranks' memory, without a GPU: by Triton's interpreter."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from causal_forcing.plugins.dit_ops import norm_rope
from tests.triton_interpreter import interpret

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

EPS, BATCH, DEPTH = 1e-6, 2, 8
CASES = {
    # Name: ranks, heads, segments, tokens of each.
    "two ranks": (2, 4, 1, 6),
    "three ranks, two segments": (3, 6, 2, 9),
    "one head a rank": (2, 2, 1, 4),
}


def rand(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def share(x: torch.Tensor, rank: int, ranks: int, segments: int, axis: int = 1) -> torch.Tensor:
    """Return a rank's tokens: its part of each segment."""
    by_segment = torch.unflatten(x, axis, (segments, -1))
    return by_segment.chunk(ranks, axis + 1)[rank].flatten(axis, axis + 1).contiguous()


def make_projections(ranks: int, heads: int, segments: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """Make q, k, v [B, G·L, N·D], weights, cosines and sines of all ranks' tokens."""
    dim, everything = heads * DEPTH, segments * tokens
    angle = rand(everything, DEPTH // 2, seed=2)
    return (*rand(3, BATCH, everything, dim, seed=0), *rand(2, dim, seed=1), angle.cos(), angle.sin())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what each rank got, by launcher and case."""
    cases = []
    for ranks, heads, segments, tokens in CASES.values():
        q, k, v, q_weight, k_weight, cos, sin = make_projections(ranks, heads, segments, tokens)
        split = (ranks, segments)
        to_heads = [
            (
                *(share(x, rank, *split) for x in (q, k, v)),
                *(q_weight, k_weight),
                *(share(x, rank, *split, axis=0) for x in (cos, sin)),
                *(heads, EPS, ranks, segments, tokens),
            )
            for rank in range(ranks)
        ]
        attended = torch.unflatten(q, 2, (ranks, -1, DEPTH)).unbind(2)  # each [B, G·L, n, D]
        to_tokens = [(attended[rank].contiguous().transpose(1, 2), ranks, segments) for rank in range(ranks)]
        cases += [("launch_projected_exchange", to_heads), ("launch_exchange_to_tokens", to_tokens)]
    script = Path(__file__).with_name("interpreted_exchange.py")
    got = interpret(script, cases, tmp_path_factory.mktemp("exchange"))
    return {name: (got[2 * index], got[2 * index + 1]) for index, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_all_tokens_of_its_heads(name: str, results: dict[str, Any]) -> None:
    ranks, heads, segments, tokens = CASES[name]
    q, k, v, q_weight, k_weight, cos, sin = make_projections(ranks, heads, segments, tokens)
    queries, keys = (
        norm_rope(x, weight, cos, sin, heads, EPS) for x, weight in ((q, q_weight), (k, k_weight))
    )  # each [B, N, G·L, D]
    values = torch.unflatten(v, 2, (heads, DEPTH)).transpose(1, 2)
    own = heads // ranks
    for rank, got in enumerate(results[name][0]):
        want = torch.stack([x[:, rank * own : (rank + 1) * own] for x in (queries, keys, values)], dim=2)
        torch.testing.assert_close(got.permute(0, 3, 2, 1, 4), want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_all_heads_of_its_tokens(name: str, results: dict[str, Any]) -> None:
    ranks, heads, segments, tokens = CASES[name]
    attended = torch.unflatten(make_projections(ranks, heads, segments, tokens)[0], 2, (heads, DEPTH))
    for rank, got in enumerate(results[name][1]):
        want = share(attended, rank, ranks, segments).transpose(1, 2)
        torch.testing.assert_close(got, want, atol=0, rtol=0)
