"""Pooling by maximum: the largest element of each window of an image, a volume or a sequence."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from itertools import chain
from math import prod
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers._recorded import recorded
from dual_layers.contract import INPUT, Call, Facts, Interval, RuleSample
from dual_layers.families import Affine, Composite
from dual_layers.largest import POSITIONS, largest_of
from dual_layers.refusals import unless_only
from dual_layers.registry import register

_ATEN = torch.ops.aten

Places = tuple[tuple[int, ...], ...]
"""For each window along one axis the positions of its elements, equally many for all."""


@recorded
def windows(input: Tensor, places: tuple[Places, ...]) -> Tensor:
    """Gather windows of the last axes.

    Args:
        input: ``[..., *sizes]``.
        places: which positions belong to which window, for each of the last axes.

    Returns:
        ``[..., *windows, elements]``, the elements of all axes in one.
    """
    return input.flatten(-len(places))[..., _table(input, places)]


def _table(input: Tensor, places: tuple[Places, ...]) -> Tensor:
    """Return ``[*windows, elements]``: where every window's elements are in the flattened axes."""
    rank, table = len(places), 0
    for axis, size in enumerate(input.shape[-rank:]):
        table = table * size + _along(torch.tensor(places[axis], device=input.device), axis, rank)
    return table.flatten(rank)


def _distinct(input: Tensor, places: tuple[Places, ...]) -> Tensor | None:
    """Tell which elements of windows are there for the first time, ``[*windows, elements]``; None if all are."""
    rank, distinct = len(places), True
    for axis, lines in enumerate(places):
        first = [[place not in line[:number] for number, place in enumerate(line)] for line in lines]
        distinct = distinct & _along(torch.tensor(first, device=input.device), axis, rank)
    return None if distinct.all() else distinct.flatten(rank)


def _along(table: Tensor, axis: int, rank: int) -> Tensor:
    """Lay ``[windows, elements]`` along one of several axes of windows, and one of as many axes of elements."""
    shape = [1] * (2 * rank)
    shape[axis], shape[rank + axis] = table.shape
    return table.reshape(shape)


@register(windows)
class DualWindows(Affine):
    """Windows of an image: every element is one of the image's. Source: thesis, Corollary 3 (eq. 3.49)."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, selection=True)
    source: ClassVar[str] = "thesis, Corollary 3 (eq. 3.49): the dual of a linear map is its transpose"

    @staticmethod
    def parameters(input: Any, places: Any) -> dict[str, Any]:
        """Name the arguments of ``windows``."""
        return {"input": input, "places": places}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse whatever has no name here."""
        return unless_only(cls, call, "input")

    def linear(self, *tangents: Tensor) -> Tensor:
        """Run the operator: it has no constant part."""
        return self.call(*tangents)

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Add every row up where its elements came from: some five times as fast as the derivative of indexing."""
        places, shape = self.arguments.places, inputs[0].shape
        rank = len(places)
        total = nu.new_zeros(*nu.shape[: -rank - 1], prod(shape[-rank:]))
        total = total.index_add(-1, _table(inputs[0], places).flatten(), nu.flatten(-rank - 1))
        return (total.reshape(len(nu), *shape),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield windows that overlap, leave gaps and hold an element twice, on one axis and two."""
        rows, columns = ((0, 1), (1, 2), (3, 3)), ((0, 2, 4),)
        yield RuleSample("sequence", Call(windows, (INPUT, (rows,))), ((2, 3, 4),))
        yield RuleSample("image", Call(windows, (INPUT, (rows, columns))), ((2, 1, 4, 5),))
        call, wrong = Call(windows, (INPUT, (rows,))), "index 3 is out of bounds"
        yield RuleSample("too small", call, ((2, 3),), error=IndexError, message=wrong)


class WindowMaximum(Composite, ABC):
    """The largest element of each of some windows: a step that gathers them, and the largest over the last axis. Abstract.

    Windows that padding or unequal sizes leave without some elements repeat one of theirs instead.
    """

    keys: ClassVar[dict[int, tuple[Any, ...]]]  # by number of axes

    @property
    def arguments(self) -> SimpleNamespace:
        """The call's arguments, and over how many axes its operator pools."""
        operator = self.call.operator
        kind = type(operator).__mro__ if isinstance(operator, nn.Module) else (operator,)
        rank = next(rank for rank, keys in self.keys.items() if any(key in keys for key in kind))
        return SimpleNamespace(**vars(super().arguments), rank=rank)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse perturbed sizes, and the positions of the largest elements."""
        text = unless_only(cls, call, "input")
        if text is not None:
            return text
        if not cls.facts.outputs_tuple and cls(call).arguments.return_indices:
            return f"{POSITIONS}; leave out return_indices"
        return POSITIONS if call.item == 1 else None

    def interval(self, *boxes: Interval) -> Interval:
        """Take the ends: exact."""
        return boxes[0].map(self.forward)


def _largest_in(input: Any, places: list[Places]) -> Any:
    return largest_of(windows(input, tuple(places)), _distinct(input, tuple(places)))


def _each(value: Any, rank: int) -> tuple[Any, ...]:
    """Spell a setting out for each axis; a single one counts for all."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * rank if len(values) == 1 else values


