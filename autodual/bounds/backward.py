"""The backward walk: rows of ``nu`` from a node to the inputs.

Every node's value is written as its reference value (the primal trajectory at the region's centre) plus a deviation.
Affine nodes map deviations linearly, so their constant parts never enter; a relaxed node adds what its lines allow and
an input what its region allows. For a row ``c`` of a node,

    c . z  >=  c . z0  -  excess_B(-nu_1)  -  sum over relaxed nodes of a non-negative penalty

which is (3.43) of the thesis with its constants gathered in ``c . z0``. Seen from points that are not the model's own values,
as a loss does, penalties may have either sign.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from autodual.bounds.relaxed_rows import RelaxedRows
from autodual.bounds.run import Lines, Run
from dual_layers.families import Relaxed


@dataclass
class Deviation:
    """How far rows may deviate from their reference value: ``lower <= c . (z - z0) <= upper``, each ``[rows, batch]``.

    Attributes:
        lower: non-positive, seen from the model's own values.
        upper: non-negative, seen from these, or None when some lines were not parallel.
        magnitude: sum of the magnitudes of the terms on the way, the scale of float rounding, when asked for.
    """

    lower: Float[Tensor, "rows batch"]
    upper: Float[Tensor, "rows batch"] | None
    magnitude: Float[Tensor, "rows batch"] | None


def backward(
    run: Run,
    target: str,
    nu: Float[Tensor, " rows *node"],
    *,
    magnitude: bool = False,
    arrived: dict[str, Tensor] | None = None,
) -> Deviation:
    """Walk rows of ``nu`` from a node to the inputs.

    Args:
        run: values, layers and lines; every relaxed ancestor of the target has its lines.
        target: the node whose rows these are.
        nu: ``[rows, *node]``; a batch of one in the batch's axis stands for the same rows in every example.
        magnitude: also sum up the magnitudes of the terms.
        arrived: filled with the rows that reach each source and each relaxed node on the way.

    Returns:
        The deviation of each row in each example.
    """
    zero = torch.zeros(nu.shape[0], run.batch, dtype=nu.dtype, device=nu.device)
    total = Deviation(zero, zero, zero if magnitude else None)
    pending = {target: nu}
    if run.walks is not None and target == run.program.graph.output:
        run.walks.append((run, nu))
    for name in reversed(run.order[: run.order.index(target) + 1]):
        nu = pending.pop(name, None)
        if nu is None:
            continue
        if arrived is not None and (name in run.program.sources or name in run.lines):
            arrived[name] = nu
        if name in run.program.sources:
            _add_input(run, name, nu, total)
            continue
        if total.magnitude is not None:
            total.magnitude = total.magnitude + _contract(run, name, nu.abs(), run.magnitudes(name))
        if run.layers[name].facts.affine:
            parts = _transpose(run, name, nu)
        else:
            parts = _relaxed(run, name, nu, total)
        for parent, part in zip(run.program.parents[name], parts, strict=False):
            pending[parent] = part if parent not in pending else _sum(run, parent, pending[parent], part)
    return total


def _sum(run: Run, name: str, left: Tensor, right: Tensor) -> Tensor:
    """Add rows of a node; where either are still shared by all examples and the others are not, repeat them."""
    if left.shape != right.shape:
        left, right = run.expand(name, left), run.expand(name, right)
    return left + right


def _transpose(run: Run, name: str, nu: Tensor) -> tuple[Tensor, ...]:
    """Pull rows through an affine node; rows still shared by all examples stay shared."""
    if run.is_shared(name, nu) and run.is_shareable(name):
        one = run.template
        return one.layers[name].transpose(nu, one.parents(name))
    return run.layers[name].transpose(run.expand(name, nu), run.parents(name))


def _relaxed(run: Run, name: str, nu: Tensor, total: Deviation) -> tuple[Tensor, ...]:
    """Pull rows through a relaxed node and add what its lines allow."""
    if name in run.trials:
        parts, penalty = run.trials[name](run.expand(name, nu))
        total.lower, total.upper = total.lower + penalty, None
        return parts
    lines = run.lines[name]
    if run.layouts[name].factor > 1 or not run.layers[name].facts.positionwise:
        nu = run.expand(name, nu)
    if _differentiably(run, name, nu, lines, total):
        return _fused(run, name, nu, lines, total)
    _add_penalty(run, name, nu, lines, total)
    nu = nu if lines.sloping is None else nu * lines.sloping
    return () if lines.slopes is None else run.layers[name].pull(nu, lines.slopes, run.parents(name))


def _differentiably(run: Run, name: str, nu: Tensor, lines: Lines, total: Deviation) -> bool:
    """Whether to pull the rows and sum up their penalty in one go: where derivatives are wanted and nothing else is."""
    layer = run.layers[name]
    plain = layer.facts.positionwise and type(layer).pull is Relaxed.pull
    return plain and lines.slopes is not None and lines.sloping is None and total.magnitude is None and torch.is_grad_enabled()


def _fused(run: Run, name: str, nu: Tensor, lines: Lines, total: Deviation) -> tuple[Tensor, ...]:
    assert lines.slopes is not None
    weights = (lines.slopes.lower[0], None if lines.slopes.parallel else lines.slopes.upper[0], lines.shift, lines.spread)
    flat = (None if weight is None else run.examples(name, weight) for weight in weights)
    pulled, shift, spread = RelaxedRows.apply(run.examples(name, run.expand(name, nu), lead=1), *flat)
    total.lower = total.lower + (shift - spread)
    total.upper = None if total.upper is None or not lines.two_sided else total.upper + (shift + spread)
    return (run.node(name, pulled, lead=1),)


def _add_penalty(run: Run, name: str, nu: Tensor, lines: Lines, total: Deviation) -> None:
    if total.magnitude is not None:
        # Shift and spread may be large where their difference is small, and the lines follow a box that was rounded.
        boxes = [run.magnitudes(parent) for parent in run.program.parents[name]]
        terms = sum((size for size in boxes if size.shape == lines.lower.shape), start=lines.upper - lines.lower)
        if lines.slopes is not None and not run.layers[name].facts.positionwise:
            sides = (lines.slopes.lower, lines.slopes.upper)
            reach = sum(run.layers[name].push(tuple(a.abs() for a in side), tuple(boxes)) for side in sides)
            terms = terms + (reach if lines.sloping is None else torch.where(lines.sloping, reach, 0.0))
        total.magnitude = total.magnitude + _contract(run, name, nu.abs(), terms)
    if lines.two_sided:
        shift = _contract(run, name, nu, lines.shift)
        spread = _contract(run, name, nu.abs(), lines.spread)
        total.lower = total.lower + (shift - spread)
        total.upper = None if total.upper is None else total.upper + (shift + spread)
    else:  # [nu]_+ . lower + [nu]_- . upper, by magnitudes: half as many passes over the rows as by their two parts
        total.lower = total.lower + (_contract(run, name, nu, lines.shift) - _contract(run, name, nu.abs(), lines.spread))
        total.upper = None


def _add_input(run: Run, name: str, nu: Tensor, total: Deviation) -> None:
    region, x = run.regions[name], run.given[name]
    nu = run.expand(name, nu)
    below = region.excess(x, nu if region.symmetric else -nu)
    total.lower = total.lower - below
    if total.upper is not None:
        total.upper = total.upper + (below if region.symmetric else region.excess(x, nu))
    if total.magnitude is not None:
        total.magnitude = total.magnitude + _contract(run, name, nu.abs(), run.values[name].abs())


def _contract(
    run: Run, name: str, nu: Float[Tensor, " rows *shared"], weight: Float[Tensor, " *node"]
) -> Float[Tensor, "rows batch"]:
    """Sum ``nu * weight`` over a node's elements: ``[rows, *node]`` and ``[*node]`` to ``[rows, batch]``."""
    rows, weights = run.examples(name, nu, lead=1), run.examples(name, weight)
    if rows.shape[1] == 1:
        return rows[:, 0] @ weights.T
    return torch.einsum("rbf,bf->rb", rows, weights)
