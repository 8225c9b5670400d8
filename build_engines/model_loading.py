"""Weights into models: the same calls whether they come from released files or from a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import nn

from causal_forcing.build_engines.checkpoint import StateDict, load_into, read_state_dict, verify_state_dict
from causal_forcing.build_engines.models.dit import CausalDiT
from causal_forcing.build_engines.models.taehv import TAEHV
from causal_forcing.build_engines.models.text_encoder import (
    TextEncoder,
    TextEncoderPart,
    load_text_encoder,
    split_stages,
    upstream_shapes,
)
from causal_forcing.build_engines.models.vae import WanVAE
from causal_forcing.build_engines.random_weights import randomise
from causal_forcing.build_engines.weights import WeightFiles
from causal_forcing.runtime.errors import CheckpointError
from causal_forcing.runtime.model_spec import ModelSpec
from causal_forcing.runtime.text import Tokenizer
from causal_forcing.runtime.variant import Variant

Model = TypeVar("Model", bound=nn.Module)


class ModelSource(Protocol):
    """Gives a model's networks their weights, in the dtype that was asked for."""

    def dit(self) -> CausalDiT:
        """Load the denoiser."""

    def vae(self) -> WanVAE:
        """Load the video autoencoder."""

    def taehv(self) -> TAEHV:
        """Load the tiny decoder; only where the model has one."""

    def text_encoder(self) -> TextEncoder:
        """Load the prompt encoder."""

    def text_encoder_parts(self, max_parameters: int) -> Iterator[TextEncoder | TextEncoderPart]:
        """Load the prompt encoder: in parts of at most that many parameters, or whole where it has no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HollowModels:
    """Models without weights, on torch's meta device: shapes and sizes for planning."""

    model: ModelSpec
    """Sizes."""
    dtype: torch.dtype
    """Dtype of all weights."""

    def dit(self) -> CausalDiT:
        """See `ModelSource.dit`."""
        with torch.device("meta"):
            return CausalDiT(self.model.dit).to(self.dtype)

    def vae(self) -> WanVAE:
        """See `ModelSource.vae`."""
        with torch.device("meta"):
            return WanVAE(self.model.vae).to(self.dtype)

    def taehv(self) -> TAEHV:
        """See `ModelSource.taehv`."""
        assert self.model.taehv is not None, f"{self.model.name} has no TAEHV"
        with torch.device("meta"):
            return TAEHV(self.model.taehv).to(self.dtype)

    def text_encoder(self) -> TextEncoder:
        """See `ModelSource.text_encoder`."""
        with torch.device("meta"):
            return TextEncoder(self.model.text, max_tokens=self.model.dit.text_len).to(self.dtype)

    def text_encoder_parts(self, max_parameters: int) -> Iterator[TextEncoder | TextEncoderPart]:
        """See `ModelSource.text_encoder_parts`."""
        yield from _split(self.text_encoder(), self.model, max_parameters)


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
        return self._fill(self._hollow().dit())

    def vae(self) -> WanVAE:
        """See `ModelSource.vae`."""
        return self._fill(self._hollow().vae())

    def taehv(self) -> TAEHV:
        """See `ModelSource.taehv`."""
        return self._fill(self._hollow().taehv())

    def text_encoder(self) -> TextEncoder:
        """See `ModelSource.text_encoder`."""
        return self._fill(self._hollow().text_encoder())

    def text_encoder_parts(self, max_parameters: int) -> Iterator[TextEncoder | TextEncoderPart]:
        """See `ModelSource.text_encoder_parts`; a part is drawn when it is asked for, and is the taker's to let go."""
        parts = list(self._hollow().text_encoder_parts(max_parameters))
        while parts:
            yield self._fill(parts.pop(0))

    def _hollow(self) -> HollowModels:
        return HollowModels(model=self.model, dtype=self.dtype)

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

    def check(self) -> None:
        """Find out what can be known of all files before the first is loaded: tensor names, shapes, the tokenizer.

        Raises:
            CheckpointError: A file is unreadable, unsafe, or another model's.
        """
        hollow, text = self._hollow(), self.variant.model.text
        dit = read_state_dict(self.files.dit, use_ema=self.variant.use_ema)
        verify_state_dict(dit, hollow.dit(), what=f"the DiT of {self.variant.slug}", is_content_read=False)
        if self.files.vae is not None:
            verify_state_dict(read_state_dict(self.files.vae), hollow.vae(), what="the Wan VAE", is_content_read=False)
        if self.files.taehv is not None:
            taehv = read_taehv(self.files.taehv)
            verify_state_dict(taehv, hollow.taehv(), what="TAEHV", is_content_read=False, option="--taehv")
        state = read_state_dict(self.files.text_encoder)
        verify_state_dict(state, upstream_shapes(text), what="the UMT5 text encoder", is_content_read=False)
        tokenizer = Tokenizer(self.files.tokenizer, length=self.variant.model.dit.text_len, pad_id=text.pad_id)
        if tokenizer.vocab_size > text.vocab_size:
            raise CheckpointError(
                f"the tokenizer in {self.files.tokenizer} has {tokenizer.vocab_size} tokens, the text encoder "
                f"{text.vocab_size}: pass the folder they came in with --wan-folder"
            )

    def dit(self) -> CausalDiT:
        """See `ModelSource.dit`."""
        module = self._hollow().dit()
        state = read_state_dict(self.files.dit, use_ema=self.variant.use_ema)
        load_into(module, state, dtype=self.dtype, what=f"the DiT of {self.variant.slug}")
        return module

    def vae(self) -> WanVAE:
        """See `ModelSource.vae`."""
        assert self.files.vae is not None, "the Wan VAE is looked for wherever it is built"
        module = self._hollow().vae()
        load_into(module, read_state_dict(self.files.vae), dtype=self.dtype, what="the Wan VAE")
        return module

    def taehv(self) -> TAEHV:
        """See `ModelSource.taehv`."""
        assert self.files.taehv is not None, "the file of TAEHV is looked for wherever it is built"
        module = self._hollow().taehv()
        load_into(module, read_taehv(self.files.taehv), dtype=self.dtype, what="TAEHV", option="--taehv")
        return module

    def text_encoder(self) -> TextEncoder:
        """See `ModelSource.text_encoder`."""
        model = self.variant.model
        state = read_state_dict(self.files.text_encoder)
        return load_text_encoder(state, model.text, dtype=self.dtype, max_tokens=model.dit.text_len)

    def text_encoder_parts(self, max_parameters: int) -> Iterator[TextEncoder | TextEncoderPart]:
        """See `ModelSource.text_encoder_parts`."""
        yield from _split(self.text_encoder(), self.variant.model, max_parameters)

    def _hollow(self) -> HollowModels:
        return HollowModels(model=self.variant.model, dtype=self.dtype)


def read_taehv(path: Path) -> StateDict:
    """Read the decoder of a released file of TAEHV; the encoder, which has the same file, is left there."""
    state = read_state_dict(path)
    tensors = {name: tensor for name, tensor in state.tensors.items() if not name.startswith("encoder.")}
    return dataclasses.replace(state, tensors=tensors)


def _split(encoder: TextEncoder, model: ModelSpec, max_parameters: int) -> list[TextEncoder | TextEncoderPart]:
    """Return the parts of an encoder, which share its modules: once it is let go, each keeps its own alone."""
    parts = split_stages(model.text, max_parameters)
    return [encoder] if len(parts) == 1 else [TextEncoderPart(encoder, stages) for stages in parts]
