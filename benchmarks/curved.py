"""Tightness and soundness of the element-wise rules: our lines against the best pair of lines of the same kind.

For every rule 1,000 random intervals of all widths in its domain. *Parallel*: the gap of our two lines over the smallest gap
that any slope has. *Adaptive*: the area between our two lines over the smallest area between any line above and any line
below. Both minima are convex in the slope and found by golden sections on a grid of the interval, so they are lower
bounds of what is possible; beside each jump the grid has a point on either side. *Outside*: points of a grid of 10,000 that
lie beyond a line or the interval, beyond rounding. *elementwise*: functions written in other operators, whose rules are made.

    python benchmarks/curved.py [--seed 0] [--intervals 1000] [RULE ...]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import machine, table
from dual_layers import (
    Call,
    Choice,
    DualLayer,
    Interval,
    Offsets,
    PiecewiseLinear,
    Relaxed,
    RuleSample,
    Slopes,
    elementwise,
    lookup,
    registered_rules,
)
from dual_layers._probes import prepare
from dual_layers.smooth import Smooth

CHOICES: tuple[Choice, ...] = ("parallel", "adaptive")
COMPOSED: dict[str, tuple[Callable[[Tensor], Tensor], Any]] = {
    "tanh": (lambda z: (torch.exp(z) - torch.exp(-z)) / (torch.exp(z) + torch.exp(-z)), torch.tanh),
    "sigmoid": (lambda z: 1 / (1 + torch.exp(-z)), torch.sigmoid),
    "softplus": (lambda z: torch.log1p(torch.exp(z)), F.softplus),
    "GELU": (lambda z: 0.5 * z * (1 + torch.erf(z / 2**0.5)), F.gelu),
    "SiLU": (lambda z: z * torch.sigmoid(z), F.silu),
    "Mish": (lambda z: z * torch.tanh(F.softplus(z)), F.mish),
    "ELU": (lambda z: torch.where(z > 0, z, torch.expm1(z)), F.elu),
    "Softsign": (lambda z: z / (1 + z.abs()), F.softsign),
    "Hardswish": (lambda z: z * F.relu6(z + 3) / 6, F.hardswish),
    "Softshrink": (lambda z: z.sign() * F.relu(z.abs() - 0.5), F.softshrink),
}
"""Functions that have a rule, written in other operators as a user might, and the operator they are."""


@dataclass(frozen=True)
class Tightness:
    """What one rule showed on its intervals.

    Attributes:
        ratios: our gap (parallel) or area (adaptive) over the smallest possible one, per choice and interval.
        outside: points beyond a line or the interval.
        points: points tried.
        loose: largest distance of an end of the interval from the grid's extreme, relative to the range.
    """

    ratios: dict[Choice, Tensor]
    outside: int
    points: int
    loose: float


def curved_rules(*families: type[Relaxed]) -> list[tuple[type[DualLayer], RuleSample]]:
    """List the rules of some families, each with its first good sample and every other one that is another function.

    Samples with a constant for each element are left out: they are many functions at once.
    """
    found = []
    for rule in registered_rules():
        samples = [sample for sample in rule.samples() if sample.error is None] if issubclass(rule, families) else []
        samples = [sample for sample in samples if not any(isinstance(a, Tensor) and a.ndim for a in _constants(sample))]
        kinds = {str(vars(rule(sample.call).arguments) if _named(rule) else ""): sample for sample in reversed(samples)}
        found += [(rule, sample) for sample in reversed(kinds.values())]
    return found


def _constants(sample: RuleSample) -> list[Any]:
    operator = sample.call.operator
    held = list(operator.parameters()) if isinstance(operator, nn.Module) else []
    return [*sample.call.args, *sample.call.kwargs.values(), *held]


def _named(rule: type[DualLayer]) -> bool:
    return rule.parameters is not DualLayer.parameters


def intervals(sample: RuleSample, count: int, generator: torch.Generator) -> Interval:
    """Draw intervals inside a sample's range, widths spread over four orders of magnitude."""
    draw = lambda: torch.rand(count, generator=generator, dtype=torch.float64)  # noqa: E731
    center = sample.low + (sample.high - sample.low) * draw()
    radius = (sample.high - sample.low) / 2 * 10 ** (-4 * draw())
    return Interval((center - radius).clamp(min=sample.low), (center + radius).clamp(max=sample.high))


def measure(layer: Relaxed, box: Interval, points: int = 10_000, grid: int = 1_000) -> Tightness:
    """Compare a layer's lines on these intervals with the best ones, and with the function itself."""
    coarse = torch.cat([places(box, grid), *beside_jumps(layer, box)]).sort(0).values
    values, middle = layer.forward(coarse), box.center
    best = {
        "parallel": _least(lambda a: _highest(coarse, values, a) - _lowest(coarse, values, a), coarse, values),
        "adaptive": _least(lambda a: _highest(coarse, values, a) + a * middle, coarse, values)
        + _least(lambda a: -_lowest(coarse, values, a) - a * middle, coarse, values),
    }
    ratios, outside, chosen = {}, 0, {}
    for choice in CHOICES:
        slopes = layer.slopes((box,), choice)
        chosen[choice] = slopes, (offsets := layer.conjugate(slopes, (box,)))
        height = (slopes.upper[0] - slopes.lower[0]) * middle + offsets.upper - offsets.lower
        rounding = 64 * torch.finfo(height.dtype).eps * (1 + values.abs().amax(0) + (slopes.upper[0] * middle).abs())
        ratios[choice] = (height / torch.maximum(best[choice], rounding)).where(height > 10 * rounding, torch.ones_like(height))
    ends = layer.interval(box)
    for part in [*places(box, points).split(500), *beside_jumps(layer, box)]:
        found = layer.forward(part)
        outside += _beyond(found, ends.lower, ends.upper)
        outside += sum(_beyond_lines(part, found, *pair) for pair in chosen.values())
    spread = (values.amax(0) - values.amin(0)).clamp(min=1e-9)
    loose = torch.maximum((values.amin(0) - ends.lower) / spread, (ends.upper - values.amax(0)) / spread)
    return Tightness(ratios, outside, points * box.lower.numel(), loose.max().item())


