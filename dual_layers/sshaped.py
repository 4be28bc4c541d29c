"""S-shaped functions: convex on one side of their centre, concave on the other."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers.contract import INPUT, Call, Facts, Interval, RuleSample
from dual_layers.registry import register
from dual_layers.smooth import Piece, Smooth
from dual_layers.spellings import spellings

aten = torch.ops.aten
_TANGENTS = "thesis, Theorem 3 (eq. 3.42), on tangents"


class SShaped(Smooth):
    """Non-decreasing, convex below zero and concave above, with an even derivative. Abstract."""

    facts: ClassVar[Facts] = Facts(monotone=True, positionwise=True)

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the two sides of zero."""
        return Piece(-torch.inf, 0.0, True), Piece(0.0, torch.inf, False)

    @abstractmethod
    def distance(self, slope: Tensor) -> Tensor:
        """Return the ``z >= 0`` with ``f'(z) = slope``, for slopes between 0 and the steepest one."""

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return one point on each side."""
        steepest = self.derivative(torch.zeros_like(slope))
        distance = self.distance(torch.minimum(slope.clamp(min=0), steepest))
        return -distance, distance


@register(nn.Tanh, *spellings("tanh"))
class DualTanh(SShaped):
    """Hyperbolic tangent. Source: ``tanh' = 1 - tanh^2``; thesis, Theorem 3 (eq. 3.42), on tangents.

    Example:
        >>> box = Interval(torch.tensor([-1.0]), torch.tensor([3.0]))
        >>> slopes = DualTanh(Call(torch.tanh)).slopes((box,), "parallel")
        >>> bool(0 < slopes.lower[0] < 1)
        True
    """

    source: ClassVar[str] = _TANGENTS

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``1 / cosh(z)^2``, accurate in the tails."""
        decay = torch.exp(-2 * z.abs())
        return 4 * decay / (1 + decay) ** 2

    def distance(self, slope: Tensor) -> Tensor:
        """Return ``artanh(sqrt(1 - slope))``."""
        return torch.log((1 + (1 - slope).sqrt()) / slope.sqrt())

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("module", Call(nn.Tanh()), ((2, 3),))
        yield RuleSample("function on an image", Call(torch.tanh), ((2, 3, 4, 4),))
        yield RuleSample("near zero", Call("tanh"), ((3, 4),), low=-2.0, high=3.0)
        yield RuleSample("aten", Call(aten.tanh.default), ((3,),))


