"""Exponentials, logarithms and powers."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers.checks import check_not_widened
from dual_layers.contract import INPUT, Call, Facts, Interval, RuleSample, Slot, slots
from dual_layers.families import Composite
from dual_layers.refusals import unless_only
from dual_layers.registry import register
from dual_layers.smooth import Piece, Smooth
from dual_layers.spellings import spellings

aten = torch.ops.aten
_TANGENTS = "thesis, Theorem 3 (eq. 3.42), on tangents"
_EVERYWHERE = (Piece(-torch.inf, torch.inf, True),)


class Exponential(Smooth):
    """``exp(rate * z) - shift``. Abstract."""

    facts: ClassVar[Facts] = Facts(monotone=True, convex=True, positionwise=True)
    shift: ClassVar[float] = 0.0

    @property
    def rate(self) -> float | Tensor:
        """The logarithm of the base."""
        return 1.0

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``rate * exp(rate * z)``."""
        return self.rate * torch.exp(self.rate * z)

    def error(self, z: Tensor) -> float:
        """Return the size of what is subtracted."""
        return self.shift

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the whole axis: convex."""
        return _EVERYWHERE

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return a logarithm of the slope."""
        return (torch.log((slope / self.rate).clamp(min=0)) / self.rate,)


@register(*spellings("exp"))
class DualExp(Exponential):
    """Exponential. Source: convexity; thesis, Theorem 3 (eq. 3.42), on tangents.

    Example:
        >>> box = Interval(torch.tensor([0.0]), torch.tensor([1000.0]))
        >>> DualExp(Call(torch.exp)).interval(box).upper.item()
        inf
    """

    source: ClassVar[str] = _TANGENTS

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, near zero and far from it."""
        yield RuleSample("function", Call(torch.exp), ((2, 3),), low=-5.0, high=4.0)
        yield RuleSample("method", Call("exp"), ((2, 3),))
        yield RuleSample("aten", Call(aten.exp.default), ((3, 2, 2),), low=-3.0, high=1.0)


@register(*spellings("exp2"), torch.special.exp2)
class DualExp2(Exponential):
    """Powers of two, ``2 ** z``. Source: as the exponential."""

    source: ClassVar[str] = _TANGENTS

    @property
    def rate(self) -> float:
        """The logarithm of two."""
        return math.log(2.0)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("function", Call(torch.exp2), ((2, 3),), low=-5.0, high=4.0)


@register(*spellings("expm1"), torch.special.expm1)
class DualExpm1(Exponential):
    """Exponential less one. Source: as the exponential."""

    source: ClassVar[str] = _TANGENTS
    shift: ClassVar[float] = 1.0

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("function", Call(torch.expm1), ((2, 3),), low=-5.0, high=4.0)


class Logarithm(Smooth):
    """A logarithm of ``z + shift``. Abstract.

    A box that reaches below ``-shift`` leaves the domain: nothing is said there, both ends are infinite.
    """

    facts: ClassVar[Facts] = Facts(monotone=True, positionwise=True)
    base: ClassVar[float] = math.e
    shift: ClassVar[float] = 0.0

    def domain(self) -> tuple[float, float]:
        """Return everything from the pole on."""
        return -self.shift, torch.inf

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``1 / (z + shift)``, in units of the base."""
        return 1 / (math.log(self.base) * (z + self.shift))

    def error(self, z: Tensor) -> float:
        """Return 1: the logarithm of a number near 1 is as uncertain as that number."""
        return 1.0

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the domain: concave."""
        return (Piece(-self.shift, torch.inf, False),)

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return ``1 / slope - shift``."""
        return (1 / (math.log(self.base) * slope.clamp(min=0)) - self.shift,)


@register(*spellings("log"))
class DualLog(Logarithm):
    """Natural logarithm; infinite bounds where the input may be negative. Source: concavity; thesis, eq. 3.42."""

    source: ClassVar[str] = _TANGENTS

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings inside the domain."""
        yield RuleSample("function", Call(torch.log), ((2, 3),), low=0.2, high=9.0)
        yield RuleSample("method", Call("log"), ((2, 3),), low=0.5, high=2.0)
        yield RuleSample("aten", Call(aten.log.default), ((3,),), low=1.0, high=30.0)


@register(*spellings("log2"))
class DualLog2(Logarithm):
    """Logarithm to base two. Source: as the natural logarithm."""

    source: ClassVar[str] = _TANGENTS
    base: ClassVar[float] = 2.0

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings inside the domain."""
        yield RuleSample("function", Call(torch.log2), ((2, 3),), low=0.2, high=9.0)


