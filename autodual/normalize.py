"""Normalisation as the first module of a model, so that regions stay in the units of x."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation, per channel (axis 1).

    Put it in front of a network trained on normalised inputs; then eps is in the units of the raw input.

    Args:
        mean: one number per channel.
        std: one positive number per channel.

    Raises:
        ValueError: lengths differ, or a standard deviation is not positive.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise ValueError(f"mean and std need the same length and positive std, got {list(mean)} and {list(std)}")
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(x - mean) / std`` with channels in axis 1."""
        return F.batch_norm(x, self.mean, self.std.square(), training=False, eps=0.0)
