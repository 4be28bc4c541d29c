"""Where the elements of a normalised tensor are smallest and largest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dual_layers.contract import Interval
from dual_layers.logsumexp import finite, restored, stacked

_ROUNDING = 16.0
_STEPS = 40


def normalised(box: Interval, axes: tuple[int, ...], eps: float, *, centered: bool) -> Interval:
    """Enclose ``d / sqrt(mean(d^2) + eps)`` over some axes; ``d`` is the input, or its distance from its mean there.

    ``y_i = d_i / sqrt((W + k d_i^2) / n + eps)``, where ``W`` adds up the squares of the others, grows with ``d_i`` and for
    positive ``d_i`` falls with ``W``. So its ends lie at the ends of ``d_i`` and of ``W``, each bounded for itself. If ``d``
    is the distance from the mean, ``W`` is the others' spread about their own mean and ``k = n / (n - 1)``, else ``k = 1``.
    """
    lower, upper = finite(box.map(lambda end: stacked(end, axes)))
    scale = torch.maximum(lower.abs(), upper.abs()).amax(-1, keepdim=True).clamp(min=1).detach()
    lower, upper, small = lower / scale, upper / scale, eps / scale / scale
    if centered:
        least, others = _least_spread(lower, upper), _others_spread(lower, upper)
        lower, upper = _deviations(lower, upper)
    else:
        least, others = torch.zeros_like(scale), _others_squares(lower, upper)
    ends = (_smallest(*pair, least, others, small, centered) for pair in ((lower, upper), (-upper, -lower)))
    lower, upper = (restored(end, axes, box.lower.shape) for end in ends)
    return Interval(lower, -upper)


def _deviations(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Bound every element's distance from the mean, exactly but for rounding."""
    count = lower.shape[-1]
    slack = _ROUNDING * torch.finfo(lower.dtype).eps * (count > 1)
    least = lower - (lower + (upper.sum(-1, keepdim=True) - upper)) / count
    most = upper - (upper + (lower.sum(-1, keepdim=True) - lower)) / count
    return least - slack, most + slack


def _least_spread(lower: Tensor, upper: Tensor) -> Tensor:
    """Bound the sum of squared distances from the mean from below, ``[..., 1]``.

    It is the least sum of squared distances from any ``c``, a convex function of it; its tangent at a place near the least
    one holds for every mean that there can be.
    """
    low, high = lower.mean(-1, keepdim=True), upper.mean(-1, keepdim=True)
    with torch.no_grad():
        reach = high - low
        for _ in range(_STEPS):
            c = 0.5 * low + 0.5 * high
            rising = (c - torch.minimum(torch.maximum(c, lower), upper)).sum(-1, keepdim=True) > 0
            low, high = torch.where(rising, low, c), torch.where(rising, c, high)
    gaps = low - torch.minimum(torch.maximum(low, lower), upper)
    with torch.no_grad():
        tilt = 2 * gaps.sum(-1, keepdim=True).abs() * reach + _ROUNDING * torch.finfo(lower.dtype).eps * lower.shape[-1]
    return gaps.square().sum(-1, keepdim=True) - tilt


def _others_squares(lower: Tensor, upper: Tensor) -> Interval:
    """Bound, for every element, the sum of the squares of all the others."""
    least, most = torch.maximum(lower, -upper).clamp(min=0).square(), torch.maximum(-lower, upper).square()
    total = most.sum(-1, keepdim=True)
    slack = _ROUNDING * torch.finfo(lower.dtype).eps * total
    return Interval((least.sum(-1, keepdim=True) - least - slack).clamp(min=0), total - most + slack)


def _others_spread(lower: Tensor, upper: Tensor) -> Interval:
    """Bound, for every element, the sum of squared distances of all the others from their own mean.

    It is convex and quadratic, so it lies between its tangent plane at the box' centre and that plane plus the squares of
    the radii.
    """
    count, center, radius = lower.shape[-1], 0.5 * (lower + upper), 0.5 * (upper - lower)
    own = center - center.mean(-1, keepdim=True)
    total, reach = own.square().sum(-1, keepdim=True), radius * own.abs()
    middle = (total - own.square() * (count / max(count - 1, 1))).clamp(min=0)
    away = (own / max(count - 1, 1)).abs()  # how far the others' mean lies from everyone's
    move = 2 * (reach.sum(-1, keepdim=True) - reach + away * (radius.sum(-1, keepdim=True) - radius))
    rest = radius.square().sum(-1, keepdim=True) - radius.square()
    slack = _ROUNDING * torch.finfo(lower.dtype).eps * (total + move + rest)
    return Interval((middle - move - slack).clamp(min=0), (middle + move + rest + slack) * (count > 2))


def _smallest(lower: Tensor, upper: Tensor, least: Tensor, others: Interval, eps: Tensor, centered: bool) -> Tensor:
    """Bound every ``d_i / sqrt(mean of squares + eps)`` from below.

    Args:
        lower: of ``d``.
        upper: of ``d``.
        least: bounds the sum of all squares from below.
        others: the bounds of ``W``.
        eps: positive.
        centered: whether all ``d_i`` add up to zero.
    """
    count = lower.shape[-1]
    slack = _ROUNDING * torch.finfo(lower.dtype).eps
    own = lower.square() * (count / max(count - 1, 1) if centered else 1.0)
    small = torch.maximum(own + others.lower, least)
    if centered:
        small = torch.maximum(small, lower.square() + _others_squares(lower, upper).lower)
    squares = torch.where(lower < 0, torch.maximum(small * (1 - slack), own), own + others.upper)
    value = lower * torch.rsqrt(squares / count + eps)
    limit = math.sqrt(count - 1 if centered else count)
    return (value - slack * value.abs()).nan_to_num(nan=-limit).clamp(min=-limit * (1 + slack))
