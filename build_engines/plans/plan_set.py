"""All exported graphs of an engine directory to plans; one that another engine has already is taken from there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from causal_forcing.build_engines.plans.job import PlanJob, onnx_sha256
from causal_forcing.build_engines.plans.process import compile_in_process
from causal_forcing.build_engines.plans.progress import ProgressTree
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.environment import cache_folder
from causal_forcing.runtime.manifest import MANIFEST_NAME, file_sha256
from causal_forcing.runtime.network_spec import NetworkSpec

PlanProgress = Callable[[str, ProgressTree], None]
"""Called with a network's name and the builder's phases whenever these change."""

TIMING_CACHES_FOLDER = "timing-caches"
"""Folder of TensorRT's timing caches inside the cache folder."""

LAYERS_SUFFIX = ".layers.json"
"""What is known about a plan's layers lies in a file of the network's name with this ending."""


def compile_plans(
    config: EngineConfig,
    networks: Iterable[NetworkSpec],
    folder: Path,
    *,
    engines: Sequence[Path],
    progress: PlanProgress = lambda name, tree: None,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Make a plan of every `NAME.onnx` in a folder, and remove that.

    Args:
        config: What the engine is for.
        networks: Their specifications.
        folder: Folder of the graphs, and of the plans.
        engines: Other engine directories, whose plans may be taken.
        progress: Told how far the builder is.

    Yields:
        (network name, plan file, record for the manifest).

    Raises:
        PlanError: A graph does not become the plan that was asked for.
    """
    for spec in networks:
        job = _plan_job(config, spec, folder)
        record = _reuse(job, engines) or _compile(job, progress)
        for graph in (job.onnx, job.onnx.with_name(f"{job.onnx.name}.data")):
            graph.unlink(missing_ok=True)
        yield spec.name, job.plan.name, record


def _plan_job(config: EngineConfig, spec: NetworkSpec, folder: Path) -> PlanJob:
    assert config.plan is not None, f"{config.backend} engines are plans"
    graph = folder / f"{spec.name}.onnx"
    timing_cache = None
    if config.backend == "tensorrt":
        name = f"{config.backend}-{config.backend_version}-sm{config.plan.compute_capabilities[0]}.cache"
        timing_cache = cache_folder() / TIMING_CACHES_FOLDER / name
    return PlanJob(
        spec=spec,
        onnx=graph,
        onnx_sha256=onnx_sha256(graph),
        plan=folder / f"{spec.name}.plan",
        layers=folder / f"{spec.name}{LAYERS_SUFFIX}",
        backend=config.backend,
        builder_version=config.backend_version,
        precision=config.precision,
        options=config.plan,
        timing_cache=timing_cache,
    )


def _compile(job: PlanJob, progress: PlanProgress) -> dict[str, Any]:
    tree = ProgressTree()

    def on_event(event: tuple[Any, ...]) -> None:
        tree.take(event)
        progress(job.spec.name, tree)

    report = compile_in_process(job, on_event=on_event)
    return {**job.identity(), "fingerprint": job.fingerprint(), **report.fields()}


def _reuse(job: PlanJob, engines: Sequence[Path]) -> dict[str, Any] | None:
    """Take the plan of another engine that was compiled from the same graph in the same way; returns its record."""
    wanted = job.fingerprint()
    for engine in engines:
        try:
            manifest = json.loads((engine / MANIFEST_NAME).read_text(encoding="utf-8"))
            record: dict[str, Any] = manifest["build"]["plans"][job.spec.name]
            if record["fingerprint"] != wanted:
                continue
            for target in (job.plan, job.layers):
                source = engine / target.name
                if file_sha256(source) != manifest["files"][target.name]["sha256"]:
                    raise OSError(f"{source} is damaged")
                _link_or_copy(source, target)
        except (OSError, ValueError, KeyError, TypeError):
            for target in (job.plan, job.layers):
                target.unlink(missing_ok=True)
            continue  # another backend's engine, or a damaged one
        return {**record, "reused_from": engine.name}
    return None


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
