"""The streaming Wan VAE, shaped for export: convolution caches are inputs and outputs, all shapes are static.

One set of parameters (`WanVAE`, upstream's key names) serves four exported networks: `VAEDecoderFirst` and
`VAEDecoder`, `VAEEncoderFirst` and `VAEEncoder`. The first chunk of a clip has its own network because it has no past,
and because its first latent frame stands for one pixel frame instead of four. Each holds only its half of the
parameters.

Source of the maths: thu-ml/Causal-Forcing@1fc7bbc wan/modules/vae.py and utils/wan_wrapper.py (WanVAEWrapper). We
differ in form only: a call decodes a whole chunk, and there is no hidden state.
"""

from __future__ import annotations

import torch
from torch import nn

from causal_forcing.build_engines.models.row_split import RowSplit
from causal_forcing.build_engines.models.vae_layers import (
    ConvCaches,
    Downsample,
    Head,
    Middle,
    ResidualBlock,
    Upsample,
    causal_conv3d,
)
from causal_forcing.build_engines.models.vae_stages import RGB_CHANNELS, decoder_stages, encoder_stages
from causal_forcing.runtime.model_spec import VAESpec

Tensors = tuple[torch.Tensor, ...]


class Decoder(nn.Module):
    """Latent features to pixels."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        stages = decoder_stages(spec)
        self.conv1 = causal_conv3d(spec.latent_channels, stages[0].in_channels)
        self.middle = Middle(stages[0].in_channels)
        self.upsamples = nn.ModuleList()
        for stage in stages:
            self.upsamples.extend(ResidualBlock(*channels) for channels in stage.block_channels())
            if stage.resamples_space:
                self.upsamples.append(Upsample(stage.out_channels, in_time=stage.resamples_time))
        self.head = Head(stages[-1].out_channels, RGB_CHANNELS)

    def forward(self, z: torch.Tensor, caches: ConvCaches, split: RowSplit | None = None) -> torch.Tensor:
        """Return [B, 3, T, H, W] for `z` [B, C, F, h, w]; with a split, this rank's rows of it."""
        x = self.middle(self.conv1(caches.prepend(z)), caches)
        x, stage = x if split is None else split.enter(x), 0
        for layer in self.upsamples:
            if split is not None and isinstance(layer, Upsample):
                x, stage = split.leave(x, stage), stage + 1
            x = layer(x, caches)
        pixels: torch.Tensor = self.head(x, caches)
        return pixels if split is None else split.leave(pixels, stage)


class Encoder(nn.Module):
    """Pixels to the mean and log-variance of latents, before their 1×1×1 convolution."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        stages = encoder_stages(spec)
        self.conv1 = causal_conv3d(RGB_CHANNELS, stages[0].in_channels)
        self.downsamples = nn.ModuleList()
        for stage in stages:
            self.downsamples.extend(ResidualBlock(*channels) for channels in stage.block_channels())
            if stage.resamples_space:
                self.downsamples.append(Downsample(stage.out_channels, in_time=stage.resamples_time))
        self.middle = Middle(stages[-1].out_channels)
        self.head = Head(stages[-1].out_channels, 2 * spec.latent_channels)

    def forward(self, x: torch.Tensor, caches: ConvCaches) -> torch.Tensor:
        """Return [B, 2C, 1, h, w] for `x` [B, 3, T, H, W]; T is 1 where the clip starts, 4 after."""
        x = self.conv1(caches.prepend(x))
        for layer in self.downsamples:
            x = layer(x, caches)
        moments: torch.Tensor = self.head(self.middle(x, caches), caches)
        return moments


class WanVAE(nn.Module):
    """All parameters of the VAE under upstream's names; the networks below borrow from it what they run."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = Encoder(spec)
        self.conv1 = nn.Conv3d(2 * spec.latent_channels, 2 * spec.latent_channels, 1)
        self.conv2 = nn.Conv3d(spec.latent_channels, spec.latent_channels, 1)
        self.decoder = Decoder(spec)


