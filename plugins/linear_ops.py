"""Fused ops around linear layers: what a matrix product takes in and gives out."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from causal_forcing.plugins.fused_op import fused_op


def _launch_linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    # cuBLASLt applies bias and GELU, its tanh form, where it writes the product.
    rows = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return rows.view(*x.shape[:-1], weight.shape[0])


@fused_op(kernel=_launch_linear_gelu)
def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return the GELU, in its tanh form, of a linear layer of `x` [..., in]; weight [out, in], bias [out]."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")
