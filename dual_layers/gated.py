"""Functions that bend more than once: gated units (GELU, SiLU, Mish, Hardswish), exponential units, sine and cosine."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers.contract import INPUT, Call, Facts, Interval, RuleSample, Slot
from dual_layers.refusals import unless_only
from dual_layers.registry import register
from dual_layers.smooth import Piece, Smooth
from dual_layers.spellings import spellings

aten = torch.ops.aten
_TANGENTS = "thesis, Theorem 3 (eq. 3.42), on tangents"


class Gated(Smooth):
    """``z * gate(z)`` with a gate that rises from 0 to 1: concave far out, convex in the middle. Abstract.

    Its derivative ``gate + z * gate'`` has no inverse in closed form.
    """

    @abstractmethod
    def gate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gate and its derivative, accurate in the left tail."""

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``gate + z * gate'``."""
        gate, steepness = self.gate(z)
        return gate + z * steepness

    def rate_error(self, z: Tensor) -> Tensor:
        """Return the size of the terms, which may cancel."""
        gate, steepness = self.gate(z)
        return gate + (z * steepness).abs()

    def error(self, z: Tensor) -> Tensor:
        """Return the size of ``z`` near zero: a gate may be computed as one less something."""
        return z.abs().clamp(max=4.0)


@register(nn.GELU, *spellings("gelu"))
class DualGELU(Gated):
    """Gaussian error linear unit, exact or with the approximation by tanh. Source: thesis, Theorem 3 (eq. 3.42), on tangents.

    Inflections: ``z^2 = 2`` for the exact form, +-1.4185 for the approximate one.
    """

    source: ClassVar[str] = _TANGENTS
    tail: ClassVar[float] = 10.0

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse an approximation that is not known."""
        wrong = unless_only(cls, call, "input")
        known = wrong or cls(call).arguments.approximate in ("none", "tanh")
        return wrong or (None if known else "approximate argument must be either none or tanh.")

    @staticmethod
    def parameters(input: Any, approximate: str = "none") -> dict[str, Any]:
        """Name the arguments of ``F.gelu``."""
        return {"input": input, "approximate": approximate}

    @staticmethod
    def from_module(module: nn.GELU, input: Any) -> dict[str, Any]:
        """Read the argument off the module."""
        return {"input": input, "approximate": module.approximate}

    @property
    def _exact(self) -> bool:
        return self.arguments.approximate == "none"

    def gate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normal distribution and density, or the logistic function that stands for it."""
        if self._exact:
            return 0.5 * torch.erfc(-z / math.sqrt(2)), torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        scale, cubic = math.sqrt(8 / math.pi), 0.044715
        inner, rate = scale * (z + cubic * z**3), scale * (1 + 3 * cubic * z * z)
        gate = torch.sigmoid(inner)
        return gate, (gate * torch.sigmoid(-inner) * rate).nan_to_num()

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the parts outside and between the inflections."""
        bend = math.sqrt(2) if self._exact else 1.418504008790828355548
        return Piece(-torch.inf, -bend, False), Piece(-bend, bend, True), Piece(bend, torch.inf, False)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings and both forms."""
        yield RuleSample("module", Call(nn.GELU()), ((2, 3),), low=-5.0, high=5.0)
        yield RuleSample("tanh", Call(nn.GELU(approximate="tanh")), ((2, 3),), low=-5.0, high=5.0)
        yield RuleSample("function", Call(F.gelu), ((2, 3),))
        yield RuleSample("function, tanh", Call(F.gelu, (INPUT,), {"approximate": "tanh"}), ((3, 4),))
        yield RuleSample("aten", Call(aten.gelu.default), ((3,),))
        call, wrong = Call(F.gelu, (INPUT,), {"approximate": "sigmoid"}), "must be either none or tanh"
        yield RuleSample("unknown form", call, ((2, 3),), error=ValueError, message=wrong)


@register(nn.SiLU, *spellings("silu"))
class DualSiLU(Gated):
    """Sigmoid linear unit (swish), ``z * sigmoid(z)``. Source: inflections ``z tanh(z / 2) = 2``; thesis, eq. 3.42."""

    source: ClassVar[str] = _TANGENTS

    def gate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logistic function and its derivative."""
        gate = torch.sigmoid(z)
        return gate, gate * torch.sigmoid(-z)

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the parts outside and between the inflections."""
        bend = 2.399357280515467667833
        return Piece(-torch.inf, -bend, False), Piece(-bend, bend, True), Piece(bend, torch.inf, False)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("module", Call(nn.SiLU()), ((2, 3),))
        yield RuleSample("function", Call(F.silu), ((2, 3, 2, 2),), low=-5.0, high=4.0)
        yield RuleSample("aten", Call(aten.silu.default), ((3,),))


