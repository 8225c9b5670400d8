"""TAEHV, the tiny streaming decoder, shaped for export: what it remembers is inputs and outputs, shapes are static.

One set of parameters (`TAEHV`, the released names) serves two exported networks, `TAEHVDecoderFirst` and
`TAEHVDecoder`, which stand in for those of the Wan VAE: the same latents in, the same pixels out. Every block
sees one frame of its past and carries that from chunk to chunk, so a clip decoded in chunks is the clip decoded whole.

Inside, tensors are frames [T·B, C, H, W] with time outermost: the frame before is B rows up, and no layer but the last
ones needs to know what is time and what is clip.

Source of the maths: madebyollin/taehv@1f14a56 taehv.py (TAEHV, decode_video). We differ in form only: a chunk is
decoded at once, upsampling follows the 1×1 convolution that it commutes with, and the frames that a clip's first latent
gives too many are dropped before the last convolutions instead of after.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from causal_forcing.build_engines.models.vae import RGB_CHANNELS, LatentScale, Shapes, Tensors
from causal_forcing.runtime.spec import FRAMES_PER_LATENT, TAEHVSpec

STAGE_BLOCKS = 3
"""Blocks of every stage but the last, which has none."""

LATENT_LIMIT = 3.0
"""Latents are squeezed into ±3 by a tanh."""


def memory_shapes(spec: TAEHVSpec, batch: int, latent_height: int, latent_width: int) -> Shapes:
    """Return the shapes [B, C, H, W] of what the blocks remember, in the order of the networks' inputs and outputs."""
    return tuple(
        (batch, width, latent_height << stage, latent_width << stage)
        for stage, width in enumerate(spec.widths[:-1])
        for _ in range(STAGE_BLOCKS)
    )


