"""The torch custom ops: registered soundly, honest about what they change, and in place again after export."""

from __future__ import annotations

import torch

from causal_forcing.plugins import torch_op
from causal_forcing.plugins.torch_op import write_caches_in_place

SCALE = 0.5
B, N, L, D, S = 2, 3, 4, 8, 10

IN_PLACE = torch.ops.causal_forcing.kv_cache_attention_.default
FUNCTIONAL = torch.ops.causal_forcing.kv_cache_attention.default


class OneCall(torch.nn.Module):
    """The op as a model calls it."""

    def forward(self, *tensors: torch.Tensor) -> torch_op.CacheAttentionOutputs:
        q, k, v, k_cache, v_cache, slots, valid_slots = tensors
        return torch_op.kv_cache_attention(q, k, v, k_cache, v_cache, slots, valid_slots, SCALE)


def make_tensors(*, transposed: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if transposed:
        chunk = [torch.randn(B, L, N, D, generator=generator).transpose(1, 2) for _ in range(3)]
    else:
        chunk = [torch.randn(B, N, L, D, generator=generator) for _ in range(3)]
    caches = [torch.randn(B, N, S, D, generator=generator) for _ in range(2)]
    return [
        *chunk,
        *caches,
        torch.tensor([6, 2], dtype=torch.int32),
        torch.tensor([8, 9], dtype=torch.int32),
    ]


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]


def targets(module: torch.fx.GraphModule) -> set[object]:
    return {node.target for node in module.graph.nodes if node.op == "call_function"}


def exported() -> torch.fx.GraphModule:
    module = torch.export.export(OneCall(), tuple(make_tensors()), strict=False).module()
    assert isinstance(module, torch.fx.GraphModule)
    return module


def test_in_place_op_passes_opcheck() -> None:
    torch.library.opcheck(IN_PLACE, (*make_tensors(), SCALE))


def test_functional_op_passes_opcheck() -> None:
    torch.library.opcheck(FUNCTIONAL, (*make_tensors(), SCALE))


def test_ops_with_transposed_inputs_pass_opcheck() -> None:
    """The model's queries, keys and values are views of [B, L, N, D]."""
    torch.library.opcheck(IN_PLACE, (*make_tensors(transposed=True), SCALE))
    torch.library.opcheck(FUNCTIONAL, (*make_tensors(transposed=True), SCALE))


def test_functional_op_leaves_every_input_as_it_was() -> None:
    tensors = make_tensors()
    before = copies(tensors)
    _, k_cache, v_cache = FUNCTIONAL(*tensors, SCALE)
    for tensor, kept in zip(tensors, before, strict=True):
        assert torch.equal(tensor, kept)
    assert not torch.equal(k_cache, tensors[3])
    assert not torch.equal(v_cache, tensors[4])
    assert k_cache.data_ptr() != tensors[3].data_ptr()
    assert v_cache.data_ptr() != tensors[4].data_ptr()


def test_in_place_op_changes_the_caches_and_nothing_else() -> None:
    tensors = make_tensors()
    before = copies(tensors)
    IN_PLACE(*tensors, SCALE)
    changed = [not torch.equal(tensor, kept) for tensor, kept in zip(tensors, before, strict=True)]
    assert changed == [False, False, False, True, True, False, False]


def test_functional_op_gives_what_the_in_place_op_gives() -> None:
    tensors = make_tensors()
    out, k_cache, v_cache = FUNCTIONAL(*tensors, SCALE)
    assert torch.equal(IN_PLACE(*tensors, SCALE), out)
    assert torch.equal(tensors[3], k_cache)
    assert torch.equal(tensors[4], v_cache)


def test_eager_call_returns_the_caches_that_came_in() -> None:
    tensors = make_tensors()
    _, k_cache, v_cache = OneCall()(*tensors)
    assert k_cache is tensors[3]
    assert v_cache is tensors[4]


def test_exported_graph_holds_the_functional_op_and_mutates_nothing() -> None:
    program = torch.export.export(OneCall(), tuple(make_tensors()), strict=False)
    assert FUNCTIONAL in targets(program.graph_module)
    assert IN_PLACE not in targets(program.graph_module)
    assert not program.graph_signature.user_inputs_to_mutate
    tensors = make_tensors()
    before = copies(tensors)
    program.module()(*tensors)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(tensors, before, strict=True))


def test_write_caches_in_place_on_an_exported_graph_makes_it_write_the_buffers_it_is_given() -> None:
    module = exported()
    want, *want_caches = module(*make_tensors())
    write_caches_in_place(module)
    tensors = make_tensors()
    out, *caches = module(*tensors)
    assert torch.equal(out, want)
    for cache, given, expected in zip(caches, tensors[3:5], want_caches, strict=True):
        assert cache.data_ptr() == given.data_ptr()
        assert torch.equal(given, expected)
