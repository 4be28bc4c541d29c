"""Rewrite mutations as operators that return new values, or refuse them where memory may be shared.

A traced model that runs ``x.relu_()`` and goes on with ``x`` means the new value, although no edge of the trace says
so. This pass walks through the nodes in the order in which the model ran them. It keeps, for every tensor, the set of
tensors that may share its memory. A mutation becomes its out-of-place operator, and from there on

* the mutated tensor, and every name for that very tensor, means the new value;
* a tensor that was indexed to give the mutated one (``y[:, 0].mul_(3)``) means itself with that part replaced;
* other views of it that are certain to be views are taken again from the new value;
* where anything else that may share the memory is used later, the rewrite is refused: it might be a copy or a view.
"""

from __future__ import annotations

import functools
import operator as python_operator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

import dual_layers
from autodual import operators
from autodual.errors import TraceError
from autodual.graph import Graph, ModuleRef, Node, Ref, substitute
from autodual.isolation import STATE

_MASKS = frozenset(
    {"gt", "lt", "ge", "le", "eq", "ne", "isnan", "isinf", "isfinite", "invert", "logical_not", "logical_and", "bool"}
)


class SharedMemoryError(TraceError):
    """A mutation cannot be rewritten since other values may share the memory; another route may still follow it."""


def functionalize(graph: Graph, model: nn.Module) -> Graph:
    """Rewrite every mutation in a graph.

    Args:
        graph: nodes in the order in which the model ran them, mutations included.
        model: the traced model, for the rules of its leaf modules.

    Returns:
        A graph without mutations that computes the same output.

    Raises:
        TraceError: the model changes its own parameters or buffers, or writes with an operator that has no pure form.
        SharedMemoryError: memory may be shared in a way that the trace does not decide.
    """
    state = _State(graph, model)
    for position, node in enumerate(graph.nodes):
        state.step(position, node)
    return replace(graph, nodes=tuple(state.nodes), output=state.current.get(graph.output, graph.output))


