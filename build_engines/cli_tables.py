"""The results of `cf-build` as tables. No framework is imported: `inspect` must not wait for torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from causal_forcing.build_engines.plans.job import HEAVY_LAYERS
from causal_forcing.runtime import console

if TYPE_CHECKING:
    from causal_forcing.build_engines.planner import BuildPlan
    from causal_forcing.build_engines.quality import QualityReport
    from causal_forcing.build_engines.verification import OutputComparison


def print_plan(outcome: BuildPlan) -> None:
    """Print what a build would do, and what it needs."""
    console.print_table(
        ("network", "weights", "action"),
        [
            (name, size(weight_bytes), "reuse" if outcome.reuse else "build")
            for name, weight_bytes in outcome.networks.items()
        ],
    )
    free = shutil.disk_usage(_existing(outcome.folder)).free
    console.print_line(f"{'reuse' if outcome.reuse else 'build'}: {outcome.reason}")
    console.print_line(f"folder: {outcome.folder}")
    console.print_line(f"disk: {size(sum(outcome.networks.values()))} of weights, {size(free)} free")
    console.print_line(f"memory of a session's buffers: {size(outcome.buffer_bytes)}")
    for download in outcome.downloads:
        state = "cached" if download.cached else "to download"
        console.print_line(f"{state}: {download.repo}@{download.revision[:12]} {download.filename}")


def print_comparisons(comparisons: Sequence[OutputComparison]) -> None:
    """Print every output that was compared."""
    console.print_table(
        ("network", "output", "engine", "beside", "max error", "mean error", "cosine", "PSNR", "result"),
        [
            (
                c.network,
                c.output,
                c.engine,
                c.reference,
                f"{c.max_error:.2e}",
                f"{c.mean_error:.2e}",
                f"{c.cosine:.6f}",
                "same" if c.psnr_db is None else f"{c.psnr_db:.1f} dB",
                c.verdict,
            )
            for c in comparisons
        ],
    )


def print_quality(report: QualityReport, *, clips: int) -> None:
    """Print what the clips of an engine and of the reference show."""
    engines = [engine for engine in (report.engine, report.reference) if engine is not None]
    console.print_table(
        ("engine", "clips", *(name for name, _ in report.engine.scores.items()), "steady fps", "PSNR"),
        [
            (
                engine.name,
                clips,
                *(f"{share.fraction:.1%}" for _, share in engine.scores.items()),
                f"{engine.steady_fps:.1f}",
                f"{report.psnr_db:.1f} dB" if engine is report.engine and report.psnr_db is not None else None,
            )
            for engine in engines
        ],
    )


def print_engine(summary: dict[str, Any]) -> None:
    """Print what an engine directory holds."""
    console.print_table(("field", "value"), summary["config"].items())
    console.print_line("")
    console.print_table(
        ("network", "file", "size", "inputs", "outputs", "operators"),
        [
            (row["network"], row["file"], size(row["bytes"]), row["inputs"], row["outputs"], row["operators"])
            for row in summary["networks"]
        ],
    )
    plans = [row["plan"] for row in summary["networks"] if row["plan"]]
    if plans:
        console.print_line("")
        _print_layers(plans)


def _print_layers(plans: list[dict[str, Any]]) -> None:
    """Print layers, element types, aliases and memory of plans."""
    headers = ("network", "layers", "arithmetic in", "aliases", "io_tensors", "of it caches", "plan", "activations")
    rows = []
    for plan in plans:
        memory, engine = plan["memory"], plan["engine"]
        heavy = {kind: count for kind, count in plan["precisions"].items() if kind.split()[0] in HEAVY_LAYERS}
        arithmetic = ", ".join(f"{kind} {count}" for kind, count in heavy.items())
        sizes = (size(memory[name]) for name in ("io_tensor_bytes", "cache_bytes", "plan_bytes"))
        activations = size(engine["activation_bytes"]) if engine else "known on the GPU"
        rows.append((plan["network"], len(plan["layers"]), arithmetic, len(plan["aliases"]), *sizes, activations))
    console.print_table(headers, rows)


def size(size_bytes: int) -> str:
    """Return a size in memory or on disk as people read it."""
    return f"{size_bytes / 2**20:.1f} MiB" if size_bytes < 2**30 else f"{size_bytes / 2**30:.2f} GiB"


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
