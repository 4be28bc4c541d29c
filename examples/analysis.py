"""What a robust network is like, in four pictures of some minutes on one core.

    python examples/analysis.py                                  (needs matplotlib: pip install 'autodual[plot]')
    python examples/analysis.py --data DIR --models DIR          MNIST and its published robust network instead of the digits

out/index_sets.png   how many units are never positive, undecided and never negative over the regions, layer by layer
out/filters.png      the filters of the first layer, beside those of a network trained as usual
out/accuracy.png     certified accuracy against eps, method by method, below what survives an attack
out/radii.png        the largest certified radius of every example, in increasing order

Each is drawn for the robust network and for one of the same shape, trained here as usual on images that neither is tested on.
Source: thesis, Figures 3.7 and 3.9 to 3.11.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autodual
from autodual import digits
from autodual.analysis import sign_shares
from autodual.cli.evaluation import certify, survives
from autodual.rendering import GRID, INK, canvas, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOMAIN = (0.0, 1.0)
NEVER, UNDECIDED, ALWAYS, ATTACK = "#5b7db1", "#c8452f", "#1b7f6b", "#1f2430"
METHODS = {"interval": "#9aa3b2", "dual": "#1b7f6b", "adaptive": "#5b7db1", "auto": "#b4610b"}
ALLOWED = 1e-9


@dataclass(frozen=True)
class Subject:
    """What is looked at: a robust network, another of the same shape trained as usual, test examples and a radius."""

    name: str
    robust: nn.Module
    standard: nn.Module
    x: Tensor
    y: Tensor
    eps: float


# %% The networks. The bundled digits have no training images, so half of the test images train the second network.


def standard_training(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """Train a fresh copy of a network on the plain loss."""
    torch.manual_seed(0)
    model = copy.deepcopy(model)
    for layer in model.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(y)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return model.eval()


def bundled(count: int) -> Subject:
    """Take the bundled digits."""
    x, y = digits.load_test_set()
    standard = standard_training(digits.build(), x[225:], y[225:], epochs=60)
    return Subject("8x8 digits", digits.load_model(), standard, x[: min(count, 225)], y[: min(count, 225)], 0.1)


def mnist(data: Path, models: Path, count: int) -> Subject:
    """Take MNIST and the published network that was trained for eps 0.1."""
    from benchmarks.common import PUBLISHED, load_images, load_model

    entry = PUBLISHED["mnist"]
    robust, (x, y) = load_model(models, entry), load_images(data, entry, count)
    with np.load(data / "mnist_train.npz") as archive:
        images, labels = archive["x"][:10000], archive["y"][:10000]
    train = torch.from_numpy(images).float().div(255.0).unsqueeze(1)
    return Subject("MNIST", robust, standard_training(robust, train, torch.from_numpy(labels).long(), 3), x, y, entry.epsilon)


# %% Index sets: undecided units are what a bound loses on, and robust training leaves few.


def index_sets(subject: Subject, path: Path) -> list[str]:
    """Draw histograms of the shares of units; return what is wrong with them."""
    region, shares = autodual.LInf(subject.eps, domain=DOMAIN), {}
    for name in ("standard", "robust"):
        shares[name] = list(sign_shares(autodual.certify(getattr(subject, name)), subject.x, region).values())
    layers = len(shares["robust"])
    with canvas(path, (3.4 * layers, 5.2), f"{subject.name}: signs of the units over {region}, one share per image") as figure:
        rows = figure.subplots(2, layers, sharex=True, squeeze=False)
        for row, (name, layered) in zip(rows, shares.items(), strict=True):
            for number, (axes, share) in enumerate(zip(row, layered, strict=True)):
                kinds = zip(share.T, (NEVER, UNDECIDED, ALWAYS), ("never positive", "undecided", "never negative"), strict=True)
                for values, colour, label in kinds:
                    axes.hist(values.numpy(), bins=np.linspace(0, 1, 41), color=colour, alpha=0.75, label=label)
                axes.set_title(f"{name} training, layer {number + 1}: {share[:, 1].mean():.0%} undecided")
                plain(axes)
        for axes in rows[1]:
            axes.set_xlabel("share of the layer's units")
        for axes in rows[:, 0]:
            axes.set_ylabel("images")
        figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    undecided = {name: torch.stack([share[:, 1].mean() for share in layered]) for name, layered in shares.items()}
    for name, values in undecided.items():
        print(f"undecided units, {name} training, layer by layer: " + ", ".join(f"{value:.1%}" for value in values.tolist()))
    return [] if undecided["robust"].mean() < undecided["standard"].mean() else ["robust training left more units undecided"]


# %% Filters: the l_1 term of the bound acts on weights as a penalty does, and leaves few that are not zero.


def filters(subject: Subject, path: Path) -> list[str]:
    """Draw the first layer's filters; return what is wrong with them."""
    weights = {name: _first_filters(getattr(subject, name)) for name in ("standard", "robust")}
    columns = len(weights["robust"]) // 2
    with canvas(
        path, (1.5 * columns + 1.5, 2.6), f"{subject.name}: filters of the first layer, one scale for each network"
    ) as figure:
        for part, (name, bank) in zip(figure.subfigures(1, 2, wspace=0.06), weights.items(), strict=True):
            limit = float(bank.abs().max())
            part.suptitle(f"{name} training: {_near_zero(bank):.0%} of the weights near zero", fontsize=9.5)
            for axes, kernel in zip(part.subplots(2, columns).flat, bank, strict=True):
                axes.imshow(kernel, cmap="RdBu_r", vmin=-limit, vmax=limit)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_color(GRID)
    for name, bank in weights.items():
        print(f"filters, {name} training: {_near_zero(bank):.1%} of the weights below 1 % of the largest")
    return [] if _near_zero(weights["robust"]) > _near_zero(weights["standard"]) else ["robust filters are not sparser"]


