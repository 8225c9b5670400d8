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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from causal_forcing.build_engines.model_loading import ModelSource
from causal_forcing.build_engines.models.dit import (
    CausalDiT,
    DiTContext,
    DiTContextStep,
    DiTStep,
    PromptKV,
    TimestepModulation,
)
from causal_forcing.build_engines.models.taehv import TAEHV, TAEHVDecoder, TAEHVDecoderFirst, memory_shapes
from causal_forcing.build_engines.models.text_encoder import split_stages
from causal_forcing.build_engines.models.vae import (
    LatentScale,
    VAEDecoder,
    VAEDecoderFirst,
    VAEEncoder,
    VAEEncoderFirst,
    WanVAE,
    decoder_cache_shapes,
    decoder_row_split,
    encoder_cache_shapes,
)
from causal_forcing.build_engines.quantization.head_scales import CodeCacheAttention
from causal_forcing.plugins.fp8_attention_ops import SLOT_GROUP
from causal_forcing.runtime.spec import (
    FRAMES_PER_LATENT,
    DiTSpec,
    Geometry,
    IOTensor,
    NetworkSpec,
    TAEHVSpec,
    TextSpec,
    VAESpec,
    frame_count,
)

TEXT_NETWORK_PARAMETERS = 1_600_000_000
"""Most parameters of a network of the text encoder: a little more than the DiT has, so that what compiles one compiles
the other. Compiling takes three to four times a network's weights in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A network ready for export."""

    spec: NetworkSpec
    """Names, shapes and states."""
    module: nn.Module
    """Its forward takes the inputs in order and returns the outputs in order."""


def dit_networks(
    dit: CausalDiT, geometry: Geometry, *, precision: str, timesteps: int, with_pair: bool = False
) -> list[Network]:
    """Describe the networks of the DiT.

    Args:
        dit: The model.
        geometry: Shapes to fix.
        precision: Dtype of activations and caches.
        timesteps: Rows of the modulation tables: distinct timesteps of the schedule.
        with_pair: Whether `dit_context_step` is among them.
    """
    spec = dit.spec
    cross, caches = _cross_tensors(spec, geometry, precision), _cache_tensors(dit, geometry, precision)
    written = tuple(replace(cache, name=f"{cache.name}_out") for cache in caches)
    states = tuple((out.name, cache.name) for out, cache in zip(written, caches, strict=True))
    latent = _latent(spec, geometry, precision)
    layer_modulation = IOTensor(name="layer_modulation", shape=(spec.num_layers, 6, spec.dim), dtype=precision)
    head_modulation = IOTensor(name="head_modulation", shape=(2, spec.dim), dtype=precision)
    placement = _placement(spec, geometry, prefix="", chunks=1)
    step = NetworkSpec(
        name="dit_step",
        inputs=(latent, layer_modulation, head_modulation, *placement, *cross, *caches),
        outputs=(IOTensor(name="flow", shape=latent.shape, dtype=precision), *written),
        states=states,
        in_place=True,
    )
    context = NetworkSpec(
        name="dit_context",
        inputs=(latent, layer_modulation, *placement, *cross[:-2], *caches),
        outputs=written,
        states=states,
        in_place=True,
    )
    pair_modulation = IOTensor(name="pair_modulation", shape=(spec.num_layers, 2, 6, spec.dim), dtype=precision)
    pair = NetworkSpec(
        name="dit_context_step",
        inputs=(
            *(latent, replace(latent, name="next_latent"), pair_modulation, head_modulation),
            *(*_placement(spec, geometry, prefix="pair_", chunks=2), *cross, *caches),
        ),
        outputs=step.outputs,
        states=states,
        in_place=True,
    )
    return [
        Network(spec=_modulation_spec(spec, precision, timesteps), module=TimestepModulation(dit)),
        Network(spec=_prompt_kv_spec(spec, geometry, precision, cross), module=PromptKV(dit)),
        Network(spec=step, module=DiTStep(dit)),
        Network(spec=context, module=DiTContext(dit)),
        *([Network(spec=pair, module=DiTContextStep(dit))] if with_pair else []),
    ]


def text_networks(
    source: ModelSource,
    text: TextSpec,
    dit: DiTSpec,
    geometry: Geometry,
    *,
    precision: str,
    max_parameters: int = TEXT_NETWORK_PARAMETERS,
) -> Iterator[Network]:
    """Describe the prompt encoder, which makes what the DiT attends to: one network, or several in a row.

    They are loaded one at a time where their source can.

    Args:
        source: Where the encoder comes from.
        text: Its sizes.
        dit: The model that reads the prompt embedding.
        geometry: Shapes to fix.
        precision: Dtype of activations.
        max_parameters: The encoder is split where it has more.
    """
    shape = (geometry.batch, dit.text_len)
    token_mask = IOTensor(name="token_mask", shape=shape, dtype="int64")
    # Numbered, so that no engine reads the buffer that it writes.
    chain = [
        IOTensor(name="token_ids", shape=shape, dtype="int64"),
        *(
            IOTensor(name=f"text_hidden_{index}", shape=(*shape, text.dim), dtype=precision)
            for index in range(1, len(split_stages(text, max_parameters)))
        ),
        IOTensor(name="prompt_embeds", shape=(*shape, dit.text_dim), dtype=precision),
    ]
    names = text_network_names(text, max_parameters)
    for index, module in enumerate(source.text_encoder_parts(max_parameters)):
        yield Network(
            spec=NetworkSpec(name=names[index], inputs=(chain[index], token_mask), outputs=(chain[index + 1],)),
            module=module,
        )


