"""Operators with products of perturbed values inside: bilinear forms, fused sums, linear maps with perturbed weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dual_layers.bilinear import box_of
from dual_layers.contract import INPUT, Call, Interval, RuleSample, Slot
from dual_layers.families import Composite
from dual_layers.matmul import DualAddMatmul, DualBilinear
from dual_layers.registry import keys_of, register
from dual_layers.sample_values import wave, waves
from dual_layers.spellings import spellings

_ATEN = torch.ops.aten
_BOTH = (INPUT, Slot(1))


@register(*keys_of(DualBilinear), case=True)
class DualBilinearForm(Composite):
    """Bilinear form of two perturbed values, ``x W y + b``: one contraction. Source: its definition."""

    @staticmethod
    def compose(input1: Any, input2: Any, weight: Any, bias: Any = None) -> Any:
        """Contract both with the weight."""
        form = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
        return form if bias is None else form + bias

    @staticmethod
    def from_module(module: nn.Bilinear, input1: Any, input2: Any) -> dict[str, Any]:
        """Read the arguments off the module."""
        return DualBilinear.from_module(module, input1, input2)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the module, the function, and no bias."""
        shapes = (2, 3), (2, 2)
        yield RuleSample("module", Call(waves(nn.Bilinear, 3, 2, 4), _BOTH), shapes)
        yield RuleSample("module, no bias", Call(waves(nn.Bilinear, 3, 2, 4, bias=False), _BOTH), shapes)
        yield RuleSample("function", Call(F.bilinear, (*_BOTH, wave(4, 3, 2)), {"bias": wave(4)}), shapes)
        yield RuleSample("one tensor twice", Call(F.bilinear, (INPUT, INPUT, wave(4, 3, 3), wave(4))), ((2, 3),))
        wrong = Call(waves(nn.Bilinear, 3, 2, 4), _BOTH)
        yield RuleSample("wrong width", wrong, ((2, 4), (2, 2)), error=RuntimeError, message="input1 size")


@register(F.linear, _ATEN.linear.default, case=True)
class DualPerturbedLinear(Composite):
    """Linear map whose weight or bias depends on the input, as a hypernetwork makes it: a matrix product.

    Source: its definition.
    """

    @staticmethod
    def compose(input: Any, weight: Any, bias: Any = None) -> Any:
        """Multiply by the transposed weight."""
        result = torch.matmul(input, weight if weight.ndim == 1 else weight.transpose(0, 1))
        return result if bias is None else result + bias

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every argument perturbed, and a weight that is a vector."""
        everything = Call(F.linear, (INPUT, Slot(1), Slot(2)))
        yield RuleSample("input, weight and bias", everything, ((2, 3), (4, 3), (4,)))
        yield RuleSample("weight", Call(F.linear, (wave(5, 3), INPUT)), ((4, 3),), batch_axis=None)
        yield RuleSample("bias", Call(F.linear, (wave(5, 3), wave(4, 3), INPUT)), ((4,),), batch_axis=None)
        yield RuleSample("weight vector", Call(_ATEN.linear.default, _BOTH), ((2, 5, 3), (3,)))
        wrong = Call(F.linear, _BOTH)
        yield RuleSample("wrong width", wrong, ((2, 5), (4, 3)), error=RuntimeError, message="cannot be multiplied")


@register(*keys_of(DualAddMatmul), case=True)
class DualAddMatrixProduct(Composite):
    """``beta * input + alpha * (left @ right)`` with two perturbed factors, or with one tensor as addend and factor.

    Source: its definition.
    """

    @staticmethod
    def compose(input: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> Any:
        """Multiply and add."""
        return beta * input + alpha * torch.matmul(left, right)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the relatives, with both scalars, and addend and factor the same."""
        scalars = {"beta": -0.5, "alpha": 2}
        yield RuleSample("addmm", Call(torch.addmm, (wave(4), *_BOTH)), ((2, 3), (3, 4)))
        yield RuleSample("addmv", Call("addmv", (wave(2), *_BOTH), scalars), ((2, 3), (3,)))
        batched = Call(_ATEN.baddbmm.default, (Slot(2), *_BOTH), scalars)
        yield RuleSample("baddbmm", batched, ((2, 2, 3), (2, 3, 4), (2, 2, 4)))
        yield RuleSample("addend and factor the same", Call(torch.addmm, (INPUT, INPUT, wave(3, 3))), ((2, 3),))
        wrong = Call(torch.addmm, (wave(4), *_BOTH))
        yield RuleSample("wrong width", wrong, ((2, 5), (3, 4)), error=RuntimeError, message="cannot be multiplied")


