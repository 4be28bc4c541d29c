"""The largest radius for which a certificate was seen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RELATIVE_STEP = 1e-3
MOST_STEPS = 24


def largest_certified(certified: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Bisect per example between the largest radius certified so far and the smallest one that failed.

    Args:
        certified: tells for radii ``(batch,)`` which examples are certified.
        start: ``(batch,)`` upper end of the search, itself a candidate.

    Returns:
        ``(batch,)`` radii, each certified or 0. The search stops at a bracket of 0.1 % of the radius.
    """
    low, high, trial = torch.zeros_like(start), start.clone(), start
    for _ in range(MOST_STEPS):
        searching = high - low > RELATIVE_STEP * high
        if not searching.any():
            break
        good = certified(trial)
        low = torch.where(searching & good, trial, low)
        high = torch.where(searching & ~good, trial, high)
        trial = 0.5 * (low + high)
    return low
