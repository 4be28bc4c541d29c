"""Abstract rules: what all affine, all relaxed and all piecewise-linear operators have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor

from dual_layers.contract import Choice, DualLayer, Facts, Interval, Offsets, Slopes

Points = list[tuple[Tensor, Tensor]]


class Affine(DualLayer):
    """An operator ``f(z) = A z + b``, jointly in all its perturbed inputs. Its dual is exact.

        nu_out . f(z)  =  nu_in . z + nu_out . b,     nu_in = A^T nu_out        (thesis, Corollary 3, eq. 3.49)

    The transpose comes from the operator's own derivative, so no argument of the operator can be forgotten; a rule
    writes its own only where that is measurably faster.
    """

    facts: ClassVar[Facts] = Facts(affine=True)

    def linear(self, *tangents: Tensor) -> Tensor:
        """Apply ``A``, the operator without its constant part, to one tangent per input."""
        return self.call(*tangents) - self.call(*(torch.zeros_like(tangent) for tangent in tangents))

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Apply ``A^T`` to rows of ``nu``.

        Args:
            nu: ``[rows, *output shape]``.
            inputs: one tensor per perturbed input; only shape, dtype and device matter.

        Returns:
            One ``[rows, *input shape]`` tensor per perturbed input.
        """
        _, pull = torch.func.vjp(self.forward, *inputs)
        return torch.func.vmap(pull)(nu)

    def magnitude(self, *radii: Tensor) -> Tensor:
        """Apply ``|A|``, the operator with absolute coefficients and no constant part, to non-negative radii."""
        raise NotImplementedError(f"{type(self).__name__} is not monotone and must define magnitude()")

    def interval(self, *boxes: Interval) -> Interval:
        """Map centre and radius: exact for one affine map of independent coordinates."""
        if self.facts.monotone:
            return Interval(self.forward(*(box.lower for box in boxes)), self.forward(*(box.upper for box in boxes)))
        center = self.forward(*(box.center for box in boxes))
        radius = self.magnitude(*(box.radius for box in boxes))
        return Interval(center - radius, center + radius)


class Relaxed(DualLayer):
    """A nonlinear operator between two lines per perturbed input: a conjugate and a choice of slopes.

        slope_lo . z + lower  <=  f(z)  <=  slope_up . z + upper,     z in the box

    Any slopes are dual feasible, hence sound once ``conjugate`` has computed the offsets that belong to them
    (thesis, Theorem 3, eq. 3.42: chi* is bounded by conjugation over the box).
    """

    @abstractmethod
    def slopes(self, bounds: tuple[Interval, ...], choice: Choice) -> Slopes:
        """Choose slopes: ``parallel`` of smallest gap, or ``adaptive`` of smallest area for each side alone."""

    @abstractmethod
    def conjugate(self, slopes: Slopes, bounds: tuple[Interval, ...]) -> Offsets:
        """Return the best valid offsets for *any* slopes: the minimum and maximum of ``f(z) - slope . z``."""

    def undecided(self, bounds: tuple[Interval, ...]) -> Tensor:
        """Tell which elements tighter bounds could still help; elsewhere the relaxation is exact."""
        return torch.ones_like(bounds[0].lower, dtype=torch.bool)

    def pull(self, nu: Tensor, slopes: Slopes) -> tuple[Tensor, ...]:
        """Return ``nu_in = slope_lo * [nu]_+ - slope_up * [nu]_-`` for every perturbed input."""
        if slopes.parallel:
            return tuple(nu * slope for slope in slopes.lower)
        positive, negative = nu.clamp(min=0), nu.clamp(max=0)
        return tuple(lower * positive + upper * negative for lower, upper in zip(slopes.lower, slopes.upper, strict=True))


