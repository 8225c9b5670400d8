"""Calibration: what it saw, what it decided, what it wrote down; the same every time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from causal_forcing.build_engines.builder import BuildJob
from causal_forcing.build_engines.model_loading import RandomModels
from causal_forcing.build_engines.models.dit import CausalDiT
from causal_forcing.build_engines.models.dit_layers import CacheAttention
from causal_forcing.build_engines.quantization import attention_choice, calibration, linear_choice, passes
from causal_forcing.build_engines.quantization.calibration import Calibration
from causal_forcing.build_engines.quantization.fp8_attention import AttentionScales
from causal_forcing.build_engines.quantization.fp8_linear import QuantizedLinear
from causal_forcing.build_engines.quantization.head_scales import HeadScales
from causal_forcing.build_engines.quantization.passes import plan_passes, run_passes
from causal_forcing.build_engines.quantization.prompts import embed_prompts
from causal_forcing.build_engines.quantization.recipe import HEADROOM, linear_groups
from causal_forcing.plugins.fp8_ops import E4M3_MAX


def largest_inputs(dit: CausalDiT, job: BuildJob) -> dict[str, float]:
    """Run the calibration passes and return the largest magnitude of each module's inputs, seen by hooks of our own."""
    largest: dict[str, float] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: Sequence[torch.Tensor]) -> None:
            largest[name] = max(largest.get(name, 0.0), float(args[0].abs().max()))

        return note

    for name, module in dit.named_modules():
        if isinstance(module, nn.Linear | CacheAttention):
            module.register_forward_pre_hook(hook(name))
    plan = plan_passes(job.config)
    embeds, _ = embed_prompts(job.source, job.config, job.tokenizer, 2)
    run_passes(dit, job.config, plan, embeds)
    return largest


def test_record_of_a_calibration_lists_every_layer_and_its_conditions(tiny_calibration: Calibration) -> None:
    record = tiny_calibration.record
    assert json.loads(json.dumps(record)) == record
    assert set(record["linears"]) == {name for group in linear_groups(2) for name in group}
    assert len(record["linears"]) == 2 * 8
    assert set(record["attention"]) == {"blocks.0.cache_attention", "blocks.1.cache_attention"}
    for kind, limit in (("linears", "sensitive_error"), ("attention", "sensitive_attention_error")):
        for choice in record[kind].values():
            assert choice["quantised"] == (choice["error"] <= record[limit])
            assert 0 < choice["error"] < 1
    conditions = record["calibration"]
    assert (conditions["pixel_height"], conditions["pixel_width"]) == (32, 48)
    assert (conditions["clips"], conditions["chunks"]) == (2, 3)
    assert conditions["passes"] == 2 * (3 * 5 - 1)  # four denoising passes and a context pass a chunk, but for the last
    assert 0 < record["flow_error"] < 0.1


def test_recipe_of_a_calibration_holds_what_the_record_says(tiny_calibration: Calibration) -> None:
    recipe, record = tiny_calibration.recipe, tiny_calibration.record
    assert set(recipe.linears) == {name for name, choice in record["linears"].items() if choice["quantised"]}
    assert set(recipe.attention) == {name for name, choice in record["attention"].items() if choice["quantised"]}
    assert recipe.linears


def test_scales_of_a_calibration_cover_all_that_its_passes_saw(
    tiny_fp8_job: BuildJob, tiny_calibration: Calibration
) -> None:
    largest = largest_inputs(tiny_fp8_job.source.dit(), tiny_fp8_job)
    for name, scaling in tiny_calibration.recipe.linears.items():
        assert scaling.multiplier is None
        assert HEADROOM * largest[name] <= E4M3_MAX * scaling.scale < 2 * HEADROOM * largest[name]
        assert tiny_calibration.record["linears"][name]["input_peak"] == pytest.approx(
            largest[name], rel=1e-3, abs=1e-4
        )
    for name, scales in tiny_calibration.recipe.attention.items():
        assert isinstance(scales, AttentionScales)
        assert largest[name] <= E4M3_MAX * scales.q


def test_calibration_twice_gives_the_same_record_and_weights(
    tiny_fp8_job: BuildJob, tiny_calibration: Calibration, calibrate_tiny: Callable[[], Calibration]
) -> None:
    again = calibrate_tiny()
    assert again.record == tiny_calibration.record
    first, second = tiny_fp8_job.source.dit(), tiny_fp8_job.source.dit()
    tiny_calibration.recipe.apply(first)
    again.recipe.apply(second)
    states = (first.state_dict(), second.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name].float(), states[1][name].float()) for name in states[0])


def test_calibration_where_every_layer_is_sensitive_quantises_nothing(
    calibrate_tiny: Callable[[], Calibration], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_choice, "SENSITIVE_ERROR", 0.0)
    monkeypatch.setattr(attention_choice, "SENSITIVE_ATTENTION_ERROR", 0.0)
    outcome = calibrate_tiny()
    assert not outcome.recipe.linears
    assert not outcome.recipe.attention
    assert outcome.record["flow_error"] == 0.0
    assert not any(choice["quantised"] for choice in outcome.record["linears"].values())


def test_calibration_for_a_backend_with_a_plugin_leaves_attention_whole(
    calibrate_tiny: Callable[[], Calibration], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "ATTENTION_BACKENDS", {})
    outcome = calibrate_tiny()
    assert not outcome.recipe.attention
    assert outcome.record["attention"] == {}


def test_calibration_for_caches_of_codes_has_scales_a_head_and_measures_the_flow_with_them(
    tiny_fp8_job: BuildJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "PROMPTS", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # some GPUs get no caches of codes
    # The backend's engines need a GPU, its calibration does not: the config is another backend's under its name.
    config = replace(tiny_fp8_job.config, backend="cuda")
    source = RandomModels(model=config.variant.model, seed=0, dtype=torch.bfloat16)
    outcome = calibration.calibrate(source, config, None)
    spec = config.variant.model.dit
    assert outcome.recipe.attention
    for scales in outcome.recipe.attention.values():
        assert isinstance(scales, HeadScales)
        assert scales.scales.shape == (3, spec.num_heads)
        assert scales.k_offset.shape == (spec.num_heads, spec.head_dim)
    assert 0 < outcome.record["flow_error"] < 0.1


def test_applied_recipe_leaves_all_but_the_layers_linears_in_the_carrier_type(
    tiny_fp8_job: BuildJob, tiny_calibration: Calibration
) -> None:
    dit = tiny_fp8_job.source.dit()
    tiny_calibration.recipe.apply(dit)
    quantised = {name for name, module in dit.named_modules() if isinstance(module, QuantizedLinear)}
    assert quantised == set(tiny_calibration.recipe.linears)
    for name in (
        "text_embedding.0",
        "time_projection.1",
        "head.head",
        "blocks.0.cross_attn.k",
        "blocks.0.cross_attn.v",
    ):
        assert isinstance(dit.get_submodule(name), nn.Linear)


def test_calibration_of_an_image_to_video_slug_runs_from_text(tiny_fp8_job: BuildJob) -> None:
    config = replace(tiny_fp8_job.config, variant=replace(tiny_fp8_job.config.variant, takes_image=True))
    plan = plan_passes(config)
    embeds, _ = embed_prompts(tiny_fp8_job.source, config, None, 1)
    assert run_passes(tiny_fp8_job.source.dit(), config, plan, embeds) == 14
