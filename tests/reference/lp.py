"""The linear relaxation (3.6) of a ReLU network, written out and solved by HiGHS; shares no code with the library.

A network is described by hand as a list of steps; nothing is traced. Affine steps hold torch callables, unrolled to sparse
matrices by applying them to zero and to the identity. With pre-activation bounds l, u the relaxation of a ReLU is

    z >= 0,   z >= z^,   (u - l) z - u z^ <= -u l       for l < 0 < u,   z = z^ for l >= 0,   z = 0 for u <= 0.

Input sets: a box, an l1 ball (by splitting |d| into two parts), an l2 ball (by cutting planes, which enclose the optimum), each
intersected with a box.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import OptimizeResult, linprog
from torch import Tensor

Array = NDArray[np.float64]
Map = Callable[..., Tensor]


@dataclass(frozen=True)
class Affine:
    """``name = map(*parents)``, affine in all parents jointly."""

    name: str
    map: Map
    parents: tuple[str, ...]


@dataclass(frozen=True)
class Relu:
    """``name = relu(parent)``."""

    name: str
    parent: str


Step = Affine | Relu


@dataclass(frozen=True)
class Ball:
    """An input set around one example: ``|z - x|_p <= epsilon`` and ``low <= z <= high``; p is 1, 2 or infinity."""

    p: float
    epsilon: float
    low: Tensor | float = -np.inf
    high: Tensor | float = np.inf


def run(steps: Sequence[Step], x: Tensor) -> dict[str, Tensor]:
    """Evaluate a description at a point; the tests compare the result with the model it describes."""
    values = {"x": x}
    for step in steps:
        if isinstance(step, Affine):
            values[step.name] = step.map(*(values[parent] for parent in step.parents))
        else:
            values[step.name] = values[step.parent].clamp(min=0)
    return values


@dataclass
class Program:
    """The constraints of (3.6) for one example, in the variables of every step, one after the other."""

    spans: dict[str, slice] = field(default_factory=dict)
    low: list[Array] = field(default_factory=list)
    high: list[Array] = field(default_factory=list)
    equal: list[tuple[dict[str, sparse.sparray], Array]] = field(default_factory=list)
    below: list[tuple[dict[str, sparse.sparray], Array]] = field(default_factory=list)
    count: int = 0

    def variables(self, name: str, low: Array, high: Array) -> None:
        """Add a block of variables with bounds."""
        self.spans[name] = slice(self.count, self.count + len(low))
        self.low.append(low)
        self.high.append(high)
        self.count += len(low)

    def matrix(self, rows: list[tuple[dict[str, sparse.sparray], Array]]) -> tuple[sparse.csr_array | None, Array | None]:
        """Assemble rows of blocks."""
        if not rows:
            return None, None
        names = list(self.spans)
        grid = [[row.get(name, sparse.csr_array((len(right), self.width(name)))) for name in names] for row, right in rows]
        return sparse.csr_array(sparse.block_array(grid)), np.concatenate([right for _, right in rows])

    def width(self, name: str) -> int:
        """Return how many variables a block has."""
        return self.spans[name].stop - self.spans[name].start

    def solve(self, objective: Array) -> OptimizeResult:
        """Minimise; the result holds value, minimiser and multipliers."""
        equal, equal_right = self.matrix(self.equal)
        below, below_right = self.matrix(self.below)
        bounds = np.stack([np.concatenate(self.low), np.concatenate(self.high)], 1)
        result = linprog(objective, below, below_right, equal, equal_right, bounds, method="highs")
        if result.status != 0:
            raise RuntimeError(f"HiGHS: {result.message}")
        return result


def build(steps: Sequence[Step], x: Tensor, ball: Ball, bounds: Mapping[str, tuple[Tensor, Tensor]]) -> Program:
    """Write out (3.6).

    Args:
        steps: the network.
        x: one example, a batch of one.
        ball: the input set.
        bounds: lower and upper bounds of every step that a ReLU reads.
    """
    values = run(steps, x)
    program = Program()
    _input(program, x, ball)
    for step in steps:
        width = values[step.name].numel()
        free = np.full(width, np.inf)
        if isinstance(step, Affine):
            program.variables(step.name, -free, free)
            zeros = tuple(torch.zeros_like(values[parent]) for parent in step.parents)
            row = {parent: -_matrix(step.map, zeros, index) for index, parent in enumerate(step.parents)}
            row[step.name] = sparse.eye_array(width, format="csr")
            program.equal.append((row, _numpy(step.map(*zeros))))
        else:
            program.variables(step.name, np.zeros(width), free)
            _relu(program, step, *(_numpy(end) for end in bounds[step.parent]))
    return program


def minimum(
    steps: Sequence[Step], x: Tensor, ball: Ball, bounds: Mapping[str, tuple[Tensor, Tensor]], rows: Tensor, rounds: int = 60
) -> list[tuple[float, float]]:
    """Enclose the optimum of (3.6) for every row ``c`` on the last step, one example.

    Both ends are the optimum itself, except for l2 balls: there cutting planes approach it from below, and what they
    find, moved into the ball, bounds it from above. ``rounds`` limits their number.
    """
    program = build(steps, x, ball, bounds)
    last = program.spans[steps[-1].name]
    optima = []
    for row in rows:
        objective = np.zeros(program.count)
        objective[last] = _numpy(row)
        if ball.p == 2:
            optima.append(_round(program, objective, _numpy(x), ball.epsilon, rounds))
        else:
            optima.append((program.solve(objective).fun,) * 2)
    return optima


def _input(program: Program, x: Tensor, ball: Ball) -> None:
    """Add the input's variables and the constraints of its set."""
    center = _numpy(x)
    low = np.maximum(center - ball.epsilon, _numpy(torch.as_tensor(ball.low, dtype=x.dtype).expand_as(x)))
    high = np.minimum(center + ball.epsilon, _numpy(torch.as_tensor(ball.high, dtype=x.dtype).expand_as(x)))
    program.variables("x", low, high)
    if ball.p == 1:
        size, eye = len(center), sparse.eye_array(len(center), format="csr")
        program.variables("up", np.zeros(size), np.full(size, ball.epsilon))
        program.variables("down", np.zeros(size), np.full(size, ball.epsilon))
        program.equal.append(({"x": eye, "up": -eye, "down": eye}, center))
        ones = sparse.csr_array(np.ones((1, size)))
        program.below.append(({"up": ones, "down": ones}, np.array([ball.epsilon])))


