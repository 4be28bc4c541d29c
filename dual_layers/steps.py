"""Functions that jump: sign, Heaviside, rounding of every kind, remainders."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from dual_layers.contract import INPUT, Call, Interval, RuleSample, Slot
from dual_layers.families import PiecewiseLinear, Points, known
from dual_layers.refusals import unless_only
from dual_layers.registry import register
from dual_layers.spellings import spellings

aten = torch.ops.aten
_LIMITS = "thesis, Theorem 3 (eq. 3.42), on both limits at every jump"


@register(*spellings("sign", "sgn"))
class DualSign(PiecewiseLinear):
    """Sign: -1, 0 or 1. Source: thesis, Theorem 3 (eq. 3.42), with both limits at zero."""

    source: ClassVar[str] = _LIMITS

    def breakpoints(self) -> tuple[float, ...]:
        """Return none: the only change is the jump."""
        return ()

    def jumps(self) -> tuple[tuple[float, float, float], ...]:
        """Return the step at zero; the value there lies between its limits."""
        return ((0.0, -1.0, 1.0),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("function", Call(torch.sign), ((2, 3),))
        yield RuleSample("method", Call("sgn"), ((3, 4),), low=-1.0, high=2.0)


@register(*spellings("heaviside"))
class DualHeaviside(PiecewiseLinear):
    """Heaviside's step from 0 to 1, with a constant for the value at zero, which may lie anywhere. Source: as the sign."""

    source: ClassVar[str] = _LIMITS

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a perturbed value at zero."""
        return unless_only(cls, call, "input")

    @staticmethod
    def parameters(input: Any, values: Any) -> dict[str, Any]:
        """Name the arguments of ``torch.heaviside``."""
        return {"input": input, "values": values}

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the operator, which has no derivative in PyTorch; it would be zero."""
        with torch.no_grad():
            return super().forward(*inputs)

    def breakpoints(self) -> tuple[float, ...]:
        """Return none: the only change is at the jump."""
        return ()

    def jumps(self) -> tuple[tuple[float, Any, Any], ...]:
        """Return the steps from below zero to it, and on."""
        value = self.arguments.values
        return (0.0, 0.0, value), (0.0, value, 1.0)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield values between the limits and beyond them."""
        yield RuleSample("half", Call(torch.heaviside, (INPUT, torch.tensor(0.5))), ((2, 3),))
        yield RuleSample("each its own", Call("heaviside", (INPUT, torch.tensor([0.0, 3.0, -2.0]))), ((2, 3),))
        call, wrong = Call(torch.heaviside, (INPUT, Slot(1))), "values must not depend on the input"
        yield RuleSample("perturbed value", call, ((2, 3), (3,)), error=ValueError, message=wrong)
        call, wrong = Call(torch.heaviside, (INPUT, torch.ones(4, 3))), "widens its input"
        yield RuleSample("widened", call, ((1, 3),), error=ValueError, message=wrong)


class Steps(PiecewiseLinear):
    """Straight pieces of one slope between jumps at ``period * (k + phase)``, k whole. Abstract.

    The limits at the jumps are affine in ``k``, on either side of zero at least, so over the jumps inside a box ``f(z) - a z``
    takes its extremes at the first or the last one, or at one next to zero.
    """

    phase: ClassVar[float] = 0.0
    skips_zero: ClassVar[bool] = False
    """Whether there is no jump for ``k = 0``, where the function changes its manner."""

    @property
    def period(self) -> Any:
        """Distance of two jumps: a number or a tensor, positive."""
        return 1.0

    @abstractmethod
    def limits(self, k: Tensor, place: Tensor) -> tuple[Any, Any]:
        """Return the limits from below and from above at jump number ``k``, which is at ``place``."""

    def breakpoints(self) -> tuple[float, ...]:
        """Return none: nothing changes but at the jumps."""
        return ()

    def jumps(self) -> tuple[tuple[Any, Any, Any], ...]:
        """Return some about zero; there are as many as there are whole numbers."""
        numbers = [torch.tensor(k, dtype=torch.float64) for k in range(-5, 5) if k or not self.skips_zero]
        places = [self.period * (k + self.phase) for k in numbers]
        return tuple((place, *self.limits(k, place)) for k, place in zip(numbers, places, strict=True))

    def _jumps_inside(self, box: Interval) -> list[tuple[Tensor, Tensor]]:
        """List the numbers of the jumps that matter, and whether they lie in the box; within rounding of it counts too."""
        near = 128 * torch.finfo(box.lower.dtype).eps * torch.maximum(box.lower.abs(), box.upper.abs()).nan_to_num(posinf=0.0)
        period = torch.as_tensor(self.period, dtype=box.lower.dtype, device=box.lower.device).detach()
        first = torch.ceil((box.lower.detach() - near) / period - self.phase)
        last = torch.floor((box.upper.detach() + near) / period - self.phase)
        numbers = [first, last]
        if self.skips_zero:
            numbers += [torch.full_like(first, -1.0), torch.full_like(first, 1.0)]
        return [(k, (first <= k) & (k <= last) & ((k != 0) | (not self.skips_zero))) for k in numbers]

    def points(self, box: Interval) -> Points:
        """List the ends and both limits at the jumps; an end at infinity has the limits of the jumps there."""
        box, points = known(box), []
        for end, (k, _) in zip((box.lower, box.upper), self._jumps_inside(box), strict=False):
            value = torch.where(end.isinf(), self.limits(k, end)[0], self.forward(end))
            points.append((end, value))
        for k, exists in self._jumps_inside(box):
            place = torch.minimum(torch.maximum(self.period * (k + self.phase), box.lower), box.upper)
            for limit in self.limits(k, place):
                points.append((torch.where(exists, place, box.lower), torch.where(exists, limit, points[0][1])))
        return points

    def undecided(self, bounds: tuple[Interval, ...]) -> Tensor:
        """Tell which boxes touch a jump or have no end."""
        result = bounds[0].lower.isinf() | bounds[0].upper.isinf()
        for _, exists in self._jumps_inside(bounds[0]):
            result = result | exists
        return result


@register(*spellings("floor"))
class DualFloor(Steps):
    """The largest whole number that is not above the input. Source: thesis, Theorem 3 (eq. 3.42), limits at every jump.

    Example:
        >>> box = Interval(torch.tensor([0.5]), torch.tensor([10.5]))
        >>> layer = DualFloor(Call(torch.floor))
        >>> slopes = layer.slopes((box,), "parallel")
        >>> offsets = layer.conjugate(slopes, (box,))
        >>> slopes.lower[0].item(), offsets.lower.item(), offsets.upper.item()
        (1.0, -1.0, 0.0)
    """

    source: ClassVar[str] = _LIMITS

    def limits(self, k: Tensor, place: Tensor) -> tuple[Any, Any]:
        """Return the step up to the place."""
        return place - 1, place

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, few and many steps."""
        yield RuleSample("function", Call(torch.floor), ((2, 3),), low=-1.9, high=1.6)
        yield RuleSample("method", Call("floor"), ((3, 4),), low=-0.8, high=1.7)


