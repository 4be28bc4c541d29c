"""Piecewise-linear operators other than rectifiers: clamps, absolute value, maximum with a constant, thresholds."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers.contract import INPUT, Call, Facts, RuleSample, Slot, slots
from dual_layers.families import PiecewiseLinear
from dual_layers.refusals import unless_only
from dual_layers.registry import register
from dual_layers.spellings import spellings

aten = torch.ops.aten
_CHORDS = "thesis, Theorem 3 (eq. 3.42), on the chords of the graph"
_MONOTONE = Facts(monotone=True, positionwise=True, exact_when_stable=True)
_MONOTONE_CONVEX = Facts(monotone=True, convex=True, positionwise=True, exact_when_stable=True)


def unless_two(call: Call) -> str | None:
    """Refuse what is not a comparison of two values, for operators that also reduce over an axis."""
    values = [*call.args, *call.kwargs.values()]
    if len(values) != 2 or "dim" in call.kwargs or (isinstance(call.args[-1], int) and call.operator in _REDUCTIONS):
        return "it is no comparison of two values"
    return None


def _refuse_two(call: Call) -> str | None:
    """Refuse all but one perturbed tensor and one constant."""
    if sum(bool(slots(value)) for value in (*call.args, *call.kwargs.values())) > 1:
        return unless_two(call) or "both arguments depend on the input; one of them must be a constant"
    return unless_two(call)


_REDUCTIONS = (torch.max, torch.min, "max", "min")


def _constant(call: Call) -> Any:
    """Return the one argument that is not perturbed."""
    (constant,) = (value for value in (*call.args, *call.kwargs.values()) if not isinstance(value, Slot))
    return constant


@register(torch.max, "max", aten.max.other, *spellings("maximum", "fmax", "clamp_min"))
class DualMaximum(PiecewiseLinear):
    """The larger of a tensor and a constant. Source: thesis, Corollary 5 with the kink moved to the constant."""

    facts: ClassVar[Facts] = _MONOTONE_CONVEX
    source: ClassVar[str] = "thesis, Corollary 5"

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse the maximum over an axis, and of two perturbed tensors."""
        return _refuse_two(call)

    def breakpoints(self) -> tuple[float | Tensor, ...]:
        """Return the constant."""
        return (_constant(self.call),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the constant on either side, tensors and numbers, and what is another operator."""
        constant = torch.tensor([0.5, -1.0, 2.0])
        yield RuleSample("maximum", Call(torch.maximum, (INPUT, constant)), ((2, 3),))
        yield RuleSample("constant first", Call(torch.max, (constant, INPUT)), ((2, 3),))
        yield RuleSample("method", Call("max", (INPUT,), {"other": constant}), ((2, 3),))
        yield RuleSample("clamp_min", Call("clamp_min", (INPUT, 0.25)), ((2, 3),))
        yield RuleSample("clamp_min by keyword", Call(torch.clamp_min, (INPUT,), {"min": constant}), ((2, 3),))
        yield RuleSample("aten", Call(aten.maximum.default, (INPUT, constant)), ((2, 3),))
        yield from _bad_pairs(torch.max, "max")


@register(torch.min, "min", aten.min.other, *spellings("minimum", "fmin", "clamp_max"))
class DualMinimum(PiecewiseLinear):
    """The smaller of a tensor and a constant. Source: thesis, Corollary 5 turned upside down."""

    facts: ClassVar[Facts] = _MONOTONE
    source: ClassVar[str] = "thesis, Corollary 5"

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse the minimum over an axis, and of two perturbed tensors."""
        return _refuse_two(call)

    def breakpoints(self) -> tuple[float | Tensor, ...]:
        """Return the constant."""
        return (_constant(self.call),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the constant on either side, tensors and numbers, and what is another operator."""
        constant = torch.tensor([0.5, -1.0, 2.0])
        yield RuleSample("minimum", Call(torch.minimum, (INPUT, constant)), ((2, 3),))
        yield RuleSample("constant first", Call(torch.min, (constant, INPUT)), ((2, 3),))
        yield RuleSample("method", Call("clamp_max", (INPUT, 0.25)), ((2, 3),))
        yield RuleSample("aten", Call(aten.minimum.default, (INPUT, constant)), ((2, 3),))
        yield from _bad_pairs(torch.min, "min")


def _bad_pairs(function: Any, method: str) -> Iterator[RuleSample]:
    axis, two = "no comparison of two values", "both arguments depend on the input"
    yield RuleSample("over everything", Call(method), ((2, 3),), error=ValueError, message=axis)
    yield RuleSample("over an axis", Call(function, (INPUT, 1)), ((2, 3),), error=ValueError, message=axis)
    yield RuleSample("over a named axis", Call(method, (INPUT,), {"dim": 1}), ((2, 3),), error=ValueError, message=axis)
    yield RuleSample("two tensors", Call(function, (INPUT, Slot(1))), ((2, 3), (2, 3)), error=ValueError, message=two)
    call, wrong = Call(function, (INPUT, torch.ones(4, 3))), "widens its input"
    yield RuleSample("widened", call, ((1, 3),), error=ValueError, message=wrong)


class Parametrised(PiecewiseLinear):
    """An operator whose breakpoints are arguments; torch would quietly turn a perturbed one into a number. Abstract."""

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse perturbed parameters."""
        return unless_only(cls, call, "input")


@register(*spellings("clamp", "clip"))
class DualClamp(Parametrised):
    """A tensor kept between constants, either of which may be absent. Source: thesis, section 3.4 (hardtanh); errata 7."""

    facts: ClassVar[Facts] = _MONOTONE
    source: ClassVar[str] = _CHORDS

    @staticmethod
    def parameters(input: Any, min: Any = None, max: Any = None) -> dict[str, Any]:
        """Name the arguments of ``torch.clamp``."""
        return {"input": input, "min": min, "max": max}

    def breakpoints(self) -> tuple[float | Tensor, ...]:
        """Return the bounds that are there."""
        return tuple(bound for bound in (self.arguments.min, self.arguments.max) if bound is not None)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield both bounds, each alone, tensors, and bounds that cross."""
        low, high = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.5, 1.0, 5.0])
        yield RuleSample("both", Call(torch.clamp, (INPUT, -1.0, 2.0)), ((2, 3),))
        yield RuleSample("min alone", Call("clamp", (INPUT,), {"min": 0.5}), ((2, 3),))
        yield RuleSample("max alone", Call("clip", (INPUT,), {"max": 0.5}), ((2, 3),))
        yield RuleSample("None and max", Call(torch.clamp, (INPUT, None, 1)), ((2, 3),))
        yield RuleSample("tensors", Call(torch.clip, (INPUT, low, high)), ((2, 3),))
        yield RuleSample("crossed: the upper one wins", Call("clamp", (INPUT, 2.0, -1.0)), ((2, 3),))
        yield RuleSample("aten", Call(aten.clamp.default, (INPUT, 0)), ((2, 3),))
        wrong = "max must not depend on the input"
        call = Call(torch.clamp, (INPUT, 0.0, Slot(1)))
        yield RuleSample("perturbed bound", call, ((2, 3), (3,)), error=ValueError, message=wrong)
        wrong = "At least one of 'min' or 'max' must not be None"
        yield RuleSample("no bound", Call(torch.clamp), ((2, 3),), error=RuntimeError, message=wrong)


@register(nn.Hardtanh, *spellings("hardtanh"))
class DualHardtanh(Parametrised):
    """Hardtanh: the identity between two numbers, flat outside.

    Source: thesis, section 3.4 (eq. 3.61-3.63), whose printed slopes are wrong (errata 7); the best chord replaces them.
    """

    facts: ClassVar[Facts] = _MONOTONE
    source: ClassVar[str] = "thesis, eq. 3.61-3.63 as corrected"

    @staticmethod
    def parameters(input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> dict[str, Any]:
        """Name the arguments of ``F.hardtanh``."""
        return {"input": input, "min_val": min_val, "max_val": max_val}

    @staticmethod
    def from_module(module: nn.Hardtanh, input: Any) -> dict[str, Any]:
        """Read the arguments off the module."""
        return {"input": input, "min_val": module.min_val, "max_val": module.max_val}

    def breakpoints(self) -> tuple[float, ...]:
        """Return both ends of the identity."""
        return (self.arguments.min_val, self.arguments.max_val)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the usual range, another one, and ReLU6, which is one too."""
        yield RuleSample("module", Call(nn.Hardtanh()), ((2, 3),))
        yield RuleSample("own range", Call(nn.Hardtanh(-0.5, 2.0)), ((2, 3),))
        yield RuleSample("function", Call(F.hardtanh, (INPUT,), {"min_val": -2.0, "max_val": 0.5}), ((2, 3),))
        yield RuleSample("aten", Call(aten.hardtanh.default, (INPUT, 0, 6)), ((2, 3),))
        yield RuleSample("nn.ReLU6", Call(nn.ReLU6()), ((2, 3),))
        call, wrong = Call(F.hardtanh, (INPUT, Slot(1))), "min_val must not depend on the input"
        yield RuleSample("perturbed end", call, ((2, 3), ()), error=ValueError, message=wrong)


@register(*spellings("relu6"))
class DualReLU6(PiecewiseLinear):
    """ReLU cut off at 6; the module ``nn.ReLU6`` is a Hardtanh. Source: as Hardtanh."""

    facts: ClassVar[Facts] = _MONOTONE
    source: ClassVar[str] = _CHORDS

    def breakpoints(self) -> tuple[float, ...]:
        """Return both kinks."""
        return (0.0, 6.0)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("function", Call(F.relu6), ((2, 3),))
        yield RuleSample("aten", Call(aten.relu6.default), ((2, 3),))


@register(nn.Hardsigmoid, *spellings("hardsigmoid"))
class DualHardsigmoid(PiecewiseLinear):
    """Hardsigmoid: ``z / 6 + 1 / 2`` between -3 and 3, flat outside. Source: as Hardtanh."""

    facts: ClassVar[Facts] = _MONOTONE
    source: ClassVar[str] = _CHORDS

    def breakpoints(self) -> tuple[float, ...]:
        """Return both kinks."""
        return (-3.0, 3.0)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("module", Call(nn.Hardsigmoid()), ((2, 3),))
        yield RuleSample("function", Call(F.hardsigmoid), ((2, 3),))


@register(builtins.abs, operator.abs, "__abs__", *spellings("abs", "absolute"))
class DualAbs(PiecewiseLinear):
    """Absolute value. Source: ``|z| = 2 max(z, 0) - z`` and thesis, Corollary 5."""

    facts: ClassVar[Facts] = Facts(convex=True, positionwise=True, exact_when_stable=True)
    source: ClassVar[str] = "thesis, Corollary 5"

    def breakpoints(self) -> tuple[float, ...]:
        """Return the kink at zero."""
        return (0.0,)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("function", Call(torch.abs), ((2, 3),))
        yield RuleSample("builtin", Call(operator.abs), ((2, 3),))
        yield RuleSample("method", Call("abs"), ((3,),))


@register(nn.Threshold, *spellings("threshold"))
class DualThreshold(Parametrised):
    """``z`` above the threshold, a fixed value at it and below: it jumps unless both are equal.

    Over a box that holds the jump the offsets cover both one-sided limits. Source: thesis, Theorem 3 (eq. 3.42).
    """

    source: ClassVar[str] = _CHORDS

    @staticmethod
    def parameters(input: Any, threshold: float, value: float, inplace: bool = False) -> dict[str, Any]:
        """Name the arguments of ``F.threshold``."""
        return {"input": input, "threshold": threshold, "value": value}

    @staticmethod
    def from_module(module: nn.Threshold, input: Any) -> dict[str, Any]:
        """Read the arguments off the module."""
        return {"input": input, "threshold": module.threshold, "value": module.value}

    def breakpoints(self) -> tuple[float, ...]:
        """Return none: the only change of slope is at the jump."""
        return ()

    def jumps(self) -> tuple[tuple[float, float, float], ...]:
        """Return the step from the value to the threshold itself."""
        given = self.arguments
        return ((given.threshold, given.value, given.threshold),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield steps up, down, and none."""
        yield RuleSample("step up", Call(nn.Threshold(0.5, -2.0)), ((2, 3),))
        yield RuleSample("step down", Call(F.threshold, (INPUT, 0.1, 3.0)), ((2, 3),))
        yield RuleSample("no step", Call(torch.threshold, (INPUT, -1.0, -1.0)), ((2, 3),))
        yield RuleSample("aten", Call(aten.threshold.default, (INPUT, 0, 0)), ((2, 3),))
        call, wrong = Call(F.threshold, (INPUT, Slot(1), 0.0)), "threshold must not depend on the input"
        yield RuleSample("perturbed threshold", call, ((2, 3), ()), error=ValueError, message=wrong)


@register(nn.Softshrink, *spellings("softshrink"))
class DualSoftshrink(Parametrised):
    """Values moved towards zero by ``lambd``, and no further. Source: as Hardtanh."""

    facts: ClassVar[Facts] = _MONOTONE
    source: ClassVar[str] = _CHORDS

    @staticmethod
    def parameters(input: Any, lambd: float = 0.5) -> dict[str, Any]:
        """Name the arguments of ``F.softshrink``."""
        return {"input": input, "lambd": lambd}

    @staticmethod
    def from_module(module: nn.Softshrink, input: Any) -> dict[str, Any]:
        """Read the argument off the module."""
        return {"input": input, "lambd": module.lambd}

    def breakpoints(self) -> tuple[float, ...]:
        """Return both kinks."""
        return (-self.arguments.lambd, self.arguments.lambd)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("module", Call(nn.Softshrink()), ((2, 3),))
        yield RuleSample("function", Call(F.softshrink, (INPUT, 1.5)), ((2, 3),))
        wrong = "lambda must be"
        yield RuleSample("negative", Call(F.softshrink, (INPUT, -1.0)), ((2, 3),), error=RuntimeError, message=wrong)


@register(nn.Hardshrink, *spellings("hardshrink"))
class DualHardshrink(Parametrised):
    """Zero up to ``lambd`` in absolute value, ``z`` beyond: two jumps. Source: thesis, Theorem 3 (eq. 3.42)."""

    source: ClassVar[str] = _CHORDS

    @staticmethod
    def parameters(input: Any, lambd: float = 0.5) -> dict[str, Any]:
        """Name the arguments of ``F.hardshrink``."""
        return {"input": input, "lambd": lambd}

    @staticmethod
    def from_module(module: nn.Hardshrink, input: Any) -> dict[str, Any]:
        """Read the argument off the module."""
        return {"input": input, "lambd": module.lambd}

    def breakpoints(self) -> tuple[float, ...]:
        """Return none: the slope changes at the jumps only."""
        return ()

    def jumps(self) -> tuple[tuple[float, float, float], ...]:
        """Return both steps."""
        edge = self.arguments.lambd
        return ((-edge, -edge, 0.0), (edge, 0.0, edge))

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("module", Call(nn.Hardshrink()), ((2, 3),))
        yield RuleSample("function", Call(F.hardshrink, (INPUT, 1.5)), ((2, 3),))
        yield RuleSample("method", Call("hardshrink", (INPUT, 0.75)), ((2, 3),))
        call, wrong = Call(F.hardshrink, (INPUT,), {"lambd": Slot(1)}), "lambd must not depend on the input"
        yield RuleSample("perturbed width", call, ((2, 3), ()), error=ValueError, message=wrong)
