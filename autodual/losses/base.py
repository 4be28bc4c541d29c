"""What all losses have in common: their numbers, their reduction, and what is done with margins."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autodual.errors import SpecificationError
from autodual.loss_bounds import LossBounds
from autodual.losses.regularizers import interval_regularizer
from autodual.network import BoundModule
from autodual.regions import Region

Objective = Literal["cross-entropy", "hinge", "fused"]


class Loss(nn.Module):
    """A loss of a batch whose inputs may lie anywhere in a region.

    Args:
        network: what ``certify`` returned.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        numbers: values for the loss' own numbers in place of their defaults.

    Attributes:
        numbers: names and defaults of what may be set at every call, such as the weight of a part.
    """

    numbers: ClassVar[Mapping[str, float]] = {}

    def __init__(self, network: BoundModule, *, reduction: str = "mean", **numbers: float) -> None:
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise SpecificationError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
        self.network, self.reduction = network, reduction
        self.settings = self._settings(dict(self.numbers), numbers)

    def forward(self, x: Any, y: Any, region: Region, **numbers: float) -> Tensor:
        """Compute the loss.

        Args:
            x: the model's input, ``(batch, ...)``.
            y: labels, ``(batch,)`` integers.
            region: where the inputs may lie, in the units of x.
            numbers: values for this call alone.

        Raises:
            SpecificationError: the loss has no such number, or input, labels or region do not fit the model.
        """
        losses = self.each(x, torch.as_tensor(y), region, **self._settings(self.settings, numbers))
        return {"none": losses, "mean": losses.mean(), "sum": losses.sum()}[self.reduction]

    @abstractmethod
    def each(self, x: Any, y: Tensor, region: Region, **numbers: float) -> Tensor:
        """Return every example's loss, ``(batch,)``."""

    def _settings(self, settings: Mapping[str, float], changes: Mapping[str, float]) -> dict[str, float]:
        unknown = [name for name in changes if name not in self.numbers]
        if unknown:
            known = ", ".join(self.numbers) or "none"
            raise SpecificationError(f"{type(self).__name__} has no number {unknown[0]!r}; it has: {known}")
        for name, value in changes.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise SpecificationError(f"{name} of {type(self).__name__} must be a number of at least 0, got {value!r}")
        return {**settings, **changes}


def check_share(name: str, value: float) -> float:
    """Check that a number is a share of a whole.

    Raises:
        SpecificationError: it is above 1.
    """
    if value > 1:
        raise SpecificationError(f"{name} is a share and must lie between 0 and 1, got {value!r}")
    return value


def of_margins(margins: Tensor, y: Tensor, objective: Objective = "cross-entropy") -> Tensor:
    """Turn margins ``f_y - f_j``, or lower bounds of them, into losses, ``(batch,)``.

    ``cross-entropy`` is that of minus the margins (thesis, Theorem 2): with bounds an upper bound of the worst cross-entropy.
    ``hinge`` is by how much the smallest margin falls short of 1, at least 0: an upper bound of the worst zero-one loss.
    A margin of minus infinity, of which nothing is known, makes the loss infinite and leaves it without a derivative.
    """
    known = margins.isfinite().all(1)
    if objective == "hinge":
        others = margins.scatter(1, y[:, None], torch.inf)
        losses = (1 - others.amin(1)).clamp(min=0)
    else:
        losses = F.cross_entropy(-margins, y, reduction="none")
    return torch.where(known, losses, torch.inf)


def regularized(losses: Tensor, weight: float, bounds: LossBounds, region: Region, x: Any) -> Tensor:
    """Add the interval regulariser, where it has a weight."""
    return losses + weight * interval_regularizer(bounds.hidden(), region, x) if weight else losses


def mixed(weight: float, first: Tensor | None, second: Tensor | None) -> Tensor:
    """Return ``(1 - weight) * first + weight * second``; a part without weight may be missing."""
    if first is None or second is None:
        return second if first is None else first
    return (1 - weight) * first + weight * second  # infinite if a part is; torch.lerp makes NaN of that