@register(*spellings("ceil"))
class DualCeil(Steps):
    """The smallest whole number that is not below the input. Source: as floor."""

    source: ClassVar[str] = _LIMITS

    def limits(self, k: Tensor, place: Tensor) -> tuple[Any, Any]:
        """Return the step up from the place."""
        return place, place + 1

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, few and many steps."""
        yield RuleSample("function", Call(torch.ceil), ((2, 3),), low=-1.9, high=1.6)
        yield RuleSample("method", Call("ceil"), ((3, 4),), low=-0.8, high=1.7)


@register(*spellings("trunc", "fix"))
class DualTrunc(Steps):
    """The whole part: rounded towards zero. Source: as floor, turned about zero."""

    source: ClassVar[str] = _LIMITS
    skips_zero: ClassVar[bool] = True

    def limits(self, k: Tensor, place: Tensor) -> tuple[Any, Any]:
        """Return the step whose end towards zero is one less in absolute value."""
        up = (k > 0).to(k.dtype)
        return place - up, place + 1 - up

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, few and many steps."""
        yield RuleSample("function", Call(torch.trunc), ((2, 3),), low=-1.9, high=1.6)
        yield RuleSample("method", Call("fix"), ((3, 4),), low=-2.2, high=1.7)


@register(*spellings("round"), torch.special.round)
class DualRound(Steps):
    """The nearest whole number, or the nearest multiple of a power of ten. Source: as floor, half a step later."""

    source: ClassVar[str] = _LIMITS
    phase: ClassVar[float] = 0.5

    @staticmethod
    def parameters(input: Any, *, decimals: int = 0) -> dict[str, Any]:
        """Name the arguments of ``torch.round``."""
        return {"input": input, "decimals": decimals}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse arguments that are not known by name."""
        return unless_only(cls, call, "input")

    @property
    def period(self) -> float:
        """The power of ten."""
        return 10.0**-self.arguments.decimals

    def limits(self, k: Tensor, place: Tensor) -> tuple[Any, Any]:
        """Return half a step down and half a step up."""
        return place - 0.5 * self.period, place + 0.5 * self.period

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield whole numbers and tens; a tenth is no float, so that the operator jumps beside its own limits."""
        yield RuleSample("function", Call(torch.round), ((2, 3),), low=-1.9, high=1.6)
        yield RuleSample("tens", Call(torch.round, (INPUT,), {"decimals": -1}), ((2, 3),), low=-40.0, high=30.0)
        call, wrong = Call(torch.round, (INPUT, 1)), "takes 1 positional argument"
        yield RuleSample("positional decimals", call, ((2, 3),), error=ValueError, message=wrong)


