"""The linear relaxation of a network (thesis, eq. 3.6), solved by HiGHS, and the dual network that its multipliers choose.

The variables of one example are the deviations ``d = z - z0`` of all perturbed nodes from the reference trajectory:

    minimise  c . d_out    where    d = A d_parents                                       for affine nodes,
                                    slope . d_parents + lower <= d <= slope . d_parents + upper,  every slope tried,
                                    d_input in the region.

Multipliers of the lines, positive for lower ones and negative for upper ones, add up to the ``nu`` that arrives at an element,
and weighted by the slopes to what leaves it. Their quotient is one slope, so a dual network with these slopes reaches the
optimum. It is walked like any other: whatever the solver returned, weak duality makes its value a bound.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from autodual.bounds.backward import Deviation, backward
from autodual.bounds.run import Lines, Run, identity_rows
from autodual.errors import SpecificationError
from autodual.methods import LP
from autodual.regions import L1
from dual_layers import Interval, Slopes

Array = NDArray[np.float64]
Blocks = list[tuple[Any, ...]]
"""For each parent a sparse matrix per example."""

NEGLIGIBLE = 1e-9
"""A share of a node's largest ``nu`` below which an element's own is taken for rounding."""

MOST_CANCELLED = 4.0
"""How many times their sum multipliers may amount to, for offsets to be mixed by them."""

OUT_OF_TIME = 1
"""scipy's number for a limit that was reached."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Relaxation:
    """The optima of linear relaxations. A tensor for a node has rows first, then the node's own shape, batch included.

    Attributes:
        optimum: ``(batch, rows)`` what the solver found, right up to its tolerances; NaN where it failed.
        bound: ``(batch, rows)`` the proved lower bound that its multipliers lead to; the intermediate method's where that is
            better, or where the solver failed.
        points: by node, ``[rows, *node]``: values at which the relaxation takes its optimum. An input's are in the region.
        duals: by node, ``[rows, *node]``: the multipliers ``nu``: by how much the optimum moves with the node.
    """

    optimum: Float[Tensor, "batch rows"]
    bound: Float[Tensor, "batch rows"]
    points: Mapping[str, Tensor]
    duals: Mapping[str, Tensor]


@dataclass(frozen=True)
class Optimum:
    """The optimum of one row in every example, and the lines that reach it.

    Attributes:
        value: ``[batch]``, as a deviation from the row's reference value; NaN where the solver failed.
        points: per node, deviations ``[batch, features]``.
        duals: per node, ``[batch, features]``.
        lines: per relaxed node.
    """

    value: Float[Tensor, " batch"]
    points: dict[str, Tensor]
    duals: dict[str, Tensor]
    lines: dict[str, Lines]


def tightened(
    run: Run, method: LP, output: str, rows: Float[Tensor, "some rows outputs"], base: Deviation, *, lower_only: bool
) -> Deviation:
    """Tighten rows of the output by their linear programs.

    Args:
        run: boxes and lines of all relaxed ancestors are known.
        method: the options.
        output: the node the rows start at.
        rows: ``(batch or 1, rows, outputs)``.
        base: the deviation of the rows by the lines of the run, which is kept where it is better.
        lower_only: leave the upper ends as they are.
    """
    program, lower, upper, magnitude = LinearProgram(run, method, output), [], [], []
    for row, below, above in zip(rows.unbind(1), base.lower, base.upper, strict=True):
        found = [program.bound(row)] if lower_only else [program.bound(row), program.bound(-row)]
        lower.append(_larger(found[0][1].lower[0], below))
        upper.append(above if lower_only else -_larger(found[1][1].lower[0], -above))
        magnitude.append(torch.stack([walk.magnitude[0] for _, walk in found]).amax(0))
    program.note()
    sizes = base.lower if base.magnitude is None else torch.maximum(base.magnitude, _stack(magnitude, base.lower))
    return Deviation(_stack(lower, base.lower), _stack(upper, base.upper), sizes)


