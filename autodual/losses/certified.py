"""Losses over bounds: upper bounds of the worst loss in the region, or estimates of such."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from autodual.errors import SpecificationError
from autodual.loss_bounds import LossBounds
from autodual.losses.base import Loss, Objective, check_share, mixed, of_margins, regularized
from autodual.methods import Adaptive, Dual, Method
from autodual.network import BoundModule
from autodual.regions import Region


class RobustLoss(Loss):
    """The robust loss of a bound, with a share of the clean loss and a regulariser for intervals.

        (1 - kappa) * loss(margins) + kappa * cross_entropy(f(x)) + regularize * R

    Source: thesis, Theorem 2 (eq. 3.23); Gowal et al., interval bound propagation (2018), for kappa; Shi et al. (2021) for R,
    ``autodual.losses.regularizers.interval_regularizer``.

    Args:
        network: what ``certify`` returned.
        method: how to bound.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        objective: ``"cross-entropy"`` or ``"hinge"``, of the margins; or ``"fused"``, the worst cross-entropy bounded as one
            function of the outputs, ``LossBounds.cross_entropy``: one row in place of one for each rival class. Its chords span
            the margins' intervals: train so over interval boxes, as ``CROWNIBPLoss`` does. Where nothing keeps intervals
            narrow, as under projections or the exact dual network, the chords say little and training fails.
        rivals: bound so many margins of each example by the method, those that intervals leave lowest, and the others by
            intervals; by default all. A walk costs as much as it has rows, and few rivals weigh in a loss.
        numbers: ``kappa``, share of the clean loss; ``regularize``, weight of the regulariser.

    Example:
        >>> import autodual, torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> loss, x, y = RobustLoss(autodual.certify(model)), torch.tensor([[1.0, 0.0]]), torch.tensor([0])
        >>> loss(x, y, autodual.LInf(0.0)).item() == torch.nn.functional.cross_entropy(model(x), y).item()
        True
        >>> worst = torch.nn.functional.cross_entropy(model(torch.tensor([[0.5, 0.5]])), y)
        >>> torch.allclose(loss(x, y, autodual.LInf(0.5)), worst)  # exact for a linear model; in general an upper bound
        True
    """

    numbers: ClassVar[Mapping[str, float]] = {"kappa": 0.0, "regularize": 0.0}

    def __init__(
        self,
        network: BoundModule,
        method: str | Method = "dual",
        reduction: str = "mean",
        objective: Objective = "cross-entropy",
        *,
        rivals: int | None = None,
        **numbers: float,
    ) -> None:
        super().__init__(network, reduction=reduction, **numbers)
        self.method, self.objective, self.rivals = method, _checked(objective), rivals
        if objective == "fused" and rivals is not None:
            raise SpecificationError(
                f'rivals are margins; objective="fused" bounds none, so rivals must be None, got {rivals!r}'
            )

    def each(self, x: Any, y: Tensor, region: Region, *, kappa: float, regularize: float, **others: float) -> Tensor:
        """Return every example's loss."""
        bounds = self.network.loss_bounds(x, y, region)
        robust = None
        if check_share("kappa", kappa) < 1:
            robust = self.robust(bounds, **others)
        clean = F.cross_entropy(self.network(x), bounds.y, reduction="none") if kappa else None
        losses = mixed(kappa, robust, clean)
        return regularized(losses, regularize, bounds, region, x)

    def robust(self, bounds: LossBounds) -> Tensor:
        """Return every example's loss without its clean share, ``(batch,)``."""
        if self.objective == "fused":
            return bounds.cross_entropy(self.method)
        return of_margins(self.margins(bounds), bounds.y, self.objective)

    def margins(self, bounds: LossBounds) -> Tensor:
        """Bound the margins that the loss is made of, ``(batch, classes)``."""
        return bounds.margins(self.method, rivals=self.rivals)


