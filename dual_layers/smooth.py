"""Smooth element-wise functions: a rule states a derivative and where the function is convex or concave.

Over one convex piece ``f(z) - a z`` is smallest where ``f'(z) = a``, or at an end; over one concave piece it is largest
there. A rule gives such points in closed form or lets them be found from the derivative. How exact they are decides how
tight a bound is, never whether it is true: a convex function lies above its tangent at *any* point ``t``, so

    f(z) - a z  >=  f(t) - a t + (f'(t) - a) (z - t)        for all z of the piece,

whose right side is linear in ``z`` and smallest at an end of the piece.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dual_layers.contract import Choice, Facts, Interval, Offsets, Slopes
from dual_layers.families import Relaxed

ROUNDING = 4.0
"""Roundoffs that an operator's value, its derivative and a product may each be wrong by."""

STEPS = 7
"""Cutting planes tried for a slope; most functions need three."""

CELLS = 256
"""Cells of the table in which a point of given derivative is looked up where a rule has no closed form."""


@dataclass(frozen=True)
class Piece:
    """A part of the axis on which a function is convex, concave or straight.

    Attributes:
        lower: left end; numbers, or tensors like the box for a function whose pieces depend on where the box is.
        upper: right end.
        convex: whether the derivative is non-decreasing there, otherwise it is non-increasing; None where it is constant.
    """

    lower: float | Tensor
    upper: float | Tensor
    convex: bool | Tensor | None

    def bends(self, side: float) -> bool:
        """Whether the function may leave its chord below (``side`` 1: it is convex) or above (-1)."""
        return self.convex is not None and self.convex is not (side < 0)


class _Point(NamedTuple):
    """A point of the graph."""

    z: Tensor
    value: Tensor


