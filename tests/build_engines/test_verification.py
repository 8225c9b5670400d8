"""Verification: whole engines pass, and any that compute something else are found out."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from causal_forcing.build_engines import verification
from causal_forcing.build_engines.builder import BuildJob, cut_networks
from causal_forcing.build_engines.planner import make_job
from causal_forcing.build_engines.text_networks import text_networks
from causal_forcing.build_engines.verification import OutputComparison, make_inputs, verify
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.errors import EngineDamagedError
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.manifest import describe_files, read_manifest
from causal_forcing.runtime.model_spec import TINY

NAMES = ("onnxruntime fp32", "torch fp32")
DIT_NETWORKS = ["timestep_modulation", "prompt_kv", "dit_step", "dit_context"]


@pytest.fixture
def job() -> BuildJob:
    """The denoiser's part of the job that built `tiny_engine`."""
    options = EngineOptions(slug="tiny", backend="onnxruntime", pixel_height=32, pixel_width=48)
    return dataclasses.replace(make_job(options, device="cpu"), parts=("dit",))


@pytest.fixture
def copied(tiny_engine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_engine, tmp_path / "engine")


def change_a_weight(path: Path, *, factor: float) -> None:
    """Scale the largest weight matrix of an ONNX file."""
    model = onnx.load(path)
    largest = max(model.graph.initializer, key=lambda tensor: math.prod(tensor.dims))
    values = numpy_helper.to_array(largest)
    assert values.dtype == np.float32
    largest.CopyFrom(numpy_helper.from_array(values * np.float32(factor), largest.name))
    onnx.save(model, path)


def rehash(folder: Path) -> None:
    dataclasses.replace(read_manifest(folder), files=describe_files(folder)).write(folder)


def failed(comparisons: list[OutputComparison]) -> set[str]:
    return {comparison.network for comparison in comparisons if not comparison.passed}


def test_verify_of_a_whole_engine_passes_for_every_output_of_every_network(tiny_engine: Path) -> None:
    options = EngineOptions(slug="tiny", backend="onnxruntime", pixel_height=32, pixel_width=48)
    comparisons = list(verify(make_job(options, device="cpu"), tiny_engine, device="cpu"))
    manifest = read_manifest(tiny_engine)
    compared = [(comparison.network, comparison.output) for comparison in comparisons]
    assert compared == [(network.name, io.name) for network in manifest.networks for io in network.outputs]
    for comparison in comparisons:
        assert comparison.passed, comparison
        assert comparison.verdict == "ok"
        assert comparison.magnitude > 1e-3, f"{comparison.output} is all but zero: nothing was compared"
        assert comparison.cosine > 0.9999
        assert comparison.mean_error <= comparison.max_error


@pytest.mark.parametrize("network", DIT_NETWORKS)
def test_verify_of_an_engine_with_a_changed_weight_fails_there_and_only_there(
    network: str, job: BuildJob, copied: Path
) -> None:
    change_a_weight(copied / f"{network}.onnx", factor=1.05)
    with pytest.raises(EngineDamagedError):
        list(verify(job, copied, device="cpu"))
    rehash(copied)
    comparisons = list(verify(job, copied, device="cpu"))
    assert failed(comparisons) == {network}
    assert {comparison.verdict for comparison in comparisons} == {"ok", "FAILED"}


def test_verify_of_an_engine_of_other_weights_fails_everywhere(job: BuildJob, tiny_engine: Path) -> None:
    options = EngineOptions(slug="tiny", backend="onnxruntime", pixel_height=32, pixel_width=48, random_weights=1)
    other = dataclasses.replace(make_job(options, device="cpu"), parts=("dit",))
    assert failed(list(verify(other, tiny_engine, device="cpu"))) == set(DIT_NETWORKS)


