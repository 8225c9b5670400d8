"""Prompt embeddings kept on disk: a prompt that was encoded once needs no text encoder again.

An embedding is found by a hash of everything that its bits depend on, and read back bit for bit or not at all. The
cache only saves time: a file that cannot be read is made anew, a folder that cannot be written is a warning.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import uuid
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from causal_forcing.runtime.config import fingerprint_of
from causal_forcing.runtime.environment import cache_folder, package_version
from causal_forcing.runtime.text_encoder import TEXT_ENCODER

if TYPE_CHECKING:
    from causal_forcing.runtime.loading import EngineSet

PROMPTS_FOLDER = "prompts"
"""Folder of prompt embeddings inside the cache folder."""

MAX_BYTES = 2**30
"""Size that the folder is kept to: about 250 prompts of the full-size model in bf16."""

SUFFIX = ".safetensors"
TENSOR, DIGEST = "prompt_embeds", "sha256"


class PromptNotKept(UserWarning):
    """A prompt's embedding could not be written to the cache; the message says why."""


class PromptCache:
    """A folder of prompt embeddings, those that were not used for longest leaving first.

    Args:
        folder: Where they lie; by default `prompts` in the cache folder.
        max_bytes: Size that the folder is kept to.
    """

    def __init__(self, folder: Path | None = None, *, max_bytes: int = MAX_BYTES) -> None:
        self.folder = cache_folder() / PROMPTS_FOLDER if folder is None else folder
        self._max_bytes = max_bytes

    def load(self, key: str, expected: torch.Tensor) -> torch.Tensor | None:
        """Return an embedding as it was stored, or None where there is none, or none that is whole.

        Args:
            key: From `prompt_key`.
            expected: A tensor of the shape and type that it must have.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                digest = (file.metadata() or {}).get(DIGEST)
                embedding: torch.Tensor = file.get_tensor(TENSOR)
        except (OSError, SafetensorError):
            return None
        if (embedding.shape, embedding.dtype) != (expected.shape, expected.dtype) or _sha256(embedding) != digest:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return embedding

    def store(self, key: str, embedding: torch.Tensor) -> None:
        """Keep an embedding; its file is whole or not there.

        Warns:
            PromptNotKept: It cannot be written.
        """
        from safetensors.torch import save

        embedding = embedding.detach().cpu().contiguous()
        content = save({TENSOR: embedding}, metadata={DIGEST: _sha256(embedding)})
        path = self._path(key)
        partial = path.with_name(f".{key}.partial-{uuid.uuid4().hex}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(content)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            self._trim()
        except OSError as error:
            warnings.warn(
                f"the prompt's embedding is not kept in {self.folder} ({error.strerror or error}): the text encoder "
                "runs again next time; let CAUSAL_FORCING_HOME name a folder that can be written, or use "
                "--no-prompt-cache",
                PromptNotKept,
                stacklevel=2,
            )

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _trim(self) -> None:
        """Remove what was not used for longest until the folder has its size; another process may do the same."""
        files = []
        for path in self.folder.iterdir():  # what a killed process left behind counts, and goes in its turn
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        size = sum(size for _, size, _ in files)
        for _, file_size, path in sorted(files):
            if size <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            size -= file_size


def prompt_key(engines: EngineSet, token_ids: npt.NDArray[np.int64]) -> str:
    """Return the hash that a prompt's embedding is found by.

    It covers the prompt's tokens and what encodes them: the text encoder's files, its networks, weights and precision,
    the tokenizer, the backend and the library behind it, the device, and this package's version. Clips of other shapes
    or seeds share an embedding.

    Args:
        engines: Engines with a text encoder.
        token_ids: [B, T] int64, padded.
    """
    manifest, device = engines.manifest, engines.device
    config = manifest.config
    networks = [network for network in manifest.networks if network.name.startswith(TEXT_ENCODER)]
    files = [*(file for network in networks for file in manifest.network_files(network.name))]
    files += [file for file in manifest.files if file.startswith(f"{engines.tokenizer_folder.name}/")]
    on_gpu = device.type == "cuda"
    identity = {
        "files": {file: manifest.files[file].sha256 for file in files},
        "networks": [asdict(network) for network in networks],
        "text": asdict(config.variant.model.text),
        "weights": config.weights,
        "precision": config.precision,
        "backend": [config.backend, config.backend_version],
        "libraries": [importlib.metadata.version(name) for name in ("torch", "onnxruntime")],
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "package_version": package_version(),
        "token_ids": [list(token_ids.shape), hashlib.sha256(token_ids.tobytes()).hexdigest()],
    }
    return fingerprint_of(identity)


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().data).hexdigest()
