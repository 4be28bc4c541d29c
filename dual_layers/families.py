"""Abstract rules: what all affine, all relaxed and all piecewise-linear operators have in common."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dual_layers.checks import check_not_widened
from dual_layers.contract import Call, Choice, DualLayer, Facts, Field, Interval, Offsets, Slopes, fill

Points = list[tuple[Tensor, Tensor]]
MOST_POINTS = 8
"""Points of a piecewise-linear function all of whose chords are tried where many lines may be."""

_SHARES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
"""Places in a box between which the default range of slopes looks at chords."""
_TOGETHER = 2**16  # elements of the chords that are tried at once


class Affine(DualLayer):
    """An operator ``f(z) = A z + b``, jointly in all its perturbed inputs. Its dual is exact.

        nu_out . f(z)  =  nu_in . z + nu_out . b,     nu_in = A^T nu_out        (thesis, Corollary 3, eq. 3.49)

    The transpose comes from the operator's own derivative, so no argument of the operator can be forgotten; a rule
    writes its own only where that is measurably faster.
    """

    facts: ClassVar[Facts] = Facts(affine=True)

    def linear(self, *tangents: Tensor) -> Tensor:
        """Apply ``A``, the operator without its constant part, to one tangent per input."""
        return self.call(*tangents) - self.call(*(torch.zeros_like(tangent) for tangent in tangents))

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Apply ``A^T`` to rows of ``nu``.

        Args:
            nu: ``[rows, *output shape]``.
            inputs: one tensor per perturbed input; only shape, dtype and device matter.

        Returns:
            One ``[rows, *input shape]`` tensor per perturbed input.
        """
        if nu.numel() == 0:  # many operators' derivatives cannot handle an axis of size 0, of rows or of examples
            return tuple(z.new_zeros((len(nu), *z.shape)) for z in inputs)
        with torch.enable_grad():  # not torch.func.vjp: that cannot run under checkpointing, and is slower
            points = [torch.zeros_like(value).requires_grad_() for value in inputs]
            result = self.forward(*points)
        if not result.requires_grad:
            return tuple(z.new_zeros((len(nu), *z.shape)) for z in inputs)
        keep = torch.is_grad_enabled()
        pulled = torch.autograd.grad(result, points, nu, is_grads_batched=True, create_graph=keep, allow_unused=True)
        # An input that lends the result its shape alone has no derivative.
        return tuple(z.new_zeros((len(nu), *z.shape)) if part is None else part for part, z in zip(pulled, inputs, strict=True))

    def field(self) -> Field | None:
        """Return how outputs reach into the single input, or None where they do not do so alike at every position."""
        return None

    def pull_windows(self, nu: Tensor) -> Tensor:
        """Apply ``A^T`` to windows of the output, as if the input had no ends.

        Args:
            nu: ``[rows, channels, *window]``.

        Returns:
            ``[rows, input channels, *wider window]``, wider by the field: ``stride * (window - 1) + extent``.
        """
        raise NotImplementedError(f"{type(self).__name__} has a field and must define pull_windows()")

    def has_phases(self) -> bool:
        """Tell whether windows are pulled faster into phases: where the operator takes steps of more than one element."""
        return False

    def pull_in_phases(self, nu: Tensor) -> Tensor:
        """Apply ``A^T`` to windows like ``pull_windows``, leaving every element where it is cheap to compute.

        Args:
            nu: ``[rows, channels, *window]``.

        Returns:
            ``[rows, input channels, *phases, *places]``: along each spatial axis element ``stride * place + phase`` of the
            pulled window, with zeros where places reach beyond it.
        """
        raise NotImplementedError(f"{type(self).__name__} has phases and must define pull_in_phases()")

    def magnitude(self, *radii: Tensor) -> Tensor:
        """Apply ``|A|``, the operator with absolute coefficients and no constant part, to non-negative radii."""
        raise NotImplementedError(f"{type(self).__name__} is not monotone and must define magnitude()")

    def absolute(self, *radii: Tensor) -> Tensor:
        """Apply ``|A|`` to non-negative radii, without the constant part."""
        return self.linear(*radii) if self.facts.monotone else self.magnitude(*radii)

    def euclidean(self, *lengths: Tensor) -> Tensor | None:
        """Return the Euclidean norm of each row of ``A diag(lengths)``: ``sqrt(A^2 lengths^2)``, squares element by element.

        None where that is not known; a rule defines it where squaring the operator's own coefficients gives it.
        """
        return None

    def interval(self, *boxes: Interval) -> Interval:
        """Map centre and radius: exact for one affine map of independent coordinates."""
        if self.facts.monotone:
            return Interval(self.forward(*(box.lower for box in boxes)), self.forward(*(box.upper for box in boxes)))
        center = self.forward(*(box.center for box in boxes))
        radius = self.magnitude(*(box.radius for box in boxes))
        return Interval(center - radius, center + radius)