def text_network_names(text: TextSpec, max_parameters: int = TEXT_NETWORK_PARAMETERS) -> list[str]:
    """Return the names of the prompt encoder's networks, in the order in which they run."""
    count = len(split_stages(text, max_parameters))
    return ["text_encoder"] if count == 1 else [f"text_encoder_{index}" for index in range(1, count + 1)]


def decoder_networks(vae: WanVAE, geometry: Geometry, *, precision: str, ranks: int = 1) -> list[Network]:
    """Describe the streaming decoder: the clip's first chunk, and every other.

    Args:
        vae: The model.
        geometry: Shapes to fix.
        precision: Dtype of activations and caches.
        ranks: How many share a clip; the caches are those of one.
    """
    height = geometry.latent_height
    shapes = decoder_cache_shapes(vae.spec, geometry.batch, height, geometry.latent_width, ranks=ranks)
    split = decoder_row_split(vae.spec, height, ranks)
    return _decoder_networks(VAEDecoderFirst(vae, split), VAEDecoder(vae, split), vae.spec, shapes, geometry, precision)


def taehv_networks(
    taehv: TAEHV, geometry: Geometry, *, precision: str, statistics: VAESpec | None = None
) -> list[Network]:
    """Describe the tiny streaming decoder: networks of the same names, which take and give what the Wan VAE's do.

    Args:
        taehv: The model.
        geometry: Shapes to fix.
        precision: Dtype of activations and of what is remembered.
        statistics: The latents' statistics, where the decoder takes latents that are not normalised.
    """
    weight = next(taehv.parameters())
    scale = None if statistics is None else LatentScale(statistics, weight)
    shapes = memory_shapes(taehv.spec, geometry.batch, geometry.latent_height, geometry.latent_width)
    first, following = TAEHVDecoderFirst(taehv, scale), TAEHVDecoder(taehv, scale)
    return _decoder_networks(first, following, taehv.spec, shapes, geometry, precision)


def _decoder_networks(
    first: nn.Module,
    following: nn.Module,
    spec: VAESpec | TAEHVSpec,
    shapes: Sequence[tuple[int, ...]],
    geometry: Geometry,
    precision: str,
) -> list[Network]:
    frames, batch = geometry.chunk_frames, geometry.batch
    latent = _latent(spec, geometry, precision)
    caches = _numbered("decoder_cache", shapes, precision)

    def pixels(name: str, pixel_frames: int) -> IOTensor:
        shape = (batch, pixel_frames, 3, geometry.pixel_height, geometry.pixel_width)
        return IOTensor(name=name, shape=shape, dtype=precision)

    return [
        Network(
            spec=NetworkSpec(
                name="vae_decoder_first",
                inputs=(latent,),
                outputs=(pixels("pixels_first", frame_count(frames)), *caches),
            ),
            module=first,
        ),
        Network(
            spec=_with_carried_states("vae_decoder", latent, pixels("pixels", FRAMES_PER_LATENT * frames), caches),
            module=following,
        ),
    ]


def encoder_networks(vae: WanVAE, geometry: Geometry, *, precision: str) -> list[Network]:
    """Describe the streaming encoder: an image or a video's first frame, and every four frames after it."""
    batch = geometry.batch
    size = (geometry.pixel_height, geometry.pixel_width)
    latent_shape = (batch, 1, vae.spec.latent_channels, geometry.latent_height, geometry.latent_width)
    encoded = IOTensor(name="encoded_latent", shape=latent_shape, dtype=precision)
    image = IOTensor(name="image", shape=(batch, 3, 1, *size), dtype=precision)
    video = IOTensor(name="video", shape=(batch, 3, FRAMES_PER_LATENT, *size), dtype=precision)
    shapes = encoder_cache_shapes(vae.spec, batch, geometry.latent_height, geometry.latent_width)
    caches = _numbered("encoder_cache", shapes, precision)
    return [
        Network(
            spec=NetworkSpec(name="vae_encoder_first", inputs=(image,), outputs=(encoded, *caches)),
            module=VAEEncoderFirst(vae),
        ),
        Network(spec=_with_carried_states("vae_encoder", video, encoded, caches), module=VAEEncoder(vae)),
    ]