def _steps(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Places:
    """Return the windows along an axis that lie inside it; the last one may reach beyond it with ``ceil_mode``."""
    count = (size + 2 * padding - dilation * (kernel - 1) - 1 + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    starts = [number * stride - padding for number in range(count)]
    return _filled([range(start, start + dilation * kernel, dilation) for start in starts], size)


def _shares(size: int, count: int | None) -> Places:
    """Return as many windows as asked for, which cover an axis; None leaves the axis as it is."""
    count = size if count is None else count
    return _filled([range(n * size // count, -(-(n + 1) * size // count)) for n in range(count)], size)


def _filled(lines: list[range], size: int) -> Places:
    """Leave out positions outside, and repeat the first one inside where a window is short."""
    inside = [[place for place in line if 0 <= place < size] for line in lines]
    if not all(inside):
        raise ValueError("a window holds nothing but padding, whose largest element is minus infinity")
    longest = max(map(len, inside), default=0)
    return tuple(tuple(line + line[:1] * (longest - len(line))) for line in inside)


class StridedMaximum(WindowMaximum, ABC):
    """Windows of one size, a stride apart. Abstract."""

    @staticmethod
    def parameters(
        input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: Any = False,
        return_indices: Any = False,
    ) -> dict[str, Any]:  # fmt: skip
        """Name the arguments of ``F.max_pool2d``."""
        return dict(locals())

    @staticmethod
    def compose(
        input: Any, rank: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, return_indices: bool
    ) -> Any:
        """Take the windows that lie inside the image, or reach beyond its end with ``ceil_mode``."""
        settings = (kernel_size, stride or kernel_size, padding, dilation)
        each = zip(*(_each(setting, rank) for setting in settings), strict=True)
        return _largest_in(input, [_steps(size, *own, ceil_mode) for size, own in zip(input.shape[-rank:], each, strict=True)])


class SharedMaximum(WindowMaximum, ABC):
    """As many windows as asked for, of about one size. Abstract."""

    @staticmethod
    def parameters(input: Any, output_size: Any, return_indices: Any = False) -> dict[str, Any]:
        """Name the arguments of ``F.adaptive_max_pool2d``."""
        return dict(locals())

    @staticmethod
    def compose(input: Any, rank: int, output_size: Any, return_indices: bool) -> Any:
        """Share the image out among the windows."""
        counts = _each(output_size, rank)
        return _largest_in(input, [_shares(*each) for each in zip(input.shape[-rank:], counts, strict=True)])


_STRIDED = {
    1: (nn.MaxPool1d, F.max_pool1d, torch.max_pool1d, _ATEN.max_pool1d.default),
    2: (nn.MaxPool2d, F.max_pool2d, torch.max_pool2d, _ATEN.max_pool2d.default),
    3: (nn.MaxPool3d, F.max_pool3d, torch.max_pool3d, _ATEN.max_pool3d.default),
}
_SHARED = {
    1: (nn.AdaptiveMaxPool1d, F.adaptive_max_pool1d),
    2: (nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d),
    3: (nn.AdaptiveMaxPool3d, F.adaptive_max_pool3d),
}
_STRIDED_PAIRS = {
    1: (F.max_pool1d_with_indices, torch.max_pool1d_with_indices, _ATEN.max_pool1d_with_indices.default),
    2: (F.max_pool2d_with_indices, _ATEN.max_pool2d_with_indices.default),
    3: (F.max_pool3d_with_indices, _ATEN.max_pool3d_with_indices.default),
}
_SHARED_PAIRS = {
    1: (F.adaptive_max_pool1d_with_indices, torch.adaptive_max_pool1d, _ATEN.adaptive_max_pool1d.default),
    2: (F.adaptive_max_pool2d_with_indices, _ATEN.adaptive_max_pool2d.default),
    3: (F.adaptive_max_pool3d_with_indices, _ATEN.adaptive_max_pool3d.default),
}


@register(*chain(*_STRIDED.values()))
class DualMaxPool(StridedMaximum):
    """Largest element of each window. Source: a gathering and a maximum."""

    keys: ClassVar[dict[int, tuple[Any, ...]]] = _STRIDED

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield windows that overlap, leave gaps or a remainder, are dilated and padded, on one, two and three axes."""
        image = ((2, 3, 7, 5),)
        yield RuleSample("2d, remainder", Call(nn.MaxPool2d(2)), image)
        yield RuleSample("2d, overlap and padding", Call(nn.MaxPool2d(3, 2, 1)), image)
        yield RuleSample("2d, ceil", Call(F.max_pool2d, (INPUT, (3, 2), 2), {"ceil_mode": True}), image)
        yield RuleSample("2d, ceil and padding", Call(torch.max_pool2d, (INPUT, 2, 3, 1, 1, True)), image)
        dilated = {"stride": (1, 2), "padding": (1, 0), "dilation": (2, 3)}
        yield RuleSample("2d, dilated", Call(F.max_pool2d, (INPUT, (3, 2)), dilated), image)
        yield RuleSample("2d, unbatched", Call(F.max_pool2d, (INPUT, 2)), ((3, 4, 5),), batch_axis=None)
        yield RuleSample("1d, gaps", Call(nn.MaxPool1d(2, 3)), ((2, 3, 8),))
        yield RuleSample("1d, padding", Call(F.max_pool1d, (INPUT, 3, 2, 1)), ((2, 3, 6),))
        yield RuleSample("3d", Call(nn.MaxPool3d((1, 2, 3), stride=(1, 1, 2), padding=(0, 1, 1))), ((2, 1, 2, 3, 5),))
        yield RuleSample("aten", Call(_ATEN.max_pool2d.default, (INPUT, [2, 2], [1, 2], [0, 1])), image)
        yield RuleSample("aten, no stride", Call(_ATEN.max_pool1d.default, (INPUT, [2])), ((2, 3, 5),))
        indices, wrong = Call(nn.MaxPool2d(2, return_indices=True)), "only the values have bounds"
        yield RuleSample("positions", indices, image, error=ValueError, message=wrong)
        yield RuleSample("too small", Call(F.max_pool2d, (INPUT, 6)), image, error=RuntimeError, message="too small")


@register(*chain(*_STRIDED_PAIRS.values()))
class DualMaxPoolWithIndices(StridedMaximum):
    """Largest element of each window, from an operator that gives its position too. Source: as DualMaxPool."""

    facts: ClassVar[Facts] = Facts(outputs_tuple=True)
    keys: ClassVar[dict[int, tuple[Any, ...]]] = _STRIDED_PAIRS

    @staticmethod
    def compose(*args: Any, **kwargs: Any) -> Any:
        """Give the values alone."""
        return (StridedMaximum.compose(*args, **kwargs),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, and the positions."""
        image, wrong = ((2, 3, 7, 5),), "only the values have bounds"
        padded = Call(_ATEN.max_pool2d_with_indices.default, (INPUT, [3, 2], [2, 3], [1, 0]), item=0)
        yield RuleSample("aten", padded, image)
        dilated = Call(F.max_pool1d_with_indices, (INPUT, 2), {"dilation": 2, "return_indices": True}, item=0)
        yield RuleSample("function", dilated, ((2, 3, 6),))
        yield RuleSample("3d", Call(_ATEN.max_pool3d_with_indices.default, (INPUT, [2]), item=0), ((1, 1, 2, 3, 4),))
        positions = Call(_ATEN.max_pool2d_with_indices.default, (INPUT, [2, 2]), item=1)
        yield RuleSample("positions", positions, image, error=ValueError, message=wrong)


@register(*chain(*_SHARED.values()))
class DualAdaptiveMaxPool(SharedMaximum):
    """Largest elements of as many windows as asked for. Source: as DualMaxPool."""

    keys: ClassVar[dict[int, tuple[Any, ...]]] = _SHARED

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield windows of unequal size, global pooling, an axis left alone, and more windows than positions."""
        image = ((2, 3, 7, 5),)
        yield RuleSample("2d, unequal windows", Call(nn.AdaptiveMaxPool2d((3, 2))), image)
        yield RuleSample("2d, global", Call(F.adaptive_max_pool2d, (INPUT, 1)), image)
        yield RuleSample("2d, one axis", Call(F.adaptive_max_pool2d, (INPUT, (None, 2))), image)
        yield RuleSample("1d, more than there are", Call(nn.AdaptiveMaxPool1d(5)), ((2, 3, 4),))
        yield RuleSample("3d", Call(nn.AdaptiveMaxPool3d((1, 2, 3))), ((1, 2, 2, 3, 4),))
        indices, wrong = Call(nn.AdaptiveMaxPool2d(2, return_indices=True)), "only the values have bounds"
        yield RuleSample("positions", indices, image, error=ValueError, message=wrong)


@register(*chain(*_SHARED_PAIRS.values()))
class DualAdaptiveMaxPoolWithIndices(SharedMaximum):
    """Largest elements of as many windows as asked for, from an operator that gives positions too. Source: as DualMaxPool."""

    facts: ClassVar[Facts] = Facts(outputs_tuple=True)
    keys: ClassVar[dict[int, tuple[Any, ...]]] = _SHARED_PAIRS

    @staticmethod
    def compose(*args: Any, **kwargs: Any) -> Any:
        """Give the values alone."""
        return (SharedMaximum.compose(*args, **kwargs),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, and the positions."""
        image, wrong = ((2, 3, 7, 5),), "only the values have bounds"
        yield RuleSample("aten", Call(_ATEN.adaptive_max_pool2d.default, (INPUT, [3, 2]), item=0), image)
        yield RuleSample("1d", Call(torch.adaptive_max_pool1d, (INPUT, 2), item=0), ((2, 3, 5),))
        positions = Call(F.adaptive_max_pool2d_with_indices, (INPUT, (1, 2)), item=1)
        yield RuleSample("positions", positions, image, error=ValueError, message=wrong)
