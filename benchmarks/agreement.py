"""Check on random networks, in float64 and for every region, that independent computations agree.

    forward walk = backward walk,    dual bound <= optimum of the linear program (3.6) <= smallest value found,

no sampled or attacked point outside the bounds (of the outputs and of every node in between), and how wide the bounds are
beside the range that attacks reach. The linear program is written by hand from the torch modules and solved by HiGHS.

    python benchmarks/agreement.py --points 1000000
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import autodual
from autodual.attacks import minimize
from autodual.methods import Method
from benchmarks.common import machine, table
from tests.reference.lp import Ball, Relu, minimum, run
from tests.reference.networks import NETWORKS, Network, random_network

TOLERANCE = 1e-9  # of the scale, in float64
METHODS: dict[str, Method] = {
    "interval": autodual.IBP(),
    "dual": autodual.Dual(),
    "strict": autodual.Dual(strict=True),
    "adaptive": autodual.Adaptive(),
}
UNIT = (0.0, 1.0)


@dataclass(frozen=True)
class Case:
    """A region for the library, and the same set for the linear program."""

    region: autodual.Region
    ball: Ball


def cases(low: float = 0.2, high: float = 0.9) -> dict[str, Case]:
    """List the regions; inputs are drawn from 0..1."""
    inf = float("inf")
    return {
        "linf": Case(autodual.LInf(0.15), Ball(inf, 0.15)),
        "linf in 0..1": Case(autodual.LInf(0.3, domain=UNIT), Ball(inf, 0.3, *UNIT)),
        "l2": Case(autodual.L2(0.3), Ball(2, 0.3)),
        "l2 in 0..1": Case(autodual.L2(0.6, domain=UNIT), Ball(2, 0.6, *UNIT)),
        "l1": Case(autodual.L1(0.5), Ball(1, 0.5)),
        "l1 in 0..1": Case(autodual.L1(1.0, domain=UNIT), Ball(1, 1.0, *UNIT)),
        "box": Case(autodual.Box(low, high), Ball(inf, inf, low, high)),
    }


@dataclass
class Findings:
    """What one network and region showed; distances are relative to the scale of the outputs.

    Attributes:
        walks: largest difference between the forward and the backward walk.
        above_lp: largest excess of a dual bound over the linear program's optimum.
        lp_gap: distance from the dual bound up to the optimum, one per row.
        lp_above: largest excess of the optimum over the smallest value found.
        points: points sampled or attacked.
        violations: points at which an output, or a node that needed bounds, left its bounds.
        widths: per method, width over the range that sampling and attacks reached, one per example and output.
    """

    walks: float = 0.0
    above_lp: float = -float("inf")
    lp_gap: list[float] = field(default_factory=list)
    lp_above: float = -float("inf")
    points: int = 0
    violations: int = 0
    widths: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in METHODS})

    def merge(self, other: Findings) -> None:
        """Take over another network's findings."""
        self.walks = max(self.walks, other.walks)
        self.above_lp = max(self.above_lp, other.above_lp)
        self.lp_gap += other.lp_gap
        self.lp_above = max(self.lp_above, other.lp_above)
        self.points += other.points
        self.violations += other.violations
        for name, values in other.widths.items():
            self.widths[name] += values

    def width(self, method: str) -> float:
        """Return the median width over the range."""
        return statistics.median(self.widths[method])

    def faults(self) -> list[str]:
        """List what should not be."""
        found = []
        if not self.walks <= TOLERANCE:
            found.append(f"walks differ by {self.walks:.1e}")
        if not self.above_lp <= 1e-8:  # HiGHS itself is feasible to 1e-7 absolute at best, usually far better
            found.append(f"dual bound above the linear program's optimum by {self.above_lp:.1e}")
        if not self.lp_above <= 1e-7:
            found.append(f"linear program above a value found by {self.lp_above:.1e}")
        if self.violations:
            found.append(f"{self.violations} of {self.points} points outside their bounds")
        if not self.width("dual") <= self.width("interval"):
            found.append("dual wider than interval in the median")
        return found


@dataclass(frozen=True)
class Effort:
    """How much to spend on one network.

    Attributes:
        points: how many to sample or attack.
        steps: of each attack.
        examples: batch size.
        programs: for how many of the examples linear programs are solved.
        rounds: of cutting planes, for l2 balls.
    """

    points: int
    steps: int = 20
    examples: int = 4
    programs: int = 1
    rounds: int = 20


