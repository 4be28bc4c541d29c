"""Attacks: look for the worst point of a region by gradient descent. What they find bounds every certificate from above."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from autodual.errors import SpecificationError
from autodual.search import Inputs, Problem, Regions, Search, evaluation, flat

Keep = Literal["best", "last"]


@torch.no_grad()
def fgsm(
    model: Callable[..., Tensor],
    x: Inputs,
    y: Tensor,
    region: Regions,
    *,
    targeted: bool = False,
    random_start: bool = False,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
    keep: Keep = "best",
) -> Any:
    """Take one step against the smallest margin ``f_y - f_j``: from the region's centre to its boundary, by default.

    Source: thesis, section 4.1.1 and Algorithm 7 for the random start, which is what makes training on a single step work.

    Args:
        model: a classifier; run in evaluation mode.
        x: its input, or a tuple or dict of its arguments.
        y: ``(batch,)`` labels.
        region: where the points may lie; one region, or a dict by argument name.
        targeted: as for ``pgd``.
        random_start: step from a random point of the region.
        step_size: with a random start, the step as a fraction of the way from the centre to the boundary; 1.25 by default.
        generator: source of the random starting points.
        keep: as for ``pgd``; ``"last"`` costs one pass forwards and backwards.

    Returns:
        For every example the better of the start and the step, in the form of ``x``.
    """
    size = 1.25 if step_size is None else step_size
    options = {"targeted": targeted, "random_start": random_start, "generator": generator, "keep": keep}
    return pgd(model, x, y, region, steps=1, step_size=size, **options)


@torch.no_grad()
def pgd(
    model: Callable[..., Tensor],
    x: Inputs,
    y: Tensor,
    region: Regions,
    *,
    steps: int = 40,
    restarts: int = 1,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
    targeted: bool = False,
    random_start: bool = False,
    keep: Keep = "best",
) -> Any:
    """Descend on the smallest margin ``min_j f_y - f_j``, projecting onto the region.

    The first run starts at the region's centre with one full step. The others start at random points and each descends
    against one class, the likeliest first: the smallest margin of several classes has more local minima than each alone.

    Args:
        model: a classifier; run in evaluation mode, its parameters' ``.grad`` is left alone.
        x: its input, or a tuple or dict of its arguments.
        y: ``(batch,)`` labels.
        region: where the points may lie; one region, or a dict by argument name.
        steps: gradient steps per run.
        restarts: number of runs.
        step_size: first step as a fraction of the way from the centre to the boundary; it shrinks linearly to zero.
        generator: source of the random starting points.
        targeted: y are the labels to reach, not those to leave: ascend on the same margin.
        random_start: start the first run at a random point too.
        keep: ``"best"`` returns the best point seen; ``"last"``, for training, the last one of one run. It costs exactly
            ``steps`` passes forwards and backwards, where the best needs one evaluation more, or two with restarts.

    Returns:
        The point of smallest margin seen for every example, inside its region, in the form of ``x``.

    Raises:
        SpecificationError: an option is out of range, or a region names an argument that the model has not.

    Example:
        >>> from autodual.regions import LInf
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> pgd(model, torch.tensor([[0.5, 0.4]]), torch.tensor([0]), LInf(0.25), steps=3)
        tensor([[0.2500, 0.6500]])
    """
    return _attack([Problem.build(model, x, region)], y, steps, restarts, step_size, generator, targeted, random_start, keep)


@torch.no_grad()
def msd(
    model: Callable[..., Tensor],
    x: Inputs,
    y: Tensor,
    regions: Sequence[Regions],
    *,
    steps: int = 40,
    restarts: int = 1,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
    targeted: bool = False,
    random_start: bool = False,
    keep: Keep = "best",
) -> Any:
    """Attack a union of regions by multi steepest descent: step into each region, and keep the step that lowers most.

    A step costs one pass forwards and backwards, and one evaluation per region. Source: thesis, Algorithm 9 and (5.33); our
    difference: steps shrink, as for ``pgd``, and by default the best point seen is returned.

    Args:
        model: a classifier; run in evaluation mode, its parameters' ``.grad`` is left alone.
        x: its input, or a tuple or dict of its arguments.
        y: ``(batch,)`` labels.
        regions: where the points may lie: in one of these, each a region or a dict by argument name.
        steps: as for ``pgd``, like the options that follow; the first run starts in the first region, the next in the second.
        restarts: number of runs.
        step_size: first step, as a fraction of each region's own size.
        generator: source of the random starting points.
        targeted: y are the labels to reach.
        random_start: start the first run at a random point too.
        keep: ``"best"`` or ``"last"``.

    Returns:
        The point of smallest margin seen for every example, inside one of its regions, in the form of ``x``.

    Raises:
        SpecificationError: there is no region, or they do not belong to the same arguments.

    Example:
        >>> from autodual.regions import L2, LInf
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> x, y = torch.tensor([[0.5, 0.4]]), torch.tensor([0])
        >>> msd(model, x, y, [LInf(0.2), L2(0.25)], steps=3)  # the corner of the box reaches farther than the ball
        tensor([[0.3000, 0.6000]])
    """
    problems = [Problem.build(model, x, region) for region in regions]
    if not problems:
        raise SpecificationError("a union needs at least one region")
    if len({frozenset(problem.regions) for problem in problems}) > 1:
        raise SpecificationError("the regions of a union must belong to the same arguments")
    return _attack(problems, y, steps, restarts, step_size, generator, targeted, random_start, keep)


def _attack(
    problems: Sequence[Problem],
    y: Tensor,
    steps: int,
    restarts: int,
    step_size: float | None,
    generator: torch.Generator | None,
    targeted: bool,
    random_start: bool,
    keep: Keep,
) -> Any:
    """Descend on the smallest margin, or ascend, in the union of the problems' regions."""
    if keep not in get_args(Keep):
        raise SpecificationError(f'keep must be "best" or "last", got {keep!r}')
    if keep == "last" and restarts != 1:
        raise SpecificationError(f'keep="last" returns the end of one run, so restarts must be 1, got {restarts}')
    problem, *others = problems
    y = torch.as_tensor(y, device=problem.device).long()
    sign = -1 if targeted else 1

    def score(outputs: Tensor) -> Tensor:
        return sign * smallest_margin(outputs, y)

    with evaluation(problem.model):
        rivals = _rivals(problem, y) if restarts > 1 else None

        def guide(outputs: Tensor, restart: int) -> Tensor:
            if restart == 0:
                return score(outputs)
            rival = rivals[:, (restart - 1) % rivals.shape[1]]
            return sign * (outputs.gather(1, y[:, None]) - outputs.gather(1, rival[:, None])).squeeze(1)

        search = Search(problem, score, guide, tuple(others))
        if keep == "last":
            return problem.form(search.last(steps, step_size, generator, random_start=random_start))
        return problem.form(search.run(steps, restarts, step_size, generator, random_start=random_start)[1])


