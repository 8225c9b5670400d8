"""Weights into models: the same calls whether they come from released files or from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import nn

from causal_forcing.build_engines.checkpoint import load_into, read_state_dict
from causal_forcing.build_engines.models.dit import CausalDiT
from causal_forcing.build_engines.models.text_encoder import TextEncoder, upstream_names
from causal_forcing.build_engines.models.vae import WanVAE
from causal_forcing.build_engines.weights import WeightFiles, randomise
from causal_forcing.runtime.spec import ModelSpec, Variant


Model = TypeVar("Model", bound=nn.Module)


class ModelSource(Protocol):
    """Gives a model's networks their weights, in the dtype that was asked for."""

    def dit(self) -> CausalDiT:
        """Load the denoiser."""

    def vae(self) -> WanVAE:
        """Load the video autoencoder."""

    def text_encoder(self) -> TextEncoder:
        """Load the prompt encoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomModels:
    """Models with seeded random weights, the same on every machine."""

    model: ModelSpec
    """Sizes."""
    seed: int
    """Seed of all weights."""
    dtype: torch.dtype
    """Dtype of all weights."""

    def dit(self) -> CausalDiT:
        """See `ModelSource.dit`."""
        return self._fill(_hollow_dit(self.model))

    def vae(self) -> WanVAE:
        """See `ModelSource.vae`."""
        return self._fill(_hollow_vae(self.model))

    def text_encoder(self) -> TextEncoder:
        """See `ModelSource.text_encoder`."""
        return self._fill(_hollow_text_encoder(self.model))

    def _fill(self, module: Model) -> Model:
        randomise(module, self.seed, dtype=self.dtype)
        return module


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleasedModels:
    """Models from released files; every tensor is verified against the specification."""

    variant: Variant
    """Sizes, and which weight set to take."""
    files: WeightFiles
    """Where the weights are."""
    dtype: torch.dtype
    """Dtype of all weights."""

    def dit(self) -> CausalDiT:
        """See `ModelSource.dit`."""
        module = _hollow_dit(self.variant.model)
        state = read_state_dict(self.files.dit, use_ema=self.variant.use_ema)
        load_into(module, state, dtype=self.dtype, what=f"the DiT of {self.variant.slug}")
        return module

    def vae(self) -> WanVAE:
        """See `ModelSource.vae`."""
        module = _hollow_vae(self.variant.model)
        load_into(module, read_state_dict(self.files.vae), dtype=self.dtype, what="the Wan VAE")
        return module

    def text_encoder(self) -> TextEncoder:
        """See `ModelSource.text_encoder`."""
        module = _hollow_text_encoder(self.variant.model)
        state = read_state_dict(self.files.text_encoder)
        names = upstream_names(self.variant.model.text)
        load_into(module, state, dtype=self.dtype, what="the UMT5 encoder", names=names)
        return module


def _hollow_dit(model: ModelSpec) -> CausalDiT:
    with torch.device("meta"):
        return CausalDiT(model.dit)


def _hollow_vae(model: ModelSpec) -> WanVAE:
    with torch.device("meta"):
        return WanVAE(model.vae)


def _hollow_text_encoder(model: ModelSpec) -> TextEncoder:
    with torch.device("meta"):
        return TextEncoder(model.text, max_tokens=model.dit.text_len)
