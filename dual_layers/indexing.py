"""Parts of a tensor: slices, selections, splits, masks and gathered elements."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import ClassVar

import torch

from dual_layers.contract import INPUT, Call, Facts, RuleSample, Slot
from dual_layers.registry import register
from dual_layers.shape import Merge, Rearrangement, example, perturbed_elsewhere
from dual_layers.spellings import spellings

aten = torch.ops.aten


@register(torch.linalg.diagonal, *spellings("slice", "select", "narrow", "diagonal", "diag", "diag_embed"))
class DualSlice(Rearrangement):
    """Some elements, each once. Source: thesis, Corollary 3."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, injective=True, aliases=True)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every spelling."""
        yield example("select", torch.select, 1, -1)
        yield example("narrow", "narrow", 2, 1, 2)
        yield example("diagonal", torch.diagonal, kwargs={"offset": 1, "dim1": 1, "dim2": 2})
        yield example("diag_embed", "diag_embed", -1, shape=(2, 3))
        yield example("aten slice", aten.slice.Tensor, 2, 0, 9223372036854775807, 2, shape=(2, 3, 5))
        yield example("aten select", aten.select.int, 1, 0)
        yield example("outside", "select", 1, 3, error=IndexError, message="index 3 out of range")


@register(
    *spellings("split", "split_with_sizes", "chunk", "unbind", "tensor_split", "hsplit", "vsplit", "dsplit", "unsafe_split"),
    *spellings("unsafe_chunk", "unsafe_split_with_sizes"),
)
class DualSplit(Rearrangement):
    """One of the parts a tensor is cut into. Source: thesis, Corollary 3."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, injective=True, aliases=True, outputs_tuple=True)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every spelling, first, last and smaller parts."""
        yield example("split", torch.split, 2, shape=(2, 5), kwargs={"dim": 1}, item=2)
        yield example("split by sizes", "split", [1, 3], 2, item=1)
        yield example("chunk", "chunk", 2, shape=(2, 5), kwargs={"dim": -1}, item=0)
        yield example("unbind", torch.unbind, 1, item=-1)
        yield example("tensor_split", "tensor_split", (1, 2), kwargs={"dim": 1}, item=1)
        yield example("hsplit", "hsplit", 3, item=1)
        yield example("aten split", aten.split_with_sizes.default, [1, 2], 1, item=1)
        wrong = "split_with_sizes expects split_sizes to sum exactly to 3"
        yield example("wrong sizes", "split", [1, 1], 1, item=0, error=RuntimeError, message=wrong)


@register(operator.getitem, aten.index.Tensor, *spellings("index_select", "gather", "take_along_dim", "masked_select"))
class DualIndex(Rearrangement):
    """Elements at constant places, possibly the same one twice. Source: thesis, Corollary 3."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, aliases=True)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every kind of index: numbers, slices, None, Ellipsis, tensors of places and of truth values."""
        everything = slice(None)
        places, mask = torch.tensor([2, 0, 2]), torch.tensor([True, False, True])
        yield example("number", operator.getitem, (everything, 1))
        yield example("slices, None, Ellipsis", operator.getitem, (everything, slice(1, None), None, ..., slice(None, None, 2)))
        yield example("places, one twice", operator.getitem, (everything, places))
        yield example("places as a list", operator.getitem, (everything, [0, 2]))
        yield example("truth values", operator.getitem, (everything, mask))
        yield example("two tensors", operator.getitem, (everything, places, torch.tensor([0, 1, 3])))
        yield example("aten index", aten.index.Tensor, [None, places, None])
        yield example("index_select", torch.index_select, 1, places)
        yield example("gather", "gather", 1, torch.tensor([[2, 2], [0, 1]]), shape=(2, 3), batch_axis=None)
        yield example("take_along_dim", torch.take_along_dim, torch.tensor([[1, 1, 0]]), 1, shape=(2, 3))
        yield example("masked_select", "masked_select", mask, shape=(2, 3), batch_axis=None)
        wrong = "index 3 is out of bounds for dimension"
        yield example("outside", operator.getitem, (everything, 3), error=IndexError, message=wrong)


@register(*spellings("tril", "triu"))
class DualTriangle(Rearrangement):
    """A triangle of each matrix, zero elsewhere. Source: thesis, Corollary 3."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, injective=True, positionwise=True)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield both triangles."""
        yield example("tril", torch.tril)
        yield example("triu", "triu", 1)
        yield example("aten tril", aten.tril.default, -1)
        yield example("no matrix", "tril", shape=(3,), error=RuntimeError, message="must have at least 2 dimensions")