@register(nn.Sigmoid, torch.special.expit, *spellings("sigmoid"))
class DualSigmoid(SShaped):
    """Logistic function, ``1 / (1 + exp(-z))``. Source: ``f' = f (1 - f)``; thesis, Theorem 3 (eq. 3.42), on tangents."""

    source: ClassVar[str] = _TANGENTS

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``f (1 - f)``, accurate in the tails."""
        decay = torch.exp(-z.abs())
        return decay / (1 + decay) ** 2

    def distance(self, slope: Tensor) -> Tensor:
        """Solve ``f (1 - f) = slope`` for the odds of ``f``."""
        root = (1 - 4 * slope).clamp(min=0).sqrt()
        return 2 * torch.log((1 + root) / (2 * slope.sqrt()))

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("module", Call(nn.Sigmoid()), ((2, 3),))
        yield RuleSample("function", Call(torch.sigmoid), ((2, 3, 2, 2),), low=-5.0, high=6.0)
        yield RuleSample("method", Call("sigmoid"), ((3, 4),))
        yield RuleSample("aten", Call(aten.sigmoid.default), ((3,),))


@register(*spellings("erf"), torch.special.erf)
class DualErf(SShaped):
    """Error function. Source: ``erf' = 2 / sqrt(pi) exp(-z^2)``; thesis, Theorem 3 (eq. 3.42), on tangents."""

    source: ClassVar[str] = _TANGENTS

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``2 / sqrt(pi) exp(-z^2)``."""
        return 2 / math.sqrt(math.pi) * torch.exp(-z * z)

    def distance(self, slope: Tensor) -> Tensor:
        """Invert the Gaussian."""
        return (-torch.log(slope * (math.sqrt(math.pi) / 2))).clamp(min=0).sqrt()

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("function", Call(torch.erf), ((2, 3),), low=-3.0, high=3.0)
        yield RuleSample("method", Call("erf"), ((2, 3),))
        yield RuleSample("aten", Call(aten.erf.default), ((3,),))


@register(*spellings("atan", "arctan"))
class DualAtan(SShaped):
    """Arc tangent. Source: ``atan' = 1 / (1 + z^2)``; thesis, Theorem 3 (eq. 3.42), on tangents."""

    source: ClassVar[str] = _TANGENTS

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``1 / (1 + z^2)``."""
        return 1 / (1 + z * z)

    def distance(self, slope: Tensor) -> Tensor:
        """Return ``sqrt(1 / slope - 1)``."""
        return ((1 - slope) / slope).sqrt()

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("function", Call(torch.atan), ((2, 3),))
        yield RuleSample("method", Call("arctan"), ((2, 3),))
        yield RuleSample("aten", Call(aten.atan.default), ((3,),))


@register(nn.Softsign, *spellings("softsign"))
class DualSoftsign(SShaped):
    """Softsign, ``z / (1 + |z|)``. Source: ``f' = 1 / (1 + |z|)^2``; thesis, Theorem 3 (eq. 3.42), on tangents."""

    source: ClassVar[str] = _TANGENTS

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``1 / (1 + |z|)^2``."""
        return 1 / (1 + z.abs()) ** 2

    def distance(self, slope: Tensor) -> Tensor:
        """Return ``1 / sqrt(slope) - 1``."""
        return 1 / slope.sqrt() - 1

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("module", Call(nn.Softsign()), ((2, 3),))
        yield RuleSample("function", Call(F.softsign), ((2, 3),), low=-3.0, high=2.0)


@register(*spellings("asinh", "arcsinh"))
class DualAsinh(SShaped):
    """Inverse hyperbolic sine. Source: ``asinh' = 1 / sqrt(1 + z^2)``; thesis, Theorem 3 (eq. 3.42), on tangents."""

    source: ClassVar[str] = _TANGENTS

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``1 / sqrt(1 + z^2)``, also where the square overflows."""
        return 1 / torch.hypot(z, torch.ones_like(z))

    def distance(self, slope: Tensor) -> Tensor:
        """Return ``sqrt(1 / slope^2 - 1)``."""
        return ((1 - slope) * (1 + slope)).sqrt() / slope

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("function", Call(torch.asinh), ((2, 3),))
        yield RuleSample("method", Call("arcsinh"), ((3, 4),), low=-3.0, high=2.0)


@register(*spellings("erfc"), torch.special.erfc)
class DualErfc(Smooth):
    """Complementary error function, falling: concave below zero, convex above. Source: as the error function."""

    source: ClassVar[str] = _TANGENTS
    extent: ClassVar[tuple[float, float]] = (0.0, 2.0)

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``-2 / sqrt(pi) exp(-z^2)``."""
        return -2 / math.sqrt(math.pi) * torch.exp(-z * z)

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the two sides of zero."""
        return Piece(-torch.inf, 0.0, False), Piece(0.0, torch.inf, True)

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Invert the Gaussian on either side."""
        distance = (-torch.log(slope.clamp(max=0) * (-math.sqrt(math.pi) / 2))).clamp(min=0).sqrt()
        return -distance, distance

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("function", Call(torch.erfc), ((2, 3),), low=-3.0, high=3.0)
        yield RuleSample("method", Call("erfc"), ((2, 3),))


class Steepening(Smooth):
    """Non-decreasing, concave below a centre and convex above, with a derivative that is even about it. Abstract."""

    facts: ClassVar[Facts] = Facts(monotone=True, positionwise=True)
    center: ClassVar[float] = 0.0

    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """Return the two sides of the centre."""
        return Piece(-torch.inf, self.center, False), Piece(self.center, torch.inf, True)

    @abstractmethod
    def distance(self, slope: Tensor) -> Tensor:
        """Return how far from the centre the derivative is ``slope``, for slopes from the flattest one on."""

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return one point on each side."""
        flattest = self.derivative(torch.full_like(slope, self.center))
        distance = self.distance(torch.maximum(slope, flattest))
        return self.center - distance, self.center + distance


@register(nn.Tanhshrink, *spellings("tanhshrink"))
class DualTanhshrink(Steepening):
    """Tanhshrink, ``z - tanh(z)``: concave below zero, convex above. Source: ``f' = tanh^2``; thesis, eq. 3.42."""

    source: ClassVar[str] = _TANGENTS

    def derivative(self, z: Tensor) -> Tensor:
        """Return ``tanh(z)^2``."""
        return torch.tanh(z) ** 2

    def error(self, z: Tensor) -> Tensor:
        """Return the size of what is subtracted."""
        return z.abs().clamp(max=1.0)

    def distance(self, slope: Tensor) -> Tensor:
        """Return ``artanh(sqrt(slope))``."""
        return torch.atanh(slope.clamp(max=1).sqrt())

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("module", Call(nn.Tanhshrink()), ((2, 3),))
        yield RuleSample("function", Call(F.tanhshrink, (INPUT,)), ((2, 3),), low=-3.0, high=2.0)
