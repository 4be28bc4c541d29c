"""Spell batch norm in training mode as what it computes: statistics of the batch, then an affine map."""

from __future__ import annotations

import inspect
import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autodual.graph import Graph, ModuleRef, Node, Ref

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def scale_and_shift(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Return the map ``x * scale + shift`` that batch norm applies in training mode, differentiable in everything.

    The statistics are mean and *biased* variance over all axes but the second (errata 13).
    """
    axes = [axis for axis in range(x.dim()) if axis != 1]
    variance, mean = torch.var_mean(x, axes, correction=0)
    scale = (variance + eps).rsqrt() * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - mean * scale
    shape = (-1, *[1] * (x.dim() - 2))
    return scale.view(shape), shift.view(shape)


def use_batch_statistics(graph: Graph, model: nn.Module) -> Graph:
    """Rewrite every batch norm that uses the batch's own statistics; running statistics are left alone.

    Nodes that hold statistics are marked ``batch_statistics``: they are held constant over a region, which makes a
    bound an estimate.
    """
    nodes: list[Node] = []
    for node in graph.nodes:
        nodes.extend(_rewrite(node, model))
    return replace(graph, nodes=tuple(nodes))


def _rewrite(node: Node, model: nn.Module) -> list[Node]:
    if isinstance(node.operator, ModuleRef):
        module = model.get_submodule(node.operator.path)
        if isinstance(module, _KINDS) and (module.training or module.running_mean is None):
            return _spell_module(node, module, node.operator.path)
    elif node.operator is F.batch_norm:
        given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs).arguments
        if given.get("training", False) is not False:
            return _spell(node, given["input"], given.get("weight"), given.get("bias"), given.get("eps", 1e-5))
    return [node]


def _spell_module(node: Node, module: nn.Module, path: str) -> list[Node]:
    nodes, refs = [], {}
    for name in ("weight", "bias"):
        if getattr(module, name) is not None:
            full = f"{path}.{name}" if path else name
            nodes.append(Node(f"{node.name}_{name}", "attribute", full, origin=node.origin))
            refs[name] = Ref(nodes[-1].name)
    value = node.args[0] if node.args else node.kwargs["input"]
    return nodes + _spell(node, value, refs.get("weight"), refs.get("bias"), module.eps)


def _spell(node: Node, value: Any, weight: Any, bias: Any, eps: float) -> list[Node]:
    arguments = (value, weight, bias, eps)
    scale, shift = (
        Node(f"{node.name}_{name}", "call", scale_and_shift, arguments, item=item, origin=node.origin, batch_statistics=True)
        for item, name in enumerate(("scale", "shift"))
    )
    scaled = Node(f"{node.name}_scaled", "call", operator.mul, (value, Ref(scale.name)), origin=node.origin)
    return [scale, shift, scaled, replace(node, operator=operator.add, args=(Ref(scaled.name), Ref(shift.name)), kwargs={})]
