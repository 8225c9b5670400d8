"""Launch the VAE's kernels on torch's current device and stream; nothing synchronises, so a graph can capture it.

The first call compiles `vae_conv.cu` and packs the weight, later ones use what is there.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, overload

import torch
import torch.nn.functional as F

from causal_forcing.plugins.kernels.cuda_source import launch
from causal_forcing.plugins.kernels.vae_weights import (
    COLUMNS,
    HEAD_COLUMNS,
    pack_conv_weight,
    pack_head_weight,
    pack_upsample_weight,
)

TensorPair = tuple[torch.Tensor, torch.Tensor]

ROWS = 256
"""Positions of a tile."""
NORM_WIDTHS = (96, 192, 384, 768)
"""Channels that the norm's kernel takes."""
MAX_SOFTMAX_WIDTH = 8192
"""Most scores of a position."""

STAGE_MEMORY = {
    "Conv": 6 * (4 * 264 * 16 + 6 * COLUMNS * 32),
    "Head": 10 * (4 * 264 * 16 + 6 * HEAD_COLUMNS * 32),
    "Upsample": 5 * (4 * 264 * 16 + 8 * COLUMNS * 32),
}
"""Bytes of shared memory by `Shape` of the source: stages, each of four runs of positions and the weights of taps."""

_SOURCE = "vae_conv.cu"
_THREADS = 384
_NORM_THREADS = 256
_NORM_BYTES = 4 * 64 * (2 * COLUMNS + 16)
_CHANNELS_OF_THREAD = 24
_PLANE_POSITIONS, _PLANE_CHANNELS = 64, 32
_MAX_ELEMENTS = 2**31

_prepared: dict[tuple[int, Callable[[torch.Tensor], torch.Tensor]], tuple[weakref.ref[torch.Tensor], int, torch.Tensor]]
_prepared = {}


def norm_conv(
    x: torch.Tensor,
    past: torch.Tensor | None,
    gamma: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
) -> TensorPair | None:
    """Run `vae_norm_conv`; None for what the kernels do not take."""
    next_past = _empty(x, x.shape[1], 2, *x.shape[3:])
    y = _norm_conv(x, past, next_past, gamma, weight, bias, residual)
    return None if y is None else (y, next_past)


def norm_conv_in_place(
    x: torch.Tensor,
    past: torch.Tensor,
    gamma: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
) -> torch.Tensor | None:
    """Run `vae_norm_conv_in_place`; None for what the kernels do not take. Best on a past that is channels-last."""
    if _is_channels_last(past):
        return _norm_conv(x, past, past, gamma, weight, bias, residual)
    result = norm_conv(x, past, gamma, weight, bias, residual)
    if result is None:
        return None
    past.copy_(result[1])
    return result[0]


