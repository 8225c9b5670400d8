"""The stages of the Wan VAE, how ranks share its decoder, and the shapes of the caches that both have: plain data."""

from __future__ import annotations

from dataclasses import dataclass

from causal_forcing.build_engines.models.row_split import RowSplit, split_rows
from causal_forcing.build_engines.models.vae_layers import CONV_PAST_FRAMES
from causal_forcing.runtime.model_spec import VAESpec

Shapes = tuple[tuple[int, ...], ...]

RGB_CHANNELS = 3
"""Channels of a pixel."""

MIDDLE_CONVS = 4
"""Cached convolutions of `Middle`, all of its width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Residual blocks at one resolution, and the change of resolution after them."""

    in_channels: int
    """Channels that the first block takes."""
    out_channels: int
    """Channels that every block gives."""
    blocks: int
    """Residual blocks."""
    resamples_space: bool
    """Whether height and width change after the blocks."""
    resamples_time: bool
    """Whether the frame rate changes too."""

    def block_channels(self) -> list[tuple[int, int]]:
        """Return each block's input and output channels."""
        inputs = [self.in_channels] + [self.out_channels] * (self.blocks - 1)
        return [(channels, self.out_channels) for channels in inputs]

    def conv_channels(self) -> list[int]:
        """Return the input channels of the blocks' cached convolutions, two a block."""
        return [channels for pair in self.block_channels() for channels in pair]


def encoder_stages(spec: VAESpec) -> tuple[Stage, ...]:
    """Return the encoder's stages, finest first."""
    widths = [spec.base_dim * multiple for multiple in (1, *spec.dim_mult)]
    in_time = (*spec.temporal_downsample, False)
    return tuple(
        Stage(
            in_channels=widths[index],
            out_channels=widths[index + 1],
            blocks=spec.num_res_blocks,
            resamples_space=index < len(spec.dim_mult) - 1,
            resamples_time=in_time[index],
        )
        for index in range(len(spec.dim_mult))
    )


def decoder_stages(spec: VAESpec) -> tuple[Stage, ...]:
    """Return the decoder's stages, coarsest first. An upsampling halves the channels that the next stage takes."""
    widths = [spec.base_dim * multiple for multiple in (spec.dim_mult[-1], *reversed(spec.dim_mult))]
    in_time = (*reversed(spec.temporal_downsample), False)
    return tuple(
        Stage(
            in_channels=widths[index] if index == 0 else widths[index] // 2,
            out_channels=widths[index + 1],
            blocks=spec.num_res_blocks + 1,
            resamples_space=index < len(spec.dim_mult) - 1,
            resamples_time=in_time[index],
        )
        for index in range(len(spec.dim_mult))
    )


def decoder_row_split(spec: VAESpec, latent_height: int, ranks: int) -> RowSplit:
    """Return how the decoder is split over ranks."""
    convs = [len(stage.conv_channels()) for stage in decoder_stages(spec)]
    convs[-1] += 1  # the head's
    return split_rows(convs, latent_height, ranks)


def decoder_cache_shapes(spec: VAESpec, batch: int, latent_height: int, latent_width: int, *, ranks: int = 1) -> Shapes:
    """Return the shapes [B, C, 2, H, W] of the decoder's caches, in the order of its inputs and outputs.

    Those of a rank, where several share a clip.
    """
    stages, split = decoder_stages(spec), decoder_row_split(spec, latent_height, ranks)
    width = latent_width
    entry = [spec.latent_channels] + [stages[0].in_channels] * MIDDLE_CONVS
    shapes = [(batch, channels, CONV_PAST_FRAMES, latent_height, width) for channels in entry]
    for stage, entered, left in zip(stages, split.entries, split.exits, strict=True):
        shapes += [(batch, channels, CONV_PAST_FRAMES, entered.height, width) for channels in stage.conv_channels()]
        if stage.resamples_time:
            shapes.append((batch, stage.out_channels, CONV_PAST_FRAMES, left.height, width))
        if stage.resamples_space:
            width = 2 * width
    shapes.append((batch, stages[-1].out_channels, CONV_PAST_FRAMES, split.entries[-1].height, width))
    return tuple(shapes)


def encoder_cache_shapes(spec: VAESpec, batch: int, latent_height: int, latent_width: int) -> Shapes:
    """Return the shapes of the encoder's caches, in the order of its inputs and outputs.

    [B, C, 2, H, W], except that a temporal downsampling keeps one frame: [B, C, 1, H, W].
    """
    stages = encoder_stages(spec)
    stride = 2 ** sum(stage.resamples_space for stage in stages)
    height, width = stride * latent_height, stride * latent_width
    shapes = [(batch, RGB_CHANNELS, CONV_PAST_FRAMES, height, width)]
    for stage in stages:
        shapes += [(batch, channels, CONV_PAST_FRAMES, height, width) for channels in stage.conv_channels()]
        if stage.resamples_space:
            height, width = height // 2, width // 2
        if stage.resamples_time:
            shapes.append((batch, stage.out_channels, 1, height, width))
    exit_convs = MIDDLE_CONVS + 1
    shapes += [(batch, stages[-1].out_channels, CONV_PAST_FRAMES, height, width)] * exit_convs
    return tuple(shapes)
