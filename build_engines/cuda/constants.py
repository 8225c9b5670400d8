"""Constants of a graph under rewriting: placeholders, and the tensors they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

Constants = dict[str, tuple[torch.Tensor, ...]]
"""Placeholder name to the tensors whose concatenation it stands for."""


def add_constant(graph: fx.Graph, constants: Constants, parts: Sequence[torch.Tensor]) -> fx.Node:
    """Add a placeholder for the concatenation of tensors along their first axis."""
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder(f"merged_{len(constants)}")
    constants[node.name] = tuple(parts)
    return node
