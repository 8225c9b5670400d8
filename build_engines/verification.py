"""Engines against the torch modules they were made from, output by output, on seeded inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from causal_forcing.build_engines.builder import BuildJob, cut_networks
from causal_forcing.build_engines.quantization.recipe import find_recipe
from causal_forcing.runtime.engine import Engine, IOTensors
from causal_forcing.runtime.loading import engine_device, load_engine
from causal_forcing.runtime.manifest import check_files, read_manifest
from causal_forcing.runtime.rope import RopePhases
from causal_forcing.runtime.spec import Geometry, ModelSpec, NetworkSpec

TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2, "fp8": 0.15}
"""Largest error allowed, relative to the output's largest magnitude. fp32: sums in another order, through 30 layers.

fp8: both sides quantise alike and agree to the last bits, until sums in another order bring one value to the other side
of an edge between two steps of e4m3, an eighth of the value. That spreads, and from some layer on both carry rounding
noise of their own, 2 to 4 % of an output's RMS; the largest of 100,000 such errors was seen at 6 % of the largest
magnitude. The smallest mistake in a scale, a factor of two, makes 50 %.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputComparison:
    """One output of one engine against the module's."""

    network: str
    """Network."""
    output: str
    """Output's name."""
    max_error: float
    """Largest absolute difference."""
    mean_error: float
    """Mean absolute difference."""
    cosine: float
    """Cosine of the angle between both."""
    magnitude: float
    """Largest magnitude of the module's output."""
    passed: bool
    """Whether `max_error` is within the precision's tolerance."""

    @property
    def verdict(self) -> str:
        """The outcome in a word."""
        return "ok" if self.passed else "FAILED"


def verify(job: BuildJob, folder: Path, *, device: str = "auto", seed: int = 0) -> Iterator[OutputComparison]:
    """Run every network on the same inputs through its module and its engine, and compare.

    One engine is loaded at a time: a full-size model is in memory twice here, as module and as engine.

    Args:
        job: What the engines were built from; its modules are the reference, on the CPU.
        folder: The engine directory.
        device: Where the engines run.
        seed: Seed of the inputs.

    Raises:
        CausalForcingError: The engines cannot be loaded.
    """
    manifest = read_manifest(folder)
    chosen = engine_device(manifest, device)
    check_files(folder, manifest)
    tolerance = TOLERANCES[job.config.precision]
    for network in cut_networks(job, find_recipe(folder)):
        name = network.spec.name
        inputs = make_inputs(network.spec, job.config.geometry, job.config.variant.model, seed)
        got = _run_engine(load_engine(folder, manifest, name, chosen), inputs, chosen)
        with torch.inference_mode():
            want = network.module(*(inputs[io.name].clone() for io in network.spec.inputs))
        for io_tensor, reference in zip(network.spec.outputs, (want,) if torch.is_tensor(want) else want, strict=True):
            yield _compare(name, io_tensor.name, got[io_tensor.name], reference, tolerance)


def make_inputs(spec: NetworkSpec, geometry: Geometry, model: ModelSpec, seed: int) -> dict[str, torch.Tensor]:
    """Make inputs that a session could give: unit normal tensors, a chunk in the middle of the window."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {io.name: torch.randn(io.shape, generator=generator).to(getattr(torch, io.dtype)) for io in spec.inputs}
    if "slots" in inputs:
        start = (geometry.window_frames - geometry.chunk_frames) // 2
        frames = torch.arange(start, start + geometry.chunk_frames, dtype=torch.int32)
        inputs["slots"] = frames * geometry.tokens_per_frame
        inputs["valid_slots"].fill_((start + geometry.chunk_frames) * geometry.tokens_per_frame)
        RopePhases(
            inputs["rope_cos"],
            inputs["rope_sin"],
            frames=geometry.chunk_frames,
            rows=geometry.token_rows,
            columns=geometry.token_columns,
        ).place(start)
    if "token_mask" in inputs:
        shape = inputs["token_mask"].shape
        inputs["token_mask"] = (torch.arange(shape[1]) < shape[1] // 3).long().expand(shape).contiguous()
    if "token_ids" in inputs:
        inputs["token_ids"] = torch.randint(model.text.vocab_size, inputs["token_ids"].shape, generator=generator)
    return inputs


def _run_engine(engine: Engine, inputs: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    io_tensors = IOTensors([engine.spec], device)
    engine.bind(io_tensors)
    for name, tensor in inputs.items():
        io_tensors[name].copy_(tensor)
    engine.enqueue()
    carried = {} if engine.spec.in_place else dict(engine.spec.states)
    return {io.name: io_tensors[carried.get(io.name, io.name)].cpu() for io in engine.spec.outputs}


def _compare(network: str, output: str, got: torch.Tensor, want: torch.Tensor, tolerance: float) -> OutputComparison:
    left, right = got.double().flatten(), want.double().flatten()
    error = (left - right).abs()
    magnitude = float(right.abs().max())
    cosine = float(torch.nn.functional.cosine_similarity(left, right, dim=0)) if magnitude else 1.0
    max_error = float(error.max())
    return OutputComparison(
        network=network,
        output=output,
        max_error=max_error,
        mean_error=float(error.mean()),
        cosine=cosine,
        magnitude=magnitude,
        passed=max_error <= tolerance * max(magnitude, 1.0),
    )
