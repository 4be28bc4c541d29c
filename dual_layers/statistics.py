"""Variances, products over axes, and losses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers.bilinear import known, ordered, times
from dual_layers.contract import INPUT, Call, Facts, Interval, RuleSample, Slot
from dual_layers.families import Composite
from dual_layers.norms import farthest, into
from dual_layers.registry import register
from dual_layers.sample_values import wave
from dual_layers.spellings import spellings

_ATEN = torch.ops.aten
_BOTH = (INPUT, Slot(1))


class _Loss(Composite):
    """A sum or mean of differences, or the differences one by one. Abstract."""

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse names of reductions that there are not."""
        reason = super().refuse(call)
        known_names = ("none", "mean", "sum")
        return reason or (None if cls(call).arguments.reduction in known_names else f"reduction must be one of {known_names}")


def _reduced(value: Any, reduction: str) -> Any:
    return value if reduction == "none" else value.mean() if reduction == "mean" else value.sum()


@register(nn.MSELoss, F.mse_loss)
class DualSquaredError(_Loss):
    """Squared differences; a sum or mean over the batch is refused, as its examples would meet.

    Source: its definition.
    """

    @staticmethod
    def compose(input: Any, target: Any, *, reduction: str = "mean") -> Any:
        """Subtract and square."""
        return _reduced((input - target).square(), reduction)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the reductions."""
        yield from _loss_samples(nn.MSELoss, F.mse_loss)


@register(nn.L1Loss, F.l1_loss)
class DualAbsoluteError(_Loss):
    """Absolute differences; a sum or mean over the batch is refused, as its examples would meet.

    Source: its definition.
    """

    @staticmethod
    def compose(input: Any, target: Any, *, reduction: str = "mean") -> Any:
        """Subtract and take the absolute value."""
        return _reduced((input - target).abs(), reduction)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the reductions."""
        yield from _loss_samples(nn.L1Loss, F.l1_loss)


def _loss_samples(module: Any, function: Any) -> Iterator[RuleSample]:
    yield RuleSample("each", Call(module(reduction="none"), (INPUT, wave(2, 3))), ((2, 3),))
    yield RuleSample("two inputs", Call(function, _BOTH, {"reduction": "sum"}), ((2, 3), (2, 3)), batch_axis=None)
    yield RuleSample("mean", Call(function, _BOTH), ((2, 3), (2, 3)), batch_axis=None)
    wrong = Call(function, _BOTH, {"reduction": "batchmean"})
    yield RuleSample("unknown reduction", wrong, ((2, 3), (2, 3)), error=ValueError, message="reduction must be one of")


class _Moments(Composite):
    """What is made of the mean and of the mean square about it. Abstract."""

    @classmethod
    def parameters(
        cls, input: Any, dim: Any = None, unbiased: Any = None, keepdim: Any = False, *, correction: Any = None
    ) -> dict[str, Any]:
        """Name the arguments; a lone positional truth value is ``unbiased``."""
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        if correction is None:
            correction = 1 if unbiased is None else int(unbiased)
        return {"input": input, "dim": dim, "correction": correction, "keepdim": keepdim}


def _moment_samples(function: Any, name: str, item: int | None = None) -> Iterator[RuleSample]:
    yield RuleSample("axis", Call(function, (INPUT, 1), item=item), ((2, 4),))
    yield RuleSample("biased, kept", Call(function, (INPUT, -1, False, True), item=item), ((2, 3, 4),), low=-1.0, high=3.0)
    several = Call(function, (INPUT,), {"dim": (1, -2), "correction": 2, "keepdim": True}, item)
    yield RuleSample(f"{name} of several axes", several, ((2, 3, 2, 2),), low=0.5, high=2.0)
    yield RuleSample("all, biased", Call(function, (INPUT, False), item=item), ((1, 3),), batch_axis=None)
    nowhere = Call(function, (INPUT, 3), item=item)
    yield RuleSample("no such axis", nowhere, ((2, 3),), error=IndexError, message="out of range")


@register(*spellings("var"))
class DualVariance(_Moments):
    """Variance over some axes, or all: the sum of squares of deviations from the mean. Source: its definition; convexity."""

    @staticmethod
    def compose(input: Any, dim: Any, correction: Any, keepdim: Any) -> Any:
        """Subtract the mean, square, and add up."""
        dim = _axes(input, dim)
        deviation = input - input.mean(dim, keepdim=True)
        return deviation.square().sum(dim, keepdim=keepdim) / (_count(input, dim) - correction)

    def interval(self, *boxes: Interval) -> Interval:
        """Bound the sum of squares about the mean.

        It is at most that about any fixed number, here the mean of the centres. It is convex, so it is at least its
        tangent plane, here the one at the point of smallest variance: exact, as every coordinate that is not at the mean
        there is at the end of its interval that is nearest to it.
        """
        (box,), given = boxes, self.arguments
        dim = _axes(box.lower, given.dim)
        box = Interval(_in_rows(box.lower, dim), _in_rows(box.upper, dim))
        middle = known(box.center).mean(-1, keepdim=True)
        upper = farthest(Interval(box.lower - middle, box.upper - middle)).square().sum(-1)
        place = into(known(_common(box)), box)
        deviation = place - place.mean(-1, keepdim=True)
        with torch.no_grad():  # none but for rounding: no coordinate can move and bring the variance down
            fall = torch.minimum(*(times(2 * deviation, end - place) for end in (box.lower, box.upper)))
        lower = (deviation.square() + fall).sum(-1).clamp(min=0)
        for axis in sorted(axis % boxes[0].lower.ndim for axis in dim) if given.keepdim else ():
            lower, upper = lower.unsqueeze(axis), upper.unsqueeze(axis)
        divisor = _count(boxes[0].lower, dim) - given.correction
        return ordered(lower / divisor, upper / divisor)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield axes and corrections in every spelling."""
        yield from _moment_samples(torch.var, "variance")
        yield RuleSample("method", Call("var", (INPUT, 1), {"unbiased": False}), ((2, 4),), low=-1.0, high=1.0)
        aten = Call(_ATEN.var.correction, (INPUT, [1]), {"correction": 0})
        yield RuleSample("aten", aten, ((2, 4),), low=3.0, high=9.0)


@register(*spellings("std"))
class DualDeviation(_Moments):
    """Standard deviation over some axes, or all: the square root of the variance. Source: its definition."""

    @staticmethod
    def compose(input: Any, dim: Any, correction: Any, keepdim: Any) -> Any:
        """Take the root."""
        return torch.var(input, dim, correction=correction, keepdim=keepdim).sqrt()

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield axes and corrections in every spelling."""
        yield from _moment_samples(torch.std, "deviation")