def places(box: Interval, count: int) -> Tensor:
    """Spread points over intervals, ends included: ``[count, intervals]``."""
    shares = torch.linspace(0, 1, count, dtype=box.lower.dtype)[:, None]
    z = box.lower + shares * (box.upper - box.lower)
    return torch.minimum(torch.maximum(z, box.lower), box.upper)


def beside_jumps(layer: Relaxed, box: Interval) -> list[Tensor]:
    """List the floats on either side of the places at which a rule looks for kinks and jumps, inside the box."""
    if not isinstance(layer, PiecewiseLinear):
        return []
    found = [place for place, _ in layer.points(box)[2:]]
    moved = [torch.nextafter(place, place + side) for place in found for side in (-1.0, 1.0)]
    return [torch.stack([torch.minimum(torch.maximum(z, box.lower), box.upper) for z in moved])] if moved else []


def _highest(z: Tensor, values: Tensor, slope: Tensor) -> Tensor:
    return (values - slope * z).amax(0)


def _lowest(z: Tensor, values: Tensor, slope: Tensor) -> Tensor:
    return (values - slope * z).amin(0)


def _least(cost: Callable[[Tensor], Tensor], z: Tensor, values: Tensor, steps: int = 60) -> Tensor:
    """Minimise a convex function of the slope; beyond twice the range over the width a flat line is better."""
    width = z[-1] - z[0]
    right = 2 * (values.amax(0) - values.amin(0)) / torch.where(width > 0, width, 1.0)
    left = -right
    golden = 0.6180339887498949
    for _ in range(steps):
        first, second = right - golden * (right - left), left + golden * (right - left)
        lower = cost(first) < cost(second)
        left, right = torch.where(lower, left, first), torch.where(lower, second, right)
    return cost((left + right) / 2)


def _beyond(values: Tensor, lower: Tensor, upper: Tensor) -> int:
    """Count values outside; NaN is outside. The allowance is the rounding of the values themselves, 4 units."""
    allowance = 4 * torch.finfo(values.dtype).eps * values.abs()
    return int((~((values >= lower - allowance) & (values <= upper + allowance))).sum())


def _beyond_lines(z: Tensor, values: Tensor, slopes: Slopes, offsets: Offsets) -> int:
    lines = [slope * z + offset for slope, offset in ((slopes.lower[0], offsets.lower), (slopes.upper[0], offsets.upper))]
    reach = sum((slope[0] * z).abs() for slope in (slopes.lower, slopes.upper))
    allowance = 4 * torch.finfo(values.dtype).eps * (values.abs() + reach)
    return int((~((values >= lines[0] - allowance) & (values <= lines[1] + allowance))).sum())


def layers() -> Iterator[tuple[str, Relaxed, RuleSample]]:
    """Yield every rule on its samples, then the compositions, each with the operator that it is."""
    for rule, sample in curved_rules(Smooth, PiecewiseLinear):
        yield rule.__name__, rule(prepare(sample.call, torch.float64, torch.device("cpu"))), sample
    for name, (function, _) in COMPOSED.items():
        call = Call(elementwise(function))
        yield "elementwise", lookup(call.operator)(call), RuleSample(name, call, ((1,),), low=-5.0, high=5.0)


def main() -> int:
    """Print one line per rule; the exit status tells whether a line was crossed or a median ratio exceeds 1.05."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="*", metavar="RULE", help="names of rules; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--intervals", type=int, default=1_000)
    options = parser.parse_args()
    rows, bad, start = [], False, time.perf_counter()
    for name, layer, sample in layers():
        if options.rules and name not in options.rules:
            continue
        box = intervals(sample, options.intervals, torch.Generator().manual_seed(options.seed))
        found = measure(layer, box)
        row = [name, sample.label]
        for choice in CHOICES:
            ratios = found.ratios[choice]
            row += [f"{ratios.median():.3f}", f"{ratios.quantile(0.95):.3f}", f"{ratios.max():.3f}"]
            bad |= not ratios.median() <= 1.05
        bad |= found.outside > 0
        rows.append([*row, f"{found.loose:.0e}", f"{found.outside}"])
    kinds = [f"{choice} {figure}" for choice in CHOICES for figure in ("median", "95 %", "worst")]
    print(table(["rule", "sample", *kinds, "interval", "outside"], rows))
    print(f"{options.intervals} intervals each, seed {options.seed}, {time.perf_counter() - start:.0f} s, {machine()}")
    return int(bad)


if __name__ == "__main__":
    raise SystemExit(main())
