"""The traced model as a frozen graph of operator calls, in topological order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import networkx as nx


@dataclass(frozen=True)
class Ref:
    """The place of another node's value among a node's arguments."""

    name: str


@dataclass(frozen=True)
class ModuleRef:
    """A leaf module of the traced model, by its path, so that graph and model may be copied and moved."""

    path: str


@dataclass(frozen=True)
class Node:
    """One step of the traced model.

    Attributes:
        name: unique in its graph.
        kind: ``input`` (an argument of forward), ``attribute`` (a parameter, buffer or constant) or ``call``.
        operator: for ``call`` a ``ModuleRef``, a function or a tensor method's name; for ``attribute`` the dotted path
            in the model; for ``input`` the name of the argument of ``forward``.
        args: positional arguments, with ``Ref`` for values of other nodes, nested as the user wrote them.
        kwargs: keyword arguments, likewise.
        item: which item of the operator's tuple this node stands for, or None.
        origin: the user's source line ``file.py:12``, or the module's path where the model has no code of its own.
        batch_statistics: the value is computed from the clean batch and held constant over the region (a heuristic).
    """

    name: str
    kind: Literal["input", "attribute", "call"]
    operator: ModuleRef | Callable[..., Any] | str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    item: int | None = None
    origin: str = ""
    batch_statistics: bool = False

    @cached_property
    def parents(self) -> tuple[str, ...]:
        """Names of the nodes whose values this one uses, each once, in order of appearance."""
        return tuple(dict.fromkeys(references((self.args, self.kwargs))))


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order, the inputs among them and the output's name.

    ``constants`` holds tensors that the trace met outside the model's parameters and buffers, by attribute path.
    ``shapes`` holds, by input node, the sizes the graph is specialised to, None where any size will do; an input that is
    not listed may have any shape.
    """

    nodes: tuple[Node, ...]
    output: str
    constants: Mapping[str, Any] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> dict[str, Node]:
        """Look nodes up by name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def inputs(self) -> tuple[Node, ...]:
        """The graph's inputs, in the order of the model's arguments."""
        return tuple(node for node in self.nodes if node.kind == "input")

    def to_networkx(self) -> nx.DiGraph:
        """View the graph as a networkx DiGraph: nodes carry their ``Node``, edges follow the data."""
        view = nx.DiGraph()
        for node in self.nodes:
            view.add_node(node.name, node=node)
            view.add_edges_from((parent, node.name) for parent in node.parents)
        return view


def references(value: Any) -> list[str]:
    """List the names of the nodes that a nested argument refers to."""
    if isinstance(value, Ref):
        return [value.name]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif isinstance(value, slice):
        value = [value.start, value.stop, value.step]
    return [name for item in value for name in references(item)] if isinstance(value, (tuple, list)) else []


def substitute(value: Any, replace: Callable[[Ref], Any]) -> Any:
    """Rebuild a nested argument with every ``Ref`` replaced."""
    if isinstance(value, Ref):
        return replace(value)
    if isinstance(value, (tuple, list)):
        items = [substitute(item, replace) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        return {key: substitute(item, replace) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(substitute(part, replace) for part in (value.start, value.stop, value.step)))
    return value


def plain_arguments(value: Any) -> Any:
    """Rebuild nested arguments from plain tuples, lists and dicts: fx' immutable ones are not accepted everywhere."""
    if isinstance(value, tuple):
        items = [plain_arguments(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [plain_arguments(item) for item in value]
    if isinstance(value, dict):
        return {key: plain_arguments(item) for key, item in value.items()}
    return value
