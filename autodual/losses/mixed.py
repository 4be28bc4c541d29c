"""Losses between an attack and interval bounds: not bounds themselves, yet what they train can be certified.

Interval bounds over the whole region cost accuracy; these take them over a part of it, or only for a part of the loss.
Attacks see the model in evaluation mode.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from autodual import attacks
from autodual.errors import SpecificationError
from autodual.losses.base import Loss, check_share, mixed, of_margins, regularized
from autodual.network import BoundModule
from autodual.regions import Box, Region


class _Attacking(Loss):
    """A loss with an attack inside.

    Args:
        network: what ``certify`` returned.
        steps: gradient steps of the attack.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        numbers: the loss' own.
    """

    def __init__(self, network: BoundModule, steps: int = 8, reduction: str = "mean", **numbers: float) -> None:
        super().__init__(network, reduction=reduction, **numbers)
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise SpecificationError(f"steps must be an integer of at least 1, got {steps!r}")
        self.steps = steps

    def attacked(self, x: Any, y: Tensor, region: Region) -> Tensor:
        """Return what the attack finds."""
        if not isinstance(x, Tensor):
            raise SpecificationError(f"{type(self).__name__} takes a model of one input tensor, got {type(x).__name__}")
        return attacks.pgd(self.network.model, x, y, region, steps=self.steps, keep="last")


class SABRLoss(_Attacking):
    """Interval bounds over a small box around what an attack finds. Source: Müller et al., small boxes (2023).

    The small box has ``shrink`` times the widths of the region's hull and is moved inside that hull; with ``shrink`` 1 it is
    the hull, and the loss interval training's.

    Args:
        network: what ``certify`` returned.
        steps: gradient steps of the attack.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        numbers: ``shrink``; ``kappa`` and ``regularize`` as for ``RobustLoss``.
    """

    numbers: ClassVar[Mapping[str, float]] = {"shrink": 0.4, "kappa": 0.0, "regularize": 0.0}

    def each(self, x: Any, y: Tensor, region: Region, *, shrink: float, kappa: float, regularize: float) -> Tensor:
        """Return every example's loss."""
        y = y.to(x.device).long()
        small = small_box(region, x, self.attacked(x, y, region), check_share("shrink", shrink))
        bounds = self.network.loss_bounds(0.5 * (small.lower + small.upper), y, small)
        losses = of_margins(bounds.margins("interval"), bounds.y)
        if check_share("kappa", kappa):
            losses = mixed(kappa, losses, F.cross_entropy(self.network(x), bounds.y, reduction="none"))
        return regularized(losses, regularize, bounds, small, x)


class _Between(_Attacking):
    """A loss between the margins that an attack leaves and those that intervals prove (De Palma et al., 2024)."""

    numbers: ClassVar[Mapping[str, float]] = {"alpha": 0.5, "regularize": 0.0}

    def each(self, x: Any, y: Tensor, region: Region, *, alpha: float, regularize: float) -> Tensor:
        """Return every example's loss; a part without weight is not computed."""
        bounds = self.network.loss_bounds(x, y, region)
        scores = self.network(self.attacked(x, bounds.y, region)) if check_share("alpha", alpha) < 1 else None
        proved = bounds.margins("interval") if alpha else None
        return regularized(self.between(alpha, scores, proved, bounds.y), regularize, bounds, region, x)

    @abstractmethod
    def between(self, alpha: float, scores: Tensor | None, proved: Tensor | None, y: Tensor) -> Tensor:
        """Return the losses from attacked scores and proved margins, ``(batch, classes)``; what has no weight is None."""


class MTLIBPLoss(_Between):
    """A mean of the attacked loss and interval training's. Source: De Palma et al., expressive losses (2024).

        (1 - alpha) * cross_entropy(f(attacked)) + alpha * loss(interval margins)

    Args:
        network: what ``certify`` returned.
        steps: gradient steps of the attack.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        numbers: ``alpha``; ``regularize`` as for ``RobustLoss``.
    """

    def between(self, alpha: float, scores: Tensor | None, proved: Tensor | None, y: Tensor) -> Tensor:
        """Mix losses."""
        attacked = None if scores is None else F.cross_entropy(scores, y, reduction="none")
        return mixed(alpha, attacked, None if proved is None else of_margins(proved, y))


class CCIBPLoss(_Between):
    """The loss of margins between attacked ones and interval bounds. Source: De Palma et al., expressive losses (2024).

        loss((1 - alpha) * margins of f(attacked) + alpha * interval margins)

    Args:
        network: what ``certify`` returned.
        steps: gradient steps of the attack.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        numbers: ``alpha``; ``regularize`` as for ``RobustLoss``.
    """

    def between(self, alpha: float, scores: Tensor | None, proved: Tensor | None, y: Tensor) -> Tensor:
        """Mix margins."""
        attacked = None if scores is None else scores.gather(1, y[:, None]) - scores
        return of_margins(mixed(alpha, attacked, proved), y)


def small_box(region: Region, x: Tensor, around: Tensor, shrink: float) -> Box:
    """Return a box of ``shrink`` times the region's widths around a point of it, moved so that it lies within.

    Raises:
        SpecificationError: the region is not box-shaped.
    """
    if not region.separable:
        raise SpecificationError(f"a small box needs a box-shaped region, such as LInf or Box, got {region!r}")
    hull = region.hull(x)
    half = 0.5 * shrink * (hull.upper - hull.lower)
    center = torch.minimum(torch.maximum(around, hull.lower + half), hull.upper - half)
    return Box(torch.maximum(center - half, hull.lower), torch.minimum(center + half, hull.upper))