class Relaxed(DualLayer):
    """A nonlinear operator between two lines per perturbed input: a conjugate and a choice of slopes.

        slope_lo . z + lower  <=  f(z)  <=  slope_up . z + upper,     z in the box

    Any slopes are dual feasible, hence sound once ``conjugate`` has computed the offsets that belong to them
    (thesis, Theorem 3, eq. 3.42: chi* is bounded by conjugation over the box).
    """

    looseness: ClassVar[float | None] = 0.05
    """Share of the range by which an element-wise rule's lines may miss the function; None where no share is promised."""

    @abstractmethod
    def slopes(self, bounds: tuple[Interval, ...], choice: Choice) -> Slopes:
        """Choose slopes: ``parallel`` of smallest gap, or ``adaptive`` of smallest area for each side alone."""

    @abstractmethod
    def conjugate(self, slopes: Slopes, bounds: tuple[Interval, ...]) -> Offsets:
        """Return the best valid offsets for *any* slopes: the minimum and maximum of ``f(z) - slope . z``."""

    def alternatives(self, bounds: tuple[Interval, ...], cells: int) -> list[tuple[Tensor, ...]]:
        """List slopes that lines may have besides the chosen ones, for a linear program to pick from; any are sound.

        By default, element by element, the chords of equal cells of the box: nearly the tangents in their middles.

        Args:
            bounds: the boxes of the perturbed inputs.
            cells: how many slopes to try where no finite number is enough.
        """
        if not self.facts.positionwise:
            return []
        (box,) = bounds
        bounded = box.lower.isfinite() & box.upper.isfinite()
        low, high = torch.where(bounded, box.lower, 0.0), torch.where(bounded, box.upper, 0.0)
        ends = [torch.where(bounded, torch.lerp(low, high, i / cells), box.lower) for i in range(cells)]
        pieces = (Interval(*pair) for pair in zip(ends, [*ends[1:], box.upper], strict=True))
        return [self.slopes((piece,), "parallel").lower for piece in pieces]

    def undecided(self, bounds: tuple[Interval, ...]) -> Tensor:
        """Tell which elements tighter bounds could still help; elsewhere the relaxation is exact.

        Input elements; an answer of another shape than an input's says nothing about that input.
        """
        return torch.ones_like(bounds[0].lower, dtype=torch.bool)

    def outside(self, *boxes: Interval) -> Tensor:
        """Tell for which elements of the output the boxes reach where the operator has no value: nothing is said there.

        By default there are none; what is returned broadcasts against the output.
        """
        return boxes[0].lower.new_zeros((), dtype=torch.bool)

    def slope_range(self, bounds: tuple[Interval, ...]) -> tuple[Tensor, Tensor]:
        """Return between which slopes to seek a line of an operator that works element by element, one pair per element.

        Any slope is sound; beyond the steepest and the flattest part of the graph none is of use. By default those of chords
        between places in the box, close together at its ends; an element whose box has no end has a range without width.
        """
        (box,) = bounds
        bounded = box.lower.isfinite() & box.upper.isfinite()
        lower, upper = torch.where(bounded, box.lower, 0.0), torch.where(bounded, box.upper, 0.0)
        places = [torch.lerp(lower, upper, share) for share in _SHARES]
        points = [(z, self.forward(z)) for z in places]
        chords = torch.stack([_chord(left, right) for left, right in pairwise(points)])
        chords = torch.where(bounded, chords.nan_to_num(posinf=0.0, neginf=0.0), 0.0)
        return chords.amin(0), chords.amax(0)

    def vertices(self, bounds: tuple[Interval, ...]) -> tuple[Tensor, Tensor] | None:
        """Return points of the graph, places and values ``[points, *shape]`` each, among which every conjugate is attained.

        For callers that conjugate at many slopes over the same boxes. None where no finite number of points will do.
        """
        return None

    def continuous(self) -> bool:
        """Tell whether the operator never jumps: at a jump, rounding of its input may cost the jump's whole height."""
        return True

    def pull(self, nu: Tensor, slopes: Slopes, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return ``nu_in = slope_lo * [nu]_+ - slope_up * [nu]_-`` for every perturbed input.

        Args:
            nu: ``[rows, *output shape]``.
            slopes: of both sides.
            inputs: one tensor per perturbed input; only shape, dtype and device matter.

        Returns:
            One ``[rows, *input shape]`` tensor per perturbed input.
        """
        if slopes.parallel:
            return tuple(nu * slope for slope in slopes.lower)
        positive = nu > 0
        pairs = zip(slopes.lower, slopes.upper, strict=True)
        return tuple(torch.where(positive, lower, upper) * nu for lower, upper in pairs)

    def push(self, slopes: tuple[Tensor, ...], points: tuple[Tensor, ...]) -> Tensor:
        """Apply one side's slopes to one point per perturbed input; the points may have a leading axis of rows."""
        return sum(_times(slope, point) for slope, point in zip(slopes, points, strict=True))


def root_of_squares(total: Tensor, like: Tensor) -> Tensor:
    """Return the root of a sum of squares, with derivative 0 at 0, in another tensor's precision.

    Squares are to be summed in double precision: in single precision those of small numbers vanish.
    """
    positive = total > 0
    return torch.where(positive, torch.where(positive, total, 1.0).sqrt(), total.clamp(min=0)).to(like.dtype)


class Composite(DualLayer):
    """An operator that is written in others: its dual network is theirs.

    A call that depends on the input is replaced by ``compose`` before anything is bounded, so that back-substitution
    sees every part. What interval arithmetic over the parts would miss is given by ``interval``.
    """

    source: ClassVar[str] = "design, section 1: compositions"

    @staticmethod
    @abstractmethod
    def compose(*args: Any, **kwargs: Any) -> Any:
        """Compute the operator from operators that have rules; its arguments are those of every spelling.

        Sizes of tensors are concrete. The batch may stand in any axis that the call leaves alone, and its size must not
        be used.
        """

    def composed(self, *inputs: Any) -> Any:
        """Run the composition on these inputs, with the call's other arguments."""
        result = self.compose(**fill(vars(self.arguments), inputs))
        return result if self.call.item is None else result[self.call.item]

    @classmethod
    def parameters(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Name the arguments as ``compose`` does; options that it does not know must be left at None, such as ``out``."""
        known = inspect.signature(cls.compose)
        given = {name: value for name, value in kwargs.items() if name in known.parameters or value is not None}
        bound = known.bind(*args, **given)
        bound.apply_defaults()
        return dict(bound.arguments)

    @classmethod
    def from_module(cls, module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Name the arguments of the module's call, and read the others off the module, under the names of ``compose``."""
        bound = inspect.signature(cls.compose).bind_partial(*args, **kwargs)
        own = {name: getattr(module, name) for name in inspect.signature(cls.compose).parameters if hasattr(module, name)}
        return cls.parameters(**{**own, **bound.arguments})

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse arguments that are not known by name."""
        try:
            _ = cls(call).arguments
        except TypeError as error:
            return f"this spelling's arguments are not supported: {error}"
        return None

    def interval(self, *boxes: Interval) -> Interval | None:
        """Enclose the whole more tightly than its parts do, or give None where nothing better is known."""
        return None


class PiecewiseLinear(Relaxed):
    """A piecewise-linear function, element by element; a rule states ``breakpoints`` (and ``jumps``), nothing more.

    Over a box, ``f(z) - a z`` takes its extremes at the ends and the breakpoints inside, at a jump over both one-sided
    limits. As functions of the slope ``a``, both the gap of two parallel lines and the height of one line above the
    box' midpoint (its area) are convex and piecewise linear with kinks at the slopes of chords between those points,
    so trying every chord finds the best slope exactly. For a convex or concave function the chord of the two ends has
    the smallest gap: the thesis' ``u / (u - l)`` for ReLU (eq. 3.18); hardtanh's corrected slope is another case.
    """

    facts: ClassVar[Facts] = Facts(positionwise=True, exact_when_stable=True)
    looseness: ClassVar[float | None] = 0.0

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the operator; a constant that widens its input would break the element-by-element account."""
        result = self.call(*inputs)
        check_not_widened(result, inputs[0])
        return result

    @abstractmethod
    def breakpoints(self) -> tuple[float | Tensor, ...]:
        """Where the slope changes; tensors broadcast against the input."""

    def jumps(self) -> tuple[tuple[float | Tensor, float | Tensor, float | Tensor], ...]:
        """Discontinuities as (position, limit from below, limit from above); none by default."""
        return ()

    def continuous(self) -> bool:
        """Tell whether there are no jumps."""
        return not self.jumps()

    def points(self, box: Interval) -> Points:
        """List the points of the graph between which the function is linear, clamped into the box."""
        box = known(box)
        places = [box.lower, box.upper]
        fixed = Interval(box.lower.detach(), box.upper.detach())  # a breakpoint clamped to an end is that end, listed before it
        places += [
            _clamp(torch.as_tensor(b, dtype=box.lower.dtype, device=box.lower.device), fixed) for b in self.breakpoints()
        ]
        points = [(z, self.forward(z)) for z in places]
        for position, below, above in self.jumps():
            at = torch.as_tensor(position, dtype=box.lower.dtype, device=box.lower.device)
            place = _clamp(at, fixed)
            value = self.forward(place)
            near = _rounding(at, box)
            points.append((place, torch.where((box.lower - near < at) & (at <= box.upper + near), below, value)))
            points.append((place, torch.where((box.lower - near <= at) & (at < box.upper + near), above, value)))
        return points

    def interval(self, *boxes: Interval) -> Interval:
        """Take the extremes over the points: exact."""
        values = [value for _, value in self.points(boxes[0])]
        return Interval(*(_first(values, better) for better in (torch.minimum, torch.maximum)))

    def undecided(self, bounds: tuple[Interval, ...]) -> Tensor:
        """Tell which boxes hold a breakpoint in their interior, touch a jump, or have no end (no chord spans those)."""
        box = bounds[0]
        inside = [(box.lower < b) & (box.upper > b) for b in self.breakpoints()]
        endless = [] if inside and _finite(box.lower, box.upper) else [box.lower.isinf() | box.upper.isinf()]
        result = _fold(torch.logical_or, [*endless, *inside])
        for position, _, _ in self.jumps():
            near = _rounding(torch.as_tensor(position, dtype=box.lower.dtype, device=box.lower.device), box)
            result = result | ((box.lower - near <= position) & (box.upper + near >= position))
        return result

    def slopes(self, bounds: tuple[Interval, ...], choice: Choice) -> Slopes:
        """Try the chords.

        Above a convex function, and for parallel lines about it, the chord of the ends is the best one; below it the tangent in
        the middle, which is highest there.
        """
        box = bounds[0]
        found = self._points_and_derivatives(box) if self.facts.convex else (self.points(box), None)
        points, derivatives = found
        ends = _chord(points[0], points[1]) if self.facts.convex else None
        if ends is not None and derivatives is not None:
            with torch.no_grad():
                run = box.upper - box.lower
                run = torch.where(run == 0, torch.inf, run) if _has_zeros(run) else run
                rates = [(rate - ends) / run for rate in derivatives]
            ends = _attached(ends, (box.lower, -rates[0]), (box.upper, rates[1]))
        if choice == "parallel" and ends is not None:
            both = (ends,)
            return _SlopesWithPoints(both, both, box, found)
        fixed = [(z.detach(), value.detach()) for z, value in points]
        middle = box.center.detach()
        reach = torch.maximum(box.lower.abs(), box.upper.abs()).detach() if self.jumps() else None
        if choice == "parallel":
            both = (_best_chord(points, lambda slope: _upper(fixed, slope) - _lower(fixed, slope), reach),)
            return Slopes(both, both)
        if ends is not None:
            return _SlopesWithPoints((_piece(points, middle),), (ends,), box, found)
        lower = _best_chord(points, lambda slope: -(_lower(fixed, slope) + _times(slope, middle)), reach)
        upper = _best_chord(points, lambda slope: _upper(fixed, slope) + _times(slope, middle), reach)
        return Slopes((lower,), (upper,))

    def vertices(self, bounds: tuple[Interval, ...]) -> tuple[Tensor, Tensor] | None:
        """Return the points, unless one is infinite."""
        places, values = (torch.stack(part) for part in zip(*self.points(bounds[0]), strict=True))
        return (places, values) if bool((places.isfinite() & values.isfinite()).all()) else None

    def slope_range(self, bounds: tuple[Interval, ...]) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest chord."""
        chords = torch.stack(_chords(self.points(bounds[0])))
        return chords.amin(0), chords.amax(0)

    def alternatives(self, bounds: tuple[Interval, ...], cells: int) -> list[tuple[Tensor, ...]]:
        """List all chords, unless there are many: the edges of the function's convex hull over the box are among them."""
        points = self.points(bounds[0])
        return [(chord,) for chord in _chords(points)] if len(points) <= MOST_POINTS else super().alternatives(bounds, cells)

    def conjugate(self, slopes: Slopes, bounds: tuple[Interval, ...]) -> Offsets:
        """Minimise and maximise ``f(z) - slope * z`` over the points; what overflowed is only known to be large."""
        box, largest = bounds[0], torch.finfo(bounds[0].lower.dtype).max
        found = slopes.found if isinstance(slopes, _SlopesWithPoints) and slopes.box is box else None
        if found is None or (found[1] is None and torch.is_grad_enabled()):  # none at all, or made without derivatives
            found = self._points_and_derivatives(box)
        points, derivatives = found
        if derivatives is not None and isinstance(slopes, _SlopesWithPoints) and slopes.box is box:
            offsets = _below_and_through_the_ends(slopes, derivatives[1])
            if offsets is not None:
                return offsets
        ends = points[:2] if self.facts.convex else points  # where a convex function is largest
        if derivatives is None:
            lower, upper = _lower(points, slopes.lower[0]), _upper(ends, slopes.upper[0])
        else:
            lower = _touching(points, slopes.lower[0], -torch.inf, torch.minimum, box, derivatives)
            upper = _touching(ends, slopes.upper[0], torch.inf, torch.maximum, box, derivatives)
        return Offsets(lower.clamp(max=largest), upper.clamp(min=-largest))

    def _points_and_derivatives(self, box: Interval) -> tuple[Points, list[Tensor] | None]:
        """List the points; where box ends alone are differentiated, as constants, and with the derivatives at the ends."""
        constants = [*_tensors((self.call.args, self.call.kwargs))]
        constants += self.call.operator.parameters() if isinstance(self.call.operator, nn.Module) else []
        if not torch.is_grad_enabled() or any(constant.requires_grad for constant in constants):
            return self.points(box), None
        ends = [end.detach().requires_grad_() for end in (box.lower, box.upper)]
        values = [self.forward(end) for end in ends]
        derivatives = [
            torch.autograd.grad(value.sum(), end)[0] if value.requires_grad else torch.zeros_like(end)
            for value, end in zip(values, ends, strict=True)
        ]
        with torch.no_grad():
            return self.points(Interval(*(end.detach() for end in ends))), derivatives


@dataclass(frozen=True)
class _SlopesWithPoints(Slopes):
    """Slopes of a convex function over a box, with the points that gave them: the conjugate need not find them again.

    Above is the chord of the ends, below a slope that the function has somewhere in the box, or that same chord.
    """

    box: Interval
    found: tuple[Points, list[Tensor] | None]

    @property
    def bare(self) -> Slopes:
        """The slopes alone."""
        return Slopes(self.lower, self.upper)


def _below_and_through_the_ends(slopes: _SlopesWithPoints, derivative: Tensor) -> Offsets | None:
    """Return the offsets with their derivatives by slopes and box; None where ends coincide, or no chord spans them.

    The chord above touches at both ends, so its derivative may be read off either. The line below has a slope between the
    derivatives at the ends, so it touches at a breakpoint, clamped into the box: either that does not move, or the line is the
    function itself.

    Args:
        slopes: of a convex function.
        derivative: the function's, at the upper end.
    """
    below, above, ((start, first), (end, last), *breaks) = slopes.lower[0], slopes.upper[0], slopes.found[0]
    with torch.no_grad():
        if not breaks or _has_zeros(end - start) or not _finite(end - start, last - first):
            return None
        best, improves = _turns([value - below * place for place, value in breaks], torch.minimum)
        place = _pick([place for place, _ in breaks], improves)
        top = torch.maximum(first - above * start, last - above * end)
        if not _finite(best, top):
            return None
        rate = derivative - above
    return Offsets(_attached(best, (below, -place)), _attached(top, (above, -end), (slopes.box.upper, rate)))


def known(box: Interval) -> Interval:
    """Replace an end that is NaN, which says nothing, by infinity: operators such as ``sign`` make a number of it."""
    if _finite(box.lower, box.upper):
        return box
    return Interval(torch.where(box.lower.isnan(), -torch.inf, box.lower), torch.where(box.upper.isnan(), torch.inf, box.upper))


def _finite(*tensors: Tensor) -> bool:
    """Whether there is neither infinity nor NaN; False also where a sum overflows. A sum is the cheapest way to see it."""
    return all(bool(tensor.detach().sum().isfinite()) for tensor in tensors)


def _rounding(place: Tensor, box: Interval) -> Tensor:
    """Return what rounding may have moved a box' ends by: beside a jump that costs the jump's whole height."""
    reach = torch.maximum(box.lower.abs(), box.upper.abs()).nan_to_num(posinf=0.0) + place.abs()
    return 64 * torch.finfo(box.lower.dtype).eps * reach.detach()


def _clamp(place: Tensor, box: Interval) -> Tensor:
    return torch.minimum(torch.maximum(place, box.lower), box.upper)


def _times(slope: Tensor, z: Tensor) -> Tensor:
    """Multiply, with ``0 * inf = 0``: a zero slope ignores an unbounded end."""
    return slope * (z if _finite(z) else torch.where((slope == 0) & z.isinf(), 0.0, z))


def _lower(points: Points, slope: Tensor) -> Tensor:
    return _extreme(points, slope, -torch.inf, torch.minimum)


def _upper(points: Points, slope: Tensor) -> Tensor:
    return _extreme(points, slope, torch.inf, torch.maximum)


def _extreme(points: Points, slope: Tensor, worst: float, better: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the best of the points' residuals. Its derivative is that of the first point that attains it."""
    with torch.no_grad():
        best, improves = _turns([_residual(point, slope, worst) for point in points], better)
    if not torch.is_grad_enabled():
        return best
    place, value = (_pick(parts, improves) for parts in zip(*points, strict=True))
    found = _residual((place, value), slope, worst)
    return found if _finite(best) else torch.where(best.isnan(), best, found)


def _touching(
    points: Points,
    slope: Tensor,
    worst: float,
    better: Callable[[Tensor, Tensor], Tensor],
    box: Interval,
    derivatives: Sequence[Tensor],
) -> Tensor:
    """Do as ``_extreme`` does with points that are constants, and attach the derivatives of the one where the line touches."""
    with torch.no_grad():
        best, improves = _turns([_residual(point, slope, worst) for point in points], better)
        place = _pick([place for place, _ in points], improves)
        place = place if _finite(place) else torch.where(place.isinf(), 0.0, place)
        later = _fold(torch.logical_or, [torch.zeros_like(improves[0]), *improves[1:]])
        chosen = ~(improves[0] | later), improves[0] & ~later
        rates = [(derivative - slope) * own for derivative, own in zip(derivatives, chosen, strict=True)]
    return _attached(best, (slope, -place), (box.lower, rates[0]), (box.upper, rates[1]))


class _Attached(torch.autograd.Function):
    """A value that was computed without derivatives, and its derivative by each of some inputs, element by element."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *pairs: Tensor) -> Tensor:
        """Return the value; ``pairs`` are inputs and derivatives in turns."""
        ctx.save_for_backward(*pairs[1::2])
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply."""
        parts = zip(ctx.needs_input_grad[1::2], ctx.saved_tensors, strict=True)
        return None, *(part for wanted, rate in parts for part in (gradient * rate if wanted else None, None))


def _attached(value: Tensor, *rates: tuple[Tensor, Tensor]) -> Tensor:
    return _Attached.apply(value, *(part for pair in rates for part in pair))


def _tensors(value: Any) -> Iterator[Tensor]:
    """List the tensors among a call's arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _fold(function: Callable[[Tensor, Tensor], Tensor], values: Sequence[Tensor]) -> Tensor:
    result = values[0]
    for value in values[1:]:
        result = function(result, value)
    return result


def _first(values: Sequence[Tensor], better: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the best of some values. Its derivative is that of the first that attains it."""
    best, improves = _turns([value.detach() for value in values], better)
    if not torch.is_grad_enabled():
        return best
    found = _pick(values, improves)
    return found if _finite(best) else torch.where(best.isnan(), best, found)


def _turns(values: Sequence[Tensor], better: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Compare one value after the other with the best so far: return the best, and where each was an improvement."""
    best, improves = values[0], []
    for value in values[1:]:
        before, best = best, better(best, value)
        improves.append(best != before)
    return best, improves


def _pick(choices: Sequence[Tensor], instead: Sequence[Tensor]) -> Tensor:
    """Pick an element of one of several tensors at each place: the first, unless a later one is to be taken instead."""
    picked = choices[0]
    for mask, choice in zip(instead, choices[1:], strict=True):
        picked = torch.where(mask, choice, picked)
    return picked


def _residual(point: tuple[Tensor, Tensor], slope: Tensor, worst: float) -> Tensor:
    """Return ``f(z) - slope * z``; where both terms are infinite nothing better than ``worst`` is known."""
    z, value = point
    if _finite(z):
        return value - slope * z
    residual = value - _times(slope, z)
    return torch.where(residual.isnan() & z.isinf(), worst, residual)


def _chord(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """Slope between two points; 0 where they coincide or a coordinate is infinite (any slope is sound)."""
    run, rise = right[0] - left[0], right[1] - left[1]
    if not _finite(run, rise):
        usable = (run != 0) & run.isfinite() & rise.isfinite()
    elif _has_zeros(run):
        usable = run != 0
    else:
        return rise / run
    return torch.where(usable, rise, 0.0) / torch.where(usable, run, 1.0)


def _has_zeros(value: Tensor) -> bool:
    """Whether some element is 0: masks are slower than arithmetic."""
    return not value.numel() or not bool(value.detach().abs().amin() > 0)


def _piece(points: Points, middle: Tensor) -> Tensor:
    """Return the slope in the middle of a box, the points of which begin with its ends."""
    (left, left_value), (right, right_value) = points[:2]
    for place, value in points[2:]:
        after = (place <= middle) & (place >= left)
        before = (place > middle) & (place <= right)
        left, left_value = torch.where(after, place, left), torch.where(after, value, left_value)
        right, right_value = torch.where(before, place, right), torch.where(before, value, right_value)
    return _chord((left, left_value), (right, right_value))


def _chords(points: Points) -> list[Tensor]:
    return [_chord(left, right) for left, right in combinations(points, 2)]


def _best_chord(points: Points, cost: Callable[[Tensor], Tensor], reach: Tensor | None) -> Tensor:
    """Return the chord of least cost; the choice itself has no derivative, the chosen chord has.

    Across a jump a chord may be as steep as you like and better by nothing but rounding. So at a function with jumps
    (``reach`` is then the largest ``|z|``) slope 0 comes first and a chord is charged with the rounding it causes.
    Chords are tried many at a time, as long as that takes little memory.
    """

    def charged(slopes: Tensor) -> Tensor:
        value = cost(slopes)
        return value if reach is None else value + 64 * torch.finfo(value.dtype).eps * _times(slopes.abs(), reach)

    best = lowest = None
    places, values = (list(parts) for parts in zip(*points, strict=True))
    with torch.no_grad():
        shape = torch.broadcast_shapes(*(part.shape for part in (*places, *values)))
        ends = [torch.zeros(shape, dtype=torch.int16, device=values[0].device) for _ in range(2)]
        if reach is not None:  # slope 0, as of a point with itself
            best = torch.zeros(shape, dtype=values[0].dtype, device=values[0].device)
            lowest = charged(best)
        z, height = torch.stack(places), torch.stack(values)
        pairs = torch.combinations(torch.arange(len(points), device=z.device)).T
        for left, right in zip(*(part.split(max(1, _TOGETHER // max(1, z[0].numel()))) for part in pairs), strict=True):
            slopes = _chord((z[left], height[left]), (z[right], height[right]))
            costs = charged(slopes)
            first = costs.nan_to_num(torch.inf, torch.inf, -torch.inf).argmin(0, keepdim=True)
            slope, value = slopes.gather(0, first)[0], costs.gather(0, first)[0]
            better = torch.ones_like(value, dtype=torch.bool) if lowest is None else value < lowest
            best = slope if best is None else torch.where(better, slope, best)
            lowest = value if lowest is None else torch.where(better, value, lowest)
            ends = [
                torch.where(better, side[first[0]].to(end.dtype), end) for side, end in zip((left, right), ends, strict=True)
            ]
    if not torch.is_grad_enabled():
        return best
    masks = ([end == index for index in range(1, len(points))] for end in ends)
    return _chord(*((_pick(places, mask), _pick(values, mask)) for mask in masks))