class LatentScale(nn.Module):
    """Normalise latents, and undo it.

    The constants take the dtype of the VAE before the reciprocal is formed, as upstream's do: it matters in bf16.

    Args:
        spec: Gives the statistics.
        weight: Any of the network that takes the latents: gives dtype and device.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, spec: VAESpec, weight: torch.Tensor) -> None:
        super().__init__()
        for name, values in (("mean", spec.latent_mean), ("std", spec.latent_std)):
            constant = torch.tensor(values, dtype=weight.dtype, device=weight.device).view(-1, 1, 1)
            self.register_buffer(name, constant, persistent=False)

    def normalise(self, mu: torch.Tensor) -> torch.Tensor:
        """Return the normalised latent of `mu`, both [B, F, C, h, w]."""
        return (mu - self.mean) * (1.0 / self.std)

    def denormalise(self, latent: torch.Tensor) -> torch.Tensor:
        """Return what the decoder takes for a normalised latent, both [B, F, C, h, w]."""
        return latent / (1.0 / self.std) + self.mean


class _DecoderNetwork(nn.Module):
    """The decoder half, with the latents' statistics.

    Args:
        vae: The model.
        split: How several ranks share the work, each with caches of its own; every one gets all pixels.
    """

    def __init__(self, vae: WanVAE, split: RowSplit | None = None) -> None:
        super().__init__()
        self.split = split
        self.latent_scale = LatentScale(vae.spec, vae.conv2.weight)
        self.conv2 = vae.conv2
        self.decoder = vae.decoder

    def decode(self, latent_chunk: torch.Tensor, caches: ConvCaches) -> Tensors:
        """Return pixels [B, T, 3, H, W] and the collected caches."""
        z = self.latent_scale.denormalise(latent_chunk).transpose(1, 2)
        pixels = self.decoder(self.conv2(z), caches, self.split).transpose(1, 2)
        return pixels if self.split is None else self.split.gather(pixels), *caches.updated()


class VAEDecoderFirst(_DecoderNetwork):
    """Decode the first chunk of a clip."""

    def forward(self, latent_chunk: torch.Tensor) -> Tensors:
        """Decode a chunk that starts a clip.

        Args:
            latent_chunk: [B, F, C, h, w], normalised; any F ≥ 1.

        Returns:
            Pixels [B, 1 + 4(F − 1), 3, 8h, 8w], not clamped, about [-1, 1]; then the caches of `decoder_cache_shapes`.
        """
        return self.decode(latent_chunk, ConvCaches(None))


class VAEDecoder(_DecoderNetwork):
    """Decode any later chunk of a clip."""

    def forward(self, latent_chunk: torch.Tensor, *caches: torch.Tensor) -> Tensors:
        """Decode a chunk that continues a clip.

        Args:
            latent_chunk: [B, F, C, h, w], normalised; any F ≥ 1.
            *caches: What the previous chunk's decoding returned after the pixels; unchanged.

        Returns:
            Pixels [B, 4F, 3, 8h, 8w], not clamped, about [-1, 1]; then the new caches.
        """
        return self.decode(latent_chunk, ConvCaches(caches))


class _EncoderNetwork(nn.Module):
    """The encoder half, with the latents' statistics."""

    def __init__(self, vae: WanVAE) -> None:
        super().__init__()
        self.latent_channels = vae.spec.latent_channels
        self.encoder = vae.encoder
        self.conv1 = vae.conv1
        self.latent_scale = LatentScale(vae.spec, vae.conv2.weight)

    def encode(self, video: torch.Tensor, caches: ConvCaches) -> Tensors:
        """Return the latent's mean [B, 1, C, h, w], normalised, and the collected caches."""
        moments: torch.Tensor = self.conv1(self.encoder(video, caches))
        mu = moments[:, : self.latent_channels].transpose(1, 2)
        return self.latent_scale.normalise(mu), *caches.updated()


class VAEEncoderFirst(_EncoderNetwork):
    """Encode an image, or the first frame of a clip."""

    def forward(self, image: torch.Tensor) -> Tensors:
        """Encode the frame that starts a clip.

        Args:
            image: [B, 3, 1, H, W] in [-1, 1].

        Returns:
            Normalised latent [B, 1, C, H/8, W/8]; then the caches of `encoder_cache_shapes`.
        """
        return self.encode(image, ConvCaches(None))


class VAEEncoder(_EncoderNetwork):
    """Encode four more frames of a clip."""

    def forward(self, video: torch.Tensor, *caches: torch.Tensor) -> Tensors:
        """Encode the next four frames.

        Args:
            video: [B, 3, 4, H, W] in [-1, 1].
            *caches: What the previous encoding returned after the latent; unchanged.

        Returns:
            Normalised latent [B, 1, C, H/8, W/8]; then the new caches.
        """
        return self.encode(video, ConvCaches(caches))
