"""Noise of a clip, drawn on the CPU from (seed, chunk, pass), or given.

Drawn so, a clip is the same on every backend and any number of GPUs, can go on without end, and can be repeated from
its record. NumPy's Philox is a counter-based generator: every (chunk, pass) has a stream of its own, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load_file

from causal_forcing.runtime.errors import UsageError


class NoiseSource(Protocol):
    """Where a session's noise comes from."""

    def fill(self, chunk_index: int, noise: torch.Tensor) -> None:
        """Write a chunk's noise.

        Args:
            chunk_index: Generated chunk, from 0; initial latents do not count.
            noise: [passes, B, F, C, h, w] fp32 cpu, overwritten. Entry 0 is what the first pass starts from, entry
                i > 0 what is added after pass i − 1.
        """


class SeededNoise:
    """Unit normal noise from a seed.

    Args:
        seed: Any integer from 0 to 2^64 − 1.
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 2**64:
            raise UsageError(f"seed {seed} is out of range: use --seed with a number from 0 to {2**64 - 1}")
        self._seed = seed

    def fill(self, chunk_index: int, noise: torch.Tensor) -> None:
        """See `NoiseSource.fill`."""
        for pass_index, target in enumerate(noise.numpy()):
            generator = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, pass_index, chunk_index]))
            generator.standard_normal(dtype=np.float32, out=target)


class GivenNoise:
    """Noise drawn elsewhere, such as by upstream's own code.

    Args:
        initial: [B, F_total, C, h, w], a chunk after the other; what upstream calls `noise`.
        renoise: (chunk, pass) to [B, F, C, h, w]: what is added after that pass of that chunk.
    """

    def __init__(self, initial: torch.Tensor, renoise: Mapping[tuple[int, int], torch.Tensor]) -> None:
        self._initial, self._renoise = initial, renoise

    @classmethod
    def from_file(cls, path: Path) -> GivenNoise:
        """Read a safetensors file with `noise` and `renoise.blockBB.stepS` tensors."""
        tensors = load_file(path)
        if "noise" not in tensors:
            raise UsageError(f"{path} holds no tensor named noise but {', '.join(tensors) or 'nothing'}")
        renoise = {}
        for name, tensor in tensors.items():
            if name.startswith("renoise.block"):
                chunk, step = name.removeprefix("renoise.block").split(".step")
                renoise[int(chunk), int(step)] = tensor
        return cls(tensors["noise"], renoise)

    def fill(self, chunk_index: int, noise: torch.Tensor) -> None:
        """See `NoiseSource.fill`; a pass that nothing was drawn for is NaN, so that using it cannot go unseen."""
        frames = noise.shape[2]
        start = chunk_index * frames
        if start + frames > self._initial.shape[1]:
            raise UsageError(
                f"the given noise holds {self._initial.shape[1]} latent frames, chunk {chunk_index} needs "
                f"{start} to {start + frames - 1}: ask for fewer blocks"
            )
        noise[1:].fill_(float("nan"))
        drawn = {0: self._initial[:, start : start + frames]}
        for pass_index in range(1, noise.shape[0]):
            if (chunk_index, pass_index - 1) in self._renoise:
                drawn[pass_index] = self._renoise[chunk_index, pass_index - 1]
        for pass_index, tensor in drawn.items():
            if tensor.shape != noise.shape[1:]:
                raise UsageError(
                    f"the given noise of chunk {chunk_index}, pass {pass_index} is {tuple(tensor.shape)}, expected "
                    f"{tuple(noise.shape[1:])}: give noise of the engine's shape"
                )
            noise[pass_index].copy_(tensor)
