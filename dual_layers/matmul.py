"""Matrix products and contractions of the input with constants."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers.arithmetic import reduce_to
from dual_layers.contract import INPUT, Call, Facts, RuleSample, Slot, slots
from dual_layers.families import Affine
from dual_layers.linear import Homogeneous
from dual_layers.refusals import named_arguments, unless_one_factor, unless_only
from dual_layers.registry import register
from dual_layers.sample_values import wave, waves

_ATEN = torch.ops.aten
_MULTILINEAR = "design, section 1: a product with constants is affine"


def _absolute(value: Any) -> Any:
    """Take the absolute value of every tensor in nested arguments; other options are not coefficients."""
    if isinstance(value, Tensor):
        return value.abs()
    if isinstance(value, (tuple, list)):
        return type(value)(_absolute(item) for item in value)
    return {key: _absolute(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _pull_left(nu: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Transpose ``left -> left @ right``; a vector is a matrix of one row (left) or one column (right)."""
    if left.dim() == 1:
        nu = nu.unsqueeze(-1 if right.dim() == 1 else -2)
    if right.dim() == 1:
        nu, right = nu.unsqueeze(-1), right.unsqueeze(-1)
    result = nu @ right.mT
    return reduce_to(result.squeeze(-2) if left.dim() == 1 else result, left.shape)


