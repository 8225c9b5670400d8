"""Linear layers: scales and smoothing, and whether fp8 is good enough, by the error on sampled real inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from causal_forcing.build_engines.quantization.fp8_linear import QuantizedLinear, power_of_two_scale
from causal_forcing.build_engines.quantization.observation import InputObservation
from causal_forcing.build_engines.quantization.recipe import HEADROOM, SENSITIVE_ERROR, InputScaling
from causal_forcing.build_engines.quantization.smoothing import STRENGTHS, WORTHWHILE, smoothing_multiplier


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


def choose_linears(model: nn.Module, group: Sequence[str], observation: InputObservation) -> list[LinearChoice]:
    """Choose scales for the layers of one input, and whether each of them is quantised.

    They share the input's scale and smoothing, so that a graph quantises it once.
    """
    linears = {name: linear_layer(model, name) for name in group}
    rows = observation.rows().to(observation.peaks.device)
    weight_peaks = torch.stack([linear.weight.abs().amax(dim=0).float() for linear in linears.values()]).amax(dim=0)
    tried: dict[float | None, tuple[InputScaling, dict[str, float]]] = {}
    for strength in (None, *STRENGTHS):
        multiplier = None if strength is None else smoothing_multiplier(observation.peaks, weight_peaks, strength)
        peak = (observation.peaks if multiplier is None else observation.peaks * multiplier).max()
        scaling = InputScaling(scale=float(power_of_two_scale(HEADROOM * peak)), multiplier=multiplier)
        tried[strength] = (scaling, {name: output_error(linear, scaling, rows) for name, linear in linears.items()})
    totals = {strength: math.hypot(*errors.values()) for strength, (_, errors) in tried.items()}
    best = min(totals, key=lambda strength: totals[strength])
    if totals[best] > (1 - WORTHWHILE) * totals[None]:
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


def linear_layer(model: nn.Module, name: str) -> nn.Linear:
    """Return a linear layer that is still in the carrier type."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear), f"{name} is a linear layer that nobody has quantised yet"
    return linear