@register(*spellings("log10"))
class DualLog10(Logarithm):
    """Logarithm to base ten. Source: as the natural logarithm."""

    source: ClassVar[str] = _TANGENTS
    base: ClassVar[float] = 10.0

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings inside the domain."""
        yield RuleSample("function", Call(torch.log10), ((2, 3),), low=0.2, high=9.0)


@register(*spellings("log1p"), torch.special.log1p)
class DualLog1p(Logarithm):
    """Logarithm of one plus the input. Source: as the natural logarithm."""

    source: ClassVar[str] = _TANGENTS
    shift: ClassVar[float] = 1.0

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings inside the domain."""
        yield RuleSample("function", Call(torch.log1p), ((2, 3),), low=-0.8, high=9.0)


class Power(Smooth):
    """``z ** exponent`` with a constant exponent. Abstract.

    Whole exponents are defined for every ``z``, others for ``z >= 0``; negative ones have a pole at zero, and a box that
    touches it gets infinite bounds.
    """

    facts: ClassVar[Facts] = Facts(positionwise=True)

    @property
    def exponent(self) -> float:
        """The constant."""
        raise NotImplementedError

    @property
    def _whole(self) -> bool:
        return float(self.exponent).is_integer()

    @property
    def extent(self) -> tuple[float, float]:
        """Everything for an odd exponent, otherwise what is not negative."""
        return (-torch.inf if self._whole and self.exponent % 2 else 0.0), torch.inf

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the operator; a root, infinitely steep at zero, passes no derivative on there."""
        (z,) = inputs
        return self.call(torch.where(z == 0, z.detach(), z) if 0 < self.exponent < 1 else z)

    def poles(self) -> tuple[float, ...]:
        """Return zero for a negative exponent."""
        return (0.0,) if self.exponent < 0 else ()

    def domain(self) -> tuple[float, float]:
        """Return the whole axis for a whole exponent, else its non-negative half."""
        return (-torch.inf if self._whole else 0.0), torch.inf

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``p z ** (p - 1)``."""
        if self.exponent == 0:
            return torch.zeros_like(z)
        return self.exponent * z ** (self.exponent - 1)

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the side right of zero, and for whole exponents the one left of it, or both at once if that is convex."""
        p = self.exponent
        bent = p * (p - 1) >= 0
        if not self._whole:
            return (Piece(0.0, torch.inf, bent),)
        if p in (0, 1):
            return (Piece(-torch.inf, torch.inf, None),)
        if p > 0 and p % 2 == 0:
            return _EVERYWHERE
        return Piece(-torch.inf, 0.0, p % 2 == 0), Piece(0.0, torch.inf, True)

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return roots of the slope."""
        p = self.exponent
        if p in (0, 1):
            return (slope,)
        ratio = slope / p
        if len(pieces) == 1 and self._whole:  # an even power: its derivative is odd
            return (ratio.sign() * ratio.abs() ** (1 / (p - 1)),)
        right = ratio.clamp(min=0).abs() ** (1 / (p - 1))
        if len(pieces) == 1:
            return (right,)
        left = (ratio if p % 2 else -ratio).clamp(min=0).abs() ** (1 / (p - 1))
        return -left, right


@register(*spellings("square"))
class DualSquare(Power):
    """Square. Source: convexity; thesis, Theorem 3 (eq. 3.42), on tangents."""

    facts: ClassVar[Facts] = Facts(convex=True, positionwise=True)
    source: ClassVar[str] = _TANGENTS

    @property
    def exponent(self) -> float:
        """Two."""
        return 2

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("function", Call(torch.square), ((2, 3),))
        yield RuleSample("method", Call("square"), ((2, 3, 2, 2),), low=-1.0, high=3.0)


