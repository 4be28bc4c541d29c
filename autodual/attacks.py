"""Attacks: look for the worst point of a region by gradient descent. What they find bounds every certificate from above."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autodual.errors import SpecificationError
from autodual.search import Inputs, Problem, Regions, Search, evaluation, flat


@torch.no_grad()
def fgsm(model: Callable[..., Tensor], x: Inputs, y: Tensor, region: Regions) -> Any:
    """Take one full step from the region's centre against the smallest margin ``f_y - f_j``.

    Args:
        model: a classifier; run in evaluation mode.
        x: its input, or a tuple or dict of its arguments.
        y: ``(batch,)`` labels.
        region: where the points may lie; one region, or a dict by argument name.

    Returns:
        For every example the better of the centre and the step, in the form of ``x``.
    """
    return pgd(model, x, y, region, steps=1)


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

    Returns:
        The point of smallest margin seen for every example, inside its region, in the form of ``x``.
    """
    problem = Problem.build(model, x, region)
    with evaluation(model):
        outputs = problem.outputs(problem.start(None, random=False))
        y = torch.as_tensor(y, device=outputs.device).long()
        rivals = outputs.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]

        def guide(outputs: Tensor, restart: int) -> Tensor:
            if restart == 0:
                return smallest_margin(outputs, y)
            rival = rivals[:, (restart - 1) % rivals.shape[1]]
            return (outputs.gather(1, y[:, None]) - outputs.gather(1, rival[:, None])).squeeze(1)

        search = Search(problem, lambda outputs: smallest_margin(outputs, y), guide)
        _, points = search.run(steps, restarts, step_size, generator)
    return problem.form(points)


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
