"""The logarithm of a sum of exponentials over some axes: convex, increasing, and the core of softmax."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dual_layers.contract import INPUT, Call, Choice, Facts, Interval, Offsets, RuleSample, Slopes
from dual_layers.families import Relaxed
from dual_layers.refusals import unless_only
from dual_layers.registry import register
from dual_layers.smooth import ROUNDING

_ATEN = torch.ops.aten

STEPS = 16
"""Steps of the searches for the place at which a plane touches; Newton's method needs about five."""

CORNERS = 3
"""Summands whose two ends are both tried; of so many summands the upper offset is exact."""


@register(torch.logsumexp, "logsumexp", torch.special.logsumexp, _ATEN.logsumexp.default, _ATEN.special_logsumexp.default)
class DualLogSumExp(Relaxed):
    """Logarithm of a sum of exponentials over axes: one plane below and one above, with a slope for every summand.

    It is convex, so it lies above its tangent plane at any point ``t``, and some ``t_j = clamp(log a_j + s, l_j, u_j)`` is
    the point at which a plane of slopes ``a`` touches it. Above, a plane touches at a corner of the box. There
    ``log S <= s - 1 + S exp(-s)`` for any ``s`` lets every summand choose its end by itself; the largest summands try both.
    So two searches for a number ``s`` find the planes, and whatever they find is sound.

    Source: conjugation over the box (thesis, Theorem 3, eq. 3.42).
    """

    facts: ClassVar[Facts] = Facts(monotone=True, convex=True)
    source: ClassVar[str] = "convex; thesis, Theorem 3 (eq. 3.42), on tangent planes"

    @staticmethod
    def parameters(input: Any, dim: Any, keepdim: bool = False) -> dict[str, Any]:
        """Name the arguments of ``torch.logsumexp``."""
        return {"input": input, "dim": dim, "keepdim": keepdim}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse arguments without a name here."""
        return unless_only(cls, call, "input")

    def interval(self, *boxes: Interval) -> Interval:
        """Take the ends: exact."""
        ends = boxes[0].map(self.forward)
        largest = torch.finfo(ends.lower.dtype).max  # infinite is the value of an overflow, never of the function
        lower = ends.lower.nan_to_num(nan=-torch.inf, posinf=largest, neginf=-torch.inf)
        return Interval(lower, ends.upper.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf))

    def slopes(self, bounds: tuple[Interval, ...], choice: Choice) -> Slopes:
        """Try the middle's tangent and chords above; below, the middle's tangent is the highest plane there."""
        box, shape = self._columns(bounds[0]), bounds[0].lower.shape
        lower, upper = finite(box)
        middle = 0.5 * lower + 0.5 * upper
        candidates = torch.stack([torch.softmax(middle, -1), _chords(lower, upper), _exponential_chords(lower, upper)])
        with torch.no_grad():
            cost = torch.stack([_above(lower, upper, slope) for slope in candidates])
            if choice == "parallel":
                cost = cost - torch.stack([_below(lower, upper, slope) for slope in candidates])
            else:
                cost = cost + (candidates * middle).sum(-1)
            best = cost.nan_to_num(nan=torch.inf).argmin(0)[None, ..., None].expand(1, *middle.shape)
        above, tangent = (
            restored(_usable(each, box), self._axes(len(shape)), shape)
            for each in (candidates.gather(0, best)[0], candidates[0])
        )
        both = (above,)
        return Slopes(both, both) if choice == "parallel" else Slopes((tangent,), both)

    def conjugate(self, slopes: Slopes, bounds: tuple[Interval, ...]) -> Offsets:
        """Bound ``f(z) - slope . z`` by a tangent plane from below, and by the corners of the box from above."""
        box, (below, above) = self._columns(bounds[0]), (self._stacked(side[0]) for side in (slopes.lower, slopes.upper))
        lower, upper = finite(box)
        low, high = _below(lower, upper, below), _above(lower, upper, above)
        endless, known = ~(box.lower.isfinite() & box.upper.isfinite()), (box.upper < torch.inf).all(-1)
        low = torch.where((endless & (below != 0)).any(-1), -torch.inf, low.nan_to_num(nan=-torch.inf))
        high = torch.where((endless & (above != 0)).any(-1) | ~known, torch.inf, high.nan_to_num(nan=torch.inf))
        shape = self._output_shape(bounds[0].lower.shape)
        return Offsets(low.reshape(shape), high.reshape(shape))

    def pull(self, nu: Tensor, slopes: Slopes, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Give every summand its share of the sum's ``nu``."""
        return super().pull(nu.reshape(len(nu), *self._output_shape(inputs[0].shape, keepdim=True)), slopes, inputs)

    def push(self, slopes: tuple[Tensor, ...], points: tuple[Tensor, ...]) -> Tensor:
        """Add up the summands' shares; a slope of zero ignores an infinite point."""
        shares = torch.where(slopes[0] == 0, 0.0, slopes[0] * points[0])
        return shares.sum(self._axes(slopes[0].dim()), keepdim=self.arguments.keepdim)

    def _axes(self, rank: int) -> tuple[int, ...]:
        """Return the axes that are summed over, counted from the end: a leading axis of rows moves none of them."""
        dim = self.arguments.dim
        return tuple(axis % rank - rank for axis in ((dim,) if isinstance(dim, int) else dim))

    def _output_shape(self, shape: torch.Size, *, keepdim: bool = False) -> tuple[int, ...]:
        summed = {axis + len(shape) for axis in self._axes(len(shape))}
        kept = keepdim or self.arguments.keepdim
        return tuple(1 if axis in summed else size for axis, size in enumerate(shape) if kept or axis not in summed)

    def _stacked(self, z: Tensor) -> Tensor:
        return stacked(z, self._axes(z.dim()))

    def _columns(self, box: Interval) -> Interval:
        return box.map(self._stacked)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, one summand to many, several axes at once, and values far apart."""
        yield RuleSample("function", Call(torch.logsumexp, (INPUT, 1)), ((2, 5),))
        yield RuleSample("two summands", Call(torch.logsumexp, (INPUT, -1)), ((2, 4, 2),), low=-3.0, high=3.0)
        yield RuleSample("one summand", Call("logsumexp", (INPUT, -1)), ((2, 1),))
        yield RuleSample("middle axis, keepdim", Call("logsumexp", (INPUT, 1, True)), ((2, 4, 3),), low=-1.0, high=2.0)
        yield RuleSample("two axes", Call(torch.special.logsumexp, (INPUT, [3, 1])), ((2, 3, 2, 2),), low=-4.0, high=1.0)
        yield RuleSample("two axes, keepdim", Call(torch.logsumexp, (INPUT,), {"dim": (-1, 1), "keepdim": True}), ((2, 3, 4),))
        yield RuleSample("many summands", Call(_ATEN.logsumexp.default, (INPUT, [1])), ((2, 12),), low=-2.0, high=2.0)
        yield RuleSample("far apart", Call(torch.logsumexp, (INPUT, 1)), ((2, 4),), low=-1e4, high=1e4)
        yield RuleSample("no such axis", Call(torch.logsumexp, (INPUT, 2)), ((2, 3),), error=IndexError, message="out of range")
        named = Call(torch.logsumexp, (INPUT,), {"dim": 1, "out": torch.zeros(2)})
        yield RuleSample("out", named, ((2, 3),), error=ValueError, message="unexpected keyword argument 'out'")


def stacked(z: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Bring some axes together, as the last one."""
    return z.movedim(axes, tuple(range(-len(axes), 0))).flatten(-len(axes))


