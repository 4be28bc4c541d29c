"""Compute an account: bound one margin again, walk its row back, and read off what each node takes.

The bound of a row is a sum (``bounds/backward.py``): the row's value at the reference point, less the excess of the region,
less for every relaxed node

    sum over its elements of  -(lower [nu]_+ + upper [nu]_-)  >=  0

with ``lower <= 0 <= upper`` the node's lines at the reference point and ``nu`` the row that arrives there. So one walk that
keeps what arrives splits the bound, whichever way the lines were chosen: every walk from the output is noted while the margins
are bounded again, and of those that carry the row in question the tightest is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autodual.account import Account, Entry, Sensitivity
from autodual.bounds.backward import backward
from autodual.bounds.run import Run
from autodual.errors import SpecificationError
from autodual.explain import explain
from autodual.methods import Method, Projected
from autodual.problem import Problem
from autodual.regions import L1, L2, Box, LInf, Region
from autodual.regions.balls import Ball
from autodual.regions.checks import as_limit
from autodual.report import Report
from autodual.specification import margin_rows
from dual_layers import Interval

ROUNDOFFS = 1e3
"""How many roundoffs of all terms two computations of one margin may differ by: alone, in a batch, with gradients."""


@dataclass(frozen=True)
class Accountant:
    """Explains the margins of a report by asking the same question again, of the model as it is now.

    Attributes:
        problem: what was verified.
        prepare: makes a problem of arguments and regions.
        margins: bounds the margins of a problem as ``verify`` does; its argument ``walks`` notes every walk from the output.
    """

    problem: Problem
    prepare: Callable[[Mapping[str, Any], Mapping[str, Region]], Problem]
    margins: Callable[..., tuple[Tensor, Tensor, Tensor, Run]]

    def __call__(self, report: Report, example: int, target: int) -> Account:
        """Explain the margin of one example to one class.

        Raises:
            SpecificationError: the margin is another one now, or is not computed from parts.
        """
        arguments, regions, numbers = alone(self.problem, example)
        place, y = example - numbers.start, report.y[numbers.start : numbers.stop]
        with torch.inference_mode(False), torch.enable_grad():
            growth = torch.zeros((), dtype=torch.float64, requires_grad=True)
            radii = _radii(arguments, regions, place)
            grown = {name: _grown(region, arguments[name], growth) for name, region in regions.items()}
            walks: list[tuple[Run, Tensor]] = []
            with torch.set_grad_enabled(bool(radii)):
                problem = self.prepare(arguments, grown)
                margins, _, _, run = self.margins(problem, y, _repeated(report), walks=walks)
                row = margin_rows(y, problem.outputs, problem.like)[place, target]
                walk = _tightest(run, walks, row, place)
            _check(report, example, target, float(margins[place, target].detach()), walk)
            return Account(
                example=example,
                y=int(report.y[example]),
                target=target,
                margin=float(report.margins[example, target]),
                allowance=float(report.allowance[example, target]),
                reference=float(walk.reference.detach()),
                entries=_entries(walk),
                sensitivity=_sensitivity(walk, growth, radii) if radii else None,
                method=report.method,
                region=report.region,
                guarantee=report.guarantee,
            )


@dataclass(frozen=True)
class Walk:
    """One row that was walked back from the output.

    Attributes:
        run: with its lines.
        place: the example's number in the run.
        reference: the row's value at the reference point.
        bound: its lower bound.
        arrived: the rows that reached sources and relaxed nodes.
    """

    run: Run
    place: int
    reference: Tensor
    bound: Tensor
    arrived: Mapping[str, Tensor]


def alone(problem: Problem, example: int) -> tuple[dict[str, Any], dict[str, Region], range]:
    """Cut one example out of a problem, or keep the whole batch where that is not known to be the same.

    Returns:
        Arguments, regions, and the numbers of the examples that these hold.
    """
    layouts = problem.placement.layouts
    batched = {node.operator: layouts[node.name] for node in problem.program.graph.inputs if node.name in layouts}
    regions = {name: _cut(region, problem.arguments[name], example) for name, region in problem.regions.items()}
    mixes = problem.program.has_batch_statistics or problem.placement.alone is not None
    if mixes or None in regions.values() or any(layout.factor > 1 for layout in batched.values()):
        return dict(problem.arguments), dict(problem.regions), range(problem.batch)
    arguments = {
        name: value.narrow(batched[name].axis, example, 1) if name in batched else value
        for name, value in problem.arguments.items()
    }
    return arguments, regions, range(example, example + 1)


def _cut(region: Region, x: Tensor, example: int) -> Region | None:
    """Return a region of the library for one example of a batch, None for any other."""

    def cut(limit: float | Tensor) -> float | Tensor:
        is_number = as_limit(limit, x).dim() == 0
        return limit if is_number else as_limit(limit, x).expand_as(x)[example : example + 1]

    if type(region) is Box:
        return Box(cut(region.lower), cut(region.upper))
    if type(region) not in (LInf, L1, L2):
        return None
    eps = as_limit(region.eps, x)
    per_example = eps.shape == x.shape[:1]
    domain = None if region.domain is None else tuple(cut(end) for end in region.domain)
    return type(region)(eps[example : example + 1] if per_example else cut(region.eps), domain)


def _repeated(report: Report) -> Method:
    """Return the method that repeats a report's margins: with the random numbers that it drew, if it did."""
    return report.method if report.sampling is None else replace(report.method, seed=report.sampling.seed)


