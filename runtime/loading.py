"""An engine directory to loaded engines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from causal_forcing.runtime.backends import BACKENDS, choose_backend, choose_device
from causal_forcing.runtime.config import TEXT_ENCODER_USES
from causal_forcing.runtime.engine import Engine, IOTensors
from causal_forcing.runtime.errors import UnknownNameError
from causal_forcing.runtime.manifest import Manifest, check_files, read_manifest
from causal_forcing.runtime.network_spec import NetworkSpec
from causal_forcing.runtime.text_encoder import TEXT_ENCODER, TextEncoder

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
    """Network name to engine; those of the text encoder are not among them."""
    device: torch.device
    """Where they run."""
    text_encoder: TextEncoder | None = None
    """The text encoder, loaded when a prompt needs it; None takes prompt embeddings only."""

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the tokenizer's files."""
        return self.folder / TOKENIZER_FOLDER

    def bind(self) -> IOTensors:
        """Make the buffers of all engines, those of a text encoder that is not loaded yet too, and bind them."""
        engines, text_encoder = self.engines.values(), self.text_encoder
        later = () if text_encoder is None else text_encoder.networks
        io_tensors = IOTensors([*(engine.spec for engine in engines), *later], self.device)
        for engine in engines:
            engine.bind(io_tensors)
        if text_encoder is not None:
            text_encoder.bind(io_tensors)
        return io_tensors


def load_engines(folder: Path | str, *, device: str = "auto", text_encoder: str = "free") -> EngineSet:
    """Load every engine of a directory, but for the text encoder, whose files are left alone until a prompt needs it.

    Args:
        folder: An engine directory, as `cf-build` prints it.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        text_encoder: What becomes of the text encoder once it has encoded a prompt: `free`, on any device, for it is
            several times larger than all other networks, or `keep` where many prompts follow each other.

    Raises:
        UnknownNameError: There is no such way with the text encoder.
        EngineNotFoundError: There is none.
        EngineMismatchError: It was built by another version, with another op, or for another GPU or TensorRT.
        EngineDamagedError: A file is missing or differs from its recorded hash.
        BackendUnavailableError: Its backend is not installed, or the device is not there.
    """
    if text_encoder not in TEXT_ENCODER_USES:
        raise UnknownNameError("use of the text encoder", text_encoder, TEXT_ENCODER_USES)
    folder = Path(folder)
    manifest = read_manifest(folder)
    chosen = engine_device(manifest, device)
    load = engine_loader(folder, manifest, chosen)  # what does not fit is refused before gigabytes are hashed
    deferred = [network for network in manifest.networks if network.name.startswith(TEXT_ENCODER)]
    later = {file for network in deferred for file in manifest.network_files(network.name)}
    check_files(folder, manifest, names=set(manifest.files) - later, trust_stamps=True)
    engines = {network.name: load(network.name) for network in manifest.networks if network not in deferred}

    def load_checked(name: str) -> Engine:
        check_files(folder, manifest, names=manifest.network_files(name), trust_stamps=True)
        return load(name)

    encoder = TextEncoder(deferred, load_checked, chosen, keep=text_encoder == "keep") if deferred else None
    return EngineSet(folder=folder, manifest=manifest, engines=engines, device=chosen, text_encoder=encoder)


def load_engine(folder: Path, manifest: Manifest, name: str, device: torch.device) -> Engine:
    """Load one engine of a directory, by itself.

    Raises:
        EngineMismatchError: It is for another GPU or TensorRT.
        EngineDamagedError: The backend cannot load its file.
    """
    return engine_loader(folder, manifest, device)(name)


def engine_loader(folder: Path, manifest: Manifest, device: torch.device) -> Callable[[str], Engine]:
    """Return what loads the engines of a directory by name; the backend's library is imported only here.

    TensorRT's engines share memory and a runtime, which the loader makes once.

    Raises:
        EngineMismatchError: They are for another GPU or TensorRT.
        BackendUnavailableError: TensorRT cannot be loaded.
    """
    make: Callable[[NetworkSpec, Path], Engine]
    if BACKENDS[manifest.config.backend].makes_plans:
        from causal_forcing.runtime.engines.tensorrt_engine import TensorRTEngine
        from causal_forcing.runtime.engines.tensorrt_runtime import TensorRTRuntime

        make = functools.partial(TensorRTEngine, TensorRTRuntime(folder, manifest, device))
    elif manifest.config.backend == "onnxruntime":
        from causal_forcing.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine

        make = OnnxRuntimeEngine
    elif manifest.config.backend == "cuda":
        from causal_forcing.runtime.engines.cuda_engine import CudaEngine, DeviceWeights
        from causal_forcing.runtime.engines.kernel_cache import use_kernel_cache

        use_kernel_cache(folder)
        make = functools.partial(CudaEngine, DeviceWeights(folder, device))
    else:
        from causal_forcing.runtime.engines.torch_engine import TorchEngine

        make = functools.partial(TorchEngine, device=device)
    return lambda name: make(manifest.network(name), folder / manifest.artefacts[name])


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
