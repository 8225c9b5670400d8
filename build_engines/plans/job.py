"""What one plan is compiled from and for, what comes back, and the fingerprint by which a compiled plan is found again.

No framework is imported: the compiling process starts with these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causal_forcing.runtime.config import PlanOptions, fingerprint_of, op_digest
from causal_forcing.runtime.spec import NetworkSpec

COMPUTE_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
"""Precision to the element type that heavy layers compute in where they are not quantised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanJob:
    """One plan to compile."""

    spec: NetworkSpec
    """The network."""
    onnx: Path
    """Its exported graph."""
    plan: Path
    """File to write."""
    layers: Path
    """File for what is known about its layers, JSON."""
    backend: str
    """`tensorrt` or `tensorrt-rtx`."""
    precision: str
    """bf16, fp16 or fp8."""
    options: PlanOptions
    """GPUs, optimization level, memory, plugin."""
    timing_cache: Path | None = None
    """File that TensorRT's timings are kept in; TensorRT-RTX has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What compiling a plan took and gave; recorded in the manifest."""

    fingerprint: str
    """Hash of all that the plan depends on."""
    onnx_sha256: str
    """Of the exported graph and its external weights."""
    builder_version: str
    """Version of the TensorRT that compiled it."""
    compute_capabilities: tuple[int, ...]
    """GPU generations that it runs on."""
    precision: str
    """bf16, fp16 or fp8."""
    op_digest: str
    """Hash of the op's sources, the plugin among them."""
    plan_bytes: int
    """Size of the plan."""
    layers: int
    """Layers of the network that the builder was given."""
    parse_seconds: float
    """Time to read the graph."""
    compile_seconds: float
    """Time to build the plan, without starting the process."""
    peak_memory_bytes: int
    """Largest resident memory of the process."""
    reused: bool = False
    """Whether another engine's plan of the same fingerprint was taken."""


def plan_fingerprint(job: PlanJob, *, onnx_sha256: str, builder_version: str) -> str:
    """Return the hash of everything that a plan's content depends on."""
    return fingerprint_of(plan_identity(job, onnx_sha256=onnx_sha256, builder_version=builder_version))


def plan_identity(job: PlanJob, *, onnx_sha256: str, builder_version: str) -> Mapping[str, Any]:
    """Return what a plan's content depends on, as plain JSON values."""
    options = job.options
    return {
        "network": job.spec.name,
        "onnx_sha256": onnx_sha256,
        "backend": job.backend,
        "builder_version": builder_version,
        "precision": job.precision,
        "compute_capabilities": list(options.compute_capabilities),
        "optimization_level": options.optimization_level,
        "workspace_mib": options.workspace_mib,
        "plugin": options.plugin,
        "op_digest": op_digest(),
    }


def onnx_sha256(path: Path) -> str:
    """Return the SHA-256 of an ONNX file and of the external weights beside it, hexadecimal."""
    digest = hashlib.sha256()
    for part in (path, path.with_name(f"{path.name}.data")):
        if part.exists():
            with part.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
