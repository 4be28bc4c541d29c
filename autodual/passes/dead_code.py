"""Drop nodes that the output does not need."""

from __future__ import annotations

from dataclasses import replace

from autodual.graph import Graph


def drop_dead_code(graph: Graph) -> Graph:
    """Keep the inputs and what the output is computed from. Only sound once the graph holds no mutations."""
    needed = {graph.output}
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed.update(node.parents)
    nodes = tuple(node for node in graph.nodes if node.kind == "input" or node.name in needed)
    used = {node.operator for node in nodes if node.kind == "attribute"}
    return replace(graph, nodes=nodes, constants={name: value for name, value in graph.constants.items() if name in used})
