"""Counterexamples: points of a region at which a property is false, replayed on the model and described in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autodual.attacks import Problem, Search, evaluation, functional, pgd
from autodual.network import BoundModule
from autodual.regions import Region

Regions = Region | Mapping[str, Region]
SEED = 0
SHOWN = 5
PRINTED = 16
ATTACKED = 20


@dataclass(frozen=True)
class Counterexample:
    """A point of the region at which the property is false.

    Attributes:
        index: the example it belongs to.
        inputs: the model's input there, a batch of one, in the form of ``x``.
        outputs: what the model returns for it, in evaluation mode.
        claim: what is wrong.
        details: how far and where the input moved.
    """

    index: int
    inputs: Any
    outputs: Tensor
    claim: str
    details: tuple[str, ...]

    def __str__(self) -> str:
        """Return the lines of an error message."""
        return "\n".join([f"  counterexample  example {self.index}: {self.claim}", *(f"    {line}" for line in self.details)])


@torch.no_grad()
def misclassified(net: BoundModule, x: Any, y: Tensor, region: Regions, among: Tensor) -> Counterexample | None:
    """Look for an input of the region with another label than ``y`` and return the one of lowest margin, or None."""
    found = []
    try:
        points = pgd(net.model, x, y, region, restarts=5, generator=_generator(y))
    except NotImplementedError:  # a model without derivatives
        return None
    for index in among.tolist():
        inputs, label = _example(points, index, len(y)), int(y[index])
        outputs = _replay(net, inputs)
        predicted = int(outputs[0].argmax())
        if predicted != label:
            margin = float(outputs[0, label] - outputs[0, predicted])
            claim = f"label {label}, prediction {predicted}, margin {margin:.6g}"
            found.append(
                (margin, Counterexample(index, inputs, outputs, claim, _details(net, x, inputs, outputs, index, len(y))))
            )
    return _worst(found)


@torch.no_grad()
def out_of_limits(
    net: BoundModule, x: Any, region: Regions, rows: Tensor, limits: tuple[Tensor, Tensor], failed: Tensor
) -> Counterexample | None:
    """Look for an input of the region at which a row leaves its limits and return the worst, or None.

    Args:
        net: the model's dual network.
        x: the model's input.
        region: where to look.
        rows: ``(rows, outputs)`` or ``(batch, rows, outputs)``.
        limits: lower and upper, each ``(batch, rows)``.
        failed: which limits to try, ``(2, batch, rows)``.
    """
    found, batch = [], len(limits[0])
    rows = rows.expand(batch, *rows.shape[-2:])
    problem = Problem.build(net.model, x, region)
    for side, row in failed.any(1).nonzero()[:ATTACKED].tolist():
        word, sign = (("lower", 1), ("upper", -1))[side]
        try:
            with evaluation(net.model):
                values, moved = Search(problem, functional(sign * rows[:, row])).run(40, 3, None, _generator(rows))
        except NotImplementedError:  # a model without derivatives
            return None
        index = int((values - sign * limits[side][:, row]).argmin())
        inputs, limit = _example(problem.form(moved), index, batch), float(limits[side][index, row])
        outputs = _replay(net, inputs)
        value = float((outputs.flatten() * rows[index, row]).sum())
        if sign * (value - limit) < 0:
            claim = f"row {row} is {value:.6g}, {word} limit {limit:.6g}"
            details = _details(net, x, inputs, outputs, index, batch)
            found.append((sign * (value - limit), Counterexample(index, inputs, outputs, claim, details)))
    return _worst(found)


def _worst(found: list[tuple[float, Counterexample]]) -> Counterexample | None:
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _generator(like: Tensor) -> torch.Generator:
    """Make the same random starts in every run, so that a failure can be repeated."""
    return torch.Generator(like.device).manual_seed(SEED)


def _replay(net: BoundModule, inputs: Any) -> Tensor:
    """Run the model on one example alone."""
    with evaluation(net.model):
        if isinstance(inputs, dict):
            return net.model(**inputs)
        return net.model(*inputs) if isinstance(inputs, tuple) else net.model(inputs)


def _named(net: BoundModule, inputs: Any) -> dict[str, Any]:
    """Name the model's arguments."""
    return {"x": inputs} if isinstance(inputs, Tensor) else dict(net._arguments(inputs))


def _example(inputs: Any, index: int, batch: int) -> Any:
    """Pick one example; what has no batch axis stays."""
    if isinstance(inputs, Mapping):
        return {name: _example(value, index, batch) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_example(value, index, batch) for value in inputs)
    batched = isinstance(inputs, Tensor) and inputs.ndim > 0 and len(inputs) == batch
    return inputs[index : index + 1].clone() if batched else inputs


def _details(net: BoundModule, x: Any, inputs: Any, outputs: Tensor, index: int, batch: int) -> tuple[str, ...]:
    """Tell the outputs, and for each argument that moved how far, where most, and how to replay it."""
    lines = [f"outputs       {_numbers(outputs)}"] if outputs.numel() <= PRINTED else []
    before = _named(net, _example(x, index, batch))
    for name, after in _named(net, inputs).items():
        if not isinstance(after, Tensor) or not after.is_floating_point() or torch.equal(after, before[name]):
            continue
        way = (after - before[name]).double().flatten()
        lines.append(
            f"distance      l_inf {way.abs().max():.6g}, l2 {way.norm():.6g}, l1 {way.abs().sum():.6g} from {name}[{index}]"
        )
        lines.append(f"moved most    {_coordinates(name, before[name], after, index)}")
    lines.append("replay        error.counterexample.inputs holds the point" + _literal(inputs))
    return tuple(lines)


def _coordinates(name: str, before: Tensor, after: Tensor, index: int) -> str:
    """List the coordinates that moved most."""
    way = (after - before).abs().flatten()
    parts = []
    for flat in way.topk(min(SHOWN, int((way > 0).sum()))).indices:
        place = ", ".join(str(int(i)) for i in torch.unravel_index(flat, before.shape)[1:])
        parts.append(f"{name}[{index}, {place}] {float(before.flatten()[flat]):.6g} -> {float(after.flatten()[flat]):.6g}")
    return "; ".join(parts)


def _literal(inputs: Any) -> str:
    """Write a small input out in full."""
    if not isinstance(inputs, Tensor) or inputs.numel() > PRINTED:
        return ""
    return f": torch.tensor({inputs.tolist()}, dtype={inputs.dtype})"


def _numbers(values: Tensor) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values.flatten().tolist()) + "]"