@register(*spellings("where"))
class DualWhere(Merge):
    """One tensor where a constant condition holds, another elsewhere. Source: thesis, Corollary 3."""

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a perturbed condition, and the form that lists the places where it holds."""
        if len(call.args) + len(call.kwargs) < 3:
            return "where(condition) alone depends on the input discontinuously"
        positions = (0, 2) if isinstance(call.operator, str) else (1, 2)
        wrong = perturbed_elsewhere(call, positions, ("input", "self", "other"))
        return "the condition must not depend on the input" if wrong else None

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield perturbed tensors on either side and on both, and a condition that widens them."""
        mask = torch.tensor([True, False, True])
        yield RuleSample("first", Call(torch.where, (mask, INPUT, -1.5)), ((2, 3),))
        yield RuleSample("second", Call(aten.where.ScalarSelf, (mask, 0.5, INPUT)), ((2, 3),))
        yield RuleSample("both", Call(aten.where.self, (mask, INPUT, Slot(1))), ((2, 3), (2, 3)))
        yield RuleSample("twice the same", Call(torch.where, (mask, INPUT, INPUT)), ((2, 3),))
        yield RuleSample("method", Call("where", (INPUT, mask, Slot(1))), ((2, 3), (2, 1)))
        yield RuleSample("widened", Call(torch.where, (mask, INPUT, torch.ones(3))), ((2, 1),))
        wrong = "must match the size of tensor b"
        yield RuleSample("wrong size", Call(torch.where, (mask, INPUT, 0.0)), ((2, 4),), error=RuntimeError, message=wrong)


@register(*spellings("masked_fill"))
class DualMaskedFill(Merge):
    """A value where a constant mask holds, which may be infinite as in attention. Source: thesis, Corollary 3."""

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a perturbed mask."""
        wrong = perturbed_elsewhere(call, (0, 2), ("input", "self", "value"))
        return "the mask must not depend on the input" if wrong else None

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield numbers and tensors as values."""
        mask = torch.tensor([True, False, True])
        yield example("number", torch.masked_fill, mask, -2.0, shape=(2, 3))
        yield example("widened", "masked_fill", mask, 1.0, shape=(2, 1))
        yield RuleSample("perturbed value", Call("masked_fill", (INPUT, mask, Slot(1))), ((2, 3), ()), batch_axis=None)
        yield example("aten", aten.masked_fill.Scalar, mask, 0, shape=(2, 3))
        wrong = "only supports boolean masks|expected self and mask|must be bool"
        yield example("no truth values", "masked_fill", torch.ones(3), 0.0, shape=(2, 3), error=RuntimeError, message=wrong)


@register(*spellings("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "row_stack", "column_stack"))
class DualConcatenate(Merge):
    """Several tensors one after another. Source: thesis, Corollary 3; densely connected networks (eq. 3.51) rest on it."""

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every spelling, constants among the tensors and one tensor twice."""
        constant = torch.ones(2, 1)
        yield RuleSample("cat", Call(torch.cat, ([INPUT, Slot(1)], 1)), ((2, 3), (2, 2)))
        yield RuleSample("cat with a constant", Call(torch.cat, ([INPUT, constant], -1)), ((2, 3),), batch_axis=None)
        call = Call(torch.concat, ((INPUT, INPUT, Slot(1)),), {"dim": 2})
        yield RuleSample("cat twice the same", call, ((2, 3, 4), (2, 3, 1)))
        yield RuleSample("stack", Call(torch.stack, ([INPUT, Slot(1)],), {"dim": 1}), ((2, 3), (2, 3)))
        yield RuleSample("stack in front", Call(torch.stack, ([INPUT, Slot(1)],)), ((2, 3), (2, 3)), batch_axis=None)
        yield RuleSample("hstack", Call(torch.hstack, ([INPUT, Slot(1)],)), ((2, 3), (2, 1)))
        yield RuleSample("vstack", Call(torch.vstack, ([INPUT, Slot(1)],)), ((2, 3), (1, 3)), batch_axis=None)
        yield RuleSample("aten cat", Call(aten.cat.default, ([INPUT, Slot(1)], 1)), ((2, 3), (2, 2)))
        call, wrong = Call(torch.cat, ([INPUT, Slot(1)], 1)), "Sizes of tensors must match"
        yield RuleSample("wrong size", call, ((2, 3), (3, 2)), error=RuntimeError, message=wrong)
