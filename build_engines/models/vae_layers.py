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

CONV_PAST_FRAMES = 2
"""Frames that a causal convolution of three frames looks back."""


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

    def prepend(self, x: torch.Tensor, frames: int = CONV_PAST_FRAMES) -> torch.Tensor:
        """Put the past before new frames, and collect the past of the next call.

        Args:
            x: [B, C, T, H, W].
            frames: Frames of past.

        Returns:
            [B, C, frames + T, H, W].
        """
        if self._past is None:
            extended = F.pad(x, (0, 0, 0, 0, frames, 0))
        else:
            read = len(self._updated)
            assert read < len(self._past), f"the VAE has more than the {len(self._past)} caches it was given"
            extended = torch.cat((self._past[read], x), dim=2)
        self.collect(extended[:, :, -frames:])
        return extended

    def collect(self, cache: torch.Tensor) -> None:
        """Append a cache for the next call; a copy, because a view would keep all frames of the call alive."""
        self._updated.append(cache.clone())

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
        self.scale = channels**0.5
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * trailing_axes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise axis 1 of `x` [B, C, …], any floating dtype."""
        # The sum of squares would overflow in fp16. `dtype=` accumulates in fp32 without an fp32 copy of x.
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        # Upstream's 1e-12 is 0 in fp16, where a zero vector would then become NaN.
        smallest = max(1e-12, torch.finfo(x.dtype).tiny)
        y: torch.Tensor = x / length.clamp_min(smallest).to(x.dtype) * (self.gamma * self.scale)
        return y


def norm_conv(x: torch.Tensor, caches: ConvCaches, *, norm: nn.Module, conv: nn.Module) -> torch.Tensor:
    """Apply norm, SiLU and a causal convolution, which has one cache."""
    y: torch.Tensor = conv(caches.prepend(F.silu(norm(x))))
    return y


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
        y = norm_conv(y, caches, norm=layers["3"], conv=layers["6"])
        shortcut: torch.Tensor = self.shortcut(x)
        return y + shortcut


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
        # [B·T, C, h·w] each. Spelled out: torch's fused function becomes ONNX `Attention`, which TensorRT refuses to
        # build where it has no fused kernel (fp32 at any size; ours would need one for a head dim of 384).
        q, k, v = self.to_qkv(self.norm(frames)).flatten(2).chunk(3, dim=1)
        weights = torch.softmax((q * self.scale).transpose(1, 2) @ k, dim=-1)
        attended = (v @ weights.transpose(1, 2)).reshape(frames.shape)
        projected: torch.Tensor = self.proj(attended)
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
        frames = self.resample["1"](F.interpolate(frames, scale_factor=2.0, mode="nearest"))
        return unfold_frames(frames, x.shape[0])

    @staticmethod
    def _double_rate(x: torch.Tensor, time_conv: nn.Module, caches: ConvCaches) -> torch.Tensor:
        """Turn [B, C, T, H, W] into folded frames [B·T', C, H, W]."""
        B, C, _, H, W = x.shape
        # The clip's first frame stays single, and is no past of the second one either: that one sees zeros.
        single, doubled = (x[:, :, :1], x[:, :, 1:]) if caches.clip_starts else (None, x)
        if doubled.shape[2] == 0:
            caches.collect(x.new_zeros(B, C, CONV_PAST_FRAMES, H, W))
            return fold_frames(x)
        # The convolution gives the earlier frame's channels, then the later frame's.
        pairs = time_conv(caches.prepend(doubled)).unflatten(1, (2, C))
        frames: torch.Tensor = pairs.permute(0, 3, 1, 2, 4, 5).flatten(1, 2)
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
            caches.collect(y)
            return y
        halved: torch.Tensor = self.time_conv(caches.prepend(y, frames=1))
        return halved
