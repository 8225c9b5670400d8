"""Layers of the streaming Wan VAE: causal in time, with every convolution's past as an explicit cache.

Inside the VAE tensors are [B, C, T, H, W]. Upstream runs one latent frame a call and keeps the past of its convolutions
in a list that it edits in place; here the past comes in and goes out as tensors, and a call may cover any number of
frames: a causal convolution over [cached past, new frames] is the same sum either way.

Parameter names are upstream's, where a number counts layers without parameters too; hence the `ModuleDict`s.

Source of the maths: thu-ml/Causal-Forcing@1fc7bbc wan/modules/vae.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from causal_forcing.plugins.fused_op import keeps_fused_ops
from causal_forcing.plugins.vae_ops import (
    CONV_PAST_FRAMES,
    channel_norm,
    prepend,
    vae_double_rate,
    vae_double_rate_in_place,
    vae_frame_attention,
    vae_norm_conv,
    vae_norm_conv_in_place,
    vae_pointwise,
    vae_upsample_conv,
)

__all__ = [
    "CONV_PAST_FRAMES",
    "ConvCaches",
    "Downsample",
    "Head",
    "Middle",
    "ResidualBlock",
    "Upsample",
    "causal_conv3d",
]


class ConvCaches:
    """The convolution caches of one call, read and collected in the order in which the layers run.

    Args:
        past: The caches that the clip's previous call collected, or None where the clip starts: no past is read then,
            zeros stand for it.
    """

    def __init__(self, past: Sequence[torch.Tensor] | None) -> None:
        self._past = past
        self._updated: list[torch.Tensor] = []

    @property
    def clip_starts(self) -> bool:
        """Whether this call holds the clip's first frame."""
        return self._past is None

    def next_past(self) -> torch.Tensor | None:
        """Return the past of the convolution whose turn it is, or None for zeros."""
        if self._past is None:
            return None
        read = len(self._updated)
        assert read < len(self._past), f"the VAE has more than the {len(self._past)} caches it was given"
        return self._past[read]

    def prepend(self, x: torch.Tensor, frames: int = CONV_PAST_FRAMES) -> torch.Tensor:
        """Put the past before new frames, and collect the past of the next call.

        Args:
            x: [B, C, T, H, W].
            frames: Frames of past.

        Returns:
            [B, C, frames + T, H, W].
        """
        extended, cache = prepend(self.next_past(), x, frames)
        self.collect(cache)
        return extended

    def collect(self, cache: torch.Tensor) -> None:
        """Append a cache for the next call, which must be no view: it would keep all frames of the call alive."""
        self._updated.append(cache)

    def updated(self) -> tuple[torch.Tensor, ...]:
        """Return the caches of the next call, once all layers have run."""
        given = None if self._past is None else len(self._past)
        assert given in (None, len(self._updated)), f"the VAE has {len(self._updated)} caches, but was given {given}"
        return tuple(self._updated)


def causal_conv3d(in_channels: int, out_channels: int) -> nn.Conv3d:
    """Return a 3×3×3 convolution that pads space only: `ConvCaches.prepend` supplies the two frames of past."""
    return nn.Conv3d(in_channels, out_channels, 3, padding=(0, 1, 1))


def fold_frames(x: torch.Tensor) -> torch.Tensor:
    """Turn [B, C, T, H, W] into [B·T, C, H, W]; no copy if B is 1 and the memory is channels-last."""
    return x.transpose(1, 2).flatten(0, 1)


def unfold_frames(frames: torch.Tensor, batch: int) -> torch.Tensor:
    """Turn [B·T, C, H, W] into a view [B, C, T, H, W]."""
    return frames.reshape(batch, -1, *frames.shape[1:]).transpose(1, 2)


class ChannelNorm(nn.Module):
    """Scale every position's channel vector to length √C, then by `gamma`.

    Args:
        channels: C.
        trailing_axes: Axes after the channels; they appear in the parameter's shape.
    """

    def __init__(self, channels: int, trailing_axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * trailing_axes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise axis 1 of `x` [B, C, …], any floating dtype."""
        return channel_norm(x, self.gamma)


def norm_conv(
    x: torch.Tensor, caches: ConvCaches, *, norm: nn.Module, conv: nn.Module, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Apply norm, SiLU and a causal convolution, which has one cache, and add what a shortcut gave."""
    past = caches.next_past()
    assert isinstance(norm, ChannelNorm), "a norm of channels comes before a convolution"
    weight, bias = parameters_of(conv)
    if past is not None and keeps_fused_ops():
        y = vae_norm_conv_in_place(x, past, norm.gamma, weight, bias, residual)
    else:
        y, past = vae_norm_conv(x, past, norm.gamma, weight, bias, residual)
    caches.collect(past)
    return y


def parameters_of(conv: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias of a convolution, for an op that carries it out."""
    weight, bias = conv.weight, conv.bias
    assert isinstance(weight, torch.Tensor), "a convolution has a weight"
    assert isinstance(bias, torch.Tensor), "all convolutions of the VAE have a bias"
    return weight, bias


class ResidualBlock(nn.Module):
    """Two times norm, SiLU, causal convolution, around a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(in_channels),
                "2": causal_conv3d(in_channels, out_channels),
                "3": ChannelNorm(out_channels),
                "6": causal_conv3d(out_channels, out_channels),
            }
        )
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x: torch.Tensor, caches: ConvCaches) -> torch.Tensor:
        """Return [B, out, T, H, W] for `x` [B, in, T, H, W]. Two caches."""
        layers = self.residual
        y = norm_conv(x, caches, norm=layers["0"], conv=layers["2"])
        shortcut = x if isinstance(self.shortcut, nn.Identity) else vae_pointwise(x, *parameters_of(self.shortcut))
        return norm_conv(y, caches, norm=layers["3"], conv=layers["6"], residual=shortcut)