def _radii(arguments: Mapping[str, Any], regions: Mapping[str, Region], place: int) -> list[Tensor]:
    """Return the example's radius for each region that has one."""
    radii = []
    for name, region in regions.items():
        if isinstance(region, Ball):
            eps = as_limit(region.eps, arguments[name]).detach()
            radii.append(eps[place] if eps.shape == arguments[name].shape[:1] else eps)
    return radii


def _grown(region: Region, x: Tensor, growth: Tensor) -> Region:
    """Return a ball whose radius depends on ``growth``, which is 0; other regions stay."""
    return region.with_eps(as_limit(region.eps, x).detach() + growth.to(x.dtype)) if isinstance(region, Ball) else region


def _tightest(run: Run, walks: list[tuple[Run, Tensor]], row: Tensor, place: int) -> Walk | None:
    """Walk a row back through the lines of every run that carried it, and return the best; None if there was none.

    Args:
        run: the run that was asked.
        walks: runs and rows that were walked back from the output. A run of other examples than ``run`` repeats its only one.
        row: the row.
        place: the example's number in ``run``.
    """
    output, found = run.program.graph.output, {}
    if output not in run.order:  # it depends on nothing that moves
        reference = run.values[output].reshape(-1, len(row)).expand(run.batch, -1)[place] @ row
        return Walk(run, place, reference, reference, {})
    for own, nu in tuple(walks):
        rows = own.examples(output, own.expand(output, nu), lead=1)
        carried = (rows == row).all(-1).nonzero().tolist()
        found |= {id(own): (own, nu[i : i + 1], n) for i, n in carried if n == place or (run.batch == 1 and own.batch > 1)}
    every = (_walked(own, nu, row, n) for own, nu, n in found.values())
    # Slopes may have been sought without gradients: of two walks through the same lines take the one that has them.
    return max(
        every, key=lambda walk: (walk.bound.requires_grad, float(walk.bound.detach().nan_to_num(-torch.inf))), default=None
    )


def _walked(run: Run, nu: Tensor, row: Tensor, place: int) -> Walk:
    output, arrived = run.program.graph.output, {}
    reference = run.examples(output, run.values[output])[place] @ row
    return Walk(run, place, reference, reference + backward(run, output, nu, arrived=arrived).lower[0, place], arrived)


def _check(report: Report, example: int, target: int, now: float, walk: Walk | None) -> None:
    """See that the margin is still the report's, and that the walk gives it.

    Raises:
        SpecificationError: one of them is not so.
    """
    reported, which = float(report.margins[example, target]), f"the margin of example {example} to class {target}"
    walked = float("nan") if walk is None else float(walk.bound.detach())
    size = abs(reported) + (0.0 if walk is None else 2 * abs(float(walk.reference.detach())))
    tolerance = float(report.allowance[example, target]) + ROUNDOFFS * torch.finfo(report.margins.dtype).eps * size
    if not abs(now - reported) <= tolerance:
        raise SpecificationError(
            f"{which} is {now:.6g} now, the report has {reported:.6g}: the model, the input or the region was changed since; "
            "call verify again"
        )
    if not abs(walked - reported) <= tolerance:
        advice = f": take last_exact=True and r >= {report.margins.shape[1]}" if isinstance(report.method, Projected) else ""
        raise SpecificationError(f"{which} is not made of parts: {report.method} does not walk its row back{advice}")


