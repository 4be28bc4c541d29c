"""Certificates from random projections: how many images they cover, and how often a bound fails."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar
from unittest.mock import patch

import torch
from scipy.stats import beta
from torch import Tensor, nn

import autodual
from autodual.bounds import intermediate
from autodual.bounds.intermediate import relax
from autodual.bounds.projected import Projections
from autodual.bounds.run import Run
from autodual.estimators import Estimator, geometric_factor, order_factor, tightest
from autodual.network import BoundModule
from benchmarks.common import PUBLISHED, load_images, load_model
from benchmarks.projections_common import exact_radius, fewer, mean_and_error, perceptron, progress, show

BATCH = 100
DELTA = 0.01
EACH = 0.05
"""Probability with which one estimate may fail in ``coverage``."""
R = 50
DRAWS, POINTS = 2_000, 2_000
ROUNDING = 1e-9
"""Of the scale: what float64 may differ by."""


def certificates(arguments: argparse.Namespace) -> None:
    """Print the share of the test set that is certified, all of it together at one probability."""
    entry = PUBLISHED["mnist"]
    x, y = load_images(arguments.data, entry, arguments.limit or fewer(10_000, arguments))
    net, region = autodual.certify(load_model(arguments.models, entry)), autodual.LInf(entry.epsilon)
    net.verify(x[:2], y[:2], region)  # traces and compiles
    rows = [_certified(net, x, y, region, autodual.Dual())]
    for r, heavy in ((500, 0), (50, 200), (200, 200)):
        method = autodual.Projected(r=r, heavy=heavy, estimator="tightest", delta=DELTA, examples=len(x), seed=0)
        rows.append(_certified(net, x, y, region, method))
    progress("")
    notes = (
        f"probability: that one certificate of the {len(x)} fails, at most; estimates: for each image; inflation: what radii\n"
        "are multiplied by, typically, less what is walked exactly (heavy), and the bound in use. Images without a\n"
        "certificate include misclassified ones."
    )
    header = ["method", "r", "heavy", "images", "certified", "share", "probability", "estimates", "inflation", "s/image"]
    show(f"Certificates on mnist, l_inf {entry.epsilon}, seed 0, float32, batches of {BATCH}", header, rows, notes)


def _certified(
    net: BoundModule, x: Tensor, y: Tensor, region: autodual.LInf, method: autodual.Dual | autodual.Projected
) -> list[str]:
    count, start = 0, time.perf_counter()
    for part, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        report = net.verify(part, labels, region, method)
        count += int(report.certified.sum())
        progress(f"certificates: {method}: {count}")
    seconds = (time.perf_counter() - start) / len(x)
    drawn = ["0", "-", "-"]
    if isinstance(method, autodual.Projected):
        drawn = [f"{method.delta:g}", f"{report.sampling.estimates}", _inflation(method, report.sampling.estimates)]
    plain = not isinstance(method, autodual.Projected)
    name, r, heavy = ("dual", "-", "-") if plain else ("tightest", f"{method.r}", f"{method.heavy}")
    return [name, r, heavy, f"{len(x)}", f"{count}", f"{100 * count / len(x):.2f} %", *drawn, f"{seconds:.4f}"]


def _inflation(method: autodual.Projected, estimates: int) -> str:
    """Say by how much a bound lies above its radius, typically, and which one it is."""
    share = method.delta / (method.examples * estimates)
    if tightest(method.r, share) == "geometric":
        return f"{geometric_factor(method.r, share):.3f} geometric"
    rank, factor = order_factor(method.r, share)
    place = torch.tan(torch.tensor(0.5 * torch.pi * rank / (method.r + 1))).item()
    return f"{factor * place:.3f} order"


class Recorded(Projections):
    """Projections whose every estimate may fail with probability ``EACH``; keeps the radii that the lines came from."""

    share: ClassVar[float] = EACH

    def __init__(self, run: Run, method: autodual.Projected, estimated: tuple[str, ...]) -> None:
        super().__init__(run, method, estimated)
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def bounds(self, name: str, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Bound a node and keep its radii."""
        lower, upper = super().bounds(name, columns)
        every = torch.arange(self.run.features(name)) if columns is None else columns
        self.found[name] = every, 0.5 * (upper - lower)
        return lower, upper


