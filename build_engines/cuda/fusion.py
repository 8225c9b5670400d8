"""Rewrites of a traced graph: neighbouring operators into the fused ops and matrix products that run best on a GPU.

Every rewrite keeps what is computed. They run on graphs that `export_program` traced inside `keep_fused_ops`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from causal_forcing.build_engines.cuda.columns import hand_out_columns
from causal_forcing.build_engines.cuda.constants import Constants, add_constant
from causal_forcing.build_engines.cuda.fp8_fusion import fuse_quantize, split_fp8_linears
from causal_forcing.plugins import dit_ops, fp8_attention_ops, linear_ops, token_ops  # noqa: F401  # registers ops

aten = torch.ops.aten
ours = torch.ops.causal_forcing

_PROJECTED = {
    ours.segmented_attention.default: ours.projected_attention.default,
    ours.segmented_attention_fp8.default: ours.projected_attention_fp8.default,
}
"""Attention to the op that starts from the projections."""


def fuse(graph: fx.Graph, constants: Constants) -> None:
    """Apply all rewrites, in place."""
    for rewrite in (
        split_fp8_linears,
        merge_linears,
        fuse_gelu,
        fuse_attention,
        fuse_exchange,
        fuse_norms,
        fuse_quantize,
    ):
        rewrite(graph, constants)
    graph.eliminate_dead_code()
    graph.lint()


def merge_linears(graph: fx.Graph, constants: Constants) -> None:
    """Multiply by the weights of all linear layers of one input at once: queries, keys and values in one product."""
    groups: dict[Any, list[Any]] = {}
    for node in graph.nodes:
        if node.target is aten.linear.default and all(part.name in constants for part in node.args[1:]):
            groups.setdefault(node.args[0], []).append(node)
    for source, linears in groups.items():
        if len(linears) < 2 or any(len(linear.args) != 3 for linear in linears):
            continue
        weight, bias = (
            add_constant(graph, constants, [part for linear in linears for part in constants[linear.args[index].name]])
            for index in (1, 2)
        )
        with graph.inserting_before(linears[0]):
            hand_out_columns(graph, graph.call_function(aten.linear.default, (source, weight, bias)), linears)


def fuse_gelu(graph: fx.Graph, constants: Constants) -> None:
    """Apply GELU where a linear layer's product is written."""
    for node in list(graph.nodes):
        if node.target is not aten.gelu.default or node.kwargs.get("approximate") != "tanh":
            continue
        linear = node.args[0]
        if linear.target is aten.linear.default and len(linear.args) == 3 and len(linear.users) == 1:
            _replace(graph, node, ours.linear_gelu.default, linear.args)


def fuse_attention(graph: fx.Graph, constants: Constants) -> None:
    """Norms and RoPE of queries and keys, the write to the cache and attention become one op."""
    for node in list(graph.nodes):
        if node.target not in _PROJECTED:
            continue
        q, k, v, k_cache, v_cache, slots, valid_slots, scale, *codes = node.args
        projected = _before_rope(q, k, v)
        if projected is None:
            continue
        projections, heads, eps = projected
        batch, _, tokens, depth = node.meta["val"].shape
        with graph.inserting_before(node):
            places = (k_cache, v_cache, slots, valid_slots)
            merged = graph.call_function(_PROJECTED[node.target], (*projections, *places, heads, eps, scale, *codes))
            split = graph.call_function(aten.view.default, (merged, [batch, tokens, heads, depth]))
            by_head = graph.call_function(aten.transpose.int, (split, 1, 2))
            by_head.meta = dict(node.meta)
        node.replace_all_uses_with(by_head)
        graph.erase_node(node)


def fuse_exchange(graph: fx.Graph, constants: Constants) -> None:
    """Norms and RoPE of queries and keys and what is sent to other ranks' heads become one op."""
    for node in list(graph.nodes):
        if node.target is not ours.exchange_to_heads.default:
            continue
        q, k, v, *split = node.args
        projected = _before_rope(q, k, v)
        if projected is not None:
            projections, heads, eps = projected
            _replace(graph, node, ours.projected_exchange.default, (*projections, heads, eps, *split))


def fuse_norms(graph: fx.Graph, constants: Constants) -> None:
    """A residual sum and the norm behind it become one op; the sum stays in use."""
    for node in list(graph.nodes):
        total: Any
        if node.target is ours.modulated_norm.default:
            total, shift, scale, eps = node.args
            weight = bias = None
        elif node.target is aten.layer_norm.default and len(node.args) >= 5 and len(node.args[1]) == 1:
            total, _, weight, bias, eps = node.args[:5]
            shift = scale = None
        else:
            continue
        if total.target is ours.gated_add.default:
            x, branch, gate = total.args
        elif total.target is aten.add.Tensor and _same_shape(*total.args[:2]) and not total.kwargs:
            (x, branch), gate = total.args, None
        else:
            continue
        if any(user is not node and user < node for user in total.users):
            continue  # what reads the sum before the norm would read it too early
        with graph.inserting_before(node):
            both = graph.call_function(ours.add_norm.default, (x, branch, gate, weight, bias, shift, scale, eps))
            for index, old in enumerate((total, node)):
                part = graph.call_function(operator.getitem, (both, index))
                part.meta = dict(old.meta)
                old.replace_all_uses_with(part, delete_user_cb=_all_but(both))
        graph.erase_node(node)
        graph.erase_node(total)


def _all_but(kept: fx.Node) -> Callable[[fx.Node], bool]:
    return lambda user: user is not kept


def _replace(graph: fx.Graph, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    with graph.inserting_before(node):
        new = graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _before_rope(q: Any, k: Any, v: Any) -> tuple[tuple[Any, ...], int, float] | None:
    """Return what q, k, v were made of, if by norm and RoPE: projections, norms' weights, cosines, sines; N; eps."""
    values = _before_heads(v)
    if values is None or q.target is not ours.norm_rope.default or k.target is not ours.norm_rope.default:
        return None
    q_source, q_weight, *placement = q.args
    k_source, k_weight, *k_placement = k.args
    if k_placement != placement:
        return None
    cos, sin, heads, eps = placement
    return (q_source, k_source, values, q_weight, k_weight, cos, sin), heads, eps


def _before_heads(values: Any) -> fx.Node | None:
    """Return what was split into heads: [B, L, N·D] of values [B, N, L, D]."""
    if values.target is not aten.transpose.int or values.args[1:] != (1, 2):
        return None
    reshaped = values.args[0]
    if reshaped.target not in (aten.view.default, aten.reshape.default):
        return None
    source: fx.Node = reshaped.args[0]
    return source


def _same_shape(left: Any, right: Any) -> bool:
    return all(isinstance(part, fx.Node) for part in (left, right)) and (
        left.meta["val"].shape == right.meta["val"].shape
    )
