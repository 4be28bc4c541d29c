"""Dense linear maps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers.contract import INPUT, Call, Facts, RuleSample, Slot
from dual_layers.families import Affine
from dual_layers.registry import register


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
        perturbed_input = isinstance(call.args[0] if call.args else call.kwargs.get("input"), Slot)
        return None if perturbed_input and call.arity == 1 else "weight and bias must not depend on the input"

    def linear(self, *tangents: Tensor) -> Tensor:
        """Multiply by the weight."""
        return F.linear(tangents[0], self.arguments.weight)

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Multiply by the transposed weight; rows need no vmap."""
        return (nu @ self.arguments.weight,)

    def magnitude(self, *radii: Tensor) -> Tensor:
        """Multiply by the absolute weight."""
        return F.linear(radii[0], self.arguments.weight.abs())

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, with and without bias, and a batch in the middle."""
        weight, bias = torch.linspace(-1, 1, 12).reshape(4, 3), torch.linspace(0, 2, 4)
        yield RuleSample("module", Call(nn.Linear(3, 4)), ((2, 3),))
        yield RuleSample("function, two leading axes", Call(F.linear, (INPUT, weight, bias)), ((2, 5, 3),))
        yield RuleSample("no bias", Call(F.linear, (INPUT, weight)), ((2, 3),))
        wrong = "mat1 and mat2 shapes cannot be multiplied|size mismatch|must match"
        yield RuleSample("wrong width", Call(F.linear, (INPUT, weight)), ((2, 5),), error=RuntimeError, message=wrong)
