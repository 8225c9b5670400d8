"""Smoothing: exact by itself, and a help where one channel drowns the others."""

from __future__ import annotations

import torch
from torch import nn

from causal_forcing.build_engines.quantization.linear_choice import choose_linears, output_error
from causal_forcing.build_engines.quantization.observation import InputObservation
from causal_forcing.build_engines.quantization.recipe import InputScaling
from causal_forcing.build_engines.quantization.smoothing import smoothing_multiplier


def outlier_inputs() -> torch.Tensor:
    """[512, 64] inputs with one channel that is 2^18 times larger than the others."""
    inputs = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    inputs[:, 5] *= 2.0**18
    return inputs


def outlier_layer() -> nn.Linear:
    """A layer to which that channel means no more than the others do."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    with torch.no_grad():
        linear.weight[:, 5] /= 2.0**18
    return linear


def observe(inputs: torch.Tensor) -> InputObservation:
    observation = InputObservation(rows_a_pass=512)
    observation(nn.Identity(), (inputs,))
    return observation


def test_multiplier_of_any_peaks_leaves_the_product_as_it_was() -> None:
    inputs, linear = outlier_inputs(), outlier_layer()
    multiplier = smoothing_multiplier(inputs.abs().amax(dim=0), linear.weight.abs().amax(dim=0), 0.5)
    assert torch.equal(torch.exp2(multiplier.log2().round()), multiplier)
    assert not torch.equal(multiplier, torch.ones(64))
    assert torch.equal((inputs * multiplier) @ (linear.weight / multiplier).t(), inputs @ linear.weight.t())


def test_multiplier_of_a_channel_without_inputs_or_weights_is_one() -> None:
    peaks = torch.tensor([0.0, 4.0, 8.0, 2.0])
    multiplier = smoothing_multiplier(peaks, torch.tensor([1.0, 0.0, 1.0, 1.0]), 0.5)
    assert multiplier[:2].tolist() == [1.0, 1.0]
    assert smoothing_multiplier(torch.zeros(3), torch.ones(3), 0.5).tolist() == [1.0, 1.0, 1.0]


def test_multiplier_for_an_outlier_channel_lowers_the_error() -> None:
    inputs, linear = outlier_inputs(), outlier_layer()
    peaks = inputs.abs().amax(dim=0)
    multiplier = smoothing_multiplier(peaks, linear.weight.abs().amax(dim=0), 0.5)
    plain = output_error(linear, InputScaling(scale=2.0**12), inputs)
    smooth = output_error(linear, InputScaling(scale=2.0**3, multiplier=multiplier), inputs)
    assert plain > 0.5
    assert smooth < 0.05


def test_choice_for_an_outlier_channel_smooths_and_records_what_it_gains() -> None:
    (choice,) = choose_linears(nn.ModuleDict({"outlier": outlier_layer()}), ("outlier",), observe(outlier_inputs()))
    assert choice.quantised
    assert choice.smoothing is not None
    assert choice.error < 0.05 < 0.5 < choice.error_unsmoothed


def test_choice_for_even_channels_adds_no_multiplication() -> None:
    (choice,) = choose_linears(nn.ModuleDict({"even": nn.Linear(64, 32)}), ("even",), observe(torch.randn(512, 64)))
    assert choice.smoothing is None
    assert choice.scaling.multiplier is None


def test_choice_for_a_layer_that_cancels_keeps_it_and_quantises_its_neighbour() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleDict({"cancels": nn.Linear(64, 32), "neighbour": nn.Linear(64, 32)})
    inputs = 10 + 0.1 * torch.randn(512, 64)
    cancels = layers["cancels"]
    assert isinstance(cancels, nn.Linear)
    with torch.no_grad():  # what all inputs have in common drops out, and with it all but rounding errors
        cancels.weight -= cancels.weight.mean(dim=1, keepdim=True)
        cancels.bias.zero_()
    choices = {choice.name: choice for choice in choose_linears(layers, tuple(layers), observe(inputs))}
    assert not choices["cancels"].quantised
    assert choices["cancels"].error > 0.08
    assert choices["neighbour"].error < 0.04
    assert choices["neighbour"].quantised