class Divided(Steps):
    """What is left of a division by a constant: its whole part or its remainder. Abstract."""

    @staticmethod
    def parameters(input: Any, other: Any) -> dict[str, Any]:
        """Name the arguments of ``torch.remainder``."""
        return {"input": input, "other": other}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a perturbed divisor, and zero."""
        wrong = unless_only(cls, call, "input")
        if wrong:
            return wrong
        other = cls(call).arguments.other
        return "division by zero" if isinstance(other, (int, float)) and other == 0 else None

    @property
    def divisor(self) -> Any:
        """The constant."""
        return self.arguments.other

    @property
    def period(self) -> Any:
        """The size of the divisor."""
        return abs(self.divisor)

    @property
    def sign(self) -> Any:
        """The sign of the divisor."""
        return 1.0 - 2.0 * (self.divisor < 0)

    def rounded_down(self, k: Tensor) -> tuple[Any, Any]:
        """Return the limits of the quotient rounded down: a step up to ``k``, or one down from ``-k``."""
        return self.sign * k - (self.divisor > 0) * 1.0, self.sign * k - (self.divisor < 0) * 1.0


@register(operator.floordiv, *spellings("floor_divide"))
class DualFloorDivide(Divided):
    """Quotient by a constant, rounded down. Source: as floor, on multiples of the divisor."""

    source: ClassVar[str] = _LIMITS

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the operator, which has no derivative in PyTorch; it would be zero."""
        with torch.no_grad():
            return super().forward(*inputs)

    def limits(self, k: Tensor, place: Tensor) -> tuple[Any, Any]:
        """Return the step of the quotient."""
        return self.rounded_down(k)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield divisors of either sign, numbers and tensors."""
        yield RuleSample("operator", Call(operator.floordiv, (INPUT, 2)), ((2, 3),), low=-1.7, high=3.5)
        yield RuleSample("one step", Call(operator.floordiv, (INPUT, 2)), ((2, 3),), low=1.1, high=2.9)
        yield RuleSample("negative", Call(torch.floor_divide, (INPUT, -0.7)), ((2, 3),), low=-0.6, high=1.2)
        yield RuleSample("tensor", Call("floor_divide", (INPUT, torch.tensor([1.5, -2.0, 1.1]))), ((2, 3),), low=-2.0, high=1.4)
        yield from _bad_divisors(torch.floor_divide)


@register(torch.div, torch.divide, "div", "divide", aten.div.Tensor_mode, aten.div.Scalar_mode, case=True)
class DualRoundedDivide(Divided):
    """Quotient by a constant with ``rounding_mode``: rounded down or towards zero. Source: as floor and trunc."""

    source: ClassVar[str] = _LIMITS

    @staticmethod
    def parameters(input: Any, other: Any, *, rounding_mode: Any = None) -> dict[str, Any]:
        """Name the arguments of ``torch.div``."""
        return {"input": input, "other": other, "rounding_mode": rounding_mode}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a perturbed divisor, zero, and a quotient that is not rounded."""
        wrong = super().refuse(call)
        known = wrong or cls(call).arguments.rounding_mode in ("floor", "trunc")
        return wrong or (None if known else "rounding_mode must be 'floor' or 'trunc'")

    @property
    def skips_zero(self) -> bool:
        """Whether it rounds towards zero."""
        return self.arguments.rounding_mode == "trunc"

    def limits(self, k: Tensor, place: Tensor) -> tuple[Any, Any]:
        """Return the step of the quotient."""
        if not self.skips_zero:
            return self.rounded_down(k)
        up = (k > 0).to(k.dtype)
        return self.sign * (k - up), self.sign * (k + 1 - up)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield both modes, divisors of either sign."""
        floor, trunc = {"rounding_mode": "floor"}, {"rounding_mode": "trunc"}
        yield RuleSample("down", Call(torch.div, (INPUT, 1.5), floor), ((2, 3),), low=-2.0, high=2.5)
        yield RuleSample("towards zero", Call("div", (INPUT, 0.75), trunc), ((2, 3),), low=-0.6, high=1.2)
        yield RuleSample("negative, down", Call(torch.div, (INPUT, -0.75), floor), ((2, 3),), low=-0.6, high=1.2)
        tensor = Call(torch.div, (INPUT, torch.tensor([1.5, -2.0, 1.25])), trunc)
        yield RuleSample("tensor, towards zero", tensor, ((2, 3),), low=-2.0, high=1.4)
        yield from _bad_divisors(torch.div, **floor)
        call, wrong = Call(torch.div, (INPUT, 2.0)), "must be 'floor' or 'trunc'"
        yield RuleSample("not rounded", call, ((2, 3),), error=ValueError, message=wrong)


@register(operator.mod, *spellings("remainder"))
class DualRemainder(Divided):
    """What a constant divisor leaves, with the divisor's sign. Source: as floor; its pieces rise with slope 1."""

    source: ClassVar[str] = _LIMITS

    def limits(self, k: Tensor, place: Tensor) -> tuple[Any, Any]:
        """Return the fall from the divisor to zero, or from zero to a negative divisor."""
        return (self.divisor > 0) * self.divisor, (self.divisor < 0) * self.divisor

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield divisors of either sign, numbers and tensors."""
        yield RuleSample("operator", Call(operator.mod, (INPUT, 2)), ((2, 3),), low=-1.7, high=3.5)
        yield RuleSample("one step", Call(operator.mod, (INPUT, 2)), ((2, 3),), low=1.1, high=2.9)
        yield RuleSample("negative", Call(torch.remainder, (INPUT, -0.7)), ((2, 3),), low=-0.6, high=1.2)
        yield RuleSample("tensor", Call("remainder", (INPUT, torch.tensor([1.5, -2.0, 1.1]))), ((2, 3),), low=-2.0, high=1.4)
        yield from _bad_divisors(torch.remainder)


class Fraction(Steps):
    """What is left beyond a multiple of a period, with the sign of the input. Abstract."""

    skips_zero: ClassVar[bool] = True

    def limits(self, k: Tensor, place: Tensor) -> tuple[Any, Any]:
        """Return the fall to zero, or from zero where the input is negative."""
        return self.period * (k > 0).to(k.dtype), -self.period * (k < 0).to(k.dtype)


@register(*spellings("frac"))
class DualFrac(Fraction):
    """The part behind the point, with the sign of the input. Source: as trunc; its pieces rise with slope 1."""

    source: ClassVar[str] = _LIMITS

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, few and many steps."""
        yield RuleSample("function", Call(torch.frac), ((2, 3),), low=-1.9, high=1.6)
        yield RuleSample("method", Call("frac"), ((3, 4),), low=-2.2, high=1.7)


