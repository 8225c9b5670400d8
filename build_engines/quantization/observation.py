"""What layers see during real passes: the range of every input, and a sample of the inputs of linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from causal_forcing.build_engines.models.dit import CausalDiT
from causal_forcing.build_engines.models.dit_layers import CacheAttention
from causal_forcing.build_engines.quantization.fp8_attention import AttentionScales, query_factor
from causal_forcing.build_engines.quantization.fp8_linear import power_of_two_scale
from causal_forcing.build_engines.quantization.head_scales import HeadObservation

SAMPLE_ROWS = 512
"""Inputs that are kept of each group of linear layers, spread over all passes; their errors decide."""


class InputObservation:
    """What was seen of the input of one group of linear layers.

    Args:
        rows_a_pass: How many inputs to keep of each pass.
    """

    def __init__(self, rows_a_pass: int) -> None:
        self.peaks = torch.zeros(())
        """[in] fp32, largest magnitude of each channel over all tokens of all passes."""
        self._rows_a_pass = rows_a_pass
        self._samples: list[torch.Tensor] = []

    def rows(self) -> torch.Tensor:
        """Return at most `SAMPLE_ROWS` of the kept inputs, [rows, in] in the carrier type, evenly over all passes."""
        rows = torch.cat(self._samples)
        places = torch.linspace(0, len(rows) - 1, min(SAMPLE_ROWS, len(rows))).round().long()
        return rows[places]

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Take note of one input [..., in]; a forward pre-hook."""
        tokens = args[0].flatten(0, -2)
        self.peaks = torch.maximum(self.peaks.to(tokens.device), tokens.abs().amax(dim=0).float())
        # Other rows in every pass: an odd stride from a moving start visits all of them in time.
        start, stride = 61 * len(self._samples), max(1, len(tokens) // self._rows_a_pass)
        places = [(start + index * stride) % len(tokens) for index in range(self._rows_a_pass)]
        self._samples.append(tokens[places].cpu())


class AttentionObservation:
    """What was seen of the queries, keys and values of one layer."""

    def __init__(self) -> None:
        self.peaks = torch.zeros(3)
        """[3] fp32, largest magnitude of queries, keys and values over all passes."""

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Take note of one call's inputs; a forward pre-hook."""
        peaks = torch.stack([tensor.abs().amax().float() for tensor in args[:3]])
        self.peaks = torch.maximum(self.peaks.to(peaks.device), peaks)

    def scales(self, attention: CacheAttention, headroom: float) -> AttentionScales:
        """Return scales that fit what was seen."""
        q, k, v = self.peaks.float().cpu()
        factor = query_factor(attention.scale)
        fitted = [float(power_of_two_scale(headroom * peak)) for peak in (q * factor, k, v)]
        return AttentionScales(q=fitted[0], k=fitted[1], v=fitted[2])


@contextmanager
def observed(
    dit: CausalDiT,
    groups: Sequence[tuple[str, ...]],
    attention: Sequence[str],
    kind: type[AttentionObservation] | type[HeadObservation],
    *,
    expected_passes: int,
) -> Iterator[tuple[list[InputObservation], list[AttentionObservation | HeadObservation]]]:
    """Observe inputs for as long as the context lasts.

    Args:
        dit: The model.
        groups: Names of linear layers, each group with one input; the first of each is observed.
        attention: Names of attention modules.
        kind: How attention is observed.
        expected_passes: Passes to come, about; decides how many inputs are kept of each.

    Yields:
        An observation of each group and one of each attention module, filled while passes run.
    """
    inputs = [InputObservation(max(1, -(-SAMPLE_ROWS // expected_passes))) for _ in groups]
    attended: list[AttentionObservation | HeadObservation] = [kind() for _ in attention]
    hooks = [
        dit.get_submodule(group[0]).register_forward_pre_hook(seen) for group, seen in zip(groups, inputs, strict=True)
    ]
    hooks += [
        dit.get_submodule(name).register_forward_pre_hook(seen) for name, seen in zip(attention, attended, strict=True)
    ]
    try:
        yield inputs, attended
    finally:
        for hook in hooks:
            hook.remove()
