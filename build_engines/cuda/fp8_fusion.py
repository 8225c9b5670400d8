"""Rewrites of a graph with fp8 linear layers: quantise where values are made, multiply codes by codes.

A `fp8_linear`, as calibration makes it, becomes the quantisation of its input and a product. Layers of one input share
its quantisation and are one product; a quantisation joins the norm or the GELU that makes the values.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from causal_forcing.build_engines.cuda.columns import hand_out_columns
from causal_forcing.build_engines.cuda.constants import Constants, add_constant
from causal_forcing.build_engines.quantization import fp8_linear  # noqa: F401  # registers the op
from causal_forcing.plugins import fp8_ops

aten = torch.ops.aten
ours = torch.ops.causal_forcing


def split_fp8_linears(graph: fx.Graph, constants: Constants) -> None:
    """Replace every fp8 linear layer by `quantize` and `fp8_product`, those of one input by one product."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for node in graph.nodes:
        if node.target is ours.fp8_linear.default:
            source, multiplier, scale = node.args[:3]
            values = None if multiplier is None else tuple(_tensor(constants, multiplier).flatten().tolist())
            groups.setdefault((source, values, float(_tensor(constants, scale))), []).append(node)
    for (source, _, scale), linears in groups.items():
        weights, weight_scale = _common_scale([[_tensor(constants, arg) for arg in node.args[3:5]] for node in linears])
        weight = add_constant(graph, constants, weights)
        scales = [add_constant(graph, constants, [torch.tensor(value)]) for value in (scale, weight_scale)]
        bias = add_constant(graph, constants, [_tensor(constants, node.args[5]) for node in linears])
        with graph.inserting_before(linears[0]):
            codes = graph.call_function(ours.quantize.default, (source, linears[0].args[1], scale))
            product = graph.call_function(ours.fp8_product.default, (codes, weight, *scales, bias))
            hand_out_columns(graph, product, linears)


def fuse_quantize(graph: fx.Graph, constants: Constants) -> None:
    """Quantise in the norm or the GELU whose result nothing else reads."""
    for node in list(graph.nodes):
        if node.target is not ours.quantize.default:
            continue
        source, multiplier, scale = node.args
        if len(source.users) != 1:
            continue
        if source.target is aten.gelu.default and source.kwargs.get("approximate") == "tanh":
            with graph.inserting_before(node):
                codes = graph.call_function(ours.gelu_quantize.default, (source.args[0], multiplier, scale))
            node.replace_all_uses_with(codes)
            graph.erase_node(node)
        elif source.target is operator.getitem and source.args[0].target is ours.add_norm.default:
            both, index = source.args
            if index == 1:
                both.target = ours.add_norm_quantize.default
                both.args = (*both.args, multiplier, scale)
                node.replace_all_uses_with(source)
                graph.erase_node(node)


def _tensor(constants: Constants, node: Any) -> torch.Tensor:
    (tensor,) = constants[node.name]
    return tensor.detach()


def _common_scale(layers: list[list[torch.Tensor]]) -> tuple[list[torch.Tensor], float]:
    """Return weights [out, in] in e4m3 at one scale for all: what they stand for changes at the very bottom at most.

    Args:
        layers: Of each, the weight [in, out] e4m3 and its scales [out], powers of two.
    """
    common = max(float(scale.float().max()) for _, scale in layers)
    weights = [weight.float() * (scale.float() / common) for weight, scale in layers]
    return [weight.t().contiguous().to(fp8_ops.E4M3) for weight in weights], common
