"""The VAE's convolution weights in the order in which `vae_conv.cu` reads them. Plain torch."""

from __future__ import annotations

import torch

COLUMNS = 96
"""Output channels of a tile; channels come in multiples of it."""
HEAD_COLUMNS = 8
"""Output channels of the head's tile, at most."""


def column_channels(columns: int = COLUMNS) -> torch.Tensor:
    """Return the channel that each column of a tile computes.

    The tensor cores leave columns 8j + 2q and 8j + 2q + 1 of a row in one thread, for every j. With this order a thread
    has whole runs of 8 channels, which it stores at once.
    """
    column = torch.arange(columns)
    j, q, element = column // 8, column % 8 // 2, column % 2
    return 32 * (j // 4) + 8 * q + 2 * (j % 4) + element


def temporal_kernels(weight: torch.Tensor) -> torch.Tensor:
    """Return the kernels of m1, m2, m0 and m3 (`vae_conv.cu`) for a weight [O, C, 3, …]: [4, O, C, …], fp32."""
    first, middle, last = weight.float().unbind(2)
    sides, middle = (first + last) / 2, middle / 2
    return torch.stack((sides + middle, sides - middle, first, last))


def pack_conv_weight(weight: torch.Tensor) -> torch.Tensor:
    """Pack the weight [O, C, 3, 3, 3] of a causal convolution.

    Returns:
        [O/96, 2, 3, C/16, 2, 3, 2, 96, 8], of the same type: column tile, step, row of taps, 16 channels, plane, tap,
        8 channels, column, channel.
    """
    packed = _pack_kernels(weight, COLUMNS)
    return packed[..., column_channels().to(weight.device), :].to(weight.dtype).contiguous()


def pack_head_weight(weight: torch.Tensor) -> torch.Tensor:
    """Pack the weight [O, C, 3, 3, 3], O ≤ 8, as `pack_conv_weight` does, with 8 columns for 96."""
    missing = HEAD_COLUMNS - weight.shape[0]
    padded = torch.cat((weight, weight.new_zeros(missing, *weight.shape[1:])))
    return _pack_kernels(padded, HEAD_COLUMNS).to(weight.dtype).contiguous()


def _pack_kernels(weight: torch.Tensor, columns: int) -> torch.Tensor:
    tiles, chunks = weight.shape[0] // columns, weight.shape[1] // 16
    kernels = temporal_kernels(weight).reshape(2, 2, tiles, columns, chunks, 2, 8, 3, 3)
    # From step, plane, tile, column, chunk, half of chunk, channel, dy, dx.
    return kernels.permute(2, 0, 7, 4, 1, 8, 5, 3, 6)


def quarter_kernels(weight: torch.Tensor) -> torch.Tensor:
    """Return the four 2×2 kernels that make the output's quarters out of the small image.

    Args:
        weight: [O, C, 3, 3], for the image with every pixel repeated.

    Returns:
        [2, 2, O, C, 2, 2] fp32: output row and column modulo 2, then the kernels. Tap 0 of output row 0 is the pixel
        above, tap 1 the pixel itself; of output row 1 the pixel itself and the one below; likewise for columns.
    """
    # [output modulo 2, tap, tap of the large image]
    sums = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=torch.float32, device=weight.device)
    return torch.einsum("pay,qbx,ocyx->pqocab", sums, sums, weight.float())


def pack_upsample_weight(weight: torch.Tensor) -> torch.Tensor:
    """Pack the weight [O, C, 3, 3] of a convolution of the doubled image.

    Returns:
        [O/96, 2, 2, C/32, 2, 2, 2, 2, 96, 8], of the same type: column tile, output row, row of taps, 32 channels,
        16 channels, output column, tap, 8 channels, column, channel.
    """
    outputs, channels = weight.shape[:2]
    kernels = quarter_kernels(weight).reshape(2, 2, outputs // COLUMNS, COLUMNS, channels // 32, 2, 2, 8, 2, 2)
    # From output row, output column, tile, column, chunk, part of chunk, half of part, channel, dy, dx.
    packed = kernels.permute(2, 0, 8, 4, 5, 1, 9, 6, 3, 7)
    return packed[..., column_channels().to(weight.device), :].to(weight.dtype).contiguous()
