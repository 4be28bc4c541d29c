"""What ``verify`` hands back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from autodual.account import Account
from autodual.errors import SpecificationError
from autodual.estimators import Sampling
from autodual.methods import Method
from dual_layers import NONE, Guarantee

LISTED = 5
"""How many violations a summary lists."""


class Verdict(Enum):
    """What is known about one example."""

    CERTIFIED = "certified"
    FALSIFIED = "falsified"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Report:
    """The outcome of a verification, one entry per example.

    Attributes:
        certified: ``(batch,)`` bool: every margin with ``j != y`` exceeds the float allowance, strictly.
        verdict: per example ``CERTIFIED``, ``FALSIFIED`` (the region's centre, replayed, is misclassified) or ``UNKNOWN``.
        predicted: ``(batch,)`` the model's prediction at x.
        y: ``(batch,)`` the labels.
        margins: ``(batch, classes)`` lower bounds of ``f_y - f_j`` over the region, 0 at ``j = y``.
        allowance: ``(batch, classes)`` what float rounding may cost each margin.
        guarantee: what the margins are worth; ``NONE`` never certifies.
        method: the method that computed them.
        region: description of the region.
        violations: where a region leaves the domain of an operator, or a value may leave the floats: one text per example
            and operator, with its interval and source line. Such examples are never certified.
        sampling: the random numbers behind the margins: how many, their seed, what was estimated and with what delta.
        settled: with ``"auto"``, per example the method that certified it, or None.
        accountant: explains a margin; holds on to the model and the input.
    """

    certified: Bool[Tensor, " batch"]
    verdict: tuple[Verdict, ...]
    predicted: Int[Tensor, " batch"]
    y: Int[Tensor, " batch"]
    margins: Float[Tensor, "batch classes"]
    allowance: Float[Tensor, "batch classes"]
    guarantee: Guarantee
    method: Method
    region: str
    violations: tuple[str, ...] = ()
    sampling: Sampling | None = None
    settled: tuple[str | None, ...] = ()
    accountant: Callable[[Report, int, int], Account] | None = field(default=None, repr=False, compare=False)

    def explain(self, example: int, target: int | None = None) -> Account:
        """Say where a margin is lost: its value at the reference point, and what the region and each relaxation take from it.

        The margin is computed again from the model, the input and the region, which must not have changed since.

        Args:
            example: the example's number.
            target: the class ``j`` of the margin ``f_y - f_j``; by default the one whose margin is worst.

        Returns:
            An ``Account``; print it, or ``.draw(path)`` a picture.

        Raises:
            SpecificationError: there is no such example or class, nothing is known of the margin, or it is another one now.
        """
        count, classes = self.margins.shape
        if not 0 <= example < count:
            raise SpecificationError(f"there is no example {example}: the report has {count}, numbered from 0")
        y = int(self.y[example])
        others = self.margins[example].index_fill(0, self.y[example], torch.inf)
        target = int(others.argmin()) if target is None else target
        if not 0 <= target < classes or target == y:
            raise SpecificationError(
                f"target must be a class from 0 to {classes - 1} other than example {example}'s own, {y}; got {target}"
            )
        if self.accountant is None:
            raise SpecificationError("a report that was copied or stored has lost its model: call verify again")
        if not others[target].isfinite():
            blamed = [text for text in self.violations if text.startswith(f"example {example}:")]
            raise SpecificationError(f"nothing is known of example {example}'s margin to class {target}{_listed(blamed)}")
        return self.accountant(self, example, target)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model out of copies and files."""
        return {**vars(self), "accountant": None}

    def summary(self) -> str:
        """Describe the outcome in a few lines."""
        total, counts = len(self.verdict), Counter(self.verdict)
        correct = int((self.predicted == self.y).sum())

        def share(count: int) -> str:
            return f"{count:>6} of {total}" + (f"  ({100 * count / total:.2f} %)" if total else "")

        lines = [
            f"region     {self.region}",
            f"method     {self.method}, guarantee {self.guarantee}",
            f"correct    {share(correct)}",
            f"certified  {share(counts[Verdict.CERTIFIED])}",
            f"falsified  {share(counts[Verdict.FALSIFIED])}",
            f"unknown    {share(counts[Verdict.UNKNOWN])}",
        ]
        by = Counter(name for name in self.settled if name is not None)
        if by:
            lines.append("settled    " + ", ".join(f"{count} by {name}" for name, count in by.items()))
        if self.violations:
            rest = len(self.violations) - LISTED
            lines += ["not bounded", *(f"  {text}" for text in self.violations[:LISTED])]
            lines += [f"  and {rest} more, in .violations"] if rest > 0 else []
        if self.sampling is not None:
            lines.append(f"drawn      {self.sampling}")
        if self.guarantee == NONE:
            lines.append(f"nothing can be certified: {self.reason}")
        return "\n".join(lines)

    @property
    def reason(self) -> str:
        """Why the guarantee is ``NONE``, and what to do."""
        return why_none(self.method)

    def __str__(self) -> str:
        """Return the summary."""
        return self.summary()


def _listed(texts: list[str]) -> str:
    return "".join(f"; {text}" for text in texts)


def why_none(method: Method) -> str:
    """Say why bounds by this method carry no guarantee, and what to do: it is the method, or else the model's mode."""
    if method.guarantee == NONE:
        return f'the {method.estimator} of random projections is an estimate; take estimator="tightest", or method="dual"'
    return "batch norm uses the statistics of the clean batch; call model.eval()"


def certified_by(
    margins: Float[Tensor, "batch classes"], allowance: Float[Tensor, "batch classes"], y: Int[Tensor, " batch"]
) -> Bool[Tensor, " batch"]:
    """Return which examples have every other margin finite and above its allowance; NaN and infinity fail."""
    positive = margins.isfinite() & allowance.isfinite() & (margins > allowance)
    own = F.one_hot(y, margins.shape[1]).bool()
    return (positive | own).all(1)
