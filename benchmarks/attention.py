"""Time the attention of one chunk over a cache, kernel by kernel, with random inputs.

All kernels run in one process, one after the other, case by case, each call finding the GPU's caches cold. The op and
the kernels of this project write the chunk into the cache too; others attend to keys that lie there already.

    python -m benchmarks.attention --output benchmarks/results
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch

from benchmarks.attention_kernels import FP8_KERNELS, KERNELS, Case, UnavailableError
from benchmarks.conditions import describe_machine, device_slug
from benchmarks.records import add_record_arguments, write_record
from benchmarks.statistics import significant
from benchmarks.timing import time_calls
from causal_forcing.runtime.backends import choose_device
from causal_forcing.runtime.config import DTYPES
from causal_forcing.runtime.variant import find_variant

QUERIES_FRAMES = (1, 2, 3, 6)
"""Latent frames of queries: a framewise and a chunkwise pass, and two passes in one."""

KEYS_FRAMES = (3, 12, 21)
"""Latent frames attended to, the queries' included."""


def main() -> None:
    """Time every kernel in every case, print one JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slug", default="causal-forcing-wan2.1-t2v-1.3b-chunkwise", help="model that gives heads")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=sorted(DTYPES), help="bf16 on a GPU, fp32 elsewhere")
    parser.add_argument("--pixel-height", type=int)
    parser.add_argument("--pixel-width", type=int)
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--queries-frames", nargs="+", type=int, default=QUERIES_FRAMES)
    parser.add_argument("--keys-frames", nargs="+", type=int, default=KEYS_FRAMES)
    parser.add_argument("--warm-ups", type=int, default=5, help="calls before those that count")
    parser.add_argument("--repeats", type=int, default=30, help="calls that count")
    add_record_arguments(parser)
    arguments = parser.parse_args()
    device = torch.device(choose_device(arguments.device))
    precision = arguments.precision or ("bf16" if device.type == "cuda" else "fp32")
    variant = find_variant(arguments.slug)
    dit = variant.model.dit
    height, width = arguments.pixel_height or variant.pixel_height, arguments.pixel_width or variant.pixel_width
    tokens = (height // 16) * (width // 16)
    cases = []
    for queries in arguments.queries_frames:
        for keys in arguments.keys_frames:
            if keys >= queries:
                slots = max(arguments.keys_frames) * tokens
                dtype = getattr(torch, DTYPES[precision])
                case = make_case(queries, keys, tokens, slots, (dit.num_heads, dit.head_dim), dtype, device)
                cases.append(time_case(case, arguments, device))
                print(cases[-1], file=sys.stderr)
    record = {
        "benchmark": "attention",
        "conditions": {
            "commit": arguments.commit,
            **describe_machine(device),
            "precision": precision,
            "weights": "none: random queries, keys and values",
            "geometry": {"pixel_height": height, "pixel_width": width, "window_frames": max(arguments.keys_frames)},
            "heads": dit.num_heads,
            "head_dim": dit.head_dim,
            "warm_ups": arguments.warm_ups,
            "repeats": arguments.repeats,
        },
        "cases": cases,
    }
    write_record(record, arguments.output, device=device_slug(device))


def make_case(
    queries: int,
    keys: int,
    tokens: int,
    slots: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    """Make one chunk's inputs; queries and keys in latent frames, heads as their number and size."""

    def random(length: int) -> torch.Tensor:
        return torch.randn(1, heads[0], length, heads[1], device=device, dtype=dtype)

    own = [frame * tokens for frame in range(keys - queries, keys)]
    return Case(
        q=random(queries * tokens),
        k=random(queries * tokens),
        v=random(queries * tokens),
        k_cache=random(slots),
        v_cache=random(slots),
        slots=torch.tensor(own, dtype=torch.int32, device=device),
        keys=keys * tokens,
    )


def time_case(case: Case, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time every kernel over one case; those that are not here, or refuse it, say why."""
    kernels: dict[str, Any] = {}
    reference: torch.Tensor | None = None
    for name in arguments.kernels:
        try:
            call = KERNELS[name](case)
            out = call().float()
            times_ms = time_calls(call, device, warm_ups=arguments.warm_ups, repeats=arguments.repeats, cold=True)
        except UnavailableError as error:
            kernels[name] = {"unavailable": str(error)}
            continue
        except Exception as error:  # a library that is here and fails is worth a line, not the run
            kernels[name] = {"unavailable": f"{type(error).__name__}: {error}"[:300]}
            continue
        median_ms = statistics.median(times_ms)
        kernels[name] = {"ms": round(median_ms, 4), "tflops": significant(case.flop / median_ms / 1e9)}
        if reference is None and name not in FP8_KERNELS:
            reference = out
        elif reference is not None:
            kernels[name]["largest_difference"] = significant((out - reference).abs().max().item())
    return {"queries_tokens": case.q.shape[2], "keys_tokens": case.keys, "kernels": kernels}


if __name__ == "__main__":
    main()
