"""Terms that keep a network trainable by intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autodual.errors import SpecificationError
from autodual.regions import Region
from dual_layers import Interval

TOLERANCE = 0.5


def interval_regularizer(hidden: Sequence[Interval], region: Region, x: Any) -> Tensor:
    """Penalise boxes that widen from layer to layer, and layers whose units are all on one side.

        mean over layers of  [t - w_0 / w]_+ / t  +  [t - r_mean]_+ / t  +  [t - r_variance]_+ / t,     t = 0.5

    with w_0 and w the mean widths of the input and of a layer's inputs, and r the smaller of a quantity's ratios between units
    that are surely on and surely off. Source: Shi et al., fast certified robust training with short warmup (2021), eq. 7-9.

    Args:
        hidden: boxes of the inputs of nonlinear operators, each ``(batch, ...)``.
        region: of the model's single input.
        x: that input.

    Raises:
        SpecificationError: the model has several inputs, whose widths cannot be compared.
    """
    if not isinstance(region, Region) or not isinstance(x, Tensor):
        raise SpecificationError("the interval regularizer needs a model of one input tensor and one region")
    box = region.hull(x)
    first = (box.upper - box.lower).mean()
    terms = [_widening(first, box) + _imbalance(box) for box in hidden]
    return torch.stack(terms).mean() if terms else first * 0.0


def _widening(first: Tensor, box: Interval) -> Tensor:
    return _shortfall(first / (box.upper - box.lower).mean().clamp(min=1e-12))


def _imbalance(box: Interval) -> Tensor:
    center = 0.5 * (box.lower + box.upper)
    on, off = box.lower > 0, box.upper < 0
    spread = (center - center.mean()).square()
    means = (center * on).sum(), -(center * off).sum()
    variances = (spread * on).sum(), (spread * off).sum()
    return _shortfall(_ratio(*means)) + _shortfall(_ratio(*variances))


def _ratio(first: Tensor, second: Tensor) -> Tensor:
    """Return the smaller of a ratio and its inverse; 1 where both are nothing."""
    larger = torch.maximum(first, second)
    return torch.where(larger > 0, torch.minimum(first, second) / larger.clamp(min=1e-12), 1.0)


def _shortfall(ratio: Tensor) -> Tensor:
    return (TOLERANCE - ratio).clamp(min=0) / TOLERANCE
