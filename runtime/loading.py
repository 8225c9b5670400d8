"""An engine directory to loaded engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from causal_forcing.runtime.backends import choose_backend, choose_device
from causal_forcing.runtime.engine import Engine
from causal_forcing.runtime.manifest import Manifest, check_files, read_manifest
from causal_forcing.runtime.spec import NetworkSpec

TOKENIZER_FOLDER = "tokenizer"
"""Folder of the tokenizer inside an engine directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSet:
    """All engines of one directory, loaded and not yet bound."""

    folder: Path
    """The engine directory."""
    manifest: Manifest
    """Its manifest."""
    engines: Mapping[str, Engine]
    """Network name to engine."""
    device: torch.device
    """Where they run."""

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the tokenizer's files."""
        return self.folder / TOKENIZER_FOLDER


def load_engines(folder: Path | str, *, device: str = "auto") -> EngineSet:
    """Load every engine of a directory.

    Args:
        folder: An engine directory, as `cf-build` prints it.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        EngineNotFoundError: There is none.
        EngineMismatchError: It was built by another version, or with another op.
        EngineDamagedError: A file is missing or differs from its recorded hash.
        BackendUnavailableError: Its backend is not installed, or the device is not there.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    backend = manifest.config.backend
    # The engine decides the backend; a CPU backend on a GPU machine is no reason to refuse.
    chosen = choose_device(device)
    if backend == "onnxruntime" and device == "auto":
        chosen = "cpu"
    choose_backend(backend, chosen)
    check_files(folder, manifest)
    load = _loader(backend, torch.device(chosen))
    engines = {network.name: load(network, folder / manifest.artefacts[network.name]) for network in manifest.networks}
    return EngineSet(folder=folder, manifest=manifest, engines=engines, device=torch.device(chosen))


def _loader(backend: str, device: torch.device) -> Callable[[NetworkSpec, Path], Engine]:
    """Return the backend's way of loading one network; its library is imported only here."""
    if backend == "onnxruntime":
        from causal_forcing.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine

        return OnnxRuntimeEngine
    from causal_forcing.runtime.engines.torch_engine import TorchEngine

    return lambda spec, path: TorchEngine(spec, path, device)
