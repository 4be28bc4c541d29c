"""Decisions: one value or another by a condition that depends on the input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dual_layers._recorded import recorded
from dual_layers.assignment import DualAssign
from dual_layers.checks import RuleRefusal
from dual_layers.contract import INPUT, Call, Choice, Interval, Offsets, RuleSample, Slopes, Slot, slots
from dual_layers.families import Composite, Relaxed
from dual_layers.indexing import DualMaskedFill, DualWhere
from dual_layers.largest import known, most, times
from dual_layers.refusals import named_arguments, unless_only
from dual_layers.registry import keys_of, register
from dual_layers.sample_values import wave
from dual_layers.shape import assign

_ATEN = torch.ops.aten
_TRUTH = Slot(0, truth=True)

Plane = tuple[Tensor, Tensor, Tensor]
"""Slopes in the condition, in the value where it holds and in the value elsewhere."""


@recorded
def pick(condition: Tensor, input: Any, other: Any, ahead: Tensor | None = None) -> Tensor:
    """Return one value where a condition is 1, another where it is 0.

    Args:
        condition: 0 or 1 everywhere.
        input: the value where it is 1: a number, or a tensor of the condition's shape.
        other: the value where it is 0, likewise.
        ahead: ``input - other``. It changes no value; its bounds help those of the result.

    Returns:
        The values, in their common dtype; of two numbers in the condition's.
    """
    return torch.where(condition > 0.5, input, other).to(_dtype(condition, input, other))


def _dtype(condition: Tensor, input: Any, other: Any) -> torch.dtype:
    numbers = not any(isinstance(value, Tensor) for value in (input, other))
    return condition.dtype if numbers else torch.result_type(input, other)


@register(pick)
class DualPick(Relaxed):
    """One value or another by a condition that is 0 or 1, given the box of their difference.

    There are two cases, in each of which the result is one of the values. So ``f - slopes . z`` is largest at the larger
    one of two affine functions' maxima: over the box of both values or, since ``input = other + ahead``, over the boxes of
    one of them and of the difference. Either way that is exact for any slopes.

    Source: conjugation over the box (thesis, Theorem 3, eq. 3.42), case by case.
    """

    source: ClassVar[str] = "thesis, Theorem 3 (eq. 3.42), case by case"

    @staticmethod
    def parameters(condition: Any, input: Any, other: Any, ahead: Any = None) -> dict[str, Any]:
        """Name the arguments of ``pick``."""
        return {"condition": condition, "input": input, "other": other, "ahead": ahead}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a constant condition, with which the choice is affine."""
        text = unless_only(cls, call, "condition", "input", "other", "ahead")
        return text or (None if slots(cls(call).arguments.condition) else "the condition is constant")

    def interval(self, *boxes: Interval) -> Interval:
        """Take one value's box where the condition is decided, and what encloses both elsewhere: exact."""
        cases = _Cases(self, boxes)
        a, b = cases.input, cases.other
        lower = torch.minimum(torch.where(cases.yes, a.lower, torch.inf), torch.where(cases.no, b.lower, torch.inf))
        upper = torch.maximum(torch.where(cases.yes, a.upper, -torch.inf), torch.where(cases.no, b.upper, -torch.inf))
        return Interval(lower, upper)

    def undecided(self, bounds: tuple[Interval, ...]) -> Tensor:
        """Tell where the condition may be either."""
        cases = _Cases(self, bounds)
        return cases.yes & cases.no

    def slopes(self, bounds: tuple[Interval, ...], choice: Choice) -> Slopes:
        """Try the facets of the hull; for parallel planes what lies halfway between two of them too."""
        cases = _Cases(self, bounds)
        if choice == "parallel":
            both = self._by_input(cases.best(cases.between(), lambda plane: cases.above(plane) - cases.below(plane)))
            return Slopes(both, both)
        lower = cases.best(cases.facets(-1), lambda plane: -cases.middle(plane) - cases.below(plane))
        upper = cases.best(cases.facets(1), lambda plane: cases.middle(plane) + cases.above(plane))
        return Slopes(self._by_input(lower), self._by_input(upper))

    def conjugate(self, slopes: Slopes, bounds: tuple[Interval, ...]) -> Offsets:
        """Maximise and minimise ``f - slopes . z``, case by case."""
        cases = _Cases(self, bounds)
        return Offsets(cases.below(self._plane(slopes.lower)), cases.above(self._plane(slopes.upper)))

    def pull(self, nu: Tensor, slopes: Slopes, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Give the condition and the values their shares."""
        return tuple(part.to(z.dtype) for part, z in zip(super().pull(nu, slopes, inputs), inputs, strict=False))

    def push(self, slopes: tuple[Tensor, ...], points: tuple[Tensor, ...]) -> Tensor:
        """Add up the shares; a slope of zero ignores what has no value."""
        return sum(times(slope, point.to(slope.dtype)) for slope, point in zip(slopes, points, strict=False))

    @property
    def places(self) -> tuple[int | None, int | None, int | None]:
        """Which perturbed inputs the condition and the values are; None for a constant or an input seen before."""
        given = self.arguments
        found = [value.index if isinstance(value, Slot) else None for value in (given.condition, given.input, given.other)]
        return tuple(None if place in found[:number] else place for number, place in enumerate(found))

    def _by_input(self, plane: Plane) -> tuple[Tensor, ...]:
        held = [(place, slope) for place, slope in zip(self.places, plane, strict=True) if place is not None]
        return tuple(slope for _, slope in sorted(held, key=lambda pair: pair[0]))

    def _plane(self, slopes: tuple[Tensor, ...]) -> Plane:
        order = sorted(place for place in self.places if place is not None)
        zero = torch.zeros_like(slopes[0])
        return tuple(zero if place is None else slopes[order.index(place)] for place in self.places)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield values that depend on the input, constants, numbers, the same value twice, and one that decides itself."""
        a, b, three = Slot(1), Slot(2), ((2, 3),) * 3
        yield RuleSample("two values", Call(pick, (_TRUTH, a, b)), three)
        yield RuleSample("constant", Call(pick, (_TRUTH, wave(2, 3), a)), three[:2], batch_axis=None)
        yield RuleSample("number", Call(pick, (_TRUTH, a, 0.1)), three[:2])
        yield RuleSample("constants", Call(pick, (_TRUTH, wave(3), wave(3, phase=1.0))), three[:1])
        yield RuleSample("the same value", Call(pick, (_TRUTH, a, a)), three[:2])
        yield RuleSample("the condition itself", Call(pick, (_TRUTH, _TRUTH, a)), three[:2])
        yield RuleSample(
            "constant condition", Call(pick, (wave(3), INPUT, 0.0)), ((2, 3),), error=ValueError, message="is constant"
        )


class _Cases:
    """What is known of the two cases: which there may be, the boxes of the values and that of their difference."""

    def __init__(self, layer: DualPick, bounds: tuple[Interval, ...]) -> None:
        given = layer.arguments
        condition = bounds[given.condition.index]
        self.yes, self.no = ~(condition.upper < 0.5), ~(condition.lower > 0.5)
        self.shape, self.moving = condition.lower.shape, [place is not None for place in layer.places]
        dtype = _dtype(*(_end(value, bounds) for value in (given.condition, given.input, given.other)))
        self.input, self.other = (self._box(value, bounds, dtype) for value in (given.input, given.other))
        a, b = self.input, self.other
        self.ahead = known(Interval(a.lower - b.upper, a.upper - b.lower))
        if isinstance(given.ahead, Slot):
            own = self._box(given.ahead, bounds, dtype)
            lower, upper = torch.maximum(own.lower, self.ahead.lower), torch.minimum(own.upper, self.ahead.upper)
            crossed = lower > upper
            self.ahead = Interval(torch.where(crossed, own.lower, lower), torch.where(crossed, own.upper, upper))

    def _box(self, value: Any, bounds: tuple[Interval, ...], dtype: torch.dtype) -> Interval:
        box = bounds[value.index] if isinstance(value, Slot) else None
        ends = (box.lower, box.upper) if box else (torch.as_tensor(value, dtype=dtype, device=self.yes.device),) * 2
        return known(Interval(*(end.to(dtype).expand(self.shape) for end in ends)))

    def above(self, plane: Plane) -> Tensor:
        """Return the largest ``f - slopes . z``."""
        return self._largest(plane, 1)

    def below(self, plane: Plane) -> Tensor:
        """Return the smallest ``f - slopes . z``."""
        return -self._largest(plane, -1)

    def _largest(self, plane: Plane, sign: int) -> Tensor:
        """Return the largest ``sign * (f - slopes . z)``: in each case over either box, in the worse case."""
        a, b, d = self.input, self.other, self.ahead
        c, s, t = (sign * slope for slope in plane)
        left = sign - s - t
        no = torch.fmin(most(-s, a) + most(sign - t, b), most(left, b) + most(-s, d))
        yes = torch.fmin(most(sign - s, a) + most(-t, b), most(left, a) + most(t, d)) - c
        worse = torch.maximum(torch.where(self.no, no, -torch.inf), torch.where(self.yes, yes, -torch.inf))
        return torch.where(worse.isnan(), torch.inf, worse)

    def middle(self, plane: Plane) -> Tensor:
        """Return the plane without its offset in the middle of the box."""
        c, s, t = plane
        return 0.5 * c + s * _finite(self.input).center + t * _finite(self.other).center

    def facets(self, sign: int) -> list[Plane]:
        """Return planes that touch the graph from above (1) or below (-1) along a face, for independent values."""
        a, b, d = map(_finite, (self.input, self.other, self.ahead))
        (a0, a1), (b0, b1), (d0, d1) = ((box.lower, box.upper)[::sign] for box in (a, b, d))
        zero, one = torch.zeros_like(d0), torch.ones_like(d0)
        return [(d0, one, zero), (d1, zero, one), (a1 - b1, zero, zero), (a0 - b0, one, one)]

    def between(self) -> list[Plane]:
        """Return slopes for which planes above and below are close."""
        a, b, d = (_finite(box).center for box in (self.input, self.other, self.ahead))
        zero, one = torch.zeros_like(d), torch.ones_like(d)
        return [(d, 0.5 * one, 0.5 * one), (a - b, zero, zero), (d, one, zero), (d, zero, one), (b - a, one, one)]

    def best(self, planes: list[Plane], cost: Callable[[Plane], Tensor]) -> Plane:
        """Return the plane of least cost, and where the condition is decided the value that it picks."""
        zero, settled = torch.zeros_like(planes[0][0]), self.yes ^ self.no
        best = self._held((zero, (settled & self.yes).to(zero.dtype), (settled & self.no).to(zero.dtype)))
        lowest = torch.where(settled, -torch.inf, self._cost(best, cost))
        for plane in map(self._held, planes):
            value = self._cost(plane, cost)
            better = value < lowest
            best = tuple(torch.where(better, new, old) for new, old in zip(plane, best, strict=True))
            lowest = torch.where(better, value, lowest)
        return best

    def _cost(self, plane: Plane, cost: Callable[[Plane], Tensor]) -> Tensor:
        with torch.no_grad():
            return cost(plane).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)

    def _held(self, plane: Plane) -> Plane:
        """Leave out the slopes of constants."""
        return tuple(slope if moving else torch.zeros_like(slope) for slope, moving in zip(plane, self.moving, strict=True))


