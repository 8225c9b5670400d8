"""Time the KVCacheAttention kernel at the full model's shapes, beside cuDNN's attention over the same keys, on a GPU.

Both run in one process, one after the other, case by case; medians of `triton.testing.do_bench`. cuDNN attends only: it
writes no cache. Inputs are random.

    python benchmarks/attention_kernel.py --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from causal_forcing.plugins.torch_op import kv_cache_attention_in_place
from causal_forcing.runtime.config import DTYPES
from causal_forcing.runtime.spec import WAN21_T2V_1_3B, Geometry

FILLS_FRAMES = (3, 12, 21)
"""Latent frames in the cache, the chunk's own included."""


def main() -> None:
    """Time every case, print one JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp16"))
    parser.add_argument("--output", type=Path, help="folder for the JSON record")
    parser.add_argument("--commit", default=_head(), help="commit to record; by default the checkout's")
    arguments = parser.parse_args()
    dtype = getattr(torch, DTYPES[arguments.precision])
    cases = [time_case(chunk, fill, dtype) for chunk in (3, 1) for fill in FILLS_FRAMES]
    record = {
        "benchmark": "attention_kernel",
        "conditions": {
            "commit": arguments.commit,
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            "precision": arguments.precision,
            "weights": "none: random queries, keys and values",
            "geometry": {"pixel_height": 480, "pixel_width": 832, "window_frames": 21},
            "heads": WAN21_T2V_1_3B.dit.num_heads,
            "head_dim": WAN21_T2V_1_3B.dit.head_dim,
        },
        "cases": cases,
    }
    print(json.dumps(record, indent=1))
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / f"attention_kernel-{arguments.precision}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def time_case(chunk_frames: int, valid_frames: int, dtype: torch.dtype) -> dict[str, Any]:
    """Time one chunk's attention over a window that holds so many latent frames."""
    heads, head_dim = WAN21_T2V_1_3B.dit.num_heads, WAN21_T2V_1_3B.dit.head_dim
    geometry = Geometry(chunk_frames=chunk_frames, pixel_height=480, pixel_width=832, window_frames=21)
    tokens, valid = geometry.chunk_tokens, valid_frames * geometry.tokens_per_frame

    def random(length: int) -> torch.Tensor:
        return torch.randn(1, heads, length, head_dim, device="cuda", dtype=dtype)

    q, k, v = random(tokens), random(tokens), random(tokens)
    k_cache, v_cache = random(geometry.cache_slots), random(geometry.cache_slots)
    first_slots = [frame * geometry.tokens_per_frame for frame in range(valid_frames - chunk_frames, valid_frames)]
    slots = torch.tensor(first_slots, dtype=torch.int32, device="cuda")
    valid_slots = torch.tensor([valid], dtype=torch.int32, device="cuda")
    scale = head_dim**-0.5

    def kernel() -> torch.Tensor:
        out: torch.Tensor = kv_cache_attention_in_place(q, k, v, k_cache, v_cache, slots, valid_slots, scale)
        return out

    def attention_alone() -> torch.Tensor:
        keys, values = k_cache[:, :, :valid], v_cache[:, :, :valid]
        return torch.nn.functional.scaled_dot_product_attention(q, keys, values, scale=scale)

    difference = (kernel().float() - attention_alone().float()).abs().max().item()
    kernel_ms = do_bench(kernel, return_mode="median")
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        cudnn_ms = do_bench(attention_alone, return_mode="median")
    flop = 4 * heads * tokens * valid * head_dim
    return {
        "queries_tokens": tokens,
        "keys_tokens": valid,
        "kernel_ms": round(kernel_ms, 4),
        "kernel_tflops": round(flop / kernel_ms / 1e9),
        "cudnn_ms": round(cudnn_ms, 4),
        "cudnn_tflops": round(flop / cudnn_ms / 1e9),
        "largest_difference": round(difference, 5),
    }


def _head() -> str | None:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or None


if __name__ == "__main__":
    main()
