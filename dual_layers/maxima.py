"""Maxima and minima over axes, and of two tensors that both depend on the input."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from dual_layers.contract import INPUT, Call, Facts, Interval, RuleSample, Slot, slots
from dual_layers.families import Composite
from dual_layers.largest import POSITIONS, largest_of
from dual_layers.piecewise import unless_two
from dual_layers.refusals import unless_only
from dual_layers.registry import register
from dual_layers.sample_values import wave
from dual_layers.spellings import spellings

_ATEN = torch.ops.aten
_BOTH = (INPUT, Slot(1))


class Monotone(Composite, ABC):
    """A composition that increases with all its inputs, whose interval the parts alone would miss. Abstract."""

    facts: ClassVar[Facts] = Facts(monotone=True)

    def interval(self, *boxes: Interval) -> Interval:
        """Take the ends: exact."""
        return Interval(self.forward(*(box.lower for box in boxes)), self.forward(*(box.upper for box in boxes)))


def _over(input: Any, dim: Any, keepdim: bool) -> Any:
    """Return the largest element over an axis, some, or all."""
    given = dim if isinstance(dim, (tuple, list)) else (dim,)
    axes = sorted(axis % input.ndim for axis in given) or list(range(input.ndim))
    columns = input.movedim(tuple(axes), tuple(range(-len(axes), 0)))
    result = largest_of(columns.flatten(-len(axes)))
    for axis in axes if keepdim else ():
        result = result.unsqueeze(axis)
    return result


@register(torch.amax, "amax", _ATEN.amax.default)
class DualAmax(Monotone):
    """Largest element over axes. Source: one maximum over the last axis."""

    @staticmethod
    def compose(input: Any, dim: Any = (), keepdim: bool = False) -> Any:
        """Bring the axes to the end."""
        return _over(input, dim, keepdim)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse whatever has no name here."""
        return unless_only(cls, call, "input")

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield one axis, several, negative ones, keepdim, and all axes."""
        yield from _axes(torch.amax, "amax", _ATEN.amax.default)


@register(torch.amin, "amin", _ATEN.amin.default)
class DualAmin(Monotone):
    """Smallest element over axes. Source: ``min z = -max -z``."""

    @staticmethod
    def compose(input: Any, dim: Any = (), keepdim: bool = False) -> Any:
        """Negate, take the largest, and negate."""
        return -_over(-input, dim, keepdim)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse whatever has no name here."""
        return unless_only(cls, call, "input")

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield one axis, several, negative ones, keepdim, and all axes."""
        yield from _axes(torch.amin, "amin", _ATEN.amin.default)


def _axes(function: Any, method: str, overload: Any) -> Iterator[RuleSample]:
    yield RuleSample("one axis", Call(function, (INPUT, 1)), ((2, 3, 4),))
    yield RuleSample("several axes", Call(method, (INPUT, (-1, 1))), ((2, 3, 4, 2),))
    yield RuleSample("keepdim", Call(method, (INPUT,), {"dim": -2, "keepdim": True}), ((2, 3, 4),))
    yield RuleSample("axes, keepdim", Call(function, (INPUT, [1, 3], True)), ((2, 3, 2, 2),))
    yield RuleSample("all", Call(function), ((1, 3, 2),), batch_axis=None)
    yield RuleSample("one element", Call(function, (INPUT, -1)), ((2, 3, 1),))
    yield RuleSample("aten", Call(overload, (INPUT, [2], True)), ((2, 3, 4),))
    yield RuleSample("no such axis", Call(function, (INPUT, 3)), ((2, 3),), error=IndexError, message="out of range")


class Along(Monotone, ABC):
    """An extreme along one axis, from an operator that gives the positions too. Abstract."""

    facts: ClassVar[Facts] = Facts(monotone=True, outputs_tuple=True)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse positions, and what is no extreme along one axis."""
        values = [*call.args, *call.kwargs.values()]
        if len(values) == 1:
            return "the extreme of all elements mixes the examples of a batch: name its axes"
        if not (isinstance(call.kwargs.get("dim"), int) or (len(call.args) > 1 and isinstance(call.args[1], int))):
            return "the axis must be an integer literal"
        return POSITIONS if call.item == 1 else unless_only(cls, call, "input")


