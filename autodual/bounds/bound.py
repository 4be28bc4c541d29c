"""Bound rows of the output: relax what lies before it, then one backward walk."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from autodual.bounds.auto import Escalation
from autodual.bounds.backward import Deviation
from autodual.bounds.combined import Combined
from autodual.bounds.intermediate import allowance, in_chunks, relax
from autodual.bounds.interval_walk import interval_rows
from autodual.bounds.linear_program import Relaxation, relaxation, tightened
from autodual.bounds.once import once
from autodual.bounds.projected import Projections
from autodual.bounds.run import Run, meet
from autodual.methods import IBP, LP, Auto, Method, Optimized
from dual_layers import NONE, Interval


def bound_rows(
    run: Run,
    method: Method,
    spec: Tensor | None,
    *,
    lower_only: bool = False,
    until_positive: bool = False,
    known: Mapping[type[Method], Run] | None = None,
) -> tuple[Float[Tensor, "batch rows"], Float[Tensor, "batch rows"], Float[Tensor, "batch rows"]]:
    """Bound linear functions of the output.

    Args:
        run: a fresh run.
        method: how to bound.
        spec: ``(rows, outputs)`` or ``(batch, rows, outputs)``, or None for the outputs themselves.
        lower_only: skip the upper ends where they cost a walk of their own.
        until_positive: stop improving a lower end once it exceeds its float allowance.
        known: runs of the same examples whose boxes another method has found.

    Returns:
        lower, upper and float allowance (0 where nothing is claimed), each ``(batch, rows)`` and differentiable once; NaN is
        replaced by what it proves: nothing.
    """
    output = run.program.graph.output
    if output not in run.program.rules and output not in run.program.sources:
        return _constant(run, output, spec)
    if isinstance(method, IBP) and lower_only and spec is not None and not run.claim:
        rows = (spec[None] if spec.ndim == 2 else spec).expand(run.batch, -1, -1)
        lower = interval_rows(run, rows.movedim(1, 0))
        return once(_known(lower, -torch.inf)), torch.full_like(lower, torch.inf), torch.zeros_like(lower)
    if isinstance(method, Auto):
        turns = Escalation(run, method, until_positive=until_positive, lower_only=lower_only)
        return turns.bounds(spec, partial(bound_rows, lower_only=lower_only, until_positive=until_positive))
    combined, projections = _relaxed(run, method, output, known)
    value = run.values[output]
    plain, proves = spec is None, run.claim and method.guarantee != NONE
    if plain:
        spec = torch.eye(run.features(output), dtype=value.dtype, device=value.device)
    rows = spec[None] if spec.ndim == 2 else spec
    reference = rows * run.examples(output, value)[:, None]
    middle = reference.sum(-1)
    if combined is not None:
        goal = -middle.detach().T if until_positive and proves else None
        deviation = combined.rows(rows, goal, magnitude=proves, lower_only=lower_only)
    elif projections is None or projections.walks_back(rows.shape[1]):
        deviation = _walked_back(run, output, rows, magnitude=proves, lower_only=lower_only)
    else:
        deviation = projections.row_bounds(output, rows)
    if isinstance(method, LP):
        deviation = tightened(run, method, output, rows, deviation, lower_only=lower_only)
    upper = torch.full_like(middle, torch.inf) if deviation.upper is None else middle + deviation.upper.T
    lower = middle + deviation.lower.T
    if plain and not run.strict:
        hull = run.hull(output)  # a probability stays below one, whatever the lines say
        known = meet(Interval(lower, upper), Interval(run.examples(output, hull.lower), run.examples(output, hull.upper)))
        lower, upper = known.lower, known.upper
    slack = torch.zeros_like(lower)
    if proves:
        slack = allowance(run, reference.abs().sum(-1), deviation).masked_fill(run.may_overflow()[:, None], torch.inf)
    return once(_known(lower, -torch.inf)), once(_known(upper, torch.inf)), once(_known(slack, torch.inf))


def _relaxed(
    run: Run, method: Method, output: str, known: Mapping[type[Method], Run] | None
) -> tuple[Combined | None, Projections | None]:
    """Fix the lines of everything before the output, for a linear program those of the method that finds its boxes."""
    base = method.base if isinstance(method, LP) else method
    if isinstance(base, Optimized):
        return Combined(run, base, output, known or {}), None
    return None, relax(run, base, output)


def solve_relaxation(run: Run, method: LP, spec: Tensor) -> Relaxation:
    """Solve the linear relaxations of rows of the output; arguments as for ``bound_rows``."""
    output = run.program.graph.output
    rows = spec[None] if spec.ndim == 2 else spec
    combined, _ = _relaxed(run, method, output, None)
    if combined is not None:
        combined.refine()
    return relaxation(run, method, output, rows, _walked_back(run, output, rows, magnitude=False, lower_only=True))


def _walked_back(run: Run, output: str, rows: Tensor, *, magnitude: bool, lower_only: bool) -> Deviation:
    """Walk the rows ``(batch or 1, rows, outputs)`` from the output to the inputs."""

    def seeds(part: Tensor) -> Tensor:
        return run.rows(output, rows[:, part].movedim(1, 0))

    every = torch.arange(rows.shape[1], device=rows.device)
    return in_chunks(run, output, every, seeds, magnitude=magnitude, lower_only=lower_only)


def _constant(run: Run, output: str, spec: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Bound an output that does not depend on the perturbed inputs."""
    value = run.values[output]
    value = value.reshape(len(value), -1).expand(run.batch, -1)
    if spec is not None:
        value = torch.einsum("brk,bk->br", spec.expand(run.batch, *spec.shape[-2:]), value)
    return value, value, torch.zeros_like(value)


def _known(value: Tensor, otherwise: float) -> Tensor:
    return torch.where(value.isnan(), otherwise, value)
