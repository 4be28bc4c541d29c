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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from autodual.bounds.backward import Deviation, backward
from autodual.bounds.candidates import Candidates, candidates, is_positionwise, mixture
from autodual.bounds.run import Lines, Run, identity_rows
from autodual.bounds.sparse_program import Array, SparseProgram
from autodual.errors import SpecificationError
from autodual.methods import LP
from autodual.regions import L1
from dual_layers import Slopes

Blocks = list[tuple[Any, ...]]
"""For each parent a sparse matrix per example."""

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
        value = _tensor([np.array(solution.value) for solution in solutions], row)
        points = {name: _tensor([each.points[name] for each in solutions], row) for name in self.names}
        duals = {name: _tensor([each.duals[name] for each in solutions], row) for name in self.names}
        lines = {}
        for name, known in self.candidates.items():
            weights = _tensor([solution.weights[name] for solution in solutions], row).movedim(0, 2)
            lines[name] = mixture(run, name, known, *weights)
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

    def _assembled(self) -> list[SparseProgram]:
        run, programs = self.run, [SparseProgram() for _ in range(self.run.batch)]
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


def _add_map(run: Run, name: str, blocks: Blocks, programs: list[SparseProgram]) -> None:
    for example, program in enumerate(programs):
        terms = {parent: each[example] for parent, each in zip(run.program.parents[name], blocks, strict=True)}
        program.add_map(name, terms)


def _add_lines(run: Run, name: str, known: Candidates, programs: list[SparseProgram]) -> None:
    """Add the constraints of every candidate."""
    from scipy import sparse

    for number, slopes in enumerate(known.slopes):
        if is_positionwise(run, name):
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


def _add_region(run: Run, source: str, programs: list[SparseProgram]) -> None:
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


def _numpy(value: Tensor) -> Array:
    return value.detach().double().cpu().numpy()


def _tensor(arrays: list[Array], like: Tensor) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).to(like)


def _check_scipy() -> None:
    try:
        import scipy  # noqa: F401
    except ImportError as error:
        raise ImportError("method \"lp\" needs scipy: pip install 'autodual[lp]'") from error
