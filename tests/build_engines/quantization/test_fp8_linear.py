"""Numbers in e4m3: scales that cover, saturation, weights a channel at a time, and the layer that is made of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from causal_forcing.build_engines.quantization.fp8_linear import QuantizedLinear, fake_quantize, power_of_two_scale
from causal_forcing.plugins.fp8_ops import E4M3_MAX, quantize_e4m3


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 32)


def test_scale_of_any_peak_is_the_smallest_power_of_two_that_covers_it() -> None:
    peaks = torch.cat([torch.tensor([448.0, 448.1, 1e-6, 7.0, 3.5, 896.0]), torch.rand(1000) * 1e3])
    scales = power_of_two_scale(peaks)
    assert torch.equal(torch.exp2(scales.log2().round()), scales)
    assert (peaks / scales <= E4M3_MAX).all()
    assert (peaks / (scales / 2) > E4M3_MAX).all()
    assert power_of_two_scale(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_quantize_beyond_the_range_saturates_and_makes_no_nan() -> None:
    values = torch.tensor([449.0, 465.0, 1e30, float("inf"), -500.0, -float("inf"), 0.1])
    quantised = quantize_e4m3(values, torch.tensor(1.0)).float()
    assert quantised[:6].tolist() == [448.0, 448.0, 448.0, 448.0, -448.0, -448.0]
    assert quantised.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_quantize_twice_changes_nothing_more(dtype: torch.dtype) -> None:
    x = torch.randn(1000).clamp(-3.5, 3.5).to(dtype)
    once = fake_quantize(x, torch.tensor(2.0**-7, dtype=dtype))
    assert torch.equal(fake_quantize(once, torch.tensor(2.0**-7, dtype=dtype)), once)
    assert ((once - x).abs() <= x.abs() / 16 + 2.0**-17).all()


def test_layer_with_channels_of_different_size_quantises_each_by_its_own_scale(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight[0] *= 1e-7  # under one scale for all, it would be lost
    quantised = QuantizedLinear(linear, 2.0**-6)
    weight = (quantised.weight.float() * quantised.weight_scale).t()
    assert quantised.weight.dtype == torch.float8_e4m3fn
    assert tuple(quantised.weight_scale.shape) == (32,)
    assert ((weight - linear.weight).abs() <= linear.weight.abs() / 16 + quantised.weight_scale[:, None] / 512).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_computes_the_product_of_what_was_rounded(linear: nn.Linear, dtype: torch.dtype) -> None:
    linear = linear.to(dtype)
    x = torch.randn(7, 48).to(dtype)
    quantised = QuantizedLinear(linear, 2.0**-6)
    weight = fake_quantize(linear.weight, power_of_two_scale(linear.weight.abs().amax(dim=1, keepdim=True)))
    want = fake_quantize(x, torch.tensor(2.0**-6, dtype=dtype)) @ weight.t() + linear.bias
    got = quantised(x)
    assert got.dtype == dtype
    assert torch.equal(got, want)


def test_layer_on_the_meta_device_has_the_size_of_its_codes() -> None:
    with torch.device("meta"):
        quantised = QuantizedLinear(nn.Linear(64, 32), 1.0)
    assert sum(weight.nbytes for weight in quantised.parameters()) == 64 * 32 + 32 * 4
