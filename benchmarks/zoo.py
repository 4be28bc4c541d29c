"""The zoo: small models of every usual kind, as people write them. No point may leave its bounds; how wide are they?

For every model and radius: a few random boxes, of one radius in all elements and of radii that differ from element to
element, down to none. Points are random, corners and mixtures of both, and those that attacks find, in both directions,
for up to 16 outputs. All in float64. *Width*: of the bounds over the range that these points reach, the median over outputs
and over the boxes of one radius; it means little where the attack is weak.

    python benchmarks/zoo.py [--model lstm] [--eps 0.001 0.05 0.5] [--points 2000] [--steps 50]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from torch import Tensor

import autodual
from autodual.attacks import minimize
from autodual.errors import AutoDualError
from autodual.graph import Graph, Node
from autodual.network import BoundModule
from autodual.primal import evaluate
from autodual.search import run_on_copies
from benchmarks.common import machine
from dual_layers import is_held
from tests.zoo.collection import ZOO, Entry

TOLERANCE = 1e-9  # of the scale of the values
RADII = (1e-3, 0.05, 0.5)
METHODS = ("interval", "dual", "adaptive")
OUTPUTS = 16  # attacked at most
CHUNK = 2_000  # points the model is run on at once


@dataclass(frozen=True)
class Effort:
    """How much to spend on one model and radius.

    Attributes:
        boxes: of one radius in all elements; as many again have a radius for each element.
        points: to sample in each box.
        steps: of each attack.
        restarts: of each attack.
        node_points: at which the bounded nodes in between are looked at too.
    """

    boxes: int = 2
    points: int = 2_000
    steps: int = 50
    restarts: int = 2
    node_points: int = 5


@dataclass
class Findings:
    """What one model showed at one radius.

    Attributes:
        widths: median width over the reached range, by method.
        points: points tried.
        outside: points with an output, or a node that needed bounds, outside its bounds; by method.
        endless: bounds that are not finite although every value was, and should be; by method.
        seconds: by method, for the bounds alone.
    """

    widths: dict[str, float] = field(default_factory=dict)
    points: int = 0
    outside: dict[str, int] = field(default_factory=dict)
    endless: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def faults(self) -> list[str]:
        """List what should not be."""
        found = [f"{method}: {n} of {self.points} points outside their bounds" for method, n in self.outside.items() if n]
        return found + [f"{method}: {n} bounds are not finite" for method, n in self.endless.items() if n]


class Trial:
    """One model over boxes of one size.

    Args:
        entry: the model.
        net: its dual network.
        eps: largest radius of a box; of all boxes, or of each.
        effort: how much to spend.
    """

    def __init__(self, entry: Entry, net: BoundModule, eps: float | Sequence[float], effort: Effort) -> None:
        self.entry, self.net, self.effort = entry, net, effort
        self.generator = torch.Generator().manual_seed(entry.seed)
        self.batch = 2 * effort.boxes
        self.x = entry.example(self.batch)
        radii = torch.as_tensor(eps, dtype=torch.float64).expand(effort.boxes).repeat(2)
        self.radii = {name: _each(radii, self.x[name]) * self._shares(self.x[name]) for name in entry.inputs}
        self.region = entry.form({name: autodual.LInf(radius) for name, radius in self.radii.items()})

    def _shares(self, value: Tensor) -> Tensor:
        """Draw each element's share of the radius: all of it in the first boxes; none for a fifth of the others'."""
        shares = self._uniform(value)
        shares = torch.where(self._uniform(value) < 0.2, 0.0, shares)
        shares[: self.effort.boxes] = 1.0
        return shares

    def _uniform(self, like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=self.generator, dtype=like.dtype)

    def repeated(self, times: int) -> dict[str, Tensor]:
        """Return the arguments with all examples repeated; what has no batch axis stays."""
        return {
            name: value if name in self.entry.tables else value.repeat(times, *[1] * (value.ndim - 1))
            for name, value in self.x.items()
        }

    def points(self, times: int) -> dict[str, Tensor]:
        """Draw points of every box: coordinates anywhere, or at an end, in a share that differs from point to point."""
        moved = self.repeated(times)
        extremes = torch.rand(times, generator=self.generator).sqrt().repeat_interleave(self.batch).double()
        for name, radius in self.radii.items():
            at = self._uniform(moved[name])
            extreme = self._uniform(at) < _each(extremes, at)
            at = torch.where(extreme, at.round(), at)
            moved[name] = moved[name] + radius.repeat(times, *[1] * (radius.ndim - 1)) * (2 * at - 1)
        return moved

    def sampled(self) -> Tensor:
        """Return the outputs at random points: ``[points, batch, outputs]``."""
        sizes = [min(CHUNK, self.effort.points - start) for start in range(0, self.effort.points, CHUNK)]
        return torch.cat([self._outputs(self.points(size)) for size in sizes])

    def attacked(self) -> Tensor:
        """Return the outputs at the points found by attacks on up to ``OUTPUTS`` outputs, both ways, all in one batch."""
        width = self._outputs(self.x).shape[-1]
        chosen = torch.randperm(width, generator=self.generator)[:OUTPUTS]
        rows = torch.eye(width, dtype=torch.float64)[chosen]
        rows = torch.cat([rows, -rows])
        times, x = len(rows), self.repeated(len(rows))
        balls = {name: autodual.LInf(radius.repeat(times, *[1] * (radius.ndim - 1))) for name, radius in self.radii.items()}
        _, found = minimize(
            self.net.model, self.entry.form(x), self.entry.form(balls), rows.repeat_interleave(self.batch, 0)[:, None],
            steps=self.effort.steps, restarts=self.effort.restarts, generator=self.generator,
        )  # fmt: skip
        found = {"x": found} if isinstance(found, Tensor) else found
        return self._outputs({name: found[name][:, 0] if name in self.radii else value for name, value in x.items()})

    def _outputs(self, arguments: Mapping[str, Tensor]) -> Tensor:
        outputs = run_on_copies(self.net.model, self.entry.form(arguments))
        return outputs.reshape(-1, self.batch, outputs[0].numel())

    def nodes_outside(self, method: str) -> int:
        """Count at some points the bounded nodes that are outside; NaN is outside."""
        if not self.effort.node_points:
            return 0
        graph = self._graph()
        boxes, count = self.net.intermediate(self.entry.form(self.x), self.region, method=method), 0
        for _ in range(self.effort.node_points):
            values = evaluate(graph, self.net.model, self.net.arguments(self.entry.form(self.points(1))))
            for name, inside in boxes.items():
                size = values[name].abs().nan_to_num(posinf=0.0).max().clamp(min=1.0)
                count += int((~inside.contains(values[name], TOLERANCE * size)).any())
        return count

    def _graph(self) -> Graph:
        """Return the compiled graph; what is held at the region's centre is a constant in it."""
        problem = self.net._problem(self.entry.form(self.x), self.region)
        graph, held = problem.program.graph, {}
        values = evaluate(graph, self.net.model, problem.points)
        nodes = []
        for node in graph.nodes:
            if node.kind == "call" and is_held(node.operator):
                held[f"<held {node.name}>"] = values[node.name]
                node = Node(node.name, "attribute", f"<held {node.name}>")
            nodes.append(node)
        return replace(graph, nodes=tuple(nodes), constants={**graph.constants, **held})