def _entries(walk: Walk) -> tuple[Entry, ...]:
    rows = {row.node: row for row in explain(walk.run.program.graph, walk.run.model, walk.run).rows}
    entries = []
    for name in walk.run.order:
        if name in walk.arrived:
            nu = _row(walk, name)
            amount, amounts = _input(walk, name) if name in walk.run.program.sources else _penalties(walk, name, nu)
            box, of_input = _box(walk.run, name)
            ends = (_of_example(walk, name, end) for end in (box.lower, box.upper))
            entries.append(Entry(name, rows[name].operator, rows[name].source, amount, amounts, nu, Interval(*ends), of_input))
    return tuple(entries)


def _penalties(walk: Walk, name: str, nu: Tensor) -> tuple[float, Tensor]:
    """Return what a relaxed node takes: how far below its value at the reference point its lines let it be."""
    lower, upper = (_of_example(walk, name, end) for end in (walk.run.lines[name].lower, walk.run.lines[name].upper))
    amounts = -(nu.clamp(min=0) * lower + nu.clamp(max=0) * upper)
    return float(amounts.double().sum()), amounts


def _input(walk: Walk, name: str) -> tuple[float, Tensor | None]:
    """Return what a region takes, as a whole and by elements.

    A support is positively homogeneous, so by Euler's theorem it is ``v . gradient``; the gradient is how far the worst point
    lies from the centre.
    """
    run = walk.run
    region, x, nu = run.regions[name], run.given[name].detach(), run.expand(name, walk.arrived[name]).detach()
    v = (nu if region.symmetric else -nu).requires_grad_()
    with torch.enable_grad():
        excess = region.excess(x, v)[0, walk.place]
        found = torch.autograd.grad(excess, v, allow_unused=True)[0] if excess.requires_grad else None
    excess = excess.detach()
    if found is None:
        return float(excess), None
    amounts = _of_example(walk, name, (v * found)[0])
    missing = abs(float(amounts.double().sum()) - float(excess))
    is_sum = missing <= ROUNDOFFS * torch.finfo(v.dtype).eps * float(amounts.double().abs().sum() + excess.abs())
    return float(excess), amounts if is_sum else None


def _box(run: Run, name: str) -> tuple[Interval, bool]:
    """Return the box to show beside each element of a node, and whether it bounds the operator's input."""
    if name in run.program.rules and run.layers[name].facts.positionwise:
        return run.hull(run.program.parents[name][0]), True
    return run.hull(name), name in run.program.sources


def _row(walk: Walk, name: str) -> Tensor:
    return _of_example(walk, name, walk.run.expand(name, walk.arrived[name])[0])


def _of_example(walk: Walk, name: str, value: Tensor) -> Tensor:
    """Return the example's part of a tensor shaped like a node, without the batch."""
    layout, shape = walk.run.layouts[name], list(walk.run.values[name].shape)
    own = [layout.factor] if layout.factor > 1 else []
    shape[layout.axis : layout.axis + 1] = own
    value = value.detach().expand_as(walk.run.values[name])
    return walk.run.examples(name, value)[walk.place].reshape(shape)


def _sensitivity(walk: Walk, growth: Tensor, radii: list[Tensor]) -> Sensitivity:
    """Differentiate the margin by the radius: through everything, and at the lines as they are."""
    total, fixed = _slope(walk.bound, growth), _slope(_at_fixed_lines(walk), growth)
    numbers = {number for eps in radii for number in eps.unique().tolist()}
    eps = numbers.pop() if len(numbers) == 1 else None
    crossing = None if eps is None or total == 0 else eps - float(walk.bound.detach()) / total
    return Sensitivity(total, fixed, eps, crossing if crossing is not None and crossing > 0 else None)


def _at_fixed_lines(walk: Walk) -> Tensor:
    """Return the part of the bound in which the region is seen while the lines stay: ``nu . centre - excess``."""
    run, total = walk.run, walk.bound.new_zeros(())
    for name in set(run.program.sources) & set(walk.arrived):
        region, x, nu = run.regions[name], run.given[name], run.expand(name, walk.arrived[name]).detach()
        below = region.excess(x, nu if region.symmetric else -nu)[0, walk.place]
        centre = run.examples(name, run.values[name])[walk.place]
        total = total + run.examples(name, nu, lead=1)[0, walk.place] @ centre - below
    return total


def _slope(value: Tensor, growth: Tensor) -> float:
    found = torch.autograd.grad(value, growth, retain_graph=True, allow_unused=True)[0] if value.requires_grad else None
    return 0.0 if found is None else float(found)
