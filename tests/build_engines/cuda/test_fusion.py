"""Rewrites of graphs: what is merged, what is left alone because merging would be wrong, and that results stay."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from causal_forcing.build_engines.cuda.tape_set import TapeSet
from causal_forcing.build_engines.networks import Network
from causal_forcing.plugins.dit_ops import gated_add, modulated_norm, norm_rope, segmented_attention, split_heads
from causal_forcing.plugins.ranks import rehearse
from causal_forcing.plugins.token_ops import exchange_to_heads
from causal_forcing.runtime.engine import IOTensors
from causal_forcing.runtime.engines.cuda_engine import CudaEngine, DeviceWeights
from causal_forcing.runtime.network_spec import IOTensor, NetworkSpec
from causal_forcing.runtime.tape import read_tape

CPU = torch.device("cpu")
EPS = 1e-6
TOKENS, DIM, HEADS = 6, 16, 2
X = {"x": (1, TOKENS, DIM)}


@pytest.fixture
def calls_of(tmp_path: Path) -> Any:
    """Trace a module, check that what an engine plays is what it computes, and return its calls by operator."""

    def check(module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> collections.Counter[str]:
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
        inputs = [torch.randn(shape) for shape in shapes.values()]
        with torch.inference_mode():
            outputs = module(*(tensor.clone() for tensor in inputs))
        given = [IOTensor(name=name, shape=shape, dtype="float32") for name, shape in shapes.items()]
        gives = [IOTensor(name=f"y{i}", shape=tuple(y.shape), dtype="float32") for i, y in enumerate(outputs)]
        spec = NetworkSpec(name="network", inputs=tuple(given), outputs=tuple(gives))
        tapes = TapeSet(tmp_path)
        path = tmp_path / tapes.add(Network(spec=spec, module=module))
        tapes.finish()
        io_tensors = IOTensors([spec], CPU)
        engine = CudaEngine(DeviceWeights(tmp_path, CPU), spec, path)
        engine.bind(io_tensors)
        for io_tensor, tensor in zip(given, inputs, strict=True):
            io_tensors[io_tensor.name].copy_(tensor)
        engine.enqueue()
        for io_tensor, want in zip(gives, outputs, strict=True):
            torch.testing.assert_close(io_tensors[io_tensor.name], want)
        return collections.Counter(call.operator.split(".")[1] for call in read_tape(path).calls)

    return check


class Of(nn.Module):
    """A module of layers and a function of them and the inputs."""

    def __init__(self, function: Any, **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleDict(layers)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.function(*inputs, **self.layers)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def linear(outputs: int = DIM, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(DIM, outputs, bias=bias)


# --- linear layers --------------------------------------------------------------------------------------------------


def test_linears_of_one_input_become_one_whatever_their_widths(calls_of: Any) -> None:
    module = Of(lambda x, a, b, c: (a(x), c(x), b(x)), a=linear(16), b=linear(5), c=linear(24))
    assert calls_of(module, X) == {"linear": 1, "slice": 3}


def test_linears_of_two_inputs_become_two(calls_of: Any) -> None:
    module = Of(lambda x, y, a, b, c, d: (a(x), b(y), c(x), d(y)), **{name: linear() for name in "abcd"})
    assert calls_of(module, {**X, "y": (1, TOKENS, DIM)}) == {"linear": 2, "slice": 4}


def test_one_layer_applied_twice_is_still_right(calls_of: Any) -> None:
    assert calls_of(Of(lambda x, a: (a(x) + a(x),), a=linear()), X)["linear"] <= 2


def test_linear_by_itself_is_left_alone(calls_of: Any) -> None:
    assert calls_of(Of(lambda x, a, b: b(a(x)), a=linear(), b=linear()), X) == {"linear": 2}


def test_linears_of_which_one_lacks_a_bias_are_left_alone(calls_of: Any) -> None:
    module = Of(lambda x, a, b: (a(x), b(x)), a=linear(), b=linear(bias=False))
    assert calls_of(module, X) == {"linear": 2}


def test_linear_whose_weight_is_an_input_is_left_alone(calls_of: Any) -> None:
    module = Of(lambda x, w, v, a: (a(x), F.linear(x, w, v)), a=linear())
    assert calls_of(module, {**X, "w": (8, DIM), "v": (8,)}) == {"linear": 2}


# --- GELU -----------------------------------------------------------------------------------------------------------


def test_gelu_behind_a_linear_goes_into_it(calls_of: Any) -> None:
    module = Of(lambda x, a, b: b(F.gelu(a(x), approximate="tanh")), a=linear(40), b=nn.Linear(40, DIM))
    assert calls_of(module, X) == {"linear_gelu": 1, "linear": 1}


def test_gelu_of_the_exact_form_is_left_alone(calls_of: Any) -> None:
    assert calls_of(Of(lambda x, a: F.gelu(a(x)), a=linear()), X) == {"linear": 1, "gelu": 1}


def test_gelu_behind_a_linear_with_another_reader_is_left_alone(calls_of: Any) -> None:
    def forward(x: torch.Tensor, a: nn.Module) -> tuple[torch.Tensor, ...]:
        product = a(x)
        return F.gelu(product, approximate="tanh"), product

    assert calls_of(Of(forward, a=linear()), X) == {"linear": 1, "gelu": 1}


def test_gelu_behind_a_linear_without_a_bias_is_left_alone(calls_of: Any) -> None:
    module = Of(lambda x, a: F.gelu(a(x), approximate="tanh"), a=linear(bias=False))
    assert calls_of(module, X) == {"linear": 1, "gelu": 1}


def test_gelu_of_a_part_of_a_merged_product_is_right(calls_of: Any) -> None:
    module = Of(lambda x, a, b: (F.gelu(a(x), approximate="tanh"), b(x)), a=linear(), b=linear())
    assert calls_of(module, X)["linear_gelu"] == 0


# --- residual sums and norms ----------------------------------------------------------------------------------------


def norm() -> nn.LayerNorm:
    return nn.LayerNorm(DIM, EPS)


PAIR = {**X, "y": (1, TOKENS, DIM)}
MODULATED = {**PAIR, **{name: (DIM,) for name in ("gate", "shift", "scale")}}


def test_sum_and_norm_become_one_and_both_stay_in_use(calls_of: Any) -> None:
    def forward(x: torch.Tensor, y: torch.Tensor, n: nn.Module, a: nn.Module) -> Any:
        total = x + y
        return total + a(n(total))

    assert calls_of(Of(forward, n=norm(), a=linear()), PAIR) == {"add_norm": 1, "linear": 1, "add": 1}


def test_gated_sum_and_modulated_norm_become_one(calls_of: Any) -> None:
    def forward(x: torch.Tensor, y: torch.Tensor, *modulation: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gate, shift, scale = modulation
        total = gated_add(x, y, gate)
        return total, modulated_norm(total, shift, scale, EPS)

    assert calls_of(Of(forward), MODULATED) == {"add_norm": 1}


def test_gated_sum_and_modulated_norm_of_segments_become_one(calls_of: Any) -> None:
    def forward(x: torch.Tensor, y: torch.Tensor, *modulation: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gate, shift, scale = modulation
        total = gated_add(x, y, gate)
        return total, modulated_norm(total, shift, scale, EPS)

    assert calls_of(Of(forward), {**PAIR, **{name: (3, DIM) for name in ("gate", "shift", "scale")}}) == {"add_norm": 1}


def test_norm_without_a_sum_before_it_is_left_alone(calls_of: Any) -> None:
    assert calls_of(Of(lambda x, n: n(x * x), n=norm()), X) == {"mul": 1, "layer_norm": 1}


def test_sum_that_is_read_before_its_norm_is_left_alone(calls_of: Any) -> None:
    def forward(x: torch.Tensor, y: torch.Tensor, n: nn.Module) -> Any:
        total = x + y
        early = total * total
        return n(total) + early

    assert calls_of(Of(forward, n=norm()), PAIR) == {"add": 2, "mul": 1, "layer_norm": 1}


def test_gated_sum_that_is_read_before_its_norm_is_left_alone(calls_of: Any) -> None:
    def forward(x: torch.Tensor, y: torch.Tensor, *modulation: torch.Tensor) -> torch.Tensor:
        gate, shift, scale = modulation
        total = gated_add(x, y, gate)
        early = total * total
        return modulated_norm(total, shift, scale, EPS) + early

    assert calls_of(Of(forward), MODULATED) == {"gated_add": 1, "mul": 1, "modulated_norm": 1, "add": 1}


def test_second_norm_of_a_sum_is_left_alone(calls_of: Any) -> None:
    def forward(x: torch.Tensor, y: torch.Tensor, n: nn.Module, m: nn.Module) -> tuple[torch.Tensor, ...]:
        total = x + y
        return n(total), m(total)

    assert calls_of(Of(forward, n=norm(), m=norm()), PAIR) == {"add_norm": 1, "layer_norm": 1}


def test_sum_that_is_a_norm_of_the_one_before_is_right(calls_of: Any) -> None:
    def forward(x: torch.Tensor, y: torch.Tensor, n: nn.Module, m: nn.Module) -> Any:
        total = x + y
        return m(total + n(total))

    assert calls_of(Of(forward, n=norm(), m=norm()), PAIR) == {"add_norm": 2}


@pytest.mark.parametrize("shape", [(DIM,), (1, 1, DIM), (2, TOKENS, DIM)], ids=str)
def test_sum_that_broadcasts_is_left_alone(shape: tuple[int, ...], calls_of: Any) -> None:
    assert calls_of(Of(lambda x, y, n: n(x + y), n=norm()), {**X, "y": shape}) == {"add": 1, "layer_norm": 1}


def test_sum_with_a_factor_or_a_number_is_left_alone(calls_of: Any) -> None:
    scaled = Of(lambda x, y, n: n(torch.add(x, y, alpha=2)), n=norm())
    assert calls_of(scaled, PAIR) == {"add": 1, "layer_norm": 1}
    assert calls_of(Of(lambda x, n: n(x + 2.0), n=norm()), X) == {"add": 1, "layer_norm": 1}


def test_sum_before_a_norm_over_more_than_the_last_axis_is_left_alone(calls_of: Any) -> None:
    module = Of(lambda x, y, n: n(x + y), n=nn.LayerNorm((TOKENS, DIM), EPS))
    assert calls_of(module, PAIR) == {"add": 1, "layer_norm": 1}


# --- attention ------------------------------------------------------------------------------------------------------

DEPTH, SLOTS = DIM // HEADS, 10
ROPE = {name: (TOKENS, DEPTH // 2) for name in ("cos", "sin")}
CACHES = {name: (1, HEADS, SLOTS, DEPTH) for name in ("k_cache", "v_cache")}


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *caches: torch.Tensor) -> torch.Tensor:
    """Attend to the first six slots; copies of the caches are written, for networks here have no states."""
    slots, valid_slots = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    k_cache, v_cache = (cache.clone() for cache in caches)
    out = segmented_attention(q, k, v, k_cache, v_cache, slots, valid_slots, 0.3)
    return out.transpose(1, 2).flatten(2)


class Weight(nn.Module):
    """A vector."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(DIM))


