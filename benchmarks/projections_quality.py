"""How good estimates from random projections are: against exact radii at fixed lines, and as bounds of trained networks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import autodual
from autodual.bounds.forward import SHIFT, NoiseSymbols
from autodual.bounds.run import Run
from autodual.network import BoundModule
from autodual.regions import Region
from benchmarks.common import PUBLISHED, load_images, load_model, median_seconds
from benchmarks.projections_common import (
    estimated_radius,
    exact_radius,
    fewer,
    fixed_run,
    mean_and_error,
    perceptron,
    progress,
    relaxed_input,
    save,
    show,
)

COUNTS = (10, 50, 100, 200)
"""Numbers of projections of the text's Figure 3.19."""
IMAGES, DRAWS = 10, 20
STREAM_DEPTHS, STREAM_WIDTH, STREAM_R, STREAM_RADIUS = (2, 4, 8, 16), 100, 50, 0.02
STREAM_DRAWS, GROUPS = 200, 10
"""Draws, and groups they are split into for the standard error of a spread."""
SEEDS = 5
BALLS = (("mnist_small_0_3_stage0", 1.58), ("mnist_small_0_3_stage0", 0.3), ("mnist", 1.58))
"""The text's l_2 radius, which certifies nothing on networks trained for l_inf, and one that does."""
PLAIN = {
    "default": autodual.Projected(),
    "not met": autodual.Projected(intersect=False),
    "last estimated": autodual.Projected(last_exact=False),
    "the text's": autodual.Projected(first_exact=False, last_exact=False, intersect=False),
}


def histograms(arguments: argparse.Namespace) -> None:
    """Print and draw the relative errors of the median estimate for one layer, random and trained (Figure 3.19)."""
    entry = PUBLISHED["mnist"]
    trained, (x, _) = load_model(arguments.models, entry), load_images(arguments.data, entry, IMAGES)
    torch.manual_seed(0)
    fresh = [nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 10)]
    rows, errors = [], {}
    for name, model in (("random", nn.Sequential(*fresh).eval()), ("trained", trained)):
        run = fixed_run(autodual.certify(model), x, autodual.LInf(entry.epsilon))
        node = relaxed_input(run, 1)
        exact = exact_radius(run, node)
        for r in COUNTS:
            progress(f"histograms: {name}, r {r}")
            errors[name, r] = found = _relative_errors(run, node, exact, r, fewer(DRAWS, arguments))
            share = [f"{found.quantile(q):+.3f}" for q in (0.05, 0.5, 0.95)]
            rows.append([name, f"{r}", f"{found.mean():+.4f}", f"{found.std():.4f}", f"{1.5708 / r**0.5:.4f}", *share])
    progress("")
    notes = (
        f"{fewer(DRAWS, arguments)} draws, seeds from 0, of the radii of {exact.shape[1]} elements and {IMAGES} images at the\n"
        "exact method's lines; all elements of one draw share its noise. pi/2/sqrt(r): the spread of a median of many samples."
    )
    header = ["layer", "r", "mean", "std", "pi/2/sqrt(r)", "5 %", "median", "95 %"]
    show(
        f"Relative error of the median estimate, second convolution of mnist, l_inf {entry.epsilon}, float32",
        header,
        rows,
        notes,
    )
    _draw_histograms(errors, arguments)


def _relative_errors(run: Run, node: str, exact: Tensor, r: int, draws: int) -> Tensor:
    wide = exact > 0
    found = [estimated_radius(run, autodual.Projected(r=r, seed=seed), node)[wide] / exact[wide] - 1 for seed in range(draws)]
    return torch.cat(found)


def _draw_histograms(errors: dict[tuple[str, int], Tensor], arguments: argparse.Namespace) -> None:
    figure = Figure(figsize=(8, 9), layout="constrained")
    for axes, ((name, r), found) in zip(figure.subplots(len(COUNTS), 2, sharex=True).T.flatten(), errors.items(), strict=True):
        axes.hist(found.clamp(-1, 2).numpy(), bins=100, density=True)
        axes.set_title(f"{name}, r = {r}: {found.mean():+.3f} +- {found.std():.3f}")
        axes.set_xlabel("relative error of a radius")
        axes.set_ylabel("density")
    save(figure, arguments.output, "projections_histograms.png")


