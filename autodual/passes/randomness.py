"""Refuse what makes a model a random function: dropout in training mode and calls of the random number generator."""

from __future__ import annotations

from torch import nn

import dual_layers
from autodual import operators
from autodual.errors import TraceError
from autodual.graph import Graph, ModuleRef, Node


def refuse_random_numbers(graph: Graph, model: nn.Module) -> None:
    """Check every node.

    Raises:
        TraceError: a node is random; the message names it, its line and what to do.
    """
    for node in graph.nodes:
        if node.kind == "call" and _is_random(node, model):
            raise TraceError(f"{node.origin}: {_advice(node, model)}")


def _is_random(node: Node, model: nn.Module) -> bool:
    if not isinstance(node.operator, ModuleRef):
        return operators.draws_random_numbers(node.operator, node.args, dict(node.kwargs))
    module = model.get_submodule(node.operator.path)
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0


def _advice(node: Node, model: nn.Module) -> str:
    if isinstance(node.operator, ModuleRef):
        what = f'dropout "{node.operator.path}" ({type(model.get_submodule(node.operator.path)).__name__})'
    else:
        what = dual_layers.spelling(node.operator)
        if "dropout" not in operators.short_name(node.operator):
            return f"{what} draws random numbers; move them out of forward, or pass them in as an argument"
    return f"{what} is in training mode, where it is random; call net.eval()"
