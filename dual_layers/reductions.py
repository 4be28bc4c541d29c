"""Sums and averages over axes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch

from dual_layers.contract import INPUT, Call, Facts, RuleSample
from dual_layers.linear import Homogeneous
from dual_layers.registry import register

_ATEN = torch.ops.aten


def _refuse_integers(call: Call) -> str | None:
    dtype = call.kwargs.get("dtype")
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        return f"dtype={dtype} truncates the input, which is not affine"
    return None


@register(torch.sum, "sum", _ATEN.sum.default, _ATEN.sum.dim_IntList, torch.mean, "mean", _ATEN.mean.default, _ATEN.mean.dim)
class DualSum(Homogeneous):
    """Sum or mean over some axes or all: equal, non-negative coefficients. Source: design, section 1."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True)
    source: ClassVar[str] = "design, section 1"

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse conversion to integers."""
        return _refuse_integers(call)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield one axis, several, negative ones, keepdim, all axes, and another dtype."""
        yield RuleSample("sum, one axis", Call(torch.sum, (INPUT, 1)), ((2, 3, 4),))
        yield RuleSample("sum, several axes", Call("sum", (INPUT, (-1, 1))), ((2, 3, 4, 2),))
        yield RuleSample("sum, keepdim", Call("sum", (INPUT,), {"dim": -2, "keepdim": True}), ((2, 3, 4),))
        yield RuleSample("sum, all", Call(torch.sum), ((1, 3, 4),), batch_axis=None)
        yield RuleSample("sum, dim=None", Call("sum", (INPUT,), {"dim": None}), ((1, 3),), batch_axis=None)
        yield RuleSample("sum in double", Call(torch.sum, (INPUT, 1), {"dtype": torch.float64}), ((2, 3),))
        yield RuleSample("mean, one axis", Call(torch.mean, (INPUT, -1)), ((2, 3, 4),))
        yield RuleSample("mean, axes, keepdim", Call("mean", (INPUT, [2, 3], True)), ((2, 3, 4, 2),))
        yield RuleSample("mean, all", Call("mean"), ((1, 3, 4),), batch_axis=None)
        yield RuleSample("aten sum", Call(_ATEN.sum.dim_IntList, (INPUT, [1], True)), ((2, 3, 4),))
        yield RuleSample("aten mean", Call(_ATEN.mean.dim, (INPUT, [-1, -2], True)), ((2, 3, 4, 2),))
        truncated = Call(torch.sum, (INPUT, 1), {"dtype": torch.int64})
        yield RuleSample("sum in integers", truncated, ((2, 3),), error=ValueError, message="truncates the input")
        yield RuleSample("no such axis", Call(torch.sum, (INPUT, 3)), ((2, 3),), error=IndexError, message="out of range")


@register(torch.cumsum, "cumsum", _ATEN.cumsum.default)
class DualCumulativeSum(Homogeneous):
    """Cumulative sum along an axis. Source: design, section 1."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True)
    source: ClassVar[str] = "design, section 1"

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse conversion to integers."""
        return _refuse_integers(call)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield both ends of the axes."""
        yield RuleSample("function", Call(torch.cumsum, (INPUT, 1)), ((2, 4, 3),))
        yield RuleSample("method, last axis", Call("cumsum", (INPUT,), {"dim": -1}), ((2, 4),))
        yield RuleSample("no such axis", Call("cumsum", (INPUT, 3)), ((2, 3),), error=IndexError, message="out of range")
