"""Weights of the networks of one model in one file, each once: networks that share a model share its file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file


class WeightFile:
    """Collects tensors and writes them when all networks of a model have been traced.

    Args:
        name: File name inside the engine directory.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._tensors: dict[str, torch.Tensor] = {}
        self._keys: dict[tuple[object, ...], str] = {}
        self._contents: dict[str, str] = {}
        self._sources: list[torch.Tensor] = []

    def add(self, parts: Sequence[torch.Tensor]) -> str:
        """Add the concatenation of tensors along their first axis; returns its key, the same for the same numbers.

        Rewrites make new tensors for every network, such as weights in e4m3 at a common scale, and the same ones.
        """
        identity = tuple((part.data_ptr(), part.dtype, tuple(part.shape), part.stride()) for part in parts)
        if identity not in self._keys:
            whole = (parts[0] if len(parts) == 1 else torch.cat(list(parts))).detach()
            key = self._contents.setdefault(_digest(whole), f"{len(self._tensors):04}")
            if key not in self._tensors:
                self._tensors[key] = whole
            self._keys[identity] = key
            self._sources += parts  # alive, so that no other tensor comes to lie where they are
        return self._keys[identity]

    def write(self, folder: Path) -> None:
        """Write the file; parameters that share memory are written apart."""
        owned: set[int] = set()
        for key, tensor in self._tensors.items():
            storage = tensor.untyped_storage().data_ptr()
            if storage in owned or not tensor.is_contiguous():
                self._tensors[key] = tensor.contiguous().clone()
            owned.add(storage)
        save_file(self._tensors, folder / self.name)


def _digest(tensor: torch.Tensor) -> str:
    """Return a hash of a tensor's dtype, shape and numbers."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
