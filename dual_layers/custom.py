"""Element-wise functions of the user's own, without a rule written by hand.

A box is cut into cells. On each cell a function that is composed of operators with rules is followed from the input on,
every value known as ``slope * z + [lower, upper]``: the dual bound of a network whose input is one number. Where an
operator bends, the distance of its lines falls with the square of the cell's width. The lines over the whole box are the
best ones that lie beyond the lines of all cells:

    min over cells of (lower line of the cell - a z)   <=   f(z) - a z,        z in the box, for any slope a

A function that is no composition lies, on a cell, between the lines through either end that are as steep as its derivative
may be there.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor

from dual_layers._bands import Band, Line, NoRuleError, times
from dual_layers._recorded import recorded
from dual_layers.checks import check_not_widened
from dual_layers.contract import Call, Choice, Facts, Interval, Offsets, RuleSample, Slopes, fill
from dual_layers.families import Relaxed, known
from dual_layers.registry import register

Function = Callable[..., Any]
Given = TypeVar("Given", bound=Function)

CHUNK = 2**16
"""Numbers that are followed at a time: so few that they stay in fast memory."""

STEPS = 16
"""Cutting planes tried for a slope."""


@overload
def elementwise(
    function: Given,
    *,
    derivative: Function | None = None,
    derivative_bound: float | tuple[float, float] | None = None,
    domain: tuple[float, float] = (-torch.inf, torch.inf),
    cells: int = 48,
) -> Given: ...


@overload
def elementwise(
    *,
    derivative: Function | None = None,
    derivative_bound: float | tuple[float, float] | None = None,
    domain: tuple[float, float] = (-torch.inf, torch.inf),
    cells: int = 48,
) -> Callable[[Given], Given]: ...


def elementwise(
    function: Function | None = None,
    *,
    derivative: Function | None = None,
    derivative_bound: float | tuple[float, float] | None = None,
    domain: tuple[float, float] = (-torch.inf, torch.inf),
    cells: int = 48,
) -> Function:
    """Make an operator with a rule of its own out of an element-wise function.

    Its bounds are sound in exact arithmetic (``REAL``), jumps included, and differentiable in the box and in the parameters
    that the function uses. Where nothing is known they are infinite.

    Args:
        function: ``function(z, *constants)``, element by element. Unless something is said of its derivative, it is made of
            operators that have rules; ``torch.where`` may compare values.
        derivative: of any other function, which must be continuous: its derivative, a function of the same arguments that
            is made of operators with rules. It is taken as true; ``check_rule`` samples it.
        derivative_bound: instead, what the derivative's absolute value never exceeds, or its range as a pair. This alone
            leaves a gap that falls with the width of a cell, not with its square.
        domain: ends of the closed interval on which the function has a value.
        cells: how many parts a box is cut into. The work grows with it, and the bounds get tighter.

    Returns:
        The operator, to be called like the function, or a decorator that makes it. Symbolic tracing records it whole;
        ``torch.export``, through which models go that need an ``example_input``, sees the operators inside it instead.

    Raises:
        ValueError: both a derivative and a bound of it are given, or there are no cells.
    """
    if derivative is not None and derivative_bound is not None:
        raise ValueError("give either the derivative or a bound of it, not both")
    if cells < 1:
        raise ValueError(f"a box is cut into one cell or more, got {cells}")
    composed = derivative is None and derivative_bound is None
    family: type[Elementwise] = Composed if composed else Opaque

    def decorate(function: Function) -> Function:
        operator = recorded(function)
        name = getattr(function, "__name__", type(function).__name__)
        facts = {
            "__module__": getattr(function, "__module__", __name__),
            "__doc__": f"{name}, an element-wise function of the user's own. Source: lines on the cells of a box.",
            "operator": staticmethod(operator),
            "function": staticmethod(function),
            "domain": domain,
            "cells": cells,
        }
        if not composed:
            facts |= {"derivative": derivative and staticmethod(derivative), "rates": _range(derivative_bound)}
        register(operator)(type(f"Dual{name.title().replace('_', '')}", (family,), facts))
        return operator

    return decorate if function is None else decorate(function)


def _range(bound: float | tuple[float, float] | None) -> tuple[float, float] | None:
    return (-abs(bound), abs(bound)) if isinstance(bound, (int, float)) else bound


class Elementwise(Relaxed):
    """An element-wise function, bounded by lines on the cells of its box. Abstract; ``elementwise`` makes the rules."""

    facts: ClassVar[Facts] = Facts(positionwise=True)
    source: ClassVar[str] = "thesis, Theorem 3 (eq. 3.42), on the cells of a box"
    looseness: ClassVar[float | None] = None
    operator: ClassVar[Function]
    function: ClassVar[Function]
    domain: ClassVar[tuple[float, float]]
    cells: ClassVar[int]

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a call in which several values depend on the input."""
        return None if call.arity == 1 else "one of its arguments may depend on the input, the others must be constant"

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the function; a constant that widens its input would break the element-by-element account."""
        result = self.call(*inputs)
        check_not_widened(result, inputs[0])
        return result

    @abstractmethod
    def band(self, cell: Interval) -> Band:
        """Enclose the function between two lines on every cell, ``[cells, *shape]``."""

    def outside(self, *boxes: Interval) -> Tensor:
        """Tell which boxes leave the domain."""
        return (boxes[0].lower < self.domain[0]) | (boxes[0].upper > self.domain[1])

    def interval(self, *boxes: Interval) -> Interval:
        """Join what is known of the function on all cells."""
        band, outside = self._cut(boxes[0])
        lower, upper = band.box.lower.amin(0), band.box.upper.amax(0)
        return Interval(torch.where(outside, -torch.inf, lower), torch.where(outside, torch.inf, upper))

    def slopes(self, bounds: tuple[Interval, ...], choice: Choice) -> Slopes:
        """Choose by cutting planes on the lines of the cells; slope 0 where one of them is infinite."""
        band, _ = self._cut(bounds[0])
        (low, high), middle = _vertices(band), bounds[0].center
        if choice == "parallel":
            both = (_best_slope(high, low),)
            return Slopes(both, both)
        held = (middle[None], torch.zeros_like(middle)[None])
        return Slopes((_best_slope(held, low),), (_best_slope(high, held),))

    def conjugate(self, slopes: Slopes, bounds: tuple[Interval, ...]) -> Offsets:
        """Minimise and maximise ``line - slope * z`` over the ends of the lines of all cells."""
        band, outside = self._cut(bounds[0])
        (low, high), largest = _vertices(band), torch.finfo(band.dtype).max
        lower = _residual(low, slopes.lower[0], -torch.inf).amin(0).clamp(max=largest)
        upper = _residual(high, slopes.upper[0], torch.inf).amax(0).clamp(min=-largest)
        return Offsets(torch.where(outside, -torch.inf, lower), torch.where(outside, torch.inf, upper))

    def _cut(self, box: Interval) -> tuple[Band, Tensor]:
        """Bound the function on the cells of a box; where the box leaves the domain, on those of one inside it."""
        box = known(box)
        outside, (left, right) = self.outside(box), self.domain
        inside = min(max(0.0, left + 1), right - 1) if right - left > 2 else 0.5 * (left + right)
        lower, upper = (torch.where(outside, inside, end) for end in (box.lower, box.upper))
        edges, bounded = _edges(lower, upper, self.cells), lower.isfinite() & upper.isfinite()
        self._check_elementwise(edges)
        first, last = torch.where(bounded, edges[:-1], lower), torch.where(bounded, edges[1:], upper)
        ends = (torch.minimum(first, last), torch.maximum(first, last))
        parts = (end.split(max(1, CHUNK // max(lower.numel(), 1))) for end in ends)
        return Band.joined([self.band(Interval(*part)) for part in zip(*parts, strict=True)]), outside

    @torch.no_grad()
    def _check_elementwise(self, z: Tensor) -> None:
        """Check that the function is the same on cells as on one value, and that elements do not meet.

        Raises:
            ValueError: some element's value depends on where it stands, or on another one.
        """
        first, last, together = self.forward(z[0]), self.forward(z[-1]), self._forward_on(z)
        found, expected = [together[0], together[-1]], [first, last]
        for side in (0, 1):
            chosen = torch.arange(z[0].numel(), device=z.device).reshape(z[0].shape) % 2 == side
            found.append(self.forward(torch.where(chosen, z[0], z[-1])))
            expected.append(torch.where(chosen, first, last))
        values, wanted = torch.stack(found), torch.stack(expected)
        same = (values - wanted).abs() <= 64 * torch.finfo(values.dtype).eps * (1 + wanted.abs())
        if not bool((same | (values == wanted) | (values.isnan() & wanted.isnan())).all()):
            raise ValueError(f"{self.name} is not an element-wise function: a value depends on others or on its place")

    def _forward_on(self, z: Tensor) -> Tensor:
        """Run the function on ``[cells, *shape]``."""
        result = self.function(*fill(self.call.args, (z,)), **fill(dict(self.call.kwargs), (z,)))
        check_not_widened(result, z)
        return result

    @property
    def name(self) -> str:
        """The function's own name."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the function on numbers about zero, or on its domain, if it takes no constants."""
        try:
            needed = [p for p in inspect.signature(cls.function).parameters.values() if p.default is p.empty]
        except (TypeError, ValueError):  # a function of PyTorch's own
            needed = [None]
        if len(needed) == 1:
            low, high = max(cls.domain[0], -5.0), min(cls.domain[1], 5.0)
            low, high = low + 0.02 * (high - low), high - 0.02 * (high - low)  # a derivative may be infinite at the ends
            yield RuleSample("about zero", Call(cls.operator), ((2, 3),), low=low, high=high)
            yield RuleSample("on an image", Call(cls.operator), ((2, 3, 2, 2),), low=0.5 * (low + high), high=high)


