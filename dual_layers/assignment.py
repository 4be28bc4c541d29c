"""Parts of a tensor replaced or added to: the pure forms of ``base[index] = value`` and its relatives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from dual_layers.contract import INPUT, Call, Facts, RuleSample, Slot, slots
from dual_layers.registry import register
from dual_layers.shape import Merge, assign, example, perturbed_elsewhere
from dual_layers.spellings import spellings

aten = torch.ops.aten
_NAMES = ("input", "self", "src", "source", "value", "values", "tensor2")


class Overwrite(Merge):
    """Elements at constant places replaced by values; base, values or both are perturbed. Abstract."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True)
    places: ClassVar[tuple[int, ...]] = (0, 2)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse perturbed places, and the forms that multiply, subtract or take extremes."""
        if "reduce" in call.kwargs:
            return "only replacing has a dual, not reduce="
        if call.kwargs.get("alpha", 1) != 1:
            return "only alpha=1 is supported; scale the values first"
        return perturbed_elsewhere(call, cls.places, _NAMES)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the operator, after checking that the result is one affine function of base and values."""
        result = self.call(*inputs)
        _check_dtype(result)
        if slots((self.call.args[1:], self.call.kwargs)) and _lists_places(self.call.args[1:]) and self._writes_twice(inputs):
            raise ValueError("an index names one place twice: which of the two values stays is undefined")
        return result

    def _writes_twice(self, inputs: tuple[Tensor, ...]) -> bool:
        """Whether the derivative counts more values than reach the result."""
        constant = self.call(*(torch.zeros_like(item) for item in inputs)).detach()
        with torch.enable_grad():
            ones = [torch.ones_like(item).requires_grad_() for item in inputs]
            reached = self.call(*ones)
            counted = sum(part.long().sum() for part in torch.autograd.grad(reached.sum(), ones))
        return bool(counted != (reached.detach() - constant).round().long().sum())


def _lists_places(value: Any) -> bool:
    """Whether an index lists places one by one; slices and numbers name no place twice."""
    return isinstance(value, (Tensor, list)) or (isinstance(value, tuple) and any(map(_lists_places, value)))


def _check_dtype(result: Tensor) -> None:
    if not result.is_floating_point():
        raise TypeError(f"values that depend on the input are stored in a tensor of {result.dtype}; make it floating point")


@register(assign, *spellings("index_put"))
class DualAssign(Overwrite):
    """The tensor after ``base[index] = value``. Source: thesis, Corollary 3."""

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every combination of perturbed arguments, all kinds of index, and one that names a place twice."""
        column, places = (slice(None), 0), (slice(None), torch.tensor([2, 0]))
        yield RuleSample("constant value", Call(assign, (INPUT, column, 0.5)), ((2, 3),))
        yield RuleSample("constant base", Call(assign, (torch.ones(2, 3), column, INPUT)), ((2,),), batch_axis=None)
        yield RuleSample("both", Call(assign, (INPUT, places, Slot(1))), ((2, 3), (2, 2)))
        yield RuleSample("widened value", Call(assign, (INPUT, (..., slice(1, None)), Slot(1))), ((2, 3), (2, 1)))
        yield RuleSample("itself", Call(assign, (INPUT, ..., INPUT)), ((2, 3),))
        yield RuleSample("truth values", Call(assign, (INPUT, (slice(None), torch.tensor([True, False])), 1.0)), ((2, 2),))
        yield RuleSample("aten index_put", Call(aten.index_put.default, (INPUT, [None, places[1]], Slot(1))), ((2, 3), (2, 2)))
        twice = torch.tensor([1, 1])
        call = Call(torch.index_put, (INPUT, (twice,), Slot(1), True))
        yield RuleSample("added", call, ((3,), (2,)), batch_axis=None)
        wrong = "an index names one place twice"
        call = Call(aten.index_put.default, (INPUT, [None, twice], Slot(1)))
        yield RuleSample("one place twice", call, ((2, 3), (2, 2)), error=ValueError, message=wrong)
        call = Call(assign, (torch.zeros(2, 3, dtype=torch.long), column, INPUT))
        yield RuleSample("integer base", call, ((2,),), error=TypeError, message="stored in a tensor of torch.int64")


@register(*spellings("scatter", "scatter_add", "index_copy", "index_fill", "index_add"))
class DualScatter(Overwrite):
    """Values stored in, or added to, constant places along one axis. Source: thesis, Corollary 3."""

    places: ClassVar[tuple[int, ...]] = (0, 3)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every operator, additions with a place named twice among them."""
        places, twice = torch.tensor([2, 0]), torch.tensor([1, 1])
        yield RuleSample("index_copy", Call("index_copy", (INPUT, 1, places, Slot(1))), ((2, 3), (2, 2)))
        yield example("index_fill", torch.index_fill, 1, places, 0.5, shape=(2, 3))
        yield RuleSample("index_add", Call(torch.index_add, (INPUT, 1, twice, Slot(1))), ((2, 3), (2, 2)))
        grid = torch.tensor([[2, 0], [1, 2]])
        yield RuleSample("scatter", Call("scatter", (INPUT, 1, grid), {"src": Slot(1)}), ((2, 3), (2, 2)), batch_axis=None)
        yield example("scatter a number", torch.scatter, 1, grid, 0.5, shape=(2, 3), batch_axis=None)
        call = Call(aten.scatter_add.default, (INPUT, 1, torch.zeros_like(grid), Slot(1)))
        yield RuleSample("scatter_add", call, ((2, 3), (2, 2)), batch_axis=None)
        call, wrong = Call(torch.index_copy, (INPUT, 1, twice, Slot(1))), "an index names one place twice"
        yield RuleSample("one place twice", call, ((2, 3), (2, 2)), error=ValueError, message=wrong)


