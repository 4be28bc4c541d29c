"""Recognise operators that people write out: divisions by the root mean square, averages.

Not ``exp(z) / sum(exp(z))``: softmax has a value where the exponentials overflow, and the model has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from autodual import operators
from autodual.graph import Graph, ModuleRef, Node, Ref
from autodual.primal import operator_of
from dual_layers import Call, lookup
from dual_layers.attention import average
from dual_layers.layer_norms import divided_by_size
from dual_layers.softmax import DualSoftmax

_PRODUCT = ("mul", "multiply", "__mul__", "__rmul__")
_QUOTIENT = ("div", "divide", "true_divide", "truediv", "__truediv__")
_SUM = ("add", "__add__", "__radd__")
_POWER = ("pow", "__pow__")

Nodes = Mapping[str, Node]
Replacement = tuple[Any, tuple[Any, ...]]


def recognize(graph: Graph, model: nn.Module) -> Graph:
    """Put one operator for several that compute the same; its bounds know more than theirs.

    Args:
        graph: without mutations.
        model: where leaf modules are looked up.

    Returns:
        The graph; nodes that nothing needs any more are still in it.
    """
    return replace(graph, nodes=tuple(_recognized(node, graph.by_name, model) for node in graph.nodes))


def _recognized(node: Node, nodes: Nodes, model: nn.Module) -> Node:
    found = _division_by_size(node, nodes) or _average(node, nodes, model)
    return node if found is None else replace(node, operator=found[0], args=found[1], kwargs={})


def _division_by_size(node: Node, nodes: Nodes) -> Replacement | None:
    """Read ``x * rsqrt(mean(x^2) + eps)`` and its like."""
    pairs = [node.args[:2], node.args[1::-1]] if _is(node, *_PRODUCT) else [node.args] if _is(node, *_QUOTIENT) else []
    for value, factor in pairs:
        total = _added(_under_root(factor, nodes, inverse=_is(node, *_PRODUCT)), nodes)
        mean = None if total is None else _over_axes(_node(total[0], nodes, "mean"))
        if mean is not None and value == _squared(mean[0], nodes):
            return divided_by_size, (value, mean[1], total[1])
    return None


def _average(node: Node, nodes: Nodes, model: nn.Module) -> Replacement | None:
    """Read ``softmax(scores, -1) @ values``, dropout between the two."""
    if not _is(node, "matmul", "__matmul__", "bmm") or not isinstance(node.args[0], Ref):
        return None
    weights = nodes[node.args[0].name]
    while isinstance(weights.operator, ModuleRef) and isinstance(operator_of(weights, model), (nn.Dropout, nn.Identity)):
        weights = nodes[weights.args[0].name]
    known = weights.kind == "call" and lookup(operator_of(weights, model)) is DualSoftmax
    last = known and DualSoftmax(Call(operator_of(weights, model), weights.args, weights.kwargs)).arguments.dim == -1
    return (average, node.args) if last else None


def _is(node: Node, *names: str) -> bool:
    """Whether a node calls one of these operators on positional arguments and nothing else."""
    plain = node.kind == "call" and not isinstance(node.operator, ModuleRef) and not node.batch_statistics and node.args
    return bool(plain) and operators.short_name(node.operator) in names and (not node.kwargs or names in (("mean",), ("sum",)))


def _node(value: Any, nodes: Nodes, *names: str) -> Node | None:
    """Return the node behind a value if it calls one of these operators."""
    found = nodes.get(value.name) if isinstance(value, Ref) else None
    return found if found is not None and _is(found, *names) else None


def _under_root(value: Any, nodes: Nodes, *, inverse: bool) -> Any:
    """Return ``c`` of ``sqrt(c)`` or ``c ** 0.5``, with ``inverse`` of ``rsqrt(c)`` or ``c ** -0.5``; None if it is neither."""
    root, power = _node(value, nodes, "rsqrt" if inverse else "sqrt"), _node(value, nodes, *_POWER)
    if root is not None:
        return root.args[0]
    return power.args[0] if power is not None and power.args[1:] == ((-0.5,) if inverse else (0.5,)) else None


def _added(value: Any, nodes: Nodes) -> tuple[Any, float] | None:
    """Return the two summands of a value and a positive number."""
    node = _node(value, nodes, *_SUM)
    for first, second in [node.args, node.args[::-1]] if node is not None and len(node.args) == 2 else []:
        if isinstance(second, (int, float)) and second > 0:
            return first, float(second)
    return None


def _over_axes(node: Node | None) -> tuple[Any, Any] | None:
    """Return input and axes of a sum or mean that keeps them."""
    if node is None:
        return None
    given = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | dict(node.kwargs)
    named = set(given) == {"input", "dim", "keepdim"} and given["keepdim"] is True
    return (given["input"], given["dim"]) if named and isinstance(given["dim"], (int, tuple, list)) else None


def _squared(value: Any, nodes: Nodes) -> Any:
    """Return what a value is the square of, or None."""
    square, power, product = (_node(value, nodes, *names) for names in (("square",), _POWER, _PRODUCT))
    if square is not None:
        return square.args[0]
    if power is not None and power.args[1:] == (2,):
        return power.args[0]
    return product.args[0] if product is not None and product.args[0] == product.args[-1] else None