class FrameAttention(nn.Module):
    """Single-head self-attention over the positions of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = channels**-0.5
        self.norm = ChannelNorm(channels, trailing_axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, C, T, h, w] for the same. No cache: frames do not see each other."""
        frames = fold_frames(x)
        qkv = vae_pointwise(self.norm(frames), *parameters_of(self.to_qkv))
        projected = vae_pointwise(vae_frame_attention(qkv, self.scale), *parameters_of(self.proj))
        return x + unfold_frames(projected, x.shape[0])


class Middle(nn.ModuleList):
    """The coarsest stage of both halves: residual block, attention, residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            [ResidualBlock(channels, channels), FrameAttention(channels), ResidualBlock(channels, channels)]
        )

    def forward(self, x: torch.Tensor, caches: ConvCaches) -> torch.Tensor:
        """Return [B, C, T, h, w] for the same. Four caches."""
        before, attention, after = self
        y: torch.Tensor = after(attention(before(x, caches)), caches)
        return y


class Head(nn.ModuleDict):
    """The last layers of both halves: norm, SiLU, causal convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__({"0": ChannelNorm(in_channels), "2": causal_conv3d(in_channels, out_channels)})

    def forward(self, x: torch.Tensor, caches: ConvCaches) -> torch.Tensor:
        """Return [B, out, T, H, W] for `x` [B, in, T, H, W]. One cache."""
        return norm_conv(x, caches, norm=self["0"], conv=self["2"])


class Upsample(nn.Module):
    """Double the frame rate if `in_time`, double height and width, halve the channels."""

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels // 2, 3, padding=1)})
        self.time_conv = nn.Conv3d(channels, 2 * channels, (3, 1, 1)) if in_time else None

    def forward(self, x: torch.Tensor, caches: ConvCaches) -> torch.Tensor:
        """Return [B, C/2, T', 2H, 2W] for `x` [B, C, T, H, W]. One cache if `in_time`.

        T' is T, or 2T in time, or 1 + 2(T − 1) in time where the clip starts.
        """
        frames = fold_frames(x) if self.time_conv is None else self._double_rate(x, self.time_conv, caches)
        # Upstream goes through fp32 here; copying values gives the same without.
        return unfold_frames(vae_upsample_conv(frames, *parameters_of(self.resample["1"])), x.shape[0])

    @staticmethod
    def _double_rate(x: torch.Tensor, time_conv: nn.Module, caches: ConvCaches) -> torch.Tensor:
        """Turn [B, C, T, H, W] into folded frames [B·T', C, H, W]."""
        B, C, _, H, W = x.shape
        # The clip's first frame stays single, and is no past of the second one either: that one sees zeros.
        single, doubled = (x[:, :, :1], x[:, :, 1:]) if caches.clip_starts else (None, x)
        if doubled.shape[2] == 0:
            caches.collect(x.new_zeros(B, C, CONV_PAST_FRAMES, H, W))
            return fold_frames(x)
        past = caches.next_past()
        weight, bias = parameters_of(time_conv)
        if past is not None and keeps_fused_ops():
            frames = vae_double_rate_in_place(doubled, past, weight, bias)
        else:
            frames, past = vae_double_rate(doubled, past, weight, bias)
        caches.collect(past)
        if single is not None:
            frames = torch.cat((single.transpose(1, 2), frames), dim=1)
        return frames.flatten(0, 1)


class Downsample(nn.Module):
    """Halve height and width, then the frame rate if `in_time`."""

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def forward(self, x: torch.Tensor, caches: ConvCaches) -> torch.Tensor:
        """Return [B, C, T', H/2, W/2] for `x` [B, C, T, H, W]. One cache, of one frame, if `in_time`.

        T' is T, or T/2 in time; the clip's first frame, which comes alone, stays.
        """
        frames = self.resample["1"](F.pad(fold_frames(x), (0, 1, 0, 1)))
        y = unfold_frames(frames, x.shape[0])
        if self.time_conv is None:
            return y
        if caches.clip_starts:
            caches.collect(y.clone())
            return y
        halved: torch.Tensor = self.time_conv(caches.prepend(y, frames=1))
        return halved
