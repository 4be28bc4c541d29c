"""Bound rows of the output: relax what lies before it, then one backward walk."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from autodual.bounds.intermediate import allowance, in_chunks, relax
from autodual.bounds.run import Run, meet
from autodual.methods import Method
from dual_layers import Interval


def bound_rows(
    run: Run, method: Method, spec: Tensor | None, *, lower_only: bool = False
) -> tuple[Float[Tensor, "batch rows"], Float[Tensor, "batch rows"], Float[Tensor, "batch rows"]]:
    """Bound linear functions of the output.

    Args:
        run: a fresh run.
        method: how to bound.
        spec: ``(rows, outputs)`` or ``(batch, rows, outputs)``, or None for the outputs themselves.
        lower_only: skip the upper ends where they cost a walk of their own.

    Returns:
        lower, upper and float allowance, each ``(batch, rows)``. NaN is replaced by what it proves: nothing.
    """
    output = run.program.graph.output
    if output not in run.program.rules and output not in run.program.sources:
        return _constant(run, output, spec)
    relax(run, method, output)
    value = run.values[output]
    outputs, plain = run.features(output), spec is None
    if plain:
        spec = torch.eye(outputs, dtype=value.dtype, device=value.device)
    rows = spec[None] if spec.ndim == 2 else spec

    def seeds(part: Tensor) -> Tensor:
        chosen = rows[:, part].movedim(1, 0)
        shape = list(value.shape)
        layout = run.layouts[output]
        shape[layout.axis] = layout.factor * chosen.shape[1]
        return layout.node(chosen, tuple(shape), lead=1)

    every = torch.arange(rows.shape[1], device=value.device)
    deviation = in_chunks(run, output, every, seeds, magnitude=True, lower_only=lower_only)
    middle = (rows * run.examples(output, value)[:, None]).sum(-1)
    lower, upper = middle + deviation.lower.T, middle + deviation.upper.T
    if plain and not run.strict:
        hull = run.hull(output)  # a probability stays below one, whatever the lines say
        known = meet(Interval(lower, upper), Interval(run.examples(output, hull.lower), run.examples(output, hull.upper)))
        lower, upper = known.lower, known.upper
    slack = allowance(run, (rows * run.examples(output, value)[:, None]).abs().sum(-1), deviation)
    if run.claim:
        slack = slack.masked_fill(run.may_overflow()[:, None], torch.inf)
    return _known(lower, -torch.inf), _known(upper, torch.inf), _known(slack, torch.inf)


def _constant(run: Run, output: str, spec: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Bound an output that does not depend on the perturbed inputs."""
    value = run.values[output]
    value = value.reshape(len(value), -1).expand(run.batch, -1)
    if spec is not None:
        value = torch.einsum("brk,bk->br", spec.expand(run.batch, *spec.shape[-2:]), value)
    return value, value, torch.zeros_like(value)


def _known(value: Tensor, otherwise: float) -> Tensor:
    return torch.where(value.isnan(), otherwise, value)