def heavy(arguments: argparse.Namespace) -> None:
    """Print how much of a radius the r heaviest columns hold: walking them exactly is worth it above 1 - 1 / sqrt(2)."""
    rows = []
    for name in ("mnist", "fashion_mnist", "mnist_small_0_3_stage0"):
        entry = PUBLISHED[name]
        net, (x, _) = autodual.certify(load_model(arguments.models, entry)), load_images(arguments.data, entry, IMAGES)
        run = fixed_run(net, x, autodual.LInf(entry.epsilon))
        for layer in (1, 2):
            columns = _columns(run, relaxed_input(run, layer), entry.epsilon)
            held = [columns.sum(-1).topk(r, dim=0).values.sum(0) / columns.sum((0, -1)) for r in (10, 50, 200)]
            shares = [f"{share.mean():.1%} ({share.max():.1%})" for share in held]
            rows.append([name, f"{entry.epsilon}", f"{layer + 1}", f"{len(columns)}", *shares])
    notes = (
        f"The r columns that hold most of a layer's radii together, mean (largest) over {IMAGES} images, at the exact lines.\n"
        f"r columns more cost what r projections more cost; these lower the spread by {1 - 0.5**0.5:.0%}."
    )
    header = ["network", "eps", "layer", "columns", "r = 10", "r = 50", "r = 200"]
    show("What the heaviest columns hold of a layer's radii, l_inf, float32", header, rows, notes)


def _columns(run: Run, node: str, epsilon: float) -> Tensor:
    """Return the magnitude that each symbol contributes to each element: ``[symbols, images, elements]``."""
    entry = NoiseSymbols(run).reach(node)
    sizes = {owner: epsilon if owner in run.program.sources else 1.0 for owner in entry if owner != SHIFT}
    return torch.cat([size * run.examples(node, entry[owner], lead=1).abs() for owner, size in sizes.items()])


def streams(arguments: argparse.Namespace) -> None:
    """Compare one stream with a stream per layer (Algorithm 3) at fixed lines: at equal r, and at equal time."""
    rows, draws = [], max(2 * GROUPS, fewer(STREAM_DRAWS, arguments))
    for layers in STREAM_DEPTHS:
        torch.manual_seed(0)
        model = perceptron((STREAM_WIDTH,) * (layers + 1) + (10,))
        x = torch.randn(1, STREAM_WIDTH, dtype=torch.float64)
        run = fixed_run(autodual.certify(model), x, autodual.LInf(STREAM_RADIUS))
        loose = sum((lines.spread > 0).double().mean().item() for lines in run.lines.values()) / len(run.lines)
        progress(f"streams: depth {layers}")
        several = autodual.Projected(r=STREAM_R, seed=0)
        target = _seconds(run, several, separate=True)
        as_long = _scaled(run, several, target)
        for name, method, separate in (("separate", several, True), ("one", several, False), ("one, as long", as_long, False)):
            mean, spread = _ratios(run, method, draws, separate=separate)
            seconds = 1e3 * _seconds(run, method, separate=separate)
            rows.append([f"{layers}", f"{loose:.0%}", name, f"{method.r}", mean, spread, f"{seconds:.2f}"])
    progress("")
    notes = (
        "loose: hidden units that are relaxed; mean, spread: of the estimated over the exact radius of 10 outputs,\n"
        f"{draws} draws, seeds from 0, with standard errors; separate: r samples for every stream, a stream for the input\n"
        "and one for each layer; one, as long: r raised until one stream takes as long as the separate ones."
    )
    header = ["depth", "loose", "streams", "r", "mean / exact", "relative spread", "ms"]
    show(
        f"One stream or several: ReLU perceptrons of width {STREAM_WIDTH}, l_inf {STREAM_RADIUS}, median, float64, seed 0",
        header,
        rows,
        notes,
    )


def _seconds(run: Run, method: autodual.Projected, *, separate: bool) -> float:
    output = run.program.graph.output
    return median_seconds(lambda: estimated_radius(run, method, output, separate=separate), 9)


def _scaled(run: Run, method: autodual.Projected, target: float) -> autodual.Projected:
    """Raise r until one stream takes the given time, as nearly as three trials come."""
    for _ in range(3):
        ratio = target / _seconds(run, method, separate=False)
        method = replace(method, r=max(STREAM_R, round(method.r * min(ratio, 4.0))))
    return method


