"""What the rule checker tries a rule on: samples, boxes, points, rows; and comparisons that name the worst element."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dual_layers.checks import tolerance_of, worst_index
from dual_layers.contract import UNKNOWN, Call, Choice, DualLayer, Interval, Offsets, RuleSample, Slopes
from dual_layers.families import Affine, Composite, PiecewiseLinear, Relaxed

CHOICES: tuple[Choice, ...] = ("parallel", "adaptive")
ROWS = 48  # one-hot rows tried per sign; all outputs of a small sample
Tensors = tuple[Tensor, ...]
Boxes = tuple[Interval, ...]


class Broken(Exception):
    """A promise that did not hold; the checker adds rule, sample, seed and check."""


class _Locate(Protocol):
    def __call__(self, index: tuple[int, ...], /) -> str: ...


def at_most(left: Tensor, right: Tensor, allowance: Tensor | float, what: str, where: _Locate = str) -> None:
    """Break unless ``left <= right + allowance`` everywhere; NaN on either side breaks too."""
    left, right = torch.broadcast_tensors(left, right)
    excess = left - right - allowance
    holds = (excess <= 0) | ((left == right) & left.isinf())
    if not holds.all():
        at = worst_index(torch.where(holds, -torch.inf, excess))
        count = f"{int((~holds).sum())} of {holds.numel()}"
        raise Broken(f"{what}: {left[at].item():.9g} > {right[at].item():.9g} ({count}), worst at {where(at)}")


def same(left: Tensor, right: Tensor, allowance: Tensor | float, what: str, where: _Locate = str) -> None:
    """Break unless two tensors have one shape and agree within the allowance."""
    if left.shape != right.shape:
        raise Broken(f"{what}: shape {tuple(left.shape)}, expected {tuple(right.shape)}")
    at_most(left, right, allowance, what, where)
    at_most(right, left, allowance, f"{what} (too small)", where)


def require(condition: bool, text: str) -> None:
    """Break with this text unless the condition holds."""
    if not condition:
        raise Broken(text)


def holds(check: Callable[..., None], *args: Any) -> None:
    """Break if one of the library's checks raises."""
    try:
        check(*args)
    except (TypeError, ValueError) as error:
        raise Broken(str(error)) from error


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor in nested tuples, lists, dicts and slices."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(map_tensors(function, item) for item in (value.start, value.stop, value.step)))
    return value


def prepare(call: Call, dtype: torch.dtype, device: torch.device) -> Call:
    """Copy a call: floating constants in this dtype, everything on this device, nothing shared with the original."""

    def move(tensor: Tensor) -> Tensor:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.detach().clone().to(device=device, dtype=kind)

    operator = call.operator
    if isinstance(operator, nn.Module):
        operator = copy.deepcopy(operator).to(device=device, dtype=dtype)
    return Call(operator, map_tensors(move, call.args), map_tensors(move, dict(call.kwargs)), call.item)


def judged(call: Call) -> Call:
    """Return the call as ``refuse`` sees it before anything is run: constant tensors are unknown."""
    hide = lambda value: map_tensors(lambda _: UNKNOWN, value)  # noqa: E731
    return Call(call.operator, hide(call.args), hide(dict(call.kwargs)), call.item)


def constants_of(call: Call) -> list[Tensor]:
    """List the floating tensors a call holds: constant arguments and module parameters."""
    found: list[Tensor] = list(call.operator.parameters()) if isinstance(call.operator, nn.Module) else []
    map_tensors(found.append, (call.args, dict(call.kwargs)))
    return [tensor for tensor in found if tensor.is_floating_point()]


@dataclass(frozen=True)
class Probe:
    """One box of every input, points inside it (``[points, *shape]`` each) and the operator's values there."""

    name: str
    boxes: Boxes
    points: Tensors
    values: Tensor
    allowance: Tensor

    def locate(self, index: tuple[int, ...]) -> str:
        """Name output element and point of an index ``(point, *output)``."""
        text = []
        for box, z in zip(self.boxes, self.points, strict=True):
            inside = index[1:]
            if z.shape[1:] == self.values.shape[1:]:  # element by element: show that element's box and point alone
                text.append(f"z = {z[index].item():.9g} in [{box.lower[inside].item():.9g}, {box.upper[inside].item():.9g}]")
            else:
                head = ", ".join(f"{v:.6g}" for v in z[index[0]].flatten()[:6].tolist())
                text.append(f"z = [{head}{', ...' if z[0].numel() > 6 else ''}]")
        return f"output element {index[1:]}, box '{self.name}', " + "; ".join(text)


