"""What the benchmarks of random projections share: networks, radii at fixed lines, a stopwatch on the library's parts."""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from matplotlib.figure import Figure
from torch import Tensor, nn

import autodual
from autodual.bounds import bound
from autodual.bounds.bound import bound_rows
from autodual.bounds.forward import NoiseSymbols
from autodual.bounds.projected import NoiseSource, Projections, Stream
from autodual.bounds.run import Run
from autodual.estimators import GeometricMean, OrderStatistic, RootMeanSquare
from autodual.network import BoundModule
from autodual.regions import Region
from benchmarks.common import machine, table

PARTS = (
    (bound, "in_chunks", "back"),
    (Stream, "reach", "walk"),
    (NoiseSource, "rows", "noise"),
    *((kind, name, "estimator") for kind in (OrderStatistic, GeometricMean, RootMeanSquare) for name in ("add", "value")),
)
"""Library functions on the clock, and the part of the method that each belongs to."""


def convolutions(depth: int, channels: int = 64) -> nn.Sequential:
    """Build a stack of 3x3 convolutions with a ReLU after each, averaged over the image, then 10 outputs."""
    layers = []
    for i in range(depth):
        layers += [nn.Conv2d(channels if i else 1, channels, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)).eval()


def single_convolution(channels: int) -> nn.Sequential:
    """Build the network of the text's Figure 3.20: one 3x3 convolution of a 28x28 image."""
    layers = (nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(784 * channels, 10))
    return nn.Sequential(*layers).eval()


def perceptron(widths: tuple[int, ...], activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Build a perceptron in double precision whose weights keep the size of the values, whatever its depth."""
    layers = []
    for before, after in pairwise(widths):
        linear = nn.Linear(before, after).double()
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        nn.init.normal_(linear.bias, std=0.1)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1]).eval()


def fixed_run(net: BoundModule, x: Tensor, region: Region) -> Run:
    """Fix every line by the exact dual method."""
    run = net._run(net._problem(x, region))
    bound_rows(run, autodual.Dual(), None)
    return run


def relaxed_input(run: Run, index: int) -> str:
    """Name the input of the relaxed node of this index, from 0."""
    return run.program.parents[run.program.relaxed[index]][0]


def exact_radius(run: Run, name: str) -> Tensor:
    """Return a node's radius at the run's lines, every symbol on its own: ``[batch, features]``."""
    lower, upper = NoiseSymbols(run).bounds(name)
    return 0.5 * (upper - lower)


def estimated_radius(run: Run, method: autodual.Projected, name: str, *, separate: bool = False) -> Tensor:
    """Estimate the same radius by random projections."""
    radius = Projections(run, method, (name,), separate=separate).radius(name, lambda rows: rows)
    return radius.expand(run.batch, -1)


class Stopwatch:
    """Seconds by part of the method; what one part spends inside another counts once, for the inner one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    def wrap(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """Put a function on the clock."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                self.seconds[part] += elapsed - self._inner.pop()
                if self._inner:
                    self._inner[-1] += elapsed

        return timed


@contextmanager
def on_the_clock() -> Iterator[dict[str, float]]:
    """Time the parts of the method while the block runs."""
    watch = Stopwatch()
    with ExitStack() as stack:
        for owner, name, part in PARTS:
            stack.enter_context(patch.object(owner, name, watch.wrap(getattr(owner, name), part)))
        yield watch.seconds


def memory(field: str) -> float:
    """Read this process's resident memory now (``VmRSS``) or its largest so far (``VmHWM``), in MiB; Linux only.

    The largest of ``getrusage`` also counts what the parent process held when it started this one.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def forget_peak() -> None:
    """Start the largest resident memory anew from what is resident now; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of independent values and its standard error."""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def show(title: str, header: list[str], rows: list[list[str]], notes: str) -> None:
    """Print one table with its title, what its columns mean, and the machine."""
    print(f"\n{title}\n{table(header, rows)}\n{notes}\n{machine()}", flush=True)


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a picture and say where."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / name, dpi=150, bbox_inches="tight")
    print(f"picture: {folder / name}")


def progress(text: str) -> None:
    """Overwrite one line on a terminal; say nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def fewer(count: int, arguments: argparse.Namespace) -> int:
    """Return a number of draws or images, a tenth of it for a quick look."""
    return max(2, count // 10) if arguments.quick else count