def _ratios(run: Run, method: autodual.Projected, draws: int, *, separate: bool) -> tuple[str, str]:
    """Return the mean of the estimated over the exact radius, and its spread, each with a standard error."""
    output = run.program.graph.output
    exact = exact_radius(run, output)
    found = torch.cat(
        [estimated_radius(run, replace(method, seed=seed), output, separate=separate) / exact for seed in range(draws)]
    )
    mean, error = mean_and_error(found.mean(1))
    spreads = torch.stack([part.std(0).mean() for part in found.split(draws // GROUPS)[:GROUPS]])
    spread, spread_error = found.std(0).mean().item(), mean_and_error(spreads)[1]
    return f"{mean:.4f} +- {error:.4f}", f"{spread:.4f} +- {spread_error:.4f}"


def quality(arguments: argparse.Namespace) -> None:
    """Compare estimated bounds of logits and margins with the exact dual method's, l_inf."""
    rows = _quality_rows("mnist", autodual.LInf(PUBLISHED["mnist"].epsilon), arguments)
    _show_quality("Estimates on mnist, l_inf 0.1", rows, arguments)


def l2(arguments: argparse.Namespace) -> None:
    """Compare estimated bounds of logits and margins with the exact dual method's, l_2."""
    rows = [row for name, radius in BALLS for row in _quality_rows(name, autodual.L2(radius), arguments)]
    _show_quality("Estimates for l_2 balls", rows, arguments)


def _show_quality(title: str, rows: list[list[str]], arguments: argparse.Namespace) -> None:
    header = [
        "network",
        "region",
        "variant",
        "r",
        "mean |radius - exact|",
        "mean ratio",
        "ratio of means",
        "sign agrees",
        "positive",
    ]
    notes = (
        f"First {fewer(200, arguments)} test images; radius: half the width of a logit's bound; sign agrees: images whose\n"
        "margins are all positive by the estimate and by the exact method, or by neither; positive: images whose margins all\n"
        f"are. Means over {SEEDS} seeds from 0, +- their standard deviation. Exact: the dual method, which does not meet its\n"
        "bounds with interval bounds; estimates are met with them, by default, and may then be narrower than it. Not met:\n"
        "intersect=False; last estimated: last_exact=False; the text's: neither, and first_exact=False. Not met and the\n"
        "text's spare no element that intervals prove stable, and are compared with exact, strict, which spares none either."
    )
    show(f"{title}, float32, median", header, rows, notes)


def _quality_rows(name: str, region: Region, arguments: argparse.Namespace) -> list[list[str]]:
    entry = PUBLISHED[name]
    x, y = load_images(arguments.data, entry, fewer(200, arguments))
    net = autodual.certify(load_model(arguments.models, entry))
    exact = {strict: _radii_and_signs(net, x, y, region, autodual.Dual(strict=strict)) for strict in (False, True)}
    rows = [[name, f"{region}", *_exact_row(*found, strict=strict)] for strict, found in exact.items()]
    for variant, method in PLAIN.items():
        for r in (10, 50, 200):
            progress(f"{name}: {variant}, r {r}")
            found = [_radii_and_signs(net, x, y, region, replace(method, r=r, seed=seed)) for seed in range(SEEDS)]
            rows.append([name, f"{region}", variant, f"{r}", *_compared(*exact[method.strict], found)])
    progress("")
    return rows


def _exact_row(radii: Tensor, signs: Tensor, *, strict: bool) -> list[str]:
    label, share = "exact, strict" if strict else "exact", f"{100 * signs.double().mean():.1f} %"
    return [label, "-", f"0 (of {radii.mean():.3f})", "1", "1", "100 %", share]


def _radii_and_signs(
    net: BoundModule, x: Tensor, y: Tensor, region: Region, method: autodual.Dual | autodual.Projected
) -> tuple[Tensor, Tensor]:
    """Return the radii of all logits, and for each image whether all its margins are positive."""
    radii, signs = [], []
    for part, labels in zip(x.split(50), y.split(50), strict=True):
        bounds = net.bounds(part, region, torch.eye(10), method)  # rows, so that no end is met with its interval bound
        margins = net.margins(part, labels, region, method)
        radii.append(0.5 * bounds.width)
        signs.append(((margins > 0) | nn.functional.one_hot(labels, 10).bool()).all(1))
    return torch.cat(radii), torch.cat(signs)


def _compared(exact: Tensor, sure: Tensor, found: Sequence[tuple[Tensor, Tensor]]) -> list[str]:
    def over_seeds(values: list[Tensor], scale: str = "{:.4f} +- {:.4f}") -> str:
        every = torch.stack([value.double() for value in values])
        return scale.format(every.mean().item(), every.std().item())

    percent = "{:.1f} +- {:.1f} %"
    return [
        over_seeds([(radii - exact).abs().mean() for radii, _ in found]),
        over_seeds([(radii / exact).mean() for radii, _ in found]),
        over_seeds([radii.mean() / exact.mean() for radii, _ in found]),
        over_seeds([100 * (signs == sure).double().mean() for _, signs in found], percent),
        over_seeds([100 * signs.double().mean() for _, signs in found], percent),
    ]
