"""Values known between two lines, ``lower(z) <= value <= upper(z)``, while an element-wise function of ``z`` runs on them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dual_layers.bilinear import DualProduct
from dual_layers.contract import Call, Interval, Offsets, Slopes, Slot
from dual_layers.families import Affine, Composite, PiecewiseLinear, Relaxed, known
from dual_layers.registry import cases, choose, is_shape_query, spelling
from dual_layers.smooth import Smooth

ROUNDING = 4.0
"""Roundoffs of the terms that enter which each operation may cost."""

LEVEL = 0.75
"""Lines along a chord that leave more than this share of the range are level instead: across a jump they would be steep."""

_SYMBOLS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_COMPARISONS = {"gt": (">", "greater"), "ge": (">=", "greater_equal"), "lt": ("<", "less"), "le": ("<=", "less_equal")}
_SIGNS = {
    key: sign
    for short, (sign, long) in _COMPARISONS.items()
    for key in (short, long, f"__{short}__", getattr(operator, short), getattr(torch, short), getattr(torch, long))
}


class NoRuleError(ValueError):
    """A function contains a call that cannot be followed."""


class Line(NamedTuple):
    """``slope * z + offset`` on every cell."""

    slope: Tensor
    offset: Tensor


class Standin:
    """What stands in for a tensor: PyTorch hands its functions over, Python its symbols."""

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Follow a function."""
        return _follow(_key(function), args, kwargs or {})

    def __bool__(self) -> bool:
        """Refuse a truth value."""
        raise NoRuleError("a Python branch depends on values; write it with torch.where or torch.clamp")


class Band(Standin):
    """A value over cells of ``z``, all tensors ``[cells, *shape]``.

    Attributes:
        cell: where ``z`` lies.
        lower: a line that the value is not below.
        upper: a line that the value is not above.
        box: what the value lies in.
        size: magnitude of the terms that have entered; float rounding is proportional to it.
    """

    def __init__(self, cell: Interval, lower: Line, upper: Line, box: Interval, size: Tensor) -> None:
        self.cell, self.lower, self.upper, self.box, self.size = cell, lower, upper, box, size

    @classmethod
    def variable(cls, cell: Interval) -> Band:
        """Return ``z`` itself."""
        line = Line(torch.ones_like(cell.lower), torch.zeros_like(cell.lower))
        return cls(cell, line, line, cell, torch.maximum(cell.lower.abs(), cell.upper.abs()).detach())

    @classmethod
    def between(cls, cell: Interval, lower: Line, upper: Line, size: Tensor, box: Interval | None = None) -> Band:
        """Return a value with room for what rounding may have done; its box meets what the lines leave."""
        size = size.detach().nan_to_num(posinf=0.0)
        lower, upper = _settled(lower, size, 1.0), _settled(upper, size, -1.0)
        left = known(Interval(_ends(cell, lower, torch.minimum), _ends(cell, upper, torch.maximum)))
        return cls(cell, lower, upper, left if box is None else _meet(_wider(box), left), size)

    @classmethod
    def combined(cls, bands: list[Band], below: list[Tensor], above: list[Tensor], offset: Interval, box: Interval) -> Band:
        """Return a value between ``sum of below * band + offset.lower`` and ``sum of above * band + offset.upper``."""
        lower = _sum([(band.lower, band.upper, slope) for band, slope in zip(bands, below, strict=True)], offset.lower)
        upper = _sum([(band.upper, band.lower, slope) for band, slope in zip(bands, above, strict=True)], offset.upper)
        steepest = (torch.maximum(a.abs(), b.abs()) for a, b in zip(below, above, strict=True))
        size = sum(times(slope, band.size) for slope, band in zip(steepest, bands, strict=True))
        return cls.between(bands[0].cell, lower, upper, size + torch.maximum(offset.lower.abs(), offset.upper.abs()), box)

    @classmethod
    def joined(cls, parts: list[Band]) -> Band:
        """Lay bands over different cells behind one another."""
        if len(parts) == 1:
            return parts[0]
        boxes = (
            Interval(torch.cat([b.lower for b in ends]), torch.cat([b.upper for b in ends]))
            for ends in ([part.cell for part in parts], [part.box for part in parts])
        )
        lines = [
            Line(*map(torch.cat, zip(*sides, strict=True))) for sides in ([p.lower for p in parts], [p.upper for p in parts])
        ]
        cell, box = boxes
        return cls(cell, *lines, box, torch.cat([part.size for part in parts]))

    def as_band(self, value: Any) -> Band:
        """Return a value, which may not depend on ``z``, as a band over the same cells."""
        if isinstance(value, Band):
            return value
        value = torch.as_tensor(value, dtype=self.dtype, device=self.device).expand(self.shape)
        line = Line(torch.zeros_like(value), value)
        return Band(self.cell, line, line, Interval(value, value), value.detach().abs())

    @property
    def lines(self) -> tuple[Line, Line]:
        """Both lines, level ones where these are better in the middle of the cell."""
        return _better(self, self.lower, self.box.lower, 1.0), _better(self, self.upper, self.box.upper, -1.0)

    @property
    def shape(self) -> torch.Size:
        """Shape, with the cells in front."""
        return self.cell.lower.shape

    @property
    def ndim(self) -> int:
        """Number of axes, with that of the cells."""
        return self.cell.lower.ndim

    @property
    def dtype(self) -> torch.dtype:
        """The dtype."""
        return self.cell.lower.dtype

    @property
    def device(self) -> torch.device:
        """The device."""
        return self.cell.lower.device

    def __getattr__(self, name: str) -> Any:
        """Return a tensor's method."""
        if name.startswith("__") or not callable(getattr(torch.Tensor, name, None)):
            raise AttributeError(f"a value inside an element-wise function has no attribute {name!r}")
        return lambda *args, **kwargs: _follow(name, (self, *args), kwargs)


