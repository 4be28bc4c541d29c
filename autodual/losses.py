"""Robust losses as modules."""

from __future__ import annotations

from typing import Any, ClassVar

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

    numbers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, network: BoundModule, method: str | Method = "dual", reduction: str = "mean") -> None:
        super().__init__()
        self.network = network
        self.method = method
        self.reduction = reduction

    def forward(self, x: Any, y: Tensor, region: Region) -> Tensor:
        """Bound the worst cross-entropy over the region. Source: thesis, Theorem 2."""
        return self.network.robust_loss(x, y, region, self.method, reduction=self.reduction)


LOSSES: dict[str, type[nn.Module]] = {"robust": RobustLoss}