def _end(value: Any, bounds: tuple[Interval, ...]) -> Any:
    return bounds[value.index].lower if isinstance(value, Slot) else value


def _finite(box: Interval) -> Interval:
    """Put zero in the place of unbounded ends: any slopes are sound."""
    return box.map(lambda end: torch.where(end.isinf(), 0.0, end))


class Decision(Composite, ABC):
    """An operator that chooses by a condition that depends on the input. Abstract."""

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse constant conditions, which have rules of their own."""
        arguments = named_arguments(cls, call)
        if isinstance(arguments, str):
            return arguments
        return None if slots(cls.condition(arguments)) else "the condition is constant"

    @staticmethod
    @abstractmethod
    def condition(arguments: SimpleNamespace) -> Any:
        """Return the condition."""


def _choose(condition: Any, input: Any, other: Any) -> Any:
    """Select, with everything in the result's shape; a difference of two tensors is bounded by itself."""
    tensors = [value for value in (condition, input, other) if hasattr(value, "shape")]
    if any(value.shape != condition.shape for value in tensors):
        whole = iter(torch.broadcast_tensors(*tensors))
        condition, input, other = (next(whole) if hasattr(v, "shape") else v for v in (condition, input, other))
    if len(tensors) == 1:
        condition = condition.to(torch.get_default_dtype())
    return pick(condition, input, other, input - other if len(tensors) == 3 else None)


