"""Export the full-size DiT and VAE with random weights, and check one pass of each through ONNX Runtime.

Shows on a machine without a GPU and with little memory that the real model exports, and that its graphs compute what
the torch modules compute. Each phase runs in a process of its own, so that its peak memory is its own.

    python -m benchmarks.full_size_export --pixel-height 64 --pixel-width 96
    python -m benchmarks.full_size_export --pixel-height 480 --pixel-width 832 --no-verify
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from causal_forcing.build_engines.builder import build
from causal_forcing.build_engines.planner import make_job
from causal_forcing.build_engines.verification import verify
from causal_forcing.runtime.engine_options import EngineOptions

GIB = 2**30


def main() -> None:
    """Run the phases and print one JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slug", default="causal-forcing-wan2.1-t2v-1.3b-chunkwise")
    parser.add_argument("--pixel-height", type=int, default=64)
    parser.add_argument("--pixel-width", type=int, default=96)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--parts", nargs="+", default=["dit", "vae"], help="models to export")
    parser.add_argument("--folder", type=Path, help="where to put the engine; a temporary folder by default")
    parser.add_argument("--no-verify", action="store_true", help="export only")
    parser.add_argument("--phase", choices=["export", "verify"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        print(json.dumps(run_phase(arguments)))
        return
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="full-size-")) / "engine"
    try:
        for phase in ["export"] if arguments.no_verify else ["export", "verify"]:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.full_size_export",
                    *sys.argv[1:],
                    "--folder",
                    str(folder),
                    "--phase",
                    phase,
                ],
                check=True,
            )
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder.parent)


def run_phase(arguments: argparse.Namespace) -> dict[str, object]:
    """Export, or verify, and return what it took."""
    options = EngineOptions(
        slug=arguments.slug,
        backend=arguments.backend,
        precision=arguments.precision,
        pixel_height=arguments.pixel_height,
        pixel_width=arguments.pixel_width,
        random_weights=0,
    )
    job = replace(make_job(options, device="cpu"), parts=tuple(arguments.parts))
    started_s = time.monotonic()
    result: dict[str, object] = {
        "phase": arguments.phase,
        "slug": arguments.slug,
        "weights": "random:0",
        "pixels": f"{arguments.pixel_height}×{arguments.pixel_width}",
        "precision": arguments.precision,
        "backend": arguments.backend,
    }
    if arguments.phase == "export":
        manifest = build(job, arguments.folder, progress=lambda name: print(name, file=sys.stderr))
        result["network_seconds"] = manifest.build["network_seconds"]
        result["gib"] = round(sum(entry.bytes for entry in manifest.files.values()) / GIB, 2)
    else:
        worst: dict[str, dict[str, float]] = {}
        for comparison in verify(job, arguments.folder, device="cpu"):
            entry = worst.setdefault(comparison.network, {"max_error": 0.0, "magnitude": 0.0, "cosine": 1.0})
            entry["max_error"] = max(entry["max_error"], comparison.max_error)
            entry["magnitude"] = max(entry["magnitude"], comparison.magnitude)
            entry["cosine"] = min(entry["cosine"], comparison.cosine)
            if not comparison.passed:
                raise SystemExit(f"{comparison.network}.{comparison.output} differs: {comparison}")
        result["networks"] = worst
    result["seconds"] = round(time.monotonic() - started_s, 1)
    result["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2)
    return result


if __name__ == "__main__":
    main()