@register(*spellings("sqrt"))
class DualSqrt(Power):
    """Square root; infinite bounds where the input may be negative. Source: concavity; thesis, eq. 3.42."""

    facts: ClassVar[Facts] = Facts(monotone=True, positionwise=True)
    source: ClassVar[str] = _TANGENTS

    @property
    def exponent(self) -> float:
        """One half."""
        return 0.5

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings inside the domain."""
        yield RuleSample("function", Call(torch.sqrt), ((2, 3),), low=0.05, high=9.0)
        yield RuleSample("method", Call("sqrt"), ((2, 3),), low=1.0, high=30.0)
        yield RuleSample("from zero on", Call(torch.sqrt), ((2, 3),), low=0.0, high=2.0)


@register(*spellings("rsqrt"))
class DualRsqrt(Power):
    """One over the square root; infinite bounds where the input may reach zero. Source: convexity; thesis, eq. 3.42."""

    facts: ClassVar[Facts] = Facts(convex=True, positionwise=True)
    source: ClassVar[str] = _TANGENTS

    @property
    def exponent(self) -> float:
        """Minus one half."""
        return -0.5

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings inside the domain."""
        yield RuleSample("function", Call(torch.rsqrt), ((2, 3),), low=0.1, high=9.0)
        yield RuleSample("method", Call("rsqrt"), ((2, 3),), low=1.0, high=50.0)


