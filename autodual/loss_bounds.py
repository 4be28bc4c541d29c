"""What losses are made of: bounds of one batch's margins by several methods, and the boxes of hidden layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from autodual.bounds.backward import backward
from autodual.bounds.bound import bound_rows
from autodual.bounds.intermediate import relax
from autodual.bounds.once import once
from autodual.bounds.run import Run
from autodual.errors import SpecificationError
from autodual.methods import IBP, Adaptive, Dual, Method, at_once, resolve
from autodual.problem import Problem
from autodual.specification import rival_rows, spread_rivals
from dual_layers import Interval


@dataclass(frozen=True)
class LossBounds:
    """Bounds to train on, differentiable in the parameters; nothing may be claimed of them.

    Attributes:
        problem: the batch and its regions.
        y: checked labels, ``(batch,)``.
        budget: bytes that the rows of one backward walk may take.
    """

    problem: Problem
    y: Int[Tensor, " batch"]
    budget: int

    @cached_property
    def run(self) -> Run:
        """A run whose boxes are those of interval arithmetic; every method starts from a fork of it."""
        return self.problem.run(self.budget, claim=False)

    def margins(self, method: str | Method = "dual", *, rivals: int | None = None) -> Float[Tensor, "batch classes"]:
        """Bound ``f_y - f_j`` from below, or estimate such a bound; 0 at ``j = y``.

        Where nothing is known, as where intervals leave an operator's domain, a margin is minus infinity.

        Args:
            method: how to bound.
            rivals: of each example, bound only so many margins by the method, those that intervals leave lowest; the others
                stay as intervals bound them. By default all are bounded by the method.
        """
        options, classes = at_once(resolve(method)), self.problem.outputs
        if self.problem.batch == 0:
            return self.problem.empty(classes)
        if rivals is not None and rivals < 1:
            raise SpecificationError(f"rivals must be a positive number of classes, got {rivals!r}")
        rows, others = rival_rows(self.y, classes, self.problem.like)
        if rivals is None or rivals >= others.shape[1] or isinstance(options, IBP):
            return spread_rivals(self._bound(options, rows), others, classes)
        known = self.margins("interval")
        chosen = known.detach().gather(1, others).topk(rivals, 1, largest=False).indices
        rows, others = rows.gather(1, chosen[..., None].expand(-1, -1, classes)), others.gather(1, chosen)
        return known.scatter(1, others, self._bound(options, rows))

    def cross_entropy(self, method: str | Method = "dual") -> Float[Tensor, " batch"]:
        """Bound the worst cross-entropy from above by one row of the output for each example: loss fusion.

        Interval bounds of ``d_j = f_j - f_y`` give each ``exp(d_j)`` a chord ``a_j + b_j d_j`` above it, so that

            log(1 + sum_j exp(d_j))  <=  log(1 + sum_j a_j - J(sum_j b_j (e_y - e_j)))

        where J is the method's lower bound of that one row. A walk costs as much as it has rows: this one is the cheapest,
        and closer to the truth than the cross-entropy of the margins' bounds where intervals of the margins are short. Never
        above the cross-entropy of interval bounds; infinite where nothing is known. Source: Xu et al., automatic perturbation
        analysis (2020), section 3.3.

        Args:
            method: how to bound the row.
        """
        options = at_once(resolve(method))
        if self.problem.batch == 0:
            return self.problem.empty(self.problem.outputs).sum(1)
        rows, _ = rival_rows(self.y, self.problem.outputs, self.problem.like)
        most, least = (-self._bound(IBP(), torch.cat([rows, -rows], 1))).chunk(2, 1)
        least = -least  # ends of d
        with torch.no_grad():
            top = most.amax(1, keepdim=True).clamp(min=0)  # what exponentials are scaled down by
        width = (most - least).clamp(min=torch.finfo(most.dtype).eps)
        chord = (most - top).exp() * (-torch.expm1(-width) / width)
        start = (least - top).exp()
        fused = self._bound(options, (chord[..., None] * rows).sum(1, keepdim=True))[:, 0]
        above = torch.minimum(-(chord * least).sum(1) - fused, (chord * (most - least)).sum(1)).clamp(min=0)
        losses = top[:, 0] + ((-top[:, 0]).exp() + start.sum(1) + above).log()
        return torch.where(losses.isfinite(), losses, torch.inf)

    def _bound(self, options: Method, rows: Float[Tensor, "batch rows classes"]) -> Float[Tensor, "batch rows"]:
        lower, _, _ = bound_rows(self._fresh(options), options, rows, lower_only=True)
        if not lower.isfinite().all():  # with all the care that is taken for a claim, or an error that says what is wrong
            lower, _, _ = bound_rows(self.problem.run(self.budget), options, rows, lower_only=True)
        return lower

    def _fresh(self, options: Method) -> Run:
        if isinstance(options, IBP):
            return self.run
        if isinstance(options, (Dual, Adaptive)) and options.intermediate == "interval":
            return self.run.centered()
        return self.run.fork(boxes=True)

    def hidden(self) -> list[Interval]:
        """Return the interval bounds of the inputs of element-wise nonlinear operators, in topological order."""
        program = self.run.program
        names = [name for name in program.relaxed if program.rules[name].facts.positionwise]
        return [self.run.hull(parent).map(once) for name in names for parent in program.parents[name]]

    def distances(self, method: Dual | Adaptive) -> Float[Tensor, "batch rivals"]:
        """Return how far the region's centre is from the planes where linear bounds of the margins are zero.

        The walk's rows end at the input as the normals of a polyhedron inside which the label is proved. A distance is in
        units of the region's reach in the plane's direction: 0 at the centre (or where the bound is not positive there), 1
        where the plane touches the region. Source: Liu, Salzmann, Süsstrunk, polyhedral envelope regularization (2021).
        """
        if not isinstance(method, (Dual, Adaptive)):
            raise SpecificationError(f"an envelope needs lines through the network: Dual(...) or Adaptive(...), got {method!r}")
        run, output = self._fresh(method), self.run.program.graph.output
        relax(run, method, output)
        rows, _ = rival_rows(self.y, self.problem.outputs, self.problem.like)
        arrived: dict[str, Tensor] = {}
        deviation = backward(run, output, run.rows(output, rows.movedim(1, 0)), arrived=arrived)
        margins = torch.einsum("brk,bk->br", rows, run.examples(output, run.values[output])) + deviation.lower.T
        reach = torch.zeros_like(margins)
        for name, nu in arrived.items():
            if name in run.regions:
                region = run.regions[name]
                reach = reach + region.excess(run.given[name], run.expand(name, nu if region.symmetric else -nu)).T
        return once(1 + margins.clamp(min=-reach) / reach.clamp(min=torch.finfo(reach.dtype).tiny))
