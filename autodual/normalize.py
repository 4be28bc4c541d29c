"""Normalisation as the first module of a model, so that regions stay in the units of x."""

from __future__ import annotations

import math
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
        ValueError: lengths differ, a number is not finite, or a standard deviation is not positive.

    Example:
        >>> Normalize([0.5, 0.0], [0.25, 1.0])
        Normalize(mean=(0.5, 0), std=(0.25, 1))
        >>> Normalize([0.5], [0.25])(torch.tensor([[1.0], [0.0]]))
        tensor([[ 2.],
                [-2.]])
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        mean, std = [float(m) for m in mean], [float(s) for s in std]
        if len(mean) != len(std) or not all(s > 0 for s in std) or not all(map(math.isfinite, (*mean, *std))):
            raise ValueError(f"mean and std need the same length, finite numbers and positive std, got {mean} and {std}")
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(x - mean) / std`` with channels in axis 1."""
        try:
            return F.batch_norm(x, self.mean, self.std.square(), training=False, eps=0.0)
        except RuntimeError as error:  # checked only now: a branch on the shape would be one more thing to trace
            channels = len(self.mean)
            if x.ndim > 1 and x.shape[1] == channels:
                raise
            found = f"{x.shape[1]} in axis 1" if x.ndim > 1 else "no axis 1"
            raise ValueError(
                f"Normalize has {channels} channels, but the input of shape {tuple(x.shape)} has {found}"
            ) from error

    def extra_repr(self) -> str:
        """Return the numbers, for ``print(model)``."""
        mean, std = (", ".join(f"{value:g}" for value in values.tolist()) for values in (self.mean, self.std))
        return f"mean=({mean}), std=({std})"
