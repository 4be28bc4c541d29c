"""Shapes: what asks for them, what changes them, and what repeats elements to fill them."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dual_layers.contract import INPUT, Call, Facts, RuleSample, Slot, slots
from dual_layers.families import Affine
from dual_layers.registry import register, register_shape_query
from dual_layers.spellings import spellings

aten = torch.ops.aten

#: Attributes of a tensor that depend on its shape, dtype and device only.
SHAPE_ATTRIBUTES = frozenset(
    {"shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes", "is_cuda", "is_cpu", "is_mps", "is_meta", "is_sparse"}
)

# Constant only while the *first* argument alone is perturbed: a perturbed fill value would reach the result.
# ``empty_like`` (garbage) and ``rand_like`` (random) are left out on purpose.
register_shape_query(
    builtins.len,
    "__len__",
    "new_tensor",
    torch.is_tensor,
    torch.result_type,
    aten.fill.Scalar,
    *spellings(
        "size", "dim", "numel", "stride", "element_size", "get_device", "is_contiguous", "is_floating_point", "is_complex"
    ),
    *spellings("ndimension", "nelement", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "zero"),
    *spellings("sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "_assert_tensor_metadata"),
)


def assign(base: Tensor, index: Any, value: Any) -> Tensor:
    """Return ``base`` after ``base[index] = value``, leaving ``base`` itself alone."""
    result = base.clone(memory_format=torch.contiguous_format)  # vmap of the derivative fails on the strides of a slice
    result[index] = value
    return result


def perturbed_elsewhere(call: Call, positions: Iterable[int] = (0,), names: Iterable[str] = ("input", "self")) -> str | None:
    """Say which arguments of a call are perturbed besides those at these positions or with these names, if any are."""
    wrong = [f"argument {place}" for place, value in enumerate(call.args) if place not in tuple(positions) and slots(value)]
    wrong += [f"{name!r}" for name, value in call.kwargs.items() if name not in tuple(names) and slots(value)]
    return f"{' and '.join(wrong)} must not depend on the input" if wrong else None


def example(label: str, operator: Any, *args: Any, shape: tuple[int, ...] = (2, 3, 4), **fields: Any) -> RuleSample:
    """Build the sample of an operator whose first argument is its only perturbed one."""
    call = Call(operator, (INPUT, *args), fields.pop("kwargs", {}), fields.pop("item", None))
    return RuleSample(label, call, (shape,), **fields)


class Rearrangement(Affine):
    """A linear map of one tensor whose coefficients are 0 and 1: elements are moved, dropped, copied or summed."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True)
    source: ClassVar[str] = "thesis, Corollary 3 (eq. 3.49): the dual of a linear map is its transpose"

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse perturbed sizes, indices and the like."""
        return perturbed_elsewhere(call)

    def linear(self, *tangents: Tensor) -> Tensor:
        """Run the operator: it has no constant part."""
        return self.call(*tangents)


class Merge(Affine):
    """A map of one or several tensors whose coefficients are 0 and 1, with constants among the arguments."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True)
    source: ClassVar[str] = "thesis, Corollary 3 (eq. 3.49): the dual of an affine map is its transpose"

    def linear(self, *tangents: Tensor) -> Tensor:
        """Subtract the constant part; an infinite one, such as a mask's, has no tangent and would leave NaN."""
        constant = self.call(*(torch.zeros_like(tangent) for tangent in tangents))
        return torch.where(constant.isfinite(), self.call(*tangents) - constant, 0.0)