def _first_filters(model: nn.Module) -> Tensor:
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d)).weight.detach()[:, 0]


def _near_zero(bank: Tensor) -> float:
    return float((bank.abs() < 0.01 * bank.abs().max()).double().mean())


# %% Accuracy against eps: every method below every attack, or a bound is wrong.


def accuracy(subject: Subject, path: Path, count: int, points: int) -> list[str]:
    """Draw certified accuracy of several methods and accuracy under attack; return what is wrong with them."""
    x, y, radii, faults = subject.x[:count], subject.y[:count], np.linspace(0, 2 * subject.eps, points), []
    with canvas(path, (10.0, 4.4), f"{subject.name}: certified accuracy by method, {len(x)} images") as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, name in zip(panels, ("standard", "robust"), strict=True):
            net = autodual.certify(getattr(subject, name))
            curves = {method: np.zeros(points) for method in (*METHODS, "attack")}
            for place, eps in enumerate(radii.tolist()):
                region = autodual.LInf(eps, domain=DOMAIN)
                kept = survives(net, x, y, region=region, steps=20, batch=len(x))
                curves["attack"][place] = kept.double().mean()
                for method in METHODS:
                    good = certify(net, x, y, region=region, method=method, batch=50).certified
                    curves[method][place] = good.double().mean()
                    if bool((good & ~kept).any()):
                        faults.append(f"{name}, eps {eps:g}: an attack broke what {method} certified")
            axes.fill_between(radii, curves["auto"], curves["attack"], color="#f1dfb4", alpha=0.6, lw=0)
            axes.plot(radii, curves["attack"], color=ATTACK, marker="o", ms=3.5, label="survives an attack (PGD)")
            for method, colour in METHODS.items():
                axes.plot(radii, curves[method], color=colour, marker="o", ms=3.5, lw=1.8, label=f"certified, {method}")
            axes.axvline(subject.eps, color=INK, lw=0.8, ls=":")
            axes.set(title=f"{name} training", xlabel="eps, l_inf", ylim=(0, 1.02), xlim=(0, radii[-1]))
            _percent(axes)
            worse = curves["auto"] < np.maximum(curves["dual"], curves["adaptive"]) - ALLOWED
            faults += [f"{name}: auto certified less than a method it tries"] if worse.any() else []
            print(f"accuracy at eps {radii[points // 2]:g}, {name} training: ", end="")
            print(", ".join(f"{method} {curve[points // 2]:.1%}" for method, curve in curves.items()))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        panels[0].set_ylabel("share of the images")
    return faults


