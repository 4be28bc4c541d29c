"""Everything one computation of bounds knows: values, layers, boxes and lines, keyed by node and owned by the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from autodual.compile import Enclosure, Program
from autodual.errors import AutoDualError
from autodual.estimators import Sampling
from autodual.layout import Layout
from autodual.methods import RowLayout
from autodual.primal import Trajectory, evaluate
from autodual.regions import Region
from dual_layers import DualLayer, Interval, Slopes

ROUNDINGS = 16
"""Float allowance: this many roundoffs of every term of every node on the way, and of the penalties at each nonlinear node."""


Trial = Callable[[Tensor], tuple[tuple[Tensor, ...], Tensor]]
"""Pulls rows through a relaxed node: rows for each input, and the penalty ``[rows, batch]``, never positive."""


@dataclass(frozen=True)
class Lines:
    """The two affine bounds of a relaxed node, seen from the reference point ``z0``.

        f(z0) + slope_lo (z - z0) + lower  <=  f(z)  <=  f(z0) + slope_up (z - z0) + upper

    so that ``lower <= 0 <= upper`` if ``z0`` and ``f(z0)`` are the model's own values. ``slopes`` is None for a constant bound,
    the interval method's. ``sloping``, where given, is false for elements whose lines are level, whatever their slopes say.
    """

    slopes: Slopes | None
    lower: Tensor
    upper: Tensor
    sloping: Tensor | None = None

    @property
    def two_sided(self) -> bool:
        """Whether one walk yields both ends of a bound."""
        return self.slopes is None or self.slopes.parallel

    @cached_property
    def shift(self) -> Tensor:
        """Midpoint between the lines at the reference point, for parallel ones."""
        return 0.5 * (self.upper + self.lower)

    @cached_property
    def spread(self) -> Tensor:
        """Half the gap between the lines, for parallel ones."""
        return 0.5 * (self.upper - self.lower)


class Middles(Mapping[str, Any]):
    """A reference trajectory through the middles of boxes; elsewhere, as at inputs and constants, the model's own.

    A middle is off by a roundoff of its box, so boxes should not be much wider than what is bounded over them.

    Args:
        values: the model's own.
        boxes: of relaxed and affine nodes.
    """

    def __init__(self, values: Mapping[str, Any], boxes: Mapping[str, Interval]) -> None:
        self._values, self._boxes, self._known = values, boxes, {}

    def __getitem__(self, name: str) -> Any:
        """Return a node's value."""
        if name not in self._boxes:
            return self._values[name]
        if name not in self._known:
            self._known[name] = self._boxes[name].center
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        """Name all nodes."""
        return iter(self._values)

    def __len__(self) -> int:
        """Count all nodes."""
        return len(self._values)


