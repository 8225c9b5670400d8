"""Engines against what they were made from, output by output, on seeded inputs.

What stands beside what: engines of ONNX Runtime and torch against the torch module that they were exported from; for
plans, ONNX Runtime against the torch module, both in fp32, and, where there is a GPU, the plan against ONNX Runtime.
Engines of several ranks run as the first of them would, and their modules with them: what ranks send is their own.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from polygraphy.comparator import (
    Comparator,
    CosineSimilarityCompareFunc,
    IterationResult,
    PsnrCompareFunc,
    RunResults,
    SimpleCompareFunc,
)
from polygraphy.logger import G_LOGGER

from causal_forcing.build_engines.builder import BuildJob, cut_networks, export_onnx
from causal_forcing.build_engines.networks import Network
from causal_forcing.build_engines.quantization.recipe import find_recipe
from causal_forcing.plugins.ranks import rehearse
from causal_forcing.runtime.backends import BACKENDS, choose_device
from causal_forcing.runtime.engine import Engine, IOTensors
from causal_forcing.runtime.engines.onnxruntime_engine import OnnxRuntimeEngine
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.loading import engine_device, load_engine
from causal_forcing.runtime.manifest import check_files, read_manifest
from causal_forcing.runtime.model_spec import ModelSpec
from causal_forcing.runtime.network_spec import NetworkSpec
from causal_forcing.runtime.rope import RopePhases

TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2, "fp8": 0.15}
"""Largest error allowed, relative to the output's largest magnitude. fp32: sums in another order, through 30 layers.

fp8: both sides quantise alike and agree to the last bits, until sums in another order bring one value to the other side
of an edge between two steps of e4m3, an eighth of the value. That spreads, and from some layer on both carry rounding
noise of their own: 2 to 4 % of an output's RMS, and up to 12 % of the largest magnitude where it is largest (`shapes`).
So this finds gross mistakes: a doubled weight scale in 23 of the 30 linear layers after which no norm hides it. The
rest is for the tests of the quantised layers and for `--quality`.
"""

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputComparison:
    """One output of one engine against the reference's."""

    network: str
    """Network."""
    output: str
    """Output's name."""
    engine: str
    """What was compared: backend and precision."""
    reference: str
    """With what: backend and precision."""
    max_error: float
    """Largest absolute difference."""
    mean_error: float
    """Mean absolute difference."""
    cosine: float
    """Cosine of the angle between both."""
    psnr_db: float | None
    """Peak signal to noise ratio; None where both are the same."""
    magnitude: float
    """Largest magnitude of the reference's output."""
    passed: bool
    """Whether `max_error` is within the precision's tolerance."""

    @property
    def verdict(self) -> str:
        """The outcome in a word."""
        return "ok" if self.passed else "FAILED"


def verify(job: BuildJob, folder: Path, *, device: str = "auto", seed: int = 0) -> Iterator[OutputComparison]:
    """Run every network on the same inputs through engine and reference, and compare.

    One engine is loaded at a time: a full-size model is in memory twice here, as module and as engine.

    Args:
        job: What the engines were built from; its modules run on the CPU.
        folder: The engine directory.
        device: Where the engines run.
        seed: Seed of the inputs.

    Raises:
        CausalForcingError: The engines cannot be loaded.
    """
    manifest = read_manifest(folder)
    if job.config.plan is not None:
        yield from _verify_plans(job, folder, device, seed)
        return
    chosen = engine_device(manifest, device)
    check_files(folder, manifest)
    config = job.config
    for network in cut_networks(job, find_recipe(folder)):
        inputs = make_inputs(network.spec, config.geometry, config.variant.model, seed)
        with rehearse(config.context_parallel):
            got = _run_engine(load_engine(folder, manifest, network.spec.name, chosen), inputs, chosen)
            want = _run_module(network, inputs)
        names = (f"{config.backend} {config.precision}", f"torch {config.precision}")
        yield from _compare_all(network.spec, got, want, names, TOLERANCES[config.precision])


def _verify_plans(job: BuildJob, folder: Path, device: str, seed: int) -> Iterator[OutputComparison]:
    manifest, config = read_manifest(folder), job.config
    check_files(folder, manifest)
    runs_here = BACKENDS[config.backend].runs_on_device(choose_device(device))
    chosen = engine_device(manifest, device) if runs_here else None
    for network in cut_networks(_reference_job(job), find_recipe(folder)):
        name = network.spec.name
        plan_spec = manifest.network(name)
        inputs = make_inputs(plan_spec, config.geometry, config.variant.model, seed)
        wide = {io.name: inputs[io.name].to(getattr(torch, io.dtype)) for io in network.spec.inputs}
        want = _run_module(network, wide)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / f"{name}.onnx"
            export_onnx(network, config.geometry, path)
            exported = _run_engine(OnnxRuntimeEngine(network.spec, path), wide, torch.device("cpu"))
        precision = "fp8" if config.precision == "fp8" else "fp32"
        names = (f"onnxruntime {precision}", f"torch {precision}")
        yield from _compare_all(network.spec, exported, want, names, TOLERANCES[precision])
        if chosen is not None:
            got = _run_engine(load_engine(folder, manifest, name, chosen), inputs, chosen)
            names = (f"{config.backend} {config.precision}", names[0])
            yield from _compare_all(plan_spec, got, exported, names, TOLERANCES[config.precision])