@register(*spellings("var_mean"))
class DualVarianceAndMean(_Moments):
    """Variance and mean over some axes, or all. Source: its definition."""

    facts: ClassVar[Facts] = Facts(outputs_tuple=True)

    @staticmethod
    def compose(input: Any, dim: Any, correction: Any, keepdim: Any) -> Any:
        """Return both."""
        dim = _axes(input, dim)
        return torch.var(input, dim, correction=correction, keepdim=keepdim), input.mean(dim, keepdim=keepdim)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield either item."""
        yield from _moment_samples(torch.var_mean, "variance", 0)
        yield RuleSample("mean", Call(torch.var_mean, (INPUT, 1), item=1), ((2, 4, 2),))


@register(*spellings("std_mean"))
class DualDeviationAndMean(_Moments):
    """Standard deviation and mean over some axes, or all. Source: its definition."""

    facts: ClassVar[Facts] = Facts(outputs_tuple=True)

    @staticmethod
    def compose(input: Any, dim: Any, correction: Any, keepdim: Any) -> Any:
        """Return both."""
        dim = _axes(input, dim)
        return torch.std(input, dim, correction=correction, keepdim=keepdim), input.mean(dim, keepdim=keepdim)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield either item."""
        yield from _moment_samples(torch.std_mean, "deviation", 0)
        yield RuleSample("mean", Call(torch.std_mean, (INPUT, 1), item=1), ((2, 4, 2),))


@register(*spellings("prod"))
class DualProductOver(Composite):
    """Product along an axis, or of all elements: pairs are multiplied, then pairs of pairs. Source: its definition."""

    @staticmethod
    def compose(input: Any, dim: Any = None, keepdim: Any = False) -> Any:
        """Multiply one half by the other until a single element is left."""
        if dim is None:
            input, dim = input.flatten(), 0
        while (count := input.shape[dim]) > 1:
            half = count // 2
            pairs = input.narrow(dim, 0, half) * input.narrow(dim, half, half)
            input = torch.cat([pairs, input.narrow(dim, count - 1, 1)], dim) if count % 2 else pairs
        return input if keepdim else input.squeeze(dim)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield even and odd numbers of factors, and one."""
        yield RuleSample("odd", Call(torch.prod, (INPUT, 1)), ((2, 5),), low=-2.0, high=2.0)
        yield RuleSample("even, kept", Call("prod", (INPUT, -2, True)), ((2, 4, 3),), low=-2.0, high=2.0)
        yield RuleSample("one", Call(torch.prod, (INPUT,), {"dim": 1}), ((2, 1),))
        yield RuleSample("all", Call(torch.prod), ((1, 3),), low=-2.0, high=2.0, batch_axis=None)
        converted = Call(torch.prod, (INPUT, 1), {"dtype": torch.float64})
        yield RuleSample("converted", converted, ((2, 3),), error=ValueError, message="arguments are not supported")


def _axes(value: Any, dim: Any) -> tuple[int, ...]:
    """Name all axes where none is named."""
    return tuple(range(value.ndim)) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)


def _count(value: Any, dim: tuple[int, ...]) -> int:
    """Count the elements along some axes."""
    return math.prod(value.shape[axis] for axis in dim)


def _in_rows(value: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Gather some axes in one, the last."""
    return value.movedim(dim, tuple(range(-len(dim), 0))).flatten(-len(dim))


@torch.no_grad()
def _common(box: Interval) -> Tensor:
    """Find the number ``m`` with the least sum of squared distances to a row's intervals, ``[..., 1]``.

    Half the derivative of that sum, ``sum (m - upper)_+ - sum (lower - m)_+``, rises along straight lines between the
    intervals' ends: it is followed from end to end up to its root.
    """
    places, order = torch.cat([box.lower, box.upper], -1).sort(-1)
    count = box.lower.shape[-1]
    steepness = count + torch.where(order < count, -1, 1).to(places.dtype).cumsum(-1)
    steps = steepness[..., :-1] * (places[..., 1:] - places[..., :-1])
    start = -(box.lower - places[..., :1]).sum(-1, keepdim=True)
    rate = torch.cat([start, start + steps.cumsum(-1)], -1)
    last = ((rate <= 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    place, rate, steepness = (values.gather(-1, last) for values in (places, rate, steepness))
    return place - rate / torch.where(steepness > 0, steepness, 1.0)