@dataclass
class Run:
    """One computation of bounds on one batch.

    Attributes:
        program: the compiled graph.
        model: where parameters and leaf modules are looked up.
        layouts: where each node keeps its batch.
        points: the values of the model's arguments at which everything is centred, by name.
        regions: the region of each perturbed input node, by node name.
        given: the values as the user gave them, which the regions refer to, by node name.
        budget: bytes that the rows of one backward walk may take.
        sharing: whether the model takes a batch of one like any other, so that rows may be shared by all examples.
        claim: whether something will be claimed of the result; a loss claims nothing.
        strict: whether boxes stay as the formulas give them, but for inputs of operators that jump; the allowance alone covers
            rounding then.
        layout: how hidden rows are walked: every row in every example (``dense``), or pairs of an example and an element, in
            windows where that is possible (``windows``) or not (``whole``). By default what visits the fewest elements.
        boxes: bounds of the nodes that needed them, filled in topological order.
        hulls: interval bounds, filled on demand.
        lines: the relaxation of every nonlinear node, filled in topological order.
        how: per bounded node, how its bounds were found, for ``explain``.
        sampling: the random numbers behind the bounds, if there are any.
        walks: where it is a list, every walk from the output adds itself: the run that has its lines, and its rows.
        settled: which of several methods settled each example, where they took turns.
        remaining: then the run of the examples that none settled, and their numbers.
        trials: instead of lines, what pulls rows through a node and says what penalty that takes, while slopes are sought.
    """

    program: Program
    model: nn.Module
    layouts: Mapping[str, Layout]
    points: Mapping[str, Any]
    regions: Mapping[str, Region]
    given: Mapping[str, Tensor]
    budget: int
    sharing: bool = True
    claim: bool = True
    strict: bool = False
    layout: RowLayout = "auto"
    boxes: dict[str, Interval] = field(default_factory=dict)
    hulls: dict[str, Interval] = field(default_factory=dict)
    lines: dict[str, Lines] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    sampling: Sampling | None = None
    walks: list[tuple[Run, Tensor]] | None = None
    settled: tuple[str | None, ...] = ()
    remaining: tuple[Run, Tensor] | None = None
    trials: Mapping[str, Trial] = field(default_factory=dict)

    @cached_property
    def values(self) -> Mapping[str, Any]:
        """The reference trajectory: every node's value at the points. A loss may have no need of most of them."""
        if not self.claim:
            return Trajectory(self.program.graph, self.model, self.points)
        return evaluate(self.program.graph, self.model, self.points)

    @cached_property
    def layers(self) -> dict[str, DualLayer]:
        """The dual layer of every perturbed call node."""
        return {name: self.program.bind(name, self.model, self.values) for name in self.program.rules}

    @cached_property
    def batch(self) -> int:
        """Number of examples."""
        return len(self.given[self.program.sources[0]])

    @cached_property
    def template(self) -> Run:
        """The same run on the first example alone: what does not depend on the example is computed there."""
        batched = {node.operator for node in self.program.graph.inputs if node.name in self.layouts}
        points = {name: value[:1] if name in batched else value for name, value in self.points.items()}
        given = {name: value[:1] for name, value in self.given.items()}
        return Run(self.program, self.model, self.layouts, points, self.regions, given, self.budget)

    @property
    def divisible(self) -> bool:
        """Whether some examples may be bounded without the others, and in any number."""
        return self.sharing and not self.program.tied and not self.program.has_batch_statistics

    def take(self, index: Int[Tensor, " chosen"]) -> Run:
        """Return the run of some of the examples, with the boxes known so far and no lines.

        Args:
            index: an example may be chosen several times, once for each row that is to have lines of its own.
        """
        batched = {node.operator for node in self.program.graph.inputs if node.name in self.layouts}
        return replace(
            self,
            points={name: value[index] if name in batched else value for name, value in self.points.items()},
            regions={name: region.take(index, self.given[name]) for name, region in self.regions.items()},
            given={name: value[index] for name, value in self.given.items()},
            boxes={name: self._taken(name, box, index) for name, box in self.boxes.items()},
            hulls={name: self._taken(name, box, index) for name, box in self.hulls.items()},
            lines={},
            how={},
            trials={},
        )

    def fork(self, *, boxes: bool = False) -> Run:
        """Return a run that shares what does not depend on the method, and has no lines yet, nor boxes unless asked for."""
        _ = self.values, self.layers, self._sizes, self._shareable
        self.bind_template()
        fork = copy(self)
        fork.boxes, fork.hulls = (dict(self.boxes), dict(self.hulls)) if boxes else ({}, {})
        fork.lines, fork.how = {}, {}
        return fork

    def centered(self) -> Run:
        """Return a fork, for a loss over interval boxes, whose reference trajectory are the boxes' middles: it costs nothing.

        Lines and rows may be seen from any points that affine operators map to each other. Middles of interval boxes are
        such where the inputs' boxes have the centres in their middles, but for batch statistics, which are those of the model's
        own values, and for boxes of composite operators, which are intersected: there the model's own values stay.
        """
        program = self.program
        kept = program.has_batch_statistics or bool(program.enclosures) or program.graph.output not in program.rules
        if kept or not all(self._has_center_in_the_middle(source) for source in program.sources):
            return self.fork(boxes=True)
        self.hull(program.graph.output)
        fork = self.fork(boxes=True)
        boxes = {**fork.hulls, **fork.boxes}
        fork.values = Middles(self.values, {name: boxes[name] for name in boxes if name in program.rules})
        return fork

    def _has_center_in_the_middle(self, source: str) -> bool:
        center, hull = self.values[source], self.hull(source)
        rounding = 4 * torch.finfo(center.dtype).eps
        return bool(((hull.center - center).abs() <= rounding * torch.maximum(hull.lower.abs(), hull.upper.abs())).all())

    def _taken(self, name: str, box: Interval, index: Tensor) -> Interval:
        layout = self.layouts[name]

        def chosen(end: Tensor) -> Tensor:
            if layout.factor == 1 and end.shape[layout.axis] == self.batch:
                return end.index_select(layout.axis, index)
            shape = list(end.shape)
            shape[layout.axis] = len(index) * layout.factor
            return layout.node(self.examples(name, end).expand(self.batch, -1)[index], tuple(shape))

        return Interval(chosen(box.lower), chosen(box.upper), box.guarantee)

    def magnitudes(self, name: str) -> Tensor:
        """Return the size of the terms that add up to a node's values: what float rounding is proportional to.

        Infinite ones round to themselves.
        """
        if name not in self._sizes:
            self._sizes[name] = self._size(name)
        return self._sizes[name]

    @cached_property
    def _sizes(self) -> dict[str, Tensor]:
        return {}

    @torch.no_grad()
    def _size(self, name: str) -> Tensor:
        value = self.values[name].detach().abs().nan_to_num(posinf=0.0)
        layer = self.layers.get(name)
        if layer is None or not layer.facts.affine:
            return value
        sizes = (point.detach().abs().nan_to_num(posinf=0.0) for point in self.parents(name))
        around = (Interval(-size, size) for size in sizes)
        return value + layer.interval(*around).radius.detach()

    def rounded(self, name: str, box: Interval) -> Interval:
        """Move a box' ends outwards by what float rounding may have cost them; moving elements about costs nothing."""
        facts = self.layers[name].facts
        if self.strict or not self.claim or not facts.affine or (facts.monotone and facts.injective):
            return box
        width = box.width.detach().nan_to_num(posinf=0.0)
        slack = ROUNDINGS * self.coarsest * (self.magnitudes(name) + width)
        return Interval(box.lower - slack, box.upper + slack)

    def _rounded_image(self, name: str, parents: tuple[Interval, ...]) -> Interval:
        """Map boxes through a node, and outwards by what float rounding may have cost the ends.

        An operator on single elements maps end by end, so each end is off by roundoffs of its own size, however large the
        other: what is added to a variance keeps it positive.
        """
        layer, facts = self.layers[name], self.layers[name].facts
        if self.strict or not (facts.affine and facts.elementwise and len(parents) == 1):
            return self.rounded(name, layer.interval(*parents))
        slack, lower, upper = ROUNDINGS * self.coarsest, [], []
        for point in (parents[0].lower, parents[0].upper):
            end = layer.forward(point)
            off = slack * (end.abs() + layer.absolute(point.abs())).detach()
            lower.append(end - off)
            upper.append(end + off)
        image = Interval(torch.minimum(*lower), torch.maximum(*upper))
        known = image.lower.isfinite() & image.upper.isfinite()
        if bool(known.all()):
            return image
        loose = self.rounded(name, layer.interval(*parents))
        return Interval(torch.where(known, image.lower, loose.lower), torch.where(known, image.upper, loose.upper))

    def may_overflow(self) -> Tensor:
        """Tell for each example whether some value could leave the floats in its region: then nothing is certified.

        A score that is masked by minus infinity has no other value anywhere.
        """
        result = torch.zeros(self.batch, dtype=torch.bool, device=next(iter(self.given.values())).device)
        for name in self.program.rules:
            hull = self.hull(name)
            masked = (hull.upper == -torch.inf) & (self.values[name] == -torch.inf)
            result = result | ~self.examples(name, masked | (hull.lower.isfinite() & hull.upper.isfinite())).all(1)
        return result

    @cached_property
    def coarsest(self) -> float:
        """The largest unit roundoff among the values on the way."""
        return max(torch.finfo(self.values[name].dtype).eps for name in self.order)

    @cached_property
    def exact_intervals(self) -> frozenset[str]:
        """Nodes that interval arithmetic bounds exactly when the regions are boxes.

        They lie behind at most one affine map of coordinates that vary independently, and any number of maps that only move,
        repeat, scale or shift single elements.
        """
        program = self.program
        independent, exact = set(program.sources), set(program.sources)
        for name, rule in program.rules.items():
            parents = program.parents[name]
            if not rule.facts.affine or len(parents) != 1:
                continue
            same_shape = self.values[name].shape == self.values[parents[0]].shape
            single = rule.facts.injective or (rule.facts.elementwise and same_shape)
            if parents[0] in independent or ((single or rule.facts.selection) and parents[0] in exact):
                exact.add(name)
            if single and parents[0] in independent:
                independent.add(name)
        return frozenset(exact)

    @cached_property
    def _shareable(self) -> dict[str, bool]:
        return {}

    def is_shareable(self, name: str) -> bool:
        """Whether one example's transpose of an affine node is every example's.

        Constants may depend on the example, or on the size of the batch in ways that a graph does not show. So the layer
        bound to the first example alone must have the very constants of the whole batch's layer; only where sizes differ,
        as in a reshape, which copies numbers unchanged, a random row must come out equal.
        """
        if name not in self._shareable:
            self.bind_template()
            shareable = self.sharing and self.batch > 1 and name not in self.program.tied
            with torch.no_grad():
                self._shareable[name] = shareable and self._pulls_alike(name)
        return self._shareable[name]

    def bind_template(self) -> None:
        """Evaluate the first example alone, now: where gradients are wanted, constants that are computed must carry them."""
        if self.sharing and self.batch > 1:
            _ = self.template.layers

    def _pulls_alike(self, name: str) -> bool:
        one, value = self.template, self.values[name]
        try:
            own, whole = one.layers[name].call, self.layers[name].call
            same_numbers, same_tensors = constants_alike((own.args, own.kwargs), (whole.args, whole.kwargs))
            if not same_tensors:
                return False
            shape = tuple(one.values[name].shape)
            seed = torch.Generator().manual_seed(0)
            row = torch.randn(1, *shape, generator=seed, dtype=torch.float64).to(value)
            alone = one.layers[name].transpose(row, one.parents(name))
        except (RuntimeError, ValueError, IndexError, AutoDualError):
            return False
        layout = self.layouts[name]
        rows = layout.node(layout.examples(row, 1, 1).expand(-1, self.batch, -1), tuple(value.shape), 1)
        together = self.layers[name].transpose(rows, self.parents(name))
        for parent, part, full in zip(self.program.parents[name], alone, together, strict=True):
            first, every = one.examples(parent, part, 1), self.examples(parent, full, 1)
            if first.shape[2:] != every.shape[2:]:
                return False
            tolerance = 1e3 * torch.finfo(first.dtype).eps * float(1 + every.abs().max()) if same_numbers else 0.0
            if not torch.allclose(first.expand_as(every), every, rtol=0, atol=tolerance):
                return False
        return True

    def is_shared(self, name: str, rows: Tensor) -> bool:
        """Whether rows ``[rows, *node]`` have a batch of one and so stand for every example."""
        return self.batch > 1 and rows.shape[1 + self.layouts[name].axis] < self.values[name].shape[self.layouts[name].axis]

    def expand(self, name: str, rows: Tensor) -> Tensor:
        """Repeat shared rows for every example, without copying where strides can do it."""
        if not self.is_shared(name, rows):
            return rows
        return self.node(name, self.examples(name, rows, lead=1).expand(-1, self.batch, -1), lead=1)

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Names of all perturbed nodes, in topological order."""
        return (*self.program.sources, *self.program.rules)

    def needed(self, target: str) -> set[str]:
        """Collect the perturbed nodes that a node depends on, itself included."""
        found, stack = set(), [target]
        while stack:
            name = stack.pop()
            if name not in found:
                found.add(name)
                stack.extend(self.program.parents.get(name, ()))
        return found

    def settle(self) -> None:
        """Fill every cache now."""
        _ = self.layers, dict(self.values)
        self.bind_template()
        for name, rule in self.program.rules.items():
            if rule.facts.affine:
                self.is_shareable(name)
        for lines in self.lines.values():
            _ = lines.shift, lines.spread

    def parents(self, name: str) -> tuple[Tensor, ...]:
        """Reference values of the perturbed nodes that a node reads."""
        return tuple(self.values[parent] for parent in self.program.parents[name])

    def examples(self, name: str, value: Tensor, lead: int = 0) -> Tensor:
        """Bring a tensor shaped like a node, behind ``lead`` extra axes, to ``[*lead, batch, features]``."""
        layout = self.layouts[name]
        batch = value.shape[lead + layout.axis] // layout.factor
        return layout.examples(value, batch, lead)

    def node(self, name: str, value: Tensor, lead: int = 0) -> Tensor:
        """Undo ``examples``."""
        return self.layouts[name].node(value, tuple(self.values[name].shape), lead)

    def features(self, name: str) -> int:
        """Number of elements a node has per example."""
        value = self.values[name]
        return value.numel() // max(self.batch, 1)

    def hull(self, name: str) -> Interval:
        """Bound a node by interval arithmetic from the tightest boxes known before it."""
        if name in self.boxes:
            return self.boxes[name]
        if name not in self.hulls:
            if name in self.program.sources:
                self.hulls[name] = self.regions[name].hull(self.given[name])
            else:
                parents, layer = tuple(self.hull(parent) for parent in self.program.parents[name]), self.layers[name]
                if self.claim:
                    box = self._not_below_zero(name, parents, self._rounded_image(name, parents))
                else:
                    box = image(layer, parents)
                for enclosure, layer in self._enclosures(name):
                    tighter = layer.interval(*(self._with_roundoff(self.hull(parent)) for parent in enclosure.parents))
                    box = box if tighter is None else meet(box, tighter)
                self.hulls[name] = box
        return self.hulls[name]

    def _with_roundoff(self, box: Interval) -> Interval:
        """Widen the input of a composite operator by what its terms may lose to float rounding.

        Its interval sees none of the parts, whose boxes are rounded one by one. But terms that cancel inside it, such as
        values and their mean, are off by roundoffs of the input's own size: the result is that of an input so far away.
        """
        if self.strict or not self.claim:
            return box
        slack = ROUNDINGS * self.coarsest
        below, above = (slack * end.detach().abs().nan_to_num(posinf=0.0) for end in (box.lower, box.upper))
        return replace(box, lower=box.lower - below, upper=box.upper + above)

    def _not_below_zero(self, name: str, parents: tuple[Interval, ...], box: Interval) -> Interval:
        """Undo rounding below zero: what adds up non-negative terms is never negative, and a square root must see that.

        Each element is judged by its own terms: one that may be negative counts as unbounded.
        """
        facts = self.layers[name].facts
        single = facts.elementwise and len(parents) == 1
        if not (facts.affine and (facts.monotone or single)):
            return box
        ends = (torch.where(parent.lower < 0, -torch.inf, torch.zeros_like(parent.lower)) for parent in parents)
        signs = (replace(parent, lower=end) for parent, end in zip(parents, ends, strict=True))
        least = self.layers[name].interval(*signs)
        return replace(box, lower=torch.where(least.lower >= 0, box.lower.clamp(min=0), box.lower))

    def forget_behind(self, name: str) -> None:
        """Drop interval bounds of later nodes, which may have been asked for before this node's box was known."""
        for later in self.order[self.order.index(name) :]:
            self.hulls.pop(later, None)

    def _enclosures(self, name: str) -> Iterator[tuple[Enclosure, DualLayer]]:
        layers = self.program.bind_enclosures(name, self.model, self.values)
        return zip(self.program.enclosures.get(name, ()), layers, strict=True)

    def rows(self, name: str, rows: Tensor) -> Tensor:
        """Bring rows ``[rows, examples, features]`` to ``[rows, *node]``, for as many examples as there are, such as one."""
        layout, shape = self.layouts[name], list(self.values[name].shape)
        shape[layout.axis] = layout.factor * rows.shape[1]
        return layout.node(rows, tuple(shape), lead=1)

    def relate(self, name: str, slopes: Slopes, box: tuple[Interval, ...], sloping: Tensor | None = None) -> Lines:
        """Turn slopes into lines seen from the reference point.

        Args:
            name: of a relaxed node.
            slopes: of its lines.
            box: of its inputs.
            sloping: where lines are sloping beyond doubt, if another box has decided that.
        """
        layer, value = self.layers[name], self.values[name]
        offsets = layer.conjugate(slopes, box)
        reached = layer.push(slopes.lower, self.parents(name)) - value
        lower = offsets.lower + reached
        upper = offsets.upper + (reached if slopes.parallel else layer.push(slopes.upper, self.parents(name)) - value)
        slopes = slopes.bare
        # Rounding apart, lines lie about a reference point on the graph; a loss' need not, and does with less.
        lines = Lines(slopes, lower.clamp(max=0), upper.clamp(min=0)) if self.claim else Lines(slopes, lower, upper)
        return self._levelled(name, lines, sloping) if name in self.program.enclosures and not self.strict else lines

    def _levelled(self, name: str, lines: Lines, sloping: Tensor | None) -> Lines:
        """Make lines level where they are further apart than a composite operator's own interval."""
        hull, value = self.hull(name), self.values[name]
        below, above = (hull.lower - value).clamp(max=0), (hull.upper - value).clamp(min=0)
        sloping = ~(above - below < lines.upper - lines.lower) if sloping is None else sloping
        lower, upper = torch.where(sloping, lines.lower, below), torch.where(sloping, lines.upper, above)
        return lines if sloping.all() else Lines(lines.slopes, lower, upper, sloping)

    def rows_per_chunk(self, name: str) -> int:
        """How many rows of a backward walk that starts at a node fit the memory budget."""
        value = self.values[name]
        widest = max(self.features(parent) for parent in [name, *self.program.rules, *self.program.sources])
        live = 4  # a row at an operator's two ends, and two temporaries of its contraction
        return max(1, self.budget // (live * widest * max(self.batch, 1) * value.element_size()))


def image(layer: DualLayer, boxes: tuple[Interval, ...]) -> Interval:
    """Map boxes through an operator by the shortest way, for a loss: an infinite end may come out as NaN."""
    facts = layer.facts
    if facts.affine and (facts.monotone or (facts.elementwise and len(boxes) == 1)):
        ends = layer.forward(*(box.lower for box in boxes)), layer.forward(*(box.upper for box in boxes))
        return Interval(*ends) if facts.monotone else Interval(torch.minimum(*ends), torch.maximum(*ends))
    if facts.affine:
        radii = tuple(0.5 * (box.upper - box.lower) for box in boxes)
        center = layer.forward(*(box.lower + radius for box, radius in zip(boxes, radii, strict=True)))
        radius = layer.magnitude(*radii)
        return Interval(center - radius, center + radius)
    if facts.monotone and facts.positionwise and layer.continuous():
        (box,) = boxes
        return Interval(layer.forward(box.lower), layer.forward(box.upper))
    return layer.interval(*boxes)


def meet(box: Interval, other: Interval) -> Interval:
    """Intersect two boxes of the same values; an end that is NaN says nothing, ends that rounding made cross stay."""
    if bool((box.lower + box.upper + other.lower + other.upper).detach().sum().isfinite()):  # the usual case, at a fraction
        met = Interval(torch.maximum(box.lower, other.lower), torch.minimum(box.upper, other.upper))
        if met.lower.numel() and bool(met.width.detach().amin() >= 0):
            return met
    lower, upper = torch.fmax(box.lower, other.lower), torch.fmin(box.upper, other.upper)
    crossed = lower > upper
    return Interval(torch.where(crossed, box.lower, lower), torch.where(crossed, box.upper, upper))


def constants_alike(own: Any, other: Any) -> tuple[bool, bool]:
    """Compare two calls' constant arguments: whether all numbers are the same, and whether all tensors are."""
    if isinstance(own, Tensor) or isinstance(other, Tensor):
        alike = own is other or (
            isinstance(own, Tensor) and isinstance(other, Tensor) and own.dtype == other.dtype and torch.equal(own, other)
        )
        return True, alike
    if isinstance(own, Mapping) and isinstance(other, Mapping):
        own, other = list(own.items()), list(other.items())
    if isinstance(own, slice) and isinstance(other, slice):
        own, other = (own.start, own.stop, own.step), (other.start, other.stop, other.step)
    if isinstance(own, (tuple, list)) and isinstance(other, (tuple, list)):
        if len(own) != len(other):
            return False, False
        pairs = [constants_alike(a, b) for a, b in zip(own, other, strict=True)]
        return all(numbers for numbers, _ in pairs), all(tensors for _, tensors in pairs)
    if isinstance(own, float) or isinstance(other, float):  # a factor, never a size
        return own == other, own == other
    return own == other, True


def identity_rows(width: int, rows: Int[Tensor, " rows"], like: Tensor) -> Float[Tensor, "rows 1 {width}"]:
    """Return one-hot rows ``[len(rows), 1, width]``."""
    seeds = torch.zeros(len(rows), 1, width, dtype=like.dtype, device=like.device)
    seeds[torch.arange(len(rows), device=like.device), 0, rows] = 1
    return seeds
