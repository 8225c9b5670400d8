"""One exported graph to one plan file, in this process; `process` gives it a fresh one."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

from causal_forcing.build_engines.plans.checks import check_network
from causal_forcing.build_engines.plans.job import PlanJob, PlanReport
from causal_forcing.build_engines.plans.layers import describe_network, engine_information
from causal_forcing.build_engines.plans.lowering import parse
from causal_forcing.build_engines.plans.progress import make_monitor
from causal_forcing.runtime.errors import PlanError
from causal_forcing.runtime.tensorrt_library import TensorRTLibrary, load_library

NetworkPass = Callable[[TensorRTLibrary, Any], None]
"""A change of the parsed network before it is checked; tests break networks with it."""


def compile_plan(
    job: PlanJob,
    *,
    emit: Callable[[tuple[Any, ...]], None] = lambda event: None,
    is_cancelled: Callable[[], bool] = lambda: False,
    network_pass: NetworkPass = lambda library, network: None,
) -> PlanReport:
    """Parse, lower, check and build one plan, and write it and what is known about its layers.

    Args:
        job: What to compile.
        emit: Takes the builder's progress events, see `progress.ProgressTree`.
        is_cancelled: Asked at every step; the build ends when it says so.
        network_pass: Applied to the parsed network before the checks.

    Raises:
        PlanError: The graph cannot be parsed, would not compute what was exported, or does not compile.
        BackendUnavailableError: TensorRT cannot be loaded.
    """
    library = load_library(job.backend)
    trt = library.trt
    if job.options.plugin is not None:
        _register_plugin(trt, job.options.plugin)
    builder = trt.Builder(library.logger)
    started_s = time.monotonic()
    network = builder.create_network(_network_flags(library, job))
    model, parser = parse(library, network, job)
    # Not before: a parser made on a network that has a recorder crashes TensorRT-RTX 1.7.1 when both are freed.
    builder.error_recorder = library.recorder
    network_pass(library, network)
    check_network(library, network, model, job)
    parsed_s = time.monotonic()
    config = _configure(library, builder, job)
    config.progress_monitor = make_monitor(trt, emit, is_cancelled)
    timing_cache = _load_timing_cache(config, job)
    plan = builder.build_serialized_network(network, config)
    del parser  # not before: the network's weights lie in its memory
    if plan is None:
        reason = "it was cancelled" if is_cancelled() else library.recorder.text() or "TensorRT does not say why"
        raise PlanError(f"{trt.__name__} cannot build {job.spec.name}: {reason}")
    job.plan.write_bytes(plan)
    built_s = time.monotonic()
    if timing_cache is not None:
        _save_timing_cache(config, timing_cache)
    information = describe_network(network, job, plan_bytes=plan.nbytes)
    information["engine"] = engine_information(library, plan)
    job.layers.write_text(json.dumps(information) + "\n", encoding="utf-8")
    return PlanReport(
        plan_bytes=plan.nbytes,
        layers=network.num_layers,
        parse_seconds=round(parsed_s - started_s, 3),
        compile_seconds=round(built_s - parsed_s, 3),
        peak_memory_bytes=_peak_memory_bytes(),
    )


def _register_plugin(trt: Any, kind: str) -> None:
    """Register the op's plugin, in the one form that was asked for: the registry knows it by its name alone."""
    if kind == "quick":
        from causal_forcing.plugins.quick_plugin import register_quick_plugin

        register_quick_plugin(trt)
        return
    from causal_forcing.plugins.tensorrt_plugin import register_plugin

    register_plugin(trt)


def _network_flags(library: TensorRTLibrary, job: PlanJob) -> int:
    if library.is_rtx:
        return 0  # strongly typed, always
    kinds = library.trt.NetworkDefinitionCreationFlag
    flags = 0
    if int(library.trt.__version__.split(".")[0]) < 11:  # from 11 on every network is
        flags |= 1 << int(kinds.STRONGLY_TYPED)
    if job.options.plugin == "quick":
        flags |= 1 << int(kinds.PREFER_AOT_PYTHON_PLUGINS)
    return flags


def _configure(library: TensorRTLibrary, builder: Any, job: PlanJob) -> Any:
    trt, options = library.trt, job.options
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if library.is_rtx:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, capability in enumerate(options.compute_capabilities):
            target = getattr(trt.ComputeCapability, f"SM{capability}")
            library.check(config.set_compute_capability(target, index), f"compile for sm_{capability}")
    else:
        config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    return config


def _load_timing_cache(config: Any, job: PlanJob) -> Path | None:
    """Give the builder what earlier builds timed on this GPU; returns the file to save it in."""
    path = job.timing_cache
    if path is None:
        return None
    content = path.read_bytes() if path.exists() else b""
    config.set_timing_cache(config.create_timing_cache(content), ignore_mismatch=False)
    return path


def _save_timing_cache(config: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_suffix(".lock")):
        partial = path.with_suffix(f".partial-{os.getpid()}")
        partial.write_bytes(config.get_timing_cache().serialize())
        partial.replace(path)


def _peak_memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
