"""Give uninitialised memory a value that cannot be overlooked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import dual_layers
from autodual import operators
from autodual.graph import Graph, Node

_FACTORIES = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"})


def filled_with_nan(*args: Any, factory: Callable[..., Tensor] | str, **kwargs: Any) -> Tensor:
    """Create a tensor with ``torch.empty`` or a relative of it, and fill it with NaN (integers with zero)."""
    result = getattr(args[0], factory)(*args[1:], **kwargs) if isinstance(factory, str) else factory(*args, **kwargs)
    return torch.full_like(result, torch.nan) if result.is_floating_point() else torch.zeros_like(result)


dual_layers.register_shape_query(filled_with_nan)


def fill_uninitialized(graph: Graph) -> Graph:
    """Replace uninitialised memory by NaN: where all of it is overwritten nothing changes, where not it shows.

    A model may read what happened to be in memory. No bound holds for that, and NaN never certifies anything.
    """
    return replace(graph, nodes=tuple(_fill(node) for node in graph.nodes))


def _fill(node: Node) -> Node:
    if node.kind != "call" or operators.short_name(node.operator) not in _FACTORIES:
        return node
    return replace(node, operator=filled_with_nan, kwargs={"factory": node.operator, **node.kwargs})
