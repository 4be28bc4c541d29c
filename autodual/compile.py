"""Bind every perturbed node of a graph to its dual layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from autodual.errors import SpecificationError, UnsupportedOperatorError
from autodual.graph import Graph, ModuleRef, Node, Ref, references, substitute
from autodual.leaves import is_leaf
from autodual.primal import is_attribute_access, operator_of
from dual_layers import UNKNOWN, Call, DualLayer, Slot, is_shape_query, lookup, spelling
from dual_layers.shape import SHAPE_ATTRIBUTES

ADVICE = "register a rule: docs/adding_an_operator.md"


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
    """

    graph: Graph
    sources: tuple[str, ...]
    rules: Mapping[str, type[DualLayer]]
    parents: Mapping[str, tuple[str, ...]]
    tied: frozenset[str]

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
        node, rule = self.graph.by_name[name], self.rules[name]
        operator = operator_of(node, model)
        if lookup(operator) is not rule or (isinstance(operator, nn.Module) and not is_leaf(operator)):
            raise SpecificationError(
                f'the module behind node "{name}" at {node.origin} was replaced: call autodual.certify again'
            )
        return rule(_call(node, operator, self.parents[name], values.__getitem__))


def compile_graph(graph: Graph, model: nn.Module, sources: tuple[str, ...]) -> Program:
    """Find the rule of every node that depends on the perturbed inputs.

    Args:
        graph: the traced model.
        model: where leaf modules are looked up.
        sources: names of the perturbed input nodes.

    Returns:
        The program that the walks interpret.

    Raises:
        UnsupportedOperatorError: lists every node without a rule, or whose call a rule refuses.
    """
    perturbed, data, tied = set(sources), {node.name for node in graph.inputs}, set()
    rules: dict[str, type[DualLayer]] = {}
    parents: dict[str, tuple[str, ...]] = {}
    unsupported = []
    for node in graph.nodes:
        if node.kind != "call" or _is_shape_query(node, perturbed):
            continue
        if data.intersection(node.parents):
            data.add(node.name)
        own = tuple(parent for parent in node.parents if parent in perturbed)
        if not own or node.batch_statistics:
            continue
        perturbed.add(node.name)
        parents[node.name] = own
        if any(parent in data and parent not in perturbed for parent in node.parents):
            tied.add(node.name)
        operator = operator_of(node, model)
        rule = lookup(operator)
        reason = ADVICE if rule is None else rule.refuse(_call(node, operator, own, lambda _: UNKNOWN))
        if rule is None or reason is not None:
            unsupported.append((spelling(operator), node.name, node.origin, reason))
        else:
            rules[node.name] = rule
    if unsupported:
        raise UnsupportedOperatorError(unsupported)
    return Program(graph, sources, rules, parents, frozenset(tied))


def _call(node: Node, operator: Any, parents: tuple[str, ...], constant: Any) -> Call:
    def place(ref: Ref) -> Any:
        return Slot(parents.index(ref.name)) if ref.name in parents else constant(ref.name)

    return Call(operator, substitute(node.args, place), substitute(node.kwargs, place), node.item)


def _is_shape_query(node: Node, perturbed: set[str]) -> bool:
    """Whether only the shape of perturbed values matters; ``full_like(x, y)`` copies the values of its second argument."""
    if is_attribute_access(node):
        return node.args[1] in SHAPE_ATTRIBUTES
    if isinstance(node.operator, ModuleRef) or not is_shape_query(node.operator):
        return False
    return perturbed.isdisjoint(references((node.args[1:], node.kwargs)))
