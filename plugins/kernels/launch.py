"""Launch the kernel over tensors, or over bare addresses with a type and a shape."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from triton.runtime import driver

from causal_forcing.plugins.kernels.kv_cache_attention import kv_cache_attention_kernel
from causal_forcing.plugins.kernels.tiles import MAX_FRAMES, MAX_HEAD_DIM, find_tile, padded_head_dim

LOG2_E = math.log2(math.e)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class DeviceTensor(Protocol):
    """What the kernel needs to know of a tensor; a torch tensor is one."""

    @property
    def dtype(self) -> torch.dtype: ...  # noqa: D102

    @property
    def shape(self) -> Sequence[int]: ...  # noqa: D102

    def stride(self) -> Sequence[int]: ...  # noqa: D102

    def data_ptr(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressedTensor:
    """A contiguous tensor in memory that somebody else owns."""

    address: int
    """Where it lies on the device."""
    dtype: torch.dtype
    """Type of its elements."""
    shape: tuple[int, ...]
    """Its sizes."""

    def data_ptr(self) -> int:
        """Return the address."""
        return self.address

    def stride(self) -> tuple[int, ...]:
        """Return the strides of a contiguous tensor, in elements."""
        return tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))


def accepts(
    q: DeviceTensor,
    k: DeviceTensor,
    v: DeviceTensor,
    k_cache: DeviceTensor,
    v_cache: DeviceTensor,
    slots: DeviceTensor,
    valid_slots: DeviceTensor,
    scale: float,
) -> bool:
    """Say whether the kernel can run these; what it cannot, `reference` can."""
    floats = (q, k, v, k_cache, v_cache)
    return (
        q.dtype in _DTYPES
        and all(tensor.dtype == q.dtype and tensor.stride()[3] == 1 for tensor in floats)
        and k_cache.stride() == v_cache.stride()
        and all(tensor.dtype == torch.int32 and tensor.stride()[0] == 1 for tensor in (slots, valid_slots))
        and slots.shape[0] <= MAX_FRAMES
        and q.shape[3] <= MAX_HEAD_DIM
        and scale > 0.0
    )


@functools.cache
def shared_bytes_of(device: int) -> int:
    """Return how much shared memory one program can have on a CUDA device."""
    return int(driver.active.utils.get_device_properties(device)["max_shared_mem"])


def launch(
    q: DeviceTensor,
    k: DeviceTensor,
    v: DeviceTensor,
    k_cache: DeviceTensor,
    v_cache: DeviceTensor,
    slots: DeviceTensor,
    valid_slots: DeviceTensor,
    out: DeviceTensor,
    *,
    scale: float,
    shared_bytes: int,
) -> None:
    """Run the op on torch's current device and stream: one launch, no allocation, no synchronisation.

    The first launch of a new type or geometry compiles; so run once before capturing a graph.

    Args:
        q: [B, N, L, D] bf16, fp16 or fp32, on the device.
        k: [B, N, L, D], as q.
        v: [B, N, L, D], as q.
        k_cache: [B, N, S, D], as q; changed in place.
        v_cache: [B, N, S, D], as q, with the strides of k_cache; changed in place.
        slots: [F] int32, first slot of each frame of the chunk.
        valid_slots: [B] int32, number of slots attended to.
        out: [B, N, L, D], as q; written.
        scale: Factor on q·k, above 0.
        shared_bytes: Shared memory one program may take.
    """
    batch, heads, tokens, head_dim = q.shape
    frames = slots.shape[0]
    tile = find_tile(element_bytes=q.dtype.itemsize, head_dim=head_dim, shared_bytes=shared_bytes)
    strides = [stride for tensor in (q, k, v, out, k_cache) for stride in tensor.stride()[:3]]
    kv_cache_attention_kernel[(-(-tokens // tile.queries), heads, batch)](
        *(q, k, v, k_cache, v_cache, slots, valid_slots, out, k_cache, v_cache),
        *strides,
        *(tokens, tokens // frames, k_cache.shape[2], scale * LOG2_E),
        FRAMES=frames,
        D=head_dim,
        PADDED_D=padded_head_dim(head_dim),
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        STAGES=tile.stages,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,  # Triton's default, which it means to change
    )