def restored(z: Tensor, axes: tuple[int, ...], shape: torch.Size) -> Tensor:
    """Undo ``stacked``; ``shape`` is what there was before."""
    return z.unflatten(-1, [shape[axis] for axis in axes]).movedim(tuple(range(-len(axes), 0)), axes)


def others(z: Tensor) -> Tensor:
    """Return, for every element, ``logsumexp`` along the last axis of all the other ones.

    The largest element is left out by name, not by subtraction, so that nothing cancels.
    """
    largest, first = z.max(-1, keepdim=True)
    own = torch.zeros_like(z, dtype=torch.bool).scatter(-1, first, torch.ones_like(first, dtype=torch.bool))
    rest = torch.logsumexp(z.masked_fill(own, torch.finfo(z.dtype).min / 4), -1, keepdim=True)
    shares = torch.exp(z - largest)
    total = (shares.sum(-1, keepdim=True) - torch.where(own, 0.0, shares)).clamp(min=1)
    return torch.where(own, rest, largest + torch.log(total))


def finite(box: Interval) -> tuple[Tensor, Tensor]:
    """Return the ends of a box as numbers: for infinite and unknown ones, far from everything and short of overflow."""
    far = torch.finfo(box.lower.dtype).max / 16
    return box.lower.nan_to_num(nan=-far).clamp(-far, far), box.upper.nan_to_num(nan=far).clamp(-far, far)


