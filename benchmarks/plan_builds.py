"""Compile every network of full-size slugs with TensorRT-RTX, from random weights, on a machine without a GPU.

Exports each slug's networks to ONNX and compiles each for several GPU generations at once, and says what that took:
time, peak memory, size. The export of a model (DiT, VAE, text encoder) is a process of its own, and so is the compiling
of each plan, so that every peak is its own; nothing is kept but the record.

A network that slugs share is built once. Two are held to be one where the model's sizes, the element type, the
io_tensors and the way chunks lie in the cache agree: nothing else enters an export, and random weights depend on seed,
name and shape alone. With `--prove` it is exported for each slug all the same, and the hashes of graph and weights are
compared.

In fp8 every linear layer and every attention over the cache is quantised, with scales that nobody calibrated: a plan is
as large and takes as long whatever they are.

    python -m benchmarks.plan_builds --prove dit vae --output benchmarks/results
    python -m benchmarks.plan_builds --precision fp8 --parts dit --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.checkout import head_commit
from benchmarks.conditions import device_name
from causal_forcing.build_engines.builder import ALL_PARTS, BuildJob, cut_networks, export_onnx
from causal_forcing.build_engines.model_loading import HollowModels
from causal_forcing.build_engines.planner import make_job
from causal_forcing.build_engines.plans.job import onnx_sha256
from causal_forcing.build_engines.plans.plan_set import compile_plans
from causal_forcing.build_engines.quantization.fp8_attention import AttentionScales
from causal_forcing.build_engines.quantization.recipe import InputScaling, Recipe, linear_groups
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.network_spec import NetworkSpec
from causal_forcing.runtime.variant import VARIANTS

GIB = 2**30
SEED = 0


def main() -> None:
    """Build the networks of all slugs, print one JSON record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slug", nargs="+", default=[slug for slug in VARIANTS if "1.3b" in slug])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--pixel-height", type=int, default=480)
    parser.add_argument("--pixel-width", type=int, default=832)
    parser.add_argument("--parts", nargs="+", default=list(ALL_PARTS), choices=ALL_PARTS, help="models to build")
    parser.add_argument("--prove", nargs="+", default=[], choices=ALL_PARTS, help="models to export for every slug")
    parser.add_argument("--folder", type=Path, help="where graphs and plans lie for a while")
    parser.add_argument("--output", type=Path, help="folder for the JSON record")
    parser.add_argument("--commit", default=head_commit(), help="commit to record; by default the checkout's")
    parser.add_argument("--networks", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.networks:
        (slug,), (part,) = arguments.slug, arguments.parts
        print(json.dumps(export(make_slug_job(arguments, slug, part), set(arguments.networks), arguments.folder)))
        return
    record = {
        "benchmark": "plan_builds",
        "conditions": conditions(arguments),
        "networks": build_networks(arguments),
    }
    print(json.dumps(record, indent=1))
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        name = f"plan_builds-{VARIANTS[arguments.slug[0]].model.name}-tensorrt-rtx-{arguments.precision}.json"
        (arguments.output / name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def build_networks(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Export and compile each distinct network of the slugs; returns what each took."""
    built: dict[tuple[object, ...], dict[str, Any]] = {}
    for slug in arguments.slug:
        for part in arguments.parts:
            job = make_slug_job(arguments, slug, part)
            hollow = HollowModels(model=job.config.variant.model, dtype=getattr(torch, job.config.dtype))
            specs = [network.spec for network in cut_networks(replace(job, source=hollow))]
            new = [spec for spec in specs if identity(job.config, spec) not in built]
            for spec in specs:
                if spec not in new:
                    built[identity(job.config, spec)]["slugs"].append(slug)
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                exported = export_apart(slug, part, specs if part in arguments.prove else new, Path(folder))
                for spec in specs:
                    if spec not in new and spec.name in exported:
                        compare(built[identity(job.config, spec)], Path(folder) / f"{spec.name}.onnx", slug)
                for name, entry in compile_all(job.config, new, Path(folder)):
                    (spec,) = [spec for spec in new if spec.name == name]
                    built[identity(job.config, spec)] = {"name": name, "slugs": [slug], **exported[name], **entry}
                    print(f"{slug} {name} {json.dumps(entry)}", file=sys.stderr)
    return list(built.values())


def make_slug_job(arguments: argparse.Namespace, slug: str, part: str) -> BuildJob:
    """Return the job of one model of a slug."""
    options = EngineOptions(
        slug=slug,
        backend="tensorrt-rtx",
        precision=arguments.precision,
        pixel_height=arguments.pixel_height,
        pixel_width=arguments.pixel_width,
        random_weights=SEED,
    )
    return replace(make_job(options, device="cpu"), parts=(part,))


def identity(config: EngineConfig, spec: NetworkSpec) -> tuple[object, ...]:
    """Return all that the export of a network from random weights depends on."""
    return config.variant.model, config.dtype, config.geometry.ring_is_chunk_aligned, spec


def export_apart(slug: str, part: str, specs: Iterable[NetworkSpec], folder: Path) -> dict[str, dict[str, Any]]:
    """Export networks of one model in a process of its own; returns what each took."""
    names = [spec.name for spec in specs]
    if not names:
        return {}
    own = ["--slug", slug, "--parts", part, "--folder", str(folder), "--networks", *names]
    # Arguments that come later win.
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_builds", *sys.argv[1:], *own],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    exported: dict[str, dict[str, Any]] = json.loads(finished.stdout)
    return exported


def export(job: BuildJob, names: set[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Export the named networks into a folder; returns seconds, bytes, and the peak memory of this process so far."""
    exported: dict[str, dict[str, Any]] = {}
    for network in cut_networks(job, uncalibrated_recipe(job.config)):
        name = network.spec.name
        if name not in names:
            continue
        path = folder / f"{name}.onnx"
        started_s = time.monotonic()
        export_onnx(network, job.config.geometry, path)
        exported[name] = {
            "parameters": sum(parameter.numel() for parameter in network.module.parameters()),
            "export_s": round(time.monotonic() - started_s, 1),
            "export_peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 2),
            "onnx_bytes": sum(file.stat().st_size for file in folder.glob(f"{path.name}*")),
        }
    return exported


def uncalibrated_recipe(config: EngineConfig) -> Recipe | None:
    """Return what an fp8 build quantises at most; None for other precisions."""
    if config.precision != "fp8":
        return None
    layers = config.variant.model.dit.num_layers
    scaling, scales = InputScaling(scale=2.0**-6), AttentionScales(q=2.0**-6, k=2.0**-6, v=2.0**-6)
    return Recipe(
        linears={name: scaling for group in linear_groups(layers) for name in group},
        attention={f"blocks.{layer}.cache_attention": scales for layer in range(layers)},
    )


def compile_all(
    config: EngineConfig, specs: Iterable[NetworkSpec], folder: Path
) -> Iterable[tuple[str, dict[str, Any]]]:
    """Compile the graphs in a folder as a build does, each in a process of its own; yields name and what it took."""
    for name, plan, report in compile_plans(config, specs, folder, engines=()):
        (folder / plan).unlink()
        yield (
            name,
            {
                "onnx_sha256": report["onnx_sha256"],
                "parse_s": round(report["parse_seconds"], 1),
                "compile_s": round(report["compile_seconds"], 1),
                "compile_peak_gib": round(report["peak_memory_bytes"] / GIB, 2),
                "plan_bytes": report["plan_bytes"],
                "layers": report["layers"],
            },
        )


def compare(entry: dict[str, Any], graph: Path, slug: str) -> None:
    """Hold another slug's graph to the one that was compiled."""
    if onnx_sha256(graph) != entry["onnx_sha256"]:
        raise SystemExit(f"{entry['name']} of {slug} is not that of {entry['slugs'][0]}, which was taken for the same")
    entry.setdefault("same_onnx_sha256", []).append(slug)
    for file in graph.parent.glob(f"{graph.name}*"):
        file.unlink()


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """Describe what the numbers were taken with."""
    configs = [make_slug_job(arguments, slug, ALL_PARTS[0]).config for slug in arguments.slug]
    geometry = asdict(configs[0].geometry)
    del geometry["chunk_frames"]
    assert configs[0].plan is not None, "a TensorRT engine has plan options"
    return {
        "commit": arguments.commit,
        "slugs": {config.variant.slug: {"chunk_frames": config.geometry.chunk_frames} for config in configs},
        "weights": configs[0].weights,
        "geometry": geometry,
        "precision": configs[0].precision,
        "backend": configs[0].backend,
        "backend_version": configs[0].backend_version,
        "compute_capabilities": configs[0].plan.compute_capabilities,
        "device": f"{os.cpu_count()} cores of {device_name(torch.device('cpu'))}",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
