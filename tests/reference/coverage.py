"""Ways to make one call under every spelling its rule is registered for, and where PyTorch lets the examples lie.

A *row* is a rule and one of its keys: a function, a method, a module class, an ATen overload. Its call is taken from the
rule's samples, or made from one of them. A *cell* is this call with the examples on the first axis of the operator's input,
on one in the middle or on the last, or in place. Whether PyTorch allows a cell is asked of PyTorch: the call must run, and
each example's output depend on that example alone.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers import UNKNOWN, Call, DualLayer, RuleSample, Slot, choose, spelling
from dual_layers.contract import fill, slots

aten = torch.ops.aten
Key = Any
Shapes = tuple[tuple[int, ...], ...]
AXES = ("first", "middle", "last")
AUGMENTED = {operator.add: operator.iadd, operator.sub: operator.isub, operator.mul: operator.imul}
AUGMENTED |= {operator.truediv: operator.itruediv, operator.pow: operator.ipow}


@dataclass(frozen=True)
class Cell:
    """A call, and where the examples are.

    Attributes:
        call: the operator and its constants.
        shapes: of the inputs, as the operator takes them, for two examples.
        fixed: how many of the last inputs do not move.
        axis: of the examples in the inputs.
        output: of the examples in the output.
        low: smallest value of an input.
        high: largest value of an input.
        truth: whether truth values come out.
        mask: whether a truth value is written into, made of the first input.
    """

    call: Call
    shapes: Shapes
    fixed: int
    axis: int
    output: int
    low: float
    high: float
    truth: bool = False
    mask: bool = False

    def boxes(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return boxes around random points, examples first: lower and upper ends."""
        generator = torch.Generator().manual_seed(0)
        shapes = [moved(shape, self.axis) for shape in self.shapes]
        ends = [torch.rand(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
        ends = [self.low + (self.high - self.low) * (0.25 + 0.5 * pair) for pair in ends]
        return tuple(pair.amin(0) for pair in ends), tuple(pair.amax(0) for pair in ends)

    def draw(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        """Draw inputs as the operator takes them."""
        sizes = [(*shape[: self.axis], batch, *shape[self.axis + 1 :]) for shape in self.shapes]
        return [self.low + (self.high - self.low) * torch.rand(s, generator=generator, dtype=torch.float64) for s in sizes]


def moved(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (shape[axis], *shape[:axis], *shape[axis + 1 :])


# What PyTorch allows.


def allowed(call: Call, sample: RuleSample, fixed: int, column: str) -> Cell | str:
    """Find a cell of this column that PyTorch allows, or say why there is none."""
    reason = "no axis there"
    for shapes, axis in placements(sample.shapes, column):
        cell = Cell(call, shapes, fixed, axis, 0, max(sample.low, -2.0), min(sample.high, 2.0))
        try:
            return replace(cell, output=separate(cell), truth=call(*cell.draw(2, torch.Generator())).dtype == torch.bool)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
    return reason


def placements(shapes: Shapes, column: str) -> Iterator[tuple[Shapes, int]]:
    """Yield inputs' shapes for two examples and the axis they lie on: one of the sample's own, or one more."""
    if column != "first" and len({len(shape) for shape in shapes}) != 1:
        return
    for more in (0, 1):
        rank = len(shapes[0]) + more
        axes = {"first": [0], "middle": range(1, rank - 1), "last": [rank - 1] if rank > 1 else []}[column]
        for axis in axes:
            rest = shapes if more else [shape[:axis] + shape[axis + 1 :] for shape in shapes]
            yield tuple((*shape[:axis], 2, *shape[axis:]) for shape in rest), axis


def separate(cell: Cell) -> int:
    """Return the output's axis that holds the examples; an error says that there is none."""
    generator = torch.Generator().manual_seed(1)
    two, five = (run(cell.call, cell.draw(batch, generator)) for batch in (2, 5))
    grown = [a for a in range(min(two.ndim, five.ndim)) if two.shape[a] != five.shape[a]]
    if two.ndim != five.ndim or len(grown) != 1 or (two.shape[grown[0]], five.shape[grown[0]]) != (2, 5):
        raise ValueError(f"no axis of the output is the batch: {tuple(two.shape)} for two, {tuple(five.shape)} for five")
    before, after = (cell.draw(5, generator) for _ in range(2))
    for example in range(5):
        chosen = torch.arange(5) == example
        mixed = [
            torch.where(chosen.view(-1, *[1] * (b.ndim - cell.axis - 1)), a, b) for a, b in zip(after, before, strict=True)
        ]
        changed = (run(cell.call, mixed) != run(cell.call, before)).movedim(grown[0], 0)
        if changed[~chosen].any():
            raise ValueError("examples are mixed")
    return grown[0]


def run(call: Call, inputs: list[Tensor]) -> Tensor:
    result = call(*(z.clone() for z in inputs))
    result = result.double() if isinstance(result, Tensor) and result.dtype == torch.bool else result
    if not isinstance(result, Tensor) or not result.is_floating_point():
        raise TypeError("no floating tensor comes out")
    return result


# Calls under a key, made from samples.


@cache
def samples(rule: type[DualLayer]) -> tuple[RuleSample, ...]:
    return tuple(double(sample) for sample in rule.samples() if sample.error is None and 0 < sample.call.arity <= 3)


def double(sample: RuleSample) -> RuleSample:
    """Bring a sample's constants to float64."""
    convert = lambda value: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value  # noqa: E731
    args, kwargs = (torch.utils._pytree.tree_map(convert, part) for part in (sample.call.args, dict(sample.call.kwargs)))
    target = sample.call.operator
    target = copy.deepcopy(target).double() if isinstance(target, nn.Module) else target
    return replace(sample, call=replace(sample.call, operator=target, args=args, kwargs=kwargs))


def calls(rule: type[DualLayer], key: Key) -> Iterator[tuple[Call, RuleSample, int]]:
    """Yield calls of the operator under this very key that the rule takes, made from one sample after the other.

    With each its sample, and how many of the inputs are fixed: constants as long as the batch may come with the batch.
    """
    for call, sample, fixed in FURTHER.get(key, ()):
        if key not in (call.operator, type(call.operator)) or takes(rule, call, fixed):
            yield call, sample, fixed
    for sample in samples(rule):
        if key in (sample.call.operator, type(sample.call.operator)):
            yield sample.call, sample, 0
            yield from with_fixed_inputs(sample.call, sample)
            continue
        for call in respelled(rule, key, sample.call):
            try:
                if call.arity == len(sample.shapes) and takes(rule, call) and takes_dtype_only(call):
                    run(call, [torch.ones(shape, dtype=torch.float64) for shape in sample.shapes])
                    yield call, sample, 0
                    yield from with_fixed_inputs(call, sample)
            except Exception:  # another signature
                continue


def takes(rule: type[DualLayer], call: Call, fixed: int = 0) -> bool:
    if not fixed:
        return choose(call)[0] is rule
    moving = call.arity - fixed
    inputs = tuple(Slot(index) if index < moving else UNKNOWN for index in range(call.arity))
    return choose(replace(call, args=fill(call.args, inputs), kwargs=fill(dict(call.kwargs), inputs)))[0] is rule


def with_fixed_inputs(call: Call, sample: RuleSample) -> Iterator[tuple[Call, RuleSample, int]]:
    """Hand floating constants that are as long as the batch over as inputs that do not move."""
    constants = [value for value in call.args if isinstance(value, Tensor) and value.is_floating_point() and value.ndim]
    if constants and sample.batch_axis == 0 and all(len(value) == sample.shapes[0][0] for value in constants):
        places = iter(range(call.arity, 9))
        args = tuple(Slot(next(places)) if any(value is c for c in constants) else value for value in call.args)
        shapes = (*sample.shapes, *(tuple(value.shape) for value in constants))
        yield replace(call, args=args), replace(sample, shapes=shapes), len(constants)


def takes_dtype_only(call: Call) -> bool:
    """Whether no number stands where an overload wants a dtype: PyTorch would read it as one, and perhaps crash."""
    names = [argument.name for argument in call.operator._schema.arguments] if hasattr(call.operator, "_schema") else []
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    return isinstance(given.get("dtype"), torch.dtype | None)


def respelled(rule: type[DualLayer], key: Key, call: Call) -> Iterator[Call]:
    """Yield ways to make the same call under another key."""
    named = {}
    with contextlib.suppress(NotImplementedError, TypeError, AttributeError):
        named = vars(rule(call).arguments)
    if isinstance(key, type):
        known = inspect.signature(key).parameters
        for options in ({name: value for name, value in named.items() if name in known and not slots(value)}, {}):
            try:
                yield Call(key(**options).double().eval())
            except Exception:
                continue
        return
    if not isinstance(call.operator, nn.Module):
        yield replace(call, operator=key)
        yield replace(call, operator=key, args=(*call.args[:1], call.args[1:]))
        yield replace(call, operator=key, args=(*call.args, *call.kwargs.values()), kwargs={})
    names = [argument.name for argument in key._schema.arguments] if hasattr(key, "_schema") else named
    first = next(iter(named.values()), None)
    rest = {name: value for name, value in list(named.items())[1:] if name in names and value is not None}
    yield Call(key, (first,), rest, item=call.item)
    for count in range(len(named), 0, -1):
        yield Call(key, tuple(named.values())[:count], item=call.item)


# Calls that no sample can be turned into, for the keys named first.

X, Y, Z = Slot(0), Slot(1), Slot(2)
FURTHER: dict[Key, list[tuple[Call, RuleSample, int]]] = {}


def further(
    key: Key, args: tuple[Any, ...], *shapes: tuple[int, ...], fixed: int = 0, item: int | None = None, **kwargs: Any
) -> None:
    """Add a call with these arguments; the last ``fixed`` inputs do not move."""
    call = Call(kwargs.pop("through", key), args, kwargs, item)
    FURTHER.setdefault(key, []).append((call, RuleSample("further", call, shapes), fixed))


def numbers(*shape: int) -> Tensor:
    return torch.linspace(-1, 1.5, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


for _key in (aten.div.Tensor_mode, aten.div.Scalar_mode):
    further(_key, (X, 2.0 if _key is aten.div.Scalar_mode else numbers(3)), (2, 3), rounding_mode=None)
further(aten.broadcast_tensors.default, ([X, numbers(4, 1)],), (2, 1, 3), item=0)
further(aten.index_fill.int_Tensor, (X, 1, torch.tensor([1, 0]), torch.tensor(0.5)), (2, 3))
for _key in (torch.bmm, "bmm", aten.bmm.default):
    further(_key, (X, Y), (2, 3, 4), (2, 4, 2), fixed=1)
for _key in (torch.baddbmm, "baddbmm", aten.baddbmm.default):
    further(_key, (X, Y, Z), (2, 3, 2), (2, 3, 4), (2, 4, 2), fixed=1, beta=0.5)
for _key in (torch.addmm, "addmm"):
    further(_key, (X, Y, numbers(4, 2)), (2, 2), (2, 4), alpha=-2)
for _key in (torch.addcmul, "addcmul", torch.addcdiv, "addcdiv"):
    further(_key, (X, Y, Z), (2, 3), (2, 3), (2, 3), fixed=1, value=-2)
for _key in (torch.addmv, "addmv"):
    further(_key, (X, Y, numbers(4)), (2,), (2, 4), alpha=-2)
further(aten.tensordot.default, (X, numbers(3, 4), [1], [0]), (2, 3))
for _key in (F.bilinear, aten.bilinear.default):
    further(_key, (X, Y, numbers(2, 3, 4), numbers(2)), (2, 3), (2, 4), fixed=1)
further(nn.Bilinear, (X, Y), (2, 3), (2, 4), fixed=1, through=nn.Bilinear(3, 4, 2).double())
further(aten.narrow.Tensor, (X, 1, torch.tensor(1), 2), (2, 3))
further(aten.tensor_split.tensor_indices_or_sections, (X, torch.tensor([1]), 1), (2, 3), item=0)
further(aten.masked_fill.Tensor, (X, torch.tensor([True, False, True]), torch.tensor(0.5)), (2, 3))
for _key in (torch.gather, "gather", aten.gather.default):  # an index for each example, from an input that does not move
    _gather = _key if callable(_key) else Tensor.gather
    further(_key, (X, Y), (2, 3), (2, 3), fixed=1, through=lambda x, y, gather=_gather: gather(x, 1, (y > 0).long()))
for _key in (F.nll_loss, F.cross_entropy):
    _loss = lambda x, y, loss=_key: loss(x, (y > 0).long(), reduction="none")  # noqa: E731
    further(_key, (X, Y), (2, 3), (2,), fixed=1, through=_loss)
for _module in (nn.UpsamplingNearest2d(scale_factor=2), nn.UpsamplingBilinear2d(scale_factor=2)):
    further(type(_module), (X,), (2, 1, 3, 2), through=_module)
for _rank in (1, 2, 3):
    _image, _size = (2, 1, *range(2, 2 + _rank)), [4, 3, 5][:_rank]
    for _name in ("upsample_nearest", "_upsample_nearest_exact"):
        _packet = getattr(aten, f"{_name}{_rank}d")
        further(_packet.default, (X, _size), _image)
        further(_packet.vec, (X, _size, None), _image)
    _packet = (aten.upsample_linear1d, aten.upsample_bilinear2d, aten.upsample_trilinear3d)[_rank - 1]
    further(_packet.default, (X, _size, True), _image)
    further(_packet.vec, (X, _size, False, None), _image)
for _key in (torch.adaptive_avg_pool1d, aten.adaptive_avg_pool1d.default):
    further(_key, (X, [2]), (2, 2, 5))
for _key in (aten.adaptive_avg_pool3d.default, aten._adaptive_avg_pool3d.default):
    further(_key, (X, [1, 2, 2]), (2, 1, 2, 3, 4))
for _key in (F.adaptive_max_pool3d_with_indices, aten.adaptive_max_pool3d.default):
    further(_key, (X, [1, 2, 2]), (2, 1, 2, 3, 4), item=0)
for _key in (aten.reflection_pad3d.default, aten.replication_pad3d.default):
    further(_key, (X, [1, 0, 1, 1, 0, 1]), (2, 1, 2, 3, 4))
further(aten.col2im.default, (X, [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]), (2, 8, 4))
further(aten.linalg_matrix_norm.str_ord, (X, "fro"), (2, 3, 4))


@dataclass
class Row:
    """One rule under one key: its cells, or the reason why there is none."""

    key: Key
    cells: dict[str, Cell | str]

    @property
    def name(self) -> str:
        return spelling(self.key)


@cache
def row(rule: type[DualLayer], key: Key) -> Row:
    """Fill a row: for each column the first call that PyTorch allows there."""
    cells: dict[str, Cell | str] = dict.fromkeys((*AXES, "in place"), "no call could be made from a sample")
    if isinstance(key, torch._ops.OpOverload):
        cells["in place"] = NO_TWIN
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call, sample, fixed in calls(rule, key):
            for column in AXES:
                if not isinstance(cells[column], Cell):
                    cells[column] = allowed(call, sample, fixed, column)
                if isinstance(cells[column], Cell) and isinstance(key, torch._ops.OpOverload):
                    return Row(key, cells)
            if not isinstance(cells["in place"], Cell):
                cells["in place"] = in_place(call, sample, fixed, key)
            if all(isinstance(cell, Cell) for cell in cells.values()):
                break
    return Row(key, cells)


NO_TWIN = "PyTorch has no such spelling"


def in_place(call: Call, sample: RuleSample, fixed: int, key: Key) -> Cell | str:
    """Find the call that writes its result into its first input, if PyTorch has one."""
    twin, reason = twin_of(call, key), NO_TWIN
    if twin is not None and slots(call.args[:1]) != [0]:
        return "its first argument is a constant"
    for column in AXES if twin is not None else ():
        cell = allowed(call, sample, fixed, column)
        if isinstance(cell, str):
            reason = cell
            continue
        mask = 0 in call.truths
        cell = replace(cell, call=replace(twin, args=(Slot(0), *twin.args[1:])) if mask else twin, mask=mask)
        inputs = cell.draw(2, torch.Generator().manual_seed(3))
        try:
            expected, written = run(call, inputs), [z.clone() for z in inputs]
            written[0] = written[0] != 0 if mask else written[0]
            cell.call(*written)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        if written[0].shape == expected.shape and torch.allclose(written[0].double(), expected, 0, 0, equal_nan=True):
            return cell
        reason = "it does not write its result"
    return reason


def twin_of(call: Call, key: Key) -> Call | None:
    """Return the call in place: ``relu_``, ``inplace=True``, ``+=``."""
    if isinstance(call.operator, nn.Module):
        if not hasattr(call.operator, "inplace"):
            return None
        twin = copy.deepcopy(call.operator)
        twin.inplace = True
        return replace(call, operator=twin)
    if key in AUGMENTED:
        return replace(call, operator=AUGMENTED[key])
    if isinstance(key, str):
        name = f"__i{key[2:]}" if key.startswith("__") else f"{key}_"
        return replace(call, operator=name) if hasattr(Tensor, name) else None
    if inspect.isfunction(key) and "inplace" in inspect.signature(key).parameters:
        return replace(call, kwargs={**call.kwargs, "inplace": True})
    name = f"{getattr(key, '__name__', '')}_"
    places = [place for place in (torch, F) if getattr(place, name[:-1], None) is key and hasattr(place, name)]
    return replace(call, operator=getattr(places[0], name)) if places else None
