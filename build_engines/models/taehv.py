"""TAEHV, the tiny streaming decoder, shaped for export: what it remembers is inputs and outputs, shapes are static.

One set of parameters (`TAEHV`, the released names) serves two exported networks, `TAEHVDecoderFirst` and
`TAEHVDecoder`, which stand in for those of the Wan VAE: the same latents in, the same pixels out. Every block
sees one frame of its past and carries that from chunk to chunk, so a clip decoded in chunks is the clip decoded whole.

Inside, tensors are frames [T·B, C, H, W] with time outermost: the frame before is B rows up, and no layer but the last
ones needs to know what is time and what is clip.

Source of the maths: madebyollin/taehv@1f14a56 taehv.py (TAEHV, decode_video). We differ in form only: a chunk is
decoded at once, upsampling follows the 1×1 convolution that it commutes with, and the last layers, most of whose time
went into copying what they upsampled, run before the last upsampling (`Finish`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from causal_forcing.build_engines.models.vae import LatentScale, Tensors
from causal_forcing.build_engines.models.vae_stages import RGB_CHANNELS, Shapes
from causal_forcing.plugins.conv_ops import conv_relu
from causal_forcing.runtime.geometry import FRAMES_PER_LATENT
from causal_forcing.runtime.model_spec import TAEHVSpec

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
    """The parameters of a block under their released names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv3x3(2 * width, width), nn.ReLU(), conv3x3(width, width), nn.ReLU(), conv3x3(width, width)
        )


class Block(nn.Module):
    """Three convolutions over a frame and the one before it, around a shortcut.

    The first convolution is two, of the frame and of the one before it: their channels are never brought together.

    Args:
        released: The parameters.
    """

    def __init__(self, released: MemoryBlock) -> None:
        super().__init__()
        first, _, self.second, _, self.third = released.conv
        assert isinstance(first, nn.Conv2d), f"a block begins with a convolution, not a {type(first).__name__}"
        now, before = first.weight.detach().chunk(2, dim=1)
        self.now = nn.Parameter(now.contiguous(), requires_grad=False)
        self.before = nn.Parameter(before.contiguous(), requires_grad=False)
        self.bias = first.bias

    def forward(self, frames: torch.Tensor, memory: FrameMemory) -> torch.Tensor:
        """Return [T·B, C, H, W] for the same."""
        before = F.conv2d(memory.previous(frames), self.before, padding=1)
        y = conv_relu(frames, self.now, self.bias, before)
        return apply_relu(self.third, apply_relu(self.second, y), frames)


class Grow(nn.Module):
    """Double height and width, and the frame rate if `in_time`."""

    def __init__(self, width: int, *, in_time: bool) -> None:
        super().__init__()
        self.rate = 2 if in_time else 1
        self.conv = nn.Conv2d(width, self.rate * width, 1, bias=False)

    def forward(self, frames: torch.Tensor, batch: int) -> torch.Tensor:
        """Return [T'·B, C, 2H, 2W] for `frames` [T·B, C, H, W]."""
        # The convolution looks at one position alone: before the upsampling it is the same at a quarter of the work.
        y: torch.Tensor = self.conv(frames)
        if self.rate > 1:  # the earlier frame's channels, then the later frame's
            y = torch.unflatten(torch.unflatten(y, 1, (self.rate, -1)), 0, (-1, batch)).transpose(1, 2).flatten(0, 2)
            y = channels_last(y)
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


