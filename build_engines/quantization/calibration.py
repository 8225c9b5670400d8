"""Calibration: real passes, then for every linear layer its scales, by measured error, or the carrier type."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from causal_forcing.build_engines.model_loading import ModelSource
from causal_forcing.build_engines.models.dit import CausalDiT
from causal_forcing.build_engines.quantization.fp8_linear import QuantizedLinear, power_of_two_scale
from causal_forcing.build_engines.quantization.observation import Observation, observed
from causal_forcing.build_engines.quantization.passes import PassPlan, plan_passes, run_passes
from causal_forcing.build_engines.quantization.prompts import embed_prompts
from causal_forcing.build_engines.quantization.recipe import InputScaling, Recipe, linear_names
from causal_forcing.build_engines.quantization.smoothing import STRENGTHS, smoothing_multiplier
from causal_forcing.runtime.config import EngineConfig

SENSITIVE_ERROR = 0.08
"""Relative error of a linear layer's output from which on it stays in the carrier type.

Rounding both factors to three bits of mantissa gives about 0.037 where errors are independent; more means that what is
added up cancels, or that inputs lie below e4m3's range.
"""

HEADROOM = 2.0
"""Factor on the largest magnitude seen: calibration sees few prompts, and a value out of range is cut off."""


WORTHWHILE_SMOOTHING = 0.02
"""Share of the error that smoothing must take away to be worth a multiplication in the graph.

