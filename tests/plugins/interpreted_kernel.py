"""Run the kernel on the CPU, through Triton's interpreter: `interpreted_kernel.py CASES RESULTS`, files of torch.save.

A process of its own, since Triton reads TRITON_INTERPRET when a kernel is defined, its own library's included.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from causal_forcing.plugins.kernels.launch import launch
from causal_forcing.plugins.kernels.tiles import PLAIN_SHARED_BYTES

if __name__ == "__main__":
    results = []
    for scale, (q, k, v, k_cache, v_cache, slots, valid_slots) in torch.load(sys.argv[1], weights_only=True):
        out = torch.full_like(q, torch.nan)
        launch(
            *(q, k, v, k_cache, v_cache, slots, valid_slots, out),
            scale=scale,
            shared_bytes=PLAIN_SHARED_BYTES,
        )
        results.append((out, k_cache, v_cache))
    torch.save(results, sys.argv[2])
