"""The kernel as PTX, for a plan that is to run without Python.

TensorRT launches what an ahead-of-time plugin gives it with the pointers of all inputs and then of all outputs, and
nothing else that is not a function of the input shapes. So shapes, strides and the scale are compiled in, and the two
scratch pointers that Triton appends to every kernel are taken off its parameters again.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from causal_forcing.plugins.contract import INPUTS, OUTPUTS
from causal_forcing.plugins.kernels.kv_cache_attention import kv_cache_attention_kernel
from causal_forcing.plugins.kernels.launch import LOG2_E
from causal_forcing.plugins.kernels.tiles import PLAIN_SHARED_BYTES, find_tile, padded_head_dim

PTX_VERSION = 87
"""PTX ISA 8.7, so that drivers from CUDA 12.8 on can load the plan, whatever CUDA Triton brings."""

POINTERS = tuple(f"{name}_ptr" for name in (*INPUTS, *OUTPUTS))
"""Parameters of the compiled kernel, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AheadOfTimeKernel:
    """A kernel and how to launch it."""

    name: str
    """Name of its entry."""
    ptx: str
    """Its code."""
    grid: tuple[int, int, int]
    """Programs along x, y and z."""
    threads: int
    """Threads of a program, along x."""
    shared_bytes: int
    """Dynamic shared memory of a program."""


@functools.cache
def compile_ahead_of_time(
    *,
    chunk: tuple[int, int, int, int],
    frames: int,
    cache_slots: int,
    element: str,
    scale: float,
    shared_bytes: int = PLAIN_SHARED_BYTES,
    target: GPUTarget | None = None,
) -> AheadOfTimeKernel:
    """Compile the kernel for one geometry of contiguous tensors.

    Args:
        chunk: [B, N, L, D], shape of q.
        frames: Latent frames of the chunk.
        cache_slots: Slots of the cache.
        element: Triton's name of the type of q: bf16, fp16 or fp32.
        scale: Factor on q·k, above 0.
        shared_bytes: Shared memory one program may take. Whether TensorRT asks the driver for more than the plain limit
            is not documented, so the kernel does with that.
        target: GPU to compile for; None for the one at hand.

    Returns:
        The kernel, whose parameters are `POINTERS`; compiled once for all layers of a network.
    """
    batch, heads, tokens, head_dim = chunk
    tile = find_tile(element_bytes=4 if element == "fp32" else 2, head_dim=head_dim, shared_bytes=shared_bytes)
    constants: dict[str, int | float] = {
        **{f"{name}_batch": heads * tokens * head_dim for name in ("q", "k", "v", "out")},
        **{f"{name}_head": tokens * head_dim for name in ("q", "k", "v", "out")},
        **{f"{name}_row": head_dim for name in ("q", "k", "v", "out", "cache")},
        "cache_batch": heads * cache_slots * head_dim,
        "cache_head": cache_slots * head_dim,
        "tokens": tokens,
        "tokens_per_frame": tokens // frames,
        "cache_slots": cache_slots,
        "scale": scale * LOG2_E,
        "FRAMES": frames,
        "D": head_dim,
        "PADDED_D": padded_head_dim(head_dim),
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "STAGES": tile.stages,
    }
    indices = ("slots_ptr", "valid_slots_ptr")
    signature = {name: "*i32" if name in indices else f"*{element}" for name in POINTERS}
    signature |= dict.fromkeys(constants, "constexpr")
    # TensorRT aligns what it allocates to 256 bytes and asks the same of what it is given.
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(POINTERS) if name not in indices}
    compiled = triton.compile(
        ASTSource(kv_cache_attention_kernel, signature, constants, aligned),
        target=target,
        options={
            "num_warps": tile.warps,
            "num_stages": tile.stages,
            "enable_fp_fusion": True,
            "ptx_version": PTX_VERSION,
        },
    )
    metadata = compiled.metadata
    assert metadata.global_scratch_size == 0, f"the kernel wants {metadata.global_scratch_size} bytes of scratch memory"
    assert metadata.shared <= shared_bytes, (
        f"the kernel takes {metadata.shared} bytes of shared memory, over {shared_bytes}"
    )
    return AheadOfTimeKernel(
        name=metadata.name,
        ptx=keep_parameters(compiled.asm["ptx"], len(POINTERS)),
        grid=(-(-tokens // tile.queries), heads, batch),
        threads=metadata.num_warps * 32,
        shared_bytes=metadata.shared,
    )


def keep_parameters(ptx: str, count: int) -> str:
    """Return the PTX of one kernel with its first `count` parameters alone; it must not use the others."""
    head, _, rest = ptx.partition("(\n")
    listed, _, body = rest.partition("\n)\n")
    parameters = listed.split(",\n")
    for parameter in parameters[count:]:
        name = parameter.split()[-1]
        assert not re.search(rf"\b{re.escape(name)}\b", body), f"the kernel uses its hidden parameter {name}"
    return head + "(\n" + ",\n".join(parameters[:count]) + "\n)\n" + body
