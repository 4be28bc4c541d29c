"""Rectifiers: ReLU and its leaky relatives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from dual_layers.contract import INPUT, Call, Facts, RuleSample, Slot, slots
from dual_layers.families import PiecewiseLinear
from dual_layers.registry import register
from dual_layers.spellings import spellings

aten = torch.ops.aten


@register(nn.ReLU, *spellings("relu"))
class DualReLU(PiecewiseLinear):
    """Rectified linear unit, ``max(z, 0)``.

    Source: thesis, Corollary 5 (eq. 3.53), Theorem 1 (eq. 3.9); parallel slope ``u / (u - l)`` of eq. 3.18.

    Example:
        >>> from dual_layers import Interval
        >>> box = Interval(torch.tensor([-1.0]), torch.tensor([3.0]))
        >>> DualReLU(Call(torch.relu)).slopes((box,), "parallel").lower[0].item()
        0.75
    """

    facts: ClassVar[Facts] = Facts(monotone=True, convex=True, positionwise=True, exact_when_stable=True)
    source: ClassVar[str] = "thesis, Corollary 5"

    def breakpoints(self) -> tuple[float, ...]:
        """Return the kink at zero."""
        return (0.0,)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("module", Call(nn.ReLU()), ((2, 3),))
        yield RuleSample("function", Call(F.relu), ((2, 3),))
        yield RuleSample("method on an image", Call("relu"), ((2, 3, 4, 4),))
        yield RuleSample("aten", Call(aten.relu.default), ((3,),))


@register(nn.LeakyReLU, nn.PReLU, nn.RReLU, *spellings("leaky_relu", "prelu", "_prelu_kernel", "rrelu"))
class DualLeakyReLU(PiecewiseLinear):
    """Rectifiers with a slope of their own below zero: fixed (leaky), learned per channel (PReLU), random (RReLU).

        f(z) = z for z >= 0,  a z for z < 0

    The slope ``a`` may be anything: above 1 the function is concave, below 0 it is not monotone; so neither is declared.
    Source: the chords of ``PiecewiseLinear``; for ``a = 0`` they are those of the thesis, eq. 3.18.
    """

    source: ClassVar[str] = "thesis, Theorem 3 (eq. 3.42), on the chords of the graph"

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a perturbed slope, and the random slopes of RReLU in training mode."""
        named = [value for name, value in call.kwargs.items() if name not in ("input", "self")]
        if slots((call.args[1:], named)):
            return "the slope must not depend on the input"
        operator = call.operator
        training = isinstance(operator, nn.RReLU) and operator.training
        if operator in (F.rrelu, torch.rrelu, aten.rrelu.default):
            training = call.kwargs.get("training", call.args[3] if len(call.args) > 3 else False)
        return "RReLU in training mode draws random slopes; call model.eval() first" if training else None

    def breakpoints(self) -> tuple[float, ...]:
        """Return the kink at zero."""
        return (0.0,)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield slopes of every kind, one per channel among them, and RReLU in both modes."""
        yield RuleSample("nn.LeakyReLU", Call(nn.LeakyReLU()), ((2, 3),))
        yield RuleSample("function", Call(F.leaky_relu, (INPUT, 0.3)), ((2, 3),))
        yield RuleSample("slope above 1", Call(F.leaky_relu, (INPUT,), {"negative_slope": 1.7}), ((2, 3),))
        yield RuleSample("slope below 0", Call(aten.leaky_relu.default, (INPUT, -0.6)), ((2, 3),))
        yield RuleSample("nn.PReLU", Call(nn.PReLU()), ((2, 3),))
        channels = torch.tensor([0.2, -0.4, 1.5])
        yield RuleSample("one slope per channel", Call(F.prelu, (INPUT, channels)), ((2, 3, 2, 2),))
        yield RuleSample("method", Call("prelu", (INPUT, channels)), ((2, 3),))
        yield RuleSample("nn.RReLU", Call(nn.RReLU().eval()), ((2, 3),))
        yield RuleSample("rrelu", Call(F.rrelu, (INPUT, 0.1, 0.5)), ((2, 3),))
        wrong = "draws random slopes"
        yield RuleSample("random slopes", Call(nn.RReLU().train()), ((2, 3),), error=ValueError, message=wrong)
        call = Call(F.rrelu, (INPUT,), {"training": True})
        yield RuleSample("random slopes by keyword", call, ((2, 3),), error=ValueError, message=wrong)
        call, wrong = Call(F.prelu, (INPUT, Slot(1))), "the slope must not depend on the input"
        yield RuleSample("perturbed slope", call, ((2, 3), (3,)), error=ValueError, message=wrong)
        wrong = "Mismatch of parameter numbers and input channel size"
        call = Call(F.prelu, (INPUT, channels))
        yield RuleSample("wrong channels", call, ((2, 4),), error=RuntimeError, message=wrong)