def test_norms_rope_and_attention_become_one(calls_of: Any) -> None:
    def forward(x: torch.Tensor, *given: torch.Tensor, **layers: Any) -> torch.Tensor:
        cos, sin, *caches = given
        q, k, v = (layers[name](x) for name in "qkv")
        queries = norm_rope(q, layers["nq"].weight, cos, sin, HEADS, EPS)
        keys = norm_rope(k, layers["nk"].weight, cos, sin, HEADS, EPS)
        return attend(queries, keys, split_heads(v, HEADS), *caches)

    layers = {**{name: linear() for name in "qkv"}, "nq": Weight(), "nk": Weight()}
    calls = calls_of(Of(forward, **layers), {**X, **ROPE, **CACHES})
    assert (calls["projected_attention"], calls["linear"]) == (1, 1)
    assert calls["segmented_attention"] == calls["norm_rope"] == 0


def test_attention_to_keys_without_norm_is_left_alone(calls_of: Any) -> None:
    def forward(x: torch.Tensor, *given: torch.Tensor, nq: Any) -> torch.Tensor:
        cos, sin, *caches = given
        queries = norm_rope(x, nq.weight, cos, sin, HEADS, EPS)
        return attend(queries, split_heads(x, HEADS), split_heads(x, HEADS), *caches)

    calls = calls_of(Of(forward, nq=Weight()), {**X, **ROPE, **CACHES})
    assert (calls["projected_attention"], calls["segmented_attention"], calls["norm_rope"]) == (0, 1, 1)