class Smooth(Relaxed):
    """A function that is differentiable between the ends of finitely many convex or concave pieces.

    Source: conjugation over the box (thesis, Theorem 3, eq. 3.42); tangents for the margin. Slopes come from cutting
    planes: the gap of parallel lines, and the height of one line above the box' midpoint, are convex functions of the
    slope whose derivatives are differences of the points at which the lines touch.
    """

    facts: ClassVar[Facts] = Facts(positionwise=True)
    extent: ClassVar[tuple[float, float]] = (-torch.inf, torch.inf)
    tail: ClassVar[float] = 40.0
    inside: ClassVar[float] = 1.0
    """A place within the domain at which the function and its derivative are finite."""

    @abstractmethod
    def derivative(self, z: Tensor) -> Tensor:
        """Return ``f'(z)``; at a kink, that of the side which is not straight."""

    @abstractmethod
    def pieces(self, box: Interval) -> tuple[Piece, ...]:
        """List the pieces from left to right; all that may matter in this box."""

    def domain(self) -> tuple[float, float]:
        """Return the ends of the closed interval on which the function has a value."""
        return -torch.inf, torch.inf

    def poles(self) -> tuple[float, ...]:
        """List the places inside the domain at which the function has no value; none by default."""
        return ()

    def outside(self, *boxes: Interval) -> Tensor:
        """Tell which boxes leave the domain or hold a pole: nothing is said of the function there."""
        (box,), (left, right) = boxes, self.domain()
        outside = (box.lower < left) | (box.upper > right)
        for pole in self.poles():
            outside = outside | ((box.lower <= pole) & (box.upper >= pole))
        return outside

    def error(self, z: Tensor) -> Tensor | float:
        """Return how many roundoffs of 1 the operator's value may be wrong by, beyond some of its own size."""
        return 0.0

    def breakpoints(self) -> tuple[float, ...]:
        """List the kinks, which are ends of pieces; none by default."""
        return ()

    def rate_error(self, z: Tensor) -> Tensor | float:
        """Return how many roundoffs of 1 the derivative may be wrong by, beyond some of its own size."""
        return 0.0

    def jumps(self) -> tuple[tuple[float, float, float], ...]:
        """Discontinuities as (position, limit from below, limit from above), at ends of pieces; none by default."""
        return ()

    def continuous(self) -> bool:
        """Tell whether there are no jumps."""
        return not self.jumps()

    def turning(self, slope: Tensor, pieces: tuple[Piece, ...]) -> tuple[Tensor, ...]:
        """Return a point of each piece with ``f' = slope``, or one at or beyond the end that comes nearest to it.

        What is returned for a straight piece is not used.
        """
        return tuple(slope if piece.convex is None else _look_up(self.derivative, slope, piece, self.tail) for piece in pieces)

    def interval(self, *boxes: Interval) -> Interval:
        """Take the extremes: the ends of a monotone function, the conjugate for slope 0 of any other."""
        box, outside = self.within(boxes[0])
        if self.facts.monotone:
            lower, upper = self.forward(box.lower), self.forward(box.upper)
        else:
            flat = torch.zeros_like(box.lower)
            offsets = self._offsets(Slopes((flat,), (flat,)), box)
            lower, upper = offsets.lower.clamp(min=self.extent[0]), offsets.upper.clamp(max=self.extent[1])
        lower = lower.clamp(max=torch.finfo(lower.dtype).max)  # infinite is the value of an overflow, never of the function
        return Interval(torch.where(outside, -torch.inf, lower), torch.where(outside, torch.inf, upper))

    def slopes(self, bounds: tuple[Interval, ...], choice: Choice) -> Slopes:
        """Choose by cutting planes; slope 0 where an end is infinite or outside the domain."""
        box, outside = self.within(bounds[0])
        unbounded = outside | ~bounds[0].lower.isfinite() | ~bounds[0].upper.isfinite()
        search = _Search(self, box)
        if choice == "parallel":
            both = (_usable(search.parallel(), unbounded),)
            return Slopes(both, both)
        return Slopes((_usable(search.below(), unbounded),), (_usable(search.above(), unbounded),))

    def conjugate(self, slopes: Slopes, bounds: tuple[Interval, ...]) -> Offsets:
        """Bound ``f(z) - slope * z`` by its values at ends and kinks, and by tangents in between."""
        box, outside = self.within(bounds[0])
        offsets = self._offsets(slopes, box)
        below, above = (_leaves(side[0], bounds[0]) for side in (slopes.lower, slopes.upper))
        lower = offsets.lower.nan_to_num(nan=-torch.inf, posinf=torch.finfo(box.lower.dtype).max, neginf=-torch.inf)
        upper = offsets.upper.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.finfo(box.lower.dtype).max)
        return Offsets(torch.where(outside | below, -torch.inf, lower), torch.where(outside | above, torch.inf, upper))

    def within(self, box: Interval) -> tuple[Interval, Tensor]:
        """Return a box of finite numbers inside the domain, and where it had to be invented.

        The largest number stands for infinity; NaN is no bound at all.
        """
        largest = torch.finfo(box.lower.dtype).max
        lower = box.lower.nan_to_num(nan=-largest, posinf=largest, neginf=-largest)
        upper = box.upper.nan_to_num(nan=largest, posinf=largest, neginf=-largest)
        outside = self.outside(Interval(lower, upper))
        return Interval(torch.where(outside, self.inside, lower), torch.where(outside, self.inside, upper)), outside

    def points(self, box: Interval, pieces: tuple[Piece, ...]) -> list[_Point]:
        """List the points of the graph at the ends of the box and of the pieces, and the limits at jumps."""
        places = [box.lower, box.upper, *(_clamp(piece.upper, box.lower, box.upper) for piece in pieces[:-1])]
        points = [_Point(z, self.forward(z)) for z in places]
        for position, below, above in self.jumps():
            place, value = _clamp(position, box.lower, box.upper), points[0].value
            from_below, from_above = (box.lower < position) & (place == position), (box.upper > position) & (place == position)
            points.append(_Point(torch.where(from_below, place, box.lower), torch.where(from_below, below, value)))
            points.append(_Point(torch.where(from_above, place, box.lower), torch.where(from_above, above, value)))
        return points

    def _offsets(self, slopes: Slopes, box: Interval) -> Offsets:
        pieces, (lower,), (upper,) = self.pieces(box), slopes.lower, slopes.upper
        points = self.points(box, pieces)
        below = [self._residual(point, lower, 1.0) for point in points]
        above = [self._residual(point, upper, -1.0) for point in points]
        with torch.no_grad():
            turning = self.turning(lower, pieces)
            other = turning if upper is lower else self.turning(upper, pieces)
        for piece, first, second in zip(pieces, turning, other, strict=True):
            if piece.bends(1.0):
                value = self._tangent(piece, first, lower, box, 1.0)
                below.append(value if piece.convex is True else torch.where(piece.convex, value, torch.inf))
            if piece.bends(-1.0):
                value = self._tangent(piece, second, upper, box, -1.0)
                above.append(value if piece.convex is False else torch.where(piece.convex, -torch.inf, value))
        return Offsets(_fold(torch.minimum, below), _fold(torch.maximum, above))

    def _residual(self, point: _Point, slope: Tensor, side: float) -> Tensor:
        """Return ``f(z) - slope * z``, less (``side`` 1, from below) or more (-1) what rounding may have done to it.

        A value that overflowed is only known to exceed the largest number.
        """
        z, value = point
        largest = torch.finfo(value.dtype).max
        value = value.clamp(max=largest) if side > 0 else value.clamp(min=-largest)
        return value - slope * z - side * self._roundoff(_Point(z, value), slope)

    @torch.no_grad()
    def _roundoff(self, point: _Point, slope: Tensor) -> Tensor:
        z, value = point
        limits = torch.finfo(z.dtype)
        return ROUNDING * (limits.eps * (value.abs() + (slope * z).abs() + self.error(z)) + limits.tiny)  # tiny: underflow

    def _tangent(self, piece: Piece, place: Tensor, slope: Tensor, box: Interval, side: float) -> Tensor:
        """Bound ``f(z) - slope * z`` over a piece by the tangent at a place; the place itself has no derivative.

        The tangent is followed only as far as the nearest points at which the derivative is known to be on the other
        side of the slope: beyond them the function leaves the tangent in the right direction.
        """
        left, right = _clamp(piece.lower, box.lower, box.upper), _clamp(piece.upper, box.lower, box.upper)
        z = torch.minimum(torch.maximum(place, left), right)
        with torch.no_grad():
            roundoff = ROUNDING * torch.finfo(z.dtype).eps
            rate, reach = self.derivative(z).nan_to_num(), 1 + z.abs()
            near, far = torch.maximum(z - reach, left), torch.minimum(z + reach, right)
            near = torch.where(_beyond(self.derivative(near), slope, -side, roundoff), near, left)
            far = torch.where(_beyond(self.derivative(far), slope, side, roundoff), far, right)
            slack = roundoff * (rate.abs() + slope.abs() + self.rate_error(z))
            tilt = side * (rate - slope)
            fall = torch.maximum(_product(slack - tilt, far - z), _product(slack + tilt, z - near)).clamp(min=0)
        return self._residual(_Point(z, self.forward(z)), slope, side) - side * fall


