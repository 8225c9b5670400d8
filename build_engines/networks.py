"""The networks of a model: for each its torch module, its io_tensors, and the specification that the runtime reads.

| network | from | to |
|---|---|---|
| `text_encoder`, or `text_encoder_1`, `text_encoder_2`, … | token ids and mask | prompt embedding |
| `prompt_kv` | prompt embedding | every layer's cross-attention keys and values |
| `timestep_modulation` | timestep embeddings | modulation tables |
| `dit_step` | noisy latent chunk | its flow; keys and values into the cache |
| `dit_context` | clean latent chunk | keys and values into the cache |
| `dit_context_step` | clean latent chunk, the next, noisy one | both, in one pass; `cuda` only |
| `vae_decoder_first`, `vae_decoder` | latent chunk | pixels |
| `vae_encoder_first`, `vae_encoder` | image, four more frames | latent frame |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.model_spec import DiTSpec, TAEHVSpec, VAESpec
from causal_forcing.runtime.network_spec import IOTensor, NetworkSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network ready for export."""

    spec: NetworkSpec
    """Names, shapes and states."""
    module: nn.Module
    """Its forward takes the inputs in order and returns the outputs in order."""


def latent_tensor(spec: DiTSpec | VAESpec | TAEHVSpec, geometry: Geometry, precision: str) -> IOTensor:
    """Name the latent chunk, which the DiT makes and a decoder takes."""
    frame = (spec.latent_channels, geometry.latent_height, geometry.latent_width)
    shape = (geometry.batch, geometry.chunk_frames, *frame)
    return IOTensor(name="latent", shape=shape, dtype=precision)


def example_inputs(spec: NetworkSpec) -> tuple[torch.Tensor, ...]:
    """Make inputs of a network's shapes, to trace it with.

    Nothing reads their values, so they have none: 12 GB of caches at full size stay memory that was never touched.
    """
    return tuple(torch.empty(io.shape, dtype=getattr(torch, io.dtype)) for io in spec.inputs)