# %% Radii: under robust training they gather beyond the radius trained for.


def radii(subject: Subject, path: Path, count: int) -> list[str]:
    """Draw every example's largest certified radius in increasing order, coloured by what is right; return what is wrong."""
    x, y, found = subject.x[:count], subject.y[:count], {}
    largest = 3 * subject.eps
    with canvas(path, (10.0, 4.4), f"{subject.name}: largest certified l_inf radius of {len(x)} images") as figure:
        for column, name in enumerate(("standard", "robust")):
            net = autodual.certify(getattr(subject, name))
            with torch.no_grad():
                predicted = net(x).argmax(1)
            radius = net.radius(x, predicted, max_radius=largest, domain=DOMAIN)
            found[name] = radius
            order = radius.argsort()
            top, bottom = figure.add_subplot(2, 2, 1 + column), figure.add_subplot(2, 2, 3 + column)
            right = (predicted == y)[order]
            place = np.arange(len(x))
            colours = np.where(right.numpy(), ALWAYS, UNDECIDED)
            top.bar(place, radius[order].numpy(), width=1.0, color=colours)
            top.set(
                ylim=(0, largest),
                title=f"{name} training, median {radius.median():.3f}",
                ylabel="radius",
                xlabel="image, in this order",
            )
            bins = np.linspace(0, largest, 41)
            bottom.hist([radius[predicted == y].numpy(), radius[predicted != y].numpy()], bins=bins, stacked=True,
                        color=[ALWAYS, UNDECIDED], label=["classified rightly", "wrongly"])  # fmt: skip
            bottom.set(xlim=(0, largest), xlabel="radius", ylabel="images")
            for axes in (top, bottom):
                plain(axes)
            if column == 1:
                bottom.axvline(subject.eps, color=INK, lw=0.8, ls=":")
                top.axhline(subject.eps, color=INK, lw=0.8, ls=":")
                bottom.legend(frameon=False)
            again = net.verify(x, predicted, autodual.LInf(radius, domain=DOMAIN)).certified
            if not bool((again | (radius == 0)).all()):
                return [f"{name}: a radius is not certified"]
            print(
                f"radii, {name} training: median {radius.median():.4f}, smallest {radius.min():.4f}, largest {radius.max():.4f}"
            )
    return [] if found["robust"].median() > found["standard"].median() else ["robust training did not widen the radii"]


def _percent(axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    plain(axes)


def main() -> None:
    """Draw four pictures and check what each claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with mnist_test.npz and mnist_train.npz")
    parser.add_argument("--models", type=Path, help="folder with mnist.pt")
    parser.add_argument("--count", type=int, default=200, help="images; accuracy and radii take half of them")
    parser.add_argument("--points", type=int, default=9, help="radii on the curves of accuracy")
    parser.add_argument("--output", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    if (arguments.data is None) != (arguments.models is None):
        parser.error("--data and --models go together")
    paths = (arguments.data, arguments.models)
    subject = bundled(arguments.count) if arguments.data is None else mnist(*paths, arguments.count)
    half, folder = max(1, arguments.count // 2), arguments.output
    pictures: dict[str, Callable[[Path], list[str]]] = {
        "index_sets.png": lambda path: index_sets(subject, path),
        "filters.png": lambda path: filters(subject, path),
        "accuracy.png": lambda path: accuracy(subject, path, half, arguments.points),
        "radii.png": lambda path: radii(subject, path, half),
    }
    faults = [fault for name, draw in pictures.items() for fault in draw(folder / name)]
    print(f"pictures in {folder}: {', '.join(pictures)}")
    if faults:
        raise SystemExit("; ".join(faults))


if __name__ == "__main__":
    main()
