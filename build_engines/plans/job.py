"""What one plan is compiled from and for, what comes back, and the fingerprint by which a compiled plan is found again.

No framework is imported: the compiling process starts with these.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from causal_forcing.runtime.config import PlanOptions, fingerprint_of, op_digest
from causal_forcing.runtime.network_spec import NetworkSpec

COMPUTE_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp8": "bfloat16"}
"""Precision to the element type that heavy layers compute in where they are not quantised."""

HEAVY_LAYERS = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "ATTENTION_INPUT")
"""Layers whose operands must have the asked element type: all the arithmetic that counts. What lies between, norms'
statistics and rotations, is fp32 where the exported graph says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanJob:
    """One plan to compile."""

    spec: NetworkSpec
    """The network."""
    onnx: Path
    """Its exported graph."""
    onnx_sha256: str
    """Hash of that and of the external weights beside it."""
    plan: Path
    """File to write."""
    layers: Path
    """File for what is known about its layers, JSON."""
    backend: str
    """`tensorrt` or `tensorrt-rtx`."""
    builder_version: str
    """Version of the TensorRT that compiles it."""
    precision: str
    """bf16, fp16 or fp8."""
    options: PlanOptions
    """GPUs, optimization level, memory, plugin."""
    timing_cache: Path | None = None
    """File that TensorRT's timings are kept in; TensorRT-RTX has none."""

    def identity(self) -> dict[str, Any]:
        """Return everything that the plan's content depends on, as plain JSON values."""
        options = asdict(self.options)
        return {
            "network": self.spec.name,
            "onnx_sha256": self.onnx_sha256,
            "backend": self.backend,
            "builder_version": self.builder_version,
            "precision": self.precision,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in options.items()},
            "op_digest": op_digest(),
        }

    def fingerprint(self) -> str:
        """Return the hash of the identity: plans of one fingerprint may stand for each other."""
        return fingerprint_of(self.identity())


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanReport:
    """What compiling a plan took and gave."""

    plan_bytes: int
    """Size of the plan."""
    layers: int
    """Layers of the network that the builder was given."""
    parse_seconds: float
    """Time to read and check the graph."""
    compile_seconds: float
    """Time to build the plan and write it, without starting the process."""
    peak_memory_bytes: int
    """Largest resident memory of the process."""

    def fields(self) -> dict[str, Any]:
        """Return the report as plain JSON values, for the manifest."""
        return asdict(self)


def onnx_sha256(path: Path) -> str:
    """Return the SHA-256 of an ONNX file and of the external weights beside it, hexadecimal."""
    digest = hashlib.sha256()
    for part in (path, path.with_name(f"{path.name}.data")):
        if part.exists():
            with part.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
