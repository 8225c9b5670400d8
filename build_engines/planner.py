"""What a build would do: reuse or build, and why; what it would download, write and need."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from causal_forcing.build_engines.builder import BuildJob, cut_networks
from causal_forcing.build_engines.model_loading import HollowModels, RandomModels, ReleasedModels
from causal_forcing.build_engines.weights import PlannedDownload, WeightFiles, planned_downloads, resolve_weights
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.engine import IOTensors
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.errors import CausalForcingError, CheckpointError
from causal_forcing.runtime.manifest import MANIFEST_NAME, check_files, file_sha256, read_manifest
from causal_forcing.runtime.resolution import resolve_engine, taehv_file, weights_identity


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """The outcome of planning."""

    config: EngineConfig
    """What was asked for, complete."""
    folder: Path
    """Where the engine is, or would be."""
    reuse: bool
    """Whether it is there and fits."""
    reason: str
    """Why it is reused or built."""
    networks: dict[str, int]
    """Bytes of weights of each network."""
    buffer_bytes: int
    """Memory of a session's buffers, caches included."""
    downloads: list[PlannedDownload]
    """Files that come from the hub."""

    def summary(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            "folder": str(self.folder),
            "reuse": self.reuse,
            "reason": self.reason,
            "fingerprint": self.config.fingerprint(),
            "config": self.config.fields(),
            "networks": self.networks,
            "engine_bytes": sum(self.networks.values()),
            "buffer_bytes": self.buffer_bytes,
            "downloads": [download._asdict() for download in self.downloads],
        }


def plan_build(options: EngineOptions, root: Path, *, device: str = "auto") -> BuildPlan:
    """Plan a build without loading weights or touching the network."""
    weights = weights_identity(options)
    local = weights is None
    downloads: list[PlannedDownload] = []
    if local or (weights or "").startswith("hub:"):
        downloads = planned_downloads(
            options.variant(),
            checkpoint=options.checkpoint,
            wan_folder=options.wan_folder,
            has_taehv=options.has_taehv,
        )
    if weights is None:
        can_read = all(download.cached for download in downloads)
        weights = local_identity(find_weights(options)) if can_read else "sha256:unknown"
    config = resolve_engine(options, weights=weights, device=device, for_build=True)
    folder = config.folder(root)
    job = BuildJob(config=config, source=HollowModels(model=config.variant.model, dtype=_dtype(config)))
    networks = list(cut_networks(job))
    reuse, reason = _reuse(folder, config)
    return BuildPlan(
        config=config,
        folder=folder,
        reuse=reuse,
        reason=reason,
        networks={
            network.spec.name: sum(parameter.nbytes for parameter in network.module.parameters())
            for network in networks
        },
        buffer_bytes=IOTensors.measure(network.spec for network in networks),
        downloads=downloads,
    )


def make_job(options: EngineOptions, *, device: str = "auto") -> BuildJob:
    """Resolve options and weights into a build job; downloads what is missing.

    Raises:
        WeightsMissingError: Weights that are not random cannot be had.
        CheckpointError: A weight file is unreadable, unsafe, or another model's.
    """
    weights = weights_identity(options)
    if weights is not None and weights.startswith("random:"):
        config = resolve_engine(options, weights=weights, device=device, for_build=True)
        seed = int(weights.removeprefix("random:"))
        source = RandomModels(model=config.variant.model, seed=seed, dtype=_dtype(config))
        # A vocabulary that comes with the package may be smaller than the byte tokenizer's.
        tokenizer = find_weights(options).tokenizer if config.variant.included_weights else None
        return BuildJob(config=config, source=source, tokenizer=tokenizer)
    # Resolved once without weights first, so that a wrong option is found before a long download.
    resolve_engine(options, weights="", device=device, for_build=True)
    files = find_weights(options)
    config = resolve_engine(options, weights=weights or local_identity(files), device=device, for_build=True)
    released = ReleasedModels(variant=config.variant, files=files, dtype=_dtype(config))
    released.check()
    provenance = {"weight_files": {role: str(path) for role, path in files.paths().items()}}
    return BuildJob(config=config, source=released, tokenizer=files.tokenizer, provenance=provenance)


def find_weights(options: EngineOptions) -> WeightFiles:
    """Return the released weights that the options stand for."""
    taehv = taehv_file(options) if options.has_taehv else None  # missing, it is told before a long download
    return resolve_weights(options.variant(), checkpoint=options.checkpoint, wan_folder=options.wan_folder, taehv=taehv)


def local_identity(files: WeightFiles) -> str:
    """Return the identity of weight files: a hash over the content of them all."""
    try:
        digests = {role: file_sha256(path) for role, path in files.paths().items()}
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror}): check its permissions") from error
    return "sha256:" + hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def _dtype(config: EngineConfig) -> torch.dtype:
    dtype = getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype), f"{config.dtype} names a torch dtype"
    return dtype


def _reuse(folder: Path, config: EngineConfig) -> tuple[bool, str]:
    """Return whether the engine is there, and the reason in words."""
    if (folder / MANIFEST_NAME).exists():
        try:
            check_files(folder, read_manifest(folder))
        except CausalForcingError as error:
            return False, f"the engine there cannot be used: {error}"
        return True, "an engine with this fingerprint is there"
    nearest: list[str] | None = None
    for manifest in sorted(folder.parent.glob(f"*/{MANIFEST_NAME}")):
        try:
            fields = json.loads(manifest.read_text(encoding="utf-8"))["config"]
            differences = list(_differences(fields, config.fields()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a damaged neighbour is not this plan's concern
        if nearest is None or len(differences) < len(nearest):
            nearest = differences
    if nearest is None:
        return False, f"no engine of {config.variant.slug} has been built"
    return False, f"the nearest engine differs in {', '.join(nearest[:4])}"


def _differences(have: dict[str, Any], want: dict[str, Any], prefix: str = "") -> list[str]:
    differences: list[str] = []
    for name in sorted(have.keys() | want.keys()):
        left, right = have.get(name), want.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            differences += _differences(left, right, f"{prefix}{name}.")
        elif left != right:
            differences.append(f"{prefix}{name} ({left}, wanted {right})")
    return differences