class PiecewiseLinear(Relaxed):
    """A piecewise-linear function, element by element; a rule states ``breakpoints`` (and ``jumps``), nothing more.

    Over a box, ``f(z) - a z`` takes its extremes at the ends and the breakpoints inside, at a jump over both one-sided
    limits. As functions of the slope ``a``, both the gap of two parallel lines and the height of one line above the
    box' midpoint (its area) are convex and piecewise linear with kinks at the slopes of chords between those points,
    so trying every chord finds the best slope exactly. For a convex or concave function the chord of the two ends has
    the smallest gap: the thesis' ``u / (u - l)`` for ReLU (eq. 3.18); hardtanh's corrected slope is another case.
    """

    facts: ClassVar[Facts] = Facts(positionwise=True, exact_when_stable=True)

    @abstractmethod
    def breakpoints(self) -> tuple[float | Tensor, ...]:
        """Where the slope changes; tensors broadcast against the input."""

    def jumps(self) -> tuple[tuple[float | Tensor, float | Tensor, float | Tensor], ...]:
        """Discontinuities as (position, limit from below, limit from above); none by default."""
        return ()

    def points(self, box: Interval) -> Points:
        """List the points of the graph between which the function is linear, clamped into the box."""
        places = [box.lower, box.upper]
        places += [_clamp(torch.as_tensor(b, dtype=box.lower.dtype, device=box.lower.device), box) for b in self.breakpoints()]
        points = [(z, self.forward(z)) for z in places]
        for position, below, above in self.jumps():
            at = torch.as_tensor(position, dtype=box.lower.dtype, device=box.lower.device)
            place = _clamp(at, box)
            value = self.forward(place)
            points.append((place, torch.where((box.lower < at) & (at <= box.upper), below, value)))
            points.append((place, torch.where((box.lower <= at) & (at < box.upper), above, value)))
        return points

    def interval(self, *boxes: Interval) -> Interval:
        """Take the extremes over the points: exact."""
        values = [value for _, value in self.points(boxes[0])]
        return Interval(_fold(torch.minimum, values), _fold(torch.maximum, values))

    def undecided(self, bounds: tuple[Interval, ...]) -> Tensor:
        """Tell which boxes hold a breakpoint in their interior or touch a jump."""
        box = bounds[0]
        result = torch.zeros_like(box.lower, dtype=torch.bool)
        for b in self.breakpoints():
            result = result | ((box.lower < b) & (box.upper > b))
        for position, _, _ in self.jumps():
            result = result | ((box.lower <= position) & (box.upper >= position))
        return result

    def slopes(self, bounds: tuple[Interval, ...], choice: Choice) -> Slopes:
        """Try the chords; for a convex function with parallel lines the chord of the ends is the best one."""
        points = self.points(bounds[0])
        if choice == "parallel":
            if self.facts.convex:
                both = (_chord(points[0], points[1]),)
            else:
                both = (_best_chord(points, lambda slope: _upper(points, slope) - _lower(points, slope)),)
            return Slopes(both, both)
        middle = bounds[0].center
        lower = _best_chord(points, lambda slope: -(_lower(points, slope) + _times(slope, middle)))
        upper = _best_chord(points, lambda slope: _upper(points, slope) + _times(slope, middle))
        return Slopes((lower,), (upper,))

    def conjugate(self, slopes: Slopes, bounds: tuple[Interval, ...]) -> Offsets:
        """Minimise and maximise ``f(z) - slope * z`` over the points."""
        points = self.points(bounds[0])
        return Offsets(_lower(points, slopes.lower[0]), _upper(points, slopes.upper[0]))


def _clamp(place: Tensor, box: Interval) -> Tensor:
    return torch.minimum(torch.maximum(place, box.lower), box.upper)


def _fold(function, values: list[Tensor]) -> Tensor:
    result = values[0]
    for value in values[1:]:
        result = function(result, value)
    return result


def _times(slope: Tensor, z: Tensor) -> Tensor:
    """Multiply, with ``0 * inf = 0``: a zero slope ignores an unbounded end."""
    return slope * torch.where((slope == 0) & z.isinf(), 0.0, z)


def _lower(points: Points, slope: Tensor) -> Tensor:
    return _fold(torch.minimum, [value - _times(slope, z) for z, value in points])


def _upper(points: Points, slope: Tensor) -> Tensor:
    return _fold(torch.maximum, [value - _times(slope, z) for z, value in points])


def _chord(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """Slope between two points; 0 where they coincide or a coordinate is infinite (any slope is sound)."""
    run, rise = right[0] - left[0], right[1] - left[1]
    usable = (run != 0) & run.isfinite() & rise.isfinite()
    return torch.where(usable, rise, 0.0) / torch.where(usable, run, 1.0)


def _chords(points: Points) -> Iterator[Tensor]:
    for left, right in combinations(points, 2):
        yield _chord(left, right)


def _best_chord(points: Points, cost) -> Tensor:
    best, lowest = None, None
    for slope in _chords(points):
        value = cost(slope)
        if best is None:
            best, lowest = slope, value
        else:
            better = value < lowest
            best, lowest = torch.where(better, slope, best), torch.where(better, value, lowest)
    return best