@torch.no_grad()
def examine(kind: str, case: Case, seed: int, effort: Effort) -> Findings:
    """Compare everything on one random network.

    Args:
        kind: one of ``NETWORKS``.
        case: the region.
        seed: of the network, the inputs and the points.
        effort: how much to spend.
    """
    examples = effort.examples
    model, shape = random_network(kind, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(examples, *shape, generator=generator, dtype=torch.float64)
    net = autodual.certify(model)
    rows = torch.cat([torch.eye(3), torch.randn(1, 3, generator=generator)]).double()
    findings = Findings()

    bounds = {name: net.bounds(x, case.region, rows, method=method) for name, method in METHODS.items()}
    nodes = {name: net.intermediate(x, case.region, method=method) for name, method in METHODS.items()}
    scale = max(1.0, model(x).abs().max().item())
    for strict in (False, True):
        ends = [net.bounds(x, case.region, rows, method=autodual.Dual(strict, walk)) for walk in ("forward", "backward")]
        for side in ("lower", "upper"):
            gap = (getattr(ends[0], side) - getattr(ends[1], side)).abs().max().item()
            findings.walks = max(findings.walks, gap / scale)

    both = torch.cat([rows, -rows])
    attacked, worst = minimize(model, x, case.region, both, steps=effort.steps, restarts=2, generator=generator)
    lowest, highest = attacked[:, : len(rows)].clone(), -attacked[:, len(rows) :].clone()
    batches = [worst.movedim(1, 0).flatten(0, 1)]
    drawn = max(1, effort.points // examples - len(both))
    batches += [case.region.sample(part, generator) for part in x.repeat(drawn, *[1] * len(shape)).split(examples * 500)]
    for batch in batches:
        values = {name: value.unflatten(0, (-1, examples)) for name, value in run(model.steps(), batch).items()}
        outputs = model(batch).unflatten(0, (-1, examples)) @ rows.T
        lowest, highest = torch.minimum(lowest, outputs.amin(0)), torch.maximum(highest, outputs.amax(0))
        outside = torch.zeros(outputs.shape[:2], dtype=torch.bool)
        for name in METHODS:
            outside |= _outside(outputs, bounds[name], scale)
            for node, box in nodes[name].items():
                outside |= _outside(values[node], box, scale)
        findings.points += len(batch)
        findings.violations += int(outside.sum())

    for name, bound in bounds.items():
        findings.widths[name] += (bound.width / (highest - lowest)).flatten().tolist()
    for index in range(effort.programs):
        optima = _optima(model, x[index : index + 1], case.ball, nodes["dual"], index, both, effort.rounds)
        dual = torch.cat([bounds["dual"].lower[index], -bounds["dual"].upper[index]])
        least = torch.cat([lowest[index], -highest[index]])
        for (below, above), bound, value in zip(optima, dual.tolist(), least.tolist(), strict=True):
            findings.above_lp = max(findings.above_lp, (bound - above) / scale)
            findings.lp_gap.append((above - bound) / scale)
            findings.lp_above = max(findings.lp_above, (below - value) / scale)
    return findings


def _outside(values: Tensor, box: autodual.Bounds, scale: float) -> Tensor:
    """Tell which points have an element outside: ``[points, batch]``; NaN is outside."""
    return ~box.contains(values, TOLERANCE * scale).flatten(2).all(2)


def _optima(
    model: Network, x: Tensor, ball: Ball, nodes: Mapping[str, autodual.Bounds], index: int, rows: Tensor, rounds: int
) -> list[tuple[float, float]]:
    """Solve (3.6) with the library's intermediate bounds of one example."""
    steps = model.steps()
    read = [step.parent for step in steps if isinstance(step, Relu)]
    boxes = {name: (nodes[name].lower[index : index + 1], nodes[name].upper[index : index + 1]) for name in read}
    return minimum(steps, x, ball, boxes, rows, rounds)


def main() -> None:
    """Print one line per kind of network and region."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--points", type=int, default=1_000_000, help="points to sample or attack, over all networks")
    parser.add_argument("--networks", type=int, default=5, help="random networks per kind and region")
    parser.add_argument("--seed", type=int, default=0, help="of the first network")
    arguments = parser.parse_args()
    regions, lines, faults, start = cases(), [], [], time.perf_counter()
    share = -(-arguments.points // (len(NETWORKS) * len(regions) * arguments.networks))
    total = Findings()
    for kind in NETWORKS:
        for label, case in regions.items():
            findings = Findings()
            for seed in range(arguments.seed, arguments.seed + arguments.networks):
                findings.merge(examine(kind, case, seed, Effort(share + 32)))
            faults += [f"{kind}, {label}: {fault}" for fault in findings.faults()]
            lines.append(_line(kind, label, findings))
            total.merge(findings)
    header = [
        "network",
        "region",
        "|fwd-bwd|",
        "dual-LP",
        "LP gap",
        "LP-found",
        "points",
        "outside",
        *(f"w {m}" for m in METHODS),
    ]
    print(table(header, [*lines, _line("all", "", total)]))
    print(
        "\ndual-LP and LP-found: largest excess, must not be positive beyond rounding; LP gap: median distance of the dual\n"
        "bound below the optimum (all three over the scale of the outputs); w: median width over the range that was reached."
    )
    print(
        f"seeds {arguments.seed}..{arguments.seed + arguments.networks - 1}, {time.perf_counter() - start:.0f} s, {machine()}"
    )
    print("faults: " + ("; ".join(faults) or "none"))
    raise SystemExit(bool(faults))


def _line(kind: str, label: str, findings: Findings) -> list[str]:
    return [
        kind,
        label,
        f"{findings.walks:.0e}",
        f"{findings.above_lp:.0e}",
        f"{statistics.median(findings.lp_gap):.1e}",
        f"{findings.lp_above:.0e}",
        f"{findings.points}",
        f"{findings.violations}",
        *(f"{findings.width(method):.2f}" for method in METHODS),
    ]


if __name__ == "__main__":
    main()
