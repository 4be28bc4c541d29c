"""What random projections cost: time and memory against the number of hidden units, and time against depth."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import autodual
from autodual.bounds.bound import bound_rows
from benchmarks.common import median_seconds
from benchmarks.projections_common import (
    convolutions,
    forget_peak,
    memory,
    on_the_clock,
    progress,
    save,
    show,
    single_convolution,
)

R = 50
REPEATS = 3
REGION = autodual.LInf(0.1)
DEFAULT = autodual.Projected(r=R, seed=0)
TEXT = autodual.Projected(r=R, seed=0, first_exact=False, last_exact=False, intersect=False)
EXACT_UNITS = 20_000
"""Hidden units up to which the exact method is timed."""
SHARES = ("walk", "noise", "estimator", "back")
HEADER = ["network", "hidden units", "forward ms", "bounds ms", "/ (r+2) fwd", "loose", *SHARES]
HEADER += ["exact ms", "peak MiB", "exact MiB*", "batch 8: ms", "/ (r+2) fwd"]
NOTES = f"""
stack: two 3x3 convolutions of 64 channels, growing images; single: one 3x3 convolution of 28x28, growing
channels (Figure 3.20), by default options, which leave nothing there to estimate; text: everything estimated.
Medians of {REPEATS}; / (r+2) fwd: over {R + 2} plain forward passes of the batch; loose: units relaxed; walk,
noise, estimator, back (rows of the outputs walked back exactly): shares of the time; the rest is interval bounds
and checks; exact: method "dual", up to {EXACT_UNITS} units; peak: above what the process held before the call;
exact MiB*: computed, not measured: hidden units x widest node x 4 bytes."""
DEPTHS = (4, 8, 16, 32)
QUICK = 4
"""Sizes, or depths, of a quick look: of the smallest this many, or half as many."""


@dataclass(frozen=True)
class Kind:
    """One family of networks that grow.

    Attributes:
        sizes: of the networks.
        build: makes the network of a size.
        side: of the image, by size.
        units: hidden units, by size.
        widest: units of the widest node, by size.
        method: how to bound.
        wide: sizes that are bounded in a batch of 8 too.
    """

    sizes: tuple[int, ...]
    build: Callable[[int], nn.Module]
    side: Callable[[int], int]
    units: Callable[[int], int]
    widest: Callable[[int], int]
    method: autodual.Projected
    wide: tuple[int, ...]


CHANNELS = (6, 12, 24, 58, 179, 556, 1726, 5360)
single = partial(Kind, CHANNELS, single_convolution, lambda size: 28, lambda size: 784 * size, lambda size: 784 * size)
KINDS = {
    "stack": Kind(
        (6, 8, 11, 19, 33, 58, 102, 181),
        lambda side: convolutions(2),
        lambda side: side,
        lambda side: 2 * 64 * side**2,
        lambda side: 64 * side**2,
        DEFAULT,
        (19, 33, 58),
    ),
    "single": single(DEFAULT, (58, 179, 556)),
    "single, text": single(TEXT, (58, 179, 556)),
}


def measure(name: str, size: int, batch: int = 1) -> dict[str, float]:
    """Bound one network; memory first, while the process is fresh."""
    kind = KINDS[name]
    net, x = _network(kind, kind.sizes[0])
    net.bounds(x, REGION, method=kind.method)  # loads what is loaded on first use
    net, x = _network(kind, size, batch)
    found = {"units": kind.units(size), "forward": median_seconds(lambda: net(x))}
    forget_peak()
    before = memory("VmRSS")
    net.bounds(x, REGION, method=kind.method)
    found["memory"] = memory("VmHWM") - before
    found["loose"] = _loose(net, x, kind.method)
    found |= timed(net, x, kind.method)
    found["unchunked"] = kind.units(size) * kind.widest(size) * 4 * len(x) / 2**20
    if found["units"] <= EXACT_UNITS and batch == 1:
        found["exact"] = median_seconds(lambda: net.bounds(x, REGION), REPEATS)
    if size in kind.wide and batch == 1:
        many = torch.rand(8, *x.shape[1:])
        found["forward 8"] = median_seconds(lambda: net(many))
        found["seconds 8"] = median_seconds(lambda: net.bounds(many, REGION, method=kind.method), REPEATS)
    return found


def _network(kind: Kind, size: int, batch: int = 1) -> tuple[autodual.BoundModule, Tensor]:
    torch.manual_seed(0)
    return autodual.certify(kind.build(size)), torch.rand(batch, 1, kind.side(size), kind.side(size))


def _loose(net: autodual.BoundModule, x: Tensor, method: autodual.Projected) -> float:
    """Return the share of hidden units that are relaxed."""
    run = net._run(net._problem(x, REGION))
    bound_rows(run, method, None)
    gaps = torch.cat([lines.spread.flatten() for lines in run.lines.values()])
    return (gaps > 0).float().mean().item()


def timed(net: autodual.BoundModule, x: Tensor, method: autodual.Projected, repeats: int = REPEATS) -> dict[str, float]:
    """Time a call and its parts: those of the call of median length."""
    calls = []
    for _ in range(repeats):
        with on_the_clock() as seconds:
            start = time.perf_counter()
            net.bounds(x, REGION, method=method)
            total = time.perf_counter() - start
        calls.append({"seconds": total} | {part: seconds.get(part, 0.0) for part in SHARES})
    return sorted(calls, key=lambda call: call["seconds"])[repeats // 2]


def cost(arguments: argparse.Namespace) -> None:
    """Print time and memory of networks of 5 thousand to 4 million hidden units, each in a process of its own."""
    if arguments.case:
        print(json.dumps(measure(*json.loads(arguments.case))))
        return
    found = {}
    for name, kind in KINDS.items():
        if arguments.family not in (None, name):
            continue
        found[name] = [_apart(name, size, arguments.batch) for size in _sizes(kind.sizes, arguments)]
        progress("")
        show(
            f"Cost of Projected(r={R}), {name}: {REGION}, random weights, seed 0, float32, batch {arguments.batch}",
            HEADER,
            _rows(name, found),
            "",
        )
        seconds, space = (_slope(found[name], key) for key in ("seconds", "memory"))
        print(f"{name}: log-log slope against hidden units: time {seconds:.2f}, memory {space:.2f}", flush=True)
    print(NOTES)
    _draw(found, arguments.output)


def _rows(name: str, found: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    return [_row(name, result) for result in found[name]]


def _sizes(sizes: tuple[int, ...], arguments: argparse.Namespace) -> tuple[int, ...]:
    return sizes[:QUICK] if arguments.quick else sizes


def _apart(name: str, size: int, batch: int) -> dict[str, float]:
    """Measure in a process of its own, so that its peak memory is its own."""
    progress(f"cost: {name} {size}")
    command = [
        sys.executable,
        str(Path(__file__).with_name("projections.py")),
        "cost",
        "--case",
        json.dumps([name, size, batch]),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _row(name: str, found: dict[str, float]) -> list[str]:
    def over(seconds: str, forward: str) -> list[str]:
        if seconds not in found:
            return ["-", "-"]
        return [f"{1e3 * found[seconds]:.1f}", f"{found[seconds] / (R + 2) / found[forward]:.2f}"]

    return [
        name,
        f"{found['units']}",
        f"{1e3 * found['forward']:.2f}",
        *over("seconds", "forward"),
        f"{found['loose']:.0%}",
        *(f"{found[part] / found['seconds']:.0%}" for part in SHARES),
        f"{1e3 * found['exact']:.0f}" if "exact" in found else "-",
        f"{found['memory']:.0f}",
        f"{found['unchunked']:.0f}",
        *over("seconds 8", "forward 8"),
    ]


def _slope(results: list[dict[str, float]], key: str) -> float:
    """Fit a power of the number of hidden units by least squares."""
    units, values = (np.log([max(result[name], 1e-9) for result in results]) for name in ("units", key))
    return float(np.polyfit(units, values, 1)[0])


def _draw(found: dict[str, list[dict[str, float]]], folder: Path) -> None:
    figure = Figure(figsize=(5 * len(found), 8), layout="constrained")
    for panels, (name, results) in zip(figure.subplots(2, len(found), squeeze=False).T, found.items(), strict=True):
        curves = (("seconds", "exact", "seconds"), ("memory", "unchunked", "MiB"))
        for axes, (projected, exact, label) in zip(panels, curves, strict=True):
            for key, text in ((projected, f"projected, r = {R}"), (exact, "exact, computed" if label == "MiB" else "exact")):
                known = [(result["units"], result[key]) for result in results if key in result]
                axes.loglog(*zip(*known, strict=True), "o-", label=text)
            axes.set(xlabel="hidden units", ylabel=label, title=name)
            axes.legend()
    save(figure, folder, "projections_cost.png")


def depth(arguments: argparse.Namespace) -> None:
    """Print time against depth."""
    rows = []
    for layers in DEPTHS[: QUICK // 2] if arguments.quick else DEPTHS:
        torch.manual_seed(0)
        model, x = convolutions(layers), torch.rand(4, 1, 16, 16)
        net = autodual.certify(model)
        forward = median_seconds(lambda model=model, x=x: model(x))
        for estimator in ("median", "log-mean", "tightest"):
            progress(f"depth {layers}: {estimator}")
            rows.append(_depth_row(net, x, forward, autodual.Projected(r=R, estimator=estimator, seed=0)))
    progress("")
    header = ["depth", "by", "forward ms", "bounds ms", "ms / layer", "/ (r+2) fwd", *SHARES]
    notes = (
        f"Medians of {REPEATS}, one call for tightest, which draws anew for every layer and walks there from the input;\n"
        f"/ (r+2) fwd: over {R + 2} plain forward passes of the batch; walk, noise, estimator, back: shares of the time."
    )
    title = f"Depth: 3x3 convolutions of 64 channels, 16x16 images, batch 4, r {R}, {REGION}, random weights, seed 0, float32"
    show(title, header, rows, notes)


def _depth_row(net: autodual.BoundModule, x: Tensor, forward: float, method: autodual.Projected) -> list[str]:
    layers = sum(isinstance(module, nn.Conv2d) for module in net.model)
    if not method.bounding:
        net.bounds(x, REGION, method=method)  # warm up
    found = timed(net, x, method, 1 if method.bounding else REPEATS)
    seconds = found["seconds"]
    return [
        f"{layers}",
        method.estimator,
        f"{1e3 * forward:.2f}",
        f"{1e3 * seconds:.0f}",
        f"{1e3 * seconds / layers:.1f}",
        f"{seconds / (R + 2) / forward:.2f}",
        *(f"{found[part] / seconds:.0%}" for part in SHARES),
    ]