@register(*spellings("reciprocal"))
class DualReciprocal(Power):
    """One over the input; infinite bounds where that may be zero. Source: convexity; thesis, eq. 3.42."""

    source: ClassVar[str] = _TANGENTS

    @property
    def exponent(self) -> float:
        """Minus one."""
        return -1

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield both sides of the pole."""
        yield RuleSample("positive", Call(torch.reciprocal), ((2, 3),), low=0.2, high=9.0)
        yield RuleSample("negative", Call("reciprocal"), ((2, 3),), low=-4.0, high=-0.5)


@register(operator.pow, "__pow__", *spellings("pow"))
class DualPow(Power):
    """A constant power. Source: as the square, the square root and the reciprocal, which are special cases."""

    source: ClassVar[str] = _TANGENTS

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse all but a number for an exponent."""
        wrong = unless_only(cls, call, "input")
        if wrong:
            return wrong
        given = cls(call).arguments
        if not isinstance(given.exponent, (int, float)):
            return "the exponent must be a Python number"
        return None if slots(given.input) else "the base must depend on the input"

    @staticmethod
    def parameters(input: Any, exponent: Any) -> dict[str, Any]:
        """Name the arguments of ``torch.pow``."""
        return {"input": input, "exponent": exponent}

    @property
    def exponent(self) -> float:
        """The argument."""
        return self.arguments.exponent

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield exponents of every kind, and what is another operator."""
        yield RuleSample("square", Call(operator.pow, (INPUT, 2)), ((2, 3),), low=-3.0, high=4.0)
        yield RuleSample("cube", Call(torch.pow, (INPUT, 3)), ((2, 3),), low=-3.0, high=4.0)
        yield RuleSample("fourth power", Call("pow", (INPUT, 4)), ((2, 3),), low=-2.0, high=1.5)
        yield RuleSample("fifth power", Call(aten.pow.Tensor_Scalar, (INPUT, 5.0)), ((2, 3),), low=-2.0, high=1.5)
        yield RuleSample("root", Call("__pow__", (INPUT, 0.5)), ((2, 3),), low=0.1, high=4.0)
        yield RuleSample("steep", Call(torch.pow, (INPUT,), {"exponent": 2.5}), ((2, 3),), low=0.1, high=3.0)
        yield RuleSample("inverse", Call("pow", (INPUT, -1)), ((2, 3),), low=-4.0, high=-0.5)
        yield RuleSample("inverse square", Call("pow", (INPUT, -2)), ((2, 3),), low=-4.0, high=-0.5)
        yield RuleSample("inverse cube of a root", Call("pow", (INPUT, -1.5)), ((2, 3),), low=0.3, high=4.0)
        yield RuleSample("itself", Call("pow", (INPUT, 1)), ((2, 3),))
        yield RuleSample("constant", Call("pow", (INPUT, 0)), ((2, 3),))
        call, wrong = Call(torch.pow, (INPUT, Slot(1))), "exponent must not depend on the input"
        yield RuleSample("perturbed exponent", call, ((2, 3), ()), error=ValueError, message=wrong)
        call, wrong = Call(torch.pow, (2.0, INPUT)), "exponent must not depend on the input"
        yield RuleSample("constant base", call, ((2, 3),), error=ValueError, message=wrong)
        call, wrong = Call(torch.pow, (INPUT, torch.tensor([1.0, 2.0, 3.0]))), "must be a Python number"
        yield RuleSample("one exponent per element", call, ((2, 3),), error=ValueError, message=wrong)


@register(operator.pow, "__pow__", *spellings("pow"), case=True)
class DualPowEach(Smooth):
    """A power whose exponent is a constant tensor, one exponent per element, perhaps a parameter. Source: as ``DualPow``.

    Domain and shape are those of each element's exponent. The tensor is read when bounds are computed.
    """

    source: ClassVar[str] = _TANGENTS

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a perturbed exponent, and a base that is constant."""
        wrong = unless_only(cls, call, "input")
        return wrong or (None if slots(cls(call).arguments.input) else "the base must depend on the input")

    @staticmethod
    def parameters(input: Any, exponent: Any) -> dict[str, Any]:
        """Name the arguments of ``torch.pow``."""
        return {"input": input, "exponent": exponent}

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the operator; an exponent that widens the base would break the element-by-element account."""
        result = self.call(*inputs)
        check_not_widened(result, inputs[0])
        return result

    def _exponent(self, z: Tensor) -> Tensor:
        """Return the argument, which may hold integers, in the dtype of the base."""
        return self.arguments.exponent.to(z.dtype)

    @property
    def extent(self) -> tuple[Tensor, float]:
        """Everything for odd exponents, otherwise what is not negative."""
        return torch.where(self.arguments.exponent % 2 == 1, -torch.inf, 0.0), torch.inf

    def outside(self, *boxes: Interval) -> Tensor:
        """Tell where a fractional exponent meets a negative number, or a negative one zero."""
        (box,), p = boxes, self._exponent(boxes[0].lower)
        return ((p != p.round()) & (box.lower < 0)) | ((p < 0) & (box.lower <= 0) & (box.upper >= 0)) | p.isnan()

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``p z ** (p - 1)``."""
        p = self._exponent(z)
        return torch.where(p == 0, 0.0, p * z ** (p - 1))

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return both sides of zero; a straight line counts as convex."""
        p = self._exponent(box.lower)
        right = p * (p - 1) >= 0
        odd = (p % 2 == 1) & (p != 1)
        return Piece(-torch.inf, 0.0, right ^ odd), Piece(0.0, torch.inf, right)

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return roots of the slope, and an end where the function is straight."""
        p = self._exponent(slope)
        straight, ratio, root = (p == 0) | (p == 1), slope / p, 1 / (p - 1)
        left, right = -(torch.where(p % 2 == 1, ratio, -ratio).clamp(min=0) ** root), ratio.clamp(min=0) ** root
        return torch.where(straight, _end(slope, p), left), torch.where(straight, _end(slope, p), right)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield exponents of every kind on either side of zero, and what is another operator."""
        whole, inverse = torch.tensor([2, 3, 4, 5, 1, 0]), torch.tensor([-1, -2, -3, 2])
        broken = torch.tensor([0.5, -0.7, 2.5, 1.2, -2.0, 0.4])
        yield RuleSample("whole", Call(operator.pow, (INPUT, whole)), ((2, 6),), low=-2.0, high=1.5)
        yield RuleSample("fractions", Call(torch.pow, (INPUT, broken)), ((2, 6),), low=0.3, high=4.0)
        yield RuleSample("inverse", Call("pow", (INPUT, inverse)), ((2, 4),), low=-4.0, high=-0.5)
        learned = Call(aten.pow.Tensor_Tensor, (INPUT, torch.tensor(3.3)))
        yield RuleSample("one for all", learned, ((2, 3),), low=0.2, high=3.0)
        call, wrong = Call(torch.pow, (INPUT, Slot(1))), "exponent must not depend on the input"
        yield RuleSample("perturbed exponent", call, ((2, 3), (3,)), error=ValueError, message=wrong)
        call, wrong = Call(torch.pow, (whole, INPUT)), "exponent must not depend on the input"
        yield RuleSample("constant base", call, ((2, 6),), error=ValueError, message=wrong)
        call, wrong = Call(torch.pow, (INPUT, whole[:, None])), "widens its input"
        yield RuleSample("widened", call, ((1, 6),), low=0.5, error=ValueError, message=wrong)


@register(operator.pow, "__pow__", *spellings("pow"), case=True)
class DualPowerOf(Exponential):
    """A perturbed power of a constant: a positive number, or a tensor of them. Source: as the exponential.

    A tensor is read when bounds are computed. Where it is not positive nothing is said: the bounds are infinite.
    """

    facts: ClassVar[Facts] = Facts(convex=True, positionwise=True)
    source: ClassVar[str] = _TANGENTS

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a perturbed base, and numbers that are not positive."""
        wrong = unless_only(cls, call, "exponent")
        if wrong:
            return wrong
        given = cls(call).arguments
        if not slots(given.exponent):
            return "the exponent must depend on the input"
        positive = not isinstance(given.input, (int, float)) or given.input > 0
        return None if positive else "a constant to a power that depends on the input must be positive"

    @staticmethod
    def parameters(input: Any, exponent: Any) -> dict[str, Any]:
        """Name the arguments of ``torch.pow``."""
        return {"input": input, "exponent": exponent}

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the operator; a base that widens the exponent would break the element-by-element account."""
        result = self.call(*inputs)
        check_not_widened(result, inputs[0])
        return result

    @property
    def rate(self) -> float | Tensor:
        """The logarithm of the base."""
        base = self.arguments.input
        return torch.log(torch.where(base > 0, base, 1.0)) if isinstance(base, Tensor) else math.log(base)

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return a logarithm of the slope, and an end where the base is 1."""
        (place,) = super().turning(slope, pieces)
        straight = torch.zeros_like(slope, dtype=torch.bool) | (self.rate == 0)
        return (torch.where(straight, _end(slope, 0.0), place),)

    def outside(self, *boxes: Interval) -> Tensor:
        """Tell where the base is not positive."""
        base, nowhere = self.arguments.input, torch.zeros_like(boxes[0].lower, dtype=torch.bool)
        return nowhere | ~(base > 0) if isinstance(base, Tensor) else nowhere

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield bases above and below 1, and 1 itself, and what is another operator."""
        yield RuleSample("two", Call(operator.pow, (2, INPUT)), ((2, 3),), low=-5.0, high=4.0)
        yield RuleSample("falling", Call(torch.pow, (0.3, INPUT)), ((2, 3),), low=-3.0, high=4.0)
        yield RuleSample("aten", Call(aten.pow.Scalar, (1.5, INPUT)), ((3,),))
        bases = Call(torch.pow, (torch.tensor([0.5, 1.0, 2.5]), INPUT))
        yield RuleSample("one base per element", bases, ((2, 3),), low=-3.0, high=3.0)
        wrong = "must be positive"
        yield RuleSample("zero", Call(operator.pow, (0, INPUT)), ((2, 3),), error=ValueError, message=wrong)
        wrong = "input must not depend on the input"
        yield RuleSample("two inputs", Call(operator.pow, (INPUT, Slot(1))), ((2, 3), ()), error=ValueError, message=wrong)
        call, wrong = Call(torch.pow, (torch.tensor([[2.0], [3.0]]), INPUT)), "widens its input"
        yield RuleSample("widened", call, ((1, 3),), error=ValueError, message=wrong)


@register(*spellings("float_power"))
class DualFloatPower(Composite):
    """A power computed in double precision. Source: a conversion and ``pow``."""

    @staticmethod
    def compose(input: Any, exponent: Any) -> Any:
        """Convert tensors, then take the power."""
        return operator.pow(*(v if isinstance(v, (int, float)) else v.double() for v in (input, exponent)))

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield both kinds of power."""
        yield RuleSample("function", Call(torch.float_power, (INPUT, 3)), ((2, 3),), low=-3.0, high=4.0)
        yield RuleSample("method", Call("float_power", (INPUT,), {"exponent": 0.5}), ((2, 3),), low=0.5)
        exponents = Call(torch.float_power, (INPUT, torch.tensor([2.0, 3.0, -0.5])))
        yield RuleSample("one exponent per element", exponents, ((2, 3),), low=0.5, high=4.0)
        yield RuleSample("constant base", Call(torch.float_power, (2, INPUT)), ((2, 3),), low=-3.0, high=4.0)
        call, wrong = Call(torch.float_power, (INPUT,), {"power": 3}), "missing a required argument"
        yield RuleSample("another name", call, ((2, 3),), error=ValueError, message=wrong)