_Touching = Callable[[Tensor, tuple[Tensor, ...]], _Point]


class _Search:
    """Looks for the best slope of one box; the search itself has no derivative, its result has.

    ``gap(a) = max(f - a z) - min(f - a z)`` is convex in ``a``, with derivative ``lowest - highest``: where the lower line
    touches less where the upper one does. Two tangents of ``gap``, one falling and one rising, cross at the next slope.
    A single line is the same with the other one's point held in the middle of the box.
    """

    def __init__(self, rule: Smooth, box: Interval) -> None:
        self.rule, self.given = rule, box
        self.box = Interval(box.lower.detach(), box.upper.detach())
        with torch.no_grad():
            self.pieces = rule.pieces(self.box)
            self.points = rule.points(self.box, self.pieces)
            self.middle = self._point(_clamp(self.box.center, self.box.lower, self.box.upper))

    def parallel(self) -> Tensor:
        """Return the slope of the smallest gap; over one piece that is the chord of the ends."""
        left, right = self.points[:2]
        single = torch.zeros_like(left.z, dtype=torch.bool)
        for piece in self.pieces:
            single = single | ((left.z >= piece.lower) & (right.z <= piece.upper))
        chord = self._cross((right, left), (left, right))
        slope = chord if single.all() else torch.where(single, chord, self._search(self.highest, self.lowest))
        return self._wide_enough(slope)

    def below(self) -> Tensor:
        """Return the slope of the lower line that is highest in the middle."""
        return self._single(self.lowest, self._search(self._held, self.lowest), 1.0)

    def above(self) -> Tensor:
        """Return the slope of the upper line that is lowest in the middle."""
        return self._single(self.highest, self._search(self.highest, self._held), -1.0)

    def highest(self, slope: Tensor, turning: tuple[Tensor, ...]) -> _Point:
        """Return where the upper line of a slope touches."""
        return self._touching(slope, turning, -1.0)

    def lowest(self, slope: Tensor, turning: tuple[Tensor, ...]) -> _Point:
        """Return where the lower line of a slope touches."""
        return self._touching(slope, turning, 1.0)

    def _held(self, slope: Tensor, turning: tuple[Tensor, ...]) -> _Point:
        return self.middle

    def _point(self, z: Tensor) -> _Point:
        return _Point(z, self.rule.forward(z))

    def _touching(self, slope: Tensor, turning: tuple[Tensor, ...], side: float) -> _Point:
        found = self.points[0]
        for candidate in self._candidates(turning, side):
            better = side * (candidate.value - found.value - slope * (candidate.z - found.z)) < 0
            found = _Point(torch.where(better, candidate.z, found.z), torch.where(better, candidate.value, found.value))
        return found

    def _candidates(self, turning: tuple[Tensor, ...], side: float) -> list[_Point]:
        found = list(self.points[1:])
        for piece, place in zip(self.pieces, turning, strict=True):
            if piece.bends(side):
                left, right = (_clamp(end, self.box.lower, self.box.upper) for end in (piece.lower, piece.upper))
                found.append(self._point(torch.minimum(torch.maximum(place, left), right)))
        return found

    def _search(self, upper: _Touching, lower: _Touching) -> Tensor:
        left, right = self.points[:2]
        with torch.no_grad():
            slope = torch.zeros_like(left.z)
            rising, falling = (left, right), (right, left)  # (highest, lowest) at a slope that is too large, too small
            if upper == self._held:
                rising, falling = (self.middle, right), (self.middle, left)
            if lower == self._held:
                rising, falling = (left, self.middle), (right, self.middle)
            for _ in range(STEPS):
                slope = self._cross(falling, rising)
                turning = self.rule.turning(slope, self.pieces)
                touched = upper(slope, turning), lower(slope, turning)
                small = touched[1].z < touched[0].z
                falling = _choose(small, touched, falling)
                rising = _choose(small, rising, touched)
        return self._cross(falling, rising)

    def _cross(self, falling: tuple[_Point, _Point], rising: tuple[_Point, _Point]) -> Tensor:
        """Return the slope at which two tangents of the gap cross; it depends on the ends among their points alone."""
        (a, b), (c, d) = (tuple(map(self._attached, pair)) for pair in (falling, rising))
        run = (a.z - b.z) - (c.z - d.z)
        rise = (a.value - b.value) - (c.value - d.value)
        usable = (run > 0) & run.isfinite() & rise.isfinite()
        return torch.where(usable, rise, 0.0) / torch.where(usable, run, 1.0)

    def _attached(self, point: _Point) -> _Point:
        """Let a point that is an end of the box move with it; to others the slope is insensitive, for they are tangent."""
        if not (torch.is_grad_enabled() and (self.given.lower.requires_grad or self.given.upper.requires_grad)):
            return point
        z = torch.where(point.z == self.box.lower, self.given.lower, point.z)
        z = torch.where(point.z == self.box.upper, self.given.upper, z)
        moved = self.rule.forward(z)
        return _Point(z, torch.where(moved.detach() == point.value, moved, point.value))

    def _single(self, touching: _Touching, slope: Tensor, side: float) -> Tensor:
        """Take the tangent in the middle of the box where that line bounds the function, and the slope found elsewhere."""
        tangent = self._middle_slope()
        with torch.no_grad():
            z, value = self.middle
            touched = touching(tangent, self.rule.turning(tangent, self.pieces))
            excess = side * (value - touched.value - tangent * (z - touched.z))
            size = value.abs() + touched.value.abs() + (tangent * z).abs() + (tangent * touched.z).abs()
            supports = excess <= ROUNDING * torch.finfo(z.dtype).eps * size
        return self._wide_enough(torch.where(supports, tangent, slope))

    def _middle_slope(self) -> Tensor:
        return self.rule.derivative(_clamp(self.given.center, self.given.lower, self.given.upper))

    def _wide_enough(self, slope: Tensor) -> Tensor:
        """Over a box so narrow that a chord is mostly rounding, take the derivative."""
        lower, upper = self.box.lower, self.box.upper
        narrow = upper - lower <= 1024 * torch.finfo(lower.dtype).eps * torch.maximum(lower.abs(), upper.abs())
        return torch.where(narrow, self._middle_slope(), slope)