class Residual(nn.Module):
    """A perceptron with two skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Add each block's output to its input."""
        x = torch.relu(self.first(x))
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def _convolutional() -> nn.Sequential:
    layers = (nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, stride=2), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (lambda: perceptron((6, 16, 16, 16, 3)), (6,)),
    "convolutional": (_convolutional, (1, 6, 6)),
    "residual": (Residual, (6,)),
    "tanh": (lambda: perceptron((6, 12, 12, 12, 3), nn.Tanh), (6,)),
}
RADIUS = 0.3


@dataclass
class Failures:
    """What the draws of one network and estimator showed.

    Attributes:
        below: radii below the exact one at the same lines, by element.
        drawn: radii, by element.
        missed: draws whose final interval left out a sampled value.
        final: draws looked at for that.
        shares: of each draw, the share of its radii that are below.
    """

    below: defaultdict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))
    drawn: defaultdict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))
    missed: int = 0
    final: int = 0
    shares: list[float] = field(default_factory=list)

    def interval(self, element: tuple[str, int], level: float) -> tuple[float, float]:
        """Return the binomial interval (Clopper and Pearson) of an element's rate; its draws are independent."""
        failed, n, tail = self.below[element], self.drawn[element], (1 - level) / 2
        low = beta.ppf(tail, failed, n - failed + 1) if failed else 0.0
        high = beta.ppf(1 - tail, failed + 1, n - failed) if failed < n else 1.0
        return float(low), float(high)


def coverage(arguments: argparse.Namespace) -> bool:
    """Print how often a bound lies below its radius, and tell whether none does so too often."""
    rows, draws = [], fewer(DRAWS, arguments)
    for name in NETWORKS:
        for estimator, heavy in (("geometric", 0), ("order", 0), ("order", 4)):
            progress(f"coverage: {name}, {estimator}, {heavy}")
            found = examine(name, estimator, heavy, draws)
            rows.append([name, estimator, f"{heavy}", *_judged(found)])
    progress("")
    notes = (
        f"Each estimate may fail with probability {EACH}; elements: that were estimated; all: share of radii below the exact\n"
        "one at the lines the same draw gave, +- 2.58 standard errors over draws; worst element: with its binomial interval,\n"
        "which holds for all elements together at 99 %; violations: elements whose interval lies above what they may, and one\n"
        f"more if all together do; missed: draws, by bounds() at delta {DELTA}, with a final interval that left out one of\n"
        f"{POINTS} sampled points."
    )
    header = ["network", "bound", "heavy", "elements", "estimates/draw", "all", "worst element", "violations", "missed"]
    title = f"Coverage: {draws} draws, r {R}, l_inf {RADIUS}, random weights, seeds from 0, float64"
    show(title, header, rows, notes)
    bad = sum(int(row[-2]) for row in rows)
    print(f"violations: {bad or 'none'}; missed: {sum(int(row[-1].split()[0]) for row in rows) or 'none'}")
    _dependence(arguments)
    return not bad


