"""An engine directory to loaded engines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from causal_forcing.runtime.backends import BACKENDS, choose_backend, choose_device
from causal_forcing.runtime.engine import Engine
from causal_forcing.runtime.manifest import Manifest, check_files, read_manifest

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
    chosen = engine_device(manifest, device)
    check_files(folder, manifest)
    engines = {network.name: load_engine(folder, manifest, network.name, chosen) for network in manifest.networks}
    return EngineSet(folder=folder, manifest=manifest, engines=engines, device=chosen)


def load_engine(folder: Path, manifest: Manifest, name: str, device: torch.device) -> Engine:
    """Load one engine of a directory; the backend's library is imported only here.

    Raises:
        EngineDamagedError: The backend cannot load its file.
    """
    spec, path = manifest.network(name), folder / manifest.artefacts[name]
    if manifest.config.backend == "onnxruntime":
        from causal_forcing.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine

        return OnnxRuntimeEngine(spec, path)
    from causal_forcing.runtime.engines.torch_engine import TorchEngine

    return TorchEngine(spec, path, device)


def engine_device(manifest: Manifest, device: str) -> torch.device:
    """Return the device that an engine directory runs on.

    Raises:
        BackendUnavailableError: Its backend is not installed, or the device is not there.
        UsageError: Its backend does not run on that device.
    """
    backend = manifest.config.backend
    if device == "auto" and "cuda" not in BACKENDS[backend].runs_on:
        device = "cpu"  # a CPU backend on a GPU machine is no reason to refuse
    device = choose_device(device)
    choose_backend(backend, device)
    return torch.device(device)