def _each(values: Tensor, like: Tensor) -> Tensor:
    """Give one value per example the axes of a tensor with the examples first."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


@torch.no_grad()
def examine(
    entry: Entry, eps: float | Sequence[float], effort: Effort, methods: Sequence[str] = METHODS, net: BoundModule | None = None
) -> Findings:
    """Bound one model over boxes of one size and try to leave the bounds.

    Args:
        entry: the model.
        eps: largest radius of a box; of all boxes, or of each.
        effort: how much to spend.
        methods: how to bound.
        net: the model's dual network, if there is one already.
    """
    trial, findings = Trial(entry, net or autodual.certify(entry.model()), eps, effort), Findings()
    values = torch.cat([trial.sampled(), trial.attacked()])
    reach, scale = values.amax(0) - values.amin(0), values.abs().amax((0, 2)).clamp(min=1.0)[:, None]
    findings.points = values.shape[0] * values.shape[1]
    for method in methods:
        start = time.perf_counter()
        bounds = trial.net.bounds(entry.form(trial.x), trial.region, method=method)
        findings.seconds[method] = time.perf_counter() - start
        findings.outside[method] = int((~bounds.contains(values, TOLERANCE * scale)).any(2).sum()) + trial.nodes_outside(method)
        findings.endless[method] = int((~(bounds.lower.isfinite() & bounds.upper.isfinite())).sum())
        moving = (reach > TOLERANCE * scale)[: effort.boxes]
        ratios = (bounds.width / reach)[: effort.boxes][moving]
        findings.widths[method] = statistics.median(ratios.tolist()) if len(ratios) else 1.0
    return findings


def main() -> int:
    """Print one row per model; the exit status tells whether a bound was left, was not finite, or a model was refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", metavar="NAME", help="only models whose names contain one of these")
    parser.add_argument("--eps", nargs="*", type=float, default=RADII, help="radii")
    parser.add_argument("--points", type=int, default=2_000, help="points to sample in each box")
    parser.add_argument("--steps", type=int, default=50, help="of each attack")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    chosen = [entry for name, entry in ZOO.items() if not options.model or any(part in name for part in options.model)]
    effort, start, faults = Effort(points=options.points, steps=options.steps), time.perf_counter(), []
    table = _table(options.eps)
    with Live(table, console=Console(width=None if sys.stdout.isatty() else 190), refresh_per_second=2):
        for entry in chosen:
            row, found = _row(entry, options.eps, effort)
            table.add_row(*row)
            faults += [f"{entry.name}: {fault}" for fault in found]
    print(f"\n{len(chosen)} models, {time.perf_counter() - start:.0f} s, {machine()}")
    print("width: of the bounds over the range that points reach, median over outputs: interval, dual, adaptive")
    print("peer: the same for CROWN bounds of another library at eps 0.05, as reported to us, on a comparable model, not ours")
    print("faults: " + ("\n        ".join(faults) or "none"))
    return int(bool(faults))


