"""Comparisons of values that depend on the input, and the logic of truth values.

To a dual network a truth value is a number, 0 or 1: comparisons become steps, and what takes truth values in PyTorch becomes
arithmetic that is right for these two numbers.
"""

from __future__ import annotations

import operator
from abc import ABC
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dual_layers._recorded import recorded
from dual_layers.contract import INPUT, Call, Interval, RuleSample, Slot
from dual_layers.families import Composite, PiecewiseLinear
from dual_layers.refusals import named_arguments, unless_only
from dual_layers.registry import register
from dual_layers.sample_values import wave
from dual_layers.spellings import spellings

_ATEN = torch.ops.aten
_TRUTH, _SECOND_TRUTH = Slot(0, truth=True), Slot(1, truth=True)
_NUMBERS = "it takes truth values, and a number that depends on the input is none: compare it with something first"


@recorded
def step(z: Tensor, closed: bool) -> Tensor:
    """Return 1 where ``z`` is positive, and with ``closed`` where it is zero; 0 elsewhere."""
    return (z >= 0 if closed else z > 0).to(z.dtype)


@register(step)
class DualStep(PiecewiseLinear):
    """A step from 0 to 1 at zero. Source: thesis, Theorem 3 (eq. 3.42), on both limits at the jump."""

    source: ClassVar[str] = "thesis, Theorem 3 (eq. 3.42)"

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse whatever has no name here."""
        return unless_only(cls, call, "z")

    @staticmethod
    def parameters(z: Any, closed: bool) -> dict[str, Any]:
        """Name the arguments of ``step``."""
        return {"z": z, "closed": closed}

    def breakpoints(self) -> tuple[float, ...]:
        """Return none: it is flat on either side."""
        return ()

    def jumps(self) -> tuple[tuple[float, float, float], ...]:
        """Return the step."""
        return ((0.0, 0.0, 1.0),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield both values at the jump."""
        yield RuleSample("open", Call(step, (INPUT, False)), ((2, 3),))
        yield RuleSample("closed", Call(step, (INPUT,), {"closed": True}), ((2, 3),))
        call, wrong = Call(step, (INPUT, Slot(1))), "closed must not depend on the input"
        yield RuleSample("perturbed choice", call, ((2, 3), ()), error=ValueError, message=wrong)


class Truth(Composite, ABC):
    """An operator whose values are truth values: 0 or 1. Abstract."""

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse what has no name here, and numbers in the place of truth values."""
        arguments = named_arguments(cls, call)
        if isinstance(arguments, str):
            return arguments
        return _NUMBERS if any(map(_is_number, cls.operands(arguments))) else None

    @staticmethod
    def operands(arguments: SimpleNamespace) -> tuple[Any, ...]:
        """Return the arguments that must be truth values."""
        return (arguments.input, getattr(arguments, "other", True))

    def interval(self, *boxes: Interval) -> Interval | None:
        """Stay within 0 and 1."""
        value = self.composed(*(box.lower for box in boxes))
        return Interval(torch.zeros_like(value), torch.ones_like(value))


def _is_number(value: Any) -> bool:
    """Whether an operand is known to be no truth value."""
    if isinstance(value, Tensor):
        return value.dtype != torch.bool
    return not (isinstance(value, bool) or getattr(value, "truth", False) in (None, True))


class Comparison(Truth, ABC):
    """A comparison of two numbers, by the sign of their difference. Abstract."""

    @staticmethod
    def operands(arguments: SimpleNamespace) -> tuple[Any, ...]:
        """Return none: numbers are compared."""
        return ()


def _difference(input: Any, other: Any) -> Any:
    if isinstance(other, (int, float)):  # a truth value too is a number here
        return input if other == 0 else input - float(other)
    dtype = torch.result_type(input, other)
    return input.to(dtype) - other.to(dtype)


@register(operator.gt, "__gt__", *spellings("gt", "greater"))
class DualGreater(Comparison):
    """Whether one number is greater than another. Source: a step of the difference."""

    @staticmethod
    def compose(input: Any, other: Any) -> Any:
        """Step up above zero."""
        return step(_difference(input, other), False)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield numbers, constants and other inputs."""
        yield from _comparisons(operator.gt, torch.greater, "gt", _ATEN.gt.Scalar)