def test_verify_of_an_engine_that_ignores_the_valid_length_fails(
    job: BuildJob, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs must be such that a mask that is not there is seen."""
    for network in ("dit_step", "dit_context"):
        model = onnx.load(copied / f"{network}.onnx")
        for function in model.functions:
            for node in function.node:
                if node.op_type == "Attention":
                    node.input[3] = ""
        onnx.save(model, copied / f"{network}.onnx")
    rehash(copied)
    assert "dit_step" in failed(list(verify(job, copied, device="cpu")))


@pytest.mark.parametrize(
    ("got", "passed"),
    [
        ([10.0, -4.0], True),
        ([10.0009, -4.0], True),
        ([10.0011, -4.0], False),
        ([float("nan"), -4.0], False),
        ([10.0, float("inf")], False),
        ([-10.0, 4.0], False),
        ([0.0, 0.0], False),
    ],
)
def test_comparison_passes_within_the_tolerance_of_the_largest_magnitude_and_never_with_nan(
    got: list[float], passed: bool
) -> None:
    want = torch.tensor([10.0, -4.0])
    comparison = verification._compare("n", "o", NAMES, torch.tensor(got), want, verification.TOLERANCES["fp32"])
    assert comparison.passed == passed
    assert comparison.magnitude == 10.0


def test_comparison_with_nan_on_both_sides_fails() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert not verification._compare("n", "o", NAMES, nan, nan.clone(), 1e-4).passed


def test_inputs_of_every_network_of_a_split_text_encoder_mask_the_same_tokens(job: BuildJob) -> None:
    config = job.config
    text, dit, geometry = TINY.text, TINY.dit, config.geometry
    masks = [
        make_inputs(network.spec, geometry, TINY, seed=0)["token_mask"]
        for network in text_networks(job.source, text, dit, geometry, precision=config.dtype, max_parameters=1)
    ]
    assert len(masks) == 3
    assert all(mask.tolist() == [[1] * 170 + [0] * 342] for mask in masks)


@pytest.mark.parametrize(("window", "sink", "chunk"), [(21, 0, 3), (7, 1, 3), (3, 0, 3), (1, 0, 1), (5, 4, 1)])
def test_inputs_place_a_chunk_inside_any_window(window: int, sink: int, chunk: int, job: BuildJob) -> None:
    geometry = Geometry(
        chunk_frames=chunk, pixel_height=32, pixel_width=48, window_frames=window, sink_frames=sink, batch=2
    )
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, geometry=geometry))
    (step,) = [n.spec for n in cut_networks(job) if n.spec.name == "dit_step"]
    inputs = make_inputs(step, geometry, TINY, seed=0)
    tokens = geometry.tokens_per_frame
    slots, valid = inputs["slots"].tolist(), inputs["valid_slots"].tolist()
    assert valid == [slots[-1] + tokens] * 2
    assert valid[0] <= geometry.cache_slots
    assert slots == list(range(slots[0], slots[0] + chunk * tokens, tokens))
    again = make_inputs(step, geometry, TINY, seed=0)
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    assert {name: (tuple(t.shape), str(t.dtype)) for name, t in inputs.items()} == {
        io.name: (io.shape, f"torch.{io.dtype}") for io in step.inputs
    }


def test_inputs_of_a_pass_over_two_chunks_place_one_behind_the_other(job: BuildJob) -> None:
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, backend="cuda"))
    (pair,) = [n for n in cut_networks(job) if n.spec.name == "dit_context_step"]
    geometry = job.config.geometry
    inputs = make_inputs(pair.spec, geometry, TINY, seed=0)
    tokens, chunk = geometry.tokens_per_frame, geometry.chunk_tokens
    slots = inputs["pair_slots"].tolist()
    assert slots == list(range(slots[0], slots[0] + 2 * chunk, tokens))
    assert inputs["pair_valid_slots"].tolist() == [slots[0] + chunk, slots[0] + 2 * chunk]
    assert slots[0] + 2 * chunk <= geometry.cache_slots
    assert (inputs["pair_rope_cos"].square() + inputs["pair_rope_sin"].square()).allclose(torch.ones(()))
    assert all(output.isfinite().all() for output in verification._run_module(pair, inputs).values())
