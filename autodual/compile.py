"""Bind every perturbed node of a graph to its dual layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from autodual.errors import SpecificationError, UnsupportedOperatorError
from autodual.expand import Expansion
from autodual.graph import Graph, ModuleRef, Node, Ref, references, substitute
from autodual.leaves import is_leaf
from autodual.primal import is_attribute_access, operator_of
from dual_layers import Call, Composite, DualLayer, Slot, cases, choose, is_held, is_shape_query, nearest, spelling
from dual_layers.checks import RuleRefusal
from dual_layers.contract import Unknown
from dual_layers.shape import SHAPE_ATTRIBUTES

# These fit their first argument to another tensor, of which shape, dtype or device matter: ``mask.to(x)`` is a constant.
_FITTED = frozenset({"to", "type_as", "view_as", "reshape_as", "expand_as"}) | {
    torch.ops.aten.to.other, torch.ops.aten.type_as.default, torch.ops.aten.view_as.default,
    torch.ops.aten.reshape_as.default, torch.ops.aten.expand_as.default,
}  # fmt: skip
ADVICE = "register a rule: docs/adding_an_operator.md"
_ARITHMETIC = "it computes with truth values as with numbers: write &, | and ~"


@dataclass(frozen=True)
class Enclosure:
    """A composite call that was replaced by its parts: its node, its rule and the perturbed nodes it reads."""

    node: Node
    rule: type[Composite]
    parents: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """A graph whose perturbed nodes have rules.

    Attributes:
        graph: the traced model.
        sources: names of the input nodes that are perturbed.
        rules: the rule of every perturbed call node, in topological order.
        parents: for each of those, the perturbed nodes it reads, in slot order.
        tied: nodes whose constant arguments depend on the data (a fixed input, batch statistics), so that their
            dual differs from example to example.
        enclosures: for the last part of a composite operator, the calls that it stands for: their rules may bound it more
            tightly by intervals than its parts do.
    """

    graph: Graph
    sources: tuple[str, ...]
    rules: Mapping[str, type[DualLayer]]
    parents: Mapping[str, tuple[str, ...]]
    tied: frozenset[str]
    enclosures: Mapping[str, tuple[Enclosure, ...]] = field(default_factory=dict)

    @cached_property
    def relaxed(self) -> tuple[str, ...]:
        """Names of the nonlinear perturbed nodes, in topological order."""
        return tuple(name for name, rule in self.rules.items() if not rule.facts.affine)

    @cached_property
    def has_batch_statistics(self) -> bool:
        """Whether some node depends on the whole clean batch: then bounds are a training heuristic."""
        return any(node.batch_statistics for node in self.graph.nodes)

    def bind(self, name: str, model: nn.Module, values: Mapping[str, Any]) -> DualLayer:
        """Instantiate a node's dual layer for one run: constants filled in, slots for what is perturbed.

        Raises:
            SpecificationError: the module behind the node was replaced since the model was traced.
        """
        return _bound(self.graph.by_name[name], self.rules[name], self.parents[name], model, values)

    def bind_enclosures(self, name: str, model: nn.Module, values: Mapping[str, Any]) -> tuple[DualLayer, ...]:
        """Instantiate the composite calls that a node is the last part of."""
        return tuple(_bound(each.node, each.rule, each.parents, model, values) for each in self.enclosures.get(name, ()))


def _bound(
    node: Node, rule: type[DualLayer], parents: tuple[str, ...], model: nn.Module, values: Mapping[str, Any]
) -> DualLayer:
    operator = operator_of(node, model)
    if rule not in cases(operator) or (isinstance(operator, nn.Module) and not is_leaf(operator)):
        raise SpecificationError(
            f'the module behind node "{node.name}" at {node.origin} was replaced, or has a forward hook that it had not '
            "(every module has, within torch's FlopCounterMode and the like): remove it, or call autodual.certify again"
        )
    return rule(_call(node, operator, parents, values.__getitem__))


def compile_graph(graph: Graph, model: nn.Module, sources: tuple[str, ...], values: Mapping[str, Any] | None = None) -> Program:
    """Find the rule of every node that depends on the perturbed inputs.

    Args:
        graph: the traced model.
        model: where leaf modules are looked up.
        sources: names of the perturbed input nodes.
        values: a value for every node; sizes are read from them when composite operators are replaced by their parts.
            Without values they stay, which is enough to see what is supported.

    Returns:
        The program that the walks interpret.

    Raises:
        UnsupportedOperatorError: lists every node without a rule, or whose call a rule refuses.
    """
    perturbed, data, tied = set(sources), {node.name for node in graph.inputs}, set()
    rules: dict[str, type[DualLayer]] = {}
    parents: dict[str, tuple[str, ...]] = {}
    enclosures: dict[str, tuple[Enclosure, ...]] = {}
    expansion = None if values is None else Expansion(model, values)
    unsupported, nodes, waiting = [], [], list(reversed(graph.nodes))
    while waiting:
        node = waiting.pop() if expansion is None else _copying(waiting.pop())
        nodes.append(node)
        if node.kind != "call" or _is_shape_query(node, perturbed):
            continue
        if data.intersection(node.parents):
            data.add(node.name)
        own = tuple(parent for parent in node.parents if parent in perturbed)
        if not own or node.batch_statistics or is_held(node.operator):
            continue
        perturbed.add(node.name)
        parents[node.name] = own
        if any(parent in data and parent not in perturbed for parent in node.parents):
            tied.add(node.name)
        operator = operator_of(node, model)
        rule, reason = choose(_judged(node, operator, own, values))
        if _is_truth(values, node.name) and node.name not in enclosures and rule is not None:
            rule, reason = (rule, "") if issubclass(rule, Composite) or rule.facts.monotone else (None, _ARITHMETIC)
        if rule is None:
            unsupported.append((spelling(operator), node.name, node.origin, reason or _advice(operator)))
        elif expansion is not None and issubclass(rule, Composite):
            nodes.pop()
            try:
                waiting += reversed(expansion.parts(node, rule, operator))
            except RuleRefusal as refusal:
                unsupported.append((spelling(operator), node.name, node.origin, str(refusal)))
            enclosures[node.name] = (*enclosures.get(node.name, ()), Enclosure(node, rule, own))
        else:
            rules[node.name] = rule
    if unsupported:
        raise UnsupportedOperatorError(unsupported)
    constants = graph.constants if expansion is None else {**graph.constants, **expansion.constants}
    whole = replace(graph, nodes=tuple(nodes), constants=constants)
    return Program(whole, sources, rules, parents, frozenset(tied), enclosures)


def _advice(operator: Any) -> str:
    close = nearest(operator)
    return f"the nearest supported: {', '.join(close)}; or {ADVICE}" if close else ADVICE


def _is_truth(values: Mapping[str, Any] | None, name: str) -> bool | None:
    """Whether a node of the model gives truth values, where that is known."""
    value = None if values is None else values.get(name)
    return value.dtype == torch.bool if isinstance(value, Tensor) else None


def _copying(node: Node) -> Node:
    """Write ``view`` as ``reshape``: a composition's parts may lie in memory in another order than the operator's result."""
    is_view = node.operator == "view" and not node.kwargs and not isinstance(node.args[1], torch.dtype)
    return replace(node, operator="reshape") if is_view else node


def _judged(node: Node, operator: Any, parents: tuple[str, ...], values: Mapping[str, Any] | None) -> Call:
    def place(ref: Ref) -> Any:
        truth = _is_truth(values, ref.name)
        return Slot(parents.index(ref.name), truth) if ref.name in parents else Unknown(truth)

    return Call(operator, substitute(node.args, place), substitute(node.kwargs, place), node.item)


def _call(node: Node, operator: Any, parents: tuple[str, ...], constant: Callable[[str], Any]) -> Call:
    def place(ref: Ref) -> Any:
        return Slot(parents.index(ref.name)) if ref.name in parents else constant(ref.name)

    return Call(operator, substitute(node.args, place), substitute(node.kwargs, place), node.item)


def _is_shape_query(node: Node, perturbed: set[str]) -> bool:
    """Whether only the shape of perturbed values matters; ``full_like(x, y)`` copies the values of its second argument."""
    if is_attribute_access(node):
        return node.args[1] in SHAPE_ATTRIBUTES
    if node.operator in _FITTED:
        return perturbed.isdisjoint(references(node.args[:1]))
    if isinstance(node.operator, ModuleRef) or not is_shape_query(node.operator):
        return False
    return perturbed.isdisjoint(references((node.args[1:], node.kwargs)))
