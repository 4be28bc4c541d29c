"""The primal walk: evaluate the graph at a point."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from autodual.errors import AutoDualError, SpecificationError
from autodual.graph import Graph, ModuleRef, Node, Ref, substitute
from dual_layers.contract import Call


def evaluate(graph: Graph, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Evaluate every node.

    Args:
        graph: the traced model.
        model: where parameters, buffers and leaf modules are looked up.
        inputs: a value for each input node, by name of the model's argument.

    Returns:
        The value of every node by name.

    Raises:
        SpecificationError: an operator rejects its inputs; the message names the node and the model's source line.
    """
    values: dict[str, Any] = {}
    for node in graph.nodes:
        values[node.name] = _value(node, graph, model, inputs, values)
    return values


class Trajectory(Mapping[str, Any]):
    """The values of a graph's nodes, each computed, with what it depends on, when first asked for.

    Whoever asks first, gradients are recorded where they were to be recorded at the beginning. Arguments as for ``evaluate``.
    """

    def __init__(self, graph: Graph, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        self.graph, self.model, self.inputs = graph, model, inputs
        self._values: dict[str, Any] = {}
        self._differentiable = torch.is_grad_enabled()

    def __getitem__(self, name: str) -> Any:
        """Return a node's value."""
        stack = [name]
        while name not in self._values:
            node = self.graph.by_name[stack[-1]]
            missing = [parent for parent in node.parents if parent not in self._values]
            if not missing:
                with torch.set_grad_enabled(self._differentiable):
                    self._values[stack.pop()] = _value(node, self.graph, self.model, self.inputs, self._values)
            stack.extend(missing)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        """Name all nodes."""
        return iter(self.graph.by_name)

    def __len__(self) -> int:
        """Count all nodes."""
        return len(self.graph.nodes)


def _value(node: Node, graph: Graph, model: nn.Module, inputs: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    if node.kind == "input":
        return inputs[node.operator]
    if node.kind == "attribute":
        return graph.constants[node.operator] if node.operator in graph.constants else _attribute(model, node.operator)
    return _run(node, model, values)


def operator_of(node: Node, model: nn.Module) -> Any:
    """Return the module, function or method name that a call node runs."""
    return model.get_submodule(node.operator.path) if isinstance(node.operator, ModuleRef) else node.operator


def is_attribute_access(node: Node) -> bool:
    """Whether the node reads an attribute such as ``x.shape``."""
    return node.operator is builtins.getattr


def _run(node: Node, model: nn.Module, values: Mapping[str, Any]) -> Any:
    def value_of(ref: Ref) -> Any:
        return values[ref.name]

    call = Call(operator_of(node, model), substitute(node.args, value_of), substitute(node.kwargs, value_of), node.item)
    try:
        return call()
    except AutoDualError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise SpecificationError(
            f'the model does not accept these inputs: node "{node.name}" at {node.origin}: {error}'
        ) from error


def _attribute(model: nn.Module, path: str) -> Any:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    return value
