"""Counterexamples: points of a region at which a property is false, replayed on the model and described in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autodual.attacks import functional, pgd
from autodual.network import BoundModule
from autodual.regions import Region
from autodual.search import Problem, Search, evaluation, run_on_copies

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


Judge = Callable[[Tensor], tuple[Tensor, str]]
"""Tells from the outputs of one example how far the property is from false (negative: it is) and puts it in words."""


@torch.no_grad()
def misclassified(net: BoundModule, x: Any, y: Tensor, region: Regions, among: Tensor) -> Counterexample | None:
    """Look for an input of the region with another label than ``y`` and return the one of lowest margin, or None."""
    try:
        points = pgd(net.model, x, y, region, restarts=5, generator=_generator(y))
    except NotImplementedError:  # an operator without a derivative
        return None
    candidates = [(index, _example(points, index, len(y)), _judge_label(int(y[index]))) for index in among.tolist()]
    return _worst(net, x, region, len(y), candidates)


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
    batch, candidates = len(limits[0]), []
    rows = rows.expand(batch, *rows.shape[-2:])
    problem = Problem.build(net.model, x, region)
    for side, row in failed.any(1).nonzero()[:ATTACKED].tolist():
        sign = (1, -1)[side]
        try:
            with evaluation(net.model):
                values, moved = Search(problem, functional(sign * rows[:, row])).run(40, 3, None, _generator(rows))
        except NotImplementedError:  # an operator without a derivative
            return None
        index = int((values - sign * limits[side][:, row]).argmin())
        judge = _judge_row(rows[index, row], row, float(limits[side][index, row]), sign)
        candidates.append((index, _example(problem.form(moved), index, batch), judge))
    return _worst(net, x, region, batch, candidates)


def _judge_label(label: int) -> Judge:
    def judge(outputs: Tensor) -> tuple[Tensor, str]:
        scores = outputs[0]
        predicted = int(scores.argmax())
        margin = scores[label] - scores[predicted] if predicted != label else torch.ones_like(scores[0])
        return margin, f"label {label}, prediction {predicted}, margin {float(margin.detach()):.6g}"

    return judge


def _judge_row(coefficients: Tensor, row: int, limit: float, sign: int) -> Judge:
    def judge(outputs: Tensor) -> tuple[Tensor, str]:
        value = (outputs.flatten() * coefficients).sum()
        return sign * (
            value - limit
        ), f"row {row} is {float(value.detach()):.6g}, {'lower' if sign > 0 else 'upper'} limit {limit:.6g}"

    return judge


def _worst(
    net: BoundModule, x: Any, region: Regions, batch: int, candidates: list[tuple[int, Any, Judge]]
) -> Counterexample | None:
    """Replay every candidate alone, keep the worst that is false there, simplify and describe it."""
    replayed = [(float(judge(_replay(net, inputs))[0]), place) for place, (_, inputs, judge) in enumerate(candidates)]
    worst, place = min(replayed, default=(0.0, -1))
    if not worst < 0:
        return None
    index, inputs, judge = candidates[place]
    inputs = _simplify(net, x, region, index, inputs, judge)
    outputs = _replay(net, inputs)
    return Counterexample(index, inputs, outputs, judge(outputs)[1], _details(net, x, inputs, outputs, index, batch))


def _simplify(net: BoundModule, x: Any, region: Regions, index: int, inputs: Any, judge: Judge) -> Any:
    """Keep as few of the moves as still make the property false, those that contribute most to first order."""
    if not isinstance(x, Tensor) or not isinstance(region, Region):
        return inputs
    before = x[index : index + 1]
    with torch.enable_grad():
        point = inputs.clone().requires_grad_()
        value = judge(_replay(net, point))[0]
        slope = torch.autograd.grad(value, point, materialize_grads=True)[0] if value.requires_grad else torch.zeros_like(point)
    way = (inputs - before).flatten()
    order = (slope.flatten() * way).argsort()
    for count in [0, *(2**power for power in range(int((way != 0).sum()).bit_length()))]:
        kept = torch.zeros_like(way)
        kept[order[:count]] = way[order[:count]]
        simpler = before + kept.reshape(before.shape)
        if _inside(region, x, index, simpler) and float(judge(_replay(net, simpler))[0]) < 0:
            return simpler
    return inputs


def _inside(region: Region, x: Tensor, index: int, point: Tensor) -> bool:
    """Whether a point lies in one example's region, to rounding."""
    whole = x.clone()
    whole[index] = point[0]
    tolerance = 4 * torch.finfo(x.dtype).eps * max(1.0, float(x[index].abs().max()))
    try:
        return bool(region.contains(x, whole, tolerance)[index])
    except NotImplementedError:
        return False


def _generator(like: Tensor) -> torch.Generator:
    """Make the same random starts in every run, so that a failure can be repeated."""
    return torch.Generator(like.device).manual_seed(SEED)


def _replay(net: BoundModule, inputs: Any) -> Tensor:
    """Run the model on one example alone."""
    with evaluation(net.model):
        return run_on_copies(net.model, inputs)


def _named(net: BoundModule, inputs: Any) -> dict[str, Any]:
    """Name the model's arguments."""
    return {"x": inputs} if isinstance(inputs, Tensor) else dict(net.arguments(inputs))


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
    if len(lines) == (outputs.numel() <= PRINTED):
        lines.append("distance      0: the model is wrong at the given input itself")
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