def _usable(slope: Tensor, box: Interval) -> Tensor:
    usable = box.lower.isfinite() & box.upper.isfinite() & slope.isfinite()
    return torch.where(usable, slope, 0.0)


def _chords(lower: Tensor, upper: Tensor) -> Tensor:
    """Return, scaled to a sum of one, each summand's chord of ``log(1 + exp(z - others))`` over all that it may be."""
    low, high = lower - others(upper), upper - others(lower)
    middle, width = 0.5 * low + 0.5 * high, high - low
    wide = width > 1e-3
    chord = torch.where(wide, F.softplus(high) - F.softplus(low), torch.sigmoid(middle)) / torch.where(wide, width, 1.0)
    return chord / chord.sum(-1, keepdim=True)


def _exponential_chords(lower: Tensor, upper: Tensor) -> Tensor:
    """Return the chords of the exponentials, scaled to a sum of one."""
    top, width = upper.max(-1, keepdim=True).values, upper - lower
    wide = width > 1e-3
    rise = torch.where(wide, torch.exp(upper - top) - torch.exp(lower - top), torch.exp(0.5 * (lower + upper) - top))
    chord = rise / torch.where(wide, width, 1.0)
    return chord / chord.sum(-1, keepdim=True)


def _solve(step: Callable[[Tensor], tuple[Tensor, Tensor]], low: Tensor, high: Tensor) -> Tensor:
    """Find where a falling function meets the diagonal, to rounding: ``step`` gives its value and Newton's next place."""
    place = 0.5 * low + 0.5 * high
    for _ in range(STEPS):
        value, guess = step(place)
        near = ROUNDING * torch.finfo(place.dtype).eps * (1 + place.abs())
        low, high = torch.where(value >= place - near, place, low), torch.where(value <= place + near, place, high)
        place = torch.where((guess > low) & (guess < high), guess, 0.5 * low + 0.5 * high)
    return place


def _below(lower: Tensor, upper: Tensor, slope: Tensor) -> Tensor:
    """Bound ``logsumexp(z) - slope . z`` from below over a box, along the last axis, by a tangent plane."""
    with torch.no_grad():
        shift = torch.log(slope.clamp(min=0))

        def step(s: Tensor) -> tuple[Tensor, Tensor]:
            """Add up the summands that the box holds fast, and the slopes of those that may follow ``s``."""
            free = (shift + s > lower) & (shift + s < upper)
            held = torch.minimum(torch.maximum(shift + s, lower), upper)
            value = torch.logsumexp(held, -1, keepdim=True)
            fixed = torch.logsumexp(torch.where(free, -torch.inf, held), -1, keepdim=True)
            return value, fixed - torch.log1p(-torch.where(free, slope, 0.0).sum(-1, keepdim=True))

        ends = (torch.logsumexp(end, -1, keepdim=True) for end in (lower, upper))
        touch = torch.minimum(torch.maximum(shift + _solve(step, *ends), lower), upper)
    at = torch.where(touch == lower, lower, torch.where(touch == upper, upper, touch))  # an end brings its derivative along
    value = torch.logsumexp(at, -1)
    with torch.no_grad():
        share, roundoff = torch.softmax(at, -1), ROUNDING * torch.finfo(at.dtype).eps
        slack = roundoff * (share * (2 + (at - value[..., None]).abs()) + slope.abs())  # of a tangent's slope
        fall = torch.maximum((slack + slope - share) * (upper - at), (slack + share - slope) * (at - lower)).clamp(min=0)
        loss = fall.sum(-1) + roundoff * ((slope * at).abs().sum(-1) + value.abs())
    return value - (slope * at).sum(-1) - loss