class Gated(nn.Module):
    """A sum of clamped values: one that is estimated small is kept, a large one gives way to fresh noise of bounded size."""

    def __init__(self, width: int = 60) -> None:
        super().__init__()
        self.copy = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.copy.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Clamp and add."""
        return nn.functional.hardtanh(self.copy(x)).sum(1, keepdim=True)


class Often(Projections):
    """Projections whose every estimate may fail with probability 0.2."""

    share: ClassVar[float] = 0.2


def gated_failures(draws: int, *, fresh: bool) -> int:
    """Count how often the output's bound lies below its radius where slopes follow estimates made with one projection."""
    net, x = autodual.certify(Gated().double()), torch.zeros(1, 60, dtype=torch.float64)
    everything, failures = autodual.Projected(first_exact=False, intersect=False), 0
    for seed in range(draws):
        run = net._problem(x, autodual.LInf(1.0)).run(net.memory_budget, claim=False)
        method = autodual.Projected(r=1, estimator="order", first_exact=False, heavy=0, seed=seed)
        projections, output = Often(run, method, (), fresh=fresh), run.program.graph.output
        with patch.object(intermediate, "_forward_walk", lambda *_, own=projections: own):
            relax(run, everything, output)
        failures += int(projections.radius(output, lambda rows: rows) < exact_radius(run, output))
    return failures


def _dependence(arguments: argparse.Namespace) -> None:
    draws, rows = fewer(DRAWS, arguments), []
    for name, fresh in (("one stream for all layers", False), ("fresh for every layer", True)):
        failed = gated_failures(draws, fresh=fresh)
        low, high = beta.interval(0.99, failed + 0.5, draws - failed + 0.5)
        rows.append([name, f"{Often.share}", f"{failed / draws:.4f} ({low:.4f}..{high:.4f})"])
    header = ["projections", "may fail", "fails (99 % interval)"]
    show(f"Slopes that follow estimates: 60 clamped values, r 1, order, {draws} draws", header, rows, "")


def examine(name: str, estimator: Estimator, heavy: int, draws: int) -> Failures:
    """Draw anew and anew; count the radii that are too small and the final intervals that are."""
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = build().double().eval()
    x, region = torch.rand(1, *shape, dtype=torch.float64), autodual.LInf(RADIUS)
    net, failures = autodual.certify(model), Failures()
    method = autodual.Projected(r=R, estimator=estimator, delta=DELTA, heavy=heavy)
    for seed in range(draws):
        _count(net, x, region, replace(method, seed=seed), failures)
    values = model(region.sample(x.expand(POINTS, *shape), torch.Generator().manual_seed(0)))
    failures.final = max(2, draws // 10)
    for seed in range(failures.final):
        bounds = net.bounds(x, region, method=replace(method, seed=seed))
        failures.missed += int((~bounds.contains(values, ROUNDING)).any())
    return failures


def _count(net: BoundModule, x: Tensor, region: autodual.LInf, method: autodual.Projected, failures: Failures) -> None:
    """Run one draw as a certificate does, and compare every radius with the exact one at the lines it gave."""
    run = net._problem(x, region).run(net.memory_budget, claim=False)
    with patch.object(intermediate, "Projections", Recorded):
        projections = relax(run, method, run.program.graph.output)
    below = []
    for name, (columns, radius) in projections.found.items():
        exact = exact_radius(run, name)[0, columns]
        too_small = radius[0] < exact * (1 - ROUNDING)
        for column, failed in zip(columns.tolist(), too_small.tolist(), strict=True):
            failures.drawn[name, column] += 1
            failures.below[name, column] += failed
        below.append(too_small)
    failures.shares.append(torch.cat(below).double().mean().item())


def _judged(found: Failures) -> list[str]:
    mean, error = mean_and_error(torch.tensor(found.shares, dtype=torch.float64))
    level = 1 - 0.01 / len(found.drawn)
    worst = max(found.drawn, key=lambda element: found.interval(element, level)[0])
    low, high = found.interval(worst, level)
    violations = sum(found.interval(element, level)[0] > EACH for element in found.drawn) + (mean - 2.58 * error > EACH)
    return [
        f"{len(found.drawn)}",
        f"{sum(found.drawn.values()) / len(found.shares):.1f}",
        f"{mean:.4f} +- {2.58 * error:.4f}",
        f"{found.below[worst] / found.drawn[worst]:.4f} ({low:.4f}..{high:.4f})",
        f"{violations}",
        f"{found.missed} of {found.final}",
    ]