class Finish(nn.Module):
    """The layers behind the last block, from its frames to pixels, at its resolution.

    Frame rate, height and width double here, with nothing but linear layers up to the ReLU behind them: they are one
    convolution for each of the two new frames, which gives the four pixels of a 2×2 square as channels. The last
    convolution reads and writes such squares too. Nothing of full resolution is made but the pixels.

    Args:
        grow: Doubles the frame rate.
        widen: The convolution behind it and the upsampling, without bias.
        head: The convolution behind the ReLU.
    """

    def __init__(self, grow: nn.Module, widen: nn.Module, head: nn.Module) -> None:
        super().__init__()
        assert isinstance(grow, Grow), f"TAEHV ends with a Grow, not a {type(grow).__name__}"
        assert isinstance(widen, nn.Conv2d), f"then has a convolution, not a {type(widen).__name__}"
        assert isinstance(head, nn.Conv2d), f"and ends in another, not a {type(head).__name__}"
        assert widen.bias is None, "what is merged has no bias"
        assert head.bias is not None, "the last convolution has a bias"
        dtype, squares = head.weight.dtype, _square_taps(head.weight.device)
        # [frame, out, in, ky, kx] at full resolution, and for each tap and pixel of a square the tap that reads it.
        merged = torch.einsum(
            "omyx,smc->socyx", widen.weight.float(), torch.unflatten(grow.conv.weight.float()[..., 0, 0], 0, (2, -1))
        )
        from_cells = squares.sum(2)
        cells = torch.einsum("eyk,dxl,sockl->sedocyx", from_cells, from_cells, merged).flatten(1, 3)
        pixels = (
            torch.einsum("eypk,dxql,ockl->oedpqcyx", squares, squares, head.weight.float()).flatten(3, 5).flatten(0, 2)
        )
        self.frames = nn.ParameterList([nn.Parameter(weight.to(dtype), requires_grad=False) for weight in cells])
        self.weight = nn.Parameter(pixels.to(dtype), requires_grad=False)
        self.bias = nn.Parameter(head.bias.repeat_interleave(4), requires_grad=False)

    def forward(self, frames: torch.Tensor, batch: int) -> torch.Tensor:
        """Return [2T·B, 3, 2H, 2W], about [0, 1], for `frames` [T·B, C, H, W]."""
        both = [
            torch.unflatten(
                F.conv2d(conv_relu(frames, weight, None, None), self.weight, self.bias, padding=1), 0, (-1, batch)
            )
            for weight in self.frames
        ]
        return F.pixel_shuffle(torch.stack(both, dim=1).flatten(0, 2), 2)


def _square_taps(device: torch.device) -> torch.Tensor:
    """Return [2, 3, 2, 3]: where a tap of a convolution along one axis lands once pixels are pairs in a cell.

    One at [pixel that is written, tap over cells, pixel of that cell, tap over pixels], else zero.
    """
    taps = torch.zeros(2, 3, 2, 3)
    for pixel in range(2):
        for tap in range(3):
            cell, read = divmod(pixel + tap - 1, 2)
            taps[pixel, cell + 1, read, tap] = 1.0
    return taps.to(device)


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
        self.squeeze, self.enter, _, *layers, _, grow, widen, _, head = taehv.decoder
        self.layers = nn.ModuleList(Block(layer) if isinstance(layer, MemoryBlock) else layer for layer in layers)
        self.finish = Finish(grow, widen, head)

    def decode(self, latent_chunk: torch.Tensor, past: Sequence[torch.Tensor] | None) -> Tensors:
        """Return pixels [B, T, 3, H, W] and the collected memories."""
        batch = latent_chunk.shape[0]
        memory = FrameMemory(past, batch)
        z = latent_chunk if self.latent_scale is None else self.latent_scale.denormalise(latent_chunk)
        frames = self.squeeze(channels_last(z.transpose(0, 1).flatten(0, 1)))
        frames = apply_relu(self.enter, frames)
        for layer in self.layers:
            if isinstance(layer, Block):
                frames = layer(frames, memory)
            elif isinstance(layer, Grow):
                frames = layer(frames, batch)
            else:
                frames = layer(frames)
        # The clip's first latent frame stands for one frame of pixels: the last one of the four it gives.
        pairs, odd = divmod(FRAMES_PER_LATENT - 1 if memory.clip_starts else 0, 2)
        pixels = self.finish(frames[pairs * batch :], batch)[odd * batch :] * 2 - 1  # [0, 1] to [−1, 1]
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


def apply_relu(conv: nn.Module, frames: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Return the ReLU of a convolution, plus a residual."""
    assert isinstance(conv, nn.Conv2d), f"TAEHV has a convolution there, not a {type(conv).__name__}"
    return conv_relu(frames, conv.weight, conv.bias, residual)


def conv3x3(in_channels: int, out_channels: int, *, bias: bool = True) -> nn.Conv2d:
    """Return a convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
