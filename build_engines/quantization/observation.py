"""What linear layers see during real passes: the range of every input channel, and a sample of inputs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from causal_forcing.build_engines.models.dit import CausalDiT

SAMPLE_ROWS = 512
"""Inputs that are kept of each layer, spread over all passes; their errors decide."""


@dataclass(slots=True, kw_only=True)
class Observation:
    """What was seen of the input of one group of linear layers."""

    peaks: torch.Tensor
    """[in] fp32, largest magnitude of each channel over all tokens of all passes."""
    samples: list[torch.Tensor] = field(default_factory=list)
    """[rows, in] each, the carrier type, on the CPU."""

    def rows(self) -> torch.Tensor:
        """Return at most `SAMPLE_ROWS` of the samples, [rows, in], evenly over all passes."""
        rows = torch.cat(self.samples)
        places = torch.linspace(0, len(rows) - 1, min(SAMPLE_ROWS, len(rows))).round().long()
        return rows[places]


@contextmanager
def observed(
    dit: CausalDiT, groups: Sequence[tuple[str, ...]], *, expected_passes: int
) -> Iterator[dict[tuple[str, ...], Observation]]:
    """Observe the inputs of linear layers for as long as the context lasts.

    Args:
        dit: The model.
        groups: Names of layers, each group with one input; the first layer of each is observed.
        expected_passes: Passes to come, about; decides how many rows each gives.

    Yields:
        A mapping from each group to its observation, filled while passes run.
    """
    rows_a_pass = max(1, -(-SAMPLE_ROWS // expected_passes))
    observations: dict[tuple[str, ...], Observation] = {}
    hooks = []
    for group in groups:
        linear = dit.get_submodule(group[0])
        assert isinstance(linear, nn.Linear), f"{group[0]} is a linear layer"
        peaks = torch.zeros(linear.in_features, device=linear.weight.device)
        observations[group] = observation = Observation(peaks=peaks)
        hooks.append(linear.register_forward_pre_hook(functools.partial(_observe, observation, rows_a_pass)))
    try:
        yield observations
    finally:
        for hook in hooks:
            hook.remove()


def _observe(observation: Observation, rows: int, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    """Take note of one input [..., in]."""
    tokens = args[0].flatten(0, -2)
    observation.peaks = torch.maximum(observation.peaks, tokens.abs().amax(dim=0).float())
    # Other rows in every pass: an odd stride from a moving start visits all of them in time.
    start = 61 * len(observation.samples)
    places = [(start + index * (len(tokens) // rows or 1)) % len(tokens) for index in range(rows)]
    observation.samples.append(tokens[places].cpu())
