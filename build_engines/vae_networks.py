"""The networks of decoders and of the image encoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from causal_forcing.build_engines.models.taehv import TAEHV, TAEHVDecoder, TAEHVDecoderFirst, memory_shapes
from causal_forcing.build_engines.models.vae import (
    LatentScale,
    VAEDecoder,
    VAEDecoderFirst,
    VAEEncoder,
    VAEEncoderFirst,
    WanVAE,
)
from causal_forcing.build_engines.models.vae_stages import decoder_cache_shapes, decoder_row_split, encoder_cache_shapes
from causal_forcing.build_engines.networks import Network, latent_tensor
from causal_forcing.runtime.geometry import FRAMES_PER_LATENT, Geometry, frame_count
from causal_forcing.runtime.model_spec import TAEHVSpec, VAESpec
from causal_forcing.runtime.network_spec import IOTensor, NetworkSpec


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
    latent = latent_tensor(spec, geometry, precision)
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


def _with_carried_states(name: str, source: IOTensor, target: IOTensor, caches: Sequence[IOTensor]) -> NetworkSpec:
    written = tuple(IOTensor(name=f"{cache.name}_out", shape=cache.shape, dtype=cache.dtype) for cache in caches)
    return NetworkSpec(
        name=name,
        inputs=(source, *caches),
        outputs=(target, *written),
        states=tuple((out.name, cache.name) for out, cache in zip(written, caches, strict=True)),
    )


def _numbered(name: str, shapes: Sequence[tuple[int, ...]], precision: str) -> tuple[IOTensor, ...]:
    return tuple(
        IOTensor(name=f"{name}_{index:02}", shape=shape, dtype=precision) for index, shape in enumerate(shapes)
    )