class Case:
    """One good sample made ready for one dtype and device. The rule and its reference share no tensor."""

    def __init__(
        self, rule: type[DualLayer], sample: RuleSample, dtype: torch.dtype, device: torch.device, seed: int, points: int
    ) -> None:
        self.rule, self.sample, self.dtype, self.device, self.points = rule, sample, dtype, device, points
        self.generator = torch.Generator().manual_seed(seed)
        self.call = prepare(sample.call, dtype, device)
        self.layer = rule(prepare(sample.call, dtype, device))

    # Random numbers are drawn on the host in float64, so that every dtype and device sees the same ones.

    def rand(self, shape: tuple[int, ...]) -> Tensor:
        """Draw uniformly from [0, 1)."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(device=self.device, dtype=self.dtype)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(device=self.device, dtype=self.dtype)

    def inputs(self) -> Tensors:
        """Draw one point of the sample's domain."""
        low, high = self.domain
        return tuple(low + (high - low) * self.rand(shape) for shape in self.sample.shapes)

    @property
    def domain(self) -> tuple[float, float]:
        """The range in which inputs are drawn; the sample's own, cut to something finite."""
        return max(self.sample.low, -1e3), min(self.sample.high, 1e3)

    @property
    def far(self) -> tuple[float, float]:
        """The widest box tried: affine and piecewise-linear functions are defined far beyond a sample's default range."""
        total = isinstance(self.layer, (Affine, PiecewiseLinear)) and (self.sample.low, self.sample.high) == (-10.0, 10.0)
        return (-5e5, 5e5) if total else (max(self.sample.low, -5e5), min(self.sample.high, 5e5))

    @cached_property
    def zero(self) -> Tensor:
        """The value at zero: an affine operator's constant part, and the pattern of every output."""
        low, high = self.domain
        value = 0.0 if isinstance(self.layer, Affine) else min(max(0.0, low), high)
        return self.run(*(torch.full(shape, value, device=self.device, dtype=self.dtype) for shape in self.sample.shapes))

    def run(self, *inputs: Tensor) -> Tensor:
        """Run the operator itself; truth values count as 0 and 1."""
        value = self.call(*inputs)
        return value.to(self.dtype) if value.dtype == torch.bool else value

    def settled(self, values: Tensors) -> Tensors:
        """Make inputs that the operator takes as truth values 0 or 1."""
        return tuple((z > 0.25).to(z.dtype) if index in self.call.truths else z for index, z in enumerate(values))

    def admitted(self, boxes: Boxes) -> Boxes:
        """Make the boxes of such inputs one of ``[0, 0]``, ``[0, 1]`` and ``[1, 1]``."""
        lower, upper = self.settled(tuple(box.lower for box in boxes)), self.settled(tuple(box.upper for box in boxes))
        return tuple(map(Interval, lower, upper))

    @property
    def tolerance(self) -> float:
        """The relative rounding allowance; an operator that converts to a coarser dtype sets it."""
        return max(tolerance_of(self.dtype), tolerance_of(self.zero.dtype))

    @cached_property
    def matrix(self) -> Tensor:
        """An affine operator's ``A``, ``[outputs, inputs]``, column by column from the operator alone: f(e) - f(0)."""
        sizes = [torch.Size(shape).numel() for shape in self.sample.shapes]
        columns = []
        for unit in torch.eye(sum(sizes), device=self.device, dtype=self.dtype):
            parts = (part.reshape(shape) for part, shape in zip(unit.split(sizes), self.sample.shapes, strict=True))
            columns.append((self.call(*parts) - self.zero).flatten())
        return torch.stack(columns, -1) if columns else self.zero.new_zeros(self.zero.numel(), 0)

    def apply(self, matrix: Tensor, vectors: Tensors) -> Tensor:
        """Multiply ``[outputs, inputs]`` by one tensor per input, all inputs taken together."""
        return (matrix @ join(vectors).to(matrix.dtype)).reshape(self.zero.shape)

    def coarse(self, radii: Tensors) -> Tensor:
        """Apply ``|A|``, or the operator with absolute constants where that is more.

        Padding by reflection reads an element twice: two coefficients of one element, each absolute, exceed ``|A|``.
        """
        exact = self.apply(self.matrix.abs(), radii)
        absolute = prepare(self.sample.call, self.dtype, self.device)
        for constant in constants_of(absolute):
            constant.abs_()
        moved = absolute(*radii) - absolute(*(torch.zeros_like(radius) for radius in radii))
        return torch.where(moved > exact, moved, exact)

    @cached_property
    def kinks(self) -> list[Tensor]:
        """Breakpoints and jumps of the rule, where it has them."""
        places = list(getattr(self.layer, "breakpoints", tuple)()) + [jump[0] for jump in getattr(self.layer, "jumps", tuple)()]
        return [torch.as_tensor(place, dtype=self.dtype, device=self.device) for place in places]

    def boxes(self) -> Iterator[tuple[str, Boxes]]:
        """Draw boxes inside the domain: ordinary ones first, then the awkward ones."""
        low, high = self.domain
        kinds: dict[str, tuple[float, float]] = {"random": (low, high)}
        if low < 0 < high:
            kinds |= {"straddling": (low, high), "positive": (0.0, high), "negative": (low, 0.0)}
        made: dict[str, Boxes] = {}
        for name, (left, right) in kinds.items():
            made[name] = tuple(self._box(name, left, right, shape) for shape in self.sample.shapes)
        for name in ("point", "tiny", "kinks"):
            made[name] = tuple(self._box(name, low, high, shape) for shape in self.sample.shapes)
        made["mixed"] = tuple(self._mixed([made[name][i] for name in made]) for i in range(len(self.sample.shapes)))
        made["wide"] = tuple(self._box("wide", *self.far, shape) for shape in self.sample.shapes)
        for name, boxes in made.items():
            yield name, self.admitted(boxes)

    def _box(self, name: str, low: float, high: float, shape: tuple[int, ...]) -> Interval:
        first, second = low + (high - low) * self.rand(shape), low + (high - low) * self.rand(shape)
        if name == "wide":
            first, second = torch.full_like(first, low), torch.full_like(first, high)
        elif name == "point":
            second = first.clone()
        elif name == "straddling":
            first, second = low * self.rand(shape), high * self.rand(shape)
        elif name == "tiny":
            first, second = (first - 5e-7).clamp(low, high), (first + 5e-7).clamp(low, high)
        elif name == "kinks" and (self.kinks or low <= 0 <= high):
            for number, kink in enumerate(self.kinks or [torch.zeros_like(first)]):  # a third of the ends lies on a kink
                hit = self.rand(shape) * len(self.kinks or [0]) < 0.7
                target = second if number % 2 else first
                target = torch.where(hit & (kink >= low) & (kink <= high), kink, target)
                first, second = (first, target) if number % 2 else (target, second)
        return Interval(torch.minimum(first, second), torch.maximum(first, second))

    def _mixed(self, boxes: list[Interval]) -> Interval:
        pick = (self.rand(tuple(boxes[0].lower.shape)) * len(boxes)).long().clamp(max=len(boxes) - 1)[None]
        gather = lambda ends: torch.stack(ends).gather(0, pick)[0]  # noqa: E731
        return Interval(gather([box.lower for box in boxes]), gather([box.upper for box in boxes]))

    def places(self, boxes: Boxes) -> Iterator[Tensors]:
        """Yield points of a box: its extreme corners, random ones, the interior, every kink and just beside it."""
        yield tuple(box.lower for box in boxes)
        yield tuple(box.upper for box in boxes)
        yield tuple(clamp(box.center, box) for box in boxes)
        for number in range(self.points):
            shares = [self.rand(tuple(box.lower.shape)) for box in boxes]
            if number % 3 == 0:
                shares = [share.round() for share in shares]
            yield tuple(clamp(box.lower + share * box.width, box) for share, box in zip(shares, boxes, strict=True))
        for kink in self.kinks:
            below = torch.nextafter(kink, torch.full_like(kink, -torch.inf))
            above = torch.nextafter(kink, torch.full_like(kink, torch.inf))
            for place in (kink, below, above):
                yield tuple(clamp(place, box) for box in boxes)

    def probe(self, name: str, boxes: Boxes) -> Probe:
        """Run the operator itself at the points of a box."""
        points = [self.settled(tuple(part.contiguous() for part in point)) for point in self.places(boxes)]
        values = torch.stack([self.run(*(part.clone() for part in point)) for point in points])
        stacked = tuple(torch.stack(parts) for parts in zip(*points, strict=True))
        scale = 1.0 + values.abs().amax(0)
        if isinstance(self.layer, Affine):
            largest = tuple(torch.maximum(box.lower.abs(), box.upper.abs()) for box in boxes)
            scale = scale + self.apply(self.matrix.abs(), largest) + self.zero.abs()
        return Probe(name, boxes, stacked, values, self.tolerance * scale)

    @cached_property
    def probes(self) -> list[Probe]:
        """Every box with its points and values; drawn once, used by all checks."""
        return [self.probe(name, boxes) for name, boxes in self.boxes()]

    def rows(self, signed: bool) -> Tensor:
        """Make rows of ``nu``: outputs one by one (with both signs if asked), then a few random rows."""
        count = self.zero.numel()
        chosen = torch.randperm(count, generator=self.generator)[:ROWS].sort().values.to(self.device)
        single = torch.eye(count, device=self.device, dtype=self.zero.dtype)[chosen]
        mixed = self.normal((3, count)).to(self.zero.dtype)
        return torch.cat([single, -single, mixed] if signed else [single, mixed]).reshape(-1, *self.zero.shape)

    def outputs(self, layer: DualLayer, boxes: Boxes, nu: Tensor, tangents: Tensors) -> dict[str, Tensors]:
        """Ask a layer for everything it can say about one box, by name."""
        boxes = self.admitted(boxes)
        if isinstance(layer, Composite):
            enclosure = layer.interval(*boxes)
            centers = self.settled(tuple(box.center for box in boxes))
            composed: dict[str, Tensors] = {"composition": (layer.composed(*centers),)}
            return composed if enclosure is None else {**composed, "interval": _ends(enclosure)}
        said: dict[str, Tensors] = {"interval": _ends(layer.interval(*boxes))}
        if isinstance(layer, Affine):
            said["linear"] = (layer.linear(*tangents),)
            said["transpose"] = tuple(layer.transpose(nu, tangents))
            if type(layer).magnitude is not Affine.magnitude:
                said["magnitude"] = (layer.magnitude(*(box.radius for box in boxes)),)
        if isinstance(layer, Relaxed):
            for choice in CHOICES:
                slopes = layer.slopes(boxes, choice)
                said[f"{choice} slopes"] = (*slopes.lower, *slopes.upper)
                said[f"{choice} offsets"] = _ends(layer.conjugate(slopes, boxes))
                said[f"{choice} nu_in"] = tuple(layer.pull(nu, slopes, tangents))
        return said