def _round(program: Program, objective: Array, center: Array, epsilon: float, rounds: int) -> tuple[float, float]:
    """Enclose the optimum over the l2 ball.

    At the optimum one plane would do, tangent at the optimal point. Every round adds one that cuts off the solution, and
    two at guesses of that point: from the multipliers of the planes so far, and from the slope at the best point inside.
    """
    first, normals, best = len(program.below), [], np.inf
    skip, span = sum(len(right) for _, right in program.below), program.spans["x"]
    for _ in range(rounds):
        result = program.solve(objective)
        multipliers = -result.ineqlin.marginals[skip:] if normals else []
        way = result.x[span] - center
        guess = sum((weight * normal for weight, normal in zip(multipliers, normals, strict=True)), np.zeros_like(way))
        directions = [way / max(1.0, np.linalg.norm(way) / epsilon)]
        if np.linalg.norm(guess) > 0:
            directions.append(guess * (epsilon / np.linalg.norm(guess)))
        inside = min((_at(program, objective, center + direction) for direction in directions), key=lambda result: result.fun)
        best = min(best, inside.fun)
        if best - result.fun <= 1e-7 * (1 + abs(result.fun)):
            break
        directions.append(-(inside.lower.marginals + inside.upper.marginals)[span])
        for direction in directions:
            length = np.linalg.norm(direction)
            if length > 0:
                normals.append(direction / length)
                right = np.array([epsilon + normals[-1] @ center])
                program.below.append(({"x": sparse.csr_array(normals[-1][None])}, right))
    del program.below[first:]
    return result.fun, best


def _at(program: Program, objective: Array, point: Array) -> OptimizeResult:
    """Minimise with the input held fixed."""
    index = list(program.spans).index("x")
    low, high = program.low[index], program.high[index]
    program.low[index] = program.high[index] = np.clip(point, low, high)
    try:
        return program.solve(objective)
    finally:
        program.low[index], program.high[index] = low, high


def _relu(program: Program, step: Relu, lower: Array, upper: Array) -> None:
    """Add the three cases of (3.6)."""
    identity = sparse.eye_array(len(lower), format="csr")
    off, on = upper <= 0, lower >= 0
    on &= ~off
    if off.any():
        program.equal.append(({step.name: identity[off]}, np.zeros(off.sum())))
    if on.any():
        program.equal.append(({step.name: identity[on], step.parent: -identity[on]}, np.zeros(on.sum())))
    open_ = ~off & ~on
    if open_.any():
        chosen = identity[open_]
        program.below.append(({step.parent: chosen, step.name: -chosen}, np.zeros(open_.sum())))
        gap, top = sparse.diags_array((upper - lower)[open_]), sparse.diags_array(upper[open_])
        program.below.append(({step.name: gap @ chosen, step.parent: -(top @ chosen)}, -(upper * lower)[open_]))


def _matrix(function: Map, zeros: tuple[Tensor, ...], index: int) -> sparse.csr_array:
    """Unroll an affine map in one of its arguments: its values at the identity, less its value at zero."""
    width = zeros[index].numel()
    eye = torch.eye(width, dtype=zeros[index].dtype).reshape(width, *zeros[index].shape[1:])
    arguments = [eye if i == index else zero.expand(width, *zero.shape[1:]) for i, zero in enumerate(zeros)]
    columns = function(*arguments) - function(*zeros)
    return sparse.csr_array(_numpy(columns).reshape(width, -1).T)


def _numpy(value: Tensor) -> Array:
    return value.detach().double().flatten().numpy()