@register(nn.Mish, *spellings("mish"))
class DualMish(Gated):
    """Mish, ``z * tanh(softplus(z))``. Source: numerical inflections; thesis, Theorem 3 (eq. 3.42), on tangents."""

    source: ClassVar[str] = _TANGENTS

    def gate(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``tanh(softplus(z))`` and its derivative."""
        softplus = torch.log1p(torch.exp(z))
        decay = torch.exp(-2 * softplus)
        return torch.tanh(softplus), 4 * decay / (1 + decay) ** 2 * torch.sigmoid(z)

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the parts outside and between the inflections."""
        left, right = -2.256376396360793120006, 1.490571179485428459294
        return Piece(-torch.inf, left, False), Piece(left, right, True), Piece(right, torch.inf, False)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("module", Call(nn.Mish()), ((2, 3),))
        yield RuleSample("function", Call(F.mish), ((2, 3),), low=-5.0, high=4.0)


@register(nn.Hardswish, *spellings("hardswish"))
class DualHardswish(Smooth):
    """Hardswish, ``z * relu6(z + 3) / 6``: straight, a parabola, straight, with kinks in between. Source: thesis, eq. 3.42."""

    source: ClassVar[str] = _TANGENTS

    def derivative(self, z: Tensor) -> Tensor:
        """Return that of the parabola up to its ends."""
        return torch.where(z.abs() <= 3, (2 * z + 3) / 6, (z > 3).to(z.dtype))

    def rate_error(self, z: Tensor) -> float:
        """Return 1: the parabola's derivative is a difference near -1.5."""
        return 1.0

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the three parts."""
        return Piece(-torch.inf, -3.0, None), Piece(-3.0, 3.0, True), Piece(3.0, torch.inf, None)

    def breakpoints(self) -> tuple[float, ...]:
        """Return both ends of the parabola."""
        return (-3.0, 3.0)

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return the point of the parabola."""
        return slope, 3 * slope - 1.5, slope

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("module", Call(nn.Hardswish()), ((2, 3),))
        yield RuleSample("function", Call(F.hardswish), ((2, 3),), low=-4.0, high=4.0)


class ExponentialUnit(Smooth):
    """``height * (exp(rate * z) - 1)`` below zero, ``scale * z`` above, with a kink between unless they fit. Abstract."""

    @abstractmethod
    def constants(self) -> tuple[float, float, float]:
        """Return height, rate and scale."""

    def derivative(self, z: Tensor) -> Tensor:
        """Return that of the exponential up to zero."""
        height, rate, scale = self.constants()
        return torch.where(z <= 0, height * rate * torch.exp(rate * z.clamp(max=0)), scale)

    def breakpoints(self) -> tuple[float, ...]:
        """Return zero."""
        return (0.0,)

    def error(self, z: Tensor) -> float:
        """Return the size of the constant that is subtracted, and of rounding inside the exponential."""
        return abs(self.constants()[0])

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return both sides of zero."""
        height, rate, _ = self.constants()
        return Piece(-torch.inf, 0.0, height > 0 if height * rate else None), Piece(0.0, torch.inf, None)

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return the logarithm of the slope."""
        height, rate, _ = self.constants()
        return (torch.log((slope / (height * rate)).clamp(min=0)) / rate if height * rate else slope), slope


@register(nn.ELU, *spellings("elu"))
class DualELU(ExponentialUnit):
    """Exponential linear unit. Source: thesis, Theorem 3 (eq. 3.42), on tangents, with the kink at zero if there is one."""

    source: ClassVar[str] = _TANGENTS

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse perturbed parameters."""
        return unless_only(cls, call, "input")

    @staticmethod
    def parameters(
        input: Any, alpha: float = 1.0, inplace: Any = False, input_scale: float = 1.0, *, scale: float = 1.0
    ) -> dict[str, Any]:
        """Name the arguments of ``F.elu``, and those of ATen, which has ``scale`` in the place of ``inplace``."""
        scale = scale if isinstance(inplace, bool) else inplace
        return {"input": input, "alpha": alpha, "scale": scale, "input_scale": input_scale}

    @staticmethod
    def from_module(module: nn.ELU, input: Any) -> dict[str, Any]:
        """Read the argument off the module."""
        return {"input": input, "alpha": module.alpha, "scale": 1.0, "input_scale": 1.0}

    def constants(self) -> tuple[float, float, float]:
        """Return the arguments."""
        given = self.arguments
        return given.alpha * given.scale, given.input_scale, given.scale

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, and heights that make a kink of either kind."""
        yield RuleSample("module", Call(nn.ELU()), ((2, 3),))
        yield RuleSample("function", Call(F.elu, (INPUT, 0.4)), ((2, 3),), low=-4.0, high=3.0)
        yield RuleSample("high", Call(F.elu, (INPUT,), {"alpha": 2.5}), ((2, 3),), low=-4.0, high=3.0)
        yield RuleSample("aten", Call(aten.elu.default, (INPUT, 1.5, 1.2, 0.7)), ((3, 4),), low=-4.0, high=3.0)
        yield RuleSample("no height", Call(nn.ELU(0.0)), ((2, 3),))
        call, wrong = Call(F.elu, (INPUT, Slot(1))), "alpha must not depend on the input"
        yield RuleSample("perturbed alpha", call, ((2, 3), ()), error=ValueError, message=wrong)


@register(nn.SELU, *spellings("selu"))
class DualSELU(ExponentialUnit):
    """Scaled exponential linear unit. Source: as ELU; its constants make a concave kink at zero."""

    facts: ClassVar[Facts] = Facts(monotone=True, positionwise=True)
    source: ClassVar[str] = _TANGENTS

    def constants(self) -> tuple[float, float, float]:
        """Return the constants of the operator."""
        alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
        return alpha * scale, 1.0, scale

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("module", Call(nn.SELU()), ((2, 3),))
        yield RuleSample("function", Call(F.selu), ((2, 3),), low=-4.0, high=3.0)


@register(nn.CELU, *spellings("celu"))
class DualCELU(ExponentialUnit):
    """Continuously differentiable exponential linear unit. Source: as ELU, without a kink."""

    source: ClassVar[str] = _TANGENTS

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse perturbed parameters."""
        return unless_only(cls, call, "input")

    @staticmethod
    def parameters(input: Any, alpha: float = 1.0, inplace: bool = False) -> dict[str, Any]:
        """Name the arguments of ``F.celu``."""
        return {"input": input, "alpha": alpha}

    @staticmethod
    def from_module(module: nn.CELU, input: Any) -> dict[str, Any]:
        """Read the argument off the module."""
        return {"input": input, "alpha": module.alpha}

    def constants(self) -> tuple[float, float, float]:
        """Return the argument and its inverse."""
        return self.arguments.alpha, 1 / self.arguments.alpha, 1.0

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("module", Call(nn.CELU()), ((2, 3),))
        yield RuleSample("function", Call(F.celu, (INPUT, 2.5)), ((2, 3),), low=-4.0, high=3.0)
        call, wrong = Call(F.celu, (INPUT, Slot(1))), "alpha must not depend on the input"
        yield RuleSample("perturbed alpha", call, ((2, 3), ()), error=ValueError, message=wrong)


class Wave(Smooth):
    """``sin(z + phase)``. Abstract.

    Between two zeros it is concave or convex. Of the points of one derivative the extremes of ``f(z) - a z`` are the first
    and the last of either kind, and those lie within three half-waves of an end of the box: six pieces are enough.
    """

    extent: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    phase: ClassVar[float] = 0.0

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``cos(z + phase)``."""
        return torch.cos(z) if self.phase == 0.0 else -torch.sin(z)

    def error(self, z: Tensor) -> Tensor:
        """Return the size of the argument: the ends of the pieces are rounded multiples of pi."""
        return 1.0 + z.abs()

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the first and the last three half-waves."""
        first, last = (torch.floor((end + self.phase) / math.pi) for end in (box.lower, box.upper))
        halves = [first, first + 1, first + 2, last - 2, last - 1, last]
        return tuple(Piece(n * math.pi - self.phase, (n + 1) * math.pi - self.phase, n % 2 == 1) for n in halves)

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return an arc cosine, counted from the start of each half-wave."""
        slope = slope.clamp(-1, 1)
        return tuple(piece.lower + torch.acos(torch.where(piece.convex, -slope, slope)) for piece in pieces)


@register(*spellings("sin"))
class DualSin(Wave):
    """Sine. Source: concave and convex half-waves; thesis, Theorem 3 (eq. 3.42), on tangents."""

    source: ClassVar[str] = _TANGENTS

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, few and many waves."""
        yield RuleSample("function", Call(torch.sin), ((2, 3),), low=-5.0, high=4.0)
        yield RuleSample("method", Call("sin"), ((2, 3),))


@register(*spellings("cos"))
class DualCos(Wave):
    """Cosine. Source: as the sine, a quarter of a wave later."""

    source: ClassVar[str] = _TANGENTS
    phase: ClassVar[float] = math.pi / 2

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, few and many waves."""
        yield RuleSample("function", Call(torch.cos), ((2, 3),), low=-5.0, high=4.0)
        yield RuleSample("method", Call("cos"), ((2, 3),))
