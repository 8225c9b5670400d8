"""Exchanges that are stores into another rank's memory, captured in CUDA graphs: two processes that share one GPU."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from causal_forcing.plugins import ranks
from causal_forcing.plugins.dit_ops import norm_rope
from causal_forcing.plugins.fused_op import register_fused_ops
from tests.shared_gpu import share_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

RANKS, HEADS, DEPTH, TOKENS, SEGMENTS, EPS = 2, 12, 128, 260, 2, 1e-6
PASSES, LAYERS = 4, 5
PATIENCE_S = 60.0
TOLERANCE = 5e-3
"""‖got - want‖ / ‖want‖: bf16 rounds by about 1e-3, here once and in the reference after each step."""


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def exchange(rank: int, folder: Path) -> None:
    """Be one of two ranks: exchange to heads and back in a graph, layer after layer, and check every pass."""
    share_gpu(rank)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    register_fused_ops()
    ours = torch.ops.causal_forcing
    device, share, dim = torch.device("cuda"), TOKENS // RANKS, HEADS * DEPTH
    angle = torch.randn(SEGMENTS * TOKENS, DEPTH // 2, generator=torch.Generator().manual_seed(0)).to(device)
    weight = torch.ones(dim, dtype=torch.bfloat16, device=device)
    tokens = torch.arange(SEGMENTS * TOKENS, device=device).view(SEGMENTS, RANKS, share)[:, rank].flatten()
    inputs = torch.zeros(LAYERS, 3, 1, SEGMENTS * share, dim, dtype=torch.bfloat16, device=device)
    wholes: list[torch.Tensor] = []
    backs: list[torch.Tensor] = []

    def run_pass() -> None:
        wholes.clear()
        backs.clear()
        for q, k, v in inputs:
            rope = (angle.cos()[tokens], angle.sin()[tokens])
            whole = ours.projected_exchange(q, k, v, weight, weight, *rope, HEADS, EPS, RANKS, SEGMENTS, TOKENS)
            wholes.append(whole.clone())
            backs.append(ours.exchange_to_tokens(whole[:, :, 0].transpose(1, 2), RANKS, SEGMENTS).clone())

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.inference_mode(), torch.cuda.stream(stream), ranks.exchanging_by_stores():
        run_pass()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run_pass()
    own = slice(rank * HEADS // RANKS, (rank + 1) * HEADS // RANKS)
    for number in range(PASSES):
        seeded = torch.Generator().manual_seed(number)
        everything = torch.randn(LAYERS, 3, 1, SEGMENTS * TOKENS, dim, generator=seeded).bfloat16().to(device)
        inputs.copy_(everything[..., tokens, :])
        graph.replay()
        torch.cuda.synchronize()
        for (q, k, v), whole, back in zip(everything, wholes, backs, strict=True):
            queries, keys = (norm_rope(x, weight, angle.cos(), angle.sin(), HEADS, EPS) for x in (q, k))
            values = torch.unflatten(v, 2, (HEADS, DEPTH)).transpose(1, 2)
            want = torch.stack([x[:, own] for x in (queries, keys, values)], dim=2).permute(0, 3, 2, 1, 4)
            torch.testing.assert_close(whole[:, :, 2], want[:, :, 2], atol=0, rtol=0)
            assert relative_error(whole, want) < TOLERANCE
            assert relative_error(back, queries[:, :, tokens]) < TOLERANCE
    dist.barrier()
    dist.destroy_process_group()  # the buffers go with it


def test_ranks_that_store_into_each_others_memory_get_what_was_meant_for_them(tmp_path: Path) -> None:
    context = mp.spawn(exchange, args=(tmp_path,), nprocs=RANKS, join=False)  # type: ignore[attr-defined, no-untyped-call]
    deadline_s = time.monotonic() + PATIENCE_S
    try:
        while not context.join(timeout=1):  # raises what a rank raised
            assert time.monotonic() < deadline_s, "a rank waits for another"
    finally:
        for process in context.processes:
            process.kill()
