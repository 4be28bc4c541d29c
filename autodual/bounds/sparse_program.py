"""One example's linear program in sparse matrices, and HiGHS, by way of scipy: an extra, imported where it is used."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

OUT_OF_TIME = 1
"""scipy's number for a limit that was reached."""

log = logging.getLogger(__name__)


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
class SparseProgram:
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
        parts = []
        if len(chosen):
            parts = [(self.spans[key].start, side * each[chosen]) for key, each in terms.items()]
            parts.append((self.spans[name].start, -side * _identity(self._count(name))[chosen]))
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
        result = solved(objective, self.constraints, time_limit)
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


def solved(objective: Array, constraints: tuple[Any, ...], time_limit: float | None) -> Any | None:
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
