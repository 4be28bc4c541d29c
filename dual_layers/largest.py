"""The largest of several elements that all depend on the input: the rule that maxima and pooling are made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from dual_layers._recorded import recorded
from dual_layers.contract import INPUT, Call, Choice, Facts, Interval, Offsets, RuleSample, Slopes, Slot
from dual_layers.families import Relaxed
from dual_layers.refusals import unless_only
from dual_layers.registry import register, register_held

_SIDES = "thesis, Theorem 3 (eq. 3.42), over the box and the box of the differences"

POSITIONS = "the positions of the largest elements jump: only the values have bounds"


@recorded
def pivot(z: Tensor, distinct: Tensor | None = None) -> Tensor:
    """Return where the largest element of the last axis is, ``[..., 1]``: the one that the others are compared with."""
    return (z if distinct is None else torch.where(distinct, z, -torch.inf)).argmax(-1, keepdim=True)


register_held(pivot)


@recorded
def largest(z: Tensor, at: Tensor, behind: Tensor | None = None, distinct: Tensor | None = None) -> Tensor:
    """Return the largest element of the last axis.

    Args:
        z: ``[..., n]``.
        at: any index along the last axis, ``[..., 1]`` or what broadcasts to it.
        behind: ``z`` less its element there, ``[..., n]``. It changes no value; its bounds help those of the result.
        distinct: false where an element only repeats another one, ``[..., n]`` or what broadcasts to it.
    """
    return z.amax(-1)


def largest_of(z: Any, distinct: Tensor | None = None) -> Any:
    """Return the largest element of the last axis, written so that differences within it are bounded too."""
    if z.shape[-1] == 1:
        return z.squeeze(-1)
    at = pivot(z, distinct)
    return largest(z, at, z - torch.take_along_dim(z, at, -1), distinct)


@register(largest)
class DualLargest(Relaxed):
    """The largest of several elements, given their box and that of their differences from one of them, the pivot.

    Whatever decides between neighbours is mostly in their difference, whose bounds come from the whole network before
    it. So the plane of slopes ``a`` is judged twice, over the box of ``z`` and, since

        max_j z_j - a . z  =  (1 - sum_j a_j) z_p + max_j d_j - a . d,       d_j = z_j - z_p,

    over the boxes of ``z_p`` and ``d``. Either time the maximum is one of an affine function for each ``j``, and the
    minimum one of a convex function of a single number ``v``, the largest element: all others lie as far below ``v`` as
    helps. The differences receive no ``nu`` of their own, being linear in ``z``.

    Source: conjugation over the box (thesis, Theorem 3, eq. 3.42).
    """

    facts: ClassVar[Facts] = Facts(monotone=True, convex=True)
    source: ClassVar[str] = _SIDES

    @staticmethod
    def parameters(z: Any, at: Any, behind: Any = None, distinct: Any = None) -> dict[str, Any]:
        """Name the arguments of ``largest``."""
        return {"z": z, "at": at, "behind": behind, "distinct": distinct}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a perturbed index."""
        return unless_only(cls, call, "z", "behind")

    def interval(self, *boxes: Interval) -> Interval:
        """Take the ends: exact."""
        return boxes[0].map(lambda end: end.amax(-1))

    def undecided(self, bounds: tuple[Interval, ...]) -> Tensor:
        """Tell which elements may be the largest, where more than one may."""
        rivals = self._rivals(*self._boxes(bounds))
        return rivals & (rivals.sum(-1, keepdim=True) > 1)

    def slopes(self, bounds: tuple[Interval, ...], choice: Choice) -> Slopes:
        """Take the better of two planes, made for the box and for the box of differences; below, the largest element."""
        z, d = self._boxes(bounds)
        rivals, at = self._rivals(z, d), self._at(z.lower)
        apart = _plane(d, rivals, choice)
        planes = _plane(z, rivals, choice), apart + at * (1 - apart.sum(-1, keepdim=True))
        bounded = z.lower.isfinite() & z.upper.isfinite()
        middle = torch.where(bounded, z.center, 0.0)
        with torch.no_grad():
            costs = [self._above(z, d, rivals, plane) for plane in planes]
            if choice == "parallel":
                costs = [cost - self._below(z, d, plane) for cost, plane in zip(costs, planes, strict=True)]
            else:
                costs = [cost + (plane * middle).sum(-1) for cost, plane in zip(costs, planes, strict=True)]
            better = (costs[1] < costs[0]).unsqueeze(-1)
        above = torch.where(better, planes[1], planes[0])
        if choice == "parallel":
            both = (above,)
            return Slopes(both, both)
        return Slopes((_one_hot(torch.where(rivals & bounded, middle, -torch.inf)),), (above,))

    def alternatives(self, bounds: tuple[Interval, ...], cells: int) -> list[tuple[Tensor, ...]]:
        """List the elements one by one: the largest lies above each."""
        z = bounds[0].lower
        return [(row.expand_as(z),) for row in torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)]

    def conjugate(self, slopes: Slopes, bounds: tuple[Interval, ...]) -> Offsets:
        """Bound ``f(z) - slope . z`` over the box and over the box of differences, and keep the better bound."""
        z, d = self._boxes(bounds)
        return Offsets(self._below(z, d, slopes.lower[0]), self._above(z, d, self._rivals(z, d), slopes.upper[0]))

    def pull(self, nu: Tensor, slopes: Slopes, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Give every element its share."""
        return super().pull(nu.unsqueeze(-1), slopes, inputs[:1])

    def push(self, slopes: tuple[Tensor, ...], points: tuple[Tensor, ...]) -> Tensor:
        """Add up the shares."""
        return times(slopes[0], points[0]).sum(-1)

    def _at(self, like: Tensor) -> Tensor:
        """Mark the pivot."""
        at = self.arguments.at.expand(*like.shape[:-1], 1)
        return torch.zeros_like(like, dtype=torch.bool).scatter(-1, at, True)

    def _boxes(self, bounds: tuple[Interval, ...]) -> tuple[Interval, Interval]:
        """Return the boxes of the elements and of their differences from the pivot; unknown ends are infinite."""
        z, at = known(bounds[0]), self._at(bounds[0].lower)
        low, high = (torch.where(at, end, 0.0).sum(-1, keepdim=True) for end in (z.lower, z.upper))
        d = known(Interval(z.lower - high, z.upper - low))
        if len(bounds) > 1:
            own = known(bounds[1])
            lower, upper = torch.maximum(d.lower, own.lower), torch.minimum(d.upper, own.upper)
            d = Interval(torch.where(lower > upper, own.lower, lower), torch.where(lower > upper, own.upper, upper))
        return z, Interval(torch.where(at, 0.0, d.lower), torch.where(at, 0.0, d.upper))

    def _rivals(self, z: Interval, d: Interval) -> Tensor:
        """Mark elements that may be the largest: all others lie below one of these, always."""
        at, floor = self._at(z.lower), z.lower.amax(-1, keepdim=True)
        given = self.arguments.distinct
        distinct = torch.ones_like(at) if given is None else given
        high = (z.upper > floor) | (at & (z.upper == floor)) | _one_hot(torch.where(distinct, z.lower, -torch.inf)).bool()
        rivals = high & distinct & ((d.upper > 0) | at)
        return rivals | (at & ~rivals.any(-1, keepdim=True))

    def _above(self, z: Interval, d: Interval, rivals: Tensor, slope: Tensor) -> Tensor:
        """Bound ``max_j z_j - slope . z`` from above: each ``j`` over both boxes, the larger of all ``j``."""
        left = 1 - slope.sum(-1, keepdim=True)
        over_z = _one_more(z, slope)
        over_d = _one_more(d, slope) + most(left, self._pivot_of(z))
        either = torch.fmin(over_z, over_d)
        return torch.where(rivals, torch.where(either.isnan(), torch.inf, either), -torch.inf).amax(-1)

    def _below(self, z: Interval, d: Interval, slope: Tensor) -> Tensor:
        """Bound ``max_j z_j - slope . z`` from below over both boxes, and keep the larger bound."""
        left = 1 - slope.sum(-1, keepdim=True)
        either = torch.fmax(_least(z, slope), _least(d, slope) - most(-left, self._pivot_of(z))[..., 0])
        return torch.where(either.isnan(), -torch.inf, either)

    def _pivot_of(self, z: Interval) -> Interval:
        at = self._at(z.lower)
        return z.map(lambda end: torch.where(at, end, 0.0).sum(-1, keepdim=True))

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield any pivot, two elements and many, and a single one."""
        first = torch.tensor([0])
        yield RuleSample("four", Call(largest, (INPUT, first + 2)), ((2, 4),))
        yield RuleSample("two", Call(largest, (INPUT, first)), ((2, 3, 2),))
        yield RuleSample("pivot by example", Call(largest, (INPUT, torch.tensor([[1], [6]]))), ((2, 7),), batch_axis=None)
        yield RuleSample("one", Call(largest, (INPUT, first)), ((2, 3, 1),))
        repeated = torch.tensor([True, True, False])
        yield RuleSample("none repeated", Call(largest, (INPUT, first), {"distinct": ~repeated | repeated}), ((2, 3),))
        wrong = "at must not depend on the input"
        yield RuleSample("perturbed index", Call(largest, (INPUT, Slot(1))), ((2, 3), (2, 1)), error=ValueError, message=wrong)


def known(box: Interval) -> Interval:
    """Read NaN as an end that is not known."""
    lower, upper = torch.where(box.lower.isnan(), -torch.inf, box.lower), torch.where(box.upper.isnan(), torch.inf, box.upper)
    return Interval(lower, upper)


def _one_hot(z: Tensor) -> Tensor:
    """Return 1 at the largest element, the first one of equals, and 0 elsewhere; all 0 where that is infinite."""
    best = z.argmax(-1, keepdim=True)
    return torch.zeros_like(z).scatter(-1, best, z.gather(-1, best).isfinite().to(z.dtype))


def _plane(box: Interval, rivals: Tensor, choice: Choice) -> Tensor:
    """Return the slopes of a good plane above the largest element of a box, and with ``parallel`` below it too.

    With ``L`` the largest lower end, slopes ``a_j = (u_j - t)_+ / (u_j - l_j)``, ``t >= L``, give the plane

        a . (z - l) + t,     for which t is the least offset.

    Its value in the middle, ``t + sum_j (u_j - t)_+ / 2``, is least for ``t`` between the third largest upper end and the
    second. Slopes that sum to one follow whatever moves all elements alike: those of the chord, where there are two. For a
    parallel plane below the rest of the slopes, ``1 - sum_j a_j``, goes to the element of largest lower end, and the gap
    ``t - L + sum_j (u_j - t)_+ (L - l_j) / (u_j - l_j)`` is convex in ``t``.
    """
    floor = box.lower.amax(-1, keepdim=True)
    used = rivals & (box.upper > floor) & box.lower.isfinite() & box.upper.isfinite()
    rise = torch.where(used, box.upper - torch.where(used, floor, 0.0), 0.0)
    run = torch.where(used, box.upper - box.lower, 1.0)
    order = rise.detach().argsort(-1, descending=True)
    rises, rate = rise.gather(-1, order), torch.where(used, 1 / run, 0.0).gather(-1, order)
    # The level at which the slopes sum to one: the largest over the first k elements, all k.
    total = rate.cumsum(-1)
    whole = ((rises * rate).cumsum(-1) - 1) / torch.where(total > 0, total, 1.0)
    level = whole.amax(-1, keepdim=True).clamp(min=0)
    if choice == "parallel":
        steep = ((torch.where(used, run - rise, 0.0).gather(-1, order)) * rate).cumsum(-1)
        below = torch.cat([rises[..., 1:], torch.zeros_like(rises[..., :1])], -1)
        level = torch.maximum(level, torch.where(steep < 1, below, rises[..., :1]).amin(-1, keepdim=True))
    elif rises.shape[-1] > 2:
        level = torch.maximum(level, rises[..., 2:3])
    slope = torch.where(used, (rise - level).clamp(min=0) / run, 0.0)
    if choice == "parallel":
        slope = slope + _one_hot(box.lower) * (1 - slope.sum(-1, keepdim=True))
    return torch.where(box.lower.isfinite() & box.upper.isfinite(), slope, 0.0)


def times(slope: Tensor, z: Tensor) -> Tensor:
    """Multiply, with ``0 * inf = 0``: a zero slope ignores an unbounded end."""
    return slope * torch.where((slope == 0) & z.isinf(), 0.0, z)


def most(slope: Tensor, box: Interval) -> Tensor:
    """Return the largest ``slope * z``, element by element."""
    return torch.maximum(times(slope, box.lower), times(slope, box.upper))


def _one_more(box: Interval, slope: Tensor) -> Tensor:
    """Return the largest ``z_j - slope . z`` over a box for every ``j``."""
    less, own = most(-slope, box), most(1 - slope, box)
    endless = less.isinf()
    less = torch.where(endless, 0.0, less)
    elsewhere = endless.sum(-1, keepdim=True) - endless.int() > 0
    return torch.where(elsewhere, torch.inf, less.sum(-1, keepdim=True) + (own - less))


def _least(box: Interval, slope: Tensor) -> Tensor:
    """Return the smallest ``max_j z_j - slope . z`` over a box, exactly where the box is bounded.

    For a given largest element ``v``, at least the largest lower end, element ``j`` is best at ``min(u_j, v)`` or ``l_j`` by
    the sign of its slope. What remains is convex in ``v`` and piecewise linear, with kinks at upper ends.
    """
    endless = box.lower.isinf() | box.upper.isinf()
    floor = box.lower.amax(-1, keepdim=True)
    lower, upper = torch.where(endless, 0.0, box.lower), torch.where(endless, 0.0, box.upper)
    up, down = slope.clamp(min=0), slope.clamp(max=0)
    order = upper.detach().argsort(-1, descending=True)
    top, weight = upper.gather(-1, order), up.gather(-1, order)
    shares = weight * top
    kinks = top * (1 - weight.cumsum(-1)) - (shares.sum(-1, keepdim=True) - shares.cumsum(-1))
    kinks = torch.where((top > floor) & ~endless.gather(-1, order), kinks, torch.inf)
    start = floor - (up * torch.minimum(upper, torch.where(floor.isinf(), 0.0, floor))).sum(-1, keepdim=True)
    found = torch.cat([start, kinks], -1).amin(-1) - (down * lower).sum(-1)
    return torch.where((endless & (slope != 0)).any(-1), -torch.inf, found)