class FrameMemory:
    """The frames that the blocks of one call remember, read and collected in the order in which they run.

    Args:
        past: What the clip's previous call collected, or None where the clip starts: zeros stand for it then.
        batch: B.
    """

    def __init__(self, past: Sequence[torch.Tensor] | None, batch: int) -> None:
        self._past = past
        self._updated: list[torch.Tensor] = []
        self.batch = batch

    @property
    def clip_starts(self) -> bool:
        """Whether this call holds the clip's first frame."""
        return self._past is None

    def previous(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the frame before each of `frames`, both [T·B, C, H, W], and collect the last one for the next call."""
        batch, read = self.batch, len(self._updated)
        # A copy, because a view would keep all frames of the call alive.
        self._updated.append(frames[-batch:].clone())
        if self._past is None:
            before = torch.zeros_like(frames[:batch])
        else:
            assert read < len(self._past), f"TAEHV has more than the {len(self._past)} memories it was given"
            before = channels_last(self._past[read])
        return before if frames.shape[0] == batch else torch.cat((before, frames[:-batch]))

    def updated(self) -> Tensors:
        """Return what the next call reads, once all layers have run."""
        given = None if self._past is None else len(self._past)
        assert given in (None, len(self._updated)), f"TAEHV has {len(self._updated)} memories, but was given {given}"
        return tuple(self._updated)


class Squeeze(nn.Module):
    """Latents into ±3, smoothly."""

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the same shape."""
        return torch.tanh(frames / LATENT_LIMIT) * LATENT_LIMIT


class MemoryBlock(nn.Module):
    """Three convolutions over a frame and the one before it, around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv3x3(2 * width, width), nn.ReLU(), conv3x3(width, width), nn.ReLU(), conv3x3(width, width)
        )

    def forward(self, frames: torch.Tensor, memory: FrameMemory) -> torch.Tensor:
        """Return [T·B, C, H, W] for the same."""
        y: torch.Tensor = self.conv(torch.cat((frames, memory.previous(frames)), dim=1))
        return F.relu(y + frames)


class Grow(nn.Module):
    """Double height and width, and the frame rate if `in_time`."""

    def __init__(self, width: int, *, in_time: bool) -> None:
        super().__init__()
        self.rate = 2 if in_time else 1
        self.conv = nn.Conv2d(width, self.rate * width, 1, bias=False)

    def forward(self, frames: torch.Tensor, batch: int, dropped: int = 0) -> torch.Tensor:
        """Return [T'·B, C, 2H, 2W] for `frames` [T·B, C, H, W], without the first `dropped` of the new frames."""
        # The convolution looks at one position alone: before the upsampling it is the same at a quarter of the work.
        y: torch.Tensor = self.conv(frames)
        if self.rate > 1:  # the earlier frame's channels, then the later frame's
            y = torch.unflatten(torch.unflatten(y, 1, (self.rate, -1)), 0, (-1, batch)).transpose(1, 2).flatten(0, 2)
            y = channels_last(y)
        if dropped:
            y = y[dropped * batch :]
        return F.interpolate(y, scale_factor=2.0, mode="nearest")


class TAEHV(nn.Module):
    """All parameters of the decoder under their released names, in which a number counts every layer."""

    def __init__(self, spec: TAEHVSpec) -> None:
        super().__init__()
        self.spec = spec
        layers: list[nn.Module] = [Squeeze(), conv3x3(spec.latent_channels, spec.widths[0]), nn.ReLU()]
        for stage, in_time in enumerate(spec.temporal_upsample):
            width, next_width = spec.widths[stage : stage + 2]
            layers += [MemoryBlock(width) for _ in range(STAGE_BLOCKS)]
            # Number 6, 12 and 18 are the upsampling, which `Grow` does.
            layers += [nn.Identity(), Grow(width, in_time=in_time), conv3x3(width, next_width, bias=False)]
        layers += [nn.ReLU(), conv3x3(spec.widths[-1], RGB_CHANNELS)]
        self.decoder = nn.ModuleList(layers)


class _DecoderNetwork(nn.Module):
    """The decoder, with the latents' statistics where it takes latents that are not normalised.

    Args:
        taehv: The parameters.
        latent_scale: None for the released taew2_1, which takes what the model makes; lighttaew2_1 was trained on the
            latents of the Wan VAE as they are.
    """

    def __init__(self, taehv: TAEHV, latent_scale: LatentScale | None) -> None:
        super().__init__()
        self.latent_scale = latent_scale
        self.decoder = taehv.decoder
        self.last_grow = max(index for index, layer in enumerate(self.decoder) if isinstance(layer, Grow))

    def decode(self, latent_chunk: torch.Tensor, past: Sequence[torch.Tensor] | None) -> Tensors:
        """Return pixels [B, T, 3, H, W] and the collected memories."""
        batch = latent_chunk.shape[0]
        memory = FrameMemory(past, batch)
        z = latent_chunk if self.latent_scale is None else self.latent_scale.denormalise(latent_chunk)
        frames = channels_last(z.transpose(0, 1).flatten(0, 1))
        # The clip's first latent frame stands for one frame of pixels: the last one of the four it gives.
        dropped = FRAMES_PER_LATENT - 1 if memory.clip_starts else 0
        for index, layer in enumerate(self.decoder):
            if isinstance(layer, MemoryBlock):
                frames = layer(frames, memory)
            elif isinstance(layer, Grow):
                frames = layer(frames, batch, dropped if index == self.last_grow else 0)
            else:
                frames = layer(frames)
        pixels = frames * 2 - 1  # [0, 1] to [−1, 1]
        return torch.unflatten(pixels, 0, (-1, batch)).transpose(0, 1), *memory.updated()


class TAEHVDecoderFirst(_DecoderNetwork):
    """Decode the first chunk of a clip."""

    def forward(self, latent_chunk: torch.Tensor) -> Tensors:
        """Decode a chunk that starts a clip.

        Args:
            latent_chunk: [B, F, C, h, w], normalised; any F ≥ 1.

        Returns:
            Pixels [B, 1 + 4(F − 1), 3, 8h, 8w], not clamped, about [-1, 1]; then memories as in `memory_shapes`.
        """
        return self.decode(latent_chunk, None)


class TAEHVDecoder(_DecoderNetwork):
    """Decode any later chunk of a clip."""

    def forward(self, latent_chunk: torch.Tensor, *past: torch.Tensor) -> Tensors:
        """Decode a chunk that continues a clip.

        Args:
            latent_chunk: [B, F, C, h, w], normalised; any F ≥ 1.
            *past: What the previous chunk's decoding returned after the pixels; unchanged.

        Returns:
            Pixels [B, 4F, 3, 8h, 8w], not clamped, about [-1, 1]; then the new memories.
        """
        return self.decode(latent_chunk, past)


def channels_last(frames: torch.Tensor) -> torch.Tensor:
    """Return the same with channels innermost in memory, as a GPU's convolutions want them.

    What came in, or was split from channels into time, is not so laid out, and one such operand of a concatenation
    would bring all that follows back to the other layout.
    """
    return frames.contiguous(memory_format=torch.channels_last)


def conv3x3(in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Conv2d:
    """Return a convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
