"""The walk "optimise": gradient ascent on the dual objective over the slopes of relaxed elements, row by row.

Every slope is dual feasible, so the ascent can only make a bound tighter: it looks for slopes, and a plain backward walk
through the lines found gives the bound. Each row of each example has slopes of its own. That takes no axis of rows: a row is
an example of a batch (``Run.take``) that holds an example as often as it has rows, so that rows of any examples go through
one walk together.

The conjugate's derivative in a slope is minus the point where the line touches (the envelope theorem), so autograd through
the walk gives the derivative of the objective. Only elements between their lines have slopes to seek: a walk of the ascent
gathers those, and multiplies the others by the slope that they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autodual.bounds.backward import Deviation, backward
from autodual.bounds.picked_rows import Height, PickedRows
from autodual.bounds.run import Run
from autodual.errors import AutoDualError
from dual_layers import Interval, Relaxed, Slopes
from dual_layers.contract import Choice

LIVE = 3
"""Copies of a row at each node that an ascent holds: the row, what it was multiplied with, and the derivative."""

STEP = 0.6
"""First step, as a share of a slope's range."""

SHRINKING = 1.5
"""The last step is as much smaller as this power of the number of steps."""

FADING = 0.4
"""How much of the running means of derivatives, and of their squares, a step keeps."""

SMALL = 0.3
"""Derivatives, as shares of a box, that are smaller than so much of a step make smaller steps (decision 0011)."""


@dataclass(frozen=True)
class Ascent:
    """How to climb.

    Attributes:
        steps: how many.
        goal: deviations that need no improvement, one for each row of each example, or None to use all steps.
    """

    steps: int
    goal: Float[Tensor, "*rows"] | None = None


def climb(
    run: Run,
    target: str,
    rows: Callable[[Tensor, Tensor], Tensor],
    chosen: Bool[Tensor, "rows batch"],
    ascent: Ascent,
    *,
    magnitude: bool,
) -> Deviation:
    """Bound chosen rows of chosen examples from below, each with slopes of its own.

    Args:
        run: with the box of every relaxed node's input.
        target: the node whose rows these are.
        rows: gives the rows, ``[pairs, features of the target]``, for pairs of a row and an example.
        chosen: which rows of which examples; where it is false nothing is known.
        ascent: how to climb.
        magnitude: as for ``backward``.
    """
    asked = chosen if run.divisible else chosen.any(1, keepdim=True).expand_as(chosen)
    row, example = asked.nonzero().unbind(1)
    lower = torch.full(chosen.shape, -torch.inf, dtype=run.values[target].dtype, device=chosen.device)
    size = torch.zeros_like(lower)
    for part in _parts(run, target, row, example):
        pairs = row[part], example[part]
        goal = None if ascent.goal is None else ascent.goal[pairs]
        found = _climb_together(run, target, example[part], rows(*pairs), Ascent(ascent.steps, goal), magnitude=magnitude)
        lower = lower.index_put(pairs, found.lower[0])
        size = size if found.magnitude is None else size.index_put(pairs, found.magnitude[0])
    return Deviation(lower.where(chosen, -torch.inf), None, size if magnitude else None)