def _pull_right(nu: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Transpose ``right -> left @ right``."""
    if right.dim() == 1:
        nu = nu.unsqueeze(-1)
    if left.dim() == 1:
        nu, left = nu.unsqueeze(-2), left.unsqueeze(0)
    result = left.mT @ nu
    return reduce_to(result.squeeze(-1) if right.dim() == 1 else result, right.shape)


@register(
    operator.matmul, torch.matmul, torch.mm, torch.bmm, torch.mv, torch.dot, torch.vdot, torch.linalg.matmul,
    "matmul", "mm", "bmm", "mv", "dot", "vdot", "__matmul__", _ATEN.matmul.default, _ATEN.mm.default, _ATEN.bmm.default,
    _ATEN.mv.default, _ATEN.dot.default, _ATEN.linalg_matmul.default,
)  # fmt: skip
class DualMatmul(Homogeneous):
    """Matrix product with a constant on either side, vectors and broadcast batches included. Source: thesis, Corollary 3."""

    facts: ClassVar[Facts] = Facts(affine=True)
    source: ClassVar[str] = "thesis, Corollary 3"

    @staticmethod
    def parameters(left: Any, right: Any) -> dict[str, Any]:
        """Name the operands; the spellings disagree on keywords, so only positional ones are accepted."""
        return {"left": left, "right": right}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a product of perturbed values."""
        arguments = named_arguments(cls, call)
        return arguments if isinstance(arguments, str) else unless_one_factor(call)

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Multiply by the transposed constant and sum over broadcast batches."""
        left, right = self.arguments.left, self.arguments.right
        if isinstance(left, Slot):
            return (_pull_left(nu, inputs[0], right),)
        return (_pull_right(nu, left, inputs[0]),)

    def magnitude(self, *radii: Tensor) -> Tensor:
        """Multiply by the absolute constant."""
        return replace(self.call, args=_absolute(self.call.args))(*radii)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield both sides, vectors on either, and batches that broadcast in either direction."""
        yield RuleSample("operator, left", Call(operator.matmul, (INPUT, wave(3, 4))), ((2, 3),))
        yield RuleSample("operator, right", Call(operator.matmul, (wave(4, 3), INPUT)), ((2, 3, 5),))
        yield RuleSample("vector constant", Call(torch.matmul, (INPUT, wave(3))), ((2, 4, 3),))
        yield RuleSample("vector constant first", Call(torch.matmul, (wave(4), INPUT)), ((2, 4, 3),))
        yield RuleSample("input vector", Call("matmul", (INPUT, wave(2, 3, 4))), ((3,),), batch_axis=None)
        yield RuleSample("input vector last", Call(torch.matmul, (wave(2, 4, 3), INPUT)), ((3,),), batch_axis=None)
        yield RuleSample("two vectors", Call(torch.dot, (INPUT, wave(3))), ((3,),), batch_axis=None)
        yield RuleSample("constant widens", Call(torch.matmul, (INPUT, wave(5, 3, 4))), ((2, 1, 2, 3),))
        yield RuleSample("constant widens, right", Call(torch.matmul, (wave(3, 5, 4, 3), INPUT)), ((2, 1, 1, 3, 2),))
        yield RuleSample("mm", Call(torch.mm, (INPUT, wave(3, 4))), ((2, 3),))
        yield RuleSample("bmm", Call("bmm", (wave(2, 4, 3), INPUT)), ((2, 3, 2),), batch_axis=None)
        yield RuleSample("mv", Call(torch.mv, (INPUT, wave(3))), ((2, 3),))
        yield RuleSample("mv, input last", Call(_ATEN.mv.default, (wave(4, 3), INPUT)), ((3,),), batch_axis=None)
        attention = Call(torch.bmm, (INPUT, Slot(1)))
        yield RuleSample("two inputs", attention, ((2, 3, 4), (2, 4, 3)), error=ValueError, message="both depend on the input")
        wrong = Call(torch.mm, (INPUT, wave(3, 4)))
        yield RuleSample("wrong width", wrong, ((2, 4),), error=RuntimeError, message="cannot be multiplied")


@register(
    torch.addmm, torch.baddbmm, torch.addmv, "addmm", "baddbmm", "addmv",
    _ATEN.addmm.default, _ATEN.baddbmm.default, _ATEN.addmv.default,
)  # fmt: skip
class DualAddMatmul(Affine):
    """``beta * input + alpha * (left @ right)``; the addend, one factor, or both perturbed. Source: thesis, Corollary 3."""

    facts: ClassVar[Facts] = Facts(affine=True)
    source: ClassVar[str] = "thesis, Corollary 3"

    @staticmethod
    def parameters(input: Any, left: Any, right: Any, *, beta: Any = 1, alpha: Any = 1) -> dict[str, Any]:
        """Name the arguments of ``torch.addmm`` and its relatives."""
        return {"input": input, "left": left, "right": right, "beta": beta, "alpha": alpha}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse two perturbed factors, and one tensor as both addend and factor, whose coefficients would add up."""
        arguments = named_arguments(cls, call)
        if isinstance(arguments, str):
            return arguments
        factors = Call(call.operator, (arguments.left, arguments.right))
        reason = unless_one_factor(factors) if factors.arity else None
        if reason is None and set(slots(arguments.input)) & set(slots([arguments.left, arguments.right])):
            reason = "the same tensor is both addend and factor: write the sum and the product apart"
        return reason

    def linear(self, *tangents: Tensor) -> Tensor:
        """Drop the part that is constant."""
        return self._homogeneous()(*tangents)

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Send ``beta nu`` to the addend and the product's transpose to the factor."""
        arguments = self.arguments
        result: dict[int, Tensor] = {}
        if isinstance(arguments.input, Slot):
            index = arguments.input.index
            result[index] = reduce_to(arguments.beta * nu, inputs[index].shape)
        if isinstance(arguments.left, Slot):
            index = arguments.left.index
            result[index] = _pull_left(arguments.alpha * nu, inputs[index], arguments.right)
        if isinstance(arguments.right, Slot):
            index = arguments.right.index
            result[index] = _pull_right(arguments.alpha * nu, arguments.left, inputs[index])
        return tuple(result[index] for index in range(len(inputs)))

    def magnitude(self, *radii: Tensor) -> Tensor:
        """Take every coefficient's absolute value."""
        call = self._homogeneous()
        scalars = {name: abs(value) for name, value in call.kwargs.items()}
        return replace(call, args=_absolute(call.args), kwargs=scalars)(*radii)

    def _homogeneous(self) -> Call:
        """Return the call with its constant addend, or its constant product, set to zero."""
        arguments = self.arguments
        addend, left, right = arguments.input, arguments.left, arguments.right
        addend = addend if isinstance(addend, Slot) else torch.zeros_like(addend)
        if not isinstance(left, Slot) and not isinstance(right, Slot):
            left = torch.zeros_like(left)
        return replace(self.call, args=(addend, left, right), kwargs={"beta": arguments.beta, "alpha": arguments.alpha})

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every perturbed operand, alone and together, with both scalars."""
        bias, weight, scalars = wave(4, phase=1.0), wave(3, 4), {"beta": -0.5, "alpha": 2}
        yield RuleSample("left factor", Call(torch.addmm, (bias, INPUT, weight)), ((2, 3),))
        yield RuleSample("left factor, scalars", Call(torch.addmm, (bias, INPUT, weight), scalars), ((2, 3),))
        yield RuleSample("right factor", Call("addmm", (wave(5, 2), wave(5, 3), INPUT), scalars), ((3, 2),), batch_axis=None)
        yield RuleSample("addend", Call("addmm", (INPUT, wave(2, 3), weight), scalars), ((2, 4),), batch_axis=None)
        yield RuleSample("addend that is widened", Call(torch.addmm, (INPUT, wave(5, 3), weight)), ((1, 4),), batch_axis=None)
        both = Call(_ATEN.addmm.default, (INPUT, Slot(1), weight), scalars)
        yield RuleSample("addend and factor", both, ((2, 4), (2, 3)))
        batched = Call(torch.baddbmm, (wave(4, 2), wave(2, 4, 3), INPUT), scalars)
        yield RuleSample("baddbmm", batched, ((2, 3, 2),), batch_axis=None)
        yield RuleSample("addmv", Call(torch.addmv, (wave(1), INPUT, wave(3)), scalars), ((2, 3),))
        twice = Call(torch.addmm, (INPUT, INPUT, wave(3, 3)))
        yield RuleSample("addend and factor the same", twice, ((2, 3),), error=ValueError, message="both addend and factor")
        wrong = Call(torch.addmm, (bias, INPUT, weight))
        yield RuleSample("wrong width", wrong, ((2, 4),), error=RuntimeError, message="cannot be multiplied")


@register(
    torch.einsum, torch.tensordot, torch.inner, torch.outer, torch.linalg.vecdot, torch.kron, "inner", "outer", "kron",
    _ATEN.einsum.default, _ATEN.tensordot.default, _ATEN.inner.default, _ATEN.outer.default, _ATEN.linalg_vecdot.default,
    _ATEN.kron.default,
)  # fmt: skip
class DualContraction(Homogeneous):
    """Contraction of the input with constants: linear in it, and its coefficients are products of theirs.

    With a single constant ``magnitude`` is exact; constants contracted with each other make it an upper bound.
    Source: design, section 1.
    """

    facts: ClassVar[Facts] = Facts(affine=True, aliases=True)  # einsum of one operand can be a view
    source: ClassVar[str] = _MULTILINEAR

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a product of perturbed values."""
        return unless_one_factor(call)

    def magnitude(self, *radii: Tensor) -> Tensor:
        """Contract with absolute constants."""
        return replace(self.call, args=_absolute(self.call.args), kwargs=_absolute(self.call.kwargs))(*radii)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield einsum in each of its forms, and its relatives."""
        yield RuleSample("einsum", Call(torch.einsum, ("bij,kj->bki", INPUT, wave(4, 3))), ((2, 5, 3),))
        yield RuleSample("einsum, list", Call(torch.einsum, ("kj,bij->bik", [wave(4, 3), INPUT])), ((2, 5, 3),))
        yield RuleSample("einsum, indices", Call(torch.einsum, (INPUT, [0, 1], wave(4, 3), [2, 1], [0, 2])), ((2, 3),))
        yield RuleSample("einsum, ellipsis", Call(torch.einsum, ("b...i,ij->b...j", INPUT, wave(3, 2))), ((2, 2, 4, 3),))
        yield RuleSample("einsum, alone", Call(torch.einsum, ("bii->bi", INPUT)), ((2, 3, 3),))
        outer = Call(torch.einsum, ("bi,i,j->bij", INPUT, wave(3), wave(2)))
        yield RuleSample("einsum, two constants", outer, ((2, 3),))
        yield RuleSample("aten einsum", Call(_ATEN.einsum.default, ("bi,ij->bj", [INPUT, wave(3, 4)])), ((2, 3),))
        yield RuleSample("tensordot", Call(torch.tensordot, (INPUT, wave(4, 3, 2), ([1, 2], [1, 0]))), ((2, 3, 4),))
        yield RuleSample("inner", Call(torch.inner, (INPUT, wave(4, 3))), ((2, 3),))
        yield RuleSample("outer", Call(torch.outer, (INPUT, wave(3))), ((4,),))
        yield RuleSample("vecdot", Call(torch.linalg.vecdot, (wave(3, 1), INPUT), {"dim": 1}), ((2, 3, 4),))
        square = Call(torch.einsum, ("bi,bi->b", INPUT, INPUT))
        yield RuleSample("square", square, ((2, 3),), error=ValueError, message="both depend on the input")
        wrong = Call(torch.einsum, ("bi,ij->bj", INPUT, wave(3, 4)))
        yield RuleSample("wrong width", wrong, ((2, 4),), error=RuntimeError, message="does not broadcast")


@register(nn.Bilinear, F.bilinear, _ATEN.bilinear.default)
class DualBilinear(Affine):
    """Bilinear form with one constant argument; of two perturbed ones it is a product. Source: design, section 1."""

    facts: ClassVar[Facts] = Facts(affine=True)
    source: ClassVar[str] = _MULTILINEAR

    @staticmethod
    def parameters(input1: Any, input2: Any, weight: Any, bias: Any = None) -> dict[str, Any]:
        """Name the arguments of ``F.bilinear``."""
        return {"input1": input1, "input2": input2, "weight": weight, "bias": bias}

    @staticmethod
    def from_module(module: nn.Bilinear, input1: Any, input2: Any) -> dict[str, Any]:
        """Read the arguments off the module."""
        return {"input1": input1, "input2": input2, "weight": module.weight, "bias": module.bias}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse two perturbed arguments, and a perturbed weight or bias."""
        return unless_only(cls, call, "input1", "input2") or unless_one_factor(call)

    def _matrix(self) -> Tensor:
        """Contract weight and constant argument; the perturbed one meets the last axis of the result."""
        arguments = self.arguments
        if isinstance(arguments.input1, Slot):
            return torch.einsum("okj,...j->...ok", arguments.weight, arguments.input2)
        return torch.einsum("ojk,...j->...ok", arguments.weight, arguments.input1)

    def linear(self, *tangents: Tensor) -> Tensor:
        """Multiply each example by its matrix."""
        return torch.einsum("...ok,...k->...o", self._matrix(), tangents[0])

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Multiply each example by its transposed matrix."""
        return (torch.einsum("...ok,...o->...k", self._matrix(), nu),)

    def magnitude(self, *radii: Tensor) -> Tensor:
        """Multiply each example by its absolute matrix."""
        return torch.einsum("...ok,...k->...o", self._matrix().abs(), radii[0])

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield either argument perturbed."""
        module, constant = waves(nn.Bilinear, 3, 2, 4), wave(2, 2)
        yield RuleSample("first", Call(module, (INPUT, constant)), ((2, 3),), batch_axis=None)
        yield RuleSample("second", Call(module, (wave(2, 3), INPUT)), ((2, 2),), batch_axis=None)
        yield RuleSample("function", Call(F.bilinear, (INPUT, constant, wave(4, 3, 2))), ((2, 3),), batch_axis=None)
        both = Call(module, (INPUT, Slot(1)))
        yield RuleSample("two inputs", both, ((2, 3), (2, 2)), error=ValueError, message="both depend on the input")
        wrong = Call(module, (INPUT, constant))
        yield RuleSample("wrong width", wrong, ((2, 4),), error=RuntimeError, message="input1 size")
