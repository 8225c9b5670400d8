"""Calibration passes: the engine's own shapes where the machine can, fewer and smaller ones where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from causal_forcing.build_engines.builder import BuildJob
from causal_forcing.build_engines.networks import Network
from causal_forcing.build_engines.quantization.observation import InputObservation
from causal_forcing.build_engines.quantization.passes import (
    CPU_OPERATIONS,
    PROMPTS,
    PROMPTS_REDUCED,
    linear_weights,
    plan_passes,
    run_passes,
)
from causal_forcing.runtime.config import EngineConfig
from causal_forcing.runtime.engine_options import EngineOptions
from causal_forcing.runtime.resolution import resolve_engine


def config_of(slug: str) -> EngineConfig:
    options = EngineOptions(slug=slug, backend="onnxruntime", precision="fp8", random_weights=0)
    return resolve_engine(options, weights="random:0", device="cpu", for_build=True)


@pytest.mark.parametrize("slug", ["shapes", "shapes-framewise", "tiny"])
def test_passes_of_a_small_model_have_its_own_resolution_and_fill_its_window(slug: str) -> None:
    config = config_of(slug)
    plan = plan_passes(config, device="cpu")
    assert plan.geometry == config.geometry
    assert plan.prompts == PROMPTS
    assert plan.chunks * config.geometry.chunk_frames > config.geometry.window_frames


@pytest.mark.parametrize("kind", ["chunkwise", "framewise"])
def test_passes_of_the_full_model_are_reduced_on_a_cpu_alone(kind: str) -> None:
    config = config_of(f"causal-forcing-wan2.1-t2v-1.3b-{kind}")
    plan = plan_passes(config, device="cpu")
    operations = 2 * linear_weights(config.variant.model.dit) * plan.geometry.chunk_tokens
    assert operations * plan.expected_passes(config) < CPU_OPERATIONS
    assert 4 <= plan.geometry.token_rows < plan.geometry.token_columns
    assert plan.prompts == PROMPTS_REDUCED
    assert plan.fields()["pixel_height"] == plan.geometry.pixel_height
    assert plan_passes(config, device="cuda").geometry == config.geometry


def test_passes_in_a_session_write_the_caches_and_count_every_pass(tiny_fp8_job: BuildJob) -> None:
    job = tiny_fp8_job
    plan = plan_passes(job.config, device="cpu")
    calls: list[str] = []
    valid: list[int] = []

    def noting(network: Network) -> Callable[..., Any]:
        names = [io_tensor.name for io_tensor in network.spec.inputs]

        def run(*inputs: torch.Tensor) -> Any:
            calls.append(network.spec.name)
            valid.append(int(inputs[names.index("valid_slots")]))
            outputs = network.module(*inputs)
            assert inputs[names.index("k_cache_00")].abs().max() > 0
            return outputs

        return run

    embeds = [torch.randn(1, 512, 32)]
    passes = run_passes(job.source.dit(), job.config, plan, embeds, in_place_of=noting)
    chunk = ["dit_step"] * 4
    assert calls == [*chunk, "dit_context"] * 2 + chunk  # nothing would read what the last chunk leaves
    assert passes == 14
    assert valid[-1] == job.config.geometry.cache_slots  # the window is full


def test_observation_of_many_passes_keeps_the_largest_of_each_channel_and_rows_of_all() -> None:
    observation = InputObservation(rows_a_pass=4)
    inputs = [torch.randn(1, 40, 8) * scale for scale in (1.0, 3.0, 0.5)]
    inputs[1][0, 17, 2] = -99.0
    for tensor in inputs:
        observation(torch.nn.Identity(), (tensor,))
    assert torch.equal(observation.peaks, torch.cat(inputs, dim=1)[0].abs().amax(dim=0))
    rows = observation.rows()
    assert rows.shape == (12, 8)
    for tensor in inputs:
        assert sum(bool((tensor[0] == row).all(dim=1).any()) for row in rows) == 4