def _reference_job(job: BuildJob) -> BuildJob:
    """Return the job whose networks ONNX Runtime can run: the same weights, in fp32 where they are not quantised."""
    precision = "fp8" if job.config.precision == "fp8" else "fp32"
    config = dataclasses.replace(job.config, backend="onnxruntime", precision=precision, plan=None)
    source = dataclasses.replace(job.source, dtype=torch.float32)  # type: ignore[type-var]  # every source is a dataclass
    return dataclasses.replace(job, config=config, source=source)


def make_inputs(spec: NetworkSpec, geometry: Geometry, model: ModelSpec, seed: int) -> dict[str, torch.Tensor]:
    """Make inputs that a session could give: unit normal tensors, a chunk in the middle of the window."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {io.name: torch.randn(io.shape, generator=generator).to(getattr(torch, io.dtype)) for io in spec.inputs}
    for prefix in ("", "pair_"):
        if f"{prefix}slots" in inputs:
            _place(inputs, prefix, geometry)
    if "token_mask" in inputs:
        shape = inputs["token_mask"].shape
        inputs["token_mask"] = (torch.arange(shape[1]) < shape[1] // 3).long().expand(shape).contiguous()
    if "token_ids" in inputs:
        inputs["token_ids"] = torch.randint(model.text.vocab_size, inputs["token_ids"].shape, generator=generator)
    return inputs


def _place(inputs: dict[str, torch.Tensor], prefix: str, geometry: Geometry) -> None:
    """Tell a pass where its chunks lie, in the middle of the window; each attends to itself and what lies before it."""
    slots, valid_slots = inputs[f"{prefix}slots"], inputs[f"{prefix}valid_slots"]
    start = (geometry.window_frames - len(slots)) // 2
    slots.copy_(torch.arange(start, start + len(slots)) * geometry.tokens_per_frame)
    ends = torch.arange(start, start + len(slots), geometry.chunk_frames) + geometry.chunk_frames
    valid_slots.copy_((ends * geometry.tokens_per_frame).repeat_interleave(geometry.batch))
    RopePhases(
        inputs[f"{prefix}rope_cos"],
        inputs[f"{prefix}rope_sin"],
        frames=len(slots),
        rows=geometry.token_rows,
        columns=geometry.token_columns,
    ).place(start)


def _run_engine(engine: Engine, inputs: Tensors, device: torch.device) -> dict[str, torch.Tensor]:
    io_tensors = IOTensors([engine.spec], device)
    engine.bind(io_tensors)
    for name, tensor in inputs.items():
        io_tensors[name].copy_(tensor)
    engine.enqueue()
    carried = {} if engine.spec.in_place else dict(engine.spec.states)
    return {io.name: io_tensors[carried.get(io.name, io.name)].cpu() for io in engine.spec.outputs}


def _run_module(network: Network, inputs: Tensors) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        outputs = network.module(*(inputs[io.name].clone() for io in network.spec.inputs))
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return {io.name: output for io, output in zip(network.spec.outputs, outputs, strict=True)}


def _compare_all(
    spec: NetworkSpec, got: Tensors, want: Tensors, names: tuple[str, str], tolerance: float
) -> Iterator[OutputComparison]:
    """Compare every output of a network through Polygraphy's comparator."""
    for io_tensor in spec.outputs:
        output = io_tensor.name
        yield _compare(spec.name, output, names, got[output], want[output], tolerance)


def _compare(
    network: str, output: str, names: tuple[str, str], got: torch.Tensor, want: torch.Tensor, tolerance: float
) -> OutputComparison:
    reference, array = (tensor.double().flatten().numpy() for tensor in (want, got))
    magnitude = float(np.abs(reference).max())
    allowed = tolerance * max(magnitude, 1.0)
    engine, beside = names
    runs = RunResults()
    runs.append((beside, [IterationResult({output: reference}, runner_name=beside)]))
    runs.append((engine, [IterationResult({output: array}, runner_name=engine)]))
    # `max` checks the absolute or the relative error; the relative one, of values near zero, says nothing.
    compare = [
        SimpleCompareFunc(atol=allowed, rtol=0.0, check_error_stat="max"),
        CosineSimilarityCompareFunc(cosine_similarity_threshold=-1.0),
        PsnrCompareFunc(psnr_threshold=-math.inf),
    ]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(invalid="ignore"):
        errors, cosines, ratios = (
            next(iter(result.values()))[0][output] for result in Comparator.compare_accuracy(runs, compare_func=compare)
        )
    return OutputComparison(
        network=network,
        output=output,
        engine=engine,
        reference=beside,
        max_error=errors.max_absdiff,
        mean_error=errors.mean_absdiff,
        cosine=cosines.cosine_similarity,
        psnr_db=ratios.psnr if math.isfinite(ratios.psnr) else None,
        magnitude=magnitude,
        # A NaN is within no tolerance.
        passed=bool(errors) and math.isfinite(errors.max_absdiff) and errors.max_absdiff <= allowed,
    )
