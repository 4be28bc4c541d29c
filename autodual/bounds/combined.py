"""The best of several methods for every row: those with fixed slopes, then slopes that climb from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import one_hot

from autodual.bounds.backward import Deviation
from autodual.bounds.intermediate import allowance, in_chunks, relax, wanted_rows
from autodual.bounds.optimize import Ascent, box_of, climb
from autodual.bounds.pair_ascent import PairAscent, climbing_run, climbs_cheaply
from autodual.bounds.run import Run, meet
from autodual.methods import Adaptive, Dual, Method, Optimized
from dual_layers import Interval

STARTS = (Adaptive(), Dual())
"""Methods whose boxes are met and whose slopes the ascent starts from: neither is better everywhere."""


class Targets(NamedTuple):
    """Lower ends of rows and which of them have not reached their goal.

    Shapes: ``rows`` ``(batch or 1, rows, outputs)``, everything else ``(rows, batch)``.
    """

    rows: Tensor
    ends: Tensor
    goal: Tensor | None
    open: Tensor


class Combined:
    """Bounds of rows of a node by several methods on boxes that all of them share.

    A method's slopes are those that its own boxes give, so that the shared, tighter boxes only ever raise its bound.

    Args:
        run: filled in: boxes, and the lines of the first method.
        method: how far to climb.
        target: the node that is to be bounded.
        known: runs of the same examples whose boxes one of the methods has found.
    """

    def __init__(self, run: Run, method: Optimized, target: str, known: Mapping[type[Method], Run]) -> None:
        self.run, self.method, self.target = run, method, target
        own = [known.get(type(start)) or run.fork() for start in STARTS]
        for fork, start in zip(own, STARTS, strict=True):
            relax(fork, start, target)
        run.strict = False
        for name in own[0].boxes:
            run.boxes[name] = meet(meet(*(fork.boxes[name] for fork in own)), run.hull(name))
            run.how[name] = own[0].how.get(name, "")
        self.own = own
        self._relate()

    def refine(self, examples: Bool[Tensor, " batch"] | None = None) -> bool:
        """Let hidden elements climb, those of all examples or of some; boxes and lines follow. Return whether any did."""
        wanted = examples is None or bool(examples.any())
        if not (wanted and self.method.steps_inside and self.method.hidden_rows != 0 and self._climb_hidden(examples)):
            return False
        self._relate()
        return True

    def _relate(self) -> None:
        """Put every method's slopes on the boxes that all share."""
        self.runs = [self._with_lines(fork) for fork in self.own]
        self.run.lines = self.runs[0].lines

    def _with_lines(self, own: Run) -> Run:
        """Return a run with a method's own slopes on the shared boxes."""
        run = self.run.fork(boxes=True)
        for name, lines in own.lines.items():
            run.lines[name] = run.relate(name, lines.slopes, box_of(run, name), lines.sloping)
        return run

    def rows(
        self,
        rows: Float[Tensor, "batch rows outputs"],
        goal: Float[Tensor, "rows batch"] | None,
        *,
        magnitude: bool,
        lower_only: bool,
    ) -> Deviation:
        """Bound rows of the target; hidden elements climb first, those of examples that have not reached their goal.

        Args:
            rows: the rows; a batch of one stands for every example.
            goal: deviations that need no improvement, or None.
            magnitude: as for ``backward``.
            lower_only: leave out the upper ends where they cost walks of their own.
        """
        best = examples = None
        if goal is not None:
            best = self._fixed(rows, magnitude=magnitude, lower_only=lower_only)
            examples = self._targets(best, rows, goal, lower_only=lower_only).open.any(0)
        if self.refine(examples) or best is None:
            again = self._fixed(rows, magnitude=magnitude, lower_only=lower_only)
            best = again if best is None else tighter(best, again)
        if not self.method.steps:
            return best
        return self._climbed(best, rows, goal, magnitude=magnitude, lower_only=lower_only)

    def _fixed(self, rows: Tensor, *, magnitude: bool, lower_only: bool) -> Deviation:
        """Walk rows through every method's lines and take the best ends."""
        found = (self._walked(run, rows, magnitude=magnitude, lower_only=lower_only) for run in self.runs)
        return reduce(tighter, found)

    def _walked(self, run: Run, rows: Tensor, *, magnitude: bool, lower_only: bool) -> Deviation:
        """Walk rows through one method's lines, every example's in one batch."""

        def seeds(part: Tensor) -> Tensor:
            return run.rows(self.target, rows[:, part].movedim(1, 0))

        every = torch.arange(rows.shape[1], device=rows.device)
        found = in_chunks(run, self.target, every, seeds, magnitude=magnitude, lower_only=lower_only)
        return found if magnitude else replace(found, magnitude=None)

    def _climbed(self, best: Deviation, rows: Tensor, goal: Tensor | None, *, magnitude: bool, lower_only: bool) -> Deviation:
        """Improve the ends that are finite and have not reached their goal; an upper end is a lower one of the row turned."""
        sought = self._targets(best, rows, goal, lower_only=lower_only)
        turned, chosen = sought.rows, sought.open & sought.ends.detach().isfinite()
        if not chosen.any():
            return best

        def pairs(row: Tensor, example: Tensor) -> Tensor:
            return turned[example if len(turned) > 1 else torch.zeros_like(example), row]

        found = climb(self.run, self.target, pairs, chosen, Ascent(self.method.steps, sought.goal), magnitude=magnitude)
        if lower_only:
            return tighter(best, found)
        lower, upper = found.lower.chunk(2)
        size = found.magnitude if found.magnitude is None else torch.maximum(*found.magnitude.chunk(2))
        return tighter(best, Deviation(lower, -upper, size))

    def _targets(self, best: Deviation, rows: Tensor, goal: Tensor | None, *, lower_only: bool) -> Targets:
        """List all ends as lower ones, an upper end as that of the row turned, each with its goal."""
        ends = best.lower if lower_only else torch.cat([best.lower, -best.upper])
        turned = rows if lower_only else torch.cat([rows, -rows], 1)
        matters = (turned != 0).any(2).T.expand(ends.shape)
        if goal is None:
            return Targets(turned, ends, None, matters)
        reference = (rows * self.run.examples(self.target, self.run.values[self.target])[:, None]).abs().sum(-1)
        goal = goal + 2 * allowance(self.run, reference, best).T
        goal = goal if lower_only else torch.cat([goal, torch.full_like(goal, torch.inf)])
        return Targets(turned, ends, goal, matters & ~(ends > goal))

    def _climb_hidden(self, examples: Bool[Tensor, " batch"] | None) -> bool:
        """Let the ends of undecided inputs of nonlinear nodes climb too, one node after the other. Return whether any did."""
        run, ancestors, climbed = self.run, self.run.needed(self.target), False
        consumers: dict[str, str] = {}
        for consumer in run.program.relaxed:
            for name in run.program.parents[consumer] if consumer in ancestors else ():
                consumers.setdefault(name, consumer)
        for name, consumer in consumers.items():
            wanted = wanted_rows(run, name)
            if wanted is None:
                continue
            wanted = wanted if examples is None else wanted & examples[:, None]
            if not wanted.any() or (self.method.hidden_steps is None and not climbs_cheaply(run, name)):
                continue
            own = climbing_run(run, name)
            walk = None if own is None else PairAscent(own, name, wanted, self.method.steps_inside)
            if (rows := self.method.hidden_rows) is not None:
                rows = min(rows, run.features(name))
                wanted = self._loosest(consumer, name, wanted, rows if walk is None else walk.worth(rows))
            if wanted.any():
                found = self._climbed_alone(name, wanted) if walk is None else self._climbed_in_pairs(walk, wanted)
                run.boxes[name] = meet(run.boxes[name], run.rounded(name, found))
                run.forget_behind(name)
                climbed = True
        return climbed

    def _loosest(self, consumer: str, name: str, wanted: Bool[Tensor, "batch features"], most: int) -> Tensor:
        """Choose the wanted elements whose lines are furthest apart, or, where that is not known, whose boxes are widest."""
        if most >= int(wanted.sum(1).max()):
            return wanted
        run, box = self.run, box_of(self.run, consumer)
        room = run.boxes[name].width
        if run.values[consumer].shape == room.shape:
            lines = run.relate(consumer, run.layers[consumer].slopes(box, "parallel"), box)
            room = lines.upper - lines.lower
        room = run.examples(name, room).expand(wanted.shape).masked_fill(~wanted, -1)
        chosen = torch.zeros_like(wanted).scatter(1, room.topk(min(most, room.shape[1])).indices, True)
        return chosen & wanted

    def _climbed_in_pairs(self, walk: PairAscent, wanted: Bool[Tensor, "batch features"]) -> Interval:
        run, name = self.run, walk.target
        walk.wanted = wanted
        pairs, *deviations = walk.bounds()
        reference, ends = run.examples(name, run.values[name]), []
        for deviation, unknown in zip(deviations, (-torch.inf, torch.inf), strict=True):
            end = (reference[pairs] + deviation).to(reference.dtype)
            ends.append(run.node(name, torch.full_like(reference, unknown).index_put(pairs, end)))
        return Interval(*ends)

    def _climbed_alone(self, name: str, wanted: Bool[Tensor, "batch features"]) -> Interval:
        run, reference = self.run, self.run.examples(name, self.run.values[name])

        def pairs(row: Tensor, example: Tensor) -> Tensor:
            sign = torch.where(row < run.features(name), 1, -1)
            return (sign[:, None] * one_hot(row % run.features(name), run.features(name))).to(reference)

        found = climb(run, name, pairs, torch.cat([wanted.T, wanted.T]), Ascent(self.method.steps_inside), magnitude=False)
        below, above = found.lower.chunk(2)
        return Interval(*(run.node(name, end) for end in (reference + below.T, reference - above.T)))


def tighter(best: Deviation, other: Deviation) -> Deviation:
    """Take the tighter ends, each with the rounding of its own walk; a NaN is no bound."""
    better = other.lower > best.lower
    lower = torch.where(better, other.lower, best.lower)
    if best.upper is None or other.upper is None:
        upper, size = best.upper if other.upper is None else other.upper, best.magnitude
        size = None if size is None else torch.where(better, other.magnitude, size)
    else:
        upper = torch.where(other.upper < best.upper, other.upper, best.upper)
        size = None if best.magnitude is None else torch.maximum(best.magnitude, other.magnitude)
    return Deviation(lower, upper, size)
