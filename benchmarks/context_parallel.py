"""Time clips that several ranks make together, beside the same clips made by the first of them alone, in one run.

    torchrun --nproc_per_node=2 -m benchmarks.context_parallel --engine FOLDER --single FOLDER

FOLDER are engine directories of one slug and the same weights, built with and without `--context-parallel`. Clips of
all, with `--stores` of all whose layers exchange by stores too, and of one take turns; reported are the ratios of
neighbours, the memory of every rank, how far the clips are apart, and what the exchanges of a pass take by themselves.
"""

from __future__ import annotations

import argparse
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.clips import Clip, TimedSession, dit_ms, frames_of, summarise
from benchmarks.conditions import describe_engine, describe_machine, device_slug
from benchmarks.latency import CLIP_LATENT_FRAMES
from benchmarks.records import add_record_arguments, write_record
from benchmarks.statistics import ratios, significant, spread
from benchmarks.timing import time_calls
from causal_forcing.plugins.fused_op import register_fused_ops
from causal_forcing.plugins.ranks import exchanging_by_stores
from causal_forcing.plugins.symmetric_buffer import reach_each_other
from causal_forcing.plugins.token_ops import share_of
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.loading import load_engines
from causal_forcing.runtime.manifest import read_manifest

Clips = dict[str, list[Clip]]
"""By what made them: `ranks`, `stores` or `one`."""

TIMEOUT = timedelta(minutes=5)
"""After which a rank that waits for another gives up."""


def main() -> None:
    """Measure, print one JSON record from the first rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True, help="engine directory for as many ranks as there are")
    parser.add_argument("--single", type=Path, required=True, help="engine directory for one rank")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--total-blocks", type=int, help="chunks of a clip; 81 frames where left out")
    parser.add_argument("--stores", action="store_true", help="also by stores, on GPUs that reach each other's memory")
    parser.add_argument("--warm-ups", type=int, default=1, help="clips before those that count")
    parser.add_argument("--repeats", type=int, default=3, help="clips that count")
    add_record_arguments(parser)
    arguments = parser.parse_args()
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cpu") if arguments.device == "cpu" else torch.device("cuda", local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=TIMEOUT)
    else:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    if arguments.stores and not (device.type == "cuda" and reach_each_other(dist.get_world_size())):
        parser.error("--stores needs GPUs that reach each other's memory")
    record = measure(arguments, rank, device)
    if rank == 0:
        write_record(record, arguments.output, device=f"{dist.get_world_size()}x-{device_slug(device)}")
    dist.barrier()
    dist.destroy_process_group()


def measure(arguments: argparse.Namespace, rank: int, device: torch.device) -> dict[str, Any]:
    """Run the clips; every rank takes part, the first one's record counts."""
    config = read_manifest(arguments.engine).config
    chunks = arguments.total_blocks or CLIP_LATENT_FRAMES // config.geometry.chunk_frames
    together, together_bytes = open_session(arguments.engine, device, chunks)
    alone, alone_bytes = open_session(arguments.single, device, chunks) if rank == 0 else (None, 0)
    sessions: dict[str, TimedSession | None] = {"ranks": together, "one": alone}
    if arguments.stores:
        with exchanging_by_stores():
            sessions = {"stores": open_session(arguments.engine, device, chunks)[0], **sessions}
    plain: Clips = {name: [] for name in sessions}
    staged: Clips = {name: [] for name in sessions}
    for index in range(arguments.warm_ups + arguments.repeats + 1):
        is_staged = index == arguments.warm_ups + arguments.repeats
        for name, session in sessions.items():
            dist.barrier()
            if session is not None:
                clip = session.clip(staged=is_staged)
                if index >= arguments.warm_ups:
                    (staged if is_staged else plain)[name].append(clip)
    dist.barrier()
    latents = together.first_latents()
    reference = None if alone is None else alone.first_latents()
    dist.barrier()
    exchange_ms = time_exchanges(config, device)
    stores_ms: list[float] = []
    if arguments.stores:
        with exchanging_by_stores():
            stores_ms = time_exchanges(config, device)
    bytes_of_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(bytes_of_rank, together_bytes)
    if rank > 0:
        return {}
    conditions = {
        "commit": arguments.commit,
        **describe_engine(config),
        "ranks": config.context_parallel,
        **describe_machine(device),
        "nccl": nccl_version() if device.type == "cuda" else None,
        "prompt": "a random embedding",
        "chunks": chunks,
        "frames": frames_of(config, chunks),
        "warm_up_clips": arguments.warm_ups,
        "repeats": arguments.repeats,
    }
    error = None
    if latents is not None and reference is not None:
        error = significant(((latents - reference).norm() / reference.norm()).item())
    return {
        "benchmark": "context_parallel",
        "conditions": conditions,
        "ranks": {**summarise(plain["ranks"], staged["ranks"]), "bytes_of_rank": bytes_of_rank},
        "one": {**summarise(plain["one"], staged["one"]), "bytes_of_rank": [alone_bytes]},
        "exchange_of_a_pass_ms": spread(exchange_ms),
        "ratios": compare(plain, staged, "ranks"),
        **(stores_part(plain, staged, stores_ms) if arguments.stores else {}),
        "first_latents_relative_error": error,
    }


