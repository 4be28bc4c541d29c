"""Quotients whose divisor depends on the input."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch

from dual_layers.arithmetic import DualDivide
from dual_layers.bilinear import box_of
from dual_layers.contract import INPUT, Call, Interval, RuleSample, Slot
from dual_layers.families import Composite
from dual_layers.registry import keys_of, register
from dual_layers.sample_values import wave
from dual_layers.spellings import spellings

_BOTH = (INPUT, Slot(1))


@register(*keys_of(DualDivide), case=True)
class DualQuotient(Composite):
    """Quotient by a perturbed divisor: a product with its reciprocal. Infinite bounds where the divisor may be zero.

    Source: its definition; corners.
    """

    @staticmethod
    def compose(input: Any, other: Any, *, rounding_mode: Any = None) -> Any:
        """Multiply by the reciprocal."""
        inverse = torch.reciprocal(other)
        return inverse if isinstance(input, (int, float)) and input == 1 else input * inverse

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a constant divisor, and rounding."""
        reason = super().refuse(call)
        if reason is not None:
            return reason
        arguments = cls(call).arguments
        if arguments.rounding_mode is not None:
            return f"rounding_mode={arguments.rounding_mode!r} makes the quotient piecewise constant"
        return None if isinstance(arguments.other, Slot) else "a quotient by a constant is affine"

    def interval(self, *boxes: Interval) -> Interval:
        """Take the extremes over the corners: exact where the divisor keeps its sign."""
        over, under = (box_of(value, boxes) for value in (self.arguments.input, self.arguments.other))
        pole = ~((under.lower > 0) | (under.upper < 0))
        ends = [torch.where(pole, 1.0, end) for end in (under.lower, under.upper)]
        corners = [a / b for a in (over.lower, over.upper) for b in ends]
        lower, upper = reduce(torch.minimum, corners), reduce(torch.maximum, corners)
        unknown = pole | lower.isnan() | upper.isnan()
        return Interval(torch.where(unknown, -torch.inf, lower), torch.where(unknown, torch.inf, upper))

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield dividends of every kind, divisors of either sign, and what is another case."""
        positive, negative = {"low": 0.2, "high": 9.0}, {"low": -4.0, "high": -0.5}
        yield RuleSample("two inputs", Call(operator.truediv, _BOTH), ((2, 3), (2, 3)), **positive)
        yield RuleSample("broadcast both ways", Call("div", (Slot(1), INPUT)), ((2, 1, 4), (2, 3, 1)), **negative)
        yield RuleSample("inverse", Call(operator.truediv, (1, INPUT)), ((2, 3),), **negative)
        yield RuleSample("number", Call(torch.div, (-2.5, INPUT)), ((2, 3),), **positive)
        yield RuleSample("tensor", Call(torch.divide, (wave(2, 1), INPUT), {"rounding_mode": None}), ((2, 3),), **positive)
        yield RuleSample("by itself", Call(torch.div, (INPUT, INPUT)), ((2, 3),), **positive)
        yield RuleSample("poles", Call(torch.div, (wave(3), INPUT)), ((2, 3),), low=-0.5, high=1.0)
        rounded = Call(torch.div, _BOTH, {"rounding_mode": "floor"})
        yield RuleSample("rounded", rounded, ((2, 3), (2, 3)), error=ValueError, message="piecewise constant")
        constant = Call(torch.div, (INPUT, 2))
        yield RuleSample("constant divisor", constant, ((2, 3),), error=ValueError, message="by a constant is affine")


@register("__rtruediv__", "__rdiv__")
class DualReversedQuotient(Composite):
    """Quotient the other way round, ``other / input``. Source: its definition."""

    @staticmethod
    def compose(input: Any, other: Any) -> Any:
        """Swap the arguments."""
        return operator.truediv(other, input)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield a perturbed divisor, and a perturbed dividend."""
        yield RuleSample("divisor", Call("__rtruediv__", (INPUT, 3)), ((2, 3),), low=0.2)
        yield RuleSample("dividend", Call("__rdiv__", (wave(3), INPUT)), ((2, 3),))
        wrong = Call("__rtruediv__", (INPUT, wave(4)))
        yield RuleSample("shapes differ", wrong, ((2, 3),), error=RuntimeError, message="must match the size")


@register(*spellings("addcdiv"))
class DualAddQuotient(Composite):
    """``input + value * tensor1 / tensor2``, element by element. Source: its definition."""

    @staticmethod
    def compose(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
        """Divide and add."""
        return input + value * (tensor1 / tensor2)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield perturbed dividend and divisor, and the addend."""
        yield RuleSample("quotient", Call(torch.addcdiv, (wave(3), *_BOTH), {"value": -2}), ((2, 3), (2, 3)), low=0.2)
        yield RuleSample("method, addend", Call("addcdiv", (INPUT, wave(3), wave(2, 1))), ((2, 3),))
        wrong = Call(torch.addcdiv, (wave(4), *_BOTH))
        yield RuleSample("shapes differ", wrong, ((2, 3), (2, 3)), error=RuntimeError, message="must match the size")
