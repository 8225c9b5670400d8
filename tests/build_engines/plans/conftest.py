"""Exported graphs of `tiny`, small and in bf16, as TensorRT-RTX gets them."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from causal_forcing.build_engines.builder import export_onnx
from causal_forcing.build_engines.dit_networks import dit_networks
from causal_forcing.build_engines.model_loading import RandomModels
from causal_forcing.build_engines.plans.job import PlanJob, onnx_sha256
from causal_forcing.runtime.backends import BACKENDS
from causal_forcing.runtime.config import PlanOptions
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.model_spec import TINY

MakeJob = Callable[..., PlanJob]
Run = Callable[..., subprocess.CompletedProcess[str]]

GEOMETRY = Geometry(chunk_frames=3, pixel_height=32, pixel_width=48, window_frames=6)


@pytest.fixture(scope="session")
def make_plan_job(tmp_path_factory: pytest.TempPathFactory) -> MakeJob:
    """Make the job of one network; its graph is exported once a precision."""

    @functools.cache
    def export(name: str, dtype: str) -> PlanJob:
        source = RandomModels(model=TINY, seed=0, dtype=getattr(torch, dtype))
        networks = dit_networks(source.dit(), GEOMETRY, precision=dtype, timesteps=5)
        (network,) = (network for network in networks if network.spec.name == name)
        folder = tmp_path_factory.mktemp("graphs")
        path = folder / f"{name}.onnx"
        export_onnx(network, GEOMETRY, path)
        return PlanJob(
            spec=network.spec,
            onnx=path,
            onnx_sha256=onnx_sha256(path),
            plan=folder / f"{name}.plan",
            layers=folder / f"{name}.layers.json",
            backend="tensorrt-rtx",
            builder_version=BACKENDS["tensorrt-rtx"].artefact_version(),
            precision="bf16",
            options=PlanOptions(compute_capabilities=(89, 120)),
        )

    def make(name: str = "dit_step", *, dtype: str = "bfloat16", folder: Path | None = None) -> PlanJob:
        from dataclasses import replace

        job = export(name, dtype)
        if folder is None:
            return job
        return replace(job, plan=folder / job.plan.name, layers=folder / job.layers.name)

    return make


@pytest.fixture(scope="module")
def build(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, str]]:
    """Build an engine of plans in a folder of this module's; returns its folder and what was narrated."""
    root = tmp_path_factory.mktemp("engines")

    @functools.cache
    def build_plans(*arguments: str) -> tuple[Path, str]:
        finished = run("cf-build", *arguments, "--backend", "tensorrt-rtx", "--output", str(root))
        assert finished.returncode == 0, finished.stderr
        return Path(finished.stdout.strip()), finished.stderr

    return build_plans