@register(*spellings("fmod"))
class DualFmod(Fraction, Divided):
    """What a constant divisor leaves, with the sign of the input. Source: as ``frac``, on multiples of the divisor."""

    source: ClassVar[str] = _LIMITS

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield divisors of either sign, numbers and tensors."""
        yield RuleSample("function", Call(torch.fmod, (INPUT, 2)), ((2, 3),), low=-1.7, high=3.5)
        yield RuleSample("negative", Call(torch.fmod, (INPUT, -0.7)), ((2, 3),), low=-0.6, high=1.2)
        yield RuleSample("tensor", Call("fmod", (INPUT, torch.tensor([1.5, -2.0, 1.1]))), ((2, 3),), low=-2.0, high=1.4)
        yield from _bad_divisors(torch.fmod)


def _bad_divisors(function: Any, **mode: str) -> Iterator[RuleSample]:
    call, wrong = Call(function, (INPUT, 0), mode), "division by zero"
    yield RuleSample("zero", call, ((2, 3),), error=ValueError, message=wrong)
    call, wrong = Call(function, (INPUT, Slot(1)), mode), "other must not depend on the input"
    yield RuleSample("perturbed divisor", call, ((2, 3), (3,)), error=ValueError, message=wrong)
    call, wrong = Call(function, (INPUT, torch.ones(4, 3)), mode), "widens its input"
    yield RuleSample("widened", call, ((1, 3),), error=ValueError, message=wrong)