def _parts(run: Run, target: str, row: Tensor, example: Tensor) -> Iterator[Tensor]:
    """Split pairs into parts that fit the budget; examples that cannot do without each other stay together, row by row."""
    every = torch.arange(len(row), device=row.device)
    if not run.divisible:
        yield from (every[row == one] for one in row.unique())
        return
    features = sum(run.features(name) for name in run.needed(target))
    yield from every.split(max(1, run.budget // (LIVE * run.values[target].element_size() * features)))


def _climb_together(run: Run, target: str, example: Tensor, rows: Tensor, ascent: Ascent, *, magnitude: bool) -> Deviation:
    """Climb with one row for each example of a batch of the run's own making."""
    with torch.no_grad():
        taken = _taken(run, example)
        nu = taken.node(target, rows.detach()[None], lead=1)
        slopes = Climber(taken, target, nu).climb(ascent)
    if torch.is_grad_enabled():
        taken = _taken(run, example)
        nu = taken.node(target, rows[None], lead=1)
    for name, chosen in slopes.items():
        taken.lines[name] = taken.relate(name, chosen, box_of(taken, name))
    return backward(taken, target, nu, magnitude=magnitude)


def _taken(run: Run, example: Tensor) -> Run:
    """Return the run of these examples, or of all where they cannot be divided."""
    return run.take(example) if run.divisible else run.fork(boxes=True)


def box_of(run: Run, name: str) -> tuple[Interval, ...]:
    """Return the boxes of a relaxed node's inputs."""
    return tuple(run.boxes[parent] for parent in run.program.parents[name])


class Climber:
    """The slopes of one row per example, and the search for better ones.

    Args:
        run: with the boxes of the inputs of every relaxed ancestor of the target.
        target: the node whose rows these are.
        nu: ``[1, *target]``.
    """

    def __init__(self, run: Run, target: str, nu: Tensor) -> None:
        self.run, self.target, self.nu = run, target, nu
        self.trials: dict[str, Trial] = {}
        ancestors = run.needed(target)
        for name in run.program.relaxed:
            if name in ancestors:
                box = box_of(run, name)
                run.lines[name] = run.relate(name, run.layers[name].slopes(box, "adaptive"), box)
                if is_sought(run, name):
                    self.trials[name] = Trial(run, name)

    def climb(self, ascent: Ascent) -> dict[str, Slopes]:
        """Take all steps, or as many as the goal needs, and return the best slopes seen of every relaxed node."""
        trials, run = [trial for trial in self.trials.values() if len(trial.index)], self.run
        if trials:
            run.trials = {trial.name: trial.pull_node for trial in trials}
            search(trials, ascent, self._objective)
            run.trials = {}
        sought = {trial.name: trial.chosen() for trial in trials}
        return {name: sought.get(name, lines.slopes) for name, lines in run.lines.items()}

    def _objective(self) -> Float[Tensor, " batch"]:
        return backward(self.run, self.target, self.nu).lower[0]


def search(trials: Sequence[Sought], ascent: Ascent, objective: Callable[[], Float[Tensor, " rows"]]) -> Float[Tensor, " rows"]:
    """Seek slopes from the better of adaptive and parallel ones, and return the best value of each row.

    A row that has reached its goal keeps what reached it, however long others take: no row changes another.

    Args:
        trials: of all nodes whose slopes are sought; afterwards they hold the best.
        ascent: how to climb.
        objective: the value of every row with the present slopes.
    """
    best, active = torch.tensor(-torch.inf), torch.tensor(True)

    def keep(value: Tensor) -> None:
        nonlocal best
        better = (value > best) & active
        for trial in trials:
            trial.keep(better)
        best = torch.where(better, value, best)

    for choice in ("adaptive", "parallel"):
        for trial in trials:
            trial.start(choice)
        keep(objective())
    for trial in trials:
        trial.resume()
    for step in range(ascent.steps):
        active = active if ascent.goal is None else active & ~(best > ascent.goal)
        if not active.any():
            return best
        with torch.enable_grad():
            slopes = [slope for trial in trials for slope in trial.leaves()]
            value = objective()
            derivatives = iter(torch.autograd.grad(value.sum(), slopes, allow_unused=True))
        keep(value.detach())
        size = STEP * ascent.steps ** (-SHRINKING * step / max(ascent.steps - 1, 1))
        for trial in trials:
            trial.step(derivatives, step + 1, size)
    keep(objective())
    return best


class Sought:
    """The slopes of one relaxed node that are sought, each row's own: those of elements between their lines.

    A subclass says how rows see the node (``_table``).

    Attributes:
        index: where the elements are in the rows, laid flat.
        example: whose row each is.
        rest: the slopes of all other elements in the rows, and zeros.
        source: where they are in the table of values that rows see.
        counts: how many each row has.
        part: of the rows that arrived last, those elements.
    """

    index: Tensor
    example: Tensor
    rest: Tensor
    source: Tensor
    counts: Tensor
    part: Tensor

    attached = False
    """Whether lines carry derivatives by the box: not while slopes are sought. All elements then count."""

    def _prepare(self, run: Run, name: str) -> None:
        """Lay out what the search needs of a node that works element by element and has its adaptive lines."""
        lines, (box,) = run.lines[name], box_of(run, name)
        value, (point,), layer = run.values[name], run.parents(name), run.layers[name]
        lower, upper = (side[0].expand_as(value) for side in (lines.slopes.lower, lines.slopes.upper))
        flat = self._laid_out(lower.detach())
        self.count = len(flat)
        chosen = torch.ones_like(flat, dtype=torch.bool) if self.attached else self._laid_out(between_lines(run, name))
        self.index, self.counts = chosen.flatten().nonzero()[:, 0], chosen.sum(1)
        self.example = torch.arange(len(flat), device=flat.device).repeat_interleave(self.counts)
        _, place = self._table(lower)
        self.source = self.index
        if place is not None:
            column = self.index - self.example * flat.shape[1]
            self.source = place.index_select(0, self.example) * flat.shape[1] + column
        self.rest = flat.flatten().index_fill(0, self.index, 0.0)
        self.low, self.high = (self._of(end.expand_as(value)) for end in layer.slope_range((box,)))
        self.sides = (True, not layer.facts.convex)  # above a convex function nothing beats the chord
        self.starts = {"adaptive": [self._of(lower), self._of(upper)]}
        parallel = self._of(layer.slopes((box,), "parallel").lower[0].expand_as(value))
        self.starts["parallel"] = [
            parallel if sought else upper for sought, upper in zip(self.sides, self.starts["adaptive"], strict=True)
        ]
        self.value, self.point = self._of(value), self._of(point)
        self.conjugate = Conjugate(layer, box, self)
        self.best = self.now = self.starts["adaptive"]
        self.heights = [self._height(slope, side) for side, slope in enumerate(self.now)]
        self.width = self._of(box.width.expand_as(value)).clamp(max=torch.finfo(value.dtype).max)
        self.means = [(torch.zeros_like(slope), torch.zeros_like(slope)) for slope in self.now]

    def _table(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return values as rows see them, ``[some, features]``, and which of these each row sees; None: each its own."""
        raise NotImplementedError

    def _laid_out(self, value: Tensor) -> Tensor:
        table, place = self._table(value)
        return table if place is None else table.index_select(0, place)

    def _of(self, value: Tensor) -> Tensor:
        """Pick the elements whose slopes are sought."""
        table, _ = self._table(value if self.attached else value.detach())
        return table.flatten().index_select(0, self.source)

    def pull(self, nu: Tensor) -> tuple[Tensor, Float[Tensor, " rows"]]:
        """Pull rows through the node: what arrives at its input, and the penalty of each row."""
        lower, upper = self.sides_now()
        pulled, penalty, self.part = PickedRows.apply(
            nu.reshape(-1), self.rest, self.index, self.example, self.counts, *self.now, lower, upper
        )
        return pulled.view(nu.shape), penalty

    def spread(self, slope: Tensor) -> Tensor:
        """Put slopes where they belong in the rows, laid flat."""
        return self.rest.scatter(0, self.index, slope)

    def start(self, choice: Choice) -> None:
        """Start from the adaptive slopes, or from the parallel ones."""
        self.now = self.starts[choice]

    def leaves(self) -> list[Tensor]:
        """Return the slopes that are sought, ready to be differentiated by."""
        self.now = [slope.detach().requires_grad_(sought) for slope, sought in zip(self.now, self.sides, strict=True)]
        return [slope for slope in self.now if slope.requires_grad]

    def keep(self, better: Bool[Tensor, " batch"]) -> None:
        """Remember the slopes of some rows."""
        mine = better.index_select(0, self.example)
        self.best = [
            torch.where(mine, now.detach(), best) if sought else best
            for now, best, sought in zip(self.now, self.best, self.sides, strict=True)
        ]

    def resume(self) -> None:
        """Go on from the best slopes."""
        self.now = self.best

    def step(self, derivatives: Iterator[Tensor | None], count: int, size: float) -> None:
        """Take a step uphill.

        A derivative by a slope is what the row weighs an element with, times the distance of two points of the element's box:
        where the row is smallest, and where the line touches. As a share of the box it is about 1 at most, whatever the scale
        of the network. Large shares make steps of one size; small ones, of slopes that are all but right, make smaller steps.
        """
        numbers, kept = torch.finfo(self.part.dtype), 1 - FADING**count
        whole = (self.part * self.width).abs_().clamp_(numbers.tiny, numbers.max)
        for side, (mean, square) in enumerate(self.means):
            derivative = next(derivatives) if self.sides[side] else None
            if derivative is None:
                continue
            share = (derivative / whole).clamp_(-1, 1)
            mean.lerp_(share, 1 - FADING)
            square.lerp_(share.square_(), 1 - FADING)
            scale = (square / kept).clamp_(min=numbers.tiny).sqrt_().add_(SMALL * size)  # the least numbers have slow roots
            moved = torch.addcdiv(self.now[side].detach(), mean * (self.high - self.low), scale, value=size / kept)
            self.now[side] = torch.minimum(torch.maximum(moved, self.low), self.high)

    def sides_now(self) -> tuple[Tensor, Tensor]:
        """Return how far the present lines are from the reference point: the lower ones, and the upper ones."""
        lower, upper = (
            self._height(slope, side) if sought else self.heights[side]
            for side, (slope, sought) in enumerate(zip(self.now, self.sides, strict=True))
        )
        return lower, upper

    def _height(self, slope: Tensor, side: int) -> Tensor:
        """Return how far the lower (``side`` 0) or upper (1) line is from the reference point, as ``Run.relate`` does."""
        if self.conjugate.vertices is not None and not self.attached:
            return Height.apply(slope, *self.conjugate.vertices, self.point, self.value, bool(side))
        height = self.conjugate(slope, side) - self.value + slope * self.point
        return height.clamp(min=0) if side else height.clamp(max=0)


class Trial(Sought):
    """The slopes of one relaxed node in a run with one row per example.

    Args:
        run: with the node's lines.
        name: of a node that works element by element.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name = run, name
        self._prepare(run, name)

    def _table(self, value: Tensor) -> tuple[Tensor, None]:
        return self.run.examples(self.name, value), None

    def pull_node(self, nu: Tensor) -> tuple[tuple[Tensor], Float[Tensor, "1 batch"]]:
        """Pull rows ``[1, *node]`` as a walk of whole rows does."""
        pulled, penalty = self.pull(self.run.examples(self.name, nu, lead=1))
        return (self.run.node(self.name, pulled, lead=1),), penalty[None]

    def chosen(self) -> Slopes:
        """Return the best slopes of all elements."""
        lower, upper = (self.in_node(side) for side in self.best)
        return Slopes((lower,), (upper,))

    def in_node(self, slope: Tensor) -> Tensor:
        """Put slopes where they belong in the node."""
        return self.run.node(self.name, self.spread(slope).view(self.count, self.run.features(self.name)))


class Conjugate:
    """The offsets of one node's lines at the elements whose slopes are sought, for many slopes over the same boxes.

    Args:
        layer: the node's rule.
        box: of its input.
        trial: says which elements, and, for a rule without vertices, where they belong.
    """

    def __init__(self, layer: Relaxed, box: Interval, trial: Sought) -> None:
        self.layer, self.trial = layer, trial
        self.box = box if trial.attached else Interval(box.lower.detach(), box.upper.detach())
        self.small = Interval(trial._of(box.lower), trial._of(box.upper))
        vertices = layer.vertices((self.box,))
        self.vertices = vertices and tuple(torch.stack([trial._of(each) for each in part]) for part in vertices)
        self.compact = self.vertices is None and self._works_on_single_elements()
        if self.vertices is not None:
            ends_first = [*sorted({0, len(self.vertices[0]) - 1}), *range(1, len(self.vertices[0]) - 1)]
            self.vertices = tuple(part[ends_first] for part in self.vertices)

    def __call__(self, slope: Tensor, side: int) -> Tensor:
        """Return ``min`` (``side`` 0) or ``max`` (1) of ``f(z) - slope z``."""
        if self.vertices is not None:
            places, values = self.vertices
            residuals = torch.addcmul(values, places, slope, value=-1)
            return residuals.amax(0) if side else residuals.amin(0)
        return self._picked(slope, side) if self.compact else self._whole(slope, side)

    def _picked(self, slope: Tensor, side: int) -> Tensor:
        offsets = self.layer.conjugate(_parallel(slope), (self.small,))
        return offsets.upper if side else offsets.lower

    def _whole(self, slope: Tensor, side: int) -> Tensor:
        offsets = self.layer.conjugate(_parallel(self.trial.in_node(slope)), (self.box,))
        return self.trial._of(offsets.upper if side else offsets.lower)

    def _works_on_single_elements(self) -> bool:
        """Whether the rule gives picked elements the same lines as the whole node: not where it has parameters by channel."""
        slope = self.trial.low
        try:
            return all(torch.equal(self._picked(slope, side), self._whole(slope, side)) for side in (0, 1))
        except (RuntimeError, ValueError, IndexError, AutoDualError):
            return False


def between_lines(run: Run, name: str) -> Bool[Tensor, " *node"]:
    """Tell which elements lie between two lines, and so have slopes to seek; the others' is known."""
    lines, value = run.lines[name], run.values[name]
    lower, upper = (side[0].expand_as(value) for side in (lines.slopes.lower, lines.slopes.upper))
    return (lines.lower < lines.upper) | (lower != upper)


def _parallel(slope: Tensor) -> Slopes:
    both = (slope,)
    return Slopes(both, both)


def is_sought(run: Run, name: str) -> bool:
    """Whether a node works element by element, does not jump, and has no composite operator's interval to mind."""
    layer, lines = run.layers[name], run.lines[name]
    return layer.facts.positionwise and layer.continuous() and lines.slopes is not None and name not in run.program.enclosures