def _clamp(place: Tensor | float, lower: Tensor, upper: Tensor) -> Tensor:
    if not isinstance(place, Tensor):
        place = torch.full_like(lower, place)
    return torch.minimum(torch.maximum(place, lower), upper)


def _fold(function: Callable[[Tensor, Tensor], Tensor], values: list[Tensor]) -> Tensor:
    result = values[0]
    for value in values[1:]:
        result = function(result, value)
    return result


def _choose(where: Tensor, these: tuple[_Point, _Point], those: tuple[_Point, _Point]) -> tuple[_Point, _Point]:
    first, second = (
        _Point(torch.where(where, this.z, that.z), torch.where(where, this.value, that.value))
        for this, that in zip(these, those, strict=True)
    )
    return first, second


def _product(rate: Tensor, distance: Tensor) -> Tensor:
    """Multiply, with ``inf * 0 = 0``."""
    return torch.where(distance == 0, 0.0, rate * distance)


def _beyond(rate: Tensor, slope: Tensor, side: float, roundoff: float) -> Tensor:
    """Whether a derivative is on this side of the slope for certain."""
    rate = rate.nan_to_num(0.0)
    return side * (rate - slope) > roundoff * (rate.abs() + slope.abs())


def _leaves(slope: Tensor, box: Interval) -> Tensor:
    """Whether a sloping line meets an unbounded box: nothing is said there."""
    return (slope != 0) & ~(box.lower.isfinite() & box.upper.isfinite())