@dataclass
class _State:
    """What is known after some nodes have run. Names are those of the trace; ``current`` says what they mean by now."""

    graph: Graph
    model: nn.Module
    nodes: list[Node] = field(default_factory=list)
    current: dict[str, str] = field(default_factory=dict)
    same: dict[str, set[str]] = field(default_factory=dict)  # names of one and the same tensor
    shared: dict[str, set[str]] = field(default_factory=dict)  # names of tensors that may share memory
    tensors: set[str] = field(default_factory=set)
    last_use: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for position, node in enumerate(self.graph.nodes):
            self.last_use.update(dict.fromkeys(node.parents, position))
        self.last_use[self.graph.output] = len(self.graph.nodes)

    def step(self, position: int, node: Node) -> None:
        """Run one node of the trace."""
        pure = _pure(node)
        written = node.args[0].name if pure is not None and isinstance(node.args[0], Ref) else None
        self.emit(node if pure is None else pure)
        if written is not None and written in self.tensors:
            self.tensors.add(node.name)
            self.write(position, node, written)
        else:  # an augmented assignment of a number makes a new number
            self.note_memory(node)

    def emit(self, node: Node) -> None:
        """Append a node, with its arguments as they are by now."""
        args, kwargs = substitute((node.args, dict(node.kwargs)), lambda ref: Ref(self.current.get(ref.name, ref.name)))
        self.nodes.append(replace(node, args=args, kwargs=kwargs))

    def note_memory(self, node: Node) -> None:
        """Record which tensors a new one may share its memory with."""
        parents = [name for name in node.parents if name in self.tensors]
        self.same[node.name] = {node.name}
        self.shared[node.name] = {node.name}
        if node.kind != "call" or operators.returns_tensor(node.operator, node.args, bool(parents)):
            self.tensors.add(node.name)
            if node.kind == "call" and not self.is_copy(node) and _may_alias(node, self.model):
                self.share(node.name, parents)

    def is_copy(self, node: Node) -> bool:
        """Whether a call is ``x[index]`` with a list, a mask or a tensor of positions: a copy, not a view."""
        if node.operator is not python_operator.getitem or not isinstance(node.args[0], Ref):
            return False
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return any(isinstance(part, list) or (isinstance(part, Ref) and self.is_many(part.name)) for part in index)

    def is_many(self, name: str) -> bool:
        """Whether an index is certainly no single position, which would make a view."""
        source = self.graph.by_name[name]
        if source.kind != "attribute":
            return source.kind == "call" and operators.short_name(source.operator) in _MASKS
        tensor = self.graph.constants.get(source.operator)
        tensor = functools.reduce(getattr, source.operator.split("."), self.model) if tensor is None else tensor
        return tensor.dim() > 0

    def share(self, name: str, others: list[str]) -> None:
        """Put a tensor into one group of shared memory with others."""
        group = set.union(self.shared[name], *(self.shared[other] for other in others))
        for member in group:
            self.shared[member] = group

    def write(self, position: int, node: Node, written: str) -> None:
        """Give the names of the mutated tensor, and of what shares its memory, their new meaning."""
        self.refuse_unknown(node, written)
        if operators.changes_shape(node.operator) and self.shared[written] != self.same[written]:
            raise SharedMemoryError(
                f"{node.origin}: {dual_layers.spelling(node.operator)} changes the shape of a shared tensor"
            )
        self.same[node.name], self.shared[node.name] = {node.name}, {node.name}
        self.share(node.name, [written])
        group = self.same[written] | {node.name}
        for name in group:
            self.same[name] = group
        settled = self.rename(written, node.name) | self.write_back(node, written)
        for view in self.graph.nodes[:position]:
            name = view.name
            if name not in self.shared[written] or name in settled:
                continue
            if view.kind == "call" and operators.is_view(view.operator, view.args) and view.parents[0] in settled:
                fresh = self.fresh_name(name)
                self.emit(replace(view, name=fresh))
                settled |= self.rename(name, fresh)
            elif self.last_use.get(name, -1) > position:
                raise SharedMemoryError(
                    f"{node.origin}: {dual_layers.spelling(node.operator)} changes a tensor whose memory may be shared with "
                    f'"{name}" ({view.origin}), which is used afterwards; write it without changing the tensor in place'
                )

    def write_back(self, node: Node, written: str) -> set[str]:
        """Replace the part of an indexed tensor that was mutated, up to the tensor that owns the memory."""
        settled: set[str] = set()
        view = self.graph.by_name.get(self.origin_of(written), node)
        while operators.is_basic_index(view.operator, view.args) and view.parents[0] in self.tensors:
            base = view.args[0].name
            fresh = self.fresh_name(base)
            value = Ref(self.current.get(view.name, view.name))
            assign = Node(fresh, "call", operators.assign(), (Ref(base), view.args[1], value), origin=node.origin)
            self.emit(assign)
            settled |= self.rename(base, fresh)
            view = self.graph.by_name[self.origin_of(base)]
        return settled

    def origin_of(self, name: str) -> str:
        """Return the first name of a tensor: what it was before anything was written into it."""
        return next(node.name for node in self.graph.nodes if node.name in self.same[name])

    def rename(self, name: str, meaning: str) -> set[str]:
        """Let all names of a tensor mean another node's value."""
        for each in self.same[name]:
            self.current[each] = meaning
        return set(self.same[name])

    def fresh_name(self, name: str) -> str:
        """Return a name that no node has."""
        taken = {node.name for node in self.nodes} | self.graph.by_name.keys()
        return next(candidate for n in range(1, len(taken) + 2) if (candidate := f"{name}_new{n}") not in taken)

    def refuse_unknown(self, node: Node, written: str) -> None:
        """Refuse to change the model's own tensors, and tensors whose elements may share memory with each other."""
        for name in self.shared[written]:
            source = self.graph.by_name[name]
            if source.kind == "attribute" and source.operator not in self.graph.constants:
                raise TraceError(f"{node.origin}: {STATE.format(source.operator)}")
            if name != node.name and operators.is_overlapping_view(source.operator) and self.reaches(written, name):
                raise SharedMemoryError(
                    f"{node.origin}: {dual_layers.spelling(node.operator)} changes an expanded tensor, in which one element "
                    "of memory stands for several; clone it first"
                )

    def reaches(self, name: str, ancestor: str) -> bool:
        """Whether a tensor was made from another one."""
        todo, seen = [name], set()
        while todo:
            here = todo.pop()
            if here == ancestor:
                return True
            if here not in seen:
                seen.add(here)
                todo.extend(self.graph.by_name[here].parents)
        return False


def _pure(node: Node) -> Node | None:
    """Return the node that computes the new value without writing it, or None when the node writes nothing."""
    if node.kind != "call":
        return None
    try:
        call = operators.out_of_place(node.operator, node.args, dict(node.kwargs))
    except NotImplementedError as problem:
        raise SharedMemoryError(f"{node.origin}: {problem}; write it without changing a tensor in place") from None
    if call is not None and not isinstance(node.args[0] if node.args else None, Ref):
        raise SharedMemoryError(
            f"{node.origin}: pass the tensor that {dual_layers.spelling(node.operator)} changes by position"
        )
    return None if call is None else replace(node, operator=call[0], args=call[1], kwargs=call[2])


def _may_alias(node: Node, model: nn.Module) -> bool:
    """Whether a call's result may share memory with its arguments: unless a rule says no, it may."""
    if operators.is_view(node.operator, node.args) or node.operator is getattr:
        return True
    known: Any = node.operator
    if operators.ignores_values(known, node.args):  # a new tensor of the same shape, such as zeros_like
        return False
    if isinstance(known, ModuleRef):
        known = model.get_submodule(known.path)
    rule = None if known is None else dual_layers.lookup(known)
    return rule is None or rule.facts.aliases