def _table(radii: Sequence[float]) -> Table:
    table = Table(box=box.SIMPLE, padding=(0, 1))
    table.add_column("model", no_wrap=True)
    for name in ("params", "nodes", *(f"width at {eps:g}" for eps in radii), "outside", "s", "peer"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _row(entry: Entry, radii: Sequence[float], effort: Effort) -> tuple[list[str], list[str]]:
    """Return a model's row and its faults."""
    start, model = time.perf_counter(), entry.model()
    row = [entry.name, f"{sum(parameter.numel() for parameter in model.parameters())}"]
    try:
        net = autodual.certify(model)
        found = {eps: examine(entry, eps, effort, net=net) for eps in radii}
    except AutoDualError as error:
        return [*row, "refused"], [str(error)]
    widths = [" ".join(f"{found[eps].widths[method]:7.3g}" for method in METHODS) for eps in radii]
    outside = sum(sum(findings.outside.values()) for findings in found.values())
    faults = [f"eps {eps:g}, {fault}" for eps, findings in found.items() for fault in findings.faults()]
    return [*row, f"{_nodes(entry, net)}", *widths, f"{outside}", f"{time.perf_counter() - start:.1f}", entry.peer], faults


def _nodes(entry: Entry, net: BoundModule) -> int:
    """Count the operators that depend on the input, composite ones by their parts."""
    moving = entry.form({name: autodual.LInf(0.0) for name in entry.inputs})
    return len(net._problem(entry.form(entry.example(4)), moving).program.rules)


if __name__ == "__main__":
    raise SystemExit(main())
