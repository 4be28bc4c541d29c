"""Tangent, hyperbolic functions and the inverses that have a domain; sine and cosine are in ``gated``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from dual_layers.contract import INPUT, Call, Facts, Interval, RuleSample, Slot
from dual_layers.refusals import unless_only
from dual_layers.registry import register
from dual_layers.smooth import Piece, Smooth
from dual_layers.spellings import spellings
from dual_layers.sshaped import Steepening

aten = torch.ops.aten
_TANGENTS = "thesis, Theorem 3 (eq. 3.42), on tangents"


@register(*spellings("tan"))
class DualTan(Smooth):
    """Tangent; infinite bounds where a pole may be met. Source: ``tan' = 1 + tan^2``; thesis, eq. 3.42, on tangents.

    A box between two neighbouring poles sees one branch, which rises from minus to plus infinity.
    """

    facts: ClassVar[Facts] = Facts(monotone=True, positionwise=True)
    source: ClassVar[str] = _TANGENTS
    inside: ClassVar[float] = 0.0

    def outside(self, *boxes: Interval) -> Tensor:
        """Tell which boxes hold a pole, an odd multiple of pi / 2, or come within rounding of one."""
        ends = [(end / math.pi + 0.5, end) for end in (boxes[0].lower, boxes[0].upper)]
        doubt = [8 * torch.finfo(end.dtype).eps * (1 + branch.abs()) for branch, end in ends]
        first, last = torch.floor(ends[0][0] - doubt[0]), torch.floor(ends[1][0] + doubt[1])
        return ~(first == last) | (doubt[1] > 0.1)

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``1 + tan(z)^2``."""
        return 1 + torch.tan(z) ** 2

    def error(self, z: Tensor) -> Tensor:
        """Return the size of the argument: where a branch bends is a rounded multiple of pi."""
        return 1.0 + z.abs()

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the two halves of the box' branch."""
        middle = math.pi * torch.round(box.center / math.pi)
        return Piece(-torch.inf, middle, False), Piece(middle, torch.inf, True)

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return ``artan(sqrt(slope - 1))`` on either side of the middle."""
        distance = torch.atan((slope - 1).clamp(min=0).sqrt())
        return pieces[0].upper - distance, pieces[0].upper + distance

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, on two branches."""
        yield RuleSample("function", Call(torch.tan), ((2, 3),), low=-1.4, high=1.3)
        yield RuleSample("method", Call("tan"), ((2, 3),), low=1.8, high=4.5)


@register(*spellings("sinh"))
class DualSinh(Steepening):
    """Hyperbolic sine. Source: ``sinh' = cosh``; thesis, Theorem 3 (eq. 3.42), on tangents."""

    source: ClassVar[str] = _TANGENTS

    def derivative(self, z: Tensor) -> Tensor:
        """Return the hyperbolic cosine."""
        return torch.cosh(z)

    def distance(self, slope: Tensor) -> Tensor:
        """Invert the hyperbolic cosine."""
        return torch.acosh(slope)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("function", Call(torch.sinh), ((2, 3),), low=-3.0, high=4.0)
        yield RuleSample("method", Call("sinh"), ((2, 3),), low=-1.0, high=1.0)