@register(operator.ge, "__ge__", *spellings("ge", "greater_equal"))
class DualGreaterEqual(Comparison):
    """Whether one number is at least another. Source: a step of the difference."""

    @staticmethod
    def compose(input: Any, other: Any) -> Any:
        """Step up at zero."""
        return step(_difference(input, other), True)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield numbers, constants and other inputs."""
        yield from _comparisons(operator.ge, torch.greater_equal, "ge", _ATEN.ge.Scalar)


@register(operator.lt, "__lt__", *spellings("lt", "less"))
class DualLess(Comparison):
    """Whether one number is less than another. Source: a step of the difference."""

    @staticmethod
    def compose(input: Any, other: Any) -> Any:
        """Step down at zero."""
        return 1 - step(_difference(input, other), True)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield numbers, constants and other inputs."""
        yield from _comparisons(operator.lt, torch.less, "lt", _ATEN.lt.Scalar)


@register(operator.le, "__le__", *spellings("le", "less_equal"))
class DualLessEqual(Comparison):
    """Whether one number is at most another. Source: a step of the difference."""

    @staticmethod
    def compose(input: Any, other: Any) -> Any:
        """Step down above zero."""
        return 1 - step(_difference(input, other), False)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield numbers, constants and other inputs."""
        yield from _comparisons(operator.le, torch.less_equal, "le", _ATEN.le.Scalar)


@register(operator.eq, "__eq__", *spellings("eq"))
class DualEqual(Comparison):
    """Whether two numbers are equal: false wherever their bounds are apart. Source: the difference of two steps."""

    @staticmethod
    def compose(input: Any, other: Any) -> Any:
        """Step up at zero and down above it."""
        difference = _difference(input, other)
        return step(difference, True) - step(difference, False)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield numbers, constants and other inputs."""
        yield from _comparisons(operator.eq, torch.eq, "eq", _ATEN.eq.Scalar)


@register(operator.ne, "__ne__", *spellings("ne", "not_equal"))
class DualUnequal(Comparison):
    """Whether two numbers differ: true wherever their bounds are apart. Source: the difference of two steps."""

    @staticmethod
    def compose(input: Any, other: Any) -> Any:
        """Step down at zero and up above it."""
        difference = _difference(input, other)
        return 1 - step(difference, True) + step(difference, False)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield numbers, constants and other inputs."""
        yield from _comparisons(operator.ne, torch.not_equal, "ne", _ATEN.ne.Scalar)


def _comparisons(symbol: Any, function: Any, method: str, overload: Any) -> Iterator[RuleSample]:
    yield RuleSample("number", Call(symbol, (INPUT, 0.5)), ((2, 3),))
    yield RuleSample("zero", Call(overload, (INPUT, 0)), ((2, 3),))
    yield RuleSample("constant first", Call(function, (wave(3), INPUT)), ((2, 3),))
    yield RuleSample("two inputs", Call(method, (INPUT,), {"other": Slot(1)}), ((2, 1, 4), (2, 3, 1)))
    yield RuleSample("itself", Call(symbol, (INPUT, INPUT)), ((2, 3),))
    wrong = "must match the size"
    yield RuleSample("shapes differ", Call(symbol, (INPUT, wave(4))), ((2, 3),), error=RuntimeError, message=wrong)


@register(operator.invert, "__invert__", *spellings("logical_not", "bitwise_not"))
class DualNot(Truth):
    """Whether something is false. Source: one less it."""

    @staticmethod
    def compose(input: Any) -> Any:
        """Subtract from one."""
        return 1 - input

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, and a number."""
        yield RuleSample("operator", Call(operator.invert, (_TRUTH,)), ((2, 3),))
        yield RuleSample("function", Call(torch.logical_not, (_TRUTH,)), ((2, 3, 2),))
        number = Call(torch.logical_not, (Slot(0, truth=False),))
        yield RuleSample("number", number, ((2, 3),), error=ValueError, message="compare it with something first")


