"""Fuse ``split(x)[i]`` and ``max(x, 1).values`` into one node, so that every node of the graph stands for one tensor."""

from __future__ import annotations

import operator
from dataclasses import replace

from autodual import operators
from autodual.graph import Graph, Node, Ref

_FIELDS = {"values": 0, "indices": 1}


def fuse_items(graph: Graph) -> Graph:
    """Replace every item of an operator that returns a tuple by the operator with ``item`` set."""
    return replace(graph, nodes=tuple(_fuse(node, graph.by_name) for node in graph.nodes))


def _fuse(node: Node, by_name: dict[str, Node]) -> Node:
    position = _position(node)
    if position is None or not isinstance(node.args[0], Ref):
        return node
    source = by_name.get(node.args[0].name)
    if (
        source is None
        or source.kind != "call"
        or source.item is not None
        or not operators.returns_tuple(source.operator, source.args, source.kwargs)
    ):
        return node
    return replace(source, name=node.name, item=position, origin=node.origin or source.origin)


def _position(node: Node) -> int | None:
    """Return which item of a tuple a node reads: by its number, or by the names that PyTorch gives the items of ``max``."""
    if node.operator is operator.getitem and type(node.args[1]) is int:
        return node.args[1]
    return _FIELDS.get(node.args[1]) if node.operator is getattr and len(node.args) == 2 else None