@register(torch.max, "max", _ATEN.max.dim, case=True)
class DualMaxAlong(Along):
    """Largest element along an axis, of which the position is not bounded. Source: as DualAmax."""

    @staticmethod
    def compose(input: Any, dim: int, keepdim: bool = False) -> Any:
        """Give the values alone."""
        return (_over(input, dim, keepdim),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, and the positions."""
        yield from _along(torch.max, "max", _ATEN.max.dim)


@register(torch.min, "min", _ATEN.min.dim, case=True)
class DualMinAlong(Along):
    """Smallest element along an axis, of which the position is not bounded. Source: as DualAmin."""

    @staticmethod
    def compose(input: Any, dim: int, keepdim: bool = False) -> Any:
        """Give the values alone."""
        return (-_over(-input, dim, keepdim),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, and the positions."""
        yield from _along(torch.min, "min", _ATEN.min.dim)


def _along(function: Any, method: str, overload: Any) -> Iterator[RuleSample]:
    yield RuleSample("function", Call(function, (INPUT, 1), item=0), ((2, 3, 4),))
    yield RuleSample("method, keepdim", Call(method, (INPUT,), {"dim": -2, "keepdim": True}, item=0), ((2, 3, 4),))
    yield RuleSample("aten", Call(overload, (INPUT, -1, True), item=0), ((2, 3),))
    positions, wrong = Call(function, (INPUT, 1), item=1), "only the values have bounds"
    yield RuleSample("positions", positions, ((2, 3),), error=ValueError, message=wrong)
    yield RuleSample("all", Call(method), ((2, 3),), error=ValueError, message="name its axes")
    two = Call(function, (INPUT, wave(3)))
    yield RuleSample("two tensors", two, ((2, 3),), error=ValueError, message="must be an integer literal")


class OfTwo(Monotone, ABC):
    """An extreme of two tensors that both depend on the input. Abstract."""

    @staticmethod
    def parameters(*args: Any, **kwargs: Any) -> dict[str, Any]:
        """Name the two tensors, whatever the spelling calls them."""
        input, other = (*args, *kwargs.values())
        return {"input": input, "other": other}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse anything else, and a constant, which has a rule of its own."""
        text = unless_two(call)
        if text is None and not all(slots(value) for value in (*call.args, *call.kwargs.values())):
            return "one of both is constant"
        return text


@register(torch.max, "max", _ATEN.max.other, *spellings("maximum", "fmax", "clamp_min"), case=True)
class DualLargerOfTwo(OfTwo):
    """Larger of two tensors, whose difference decides. Source: ``max(x, y) = y + max(x - y, 0)``, thesis, Corollary 5."""

    @staticmethod
    def compose(input: Any, other: Any) -> Any:
        """Add what one exceeds the other by."""
        return other + torch.relu(input - other)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, tensors that broadcast either way, and one tensor twice."""
        yield from _pairs(torch.maximum, torch.max, "max", "clamp_min", "min")


@register(torch.min, "min", _ATEN.min.other, *spellings("minimum", "fmin", "clamp_max"), case=True)
class DualSmallerOfTwo(OfTwo):
    """Smaller of two tensors, whose difference decides. Source: ``min(x, y) = y - max(y - x, 0)``, thesis, Corollary 5."""

    @staticmethod
    def compose(input: Any, other: Any) -> Any:
        """Take away what one falls short of the other by."""
        return other - torch.relu(other - input)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, tensors that broadcast either way, and one tensor twice."""
        yield from _pairs(torch.minimum, torch.min, "min", "clamp_max", "max")


def _pairs(function: Any, reduction: Any, method: str, clamp: str, name: str) -> Iterator[RuleSample]:
    yield RuleSample("function", Call(function, _BOTH), ((2, 3), (2, 3)))
    yield RuleSample("broadcasting", Call(reduction, _BOTH), ((2, 1, 4), (2, 3, 1)))
    yield RuleSample("an input without the leading axes", Call(method, (INPUT,), {"other": Slot(1)}), ((2, 3, 4), (4,)))
    yield RuleSample("clamp by name", Call(clamp, (INPUT,), {name: Slot(1)}), ((2, 3), (2, 3)))
    yield RuleSample("the same input twice", Call(reduction, (INPUT, INPUT)), ((2, 3),))
    constant, axis = Call(function, (INPUT, wave(3))), Call(reduction, (INPUT, 1))
    yield RuleSample("a constant", constant, ((2, 3),), error=ValueError, message="one of both is constant")
    yield RuleSample("an axis", axis, ((2, 3),), error=ValueError, message="no comparison of two values")


@register(*spellings("clamp", "clip"), case=True)
class DualClampBetween(Monotone):
    """A tensor kept between bounds that depend on the input. Source: as the larger and the smaller of two."""

    @staticmethod
    def compose(input: Any, min: Any = None, max: Any = None) -> Any:
        """Apply one bound after the other; the upper one wins where they cross."""
        if min is not None:
            input = torch.maximum(input, min)
        return input if max is None else torch.minimum(input, max)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield either bound, both, constants among them, and bounds that cross."""
        yield RuleSample("both", Call(torch.clamp, (INPUT, Slot(1), Slot(2))), ((2, 3), (2, 3), (3,)))
        yield RuleSample("min alone", Call("clip", (INPUT,), {"min": Slot(1)}), ((2, 3, 2), (2, 1, 2)))
        yield RuleSample("max alone", Call(torch.clip, (INPUT, None, Slot(1))), ((2, 3), (2, 3)))
        yield RuleSample("constant below", Call("clamp", (INPUT, wave(3), Slot(1))), ((2, 3), (2, 3)))
        yield RuleSample("constant between", Call(_ATEN.clamp.Tensor, (wave(2, 3), INPUT, Slot(1))), ((2, 3), (2, 3)))
        wrong = "At least one of 'min' or 'max' must not be None"
        yield RuleSample("no bound", Call(torch.clamp), ((2, 3),), error=RuntimeError, message=wrong)
