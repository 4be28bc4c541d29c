"""Dense linear maps."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers.contract import INPUT, Call, Facts, RuleSample
from dual_layers.families import Affine, root_of_squares
from dual_layers.refusals import unless_only
from dual_layers.registry import register
from dual_layers.sample_values import wave, waves


class Homogeneous(Affine, ABC):
    """An affine operator without constant part: ``f(z) = A z``."""

    def linear(self, *tangents: Tensor) -> Tensor:
        """Run the operator: there is nothing to subtract."""
        return self.call(*tangents)


@register(nn.Linear, F.linear, torch.ops.aten.linear.default)
class DualLinear(Affine):
    """Linear map ``z W^T + b`` of the last axis. Source: thesis, Corollary 3 (eq. 3.49)."""

    facts: ClassVar[Facts] = Facts(affine=True)
    source: ClassVar[str] = "thesis, Corollary 3"

    @staticmethod
    def parameters(input: Any, weight: Any, bias: Any = None) -> dict[str, Any]:
        """Name the arguments of ``F.linear``."""
        return {"input": input, "weight": weight, "bias": bias}

    @staticmethod
    def from_module(module: nn.Linear, input: Any) -> dict[str, Any]:
        """Read the arguments off the module."""
        return {"input": input, "weight": module.weight, "bias": module.bias}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a perturbed weight or bias."""
        return unless_only(cls, call, "input")

    def linear(self, *tangents: Tensor) -> Tensor:
        """Multiply by the weight."""
        return F.linear(tangents[0], self.arguments.weight)

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Multiply by the transposed weight; rows need no vmap."""
        weight = self.arguments.weight
        if weight.dim() == 1:  # F.linear with a vector drops the feature axis
            return (nu.unsqueeze(-1) * weight,)
        return (nu @ weight,)

    def magnitude(self, *radii: Tensor) -> Tensor:
        """Multiply by the absolute weight."""
        return F.linear(radii[0], self.arguments.weight.abs())

    def euclidean(self, *lengths: Tensor) -> Tensor:
        """Multiply squares by the squared weight."""
        return root_of_squares(F.linear(lengths[0].double().square(), self.arguments.weight.double().square()), lengths[0])

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, with and without bias, several leading axes, a vector, and a wrong width."""
        weight, bias = wave(4, 3), wave(4, phase=2.0)
        yield RuleSample("module", Call(waves(nn.Linear, 3, 4)), ((2, 3),))
        yield RuleSample("module, no bias, one output", Call(waves(nn.Linear, 5, 1, bias=False)), ((3, 5),))
        yield RuleSample("function, two leading axes", Call(F.linear, (INPUT, weight, bias)), ((2, 5, 3),))
        yield RuleSample("keywords", Call(F.linear, (INPUT,), {"weight": weight, "bias": bias}), ((2, 3),))
        yield RuleSample("no bias", Call(F.linear, (INPUT, weight)), ((2, 3),))
        yield RuleSample("weight vector", Call(F.linear, (INPUT, wave(3))), ((2, 5, 3),))
        yield RuleSample("aten", Call(torch.ops.aten.linear.default, (INPUT, weight, bias)), ((2, 3),))
        wrong = "mat1 and mat2 shapes cannot be multiplied|size mismatch|must match"
        yield RuleSample("wrong width", Call(F.linear, (INPUT, weight)), ((2, 5),), error=RuntimeError, message=wrong)
