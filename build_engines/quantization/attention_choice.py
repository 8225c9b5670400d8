"""Self-attention: scales of queries, keys and values, and whether fp8 is good enough, by its error in real passes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from causal_forcing.build_engines.models.dit import CausalDiT
from causal_forcing.build_engines.models.dit_layers import CacheAttention
from causal_forcing.build_engines.quantization.fp8_attention import AttentionScales
from causal_forcing.build_engines.quantization.head_scales import HeadScales
from causal_forcing.build_engines.quantization.recipe import SENSITIVE_ATTENTION_ERROR


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionChoice:
    """What was decided about a layer's attention over the cache, and why."""

    name: str
    """Name in the DiT, such as `blocks.0.cache_attention`."""
    quantised: bool
    """Whether it is in fp8."""
    error: float
    """RMS error of its output over the passes of a clip, relative to the output's RMS."""
    scales: AttentionScales | HeadScales
    """How its inputs are quantised."""

    def fields(self) -> dict[str, Any]:
        """Return what the manifest records."""
        return {"quantised": self.quantised, "error": round(self.error, 5), "scales": self.scales.fields()}


class AttentionErrors:
    """Collects what fp8 would do to the attention of each layer, in passes that run without it.

    Args:
        scales: Layer name to the scales to try.
    """

    def __init__(self, scales: Mapping[str, AttentionScales | HeadScales]) -> None:
        self._scales = scales
        self._squares = {name: torch.zeros(2, dtype=torch.float64) for name in scales}

    @contextmanager
    def measuring(self, dit: CausalDiT) -> Iterator[None]:
        """Measure every pass for as long as the context lasts."""
        hooks = [
            dit.get_submodule(name).register_forward_hook(functools.partial(self._compare, name))
            for name in self._scales
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def choices(self) -> list[AttentionChoice]:
        """Return what to do with each layer."""
        choices = []
        for name, (error, magnitude) in self._squares.items():
            relative = float((error / magnitude).sqrt()) if magnitude else 0.0
            quantised = relative <= SENSITIVE_ATTENTION_ERROR
            choices.append(AttentionChoice(name=name, quantised=quantised, error=relative, scales=self._scales[name]))
        return choices

    def _compare(self, name: str, module: nn.Module, args: tuple[torch.Tensor, ...], outputs: Any) -> None:
        assert isinstance(module, CacheAttention), f"{name} is attention in the carrier type"
        got = self._scales[name].attend(module, *args)
        want = outputs[0].float()
        self._squares[name] += torch.stack([(got.float() - want).square().sum(), want.square().sum()]).double().cpu()