def _above(lower: Tensor, upper: Tensor, slope: Tensor) -> Tensor:
    """Bound ``logsumexp(z) - slope . z`` from above over a box, along the last axis."""
    count = min(CORNERS, lower.shape[-1])
    with torch.no_grad():
        largest = (upper + torch.log1p(-torch.exp(lower - upper))).topk(count, -1).indices
        high = torch.cartesian_prod(*[torch.tensor([False, True], device=lower.device)] * count).reshape(2**count, count)
        high = high.reshape(2**count, *[1] * (lower.dim() - 1), count)
    fixed = torch.where(high, upper.gather(-1, largest), lower.gather(-1, largest))
    largest = largest.expand(fixed.shape)
    corners = (end.expand(len(fixed), *end.shape).scatter(-1, largest, fixed) for end in (lower, upper))
    return _above_corner(*corners, slope.expand(len(fixed), *slope.shape)).amax(0)


def _above_corner(lower: Tensor, upper: Tensor, slope: Tensor) -> Tensor:
    """Bound ``logsumexp(z) - slope . z`` from above, every summand for itself, by the best ``s`` among three."""
    with torch.no_grad():
        width, wide = upper - lower, upper > lower
        # Above this s a summand's lower end is the better one.
        turn = upper + torch.log1p(-torch.exp(-width)) - torch.log((slope * width).clamp(min=0))
        turn = torch.where(wide, turn, torch.inf)

        def step(s: Tensor) -> tuple[Tensor, Tensor]:
            value = torch.logsumexp(torch.where(turn > s, upper, lower), -1, keepdim=True)
            return value, value

        s = _solve(step, *(torch.logsumexp(end, -1, keepdim=True) for end in (lower, upper)))
        settled = step(s)[0]
        nearest = (turn - s).abs().nan_to_num(nan=torch.inf).argmin(-1, keepdim=True)
    places = [s, settled, _turn(lower, upper, slope, nearest, s)]
    return torch.stack([_above_at(lower, upper, slope, place) for place in places]).amin(0)


def _turn(lower: Tensor, upper: Tensor, slope: Tensor, index: Tensor, otherwise: Tensor) -> Tensor:
    """Return the ``s`` at which a summand changes its end, with derivative: a kink of the bound, and often its minimum."""
    low, high, rate = (part.gather(-1, index) for part in (lower, upper, slope))
    usable = (rate > 0) & (rate * (high - low) > torch.finfo(low.dtype).tiny)
    low, rate = torch.where(usable, low, high - 1), torch.where(usable, rate, 1.0)
    return torch.where(usable, high + torch.log(-torch.expm1(low - high)) - torch.log(rate * (high - low)), otherwise)


def _above_at(lower: Tensor, upper: Tensor, slope: Tensor, s: Tensor) -> Tensor:
    limits = torch.finfo(s.dtype)
    most = torch.tensor(0.5 * math.log(limits.max), dtype=s.dtype, device=s.device)
    ends = [torch.exp(torch.minimum(end - s, most)) - slope * end for end in (lower, upper)]
    with torch.no_grad():
        reach = slope.abs() * torch.maximum(lower.abs(), upper.abs())
        height = torch.minimum(upper - s, most)
        slack = (reach + torch.exp(height) * (2 + height.abs())).sum(-1) + s[..., 0].abs() + 1
    value = s[..., 0] - 1 + torch.maximum(*ends).sum(-1) + ROUNDING * limits.eps * slack
    return torch.where((upper - s > most).any(-1), torch.inf, value)
