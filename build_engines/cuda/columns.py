"""One product in the place of several linear layers of one input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx


def hand_out_columns(graph: fx.Graph, product: Any, linears: Sequence[Any]) -> None:
    """Give each linear layer its columns of a product, in order, and take the layers away.

    Args:
        graph: Changed in place; nodes are added where it inserts at present.
        product: [..., sum of all widths].
        linears: Nodes whose results stand beside each other in it.
    """
    offset = 0
    for linear in linears:
        columns, width = product, linear.meta["val"].shape[-1]
        if len(linears) > 1:
            columns = graph.call_function(torch.ops.aten.slice.Tensor, (product, -1, offset, offset + width))
        columns.meta = dict(linear.meta)
        linear.replace_all_uses_with(columns)
        offset += width
    for linear in linears:
        graph.erase_node(linear)
