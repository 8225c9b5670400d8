"""The networks of the DiT."""

from __future__ import annotations

from dataclasses import replace

from causal_forcing.build_engines.models.dit import (
    CausalDiT,
    DiTContext,
    DiTContextStep,
    DiTStep,
    PromptKV,
    TimestepModulation,
)
from causal_forcing.build_engines.networks import Network, latent_tensor
from causal_forcing.build_engines.quantization.head_scales import CodeCacheAttention
from causal_forcing.plugins.fp8_attention_ops import SLOT_GROUP
from causal_forcing.runtime.geometry import Geometry
from causal_forcing.runtime.model_spec import DiTSpec
from causal_forcing.runtime.network_spec import IOTensor, NetworkSpec


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
    latent = latent_tensor(spec, geometry, precision)
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