@pytest.mark.parametrize("other", ["phases", "eps"])
def test_attention_whose_keys_are_placed_or_normalised_unlike_queries_is_left_alone(other: str, calls_of: Any) -> None:
    def forward(x: torch.Tensor, *given: torch.Tensor, nq: Any, nk: Any) -> torch.Tensor:
        cos, sin, *caches = given
        phases, eps = ((sin, cos), EPS) if other == "phases" else ((cos, sin), 0.5)
        queries = norm_rope(x, nq.weight, cos, sin, HEADS, EPS)
        keys = norm_rope(x, nk.weight, *phases, HEADS, eps)
        return attend(queries, keys, split_heads(x, HEADS), *caches)

    calls = calls_of(Of(forward, nq=Weight(), nk=Weight()), {**X, **ROPE, **CACHES})
    assert calls["projected_attention"] == 0


def test_attention_to_values_that_no_projection_gave_is_left_alone(calls_of: Any) -> None:
    def forward(x: torch.Tensor, v: torch.Tensor, *given: torch.Tensor, nq: Any, nk: Any) -> torch.Tensor:
        cos, sin, *caches = given
        queries, keys = (norm_rope(x, n.weight, cos, sin, HEADS, EPS) for n in (nq, nk))
        return attend(queries, keys, v, *caches)

    values = {"v": (1, HEADS, TOKENS, DEPTH)}
    calls = calls_of(Of(forward, nq=Weight(), nk=Weight()), {**X, **values, **ROPE, **CACHES})
    assert (calls["projected_attention"], calls["segmented_attention"]) == (0, 1)


def test_norms_rope_and_exchange_become_one(calls_of: Any) -> None:
    def forward(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **layers: Any) -> torch.Tensor:
        q, k, v = (layers[name](x) for name in "qkv")
        queries = norm_rope(q, layers["nq"].weight, cos, sin, HEADS, EPS)
        keys = norm_rope(k, layers["nk"].weight, cos, sin, HEADS, EPS)
        whole: torch.Tensor = exchange_to_heads(queries, keys, split_heads(v, HEADS), 2, 1, 2 * TOKENS)
        return whole

    layers = {**{name: linear() for name in "qkv"}, "nq": Weight(), "nk": Weight()}
    with rehearse(2):
        calls = calls_of(Of(forward, **layers), {**X, **ROPE})
    assert (calls["projected_exchange"], calls["linear"]) == (1, 1)
    assert calls["exchange_to_heads"] == calls["norm_rope"] == 0