def _ends(pair: Interval | Offsets) -> Tensors:
    return pair.lower, pair.upper


def clamp(place: Tensor, box: Interval) -> Tensor:
    """Move a place into a box; it broadcasts against the box."""
    return torch.minimum(torch.maximum(place, box.lower), box.upper)


def join(tensors: Tensors) -> Tensor:
    """Lay tensors out as one long vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def flat(tensors: Tensors) -> Tensor:
    """Lay ``[count, *shape]`` tensors out as one ``[count, total]`` matrix."""
    return torch.cat([tensor.reshape(len(tensor), tensor[0].numel() if len(tensor) else 0) for tensor in tensors], -1)


def slack(case: Case, layer: Relaxed, probe: Probe, nu: Tensor, slopes: Slopes) -> tuple[Tensor, Tensor]:
    """Return ``nu.f(z) - (nu_in.z - h)``, which must not be negative, and its allowance; ``[rows, points]`` each."""
    offsets = layer.conjugate(slopes, probe.boxes)
    pulled = tuple(layer.pull(nu, slopes, tuple(z[0] for z in probe.points)))
    for part, shape in zip(pulled, case.sample.shapes, strict=True):
        require(tuple(part.shape) == (len(nu), *shape), f"nu_in has shape {tuple(part.shape)}, expected {(len(nu), *shape)}")
    nu_out, nu_in, values, z = flat((nu,)), flat(pulled), flat((probe.values,)), flat(probe.points)
    lower, upper = offsets.lower.flatten(), offsets.upper.flatten()
    minus_h = nu_out.clamp(min=0) @ lower + nu_out.clamp(max=0) @ upper
    difference = nu_out @ values.T - nu_in @ z.T - minus_h[:, None]
    size = (
        nu_out.abs() @ (1 + values.abs().T)
        + nu_in.abs() @ z.abs().T
        + (nu_out.abs() @ torch.maximum(lower.abs(), upper.abs()))[:, None]
    )
    return difference, case.tolerance * size