def _rivals(problem: Problem, y: Tensor) -> Tensor:
    """Return the other classes, the likeliest first."""
    outputs = problem.outputs(problem.start(None, random=False))
    return outputs.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]


@torch.no_grad()
def minimize(
    model: Callable[..., Tensor],
    x: Inputs,
    region: Regions,
    rows: Tensor,
    *,
    steps: int = 40,
    restarts: int = 1,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Any]:
    """Minimise linear functionals of the outputs over a region, each on its own.

    Args:
        model: any model; run in evaluation mode, its parameters' ``.grad`` is left alone.
        x: its input, or a tuple or dict of its arguments.
        region: where the points may lie; one region, or a dict by argument name.
        rows: ``(S, outputs)`` or ``(batch, S, outputs)`` coefficients.
        steps: gradient steps per run.
        restarts: number of runs; the first starts at the region's centre, the others at random points.
        step_size: as for ``pgd``.
        generator: source of the random starting points.

    Returns:
        The smallest values seen, ``(batch, S)``, and where: ``(batch, S, *input)``, in the form of ``x``.
    """
    problem = Problem.build(model, x, region)
    values, found = [], []
    with evaluation(model):
        for index in range(rows.shape[-2]):
            row = rows[..., index, :]
            value, points = Search(problem, functional(row)).run(steps, restarts, step_size, generator)
            values.append(value)
            found.append(points)
    if not values:
        raise SpecificationError(f"rows must hold at least one functional, got shape {tuple(rows.shape)}")
    stacked = {key: torch.stack([points[key] for points in found], 1) for key in found[0]}
    return torch.stack(values, 1), problem.form(stacked)


def smallest_margin(outputs: Tensor, y: Tensor) -> Tensor:
    """Return ``f_y - max_{j != y} f_j`` for outputs ``(batch, classes)``: negative where the prediction is not ``y``."""
    true = outputs.gather(1, y[:, None])
    others = outputs.scatter(1, y[:, None], -torch.inf)
    return (true - others).amin(1)


def functional(row: Tensor) -> Callable[[Tensor], Tensor]:
    """Turn coefficients, ``(outputs,)`` or ``(batch, outputs)``, into a function ``outputs -> (batch,)``."""
    return lambda outputs: (flat(outputs) * row.to(outputs)).sum(1)