def example_inputs(spec: NetworkSpec) -> tuple[torch.Tensor, ...]:
    """Make inputs of a network's shapes, to trace it with.

    Nothing reads their values, so they have none: 12 GB of caches at full size stay memory that was never touched.
    """
    return tuple(torch.empty(io.shape, dtype=getattr(torch, io.dtype)) for io in spec.inputs)


def _with_carried_states(name: str, source: IOTensor, target: IOTensor, caches: Sequence[IOTensor]) -> NetworkSpec:
    written = tuple(IOTensor(name=f"{cache.name}_out", shape=cache.shape, dtype=cache.dtype) for cache in caches)
    return NetworkSpec(
        name=name,
        inputs=(source, *caches),
        outputs=(target, *written),
        states=tuple((out.name, cache.name) for out, cache in zip(written, caches, strict=True)),
    )


def _latent(spec: DiTSpec | VAESpec | TAEHVSpec, geometry: Geometry, precision: str) -> IOTensor:
    frame = (spec.latent_channels, geometry.latent_height, geometry.latent_width)
    shape = (geometry.batch, geometry.chunk_frames, *frame)
    return IOTensor(name="latent", shape=shape, dtype=precision)


def _placement(spec: DiTSpec, geometry: Geometry, *, prefix: str, chunks: int) -> tuple[IOTensor, ...]:
    """Name what tells a pass over consecutive chunks where they lie."""
    rope_shape = (chunks * geometry.chunk_tokens, spec.head_dim // 2)
    return (
        IOTensor(name=f"{prefix}rope_cos", shape=rope_shape, dtype="float32"),
        IOTensor(name=f"{prefix}rope_sin", shape=rope_shape, dtype="float32"),
        IOTensor(name=f"{prefix}slots", shape=(chunks * geometry.chunk_frames,), dtype="int32"),
        IOTensor(name=f"{prefix}valid_slots", shape=(chunks * geometry.batch,), dtype="int32"),
    )


def _cross_tensors(spec: DiTSpec, geometry: Geometry, precision: str) -> tuple[IOTensor, ...]:
    shape = (geometry.batch, spec.num_heads, spec.text_len, spec.head_dim)
    return _per_layer("cross", spec.num_layers, shape, precision, suffix="")


def _cache_tensors(dit: CausalDiT, geometry: Geometry, precision: str) -> tuple[IOTensor, ...]:
    """Name the KV caches; where attention takes codes, values are transposed (`fp8_attention_ops`)."""
    spec = dit.spec
    shape = (geometry.batch, spec.num_heads // dit.ranks, geometry.cache_slots, spec.head_dim)
    columns = -(-geometry.cache_slots // SLOT_GROUP) * SLOT_GROUP
    caches = _per_layer("", spec.num_layers, shape, precision, suffix="cache")
    codes = (
        {"dtype": "float8_e4m3fn"},
        {"dtype": "float8_e4m3fn", "shape": (*shape[:2], spec.head_dim, columns)},
    )
    return tuple(
        replace(cache, **codes[index % 2])
        if isinstance(dit.layers[index // 2].cache_attention, CodeCacheAttention)
        else cache
        for index, cache in enumerate(caches)
    )


def _per_layer(
    prefix: str, layers: int, shape: tuple[int, ...], precision: str, *, suffix: str
) -> tuple[IOTensor, ...]:
    """Name k and v of each layer in turn: `cross_k_00`, `cross_v_00`, … or `k_cache_00`, `v_cache_00`, …"""
    return tuple(
        IOTensor(name="_".join(filter(None, (prefix, kind, suffix, f"{layer:02}"))), shape=shape, dtype=precision)
        for layer in range(layers)
        for kind in ("k", "v")
    )


def _numbered(name: str, shapes: Sequence[tuple[int, ...]], precision: str) -> tuple[IOTensor, ...]:
    return tuple(
        IOTensor(name=f"{name}_{index:02}", shape=shape, dtype=precision) for index, shape in enumerate(shapes)
    )


def _modulation_spec(spec: DiTSpec, precision: str, timesteps: int) -> NetworkSpec:
    return NetworkSpec(
        name="timestep_modulation",
        inputs=(IOTensor(name="timestep_embedding", shape=(timesteps, spec.freq_dim), dtype="float32"),),
        outputs=(
            IOTensor(name="layer_modulation_table", shape=(timesteps, spec.num_layers, 6, spec.dim), dtype=precision),
            IOTensor(name="head_modulation_table", shape=(timesteps, 2, spec.dim), dtype=precision),
        ),
    )


def _prompt_kv_spec(spec: DiTSpec, geometry: Geometry, precision: str, cross: tuple[IOTensor, ...]) -> NetworkSpec:
    embeds = IOTensor(name="prompt_embeds", shape=(geometry.batch, spec.text_len, spec.text_dim), dtype=precision)
    return NetworkSpec(name="prompt_kv", inputs=(embeds,), outputs=cross)
