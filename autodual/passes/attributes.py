"""Spell attributes that are operators, such as ``x.T``, as the operators they are."""

from __future__ import annotations

from dataclasses import replace

import torch

from autodual.graph import Graph, Node

_ATEN = torch.ops.aten
_OPERATORS = {"T": _ATEN.numpy_T.default, "mT": _ATEN.mT.default, "H": _ATEN.matrix_H.default, "mH": _ATEN.mH.default}


def spell_attributes(graph: Graph) -> Graph:
    """Replace every attribute access that rearranges a tensor by its operator."""
    return replace(graph, nodes=tuple(_spell(node) for node in graph.nodes))


def _spell(node: Node) -> Node:
    if node.operator is not getattr or len(node.args) != 2 or node.args[1] not in _OPERATORS:
        return node
    return replace(node, operator=_OPERATORS[node.args[1]], args=node.args[:1])
