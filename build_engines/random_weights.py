"""Seeded random weights: for a test model in the box, and for full-size runs where no checkpoint can be had."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

# Random numbers drawn at a time: bounds the temporaries to a few hundred megabytes.
_DRAW_PART = 1 << 22


def random_state_dict(
    module: torch.nn.Module, seed: int, *, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Draw weights for every parameter of a module.

    A tensor depends on the seed, its name and its shape alone, and is the same to the last bit on every machine. Scales
    keep activations near 1.

    Args:
        module: The network, on any device, `meta` included; it is not changed.
        seed: Any integer.
        dtype: Type of the tensors; numbers are drawn in float32 and rounded.
    """
    return dict(_random_tensors(module, seed, dtype))


def randomise(module: torch.nn.Module, seed: int, *, dtype: torch.dtype = torch.float32) -> None:
    """Give a module the weights of `random_state_dict`, tensor by tensor, on the CPU.

    The module may be on `meta`. It is left in evaluation mode and without gradients.
    """
    for name, tensor in _random_tensors(module, seed, dtype):
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))
    module.eval()


def _random_tensors(module: torch.nn.Module, seed: int, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    embeddings = {
        f"{path}.weight".removeprefix(".")
        for path, part in module.named_modules()
        if isinstance(part, torch.nn.Embedding)
    }
    shapes = {name: tuple(given.shape) for name, given in module.named_parameters(remove_duplicate=False)}

    def draw(name: str) -> torch.Tensor:
        mean, spread = _distribution(name, shapes[name], name in embeddings)
        return _draw(f"{seed}:{name}", shapes[name], mean, spread, dtype)

    # Every tensor has a generator of its own, and numpy lets other threads run while it draws.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        yield from zip(shapes, threads.map(draw, shapes), strict=True)


def _distribution(name: str, shape: tuple[int, ...], is_embedding: bool) -> tuple[float, float]:
    """Return mean and standard deviation of a parameter's numbers."""
    leaf = name.rpartition(".")[2]
    if leaf == "modulation":
        return 0.0, shape[-1] ** -0.5
    if leaf == "bias":
        return 0.0, 0.02
    if leaf == "gamma" or len(shape) == 1:
        return 1.0, 0.1
    if is_embedding:
        return 0.0, 0.5
    deviation = math.prod(shape[1:]) ** -0.5
    # T5 does not scale its attention logits; at 64 dimensions a head, unit queries would saturate the softmax.
    return 0.0, deviation / 8 if name.endswith("SelfAttention.q.weight") else deviation


def _draw(key: str, shape: tuple[int, ...], mean: float, deviation: float, dtype: torch.dtype) -> torch.Tensor:
    """Draw bell-shaped numbers: each the sum of four 16-bit uniforms from a counter-based generator.

    Only integer sums and single float32 operations are involved, so that no machine's logarithm or cosine can differ.
    """
    words = np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little"))
    result = torch.empty(math.prod(shape), dtype=dtype, device="cpu")
    centre = 2 * 0xFFFF
    scale = np.float32(deviation / math.sqrt(4 * (0x10000**2 - 1) / 12))
    lanes = np.uint64(0x0000FFFF0000FFFF)
    for part in torch.split(result, _DRAW_PART):
        word = words.random_raw(part.numel())
        pairs = (word & lanes) + ((word >> np.uint64(16)) & lanes)
        total = ((pairs & np.uint64(0xFFFFFFFF)) + (pairs >> np.uint64(32))).astype(np.int32)
        part.copy_(torch.from_numpy((total - centre).astype(np.float32) * scale + np.float32(mean)))
    return result.reshape(shape)
