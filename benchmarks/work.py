"""The work of a network, counted, and the time it takes at best on a GPU whose rates were measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from causal_forcing.build_engines.builder import BuildJob, cut_networks
from causal_forcing.build_engines.model_loading import HollowModels
from causal_forcing.build_engines.networks import Network
from causal_forcing.runtime.config import EngineConfig

CONVOLUTIONS = ("convolution", "_convolution", "cudnn_convolution", "_slow_conv2d_forward")
LINEARS = ("mm", "addmm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Floating-point operations of a network, by what carries them out; two for each multiply-add."""

    linear: int
    """Linear layers."""
    attention: int
    """Products of queries with keys, and of weights with values."""
    convolution: int
    """Convolutions."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.attention + self.convolution

    def __add__(self, other: Work) -> Work:
        return Work(
            linear=self.linear + other.linear,
            attention=self.attention + other.attention,
            convolution=self.convolution + other.convolution,
        )

    def floor_ms(self, rates: Rates) -> float:
        """Return the time that the work takes at these rates, one kind after the other."""
        parts = (self.linear / rates.linear, self.attention / rates.attention, self.convolution / rates.convolution)
        return 1e3 * sum(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What libraries reach on a GPU at this model's shapes, FLOP/s: a ceiling for what is compiled."""

    linear: float
    attention: float
    convolution: float
    source: str
    """Where they were measured, and with what."""


RATES: Mapping[tuple[str, str], Rates] = {
    ("H100", "bf16"): Rates(
        linear=700e12,
        attention=510e12,
        convolution=400e12,
        source="H100 80GB HBM3, torch 2.11: cuBLAS, cuDNN 9.19 attention; 400 TFLOP/s assumed for convolutions",
    ),
    ("H100", "fp8"): Rates(
        linear=1250e12,
        attention=741e12,
        convolution=400e12,
        source="H100 80GB HBM3, torch 2.11: torch._scaled_mm, cuDNN 9.19 sdpa_fp8; convolutions as in bf16",
    ),
}
"""By a word of the device's name and the precision; H100 rates at 4,680 queries and a full window."""


def find_rates(device: str, precision: str) -> Rates | None:
    """Return the rates of a device, None where nobody measured them."""
    return next((rates for (name, kind), rates in RATES.items() if name in device and kind == precision), None)


def count_work(job: BuildJob, config: EngineConfig, valid_slots: int) -> dict[str, Work]:
    """Count the work of every network, by name, with so many slots attended to.

    Args:
        job: What the networks are cut from; its weights are not drawn.
        config: Sizes.
        valid_slots: Cache slots that a pass attends to, its own included.
    """
    hollow = HollowModels(model=config.variant.model, dtype=getattr(torch, config.dtype))
    work = {network.spec.name: _count(network, valid_slots) for network in cut_networks(replace(job, source=hollow))}
    if {"dit_step", "dit_context"} <= set(work):
        # Both in one pass, where an engine has that.
        work["dit_context_step"] = work["dit_step"] + work["dit_context"]
    return work


def _count(network: Network, valid_slots: int) -> Work:
    def cache_attention(q_shape: tuple[int, ...], *shapes: Any, out_shape: Any = None, **rest: Any) -> int:
        batch, heads, queries, head_dim = q_shape
        return 4 * batch * heads * queries * valid_slots * head_dim

    op = torch.ops.causal_forcing.kv_cache_attention_
    inputs = [torch.empty(io.shape, dtype=getattr(torch, io.dtype), device="meta") for io in network.spec.inputs]
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={op: cache_attention}) as counter:
        network.module(*inputs)
    counts = {str(key).rpartition(".")[2]: flop for key, flop in counter.get_flop_counts()["Global"].items()}
    linear = sum(counts.pop(name, 0) for name in LINEARS)
    convolution = sum(counts.pop(name, 0) for name in CONVOLUTIONS)
    return Work(linear=linear, attention=sum(counts.values()), convolution=convolution)