def relaxation(run: Run, method: LP, output: str, rows: Float[Tensor, "some rows outputs"], base: Deviation) -> Relaxation:
    """Solve the linear programs of rows and return all there is to know; arguments as for ``tightened``."""
    program = LinearProgram(run, method, output)
    found = [program.bound(row) for row in rows.unbind(1)]
    middle = (rows * run.examples(output, run.values[output])[:, None]).sum(-1)
    optimum = middle + _stack([optimum.value for optimum, _ in found], base.lower).T
    lower = _stack([_larger(walk.lower[0], below) for (_, walk), below in zip(found, base.lower, strict=True)], base.lower)
    program.note()

    def gather(pick: Callable[[Optimum, str], Tensor]) -> dict[str, Tensor]:
        return {name: run.node(name, torch.stack([pick(each, name) for each, _ in found]), 1) for name in program.names}

    points = gather(lambda each, name: run.examples(name, run.values[name]) + each.points[name])
    return Relaxation(optimum, middle + lower.T, points, gather(lambda each, name: each.duals[name]))


def _larger(found: Tensor, known: Tensor) -> Tensor:
    return torch.where(found > known, found, known)  # NaN is never larger


def _stack(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(parts) if parts else like


@dataclass(frozen=True)
class Candidates:
    """The lines that a relaxed node may have in the program.

    Attributes:
        slopes: of each candidate, one tensor per perturbed input.
        lower: offsets from the reference point, ``[candidates, batch, features]``.
        upper: likewise.
        below: which lower lines are worth a constraint, shaped like these.
        above: which upper lines are.
        exact: whether the rule's offset of mixed slopes is never worse than the same mixture of offsets: it is where the offset
            is a minimum over the box, hence concave in the slopes, but not where it is the better of several bounds.
    """

    slopes: list[tuple[Tensor, ...]]
    lower: Tensor
    upper: Tensor
    below: Bool[Tensor, "candidates batch features"]
    above: Bool[Tensor, "candidates batch features"]
    exact: bool


def candidates(run: Run, name: str, cells: int) -> Candidates:
    """Collect the slopes that a node's rule knows of and find the offsets of each; adaptive ones come first.

    The last part of a composite operator has level lines too, at the ends of the whole operator's interval.
    """
    box, positionwise, slopes = _boxes(run, name), _is_positionwise(run, name), _slopes(run, name, cells)
    level = name in run.program.enclosures and not run.strict and len(slopes) > 1
    exact = positionwise and not level
    with torch.set_grad_enabled(torch.is_grad_enabled() and not exact):  # offsets that are not mixed only serve the solver
        lines = [run.relate(name, Slopes(each, each), box, levelled=False) for each in slopes]
    if level:
        hull, value = run.hull(name), run.values[name]
        slopes.append(tuple(torch.zeros_like(each) for each in slopes[0]))
        lines.append(Lines(None, (hull.lower - value).clamp(max=0), (hull.upper - value).clamp(min=0)))
    lower = torch.stack([run.examples(name, each.lower) for each in lines])
    upper = torch.stack([run.examples(name, each.upper) for each in lines])
    below, above = lower.isfinite(), upper.isfinite()
    if positionwise:
        (parent,) = run.program.parents[name]
        slope = torch.stack([run.examples(name, each.expand_as(run.values[name])) for (each,) in slopes])
        reach = [run.examples(parent, end - run.values[parent]) for end in (box[0].lower, box[0].upper)]
        below = below & ~_dominated([-(slope * end + lower) for end in reach])
        above = above & ~_dominated([slope * end + upper for end in reach])
    return Candidates(slopes, lower, upper, below, above, exact)


@torch.no_grad()
def _slopes(run: Run, name: str, cells: int) -> list[tuple[Tensor, ...]]:
    layer, box = run.layers[name], _boxes(run, name)
    adaptive, parallel = layer.slopes(box, "adaptive"), layer.slopes(box, "parallel")
    slopes = [adaptive.lower, adaptive.upper, parallel.lower, *layer.alternatives(box, cells)]
    return slopes if all(_can_mix(run, name, each) for each in slopes) else [parallel.lower]


def _boxes(run: Run, name: str) -> tuple[Interval, ...]:
    return tuple(run.boxes[parent] for parent in run.program.parents[name])


def _is_positionwise(run: Run, name: str) -> bool:
    (parent, *others) = run.program.parents[name]
    return run.layers[name].facts.positionwise and not others and run.values[parent].shape == run.values[name].shape


def _dominated(ends: list[Tensor]) -> Bool[Tensor, "candidates batch features"]:
    """Mark upper lines, given by their values at both ends of a box, that another one lies below; of equals the first stays."""
    result = torch.zeros_like(ends[0], dtype=torch.bool)
    for number in range(len(result)):
        lower = torch.stack([end <= end[number] for end in ends]).all(0)
        equal = torch.stack([end == end[number] for end in ends]).all(0)
        equal[:number] = False
        result[number] = (lower & ~equal).any(0)
    return result


def _can_mix(run: Run, name: str, slopes: tuple[Tensor, ...]) -> bool:
    """Whether every element of the output may have lines of its own: not in a product of matrices, whose rows share slopes.

    Tried out, since offsets are mixed on the strength of it: is ``w * (slope . z) == (w * slope) . z`` for random ``w``, ``z``?
    """
    layer, seed = run.layers[name], torch.Generator().manual_seed(0)

    def draw(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=seed, dtype=torch.float64).to(slopes[0])

    weight, points = draw(run.values[name]), tuple(draw(z) for z in run.parents(name))
    try:
        mixed = layer.push(tuple(_weighed(run, name, weight, slope) for slope in slopes), points)
    except (RuntimeError, ValueError, IndexError):
        return False
    plain = weight * layer.push(slopes, points)
    return mixed.shape == plain.shape and torch.allclose(mixed, plain, rtol=1e-4, atol=1e-5 * float(1 + plain.abs().max()))


def _broadcasts(value: Tensor, like: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(value.shape, like.shape) == like.shape
    except RuntimeError:
        return False


def _weighed(run: Run, name: str, weight: Tensor, slope: Tensor) -> Tensor:
    """Multiply slopes by a weight for each element of the output, be it one of a reduction."""
    if _broadcasts(slope, weight):
        return weight * slope
    return run.layers[name].pull(weight[None], Slopes((slope,), (slope,)), run.parents(name))[0][0]


def _mixed(run: Run, name: str, slopes: list[tuple[Tensor, ...]], weights: Tensor) -> tuple[Tensor, ...]:
    """Combine slopes by weights ``[candidates, batch, features]`` that sum to one."""
    if len(slopes) == 1:
        return slopes[0]
    nodes = run.node(name, weights, 1)
    parts = [tuple(_weighed(run, name, weight, slope) for slope in each) for weight, each in zip(nodes, slopes, strict=True)]
    return tuple(sum(part) for part in zip(*parts, strict=True))


class LinearProgram:
    """The linear relaxation of everything before a node, one program for each example.

    Args:
        run: boxes of the inputs of all relaxed ancestors are known.
        method: the options.
        output: the node.
    """

    def __init__(self, run: Run, method: LP, output: str) -> None:
        _check_scipy()
        self.run, self.method, self.output = run, method, output
        needed = run.needed(output)
        self.names = [name for name in run.order if name in needed]
        self.asked = self.failed = 0
        self.candidates = {name: candidates(run, name, method.cells) for name in run.program.relaxed if name in needed}
        with torch.no_grad():
            self.programs = self._assembled()

    def bound(self, row: Float[Tensor, "some outputs"]) -> tuple[Optimum, Deviation]:
        """Minimise a row of the output, ``(batch or 1, outputs)``, and walk it back along the lines found."""
        run, kept = self.run, dict(self.run.lines)
        optimum = self.minimise(row)
        shape, layout = list(run.values[self.output].shape), run.layouts[self.output]
        shape[layout.axis] = layout.factor * len(row)
        try:
            run.lines.update(optimum.lines)
            walk = backward(run, self.output, layout.node(row[None], tuple(shape), lead=1), magnitude=True)
        finally:
            run.lines.update(kept)
        return optimum, walk

    def minimise(self, row: Float[Tensor, "some outputs"]) -> Optimum:
        """Solve the programs of one row."""
        run, objectives = self.run, _numpy(row.expand(self.run.batch, -1))
        limit = self.method.time_limit
        solutions = [program.solve(self.output, c, limit) for program, c in zip(self.programs, objectives, strict=True)]
        self.asked += len(solutions)
        self.failed += sum(not np.isfinite(solution.value) for solution in solutions)
        value = torch.tensor([solution.value for solution in solutions]).to(row)
        points = {name: _tensor([each.points[name] for each in solutions], row) for name in self.names}
        duals = {name: _tensor([each.duals[name] for each in solutions], row) for name in self.names}
        lines = {}
        for name, known in self.candidates.items():
            weights = _tensor([solution.weights[name] for solution in solutions], row).movedim(0, 2)
            lines[name] = _mixture(run, name, known, *weights)
        return Optimum(value, points, duals, lines)

    def note(self) -> None:
        """Write down how many programs were solved."""
        self.run.how[self.output] = f"{self.asked - self.failed} of {self.asked} linear programs"
        if self.failed:
            log.warning(
                "%d of %d linear programs were not solved: there the bound is that of %s",
                self.failed,
                self.asked,
                self.method.base,
            )

    def _assembled(self) -> list[Program]:
        run, programs = self.run, [Program() for _ in range(self.run.batch)]
        for name in self.names:
            for program in programs:
                program.add_variables(name, run.features(name))
        for source in run.program.sources:
            if source in self.names:
                _add_region(run, source, programs)
        for name in self.names:
            if name in self.candidates:
                _add_lines(run, name, self.candidates[name], programs)
            elif name in run.program.rules:
                blocks = _unrolled(run, name, lambda nu, name=name: _transposed(run, name, nu))
                _add_map(run, name, blocks, programs)
        return programs


def _mixture(run: Run, name: str, known: Candidates, below: Tensor, above: Tensor) -> Lines:
    """Turn multipliers of lines, ``[candidates, batch, features]``, into a node's two lines.

    Where ``nu > 0`` its lower line counts. Both of these lie below the function, and the second is never the worse of the two,
    but where a rule's offset is not concave in the slopes:

        nu z  >=  sum below (slope z_in + lower) - sum above (slope z_in + upper)     =  nu (mean slope) z_in + ...
        nu z  >=  nu (mean slope) z_in + nu (the rule's own offset for that slope)
    """
    nu = below.sum(0) - above.sum(0)
    least = NEGLIGIBLE * nu.abs().amax(-1, keepdim=True)
    safe = torch.where(nu == 0, 1.0, nu)
    shares, default = (below - above) / safe, torch.zeros_like(below)
    default[0] = 1.0
    other = default.roll(min(1, len(default) - 1), 0)
    lower = _mixed(run, name, known.slopes, torch.where(nu > least, shares, default))
    upper = _mixed(run, name, known.slopes, torch.where(nu < -least, shares, other))
    lines = run.relate(name, Slopes(lower, upper), _boxes(run, name), levelled=False)
    if known.exact:
        return lines
    offset = ((below * _finite(known.lower) - above * _finite(known.upper)) / safe).sum(0)
    # Shares that cancel would also multiply what rounding does to slopes.
    usable = ((below + above).sum(0) <= MOST_CANCELLED * nu.abs()) & (len(known.slopes) > 1)
    floor = torch.where(usable & (nu > least), offset, -torch.inf).clamp(max=0)
    ceiling = torch.where(usable & (nu < -least), offset, torch.inf).clamp(min=0)
    return replace(
        lines, lower=torch.fmax(lines.lower, run.node(name, floor)), upper=torch.fmin(lines.upper, run.node(name, ceiling))
    )


def _finite(offset: Tensor) -> Tensor:
    return torch.where(offset.isfinite(), offset, 0.0)


def _unrolled(run: Run, name: str, pull: Callable[[Tensor], tuple[Tensor, ...]]) -> Blocks:
    """Apply a transposed map to one-hot rows, in chunks, and return it as sparse matrices."""
    from scipy import sparse

    width, value, layout = run.features(name), run.values[name], run.layouts[name]
    shape = list(value.shape)
    shape[layout.axis] = layout.factor
    parts: list[list[list[Any]]] = []
    for chunk in torch.arange(width, device=value.device).split(run.rows_per_chunk(name)):
        pulled = pull(layout.node(identity_rows(width, chunk, value), tuple(shape), lead=1))
        examples = [run.examples(parent, part, 1) for parent, part in zip(run.program.parents[name], pulled, strict=False)]
        parts.append([[sparse.csr_array(_numpy(each)) for each in rows.unbind(1)] for rows in examples])
    whole = [[sparse.vstack(pieces, format="csr") for pieces in zip(*one, strict=True)] for one in zip(*parts, strict=True)]
    return [tuple(each) if len(each) == run.batch else tuple(each * run.batch) for each in whole]


def _transposed(run: Run, name: str, nu: Tensor) -> tuple[Tensor, ...]:
    """Pull rows that are shared by all examples through an affine node."""
    if run.batch > 1 and run.is_shareable(name):
        one = run.template
        return one.layers[name].transpose(nu, one.parents(name))
    return run.layers[name].transpose(run.expand(name, nu), run.parents(name))


def _add_map(run: Run, name: str, blocks: Blocks, programs: list[Program]) -> None:
    for example, program in enumerate(programs):
        terms = {parent: each[example] for parent, each in zip(run.program.parents[name], blocks, strict=True)}
        program.add_map(name, terms)


def _add_lines(run: Run, name: str, known: Candidates, programs: list[Program]) -> None:
    """Add the constraints of every candidate."""
    from scipy import sparse

    for number, slopes in enumerate(known.slopes):
        if _is_positionwise(run, name):
            diagonals = _numpy(run.examples(name, slopes[0].expand_as(run.values[name])).nan_to_num())
            blocks = [tuple(sparse.diags_array(each, format="csr") for each in diagonals)]
        else:
            both = Slopes(slopes, slopes)
            blocks = _unrolled(run, name, lambda nu, both=both: _pulled(run, name, nu, both))
        for example, program in enumerate(programs):
            terms = {parent: each[example] for parent, each in zip(run.program.parents[name], blocks, strict=False)}
            for side, offset, wanted in ((1.0, known.lower, known.below), (-1.0, known.upper, known.above)):
                chosen = wanted[number, example].nonzero()[:, 0].cpu().numpy()
                program.add_lines(name, (number, len(known.slopes)), side, terms, _numpy(offset[number, example]), chosen)


def _pulled(run: Run, name: str, nu: Tensor, slopes: Slopes) -> tuple[Tensor, ...]:
    return run.layers[name].pull(run.expand(name, nu), slopes, run.parents(name))


def _add_region(run: Run, source: str, programs: list[Program]) -> None:
    """Add what is known of an input: its box, and for an l1 ball the sum of its deviations' sizes."""
    region, x, value = run.regions[source], run.given[source], run.values[source]
    if not (region.separable or isinstance(region, L1)):
        raise SpecificationError(
            f'method "lp" needs a region bounded by planes: LInf, Box, L1, or one that is separable; got {region!r} '
            f'for "{source}", for which "dual" and "adaptive" have exact support'
        )
    hull = region.hull(x)
    low, high = (_numpy(run.examples(source, end.expand_as(value) - value)) for end in (hull.lower, hull.upper))
    for example, program in enumerate(programs):
        program.limit(source, low[example], high[example])
        if isinstance(region, L1):
            radius = region.radius_of(x).expand_as(x)
            program.add_diamond(source, float(_numpy(run.examples(source, radius))[example].max()))


@dataclass(frozen=True)
class Solution:
    """What HiGHS found for one row of one example; arrays of zeros and NaN where it failed.

    Attributes:
        value: the optimum.
        points: per node, the deviations.
        duals: per node, ``nu``.
        weights: per relaxed node, ``[2, candidates, features]``: multipliers of lower and of upper lines, not negative.
    """

    value: float
    points: dict[str, Array]
    duals: dict[str, Array]
    weights: dict[str, Array]


@dataclass
class Rows:
    """Rows of a sparse matrix, collected in blocks, and their right sides."""

    places: list[Any] = field(default_factory=list)
    columns: list[Any] = field(default_factory=list)
    numbers: list[Any] = field(default_factory=list)
    right: list[Array] = field(default_factory=list)
    count: int = 0

    def add(self, terms: list[tuple[int, Any]], right: Array) -> slice:
        """Add rows: sparse matrices, each with the column at which it starts, and the right sides."""
        for start, matrix in terms:
            entries = matrix.tocoo()
            self.places.append(entries.coords[0] + self.count)
            self.columns.append(entries.coords[1] + start)
            self.numbers.append(entries.data)
        self.right.append(right)
        self.count += len(right)
        return slice(self.count - len(right), self.count)

    def assembled(self, width: int) -> tuple[Any, Array | None]:
        """Return matrix and right side; None where there are no rows."""
        from scipy import sparse

        if not self.count:
            return None, None
        entries = tuple(np.concatenate(part) for part in (self.numbers, self.places, self.columns))
        return sparse.csr_array((entries[0], entries[1:]), shape=(self.count, width)), np.concatenate(self.right)


@dataclass
class Program:
    """One example's variables and constraints."""

    spans: dict[str, slice] = field(default_factory=dict)
    limits: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    equal: Rows = field(default_factory=Rows)
    below: Rows = field(default_factory=Rows)
    maps: dict[str, slice] = field(default_factory=dict)
    lines: list[tuple[str, tuple[int, int], float, Any, slice]] = field(default_factory=list)
    inputs: list[slice] = field(default_factory=list)
    width: int = 0

    def add_variables(self, name: str, count: int) -> None:
        """Add a node's elements, or others."""
        self.spans[name] = slice(self.width, self.width + count)
        self.width += count

    def limit(self, name: str, low: Array, high: Array) -> None:
        """Bound variables."""
        self.limits[name] = (np.minimum(low, high), np.maximum(low, high))

    def add_map(self, name: str, terms: Mapping[str, Any]) -> None:
        """Add ``d - A d_parents = 0``."""
        own = self._count(name)
        parts = [(self.spans[name].start, _identity(own)), *((self.spans[key].start, -each) for key, each in terms.items())]
        self.maps[name] = self.equal.add(parts, np.zeros(own))

    def add_lines(
        self, name: str, number: tuple[int, int], side: float, terms: Mapping[str, Any], offset: Array, chosen: Any
    ) -> None:
        """Add ``side (slope . d_parents - d) <= -side offset`` for the chosen elements."""
        own = (self.spans[name].start, -side * _identity(self._count(name))[chosen])
        parts = [own, *((self.spans[key].start, side * each[chosen]) for key, each in terms.items())]
        self.lines.append((name, number, side, chosen, self.below.add(parts, -side * offset[chosen])))

    def add_diamond(self, name: str, radius: float) -> None:
        """Add ``sum |d| <= radius`` by a variable above each ``|d|``."""
        from scipy import sparse

        own, sizes = self._count(name), f"|{name}|"
        self.add_variables(sizes, own)
        start, above, eye = self.spans[name].start, self.spans[sizes].start, _identity(own)
        for side in (1.0, -1.0):
            self.inputs.append(self.below.add([(start, side * eye), (above, -eye)], np.zeros(own)))
        self.inputs.append(self.below.add([(above, sparse.csr_array(np.ones((1, own))))], np.array([radius])))

    @cached_property
    def constraints(self) -> tuple[Any, ...]:
        """Matrices and right sides of the inequalities and of the equations, then the variables' bounds."""
        bounds = np.tile([-np.inf, np.inf], (self.width, 1))
        for name, ends in self.limits.items():
            bounds[self.spans[name]] = np.stack(ends, 1)
        return (*self.below.assembled(self.width), *self.equal.assembled(self.width), bounds)

    def solve(self, output: str, row: Array, time_limit: float | None) -> Solution:
        """Minimise ``row . d_output``."""
        objective = np.zeros(self.width)
        objective[self.spans[output]] = row
        result = _solved(objective, self.constraints, time_limit)
        return self._nothing() if result is None else self._read(result, objective)

    def _read(self, result: Any, objective: Array) -> Solution:
        solution, (below, _, equal, _, _) = self._nothing(), self.constraints
        prices, multipliers = result.eqlin.marginals, result.ineqlin.marginals
        for name, _ in solution.points.items():
            solution.points[name][:] = result.x[self.spans[name]]
        for name, (number, _), side, chosen, rows in self.lines:
            solution.weights[name][0 if side > 0 else 1, number, chosen] = np.maximum(-multipliers[rows], 0.0)
        for name, (lower, upper) in solution.weights.items():
            solution.duals[name][:] = lower.sum(0) - upper.sum(0)
        for name, rows in self.maps.items():
            solution.duals[name][:] = prices[rows]
        inside = np.array(multipliers)
        for rows in self.inputs:  # what the region itself answers for is not part of an input's nu
            inside[rows] = 0.0
        left = objective - sum(m.T @ by for m, by in ((equal, prices), (below, inside)) if m is not None)
        for name in self.limits:
            solution.duals[name][:] = left[self.spans[name]]
        return Solution(float(result.fun), solution.points, solution.duals, solution.weights)

    def _nothing(self) -> Solution:
        names = [name for name in self.spans if name in self.limits or name in self.maps] + [name for name, *_ in self.lines]
        zeros = {name: np.zeros(self._count(name)) for name in names}
        weights = {name: np.zeros((2, count, self._count(name))) for name, (_, count), *_ in self.lines}
        return Solution(float("nan"), zeros, {name: np.zeros_like(each) for name, each in zeros.items()}, weights)

    def _count(self, name: str) -> int:
        return self.spans[name].stop - self.spans[name].start


def _solved(objective: Array, constraints: tuple[Any, ...], time_limit: float | None) -> Any | None:
    """Ask HiGHS; None where it has no optimum to show.

    The centre of the region is feasible, but presolve may say otherwise of tiny boxes: then it is left out.
    """
    from scipy.optimize import linprog

    for presolve in (True, False):
        options = {"presolve": presolve} | ({} if time_limit is None else {"time_limit": time_limit})
        result = linprog(objective, *constraints, method="highs", options=options)
        if result.status == 0:
            return result
        log.info("HiGHS: %s", result.message)
        if result.status == OUT_OF_TIME:
            break
    return None


def _identity(count: int) -> Any:
    from scipy import sparse

    return sparse.eye_array(count, format="csr")


def _numpy(value: Tensor) -> Array:
    return value.detach().double().cpu().numpy()


def _tensor(arrays: list[Array], like: Tensor) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).to(like)


def _check_scipy() -> None:
    try:
        import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError("method \"lp\" needs scipy: pip install 'autodual[lp]'") from error