@register(operator.and_, "__and__", "__rand__", *spellings("logical_and", "bitwise_and"))
class DualAnd(Truth):
    """Whether both are true. Source: their product."""

    @staticmethod
    def compose(input: Any, other: Any) -> Any:
        """Multiply."""
        return input * other

    def interval(self, *boxes: Interval) -> Interval:
        """Take the ends: exact."""
        return _at_ends(self, boxes)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield constants, other inputs, and a number."""
        yield from _connectives(operator.and_, torch.logical_and, "logical_and")


@register(operator.or_, "__or__", "__ror__", *spellings("logical_or", "bitwise_or"))
class DualOr(Truth):
    """Whether one of both is true. Source: their sum less their product."""

    @staticmethod
    def compose(input: Any, other: Any) -> Any:
        """Add, and take the product away."""
        return input + other - input * other

    def interval(self, *boxes: Interval) -> Interval:
        """Take the ends: exact."""
        return _at_ends(self, boxes)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield constants, other inputs, and a number."""
        yield from _connectives(operator.or_, torch.logical_or, "logical_or")


@register(operator.xor, "__xor__", "__rxor__", *spellings("logical_xor", "bitwise_xor"))
class DualXor(Truth):
    """Whether exactly one of both is true. Source: their sum less twice their product."""

    @staticmethod
    def compose(input: Any, other: Any) -> Any:
        """Add, and take the product away twice."""
        return input + other - 2 * (input * other)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield constants, other inputs, and a number."""
        yield from _connectives(operator.xor, torch.logical_xor, "logical_xor")


def _at_ends(layer: Composite, boxes: tuple[Interval, ...]) -> Interval:
    kept = [box.map(lambda end: end.clamp(0, 1)) for box in boxes]
    return Interval(layer.composed(*(box.lower for box in kept)), layer.composed(*(box.upper for box in kept)))


def _connectives(symbol: Any, function: Any, method: str) -> Iterator[RuleSample]:
    mask = torch.tensor([True, False, True])
    yield RuleSample("two inputs", Call(symbol, (_TRUTH, _SECOND_TRUTH)), ((2, 1, 4), (2, 3, 1)))
    yield RuleSample("constant", Call(function, (_TRUTH, mask)), ((2, 3),))
    yield RuleSample("constant first", Call(symbol, (mask, _TRUTH)), ((2, 3),))
    yield RuleSample("literal", Call(symbol, (_TRUTH, True)), ((2, 3),))
    yield RuleSample("itself", Call(method, (_TRUTH, _TRUTH)), ((2, 3),))
    wrong = "compare it with something first"
    yield RuleSample(
        "number", Call(function, (_TRUTH, Slot(1, truth=False))), ((2, 3), (2, 3)), error=ValueError, message=wrong
    )
    yield RuleSample("constant number", Call(symbol, (_TRUTH, 1)), ((2, 3),), error=ValueError, message=wrong)


@register(*spellings("any"))
class DualAny(Truth):
    """Whether something is true along an axis. Source: the largest of numbers 0 and 1."""

    @staticmethod
    def compose(input: Any, dim: Any = (), keepdim: bool = False) -> Any:
        """Take the largest."""
        return torch.amax(input, () if dim is None else dim, keepdim)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield axes, and a number."""
        yield from _quantifiers(torch.any, "any")


@register(*spellings("all"))
class DualAll(Truth):
    """Whether everything is true along an axis. Source: the smallest of numbers 0 and 1."""

    @staticmethod
    def compose(input: Any, dim: Any = (), keepdim: bool = False) -> Any:
        """Take the smallest."""
        return torch.amin(input, () if dim is None else dim, keepdim)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield axes, and a number."""
        yield from _quantifiers(torch.all, "all")


def _quantifiers(function: Any, method: str) -> Iterator[RuleSample]:
    yield RuleSample("one axis", Call(function, (_TRUTH, 1)), ((2, 3, 4),))
    yield RuleSample("axes, keepdim", Call(method, (_TRUTH, (1, -1), True)), ((2, 3, 4),))
    yield RuleSample("all axes", Call(function, (_TRUTH,)), ((1, 3),), batch_axis=None)
    number, wrong = Call(method, (Slot(0, truth=False), 1)), "compare it with something first"
    yield RuleSample("number", number, ((2, 3),), error=ValueError, message=wrong)


@register("bool")
class DualBool(Truth):
    """Truth values as they are; numbers would have to be compared. Source: the identity."""

    @staticmethod
    def compose(input: Any) -> Any:
        """Hand on."""
        return input

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield truth values, and a number."""
        yield RuleSample("method", Call("bool", (_TRUTH,)), ((2, 3),))
        number, wrong = Call("bool", (Slot(0, truth=False),)), "compare it with something first"
        yield RuleSample("number", number, ((2, 3),), error=ValueError, message=wrong)