def _usable(slope: Tensor, unbounded: Tensor) -> Tensor:
    return torch.where(unbounded | ~slope.isfinite(), 0.0, slope)


@torch.no_grad()
def _look_up(derivative: Callable[[Tensor], Tensor], slope: Tensor, piece: Piece, tail: float) -> Tensor:
    """Find a point of given derivative in a piece: a table, then secants between points on either side of it."""
    sign = 1.0 if piece.convex else -1.0
    share = torch.linspace(0, 1, CELLS + 1, dtype=slope.dtype, device=slope.device)
    left, right = max(piece.lower, -tail), min(piece.upper, tail)
    grid = left + (right - left) * share**2 * (3 - 2 * share)  # finer towards the ends, where the derivative is stationary
    rates, wanted = (sign * derivative(grid)).cummax(0).values, sign * slope.contiguous()
    cell = torch.searchsorted(rates, wanted).clamp(1, CELLS)
    other, place = grid[cell - 1], grid[cell]
    against, excess = rates[cell - 1] - wanted, rates[cell] - wanted
    for _ in range(4):
        run = excess - against
        last, before = place, excess
        place = place - excess * (place - other) / torch.where(run != 0, run, 1.0)
        excess = sign * derivative(place) - wanted
        crossed = excess * before <= 0
        kept = 1 - excess / torch.where(before != 0, before, 1.0)
        kept = torch.where(kept > 0, kept, 0.5)  # Anderson and Bjorck: an end that stays counts less, so that it moves too
        other, against = torch.where(crossed, last, other), torch.where(crossed, before, kept * against)
    place = torch.where(wanted > rates[-1], piece.upper, place)
    return torch.where(wanted < rates[0], piece.lower, place)
