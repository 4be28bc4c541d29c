"""Abstract rules: what all affine, all relaxed and all piecewise-linear operators have in common."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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
        places += [_clamp(torch.as_tensor(b, dtype=box.lower.dtype, device=box.lower.device), box) for b in self.breakpoints()]
        points = [(z, self.forward(z)) for z in places]
        for position, below, above in self.jumps():
            at = torch.as_tensor(position, dtype=box.lower.dtype, device=box.lower.device)
            place = _clamp(at, box)
            value = self.forward(place)
            near = _rounding(at, box)
            points.append((place, torch.where((box.lower - near < at) & (at <= box.upper + near), below, value)))
            points.append((place, torch.where((box.lower - near <= at) & (at < box.upper + near), above, value)))
        return points

    def interval(self, *boxes: Interval) -> Interval:
        """Take the extremes over the points: exact."""
        values = [value for _, value in self.points(boxes[0])]
        return Interval(_fold(torch.minimum, values), _fold(torch.maximum, values))

    def undecided(self, bounds: tuple[Interval, ...]) -> Tensor:
        """Tell which boxes hold a breakpoint in their interior, touch a jump, or have no end (no chord spans those)."""
        box = bounds[0]
        result = box.lower.isinf() | box.upper.isinf()
        for b in self.breakpoints():
            result = result | ((box.lower < b) & (box.upper > b))
        for position, _, _ in self.jumps():
            near = _rounding(torch.as_tensor(position, dtype=box.lower.dtype, device=box.lower.device), box)
            result = result | ((box.lower - near <= position) & (box.upper + near >= position))
        return result

    def slopes(self, bounds: tuple[Interval, ...], choice: Choice) -> Slopes:
        """Try the chords; for a convex function with parallel lines the chord of the ends is the best one."""
        points, box = self.points(bounds[0]), bounds[0]
        if choice == "parallel" and self.facts.convex:
            both = (_chord(points[0], points[1]),)
            return Slopes(both, both)
        fixed = [(z.detach(), value.detach()) for z, value in points]
        middle = box.center.detach()
        reach = torch.maximum(box.lower.abs(), box.upper.abs()).detach() if self.jumps() else None
        if choice == "parallel":
            both = (_best_chord(points, lambda slope: _upper(fixed, slope) - _lower(fixed, slope), reach),)
            return Slopes(both, both)
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
        points, largest = self.points(bounds[0]), torch.finfo(bounds[0].lower.dtype).max
        lower, upper = _lower(points, slopes.lower[0]), _upper(points, slopes.upper[0])
        return Offsets(lower.clamp(max=largest), upper.clamp(min=-largest))


def known(box: Interval) -> Interval:
    """Replace an end that is NaN, which says nothing, by infinity: operators such as ``sign`` make a number of it."""
    return Interval(torch.where(box.lower.isnan(), -torch.inf, box.lower), torch.where(box.upper.isnan(), torch.inf, box.upper))


def _rounding(place: Tensor, box: Interval) -> Tensor:
    """Return what rounding may have moved a box' ends by: beside a jump that costs the jump's whole height."""
    reach = torch.maximum(box.lower.abs(), box.upper.abs()).nan_to_num(posinf=0.0) + place.abs()
    return 64 * torch.finfo(box.lower.dtype).eps * reach.detach()


def _clamp(place: Tensor, box: Interval) -> Tensor:
    return torch.minimum(torch.maximum(place, box.lower), box.upper)


def _fold(function: Callable[[Tensor, Tensor], Tensor], values: list[Tensor]) -> Tensor:
    result = values[0]
    for value in values[1:]:
        result = function(result, value)
    return result


def _times(slope: Tensor, z: Tensor) -> Tensor:
    """Multiply, with ``0 * inf = 0``: a zero slope ignores an unbounded end."""
    return slope * torch.where((slope == 0) & z.isinf(), 0.0, z)


def _lower(points: Points, slope: Tensor) -> Tensor:
    return _fold(torch.minimum, [_residual(point, slope, -torch.inf) for point in points])


def _upper(points: Points, slope: Tensor) -> Tensor:
    return _fold(torch.maximum, [_residual(point, slope, torch.inf) for point in points])


def _residual(point: tuple[Tensor, Tensor], slope: Tensor, worst: float) -> Tensor:
    """Return ``f(z) - slope * z``; where both terms are infinite nothing better than ``worst`` is known."""
    z, value = point
    residual = value - _times(slope, z)
    return torch.where(residual.isnan() & z.isinf(), worst, residual)


def _chord(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    """Slope between two points; 0 where they coincide or a coordinate is infinite (any slope is sound)."""
    run, rise = right[0] - left[0], right[1] - left[1]
    usable = (run != 0) & run.isfinite() & rise.isfinite()
    return torch.where(usable, rise, 0.0) / torch.where(usable, run, 1.0)


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
    if reach is not None:
        best = torch.zeros_like(points[0][1])
        lowest = charged(best)
    z, values = (torch.stack(parts) for parts in zip(*points, strict=True))
    pairs = torch.combinations(torch.arange(len(points), device=z.device)).T
    for left, right in zip(*(part.split(max(1, _TOGETHER // max(1, z[0].numel()))) for part in pairs), strict=True):
        slopes = _chord((z[left], values[left]), (z[right], values[right]))
        costs = charged(slopes.detach())
        first = costs.nan_to_num(torch.inf, torch.inf, -torch.inf).argmin(0, keepdim=True)
        slope, value = slopes.gather(0, first)[0], costs.gather(0, first)[0]
        if best is None:
            best, lowest = slope, value
        else:
            better = value < lowest
            best, lowest = torch.where(better, slope, best), torch.where(better, value, lowest)
    return best