With e4m3 it seldom does: four bits of exponent keep the relative precision of a channel 2^14 times below the largest.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearChoice:
    """What was decided about a linear layer, and why."""

    name: str
    """Name in the DiT, such as `blocks.0.ffn.2`."""
    quantised: bool
    """Whether it is in fp8."""
    error: float
    """RMS error of its output on sampled inputs, relative to the output's RMS, with the strength that was chosen."""
    error_unsmoothed: float
    """The same without smoothing."""
    smoothing: float | None
    """Strength of the smoothing; None is none."""
    input_peak: float
    """Largest magnitude of its input over all passes."""
    scaling: InputScaling
    """How its inputs are quantised."""

    def fields(self) -> dict[str, Any]:
        """Return what the manifest records."""
        return {
            "quantised": self.quantised,
            "error": round(self.error, 5),
            "error_unsmoothed": round(self.error_unsmoothed, 5),
            "smoothing": self.smoothing,
            "input_peak": round(self.input_peak, 4),
            "input_scale": self.scaling.scale,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The outcome: what to do, and the record of how it was found."""

    recipe: Recipe
    """What is quantised."""
    record: dict[str, Any]
    """Plain JSON values for the manifest: conditions, every layer's choice and error, the error of the flow."""


def calibrate(source: ModelSource, config: EngineConfig, tokenizer: Path | None) -> Calibration:
    """Run real passes and decide, layer by layer.

    The same weights, machine and configuration give the same outcome.

    Args:
        source: Weights.
        config: The engine's configuration.
        tokenizer: Folder with `tokenizer.json`; only random weights come without.
    """
    plan = plan_passes(config)
    embeds, prompts = embed_prompts(source, config, tokenizer, plan.prompts)
    gc.collect()
    dit = source.dit().to(plan.device)
    groups = linear_names(len(dit.layers))
    with observed(dit, groups, expected_passes=plan.expected_passes(config)) as observations:
        passes = run_passes(dit, config, plan, embeds)
    choices = [choice for group in groups for choice in choose(dit, group, observations[group])]
    del observations
    recipe = Recipe(linears={choice.name: choice.scaling for choice in choices if choice.quantised})
    record = {
        "format": "e4m3",
        "calibration": {"prompts": prompts, "passes": passes, **plan.fields()},
        "sensitive_error": SENSITIVE_ERROR,
        "headroom": HEADROOM,
        "flow_error": round(flow_error(dit, recipe, config, plan, embeds[:1]), 5),
        "linears": {choice.name: choice.fields() for choice in choices},
    }
    return Calibration(recipe=recipe, record=record)


def choose(dit: CausalDiT, group: Sequence[str], observation: Observation) -> list[LinearChoice]:
    """Choose scales for the layers of one input, and whether each of them is quantised.

    They share the input's scale and smoothing, so that a graph quantises it once.
    """
    linears = {name: _linear(dit, name) for name in group}
    device = observation.peaks.device
    rows = observation.rows().to(device)
    weight_peaks = torch.stack([linear.weight.abs().amax(dim=0).float() for linear in linears.values()]).amax(dim=0)
    tried: dict[float | None, tuple[InputScaling, dict[str, float]]] = {}
    for strength in STRENGTHS:
        multiplier = None if strength is None else smoothing_multiplier(observation.peaks, weight_peaks, strength)
        peak = (observation.peaks if multiplier is None else observation.peaks * multiplier).max()
        scaling = InputScaling(scale=float(power_of_two_scale(HEADROOM * peak)), multiplier=multiplier)
        tried[strength] = (scaling, {name: output_error(linear, scaling, rows) for name, linear in linears.items()})
    totals = {
        strength: math.sqrt(sum(error**2 for error in errors.values())) for strength, (_, errors) in tried.items()
    }
    best = min(totals, key=lambda strength: totals[strength])
    if totals[best] > (1 - WORTHWHILE_SMOOTHING) * totals[None]:
        best = None
    scaling, errors = tried[best]
    if scaling.multiplier is not None:
        scaling = InputScaling(scale=scaling.scale, multiplier=scaling.multiplier.cpu())
    return [
        LinearChoice(
            name=name,
            quantised=errors[name] <= SENSITIVE_ERROR,
            error=errors[name],
            error_unsmoothed=tried[None][1][name],
            smoothing=best,
            input_peak=float(observation.peaks.max()),
            scaling=scaling,
        )
        for name in group
    ]


@torch.inference_mode()
def output_error(linear: nn.Linear, scaling: InputScaling, rows: torch.Tensor) -> float:
    """Return the RMS error that quantisation makes in a layer's output, relative to the output's RMS.

    Args:
        linear: The layer.
        scaling: How its inputs are quantised.
        rows: [rows, in] real inputs, the carrier type.
    """
    want = linear(rows).float()
    got = QuantizedLinear(linear, scaling.scale, scaling.multiplier)(rows).float()
    magnitude = float(want.square().mean())
    return (float((got - want).square().mean()) / magnitude) ** 0.5 if magnitude else 0.0


def flow_error(
    dit: CausalDiT, recipe: Recipe, config: EngineConfig, plan: PassPlan, embeds: Sequence[torch.Tensor]
) -> float:
    """Return the RMS error of the flow over all denoising passes of real clips, relative to the flow's RMS.

    Each pass is run twice on the same inputs and caches, quantised first: the caches that the next pass reads are the
    carrier type's, so that this is the error of single passes.
    """
    quantised = {
        name: QuantizedLinear(_linear(dit, name), scaling.scale, scaling.multiplier)
        for name, scaling in recipe.linears.items()
    }
    total = torch.zeros(2, dtype=torch.float64)

    def step(module: nn.Module) -> Callable[..., Any]:
        def run(*inputs: torch.Tensor) -> Any:
            with _replaced(dit, quantised):
                flow = module(*inputs)[0].float()
            want = module(*inputs)
            total[0] += float((flow - want[0].float()).square().sum())
            total[1] += float(want[0].float().square().sum())
            return want

        return run

    run_passes(dit, config, plan, embeds, step=step)
    return float((total[0] / total[1]).sqrt()) if total[1] else 0.0


@contextmanager
def _replaced(dit: CausalDiT, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the place of some of a model's, and its own back again."""
    own = {name: dit.get_submodule(name) for name in modules}
    for name, module in modules.items():
        dit.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in own.items():
            dit.set_submodule(name, module)


def _linear(dit: CausalDiT, name: str) -> nn.Linear:
    linear = dit.get_submodule(name)
    assert isinstance(linear, nn.Linear), f"{name} is a linear layer"
    return linear