@register(
    nn.Flatten,
    nn.Unflatten,
    aten._unsafe_view.default,
    *spellings("flatten", "unflatten", "ravel", "view", "reshape", "squeeze", "unsqueeze"),
)
class DualReshape(Rearrangement):
    """The same elements in the same order under another shape. Source: thesis, Corollary 3."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, injective=True, aliases=True)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse perturbed sizes, and ``view(dtype)``, which reads the same bits as other numbers."""
        if any(isinstance(value, torch.dtype) for value in (*call.args, *call.kwargs.values())):
            return "view(dtype) reinterprets the bits; use to(dtype)"
        return perturbed_elsewhere(call)

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Give the rows the input's shape."""
        return (nu.reshape(nu.shape[0], *inputs[0].shape),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every spelling, and sizes that mention or merge the batch."""
        yield example("nn.Flatten", nn.Flatten())
        yield example("nn.Flatten of the last axes", nn.Flatten(-2), shape=(2, 3, 2, 2))
        yield example("nn.Unflatten", nn.Unflatten(1, (2, 3)), shape=(2, 6))
        yield example("torch.flatten", torch.flatten, 1)
        yield example("flatten, batch included", "flatten", batch_axis=None)
        yield example("unflatten", "unflatten", -1, (2, -1))
        yield example("ravel", "ravel", batch_axis=None)
        yield example("view with the batch", "view", 2, -1, batch_axis=None)
        yield example("view, batch merged", "view", -1, 4, batch_axis=None)
        yield example("reshape", torch.reshape, (-1, 12))
        yield example("squeeze", torch.squeeze, 1, shape=(2, 1, 3))
        yield example("squeeze, batch of one", "squeeze", shape=(1, 3, 1), batch_axis=None)
        yield example("unsqueeze", "unsqueeze", kwargs={"dim": -1})
        yield example("aten view", aten.view.default, [-1, 12])
        yield example("aten squeeze", aten.squeeze.dims, [1, 2], shape=(2, 1, 1, 3))
        wrong = "is invalid for input of size 24"
        yield example("wrong size", "view", -1, 5, error=RuntimeError, message=wrong)
        wrong = "reinterprets the bits"
        yield example("another dtype", "view", torch.int32, error=ValueError, message=wrong)


@register(
    *spellings(
        "permute", "transpose", "swapaxes", "swapdims", "t", "movedim", "moveaxis", "adjoint", "mT", "mH", "matrix_H", "numpy_T"
    )
)
class DualPermute(Rearrangement):
    """The axes in another order. Source: thesis, Corollary 3."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, injective=True, aliases=True)

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Put the axes back; which went where shows on a tensor without data whose axes all differ in size."""
        probe = torch.empty(tuple(range(inputs[0].ndim)), device="meta")
        order = list(self.forward(probe).shape)
        return (nu.permute(0, *(1 + order.index(axis) for axis in range(len(order)))),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every spelling, with the batch in place and moved."""
        yield example("permute", "permute", 0, 3, 1, 2, shape=(2, 3, 4, 5))
        yield example("permute, batch moved", torch.permute, (2, 0, 1), batch_axis=None)
        yield example("transpose", torch.transpose, 1, -1)
        yield example("transpose by keyword", "transpose", kwargs={"dim0": -2, "dim1": -1})
        yield example("t", "t", shape=(2, 3), batch_axis=None)
        yield example("T", aten.numpy_T.default, shape=(2, 3), batch_axis=None)
        yield example("mT", aten.mT.default)
        yield example("movedim", "movedim", (1, 2), (-1, 1), shape=(2, 3, 4, 5))
        yield example("moveaxis", torch.moveaxis, 1, 2)
        yield example("swapaxes", "swapaxes", 1, 2)
        yield example("aten transpose", aten.transpose.int, 1, 2)
        yield example("aten permute", aten.permute.default, [0, 2, 1])
        yield example("axis twice", "permute", 0, 1, 1, error=RuntimeError, message="duplicate dims are not allowed")


@register(*spellings("expand", "broadcast_to", "repeat", "tile", "repeat_interleave"))
class DualRepeat(Rearrangement):
    """Every element several times. Source: thesis, Corollary 3."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, selection=True, aliases=True)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every spelling."""
        yield example("expand", "expand", -1, 5, 4, shape=(2, 1, 4))
        yield example("expand to a new axis", "expand", 5, -1, -1, shape=(2, 4), batch_axis=None)
        yield example("broadcast_to", torch.broadcast_to, (2, 3, 4), shape=(2, 1, 4), batch_axis=None)
        yield example("repeat", "repeat", 1, 2, 3, shape=(2, 2, 3))
        yield example("tile", torch.tile, (2,), shape=(2, 3))
        yield example("repeat_interleave", torch.repeat_interleave, 2, shape=(2, 3), kwargs={"dim": 1})
        counts = torch.tensor([1, 0, 2])
        yield example("repeat_interleave by a tensor", "repeat_interleave", counts, 1, shape=(2, 3))
        yield example("aten expand", aten.expand.default, [-1, 3], shape=(2, 1))
        wrong = "must match the existing size"
        yield example("wrong size", "expand", 2, 5, shape=(2, 3), error=RuntimeError, message=wrong, batch_axis=None)


@register(*spellings("view_as", "reshape_as", "expand_as"))
class DualShapeAs(Affine):
    """The shape of another tensor, whose values do not matter even where they are perturbed. Source: thesis, Corollary 3."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, aliases=True)
    source: ClassVar[str] = Rearrangement.source

    def linear(self, *tangents: Tensor) -> Tensor:
        """Run the operator: it has no constant part."""
        return self.call(*tangents)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield constant and perturbed shape givers."""
        yield example("view_as", "view_as", torch.zeros(2, 12), batch_axis=None)
        yield RuleSample(
            "reshape_as, both perturbed", Call("reshape_as", (INPUT, Slot(1))), ((2, 4), (2, 2, 2)), batch_axis=None
        )
        yield RuleSample("expand_as, both perturbed", Call("expand_as", (INPUT, Slot(1))), ((2, 1), (2, 3)))
        wrong = "is invalid for input of size"
        yield example("wrong size", "view_as", torch.zeros(2, 5), error=RuntimeError, message=wrong, batch_axis=None)


@register(*spellings("broadcast_tensors"))
class DualBroadcastTensors(Affine):
    """One of several tensors, expanded to the shape they share. Source: thesis, Corollary 3."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, selection=True, aliases=True, outputs_tuple=True)
    source: ClassVar[str] = Rearrangement.source

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield a constant and a perturbed partner."""
        partner = Call(torch.broadcast_tensors, (INPUT, torch.zeros(3, 1)), item=0)
        yield RuleSample("constant partner", partner, ((2, 1, 4),))
        yield RuleSample("both perturbed", Call(torch.broadcast_tensors, (INPUT, Slot(1)), item=1), ((2, 1, 4), (2, 3, 1)))