class Mask(Standin):
    """The outcome of a comparison: where it holds for all ``z`` of a cell, and where for some."""

    def __init__(self, like: Band, certain: Tensor, possible: Tensor) -> None:
        self.like, self.certain, self.possible = like, certain, possible

    def __and__(self, other: Mask) -> Mask:
        """Hold where both do."""
        return Mask(self.like, self.certain & other.certain, self.possible & other.possible)

    def __or__(self, other: Mask) -> Mask:
        """Hold where either does."""
        return Mask(self.like, self.certain | other.certain, self.possible | other.possible)

    def __invert__(self) -> Mask:
        """Hold where this does not."""
        return Mask(self.like, ~self.possible, ~self.certain)


def _symbol(function: Callable[..., Any], *, reflected: bool = False) -> Callable[..., Any]:
    return lambda self, *other: _follow(function, (*other, self) if reflected else (self, *other), {})


for _name in (*_SYMBOLS, "gt", "ge", "lt", "le", "neg", "abs", "pos"):
    setattr(Band, f"__{_name}__", _symbol(getattr(operator, _name)))
for _name in _SYMBOLS:
    setattr(Band, f"__r{_name}__", _symbol(getattr(operator, _name), reflected=True))


def _key(function: Any) -> Any:
    """Name a tensor's method; a symbol without a rule of its own goes by Python's function."""
    name = getattr(function, "__name__", "")
    if getattr(torch.Tensor, name, None) is not function:
        return function
    return name if cases(name) else getattr(operator, name, name)