class IntervalLoss(RobustLoss):
    """``RobustLoss`` over interval bounds: interval bound propagation (IBP). Source: Gowal et al. (2018).

    Args:
        network: what ``certify`` returned.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        objective: as for ``RobustLoss``.
        numbers: as for ``RobustLoss``.

    Example:
        >>> import autodual, torch
        >>> net = autodual.certify(torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)))
        >>> loss = IntervalLoss(net, kappa=0.5)
        >>> x, y = torch.zeros(1, 2), torch.tensor([1])
        >>> bool(loss(x, y, autodual.LInf(0.1)) <= loss(x, y, autodual.LInf(0.1), kappa=0.0))
        True
    """

    def __init__(
        self, network: BoundModule, reduction: str = "mean", objective: Objective = "cross-entropy", **numbers: float
    ) -> None:
        super().__init__(network, "interval", reduction, objective, **numbers)


class CROWNIBPLoss(RobustLoss):
    """Margins between interval bounds and one walk back over interval boxes (CROWN-IBP). Source: Zhang et al. (2020).

        margins = (1 - beta) * interval + beta * walked,    loss as in ``RobustLoss``

    With ``objective="fused"`` the two losses are mixed, not their margins, and the walk has one row for each example.
    Annealing beta from 1 to 0 trains by the tighter bound first and by the cheaper one later.

    Args:
        network: what ``certify`` returned.
        method: the walk: ``Adaptive(intermediate="interval")`` as in the source, or ``Dual(intermediate="interval")``, whose
            parallel slopes cost less.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        objective: as for ``RobustLoss``.
        rivals: as for ``RobustLoss``.
        numbers: ``beta``, share of the walk; ``kappa`` and ``regularize`` as for ``RobustLoss``.
    """

    numbers: ClassVar[Mapping[str, float]] = {"beta": 1.0, **RobustLoss.numbers}

    def __init__(
        self,
        network: BoundModule,
        method: Dual | Adaptive = Adaptive(intermediate="interval"),  # noqa: B008  frozen
        reduction: str = "mean",
        objective: Objective = "cross-entropy",
        *,
        rivals: int | None = None,
        **numbers: float,
    ) -> None:
        super().__init__(network, method, reduction, objective, rivals=rivals, **numbers)

    def robust(self, bounds: LossBounds, beta: float) -> Tensor:
        """Mix interval bounds and the walk's."""
        interval = bounds.margins("interval") if check_share("beta", beta) < 1 else None
        if self.objective == "fused":
            walked = bounds.cross_entropy(self.method) if beta else None
            return mixed(beta, None if interval is None else of_margins(interval, bounds.y), walked)
        walked = self.margins(bounds) if beta else None
        return of_margins(mixed(beta, interval, walked), bounds.y, self.objective)


class EnvelopeLoss(Loss):
    """The clean loss, and a penalty for each plane of the polyhedral envelope that cuts the region.

        cross_entropy(f(x)) + weight * sum_j max(0, 1 - d_j)

    where d_j is the distance of x from the plane on which the linear bound of ``f_y - f_j`` is zero, in units of the region's
    reach: nothing is asked of planes beyond the region. Source: Liu, Salzmann, Süsstrunk (2021).

    Args:
        network: what ``certify`` returned.
        method: how the linear bounds are found.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        numbers: ``weight`` of the penalty.
    """

    numbers: ClassVar[Mapping[str, float]] = {"weight": 1.0}

    def __init__(
        self,
        network: BoundModule,
        method: Dual | Adaptive = Dual(intermediate="interval"),  # noqa: B008  frozen
        reduction: str = "mean",
        **numbers: float,
    ) -> None:
        super().__init__(network, reduction=reduction, **numbers)
        self.method = method

    def each(self, x: Any, y: Tensor, region: Region, *, weight: float) -> Tensor:
        """Return every example's loss."""
        bounds = self.network.loss_bounds(x, y, region)
        clean = F.cross_entropy(self.network(x), bounds.y, reduction="none")
        return clean + weight * (1 - bounds.distances(self.method)).clamp(min=0).sum(1) if weight else clean


def _checked(objective: Objective) -> Objective:
    if objective not in ("cross-entropy", "hinge", "fused"):
        raise SpecificationError(f'objective must be "cross-entropy", "hinge" or "fused", got {objective!r}')
    return objective
