"""Where an operator has no value: an error at the centre of a region, a line in the report elsewhere in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autodual.bounds.run import Run
from autodual.compile import Program
from autodual.errors import SpecificationError
from autodual.graph import Node
from autodual.layout import Layout
from autodual.primal import evaluate, operator_of
from dual_layers import Interval, Relaxed, spelling


def check_centre(run: Run) -> None:
    """Check that every operator has a value at the regions' centres.

    Raises:
        SpecificationError: names the node, its source line, the value and the example.
    """
    for name in run.program.relaxed:
        layer = run.layers[name]
        if type(layer).outside is Relaxed.outside:
            continue
        points = tuple(Interval(value.detach(), value.detach()) for value in run.parents(name))
        bad = (layer.outside(*points) & ~run.values[name].isfinite()).expand_as(run.values[name])
        if bad.any():
            example = int(run.examples(name, bad).any(1).nonzero()[0])
            node = run.program.graph.by_name[name]
            text = failure_at(node, run.program, run.model, run.layouts, run.values, example)
            raise SpecificationError(f"the centre of the region of example {example} is outside a domain: {text}")


def first_failure(
    program: Program, model: nn.Module, layouts: Mapping[str, Layout], arguments: Mapping[str, Any], example: int
) -> str:
    """Say which node of an example is the first whose value is not finite, or nothing if there is none."""
    values = evaluate(program.graph, model, arguments)
    for name in program.rules:
        own, *inputs = (_of(layouts, values, each, example).isfinite().all() for each in (name, *program.parents[name]))
        if not own and all(inputs):
            return failure_at(program.graph.by_name[name], program, model, layouts, values, example)
    return ""


def failure_at(
    node: Node, program: Program, model: nn.Module, layouts: Mapping[str, Layout], values: Mapping[str, Any], example: int
) -> str:
    """Describe a node's first value that is not finite, and the value it was computed from if that is one."""
    value = _of(layouts, values, node.name, example)
    number = int((~value.isfinite()).nonzero()[0])
    parents = [_of(layouts, values, parent, example) for parent in program.parents[node.name]]
    source = f" at {parents[0][number]:.6g}" if len(parents) == 1 and parents[0].shape == value.shape else ""
    return f"{spelling(operator_of(node, model))} is {value[number]:.6g}{source}, {_place(node)}"


def violations(run: Run) -> tuple[str, ...]:
    """List, example by example, where a region leaves an operator's domain, or a value may leave the floats.

    Only the first place on each way is listed: one whose inputs are bounded and whose output is not.

    Args:
        run: a run that has bounded its output; where methods took turns, those examples count that none has settled.
    """
    run, numbers = (run, None) if run.remaining is None else run.remaining
    found: list[tuple[int, str]] = []
    ancestors = set() if numbers is not None and not len(numbers) else run.needed(run.program.graph.output)
    for name in run.program.relaxed:
        parents = run.program.parents[name]
        if name in ancestors:
            unbounded = ~run.examples(name, _finite(run, name))
            reached = torch.stack([run.examples(parent, _finite(run, parent)).all(1) for parent in parents]).all(0)
            for example in (unbounded.any(1) & reached).nonzero()[:, 0].tolist():
                number = example if numbers is None else int(numbers[example])
                found.append((number, f"example {number}: {_violation(run, name, example, unbounded[example])}"))
    return tuple(text for _, text in sorted(found, key=lambda pair: pair[0]))


def _violation(run: Run, name: str, example: int, unbounded: Tensor) -> str:
    """Describe a node that has no bounds: what its input may be, of the first element to blame where elements correspond."""
    layer, node, parents = run.layers[name], run.program.graph.by_name[name], run.program.parents[name]
    boxes = tuple(run.hull(parent) for parent in parents)
    outside = layer.outside(*boxes).expand_as(run.values[name])
    seen = []
    for parent, box in zip(parents, boxes, strict=True):
        lower, upper = (run.examples(parent, end.detach())[example] for end in (box.lower, box.upper))
        if lower.shape == unbounded.shape:
            lower, upper = lower[unbounded][:1], upper[unbounded][:1]
        seen.append(f"[{lower.min():.6g}, {upper.max():.6g}]")
    what = "which leaves its domain" if run.examples(name, outside)[example].any() else "where it is not bounded"
    return f"the input of {spelling(operator_of(node, run.model))} may lie in {' and '.join(seen)}, {what}, {_place(node)}"


def _finite(run: Run, name: str) -> Tensor:
    box = run.hull(name)
    return box.lower.isfinite() & box.upper.isfinite()


def _of(layouts: Mapping[str, Layout], values: Mapping[str, Any], name: str, example: int) -> Tensor:
    value, layout = values[name].detach(), layouts[name]
    return layout.examples(value, value.shape[layout.axis] // layout.factor)[example]


def _place(node: Node) -> str:
    return f'node "{node.name}" at {node.origin}'