@register(*spellings("addcmul"))
class DualAddProduct(Composite):
    """``input + value * tensor1 * tensor2``, element by element. Source: its definition."""

    @staticmethod
    def compose(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
        """Multiply and add."""
        return input + value * (tensor1 * tensor2)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield two perturbed factors, one, and the addend."""
        yield RuleSample("factors", Call(torch.addcmul, (wave(3), *_BOTH), {"value": -2}), ((2, 3), (2, 3)))
        yield RuleSample("method, one factor", Call("addcmul", (Slot(1), wave(3), INPUT)), ((2, 3), (2, 1)))
        wrong = Call(torch.addcmul, (wave(4), *_BOTH))
        yield RuleSample("shapes differ", wrong, ((2, 3), (2, 3)), error=RuntimeError, message="must match the size")


@register(*spellings("lerp"))
class DualInterpolation(Composite):
    """``input + weight * (end - input)``: between both where the weight is between zero and one. Source: its definition."""

    @staticmethod
    def compose(input: Any, end: Any, weight: Any) -> Any:
        """Multiply the difference and add."""
        return input + weight * (end - input)

    def interval(self, *boxes: Interval) -> Interval:
        """Stay between the ends' least and largest values."""
        given = self.arguments
        start, end, weight = (box_of(value, boxes) for value in (given.input, given.end, given.weight))
        between = (weight.lower >= 0) & (weight.upper <= 1)
        lower = torch.where(between, torch.minimum(start.lower, end.lower), -torch.inf)
        return Interval(lower, torch.where(between, torch.maximum(start.upper, end.upper), torch.inf))

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield a perturbed weight, between zero and one and not, and a number."""
        everything = Call(torch.lerp, (*_BOTH, Slot(2)))
        yield RuleSample("three inputs", everything, ((2, 3), (2, 3), (2, 3)), low=-1.0, high=2.0)
        yield RuleSample("weights of a gate", everything, ((2, 3), (2, 1), (2, 3)), low=0.0, high=1.0)
        yield RuleSample("number", Call("lerp", (*_BOTH, 0.3)), ((2, 3), (2, 3)))
        yield RuleSample("constant end", Call(torch.lerp, (INPUT, wave(3), Slot(1))), ((2, 3), (2, 3)), low=0.0, high=1.0)
        wrong = Call(torch.lerp, (*_BOTH, 0.5))
        yield RuleSample("shapes differ", wrong, ((2, 3), (2, 4)), error=RuntimeError, message="must match the size")


@register(torch.cross, torch.linalg.cross, "cross", _ATEN.linalg_cross.default)
class DualCross(Composite):
    """Cross product of vectors along an axis, the last one by default. Source: its definition."""

    @staticmethod
    def compose(input: Any, other: Any, dim: int = -1) -> Any:
        """Multiply the coordinates that follow each other, either way round."""
        forwards = input.roll(-1, dim) * other.roll(-2, dim)
        return forwards - input.roll(-2, dim) * other.roll(-1, dim)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse to guess the axis: it would be the first of size 3, and that may be the batch."""
        named = call.operator in (torch.linalg.cross, _ATEN.linalg_cross.default) or len(call.args) > 2 or "dim" in call.kwargs
        return super().refuse(call) or (None if named and cls(call).arguments.dim is not None else "name the axis: dim=-1")

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield axes, broadcasting and a constant."""
        yield RuleSample("two inputs", Call(torch.linalg.cross, _BOTH), ((2, 3), (2, 3)))
        yield RuleSample("axis", Call(torch.cross, (INPUT, wave(1, 3, 2), 1)), ((2, 3, 2),))
        yield RuleSample("method", Call("cross", (Slot(1), INPUT), {"dim": -2}), ((2, 3, 4), (2, 3, 1)))
        guessed = Call(torch.cross, _BOTH)
        yield RuleSample("no axis", guessed, ((2, 3), (2, 3)), error=ValueError, message="name the axis")
