"""Spell attributes that are operators, such as ``x.T``, as the operators they are."""

from __future__ import annotations

from dataclasses import replace

import torch

from autodual.graph import Graph, Node


def spell_attributes(graph: Graph) -> Graph:
    """Replace ``x.T`` by ``x.t()`` and ``x.mT`` by ``torch.transpose(x, -2, -1)``."""
    return replace(graph, nodes=tuple(_spell(node) for node in graph.nodes))


def _spell(node: Node) -> Node:
    if node.operator is not getattr or len(node.args) != 2:
        return node
    if node.args[1] == "T":  # of more than two axes PyTorch itself deprecates .T; t() refuses them
        return replace(node, operator="t", args=node.args[:1])
    if node.args[1] == "mT":
        return replace(node, operator=torch.transpose, args=(node.args[0], -2, -1))
    return node
