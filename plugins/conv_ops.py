"""Fused ops around two-dimensional convolutions: cuDNN adds and clips where it writes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from causal_forcing.plugins.fused_op import fused_op

_ONE = (1, 1)


def _launch_conv_relu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor | None:
    if x.dtype not in (torch.bfloat16, torch.float16):
        return None
    if bias is None:
        bias = x.new_zeros(weight.shape[0])
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, _ONE, _ONE, _ONE, 1)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, _ONE, _ONE, _ONE, 1)


@fused_op(kernel=_launch_conv_relu)
def conv_relu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """Return the ReLU of a 3×3 convolution that keeps height and width, plus a residual.

    Args:
        x: [T, in, H, W].
        weight: [out, in, 3, 3].
        bias: [out], or None.
        residual: [T, out, H, W], or None.

    Returns:
        [T, out, H, W].
    """
    y = F.conv2d(x, weight, bias, padding=1)
    return F.relu(y if residual is None else y + residual)
