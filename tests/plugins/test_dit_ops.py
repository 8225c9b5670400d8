"""The DiT's fused ops by their plain bodies: segments, compositions, shapes; and which of body and node is run."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from causal_forcing.plugins import dit_ops
from causal_forcing.plugins.dit_ops import (
    add_norm,
    gated_add,
    modulated_norm,
    norm_rope,
    projected_attention,
    rms_norm,
    rotate,
    segmented_attention,
    split_heads,
)
from causal_forcing.plugins.fused_op import fused_op, keep_fused_ops, keeps_fused_ops, register_fused_ops
from causal_forcing.plugins.linear_ops import linear_gelu
from causal_forcing.plugins.torch_op import kv_cache_attention_in_place

B, L, HEADS, DEPTH, SLOTS = 2, 12, 2, 48, 30
DIM = HEADS * DEPTH
EPS = 1e-6


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- modulation by segment ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segments", [1, 2, 3, 12])
def test_modulation_of_segments_equals_a_call_for_each(segments: int, dtype: torch.dtype) -> None:
    x, branch = rand(B, L, DIM, dtype=dtype), rand(B, L, DIM, seed=1, dtype=dtype)
    gate, shift, scale = (rand(segments, DIM, seed=seed, dtype=dtype) for seed in (2, 3, 4))
    parts = list(zip(x.chunk(segments, 1), branch.chunk(segments, 1), gate, shift, scale, strict=True))
    normed = [modulated_norm(x, shift, scale, EPS) for x, _, _, shift, scale in parts]
    assert torch.equal(modulated_norm(x, shift, scale, EPS), torch.cat(normed, 1))
    added = [gated_add(x, branch, gate) for x, branch, gate, _, _ in parts]
    assert torch.equal(gated_add(x, branch, gate), torch.cat(added, 1))
    both = [add_norm(x, branch, gate, None, None, shift, scale, EPS) for x, branch, gate, shift, scale in parts]
    for got, want in zip(
        add_norm(x, branch, gate, None, None, shift, scale, EPS), zip(*both, strict=True), strict=True
    ):
        assert torch.equal(got, torch.cat(want, 1))


def test_modulation_of_one_segment_equals_modulation_without_segments() -> None:
    x, branch, gate, shift, scale = rand(B, L, DIM), rand(B, L, DIM, seed=1), *rand(3, DIM, seed=2)
    assert torch.equal(modulated_norm(x, shift, scale, EPS), modulated_norm(x, shift[None], scale[None], EPS))
    assert torch.equal(gated_add(x, branch, gate), gated_add(x, branch, gate[None]))


def test_modulated_norm_is_a_layer_norm_scaled_and_shifted() -> None:
    x, shift, scale = rand(B, L, DIM).double(), *rand(2, DIM, seed=1).double()
    want = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    torch.testing.assert_close(modulated_norm(x, shift, scale, EPS), want * (1 + scale) + shift)


# --- compositions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("segments", [0, 3])
def test_add_norm_is_a_gated_add_and_a_modulated_norm(segments: int, dtype: torch.dtype) -> None:
    x, branch = rand(B, L, DIM, dtype=dtype), rand(B, L, DIM, seed=1, dtype=dtype)
    shape = (segments, DIM) if segments else (DIM,)
    gate, shift, scale = (rand(*shape, seed=seed, dtype=dtype) for seed in (2, 3, 4))
    total = gated_add(x, branch, gate)
    got = add_norm(x, branch, gate, None, None, shift, scale, EPS)
    assert torch.equal(got[0], total)
    assert torch.equal(got[1], modulated_norm(total, shift, scale, EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_norm_without_gate_and_modulation_is_an_add_and_a_layer_norm(dtype: torch.dtype) -> None:
    x, branch = rand(B, L, DIM, dtype=dtype), rand(B, L, DIM, seed=1, dtype=dtype)
    weight, bias = rand(2, DIM, seed=2, dtype=dtype)
    total, normed = add_norm(x, branch, None, weight, bias, None, None, EPS)
    assert torch.equal(total, x + branch)
    assert torch.equal(normed, F.layer_norm(x + branch, (DIM,), weight, bias, EPS))


def test_rms_norm_keeps_its_statistics_in_fp32() -> None:
    x, weight = rand(B, L, DIM, dtype=torch.bfloat16), rand(DIM, seed=1, dtype=torch.bfloat16)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    # Rounded twice to 8 bits: after the norm, and after the weight.
    torch.testing.assert_close(rms_norm(x, weight, EPS).double(), exact, atol=0, rtol=2 * 2**-8)


def test_rotate_turns_pairs_and_keeps_their_length() -> None:
    x, angle = rand(B, HEADS, L, DEPTH), rand(L, DEPTH // 2, seed=1)
    turned = rotate(x, angle.cos(), angle.sin())
    got, given = (torch.view_as_complex(tensor.reshape(B, HEADS, L, -1, 2)) for tensor in (turned, x))
    torch.testing.assert_close(got, given * torch.polar(torch.ones_like(angle), angle))


def test_norm_rope_is_an_rms_norm_over_all_heads_and_a_turn_of_each() -> None:
    x, weight, angle = rand(B, L, DIM), rand(DIM, seed=1), rand(L, DEPTH // 2, seed=2)
    got = norm_rope(x, weight, angle.cos(), angle.sin(), HEADS, EPS)
    normed = rms_norm(x, weight, EPS)
    for head in range(HEADS):
        alone = normed[:, None, :, head * DEPTH : (head + 1) * DEPTH]
        assert torch.equal(got[:, head : head + 1], rotate(alone, angle.cos(), angle.sin()))


def test_linear_gelu_is_a_linear_and_the_tanh_form() -> None:
    x, weight, bias = rand(B, L, DIM), rand(20, DIM, seed=1) / 10, rand(20, seed=2)
    assert torch.equal(linear_gelu(x, weight, bias), F.gelu(F.linear(x, weight, bias), approximate="tanh"))


# --- attention ------------------------------------------------------------------------------------------------------


def attention_call(batch: int, slots: list[int], valid_slots: list[int]) -> dict[str, Any]:
    """Return the arguments of `projected_attention`, by name."""
    angle = rand(L, DEPTH // 2, seed=8)
    merged = rand(batch, L, 3 * DIM, seed=1)  # queries, keys and values as the model has them: slices of one product
    q, k, v = merged.chunk(3, dim=-1)
    k_cache, v_cache = rand(2, batch, HEADS, SLOTS, DEPTH, seed=4)
    q_weight, k_weight = rand(2, DIM, seed=6)
    return {
        **{"q": q, "k": k, "v": v, "q_weight": q_weight, "k_weight": k_weight},
        **{"cos": angle.cos(), "sin": angle.sin(), "k_cache": k_cache, "v_cache": v_cache},
        "slots": torch.tensor(slots, dtype=torch.int32),
        "valid_slots": torch.tensor(valid_slots, dtype=torch.int32),
        **{"heads": HEADS, "eps": EPS, "scale": DEPTH**-0.5},
    }


def copied(call: dict[str, Any]) -> dict[str, Any]:
    """Return the call with caches of its own."""
    return call | {name: call[name].clone() for name in ("k_cache", "v_cache")}


@pytest.mark.parametrize(
    ("batch", "slots", "valid_slots"),
    [(1, [0, 6], [12]), (2, [24, 3], [30, 17]), (1, [18, 0, 9], [30]), (1, [9, 0, 21, 3], [27])],
    ids=str,
)
def test_projected_attention_is_norms_rope_and_the_op(batch: int, slots: list[int], valid_slots: list[int]) -> None:
    call = attention_call(batch, slots, valid_slots)
    given, wanted = copied(call), copied(call)
    got = projected_attention(**given)
    rope = (call["cos"], call["sin"], HEADS, EPS)
    queries, keys = (norm_rope(call[name], call[f"{name}_weight"], *rope) for name in "qk")
    places = (call["slots"], call["valid_slots"])
    want = kv_cache_attention_in_place(
        queries, keys, split_heads(call["v"], HEADS), wanted["k_cache"], wanted["v_cache"], *places, DEPTH**-0.5
    )
    assert torch.equal(got, want.transpose(1, 2).flatten(2))
    for cache in ("k_cache", "v_cache"):
        assert torch.equal(given[cache], wanted[cache])
        assert not torch.equal(given[cache], call[cache])


@pytest.mark.parametrize(
    ("slots", "valid_slots"),
    [([0, 6], [6, 12]), ([12, 0, 20, 26], [18, 30]), ([0, 4, 8], [4, 8, 12])],
    ids=str,
)
def test_attention_of_segments_equals_a_call_for_each_in_turn(slots: list[int], valid_slots: list[int]) -> None:
    call = attention_call(1, slots, valid_slots)
    given, wanted = copied(call), copied(call)
    got = projected_attention(**given)
    segments = len(valid_slots)
    parts = []
    for index in range(segments):
        one = dict(wanted)
        for name in ("q", "k", "v"):
            one[name] = wanted[name].chunk(segments, dim=1)[index]
        for name in ("cos", "sin", "slots"):
            one[name] = wanted[name].chunk(segments)[index]
        one["valid_slots"] = wanted["valid_slots"][index : index + 1]
        parts.append(projected_attention(**one))
    torch.testing.assert_close(got, torch.cat(parts, dim=1), atol=1e-6, rtol=1e-6)
    assert torch.equal(given["k_cache"], wanted["k_cache"])
    assert torch.equal(given["v_cache"], wanted["v_cache"])


def test_earlier_segment_does_not_see_a_later_one_and_a_later_one_sees_an_earlier() -> None:
    call = attention_call(1, [0, 6], [6, 12])
    first, second = projected_attention(**copied(call)).chunk(2, dim=1)
    for seen_by, changed in itertools.product((0, 1), (0, 1)):
        other = copied(call)
        other["k"] = call["k"].clone()
        other["k"].chunk(2, dim=1)[changed].add_(rand(1, L // 2, DIM, seed=9))
        differs = not torch.equal(projected_attention(**other).chunk(2, dim=1)[seen_by], (first, second)[seen_by])
        assert differs is (seen_by >= changed)


# --- ops as nodes ---------------------------------------------------------------------------------------------------

ATTENTION = tuple(attention_call(2, [24, 3], [30, 17]).values())
SEGMENTS = tuple(attention_call(1, [0, 6], [6, 12]).values())
SPLIT = tuple(split_heads(part, HEADS).contiguous() for part in (SEGMENTS[0], SEGMENTS[1], SEGMENTS[2]))
OPS: dict[str, tuple[Any, ...]] = {
    "modulated_norm": (rand(B, L, DIM), *rand(2, DIM, seed=1), EPS),
    "gated_add": (rand(B, L, DIM), rand(B, L, DIM, seed=1), rand(3, DIM, seed=2)),
    "add_norm": (rand(B, L, DIM), rand(B, L, DIM, seed=1), None, *rand(2, DIM, seed=2), None, None, EPS),
    "rms_norm": (rand(B, L, DIM, dtype=torch.bfloat16), rand(DIM, seed=1, dtype=torch.bfloat16), EPS),
    "norm_rope": (rand(B, L, DIM), rand(DIM, seed=1), ATTENTION[5], ATTENTION[6], HEADS, EPS),
    "projected_attention": ATTENTION,
    "segmented_attention": (*SPLIT, *SEGMENTS[7:11], 0.3),
    "linear_gelu": (rand(B, L, DIM), rand(20, DIM, seed=1), rand(20, seed=2)),
}


@pytest.mark.parametrize("name", OPS)
def test_op_has_the_schema_and_the_shapes_that_it_says(name: str) -> None:
    register_fused_ops()
    op = getattr(torch.ops.causal_forcing, name).default
    torch.library.opcheck(op, OPS[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", OPS)
def test_op_kept_whole_gives_what_its_body_gives(name: str) -> None:
    function = getattr(dit_ops, name, linear_gelu)
    arguments = [[part.clone() if torch.is_tensor(part) else part for part in OPS[name]] for _ in range(2)]
    body = function(*arguments[0])
    with keep_fused_ops():
        node = function(*arguments[1])
    for got, want in zip(*((each,) if torch.is_tensor(each) else each for each in (node, body)), strict=True):
        assert torch.equal(got, want)
        assert got.is_contiguous()
    for got, want in zip(arguments[1], arguments[0], strict=True):
        assert not torch.is_tensor(want) or torch.equal(got, want), "both change the same arguments"


def test_ops_are_nodes_inside_of_keep_fused_ops_alone() -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return rms_norm(x, weight, EPS)

    def targets() -> set[str]:
        program = torch.export.export(Norm(), (rand(B, L, DIM), rand(DIM)), strict=False)
        return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}

    assert not keeps_fused_ops()
    assert "causal_forcing.rms_norm.default" not in targets()
    with keep_fused_ops():
        assert keeps_fused_ops()
        assert targets() == {"causal_forcing.rms_norm.default"}
    assert not keeps_fused_ops()


def test_decision_to_keep_ops_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), keep_fused_ops():
        _ = 1 / 0
    assert not keeps_fused_ops()


def test_op_on_a_cpu_never_runs_its_kernel() -> None:
    def kernel(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a kernel is for CUDA tensors")

    @fused_op(kernel=kernel)
    def op_of_a_test(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    with keep_fused_ops():
        assert torch.equal(op_of_a_test(torch.ones(2)), torch.full((2,), 2.0))


def test_segmented_attention_of_one_segment_is_the_op() -> None:
    q, k, v, (k_cache, v_cache) = *SPLIT, rand(2, 1, HEADS, SLOTS, DEPTH, seed=4)
    slots, valid_slots = SEGMENTS[9], torch.tensor([11], dtype=torch.int32)
    other = k_cache.clone(), v_cache.clone()
    got = segmented_attention(q, k, v, k_cache, v_cache, slots, valid_slots, 0.3)
    assert torch.equal(got, kv_cache_attention_in_place(q, k, v, *other, slots, valid_slots, 0.3))
    assert torch.equal(k_cache, other[0])