def _norm_conv(
    x: torch.Tensor,
    past: torch.Tensor | None,
    next_past: torch.Tensor,
    gamma: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
) -> torch.Tensor | None:
    """Run both kernels; `next_past` is written and may be `past`."""
    batch, channels, frames, height, width = x.shape
    outputs = weight.shape[0]
    is_head = outputs <= HEAD_COLUMNS and residual is None
    if (
        channels not in NORM_WIDTHS
        or not (is_head or outputs % COLUMNS == 0)
        or not _accepts(x, max(channels, outputs) * frames * height * width, past, gamma, weight, bias, residual)
    ):
        return None
    plane, pairs = plane_positions(height, width), -(-frames // 2)
    positions = _NORM_THREADS * _CHANNELS_OF_THREAD // channels
    x, past, residual = _channels_last(x), _channels_last(past), _channels_last(residual)
    planes = x.new_empty((pairs, 4, channels // 8, plane, 8))
    y = x.new_empty((batch, outputs, frames, height, width)) if is_head else _empty(x, outputs, frames, height, width)
    packed = prepared(weight, pack_head_weight if is_head else pack_conv_weight)
    tiles = -(-height * (width + 1) // ROWS) * max(1, outputs // COLUMNS) * pairs
    grid = (min(tiles, _multiprocessors(x.device)), 1, 1)
    for index in range(batch):
        launch(
            *(_SOURCE, "vae_norm", (-(-plane // positions), 1, 1), _NORM_THREADS, _NORM_BYTES),
            (x[index], _at(past, index), gamma, planes, next_past[index]),
            (frames, height, width, channels, plane),
        )
        sizes = (frames, height, width, channels, outputs, plane)
        if is_head:
            launch(_SOURCE, "vae_head", grid, _THREADS, STAGE_MEMORY["Head"], (planes, packed, bias, y[index]), sizes)
        else:
            tensors = (planes, packed, bias, _at(residual, index), y[index])
            launch(_SOURCE, "vae_conv", grid, _THREADS, STAGE_MEMORY["Conv"], tensors, sizes)
    return y


def upsample_conv(frames: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor | None:
    """Run `vae_upsample_conv`; None for what the kernels do not take."""
    count, channels, height, width = frames.shape
    outputs = weight.shape[0]
    elements = count * height * width * max(channels, 4 * outputs)
    if channels % _PLANE_CHANNELS or outputs % COLUMNS or not _accepts(frames, elements, weight, bias):
        return None
    plane = plane_positions(height, width)
    frames = frames.contiguous(memory_format=torch.channels_last)
    planes = frames.new_empty((count, channels // 8, plane, 8))
    y = torch.empty(
        (count, outputs, 2 * height, 2 * width),
        dtype=frames.dtype,
        device=frames.device,
        memory_format=torch.channels_last,
    )
    grid = (-(-plane // _PLANE_POSITIONS), channels // _PLANE_CHANNELS, count)
    launch(_SOURCE, "vae_planes", grid, _NORM_THREADS, 0, (frames, planes), (height, width, channels, plane))
    tiles = -(-height * (width + 1) // ROWS) * (outputs // COLUMNS) * 2 * count
    tensors = (planes, prepared(weight, pack_upsample_weight), bias, y)
    sizes = (count, height, width, channels, outputs, plane)
    grid = (min(tiles, _multiprocessors(frames.device)), 1, 1)
    launch(_SOURCE, "vae_upsample", grid, _THREADS, STAGE_MEMORY["Upsample"], tensors, sizes)
    return y


def double_rate(
    x: torch.Tensor, past: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor
) -> TensorPair | None:
    """Run `vae_double_rate` through cuDNN, channels last; None for several clips."""
    next_past = _empty(x, x.shape[1], 2, *x.shape[3:])
    frames = _double_rate(x, past, next_past, weight, bias)
    return None if frames is None else (frames, next_past)


def double_rate_in_place(
    x: torch.Tensor, past: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor | None:
    """Run `vae_double_rate_in_place`; None for several clips."""
    return _double_rate(x, past, past, weight, bias)


def _double_rate(
    x: torch.Tensor, past: torch.Tensor | None, next_past: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor | None:
    batch, channels, frames, height, width = x.shape
    if batch != 1 or not _accepts(x, 2 * frames * channels * height * width, past, weight, bias):
        return None
    extended = _empty(x, channels, 2 + frames, height, width)
    if past is None:
        extended[:, :, :2].zero_()
    else:
        extended[:, :, :2].copy_(past)
    extended[:, :, 2:].copy_(x)
    next_past.copy_(extended[:, :, -2:])
    pairs = F.conv3d(extended, prepared(weight, _channels_last_weight))
    # [T, H, W, 2C] becomes [T, 2, H, W, C] where the bias is added.
    split = pairs[0].permute(1, 2, 3, 0).view(frames, height, width, 2, channels).permute(0, 3, 1, 2, 4)
    apart = x.new_empty(split.shape)
    torch.add(split, bias.view(1, 2, 1, 1, channels), out=apart)
    return apart.flatten(0, 1).permute(0, 3, 1, 2)[None]


def pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor | None:
    """Run `vae_pointwise` as one matrix product; None for other types."""
    if not _accepts(x, x.numel(), weight, bias):
        return None
    y: torch.Tensor = F.linear(x.movedim(1, -1), weight.flatten(1), bias)
    return y.movedim(-1, 1)


def frame_attention(qkv: torch.Tensor, scale: float) -> torch.Tensor | None:
    """Run `vae_frame_attention`, a frame after the other; None for frames that the softmax does not take."""
    count, channels, height, width = qkv.shape
    positions = height * width
    if positions % 8 or positions > MAX_SOFTMAX_WIDTH or not _accepts(qkv, count * channels * positions):
        return None
    rows = qkv.permute(0, 2, 3, 1).reshape(count, positions, channels)
    y = rows.new_empty((count, positions, channels // 3))
    scores = rows.new_empty((positions, positions))
    for index in range(count):
        q, k, v = rows[index].chunk(3, dim=-1)
        torch.addmm(scores, q, k.T, beta=0.0, alpha=scale, out=scores)
        launch(_SOURCE, "vae_softmax", (positions, 1, 1), _NORM_THREADS, 0, (scores,), (positions,))
        torch.mm(scores, v, out=y[index])
    return y.view(count, height, width, -1).permute(0, 3, 1, 2)


def plane_positions(height: int, width: int) -> int:
    """Return the positions of a padded plane: a zero row and column before and after, and whole tiles."""
    pitch = width + 1
    used = -(-height * pitch // ROWS) * ROWS + 2 * pitch + 2
    return -(-used // 8) * 8


def prepared(weight: torch.Tensor, prepare: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return `prepare(weight)`, made once for as long as the weight lives unchanged."""
    key = (id(weight), prepare)
    known = _prepared.get(key)
    version = 0 if weight.is_inference() else weight._version
    if known is not None and known[0]() is weight and known[1] == version:
        return known[2]
    made = prepare(weight)
    forget = functools.partial(_forget, _prepared, key)
    _prepared[key] = (weakref.ref(weight, forget), version, made)
    return made


def _forget(prepared_weights: dict[Any, Any], key: Any, _: object) -> None:
    """Let go of what was made of a weight that is gone; takes the table along, which may go first at exit."""
    prepared_weights.pop(key, None)


def _accepts(x: torch.Tensor, elements: int, *others: torch.Tensor | None) -> bool:
    return (
        x.dtype == torch.bfloat16
        and all(other is None or other.dtype == x.dtype for other in others)
        and elements < _MAX_ELEMENTS
        and torch.cuda.get_device_capability(x.device)[0] == 9
    )


def _channels_last_weight(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous(memory_format=torch.channels_last_3d)


@overload
def _channels_last(x: torch.Tensor) -> torch.Tensor: ...
@overload
def _channels_last(x: torch.Tensor | None) -> torch.Tensor | None: ...
def _channels_last(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous(memory_format=torch.channels_last_3d)


def _empty(like: torch.Tensor, *sizes: int) -> torch.Tensor:
    return torch.empty(
        (like.shape[0], *sizes), dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d
    )


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last_3d)


def _at(tensor: torch.Tensor | None, index: int) -> torch.Tensor | None:
    return None if tensor is None else tensor[index]


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