@register(*(key for key in keys_of(DualWhere) if key != "where"), case=True)
class DualChoice(Decision):
    """One value or another by a condition that depends on the input. Source: two cases, each affine."""

    @staticmethod
    def condition(arguments: SimpleNamespace) -> Any:
        """Return the first argument."""
        return arguments.condition

    @staticmethod
    def compose(condition: Any, input: Any, other: Any) -> Any:
        """Choose."""
        return _choose(condition, input, other)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield values that depend on the input, constants and numbers, and a condition that widens them."""
        three = (_TRUTH, Slot(1), Slot(2))
        yield RuleSample("all", Call(torch.where, three), ((2, 3), (2, 3), (2, 3)))
        yield RuleSample("widened", Call(_ATEN.where.self, three), ((2, 3, 4), (2, 1, 4), (3, 1)))
        yield RuleSample("constant", Call(torch.where, (_TRUTH, wave(3), Slot(1))), ((2, 3), (2, 3)))
        yield RuleSample("number", Call(_ATEN.where.ScalarOther, (_TRUTH, Slot(1), 0.1)), ((2, 3), (2, 3)))
        yield RuleSample("numbers", Call(torch.where, (_TRUTH, 0.5, -1.5)), ((2, 3),))
        yield RuleSample("condition alone", Call(torch.where, (_TRUTH,)), ((2, 3),), error=ValueError, message="missing")
        constant = Call(torch.where, (torch.tensor([True, False, True]), INPUT, 0.0))
        yield RuleSample("constant condition", constant, ((2, 3),), error=ValueError, message="the condition is constant")


@register("where", case=True)
class DualChoiceMethod(Decision):
    """A tensor where a condition holds that depends on the input, another elsewhere. Source: as DualChoice."""

    @staticmethod
    def condition(arguments: SimpleNamespace) -> Any:
        """Return the second argument."""
        return arguments.condition

    @staticmethod
    def compose(input: Any, condition: Any, other: Any) -> Any:
        """Choose."""
        return _choose(condition, input, other)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield a number and another input."""
        yield RuleSample("number", Call("where", (INPUT, Slot(1, truth=True), -2.5)), ((2, 3), (2, 3)))
        yield RuleSample("two", Call("where", (INPUT, Slot(1, truth=True), Slot(2))), ((2, 3), (2, 3), (2, 1)))
        constant = Call("where", (INPUT, torch.tensor([True, False, True]), 0.0))
        yield RuleSample("constant condition", constant, ((2, 3),), error=ValueError, message="the condition is constant")


