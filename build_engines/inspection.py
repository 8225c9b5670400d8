"""What an engine directory holds: configuration, networks, files, operators."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from causal_forcing.build_engines.plans.plan_set import LAYERS_SUFFIX
from causal_forcing.runtime.config import PlanOptions
from causal_forcing.runtime.manifest import Manifest, check_files, read_manifest
from causal_forcing.runtime.tape import TAPE_SUFFIX, Tape, read_tape


def inspect_engine(folder: Path) -> dict[str, Any]:
    """Summarise an engine directory whose files are whole.

    Raises:
        EngineNotFoundError: There is none.
        EngineMismatchError: Another version built it.
        EngineDamagedError: A file is missing or altered.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    config = manifest.config
    return {
        "folder": str(folder),
        "fingerprint": config.fingerprint(),
        "config": {
            "slug": config.variant.slug,
            "model": config.variant.model.name,
            "backend": f"{config.backend} ({config.backend_version})",
            "precision": config.precision,
            "pixels": f"{config.geometry.pixel_height}×{config.geometry.pixel_width}",
            "chunk_frames": config.geometry.chunk_frames,
            "window_frames": config.geometry.window_frames,
            "sink_frames": config.geometry.sink_frames,
            "weights": config.weights,
            "built": manifest.build.get("created"),
            "build_seconds": manifest.build.get("seconds"),
            **_plan_options(config.plan),
        },
        "networks": [_network(folder, manifest, name) for name in manifest.artefacts],
    }


def _network(folder: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    spec, file = manifest.network(name), manifest.artefacts[name]
    tape = read_tape(folder / file) if file.endswith(TAPE_SUFFIX) else None
    # Weights that networks share count for each of them.
    files = (file,) if tape is None else (file, tape.weight_file)
    size_bytes = sum(entry.bytes for path, entry in manifest.files.items() if path.startswith(files))
    operators = _onnx_operators(folder / file) if file.endswith(".onnx") else _tape_operators(tape)
    known = folder / f"{name}{LAYERS_SUFFIX}"
    return {
        "network": name,
        "file": file,
        "bytes": size_bytes,
        "inputs": len(spec.inputs),
        "outputs": len(spec.outputs),
        "states": len(spec.states),
        "in_place": spec.in_place,
        "operators": ", ".join(f"{kind} {count}" for kind, count in operators.items()),
        "io_tensors": {io.name: [io.dtype, *io.shape] for io in spec.io_tensors()},
        "plan": _plan(known, manifest, name) if known.exists() else None,
    }


def _plan_options(plan: PlanOptions | None) -> dict[str, Any]:
    if plan is None:
        return {}
    return {
        "compute_capabilities": ", ".join(f"sm_{number}" for number in plan.compute_capabilities),
        "optimization_level": plan.optimization_level,
        "workspace_mib": plan.workspace_mib,
        "plugin": plan.plugin or "none: the op is native layers",
    }


def _plan(known: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    """Return what is known of a plan: its layers, their precisions, what shares memory, what it takes and took."""
    information: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
    return {**information, "build": manifest.build["plans"][name]}


def _tape_operators(tape: Tape | None) -> dict[str, int]:
    """Count the operators of a tape, the five most frequent first; none where there is no tape."""
    calls = () if tape is None else tape.calls
    return dict(Counter(call.operator.split(".")[1] for call in calls).most_common(5))


def _onnx_operators(path: Path) -> dict[str, int]:
    """Count the operators of an ONNX graph, the five most frequent first."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node).most_common(5))
