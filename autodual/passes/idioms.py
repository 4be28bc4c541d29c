"""Recognise operators that people write out: divisions by the root mean square, averages.

Not ``exp(z) / sum(exp(z))``: softmax has a value where the exponentials overflow, and the model has none.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from autodual.graph import Graph, ModuleRef, Node, Ref
from autodual.primal import operator_of
from dual_layers import Call, lookup
from dual_layers.attention import average
from dual_layers.layer_norms import divided_by_size
from dual_layers.softmax import DualSoftmax
from dual_layers.spellings import spellings


def _keys(*names: str, methods: tuple[str, ...] = (), symbols: tuple[Any, ...] = ()) -> frozenset[Any]:
    """Collect the objects that stand for one operator; another function of the same name is another operator."""
    return frozenset({*spellings(*names), *methods, *symbols})


_PRODUCT = _keys("mul", "multiply", methods=("__mul__", "__rmul__"), symbols=(operator.mul,))
_QUOTIENT = _keys("div", "divide", "true_divide", methods=("__truediv__",), symbols=(operator.truediv,))
_SUM = _keys("add", methods=("__add__", "__radd__"), symbols=(operator.add,))
_POWER = _keys("pow", methods=("__pow__",), symbols=(operator.pow,))
_MATMUL = _keys("matmul", "bmm", methods=("__matmul__",), symbols=(operator.matmul,))
_MEAN, _SQUARE, _ROOT, _INVERSE_ROOT = _keys("mean"), _keys("square"), _keys("sqrt"), _keys("rsqrt")

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
    pairs = [node.args[:2], node.args[1::-1]] if _is(node, _PRODUCT) else [node.args] if _is(node, _QUOTIENT) else []
    for value, factor in pairs:
        total = _added(_under_root(factor, nodes, inverse=_is(node, _PRODUCT)), nodes)
        mean = None if total is None else _over_axes(_node(total[0], nodes, _MEAN))
        if mean is not None and value == _squared(mean[0], nodes):
            return divided_by_size, (value, mean[1], total[1])
    return None


def _average(node: Node, nodes: Nodes, model: nn.Module) -> Replacement | None:
    """Read ``softmax(scores, -1) @ values``, dropout between the two."""
    if not _is(node, _MATMUL) or not isinstance(node.args[0], Ref):
        return None
    weights = nodes[node.args[0].name]
    while (source := _handed_on(weights, model)) is not None:
        weights = nodes[source.name]
    known = weights.kind == "call" and lookup(operator_of(weights, model)) is DualSoftmax
    last = known and DualSoftmax(Call(operator_of(weights, model), weights.args, weights.kwargs)).arguments.dim == -1
    return (average, node.args) if last else None


def _handed_on(node: Node, model: nn.Module) -> Ref | None:
    """Return what a module hands on as it is, dropout being inactive; None if it does something."""
    if not isinstance(node.operator, ModuleRef):
        return None
    module, given = operator_of(node, model), (*node.args, *node.kwargs.values())
    idle = any(isinstance(module, kind) and type(module).forward is kind.forward for kind in (nn.Dropout, nn.Identity))
    return given[0] if idle and len(given) == 1 and isinstance(given[0], Ref) else None


def _is(node: Node, keys: frozenset[Any]) -> bool:
    """Whether a node calls this operator on positional arguments and nothing else; the mean's may be named."""
    plain = node.kind == "call" and not isinstance(node.operator, ModuleRef) and not node.batch_statistics and node.args
    return bool(plain) and _among(node.operator, keys) and (not node.kwargs or keys is _MEAN)


def _among(target: Any, keys: frozenset[Any]) -> bool:
    return target.__hash__ is not None and target in keys


def _node(value: Any, nodes: Nodes, keys: frozenset[Any]) -> Node | None:
    """Return the node behind a value if it calls one of these operators."""
    found = nodes.get(value.name) if isinstance(value, Ref) else None
    return found if found is not None and _is(found, keys) else None


def _under_root(value: Any, nodes: Nodes, *, inverse: bool) -> Any:
    """Return ``c`` of ``sqrt(c)`` or ``c ** 0.5``, with ``inverse`` of ``rsqrt(c)`` or ``c ** -0.5``; None if it is neither."""
    root, power = _node(value, nodes, _INVERSE_ROOT if inverse else _ROOT), _node(value, nodes, _POWER)
    if root is not None:
        return root.args[0]
    return power.args[0] if power is not None and power.args[1:] == ((-0.5,) if inverse else (0.5,)) else None


def _added(value: Any, nodes: Nodes) -> tuple[Any, float] | None:
    """Return the two summands of a value and a positive number."""
    node = _node(value, nodes, _SUM)
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
    square, power, product = (_node(value, nodes, keys) for keys in (_SQUARE, _POWER, _PRODUCT))
    if square is not None:
        return square.args[0]
    if power is not None and power.args[1:] == (2,):
        return power.args[0]
    return product.args[0] if product is not None and product.args[0] == product.args[-1] else None
