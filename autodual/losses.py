"""Robust losses as modules."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from autodual.methods import Method
from autodual.network import BoundModule
from autodual.regions import Region


class RobustLoss(nn.Module):
    """``network.robust_loss`` as a module, so that wrappers around ``forward`` (such as data parallelism) apply.

    Args:
        network: what ``certify`` returned.
        method: how to bound.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """

    def __init__(self, network: BoundModule, method: str | Method = "dual", reduction: str = "mean") -> None:
        super().__init__()
        self.network = network
        self.method = method
        self.reduction = reduction

    def forward(self, x: Any, y: Tensor, region: Region) -> Tensor:
        """Bound the worst cross-entropy over the region. Source: thesis, Theorem 2."""
        return self.network.robust_loss(x, y, region, self.method, reduction=self.reduction)