@register(*spellings("cosh"))
class DualCosh(Smooth):
    """Hyperbolic cosine. Source: convexity, ``cosh' = sinh``; thesis, Theorem 3 (eq. 3.42), on tangents."""

    facts: ClassVar[Facts] = Facts(convex=True, positionwise=True)
    source: ClassVar[str] = _TANGENTS
    extent: ClassVar[tuple[float, float]] = (1.0, torch.inf)

    def derivative(self, z: Tensor) -> Tensor:
        """Return the hyperbolic sine."""
        return torch.sinh(z)

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the whole axis: convex."""
        return (Piece(-torch.inf, torch.inf, True),)

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Invert the hyperbolic sine."""
        return (torch.asinh(slope),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("function", Call(torch.cosh), ((2, 3),), low=-3.0, high=4.0)
        yield RuleSample("method", Call("cosh"), ((2, 3),), low=-1.0, high=1.0)


@register(*spellings("asin", "arcsin"))
class DualAsin(Steepening):
    """Arc sine on [-1, 1]. Source: ``asin' = 1 / sqrt(1 - z^2)``; thesis, Theorem 3 (eq. 3.42), on tangents."""

    source: ClassVar[str] = _TANGENTS
    inside: ClassVar[float] = 0.0

    def domain(self) -> tuple[float, float]:
        """Return the range of the sine."""
        return -1.0, 1.0

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``1 / sqrt(1 - z^2)``, accurate at the ends."""
        return torch.rsqrt((1 - z) * (1 + z))

    def distance(self, slope: Tensor) -> Tensor:
        """Return ``sqrt(1 - 1 / slope^2)``."""
        return ((1 - 1 / slope) * (1 + 1 / slope)).sqrt()

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings inside the domain."""
        yield RuleSample("function", Call(torch.asin), ((2, 3),), low=-0.95, high=0.98)
        yield RuleSample("method", Call("arcsin"), ((2, 3),), low=-0.5, high=0.9)


@register(*spellings("acos", "arccos"))
class DualAcos(Smooth):
    """Arc cosine on [-1, 1], falling: convex below zero, concave above. Source: as the arc sine."""

    source: ClassVar[str] = _TANGENTS
    extent: ClassVar[tuple[float, float]] = (0.0, torch.inf)
    inside: ClassVar[float] = 0.0

    def domain(self) -> tuple[float, float]:
        """Return the range of the cosine."""
        return -1.0, 1.0

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``-1 / sqrt(1 - z^2)``, accurate at the ends."""
        return -torch.rsqrt((1 - z) * (1 + z))

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the two sides of zero."""
        return Piece(-torch.inf, 0.0, True), Piece(0.0, torch.inf, False)

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return ``sqrt(1 - 1 / slope^2)`` on either side."""
        inverse = 1 / slope.clamp(max=-1)
        distance = ((1 - inverse) * (1 + inverse)).sqrt()
        return -distance, distance

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings inside the domain."""
        yield RuleSample("function", Call(torch.acos), ((2, 3),), low=-0.95, high=0.98)
        yield RuleSample("method", Call("arccos"), ((2, 3),), low=-0.5, high=0.9)


@register(*spellings("acosh", "arccosh"))
class DualAcosh(Smooth):
    """Inverse hyperbolic cosine, from 1 on. Source: concavity, ``acosh' = 1 / sqrt(z^2 - 1)``; thesis, eq. 3.42."""

    facts: ClassVar[Facts] = Facts(monotone=True, positionwise=True)
    source: ClassVar[str] = _TANGENTS
    inside: ClassVar[float] = 2.0

    def domain(self) -> tuple[float, float]:
        """Return the range of the hyperbolic cosine."""
        return 1.0, torch.inf

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``1 / sqrt(z^2 - 1)``, accurate near 1 and where the square overflows."""
        return torch.rsqrt(z - 1) * torch.rsqrt(z + 1)

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the domain: concave."""
        return (Piece(1.0, torch.inf, False),)

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return ``sqrt(1 + 1 / slope^2)``."""
        return (torch.hypot(1 / slope.clamp(min=0), torch.ones_like(slope)),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings inside the domain."""
        yield RuleSample("function", Call(torch.acosh), ((2, 3),), low=1.1, high=9.0)
        yield RuleSample("method", Call("arccosh"), ((2, 3),), low=2.0, high=30.0)


@register(*spellings("atanh", "arctanh"))
class DualAtanh(Steepening):
    """Inverse hyperbolic tangent on [-1, 1], infinite at the ends. Source: ``atanh' = 1 / (1 - z^2)``; thesis, eq. 3.42."""

    source: ClassVar[str] = _TANGENTS
    inside: ClassVar[float] = 0.0

    def domain(self) -> tuple[float, float]:
        """Return the range of the hyperbolic tangent, with its limits."""
        return -1.0, 1.0

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``1 / (1 - z^2)``, accurate at the ends."""
        return 1 / ((1 - z) * (1 + z))

    def distance(self, slope: Tensor) -> Tensor:
        """Return ``sqrt(1 - 1 / slope)``."""
        return (1 - 1 / slope).sqrt()

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings inside the domain."""
        yield RuleSample("function", Call(torch.atanh), ((2, 3),), low=-0.95, high=0.98)
        yield RuleSample("method", Call("arctanh"), ((2, 3),), low=-0.5, high=0.9)


@register(*spellings("logit"), torch.special.logit)
class DualLogit(Steepening):
    """Log-odds on [0, 1], infinite at the ends; with ``eps`` the input is first moved into [eps, 1 - eps].

    Source: ``logit' = 1 / (z (1 - z))``; thesis, Theorem 3 (eq. 3.42), on tangents.
    """

    source: ClassVar[str] = _TANGENTS
    center: ClassVar[float] = 0.5
    inside: ClassVar[float] = 0.5

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a perturbed eps, and one that leaves no interval."""
        wrong = unless_only(cls, call, "input")
        if wrong:
            return wrong
        eps = cls(call).arguments.eps
        return None if eps is None or 0 <= eps < 0.5 else "eps must be at least 0 and below 0.5"

    @staticmethod
    def parameters(input: Any, eps: float | None = None) -> dict[str, Any]:
        """Name the arguments of ``torch.logit``."""
        return {"input": input, "eps": eps}

    def domain(self) -> tuple[float, float]:
        """Return the probabilities; with ``eps`` everything."""
        return (0.0, 1.0) if self.arguments.eps is None else (-torch.inf, torch.inf)

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``1 / (z (1 - z))``, and 0 beyond the ends."""
        eps = self.arguments.eps or 0.0
        rate = 1 / (z.clamp(eps, 1 - eps) * (1 - z.clamp(eps, 1 - eps)))
        return torch.where((z >= eps) & (z <= 1 - eps), rate, 0.0)

    def error(self, z: Tensor) -> float:
        """Return 1: the odds near even are as uncertain as the input."""
        return 1.0

    def breakpoints(self) -> tuple[float, ...]:
        """Return where ``eps`` cuts the function off."""
        eps = self.arguments.eps
        return () if eps is None else (eps, 1 - eps)

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the two sides of one half, and what ``eps`` makes flat."""
        eps = self.arguments.eps
        if eps is None:
            return super().pieces(box)
        flat = Piece(-torch.inf, eps, None), Piece(1 - eps, torch.inf, None)
        return flat[0], Piece(eps, 0.5, False), Piece(0.5, 1 - eps, True), flat[1]

    def distance(self, slope: Tensor) -> Tensor:
        """Solve ``z (1 - z) = 1 / slope``."""
        return (0.25 - 1 / slope).clamp(min=0).sqrt()

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return one point on each side of one half."""
        found = super().turning(slope, pieces)
        return found if len(pieces) == 2 else (slope, *found, slope)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, without eps inside the domain, with it also beyond."""
        yield RuleSample("function", Call(torch.logit), ((2, 3),), low=0.02, high=0.95)
        yield RuleSample("eps", Call("logit", (INPUT, 0.1)), ((2, 3),), low=-0.4, high=1.3)
        yield RuleSample("eps by keyword", Call(torch.special.logit, (INPUT,), {"eps": 0.02}), ((2, 3),), low=-0.4, high=1.3)
        call, wrong = Call(torch.logit, (INPUT, 0.6)), "at least 0 and below 0.5"
        yield RuleSample("no interval", call, ((2, 3),), error=ValueError, message=wrong)
        call, wrong = Call(torch.logit, (INPUT, Slot(1))), "eps must not depend on the input"
        yield RuleSample("perturbed eps", call, ((2, 3), ()), error=ValueError, message=wrong)