@register(*spellings("xlogy"), torch.special.xlogy)
class DualXLogY(Composite):
    """``input * log(other)``; infinite bounds where ``other`` may not be positive. Source: a logarithm and a product."""

    @staticmethod
    def compose(input: Any, other: Any) -> Any:
        """Multiply by the logarithm, which is a number where ``other`` is one."""
        return input * (math.log(other) if isinstance(other, (int, float)) else torch.log(other))

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield either argument perturbed, and both."""
        positive = {"low": 0.2, "high": 4.0}
        yield RuleSample("both", Call(torch.xlogy, (INPUT, Slot(1))), ((2, 3), (2, 3)), **positive)
        yield RuleSample("constant factor", Call(torch.xlogy, (-1.5, INPUT)), ((2, 3),), **positive)
        yield RuleSample("constant logarithm", Call("xlogy", (INPUT, torch.tensor([0.5, 1.0, 3.0]))), ((2, 3),))
        yield RuleSample("number", Call(torch.special.xlogy, (INPUT, 2.5)), ((2, 3),))
        call, wrong = Call(torch.xlogy, (INPUT,)), "missing a required argument"
        yield RuleSample("one argument", call, ((2, 3),), error=ValueError, message=wrong)


def _end(slope: Tensor, rate: Tensor | float) -> Tensor:
    """Return the end at which a straight function, less that slope, is lowest."""
    return torch.where(slope < rate, -torch.inf, torch.inf).to(slope.dtype)


@register(nn.Softplus, *spellings("softplus"))
class DualSoftplus(Smooth):
    """Softplus, ``log(1 + exp(beta z)) / beta``, and ``z`` itself where ``beta z`` exceeds a threshold.

    The function steps down by ``log(1 + exp(-threshold)) / beta`` there, 2e-9 by default; the offsets know both limits.
    Source: convexity; thesis, Theorem 3 (eq. 3.42), on tangents.
    """

    source: ClassVar[str] = _TANGENTS

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse perturbed arguments, and a beta of the wrong sign."""
        wrong = unless_only(cls, call, "input")
        return wrong or (None if cls(call).arguments.beta > 0 else "beta must be positive")

    @staticmethod
    def parameters(input: Any, beta: float = 1, threshold: float = 20) -> dict[str, Any]:
        """Name the arguments of ``F.softplus``."""
        return {"input": input, "beta": beta, "threshold": threshold}

    @staticmethod
    def from_module(module: nn.Softplus, input: Any) -> dict[str, Any]:
        """Read the arguments off the module."""
        return {"input": input, "beta": module.beta, "threshold": module.threshold}

    @property
    def _edge(self) -> float:
        return self.arguments.threshold / self.arguments.beta

    def derivative(self, z: Tensor) -> Tensor:
        """Return the logistic function, and 1 beyond the threshold."""
        given = self.arguments
        return torch.where(given.beta * z > given.threshold, 1.0, torch.sigmoid(given.beta * z))

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return both sides of the threshold."""
        return Piece(-torch.inf, self._edge, True), Piece(self._edge, torch.inf, None)

    def jumps(self) -> tuple[tuple[float, float, float], ...]:
        """Return the step at the threshold."""
        edge, given = self._edge, self.arguments
        step = math.log1p(math.exp(-abs(given.threshold))) / given.beta
        return ((edge, max(edge, 0.0) + step, edge),)

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return the log-odds of the slope."""
        return torch.logit(slope.clamp(0, 1)) / self.arguments.beta, slope

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings and other arguments."""
        yield RuleSample("module", Call(nn.Softplus()), ((2, 3),))
        yield RuleSample("function", Call(F.softplus, (INPUT, 2)), ((2, 3),), low=-3.0, high=4.0)
        yield RuleSample("steep", Call(nn.Softplus(beta=3.0)), ((2, 3),))
        yield RuleSample("low threshold", Call(F.softplus, (INPUT, 1, 2.5)), ((3, 4),), low=-3.0, high=6.0)
        yield RuleSample("aten", Call(aten.softplus.default), ((3,),))
        call, wrong = Call(F.softplus, (INPUT, -1.0)), "beta must be positive"
        yield RuleSample("negative beta", call, ((2, 3),), error=ValueError, message=wrong)


@register(nn.LogSigmoid, *spellings("logsigmoid", "log_sigmoid"))
class DualLogSigmoid(Smooth):
    """Logarithm of the logistic function. Source: concavity; thesis, Theorem 3 (eq. 3.42), on tangents."""

    facts: ClassVar[Facts] = Facts(monotone=True, positionwise=True)
    source: ClassVar[str] = _TANGENTS

    def derivative(self, z: Tensor) -> Tensor:
        """Return the logistic function of ``-z``."""
        return torch.sigmoid(-z)

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the whole axis: concave."""
        return (Piece(-torch.inf, torch.inf, False),)

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return minus the log-odds of the slope."""
        return (-torch.logit(slope.clamp(0, 1)),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("module", Call(nn.LogSigmoid()), ((2, 3),))
        yield RuleSample("function", Call(F.logsigmoid), ((2, 3),), low=-3.0, high=4.0)