@register(*spellings("select_scatter", "diagonal_scatter"))
class DualSelectScatter(Merge):
    """A tensor with one slice or diagonal replaced by another tensor. Source: thesis, Corollary 3."""

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse perturbed places."""
        return perturbed_elsewhere(call, (0, 1), _NAMES)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield both operators, and a constant part."""
        call = Call(aten.select_scatter.default, (INPUT, Slot(1), 1, -1))
        yield RuleSample("select_scatter", call, ((2, 3), (2,)), batch_axis=None)
        yield example("constant part", "select_scatter", torch.zeros(2), 1, 2, shape=(2, 3), batch_axis=None)
        call = Call(torch.diagonal_scatter, (INPUT, Slot(1), 0, 1, 2))
        yield RuleSample("diagonal_scatter", call, ((2, 3, 3), (2, 3)), batch_axis=None)
        wrong = "expected src to have a size equal to the slice of self"
        call = Call("select_scatter", (INPUT, Slot(1), 1, 0))
        yield RuleSample("wrong size", call, ((2, 3), (3,)), error=RuntimeError, message=wrong)


@register(*spellings("slice_scatter"))
class DualSliceScatter(Merge):
    """A tensor with a range of places along one axis replaced by another tensor: what assignments to slices become.

    Source: thesis, Corollary 3.
    """

    @staticmethod
    def parameters(input: Any, src: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> dict[str, Any]:
        """Name the arguments of ``torch.slice_scatter``."""
        return {"input": input, "src": src, "dim": dim, "start": start, "end": end, "step": step}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse perturbed places."""
        return perturbed_elsewhere(call, (0, 1), _NAMES)

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Cut the rows of the part out; torch cannot batch its derivative where ``end`` lies beyond the axis."""
        given = self.arguments
        place = (given.dim % (nu.ndim - 1) + 1, given.start, given.end, given.step)
        part = aten.slice.Tensor(nu, *place)
        pulled = [(given.input, torch.slice_scatter(nu, torch.zeros_like(part), *place)), (given.src, part)]
        return tuple(sum(rows for role, rows in pulled if role == Slot(index)) for index in range(len(inputs)))

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield steps, open ends, and a constant base."""
        yield RuleSample("aten", Call(aten.slice_scatter.default, (INPUT, Slot(1), 1, 0, 9, 2)), ((2, 5), (2, 3)))
        call = Call("slice_scatter", (torch.ones(3, 2), INPUT), {"start": 1, "dim": -1})
        yield RuleSample("constant base", call, ((3, 1),), batch_axis=None)
        yield example("constant part", torch.slice_scatter, torch.ones(2, 2), 1, None, 2, shape=(2, 3), batch_axis=None)
        wrong = "expected src to have a size equal to the slice of self"
        call = Call(torch.slice_scatter, (INPUT, Slot(1), 1))
        yield RuleSample("wrong size", call, ((2, 3), (2, 2)), error=RuntimeError, message=wrong)


@register(torch.fill, aten.copy.default, aten.fill.Tensor)
class DualCopy(Merge):
    """All of a tensor replaced by another, widened to its shape. Source: thesis, Corollary 3."""

    def __init__(self, call: Call) -> None:
        """Run the assignment to everything in its place: torch has no derivative of ``aten.copy``."""
        super().__init__(Call(assign, (call.args[0], ..., call.args[1])))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the operator; an integer tensor would round the values."""
        result = self.call(*inputs)
        _check_dtype(result)
        return result

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield values of the same shape, widened, and of no axes."""
        yield RuleSample("copy", Call(aten.copy.default, (INPUT, Slot(1))), ((2, 3), (2, 3)))
        yield RuleSample("widened", Call(aten.copy.default, (INPUT, Slot(1))), ((2, 3), (3,)), batch_axis=None)
        yield RuleSample("constant base", Call(aten.copy.default, (torch.ones(4, 2, 3), INPUT)), ((2, 1),), batch_axis=None)
        yield RuleSample("constant value", Call(aten.copy.default, (INPUT, torch.tensor([0.5, -1.0, 2.0]))), ((2, 3),))
        yield RuleSample("fill", Call(aten.fill.Tensor, (INPUT, Slot(1))), ((2, 3), ()), batch_axis=None)
        call, wrong = Call(aten.copy.default, (torch.zeros(2, dtype=torch.long), INPUT)), "stored in a tensor of torch.int64"
        yield RuleSample("integer base", call, ((2,),), error=TypeError, message=wrong)
