"""Fuse ``split(x)[i]`` into one node, so that every node of the graph stands for one tensor."""

from __future__ import annotations

import operator
from dataclasses import replace

from autodual import operators
from autodual.graph import Graph, Node, Ref


def fuse_items(graph: Graph) -> Graph:
    """Replace every item of an operator that returns a tuple by the operator with ``item`` set."""
    return replace(graph, nodes=tuple(_fuse(node, graph.by_name) for node in graph.nodes))


def _fuse(node: Node, by_name: dict[str, Node]) -> Node:
    if node.operator is not operator.getitem or not isinstance(node.args[0], Ref) or type(node.args[1]) is not int:
        return node
    source = by_name.get(node.args[0].name)
    if (
        source is None
        or source.kind != "call"
        or source.item is not None
        or not operators.returns_tuple(source.operator, source.args, source.kwargs)
    ):
        return node
    return replace(source, name=node.name, item=node.args[1], origin=node.origin or source.origin)
