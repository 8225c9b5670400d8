from __future__ import annotations

import pytest
import torch

from causal_forcing.build_engines import random_weights
from causal_forcing.build_engines.random_weights import random_state_dict, randomise

PINNED_BIAS = ["0x1.f5885a0000000p-9", "0x1.0d05aa0000000p-6"]


class Part(torch.nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 64)
        self.linear = torch.nn.Linear(64, 400)
        self.conv = torch.nn.Conv3d(8, 40, 3)
        self.norm = torch.nn.LayerNorm(300)
        self.gamma = torch.nn.Parameter(torch.empty(300, 1, 1, 1))
        self.modulation = torch.nn.Parameter(torch.empty(1, 6, 256))


def test_random_state_dict_scales_fit_the_kind_of_parameter() -> None:
    drawn = random_state_dict(Part(), 0)
    assert set(drawn) == set(Part().state_dict())
    expected = {
        "embedding.weight": (0.0, 0.5),
        "linear.weight": (0.0, 64**-0.5),
        "linear.bias": (0.0, 0.02),
        "conv.weight": (0.0, (8 * 27) ** -0.5),
        "norm.weight": (1.0, 0.1),
        "norm.bias": (0.0, 0.02),
        "gamma": (1.0, 0.1),
        "modulation": (0.0, 256**-0.5),
    }
    for name, (mean, deviation) in expected.items():
        tensor = drawn[name]
        assert abs(float(tensor.mean()) - mean) < 5 * deviation / tensor.numel() ** 0.5, name
        assert float(tensor.std()) == pytest.approx(deviation, rel=0.2), name


def test_random_state_dict_is_the_same_on_every_machine() -> None:
    with torch.device("meta"):
        layer = torch.nn.Linear(4, 2)
    # Integer sums times one float32 factor: any machine gets these bits.
    drawn = random_state_dict(layer, 1)
    assert [value.hex() for value in drawn["bias"].tolist()] == PINNED_BIAS
    assert torch.equal(drawn["weight"], random_state_dict(torch.nn.Linear(4, 2), 1)["weight"])


def test_random_state_dict_depends_on_seed_and_name_only() -> None:
    one = random_state_dict(torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4), "b": torch.nn.Linear(4, 4)}), 0)
    other = random_state_dict(torch.nn.ModuleDict({"b": torch.nn.Linear(4, 4)}), 0)
    assert torch.equal(one["b.weight"], other["b.weight"])
    assert not torch.equal(one["a.weight"], one["b.weight"])
    again = random_state_dict(torch.nn.ModuleDict({"b": torch.nn.Linear(4, 4)}), 1)
    assert not torch.equal(other["b.weight"], again["b.weight"])


def test_random_state_dict_parts_of_a_large_tensor_are_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_state_dict(torch.nn.Linear(100, 100), 0)["weight"]
    monkeypatch.setattr(random_weights, "_DRAW_PART", 1024)
    assert torch.equal(random_state_dict(torch.nn.Linear(100, 100), 0)["weight"], whole)
    assert len(set(whole.flatten().tolist())) > 9000


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_randomise_gives_the_drawn_weights(device: str) -> None:
    with torch.device(device):
        module = Part()
    randomise(module, 3, dtype=torch.bfloat16)
    for name, tensor in random_state_dict(module, 3).items():
        assert torch.equal(module.state_dict()[name], tensor.bfloat16()), name
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_randomise_deep_stack_keeps_activations_near_one() -> None:
    with torch.device("meta"):
        stack = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(10)))
    randomise(stack, 0)
    out = stack(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)))
    assert 0.3 < float(out.std()) < 3
