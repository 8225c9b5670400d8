"""Run kernels on the CPU, through Triton's interpreter: `interpreted_norms.py CASES RESULTS`, files of torch.save.

A case is what to launch and its arguments by name; a result is a tuple of tensors. A process of its own, since Triton
reads TRITON_INTERPRET when a kernel is defined, its own library's included.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch

from causal_forcing.plugins.kernels.norm_launch import run_add_norm, run_quantize
from causal_forcing.plugins.kernels.placement_launch import place_projections


def run(kind: str, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Launch what a case asks for; projections are placed into the buffers that it brings."""
    if kind == "add_norm":
        return run_add_norm(**arguments)
    if kind == "quantize":
        return (run_quantize(**arguments),)
    place_projections(**arguments)
    return tuple(arguments[name] for name in ("queries", "k_cache", "v_cache") if arguments[name] is not None)


if __name__ == "__main__":
    cases = torch.load(sys.argv[1], weights_only=True)
    torch.save([run(kind, arguments) for kind, arguments in cases], sys.argv[2])