def compare(plain: Clips, staged: Clips, name: str) -> dict[str, Any]:
    """Return how many times faster than one rank's these clips are."""
    pair = ("one", name)
    return {
        "fps": ratios(*([clip.total_ms for clip in plain[which]] for which in pair)),
        "last_step": ratios(*([clip.step_ms[-2:][0] for clip in plain[which]] for which in pair)),
        "dit": ratios(*([dit_ms(clip) for clip in staged[which]] for which in pair)),
        "decode": ratios(*([clip.stage_ms[-1]["decode"] for clip in staged[which]] for which in pair)),
    }


def stores_part(plain: Clips, staged: Clips, exchange_ms: list[float]) -> dict[str, Any]:
    """Return what a record says of exchanges by stores."""
    return {
        "stores": {
            **summarise(plain["stores"], staged["stores"]),
            "exchange_of_a_pass_ms": spread(exchange_ms),
            "ratios": compare(plain, staged, "stores"),
        }
    }


def nccl_version() -> str:
    """Return the version of NCCL that torch came with."""
    version: tuple[int, ...] = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return ".".join(map(str, version))


def open_session(folder: Path, device: torch.device, chunks: int) -> tuple[TimedSession, int]:
    """Open a session; returns it, and the memory that torch holds for it."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    session = TimedSession(load_engines(folder, device=str(device)), chunks)
    after = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return session, after - before


def time_exchanges(config: EngineConfig, device: torch.device) -> list[float]:
    """Time norms, RoPE and exchanges of one denoising pass, nothing between them; milliseconds of each repeat."""
    register_fused_ops()
    ours = torch.ops.causal_forcing
    spec, ranks = config.variant.model.dit, config.context_parallel
    tokens = config.geometry.chunk_tokens
    share, dtype = share_of(tokens, ranks), getattr(torch, config.dtype)
    q, k, v = torch.zeros((3, 1, share, spec.dim), dtype=dtype, device=device).unbind()
    weight, phase = q.new_ones(spec.dim), torch.zeros(share, spec.head_dim // 2, device=device)
    projected = (q, k, v, weight, weight, phase, phase, spec.num_heads, spec.eps)

    @torch.inference_mode()
    def exchange() -> None:
        for _ in range(spec.num_layers):
            whole = ours.projected_exchange(*projected, ranks, 1, tokens)
            ours.exchange_to_tokens(whole[:, :, 0].transpose(1, 2), ranks, 1)

    call: Any = exchange
    if device.type == "cuda":
        exchange()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            exchange()
        call = graph.replay
    return time_calls(call, device, warm_ups=2, repeats=5)


if __name__ == "__main__":
    main()
