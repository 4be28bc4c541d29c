"""Operators with products of perturbed values inside: bilinear forms, fused sums, linear maps with perturbed weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dual_layers.contract import INPUT, Call, RuleSample, Slot
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
