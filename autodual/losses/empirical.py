"""Losses at clean and attacked inputs: they prove nothing, and serve as baselines and warm starts.

Attacks see the model in evaluation mode; the loss at what they find is computed in the model's own mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from autodual import attacks, search
from autodual.errors import SpecificationError
from autodual.losses.base import Loss
from autodual.network import BoundModule
from autodual.regions import Region


class CleanLoss(Loss):
    """Cross-entropy at the inputs themselves.

    Example:
        >>> import autodual, torch
        >>> model = torch.nn.Linear(2, 2)
        >>> loss, x, y = CleanLoss(autodual.certify(model)), torch.zeros(1, 2), torch.tensor([0])
        >>> torch.equal(loss(x, y, autodual.LInf(0.1)), torch.nn.functional.cross_entropy(model(x), y))
        True
    """

    def each(self, x: Any, y: Tensor, region: Region) -> Tensor:
        """Return every example's cross-entropy."""
        return F.cross_entropy(self.network(x), y, reduction="none")


class PGDLoss(Loss):
    """Cross-entropy at inputs found by projected gradient descent. Source: Madry et al. (2018); thesis, chapter 4.

    Args:
        network: what ``certify`` returned.
        steps: gradient steps of the attack.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        step_size: as for ``attacks.pgd``.
    """

    def __init__(
        self, network: BoundModule, steps: int = 8, reduction: str = "mean", *, step_size: float | None = None
    ) -> None:
        super().__init__(network, reduction=reduction)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise SpecificationError(f"steps must be an integer of at least 1, got {steps!r}")
        self.steps, self.step_size = steps, step_size

    def each(self, x: Any, y: Tensor, region: Region) -> Tensor:
        """Return every example's cross-entropy."""
        worst = attacks.pgd(self.network.model, x, y, region, steps=self.steps, step_size=self.step_size, keep="last")
        return F.cross_entropy(_run(self.network, worst), y, reduction="none")


class FGSMLoss(Loss):
    """Cross-entropy one gradient step away from a random start. Source: Wong, Rice, Kolter (2020); thesis, section 4.1.

    The step is ``step`` times as long as the way from the region's centre to its boundary, and projected onto the region. Such
    training may overfit to its own attack within an epoch; comparing it with ``attacks.pgd`` shows that.

    Args:
        network: what ``certify`` returned.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        numbers: ``step``, 1.25 as in the source.
    """

    numbers: ClassVar[Mapping[str, float]] = {"step": 1.25}

    def each(self, x: Any, y: Tensor, region: Region, *, step: float) -> Tensor:
        """Return every example's cross-entropy."""
        worst = attacks.fgsm(self.network.model, x, y, region, random_start=True, step_size=step, keep="last")
        return F.cross_entropy(_run(self.network, worst), y, reduction="none")


class TRADESLoss(Loss):
    """Clean cross-entropy, and how far an attack moves the predicted probabilities. Source: Zhang et al., TRADES (2019).

        cross_entropy(f(x)) + weight * max_z KL(p(x) || p(z))

    Args:
        network: what ``certify`` returned.
        steps: gradient steps of the attack, which climbs the divergence from a random start.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        numbers: ``weight``, 6 as in the source.
    """

    numbers: ClassVar[Mapping[str, float]] = {"weight": 6.0}

    def __init__(self, network: BoundModule, steps: int = 8, reduction: str = "mean", **numbers: float) -> None:
        super().__init__(network, reduction=reduction, **numbers)
        self.steps = steps

    def each(self, x: Any, y: Tensor, region: Region, *, weight: float) -> Tensor:
        """Return every example's loss."""
        model = self.network.model
        with search.evaluation(model), torch.no_grad():
            clean = model(x).log_softmax(1)
            problem = search.Problem.build(model, x, region)
            descent = search.Search(problem, lambda outputs: -_divergence(clean, outputs.log_softmax(1)))
            points = descent.last(self.steps, None, None, random_start=True)  # at x itself the divergence has no slope
        worst = problem.form(points)
        scores = self.network(x).log_softmax(1)
        divergence = _divergence(scores, _run(self.network, worst).log_softmax(1))
        return F.nll_loss(scores, y, reduction="none") + weight * divergence


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) of log-probabilities ``(batch, classes)``."""
    return (p.exp() * (p - q)).sum(1)


def _run(network: BoundModule, x: Any) -> Tensor:
    if isinstance(x, Mapping):
        return network(**x)
    return network(*x) if isinstance(x, tuple) else network(x)