class Composed(Elementwise):
    """A function made of operators with rules: each is bounded by its rule, from the input on. Abstract."""

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse what the family refuses, and a function that contains a call without a rule."""
        reason = super().refuse(call)
        if reason is not None:
            return reason
        one = torch.ones(1, 1)
        try:
            with torch.no_grad():
                cls.follow(call, Band.variable(Interval(one, one)))
        except NoRuleError as problem:
            return f"{problem}; give elementwise() the function's derivative or a bound of it"
        except Exception:  # constants are not known yet, or do not fit this one value
            return None
        return None

    @classmethod
    def follow(cls, call: Call, band: Band) -> Band:
        """Run the function on a band."""
        return band.as_band(cls.function(*fill(call.args, (band,)), **fill(dict(call.kwargs), (band,))))

    def continuous(self) -> bool:
        """Say no: it may compare its values."""
        return False

    def band(self, cell: Interval) -> Band:
        """Follow the function from the input on."""
        return self.follow(self.call, Band.variable(cell))


class Opaque(Elementwise):
    """A function of which only values and the derivative's range are known. Abstract.

        max(f(l) + p (z - l), f(u) - q (u - z))  <=  f(z)  <=  min(f(l) + q (z - l), f(u) - p (u - z)),     p <= f' <= q

    Relative to the chord both bends are deepest where the two lines meet.
    """

    derivative: ClassVar[Function | None]
    rates: ClassVar[tuple[float, float] | None]

    def band(self, cell: Interval) -> Band:
        """Enclose the function about its chord."""
        width = cell.upper - cell.lower
        left, right = self._forward_on(cell.lower), self._forward_on(cell.upper)
        usable = (width > 0) & width.isfinite()
        chord = torch.where(usable, right - left, 0.0) / torch.where(usable, width, 1.0)
        smallest, largest = self._rates(cell)
        falling, rising = (smallest - chord).clamp(max=0), (largest - chord).clamp(min=0)
        steep = rising - falling
        depth = torch.where(steep > 0, -falling * rising * width / torch.where(steep > 0, steep, 1.0), 0.0)
        at = torch.where(usable, chord * cell.lower, 0.0)
        lines = (Line(chord, left - at + side * depth) for side in (-1.0, 1.0))
        return Band.between(cell, *lines, left.abs() + at.abs() + depth)

    def _rates(self, cell: Interval) -> tuple[Tensor, Tensor]:
        if self.derivative is None:
            return torch.full_like(cell.lower, self.rates[0]), torch.full_like(cell.lower, self.rates[1])
        band = Band.variable(cell)
        found = band.as_band(self.derivative(*fill(self.call.args, (band,)), **fill(dict(self.call.kwargs), (band,))))
        return found.box.lower, found.box.upper


def _edges(lower: Tensor, upper: Tensor, cells: int) -> Tensor:
    """Cut boxes into equal parts, ``[cells + 1, *shape]``; the edge next to zero moves there, where many functions bend."""
    share = torch.linspace(0, 1, cells + 1, dtype=lower.dtype, device=lower.device).reshape(-1, *[1] * lower.ndim)
    edges = torch.minimum(torch.maximum(lower * (1 - share) + upper * share, lower), upper)
    if cells == 1:
        return edges
    nearest = (1 + edges[1:-1].detach().abs().nan_to_num().argmin(0)) * ((lower < 0) & (upper > 0))
    number = torch.arange(cells + 1, device=lower.device).reshape(share.shape)
    return torch.where((number == nearest) & (number > 0), 0.0, edges)


Vertices = tuple[Tensor, Tensor]


def _vertices(band: Band) -> tuple[Vertices, Vertices]:
    """List the ends of the lower and of the upper lines of all cells, as places and values ``[ends, *shape]``."""
    ends = (band.cell.lower, band.cell.upper)
    values = [torch.cat([times(line.slope, end) + line.offset for end in ends]) for line in band.lines]
    return (torch.cat(ends), values[0]), (torch.cat(ends), values[1])


def _residual(vertices: Vertices, slope: Tensor, worst: float) -> Tensor:
    """Return ``value - slope * z``; where both are infinite nothing better than ``worst`` is known."""
    places, values = vertices
    residual = values - times(slope, places)
    return torch.where(residual.isnan(), worst, residual)


def _best_slope(high: Vertices, low: Vertices) -> Tensor:
    """Return the slope of least ``max(high - a z) - min(low - a z)``, a convex function; 0 where a vertex is infinite.

    Two tangents of it, one falling and one rising, cross at the next slope. The choice of vertices has no derivative, the
    slope between those chosen has.
    """
    (above, top), (below, bottom) = high, low
    finite = torch.stack([part.isfinite().all(0) for part in (above, top, below, bottom)]).all(0)
    with torch.no_grad():
        falling, rising = (above.argmax(0), below.argmin(0)), (above.argmin(0), below.argmax(0))
        best, least = (falling, rising), torch.full_like(top[0], torch.inf)
        for _ in range(STEPS):
            slope = _crossing(high, low, falling, rising)
            highest, lowest = _residual(high, slope, torch.inf), _residual(low, slope, -torch.inf)
            touched = highest.argmax(0), lowest.argmin(0)
            gap = highest.amax(0) - lowest.amin(0)
            best = _pick(gap < least, (falling, rising), best)
            least = torch.minimum(least, gap)
            small = _at(below, touched[1]) < _at(above, touched[0])
            (falling,), (rising,) = _pick(small, (touched,), (falling,)), _pick(small, (rising,), (touched,))
    return torch.where(finite, _crossing(high, low, *best), 0.0)


Pair = tuple[Tensor, Tensor]


def _pick(condition: Tensor, these: tuple[Pair, ...], those: tuple[Pair, ...]) -> tuple[Pair, ...]:
    pairs = zip(these, those, strict=True)
    return tuple((torch.where(condition, a, c), torch.where(condition, b, d)) for (a, b), (c, d) in pairs)


def _crossing(high: Vertices, low: Vertices, falling: Pair, rising: Pair) -> Tensor:
    """Return the slope at which two tangents of the gap cross."""
    runs = [_at(high[0], i) - _at(low[0], j) for i, j in (falling, rising)]
    rises = [_at(high[1], i) - _at(low[1], j) for i, j in (falling, rising)]
    run, rise = runs[0] - runs[1], rises[0] - rises[1]
    usable = (run > 0) & run.isfinite() & (rise.detach() / run.detach()).isfinite()
    return torch.where(usable, rise, 0.0) / torch.where(usable, run, 1.0)


def _at(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(0, index[None])[0]