def _follow(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply an operator to bands: by its rule, part by part where it is made of others.

    Raises:
        NoRuleError: there is no rule, or it mixes elements.
    """
    if function in _SIGNS:
        return _compare(*args, *kwargs.values(), sign=_SIGNS[function])
    masks = [value for value in (*args, *kwargs.values()) if isinstance(value, Mask)]
    if masks and function in (torch.where, "where") and len(args) == 3:
        return _choose(masks[0], *(value for value in args if value is not masks[0]))
    if masks:
        raise NoRuleError(f"{spelling(function)} of a comparison; choose with torch.where(condition, input, other)")
    bands: list[Band] = []
    args, kwargs = _places(args, bands), _places(kwargs, bands)
    call = Call(function, args, kwargs)
    if not isinstance(function, str) and is_shape_query(function):
        return call(*(band.cell.lower[0] for band in bands))
    rule, reason = choose(call)
    if rule is None:
        raise NoRuleError(f"{spelling(function)}: {reason or 'there is no rule for it'}")
    result = _apply(rule(call), bands)
    if not isinstance(result, Band) or result.shape != bands[0].shape:
        raise NoRuleError(f"{spelling(function)} changes the shape")
    return result


def _places(value: Any, bands: list[Band]) -> Any:
    """Put slots in the places of bands, which are collected, each once."""
    if isinstance(value, Band):
        known_ones = [index for index, band in enumerate(bands) if band is value]
        bands += [] if known_ones else [value]
        return Slot(known_ones[0] if known_ones else len(bands) - 1)
    if isinstance(value, (tuple, list)):
        return type(value)(_places(item, bands) for item in value)
    return {key: _places(item, bands) for key, item in value.items()} if isinstance(value, dict) else value


def _apply(layer: Any, bands: list[Band]) -> Any:
    facts = layer.facts
    if isinstance(layer, Composite):
        return layer.composed(*bands)
    if isinstance(layer, DualProduct):
        return _product(layer, bands)
    if isinstance(layer, Affine) and (facts.elementwise or facts.positionwise):
        return _affine(layer, bands)
    if isinstance(layer, Relaxed) and facts.positionwise:
        return _relaxed(layer, *bands)
    raise NoRuleError(f"{spelling(layer.call.operator)} does not work element by element")


def _affine(layer: Affine, bands: list[Band]) -> Band:
    """Read the coefficients off the operator, which works element by element; add up the boxes end by end.

    So zero stays an end of what cannot be negative, and a root that follows stays in its domain.
    """
    zeros = [torch.zeros_like(band.cell.lower) for band in bands]
    ones = [[torch.ones_like(zero) if i == j else zero for j, zero in enumerate(zeros)] for i in range(len(bands))]
    coefficients, constant = [layer.linear(*units) for units in ones], layer.forward(*zeros)
    ends = []
    for side in (1.0, -1.0):
        terms, slack = [constant], ROUNDING * torch.finfo(constant.dtype).eps
        for band, factor in zip(bands, coefficients, strict=True):
            near, far = (band.box.lower, band.box.upper) if side > 0 else (band.box.upper, band.box.lower)
            terms.append(times(factor, torch.where(factor >= 0, near, far)))
        ends.append(sum(terms) - side * slack * sum(term.detach().abs().nan_to_num(posinf=0.0) for term in terms))
    return Band.combined(bands, coefficients, coefficients, Interval(constant, constant), Interval(*ends))


def _relaxed(layer: Relaxed, band: Band) -> Band:
    """Follow a curve between two lines parallel to its chord over the box, or level ones where it jumps."""
    chord = _chord(layer, band.box)
    below, above = chord, chord
    if isinstance(layer, PiecewiseLinear) and not layer.jumps():  # at a kink one of two pieces is the better line
        slopes = layer.slopes((band.box,), "adaptive")
        (below,), (above,) = slopes.lower, slopes.upper
    offsets = layer.conjugate(Slopes((below,), (above,)), (band.box,))
    middle, whole = band.box.center, _range(layer, band.box, below, above, offsets)
    level = ~((above - below) * middle + offsets.upper - offsets.lower < LEVEL * (whole.upper - whole.lower))
    below, above = (torch.where(level, 0.0, slope) for slope in (below, above))
    offset = [torch.where(level, *ends) for ends in ((whole.lower, offsets.lower), (whole.upper, offsets.upper))]
    return Band.combined([band], [below], [above], Interval(*offset), whole)


def _chord(layer: Relaxed, box: Interval) -> Tensor:
    """Return the slope between the ends of the graph; 0 where there is none, or it has no end."""
    inner, outside = layer.within(box) if isinstance(layer, Smooth) else (box, torch.zeros_like(box.lower, dtype=torch.bool))
    rise, run = layer.forward(inner.upper) - layer.forward(inner.lower), inner.upper - inner.lower
    usable = ~outside & (run > 0) & box.lower.isfinite() & box.upper.isfinite() & run.isfinite() & rise.isfinite()
    return torch.where(usable, rise, 0.0) / torch.where(usable, run, 1.0)


def _range(layer: Relaxed, box: Interval, below: Tensor, above: Tensor, offsets: Offsets) -> Interval:
    """Enclose a curve over a box: by what the lines leave where its own interval would cost as much again."""
    if not isinstance(layer, Smooth) or layer.facts.monotone:
        return layer.interval(box)
    left = known(
        Interval(_ends(box, Line(below, offsets.lower), torch.minimum), _ends(box, Line(above, offsets.upper), torch.maximum))
    )
    return Interval(left.lower.clamp(min=layer.extent[0]), left.upper.clamp(max=layer.extent[1]))


def _product(layer: DualProduct, bands: list[Band]) -> Band:
    """Multiply: ``x y = b x + a y - a b + (x - a) (y - b)`` with the boxes' centres ``a`` and ``b``."""
    x, y = (band.box for band in bands)
    a, b = (torch.where(box.center.isfinite(), box.center, 0.0) for box in (x, y))
    spread = (x.upper - x.lower) * (y.upper - y.lower) / 4
    return Band.combined(bands, [b, a], [b, a], Interval(-a * b - spread, -a * b + spread), layer.enclose(x, y))


def _compare(first: Any, second: Any, *, sign: str) -> Mask:
    """Compare two values, one of them a band, by the ends of their boxes."""
    like = first if isinstance(first, Band) else second
    high, low = (like.as_band(value).box for value in ((first, second) if sign[0] == ">" else (second, first)))
    if len(sign) == 1:
        return Mask(like, high.lower > low.upper, high.upper > low.lower)
    return Mask(like, high.lower >= low.upper, high.upper >= low.lower)


def _choose(mask: Mask, first: Any, second: Any) -> Band:
    """Take the first value where the mask holds for all of a cell, the second where for none, else what holds both."""
    first, second, cell = mask.like.as_band(first), mask.like.as_band(second), mask.like.cell
    lower = _either(mask, cell, first.lower, second.lower, torch.minimum)
    upper = _either(mask, cell, first.upper, second.upper, torch.maximum)
    box = Interval(
        _select(mask, first.box.lower, second.box.lower, torch.minimum(first.box.lower, second.box.lower)),
        _select(mask, first.box.upper, second.box.upper, torch.maximum(first.box.upper, second.box.upper)),
    )
    size = _select(mask, first.size, second.size, torch.maximum(first.size, second.size))
    return Band.between(cell, lower, upper, size, box)


def _select(mask: Mask, first: Tensor, second: Tensor, both: Tensor) -> Tensor:
    return torch.where(mask.certain, first, torch.where(mask.possible, both, second))


def _either(mask: Mask, cell: Interval, first: Line, second: Line, extreme: Callable[..., Tensor]) -> Line:
    """Return the better of two lines where it is known which value is taken, else the line through the worse ends."""
    values = [[times(line.slope, end) + line.offset for line in (first, second)] for end in (cell.lower, cell.upper)]
    left, right = (extreme(*pair) for pair in values)
    run = cell.upper - cell.lower
    usable = (run > 0) & run.isfinite() & left.isfinite() & right.isfinite()
    slope = torch.where(usable, right - left, 0.0) / torch.where(usable, run, 1.0)
    offset = torch.where(usable, left - slope * cell.lower, extreme(left, right))
    return Line(_select(mask, first.slope, second.slope, slope), _select(mask, first.offset, second.offset, offset))


def _sum(terms: list[tuple[Line, Line, Tensor]], offset: Tensor) -> Line:
    """Add up multiples of lines; a negative factor takes the line of the other side."""
    slope = torch.zeros_like(offset)
    for own, other, factor in terms:
        slope = slope + factor * torch.where(factor >= 0, own.slope, other.slope)
        offset = offset + times(factor, torch.where(factor >= 0, own.offset, other.offset))
    return Line(slope, offset)


def _settled(line: Line, size: Tensor, side: float) -> Line:
    """Move a line outwards (``side`` 1: down) by what rounding may have done to it; one that is not known is infinite."""
    limits, unknown = torch.finfo(size.dtype), ~line.slope.isfinite() | line.offset.isnan()
    slack = ROUNDING * (limits.eps * (size + line.offset.detach().abs().nan_to_num(posinf=0.0)) + limits.tiny)
    return Line(torch.where(unknown, 0.0, line.slope), torch.where(unknown, -side * torch.inf, line.offset - side * slack))


def _ends(cell: Interval, line: Line, extreme: Callable[..., Tensor]) -> Tensor:
    return extreme(times(line.slope, cell.lower), times(line.slope, cell.upper)) + line.offset


def _better(band: Band, line: Line, level: Tensor, side: float) -> Line:
    """Return the line, or a level one where that is at least as far inwards (``side`` 1: high) in the middle."""
    keep = side * (line.slope * band.cell.center + line.offset - level) > 0
    return Line(torch.where(keep, line.slope, 0.0), torch.where(keep, line.offset, level))


def _meet(box: Interval, other: Interval) -> Interval:
    """Intersect two boxes; ends that rounding made cross stay."""
    lower, upper = torch.maximum(box.lower, other.lower), torch.minimum(box.upper, other.upper)
    crossed = lower > upper
    return Interval(torch.where(crossed, box.lower, lower), torch.where(crossed, box.upper, upper))


def _wider(box: Interval) -> Interval:
    """Move the ends of a box outwards by what rounding may have done to them, zero stays; NaN becomes infinity."""
    box, roundoff = known(box), ROUNDING * torch.finfo(box.lower.dtype).eps
    below, above = (roundoff * end.detach().abs().nan_to_num(posinf=0.0) for end in (box.lower, box.upper))
    return Interval(box.lower - below, box.upper + above)


def times(factor: Tensor, value: Tensor) -> Tensor:
    """Multiply, with ``0 * inf = 0``; infinity passes no derivative on."""
    endless = value.isinf()
    finite = factor * torch.where(endless, 0.0, value)
    return torch.where(endless & (factor != 0), factor.detach().sign() * value.detach(), finite)
