"""Convolutions with what follows them: the body on a CPU, cuDNN's form of it on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from causal_forcing.plugins.conv_ops import conv_relu
from causal_forcing.plugins.fused_op import keep_fused_ops


def inputs(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 6, 10), (16, 8, 3, 3), (16,), (2, 16, 6, 10))
    x, weight, bias, residual = (torch.randn(shape, generator=generator) for shape in shapes)
    tensors = (tensor.to(device, dtype) for tensor in (x, weight / 8, bias, residual))
    return [tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor for tensor in tensors]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
def test_conv_relu_kept_whole_is_its_body_on_a_cpu(has_bias: bool, has_residual: bool) -> None:
    x, weight, bias, residual = inputs()
    arguments = (x, weight, bias if has_bias else None, residual if has_residual else None)
    expected = F.conv2d(x, weight, bias if has_bias else None, padding=1)
    expected = F.relu(expected + residual if has_residual else expected)
    with keep_fused_ops():
        torch.testing.assert_close(conv_relu(*arguments), expected)
    torch.testing.assert_close(conv_relu(*arguments), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
def test_conv_relu_on_a_gpu_is_its_body(dtype: torch.dtype, has_bias: bool, has_residual: bool) -> None:
    x, weight, bias, residual = inputs("cuda", dtype)
    arguments = (x, weight, bias if has_bias else None, residual if has_residual else None)
    expected = conv_relu(*(None if tensor is None else tensor.float() for tensor in arguments))  # type: ignore[arg-type]
    with keep_fused_ops():
        got = conv_relu(*arguments)
    assert got.is_contiguous(memory_format=torch.channels_last)
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 3e-3}[dtype]
    torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=tolerance)
