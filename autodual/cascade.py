"""Cascades of certified networks: the first stage that certifies its own prediction answers, if the stages before agree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from autodual.errors import SpecificationError
from autodual.methods import Method
from autodual.network import BoundModule, certify, proving
from autodual.regions import L1, L2, LInf, Region
from autodual.report import Verdict, why_none
from autodual.specification import check_labels
from dual_layers import NONE, REAL, ROUNDED, Guarantee

ABSTAINED = -1
"""What ``predict`` returns where the cascade gives no answer, and ``stage`` where no stage decided."""


@dataclass(frozen=True)
class CascadeReport:
    """The outcome of a cascade's verification, one entry per example.

    Attributes:
        certified: ``(batch,)`` bool: the answer is y, and no input of the region is answered otherwise; some may get no answer.
        verdict: per example ``CERTIFIED``, ``FALSIFIED`` (x itself gets another answer than y) or ``UNKNOWN``.
        predicted: ``(batch,)`` the answers, -1 where the cascade abstains.
        stage: ``(batch,)`` the stage that decided, counted from 0; -1 where none did.
        y: ``(batch,)`` the labels.
        guarantee: what ``certified`` is worth; ``NONE`` without the check of agreement.
        agreement: whether earlier stages had to predict the same label.
        stages: how many stages there are.
        method: the method that bounded.
        region: description of the region.
    """

    certified: Bool[Tensor, " batch"]
    verdict: tuple[Verdict, ...]
    predicted: Int[Tensor, " batch"]
    stage: Int[Tensor, " batch"]
    y: Int[Tensor, " batch"]
    guarantee: Guarantee
    agreement: bool
    stages: int
    method: Method
    region: str

    @property
    def correct(self) -> Bool[Tensor, " batch"]:
        """Whether the answer at x is y: with a guarantee the same examples as ``certified``."""
        return self.predicted == self.y

    @property
    def abstained(self) -> Bool[Tensor, " batch"]:
        """Whether the cascade gives no answer at x."""
        return self.predicted == ABSTAINED

    def summary(self) -> str:
        """Describe the outcome in a few lines."""
        total = len(self.verdict)

        def share(mask: Tensor) -> str:
            count = int(mask.sum())
            return f"{count:>6} of {total}" + (f"  ({100 * count / total:.2f} %)" if total else "")

        lines = [
            f"region     {self.region}",
            f"method     {self.method}, guarantee {self.guarantee}",
            f"correct    {share(self.correct)}",
            f"certified  {share(self.certified)}",
            f"wrong      {share(~self.correct & ~self.abstained)}",
            f"abstained  {share(self.abstained)}",
            "decided    " + ", ".join(f"{int((self.stage == i).sum())} by stage {i}" for i in range(self.stages)),
        ]
        if self.guarantee == NONE:
            lines.append(f"nothing can be certified: {self._reason()}")
        return "\n".join(lines)

    def _reason(self) -> str:
        without = "without the check of agreement inputs of one region may get different answers"
        return why_none(self.method) if self.agreement else without

    def __str__(self) -> str:
        """Return the summary."""
        return self.summary()


class Cascade:
    """Several networks in turn: the first that certifies its own prediction answers, if all before it predict the same.

        F(x) = f_i(x)   with i the first stage whose prediction is the same on all of B(x),   if f_1(x) = ... = f_i(x)
        F(x) = abstain  if there is no such stage, or an earlier one predicts another label

    Guarantee: if F answers y at x, then every z in B(x) is answered y or not at all. It is proved for the balls ``LInf``,
    ``L2`` and ``L1`` with one radius for all inputs and stages; a domain, the same for all, has to hold x. Then

        z in B(x)  if and only if  x in B(z)                     for all inputs x, z of the domain.            (*)

    Why it holds: let stage i answer y at x, stage j answer y' at z in B(x). If i <= j, stage i's certificate at x covers z, so
    f_i(z) = y; stages up to j agree at z, so y' = f_i(z). If j < i, stage j's certificate at z covers x by (*), so f_j(x) = y';
    stages up to i agree at x, so y = f_j(x). Either way y = y'. The first case uses the agreement at z, the second that at x:
    with neither, two stages that are constant with different labels are a counterexample wherever the first one's certificates
    end. A certificate at x alone says nothing of the second case: z is answered from certificates on B(z), not on B(x).

    What it does not say: an adversary cannot turn an answer into another one, but may turn it into an abstention. For an answer
    on all of B(x) every z would need its own certificate.

    Source: thesis, section 3.4.7, Algorithm 4; our differences: its text checks agreement, its figures do not (they are
    reproduced by ``agreement=False``, which guarantees nothing), and its signs of the tests on J are turned.

    Args:
        stages: what ``certify`` returned, or modules to certify; at least one.
        agreement: abstain where an earlier stage predicts another label. Without it no guarantee holds.

    Example:
        >>> import torch
        >>> def line(slope, offset):  # class 1 where slope * x + offset > 0
        ...     model = nn.Linear(1, 2)
        ...     model.weight.data, model.bias.data = torch.tensor([[0.0], [slope]]), torch.tensor([0.0, offset])
        ...     return model
        >>> first, second = line(1.0, 0.0), line(1.0, -0.5)  # boundaries at 0 and at 0.5
        >>> x, region = torch.tensor([[-1.0], [-0.1], [0.2], [1.0]]), LInf(0.3)
        >>> Cascade([first, second]).predict(x, region)  # the third: the second stage is sure, but the first disagrees
        tensor([ 0,  0, -1,  1])
        >>> Cascade([first, second]).verify(x, [0, 0, 0, 1], region).stage
        tensor([ 0,  1, -1,  0])
    """

    def __init__(self, stages: Iterable[BoundModule | nn.Module], *, agreement: bool = True) -> None:
        self.stages = tuple(stage if isinstance(stage, BoundModule) else certify(stage) for stage in stages)
        self.agreement = agreement
        if not self.stages:
            raise SpecificationError("a cascade needs at least one stage")

    def predict(self, x: Tensor, region: Region, method: str | Method = "dual") -> Int[Tensor, " batch"]:
        """Answer with a label, or -1 where the cascade abstains.

        Args:
            x: the stages' input.
            region: the ball, the same for every input that is ever asked.
            method: how to bound; the guarantee holds whatever was used at other inputs.

        Raises:
            SpecificationError: the guarantee does not hold for such a region or method.
        """
        return self._decide(x, region, self._guaranteed(x, region, method), self.agreement).predicted

    def verify(self, x: Tensor, y: Any, region: Region, method: str | Method = "dual") -> CascadeReport:
        """Certify that no input of the region gets an answer other than y.

        Args:
            x: the stages' input.
            y: labels, ``(batch,)`` integers.
            region: the ball, the same for every input that is ever asked.
            method: how to bound.

        Raises:
            SpecificationError: the guarantee does not hold for such a region or method, or labels do not fit.
        """
        options = self._guaranteed(x, region, method)
        predicted, stage, classes, guarantee = self._decide(x, region, options, self.agreement)
        y = check_labels(y, len(x), classes, x.device)
        answered, right = predicted != ABSTAINED, predicted == y
        guarantee = guarantee if self.agreement else NONE
        certified = right & (guarantee != NONE)
        verdict = tuple(
            Verdict.CERTIFIED if good else Verdict.FALSIFIED if bad else Verdict.UNKNOWN
            for good, bad in zip(certified.tolist(), (answered & ~right).tolist(), strict=True)
        )
        count, text = len(self.stages), repr(region)
        return CascadeReport(certified, verdict, predicted, stage, y, guarantee, self.agreement, count, options, text)

    def uncertified(self, x: Tensor, region: Region, method: str | Method = "dual") -> Bool[Tensor, " batch"]:
        """Tell which examples no stage certifies a prediction for: those that a further stage is asked, and trained, on.

        Source: thesis, Algorithm 4, first loop; it keeps examples whose J is not positive for some other class.

        Args:
            x: the stages' input.
            region: any region.
            method: how to bound.

        Returns:
            ``(batch,)`` bool; whether the stages agree is not asked.

        Raises:
            SpecificationError: the method only estimates.

        Example:
            >>> import autodual
            >>> from autodual.digits import load_model, load_test_set
            >>> x, y = (part[:100] for part in load_test_set())
            >>> stages, region = [], LInf(0.15, domain=(0.0, 1.0))
            >>> for train in (lambda x, y: load_model(), lambda x, y: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))):
            ...     stages.append(autodual.certify(train(x, y)))  # your robust training, on what is left
            ...     left = Cascade(stages[-1:]).uncertified(x, region)
            ...     x, y = x[left], y[left]
            >>> cascade = Cascade(stages)
        """
        return self._decide(x, region, proving(method), agreement=False).predicted == ABSTAINED

    @torch.no_grad()
    def _decide(self, x: Tensor, region: Region, method: Method, agreement: bool) -> _Decision:
        """Ask one stage after the other, each about the examples that are still open."""
        _check_input(x)
        predicted, stage = (torch.full((len(x),), ABSTAINED, device=x.device) for _ in range(2))
        first, index, widths, guarantee = predicted, torch.arange(len(x), device=x.device), [], method.guarantee
        for number, network in enumerate(self.stages):
            asked = x[index]
            scores = network(asked)
            if scores.ndim != 2:
                raise SpecificationError(f"stage {number} must return (batch, classes), but returns {tuple(scores.shape)}")
            label = scores.argmax(1)
            report = network.verify(asked, label, region.take(index, x), method)
            widths.append(scores.shape[1])
            guarantee = guarantee & report.guarantee
            first = label if number == 0 else first
            heard = first == label if agreement else torch.ones_like(report.certified)
            decided = index[report.certified & heard]
            predicted[decided], stage[decided] = label[report.certified & heard], number
            kept = heard & ~report.certified
            index, first = index[kept], first[kept]
            if not len(index):
                break
        if len(set(widths)) > 1:
            raise SpecificationError(f"the stages must have the same classes, but their numbers are {widths}")
        return _Decision(predicted, stage, widths[0], guarantee)

    def _guaranteed(self, x: Tensor, region: Region, method: str | Method) -> Method:
        """Check that the guarantee holds, or was not asked for."""
        options = proving(method)
        _check_input(x)
        if self.agreement:
            _check_region(region, x)
            if options.guarantee not in (REAL, ROUNDED):
                raise SpecificationError(
                    f"the guarantee of a cascade rests on certificates at all points of a ball, but each by {options} holds "
                    f'with {options.guarantee} by itself; take method="dual", or agreement=False for no guarantee'
                )
        return options


class _Decision(NamedTuple):
    predicted: Tensor
    stage: Tensor
    classes: int
    guarantee: Guarantee


def _check_input(x: Any) -> None:
    if not isinstance(x, Tensor) or x.ndim == 0:
        raise SpecificationError(f"a cascade takes one input tensor with the batch first, got {type(x).__name__}")


def _check_region(region: Region, x: Tensor) -> None:
    """Check that ``z in B(x)`` and ``x in B(z)`` are the same for all inputs: equation (*) of ``Cascade``."""
    if type(region) not in (LInf, L2, L1):
        raise SpecificationError(
            f"the guarantee of a cascade needs z in B(x) whenever x is in B(z), which is known of autodual.LInf, L2 and L1, "
            f"but not of {region!r}; agreement=False asks for no guarantee"
        )
    if isinstance(region.eps, Tensor) and region.eps.ndim > 0:
        raise SpecificationError(
            "the guarantee of a cascade needs one radius for all inputs: eps must be a number, got a tensor of shape "
            f"{tuple(region.eps.shape)}"
        )
    if region.domain is None:
        return
    for end in region.domain:
        if isinstance(end, Tensor) and end.ndim == x.ndim and len(end) > 1:
            raise SpecificationError(
                f"the guarantee of a cascade needs one domain for all inputs, but the shape of {region!r} has a batch axis"
            )
    region.validate(x)
    lower, upper = region.domain_of(x)
    outside = ((x < lower) | (x > upper)).flatten(1).any(1) if x.ndim > 1 else (x < lower) | (x > upper)
    if outside.any():
        raise SpecificationError(
            f"x: example {int(outside.nonzero()[0])} lies outside the domain, where balls are not symmetric"
        )
