"""Calibration: real passes, and from what was seen in them the choice of what is quantised, and how."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from causal_forcing.build_engines.model_loading import ModelSource
from causal_forcing.build_engines.models.dit import CausalDiT
from causal_forcing.build_engines.quantization.attention_choice import AttentionErrors
from causal_forcing.build_engines.quantization.flow_check import flow_error
from causal_forcing.build_engines.quantization.head_scales import HeadObservation
from causal_forcing.build_engines.quantization.linear_choice import choose_linears
from causal_forcing.build_engines.quantization.observation import AttentionObservation, observed
from causal_forcing.build_engines.quantization.passes import plan_passes, run_passes
from causal_forcing.build_engines.quantization.prompts import embed_prompts
from causal_forcing.build_engines.quantization.recipe import (
    HEADROOM,
    SENSITIVE_ATTENTION_ERROR,
    SENSITIVE_ERROR,
    Recipe,
    linear_groups,
)
from causal_forcing.runtime.config import EngineConfig

ATTENTION_BACKENDS: Mapping[str, type[AttentionObservation] | type[HeadObservation]] = {
    "onnxruntime": AttentionObservation,
    "tensorrt-rtx": AttentionObservation,
    "cuda": HeadObservation,
}
"""Backends that quantise attention, and what they need to know of it. TensorRT's plugin attends in the carrier type and
would gain nothing; ONNX Runtime gains nothing either, but shows what TensorRT-RTX will."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The outcome: what to do, and the record of how it was found."""

    recipe: Recipe
    """What is quantised."""
    record: dict[str, Any]
    """Plain JSON values for the manifest: conditions, every layer's choice and error, the error of the flow."""


def calibrate(source: ModelSource, config: EngineConfig, tokenizer: Path | None) -> Calibration:
    """Run real passes and decide, layer by layer.

    The same weights, machine, number of threads and configuration give the same outcome.

    Args:
        source: Weights.
        config: The engine's configuration.
        tokenizer: Folder with `tokenizer.json`; only random weights come without.
    """
    plan = plan_passes(config)
    embeds, prompts = embed_prompts(source, config, tokenizer, plan.prompts)
    gc.collect()
    dit: CausalDiT = source.dit().to(plan.device)
    groups = linear_groups(len(dit.layers))
    names = [f"blocks.{index}.cache_attention" for index in range(len(dit.layers))]
    kind = ATTENTION_BACKENDS.get(config.backend)
    if config.backend == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        kind = None  # only Hopper has a kernel that multiplies codes
    attention = names if kind is not None else []
    with observed(
        dit, groups, attention, kind or AttentionObservation, expected_passes=plan.expected_passes(config)
    ) as (inputs, attended):
        passes = run_passes(dit, config, plan, embeds)
    linears = [
        choice for group, seen in zip(groups, inputs, strict=True) for choice in choose_linears(dit, group, seen)
    ]
    errors = AttentionErrors(
        {
            name: seen.scales(dit.layers[index].cache_attention, HEADROOM)
            for index, (name, seen) in enumerate(zip(attention, attended, strict=True))
        }
    )
    if attention:
        with errors.measuring(dit):
            run_passes(dit, config, plan, embeds[:1])
    choices = errors.choices()
    recipe = Recipe(
        linears={choice.name: choice.scaling for choice in linears if choice.quantised},
        attention={choice.name: choice.scales for choice in choices if choice.quantised},
    )
    record = {
        "format": "e4m3",
        "calibration": {"prompts": prompts, "passes": passes, **plan.fields()},
        "sensitive_error": SENSITIVE_ERROR,
        "sensitive_attention_error": SENSITIVE_ATTENTION_ERROR,
        "headroom": HEADROOM,
        "flow_error": round(flow_error(dit, recipe, config, plan, embeds[0]), 5),
        "linears": {choice.name: choice.fields() for choice in linears},
        "attention": {choice.name: choice.fields() for choice in choices},
    }
    return Calibration(recipe=recipe, record=record)