@register(*keys_of(DualMaskedFill), case=True)
class DualMaskedChoice(Decision):
    """A value where a mask holds that depends on the input, the tensor elsewhere. Source: as DualChoice."""

    @staticmethod
    def condition(arguments: SimpleNamespace) -> Any:
        """Return the mask."""
        return arguments.mask

    @staticmethod
    def compose(input: Any, mask: Any, value: Any) -> Any:
        """Choose, in the tensor's own dtype."""
        return _choose(mask, value.to(input.dtype) if hasattr(value, "dtype") else value, input)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield a number, another input, and a constant mask."""
        mask = Slot(1, truth=True)
        yield RuleSample("number", Call(torch.masked_fill, (INPUT, mask, 0.5)), ((2, 3), (2, 3)))
        yield RuleSample("widened", Call("masked_fill", (INPUT, mask, Slot(2))), ((2, 3), (2, 1), ()), batch_axis=None)
        yield RuleSample("constant tensor", Call("masked_fill", (wave(2, 3), _TRUTH, -1)), ((2, 3),))
        call, wrong = Call("masked_fill", (INPUT, torch.tensor([True, False, True]), 0.0)), "the condition is constant"
        yield RuleSample("constant mask", call, ((2, 3),), error=ValueError, message=wrong)


@register(*keys_of(DualAssign), case=True)
class DualMaskedAssign(Decision):
    """``base[mask] = value`` with one value and a mask that depends on the input. Source: as DualChoice."""

    @staticmethod
    def condition(arguments: SimpleNamespace) -> Any:
        """Return the mask."""
        return arguments.index

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse indices other than one mask."""
        text = super().refuse(call)
        if text is None and not isinstance(cls(call).arguments.index, Slot):
            return "of indices that depend on the input only a single mask is supported"
        return text

    @staticmethod
    def parameters(base: Any, index: Any, value: Any, accumulate: Any = False) -> dict[str, Any]:
        """Name the arguments; ``index_put`` has a list of indices."""
        alone = isinstance(index, (list, tuple)) and len(index) == 1
        if accumulate is not False:
            raise TypeError("parameters() takes no sums: accumulate is not supported")
        return {"base": base, "index": index[0] if alone else index, "value": value}

    @staticmethod
    def compose(base: Any, index: Any, value: Any) -> Any:
        """Choose, in the tensor's own dtype; the mask may lack the last axes."""
        if getattr(value, "ndim", 0):
            raise RuleRefusal("as many values as the mask selects: how many depends on the input")
        for _ in range(base.ndim - index.ndim):
            index = index.unsqueeze(-1)
        return _choose(index, value.to(base.dtype) if hasattr(value, "dtype") else value, base)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield a number, another input, a mask of rows, and too many values."""
        mask = Slot(1, truth=True)
        yield RuleSample("number", Call(assign, (INPUT, mask, 0.5)), ((2, 3), (2, 3)))
        yield RuleSample("another input", Call(assign, (INPUT, mask, Slot(2))), ((2, 3), (2, 3), ()), batch_axis=None)
        yield RuleSample("rows", Call(assign, (INPUT, mask, -1.5)), ((2, 3, 2), (2, 3)))
        put = torch.index_put
        yield RuleSample("index_put", Call(put, (INPUT, [mask], torch.tensor(0.5))), ((2, 3), (2, 3)))
        added = Call(put, (INPUT, (mask,), torch.tensor(0.5), True))
        yield RuleSample("added", added, ((2, 3), (2, 3)), error=ValueError, message="accumulate is not supported")
        many = Call(assign, (INPUT, mask, Slot(2)))
        yield RuleSample("many values", many, ((2, 3), (2, 3), (6,)), error=ValueError, message="how many depends")
        place = Call(assign, (INPUT, (mask, 1), 0.5))
        yield RuleSample("mask and place", place, ((2, 3), (2,)), error=ValueError, message="only a single mask")
