"""Several methods, the cheap ones first, and each only for the examples that those before it left undecided."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from autodual.bounds.run import Run
from autodual.methods import Adaptive, Auto, Dual, Method

Ends = tuple[Tensor, Tensor, Tensor]
"""Lower ends, upper ends and float allowance, ``(batch, rows)`` each."""


class Escalation:
    """Bounds of rows by one method after the other; every end is the best one seen.

    Args:
        run: of the whole batch; told in the end what settled each example, and which run still has the others.
        method: the methods, and the time they have.
        until_positive: settle an example as soon as all its lower ends exceed their float allowance, and give up on one whose
            rows are not even positive at the reference point.
        lower_only: whether upper ends, and their rounding, do not matter.
    """

    def __init__(self, run: Run, method: Auto, *, until_positive: bool, lower_only: bool) -> None:
        self.run, self.method, self.until_positive, self.lower_only = run, method, until_positive, lower_only
        self.left = torch.arange(run.batch, device=next(iter(run.given.values())).device)
        self.known: dict[type[Method], Run] = {}
        self.settled: list[str | None] = [None] * run.batch

    def bounds(self, spec: Tensor | None, bound: Callable[..., Ends]) -> Ends:
        """Run the methods.

        Args:
            spec: as for ``bound_rows``.
            bound: ``bound_rows`` itself, for one method, with ``known`` runs whose boxes serve again.
        """
        started, best, part = time.monotonic(), None, self.run
        for name, method in self.method.stages:
            late = self.method.budget is not None and time.monotonic() - started >= self.method.budget
            if best is not None and (late or not len(self.left)):
                break
            part = self.run.fork() if len(self.left) == self.run.batch else self.run.take(self.left).fork()
            rows = spec if spec is None or spec.ndim == 2 else spec[self.left]
            ends = bound(part, method, rows, known=self.known)
            best = ends if best is None else self._improved(best, ends)
            if isinstance(method, (Dual, Adaptive)):
                self.known[type(method)] = part
            part = self._narrow(part, name, best, rows)
        self.run.settled, self.run.remaining = tuple(self.settled), (part, self.left)
        return best

    def _improved(self, best: Ends, ends: Ends) -> Ends:
        """Put the better ends where their examples are."""
        lower, upper, slack = (end[self.left] for end in best)
        up, down = ends[0] > lower, ends[1] < upper
        rounding = torch.where(up, ends[2], slack)
        if not self.lower_only:
            rounding = torch.where(up == down, rounding, torch.maximum(slack, ends[2]))
        found = (torch.where(up, ends[0], lower), torch.where(down, ends[1], upper), rounding)
        return tuple(whole.index_copy(0, self.left, part) for whole, part in zip(best, found, strict=True))

    def _narrow(self, part: Run, name: str, best: Ends, rows: Tensor | None) -> Run:
        """Leave settled examples, and those that cannot be, and return the run of the others."""
        if not self.until_positive or rows is None:
            return part
        lower, _, slack = (end[self.left] for end in best)
        asked = (rows != 0).any(-1)
        positive = ((lower > slack) & lower.isfinite() & slack.isfinite()) | ~asked
        output = part.program.graph.output
        at_reference = (rows * part.examples(output, part.values[output].detach())[:, None]).sum(-1)
        done, hopeless = positive.all(1), (asked & (at_reference <= 0)).any(1)
        for example in self.left[done].tolist():
            self.settled[example] = self.settled[example] or name
        keep = (~done & ~hopeless).nonzero()[:, 0]
        if len(keep) == len(self.left) or (len(keep) and not part.divisible):
            return part
        self.left = self.left[keep]
        if not len(keep):
            return part
        self.known = {kind: run.take(keep) for kind, run in self.known.items()}
        return part.take(keep)
