"""Fused ops of the Wan VAE: what lies around its convolutions runs with them, channels last.

Tensors are [B, C, T, H, W]. A past is [B, C, 2, H, W], what the convolution read last of the call before; None stands
for zeros. The kernels (`kernels/vae_launch.py`) are for bf16 on Hopper; they give results in channels-last memory, and
take other memory only by copying.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from causal_forcing.plugins.fused_op import fused_op, kernel_of

CONV_PAST_FRAMES = 2
"""Frames that a causal convolution of three frames looks back."""

TensorPair = tuple[torch.Tensor, torch.Tensor]


def channel_norm(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Scale every position's channel vector to length √C, then by `gamma`.

    Args:
        x: [B, C, …], any floating dtype.
        gamma: [C, 1, …].

    Returns:
        As `x`.
    """
    # The sum of squares would overflow in fp16. `dtype=` accumulates in fp32 without an fp32 copy of x.
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    # Upstream's 1e-12 is 0 in fp16, where a zero vector would then become NaN.
    smallest = max(1e-12, torch.finfo(x.dtype).tiny)
    y: torch.Tensor = x / length.clamp_min(smallest).to(x.dtype) * (gamma * x.shape[1] ** 0.5)
    return y


def prepend(past: torch.Tensor | None, x: torch.Tensor, frames: int = CONV_PAST_FRAMES) -> TensorPair:
    """Put the past before new frames.

    Args:
        past: [B, C, frames, H, W] or None.
        x: [B, C, T, H, W].
        frames: Frames of past.

    Returns:
        [B, C, frames + T, H, W] and its last `frames` frames, the next past; a copy, because a view would keep all
        frames alive.
    """
    extended = F.pad(x, (0, 0, 0, 0, frames, 0)) if past is None else torch.cat((past, x), dim=2)
    return extended, extended[:, :, -frames:].clone()


@fused_op(kernel=kernel_of("vae_launch", "norm_conv"))
def vae_norm_conv(
    x: torch.Tensor,
    past: torch.Tensor | None,
    gamma: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
) -> TensorPair:
    """Apply norm, SiLU and a causal 3×3×3 convolution, then add what a shortcut gave.

    Args:
        x: [B, C, T, H, W].
        past: [B, C, 2, H, W], after SiLU, or None.
        gamma: [C, 1, 1, 1].
        weight: [O, C, 3, 3, 3].
        bias: [O].
        residual: [B, O, T, H, W] or None.

    Returns:
        [B, O, T, H, W] and the next past.
    """
    extended, next_past = prepend(past, F.silu(channel_norm(x, gamma)))
    y = F.conv3d(extended, weight, bias, padding=(0, 1, 1))
    return y if residual is None else y + residual, next_past


@fused_op(kernel=kernel_of("vae_launch", "norm_conv_in_place"), mutates=("past",))
def vae_norm_conv_in_place(
    x: torch.Tensor,
    past: torch.Tensor,
    gamma: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Do as `vae_norm_conv`, with the next past in the place of the past."""
    y, next_past = vae_norm_conv(x, past, gamma, weight, bias, residual)
    past.copy_(next_past)
    return y


@fused_op(kernel=kernel_of("vae_launch", "double_rate"))
def vae_double_rate(x: torch.Tensor, past: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor) -> TensorPair:
    """Make two frames of each by a causal convolution over three.

    Args:
        x: [B, C, T, H, W].
        past: [B, C, 2, H, W] or None.
        weight: [2C, C, 3, 1, 1]: the earlier frame's channels, then the later frame's.
        bias: [2C].

    Returns:
        [B, 2T, C, H, W] and the next past.
    """
    extended, next_past = prepend(past, x)
    pairs = F.conv3d(extended, weight, bias).reshape(x.shape[0], 2, *x.shape[1:])
    return pairs.permute(0, 3, 1, 2, 4, 5).flatten(1, 2), next_past


@fused_op(kernel=kernel_of("vae_launch", "double_rate_in_place"), mutates=("past",))
def vae_double_rate_in_place(
    x: torch.Tensor, past: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Do as `vae_double_rate`, with the next past in the place of the past."""
    frames, next_past = vae_double_rate(x, past, weight, bias)
    past.copy_(next_past)
    return frames


@fused_op(kernel=kernel_of("vae_launch", "upsample_conv"))
def vae_upsample_conv(frames: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Double height and width by repeating pixels, then convolve 3×3.

    Args:
        frames: [N, C, H, W].
        weight: [O, C, 3, 3].
        bias: [O].

    Returns:
        [N, O, 2H, 2W].
    """
    return F.conv2d(F.interpolate(frames, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


@fused_op(kernel=kernel_of("vae_launch", "pointwise"))
def vae_pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Multiply every position's channels.

    Args:
        x: [B, C, T, H, W] or [N, C, H, W].
        weight: [O, C, 1, 1, 1] or [O, C, 1, 1].
        bias: [O].

    Returns:
        As `x`, with O channels.
    """
    return F.conv3d(x, weight, bias) if x.dim() == 5 else F.conv2d(x, weight, bias)


@fused_op(kernel=kernel_of("vae_launch", "frame_attention"))
def vae_frame_attention(qkv: torch.Tensor, scale: float) -> torch.Tensor:
    """Attend each position of a frame to all of it, one head.

    Args:
        qkv: [N, 3C, H, W].
        scale: Factor on q·k.

    Returns:
        [N, C, H, W].
    """
    # [N, C, h·w] each. Spelled out: torch's fused function becomes ONNX `Attention`, which TensorRT refuses to build
    # where it has no fused kernel (fp32 at any size; ours would need one for a head dim of 384).
    q, k, v = qkv.flatten(2).chunk(3, dim=1)
    weights = torch.softmax((q * scale).transpose(1, 2) @ k, dim=-1)
    return (v @ weights.transpose(1, 2)).reshape(qkv.shape[0], -1, *qkv.shape[2:])
