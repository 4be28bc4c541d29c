"""The demo's picture: how far each digit is proved safe, and how far one has to go to fool the classifier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor

import autodual
from autodual.attacks import pgd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOMAIN = (0.0, 1.0)
INK, PROVED, FOOLED, OPEN = "#1f2430", "#1b7f6b", "#c8452f", "#f1dfb4"
GRID = (
    (autodual.LInf, 0.3, r"$\ell_\infty$ radius: largest change of any pixel (0 white, 1 black)"),
    (autodual.L2, 1.5, r"$\ell_2$ radius: length of the whole change"),
)
ATTACKS = 16


def draw(net: autodual.BoundModule, x: Tensor, y: Tensor, path: Path, *, step: Callable[[], None] = lambda: None) -> None:
    """Draw accuracy over radius for two norms above one image of each class with its worst perturbation.

    Args:
        net: the compiled classifier.
        x: images ``(N, 1, 8, 8)`` in [0, 1].
        y: labels.
        path: where to write.
        step: called after each of three parts.
    """
    with matplotlib.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(13, 9.6), layout="constrained", facecolor="white")
        figure.suptitle("Proved, attacked, and the gap between: a classifier of 8x8 digits", fontsize=15, x=0.01, ha="left")
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.0, 1.2), hspace=0.03)
        panels, radii = top.subplots(1, 2, sharey=True), []
        for axes, (region, end, label) in zip(panels, GRID, strict=True):
            radii.append(_radii(net, x, y, region, end))
            _curve(axes, _attacked(net, x, y, region, end), radii[-1], end)
            axes.set_xlabel(label)
            step()
        panels[0].set_ylabel("share of the test images")
        panels[0].legend(frameon=False, loc="lower left", borderpad=1.2)
        _strip(bottom, net, x, y, radii[0])
        step()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)


def _radii(net: autodual.BoundModule, x: Tensor, y: Tensor, region: Any, end: float) -> Tensor:
    """Return the certified radius of every image; -1 where even the image itself gets another class than its label."""
    with torch.no_grad():
        right = net(x).argmax(1) == y
    radii = torch.full((len(x),), -1.0)
    radii[right] = net.radius(x[right], y[right], region, max_radius=end, domain=DOMAIN)
    return radii


def _attacked(net: autodual.BoundModule, x: Tensor, y: Tensor, region: Any, end: float) -> Tensor:
    """Return the share of the images that survive an attack, at evenly spaced radii."""
    shares = []
    for eps in torch.linspace(0, end, ATTACKS).tolist():
        worst = pgd(net, x, y, region(eps, domain=DOMAIN), steps=20)
        with torch.no_grad():
            shares.append((net(worst).argmax(1) == y).double().mean())
    return torch.stack(shares)


def _curve(axes: Axes, attacked: Tensor, radii: Tensor, end: float) -> None:
    """Plot the share certified (a certificate covers every smaller radius too) below the share that survives an attack."""
    places, grid = np.linspace(0, end, len(attacked)), np.linspace(0, end, 301)
    certified = (radii.numpy()[None] >= grid[:, None]).mean(1)
    upper = np.maximum(np.interp(grid, places, attacked), certified)
    axes.fill_between(grid, certified, upper, color=OPEN, lw=0, label="neither proved nor refuted")
    axes.fill_between(grid, 0, certified, color=PROVED, alpha=0.22, lw=0)
    axes.plot(grid, upper, color=FOOLED, lw=1.6)  # between two attacks no less survives than is certified
    axes.plot(places, attacked, color=FOOLED, marker="o", ms=3.5, lw=0)
    axes.plot([], [], color=FOOLED, marker="o", ms=3.5, lw=1.6, label="survives an attack (PGD)")
    axes.plot(grid, certified, color=PROVED, lw=2.4, label="certified by the dual network")
    axes.set(xlim=(0, end), ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(color="#e6e8ec", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _strip(figure: Any, net: autodual.BoundModule, x: Tensor, y: Tensor, radii: Tensor) -> None:
    """Show one digit of each class, the smallest change found that fools the classifier, and the fooling image."""
    chosen = _typical(radii, y)
    images, labels, proved = x[chosen], y[chosen], radii[chosen]
    found, broken_at, fooling = _smallest_fooling(net, images, labels, proved)
    rows = figure.subplots(3, len(chosen), squeeze=False)
    for column, axes in enumerate(rows.T):
        radius, label = float(proved[column]), int(labels[column])
        _image(axes[0], images[column, 0], f"{label}\nup to {radius:.3f}", PROVED)
        if bool(found[column]):
            change = (fooling - images)[column, 0]
            limit = float(broken_at[column])
            axes[1].imshow(change, cmap="RdBu_r", vmin=-limit, vmax=limit)
            seen = int(net(fooling[column : column + 1]).argmax(1))
            _image(axes[2], fooling[column, 0], f"seen as {seen}\nat {limit:.3f}", FOOLED)
        for panel in axes:
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_color("#c9cdd4")
    names = (
        "certified: no change\nup to this size\nalters the class",
        "smallest change\nfound that does",
        "the image\nchanged so",
    )
    for axes, name, colour in zip(rows[:, 0], names, (PROVED, INK, FOOLED), strict=True):
        axes.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=12, color=colour)


def _image(axes: Axes, pixels: Tensor, title: str, colour: str) -> None:
    axes.imshow(pixels, cmap="gray_r", vmin=0, vmax=1)
    axes.set_title(title, color=colour, fontsize=10)


def _typical(radii: Tensor, y: Tensor) -> Tensor:
    """Choose for each class the image whose certified radius is the median of its class."""
    chosen = []
    for label in y.unique().tolist():
        members = (y == label).nonzero()[:, 0]
        chosen.append(members[radii[members].argsort()[len(members) // 2]])
    return torch.stack(chosen)


def _smallest_fooling(net: autodual.BoundModule, x: Tensor, y: Tensor, proved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Search between the certified radius and 0.6 for the smallest at which an attack succeeds.

    Returns:
        Whether one was found, its radius, and the fooling image, one each per example.
    """
    low, high = proved.clone(), torch.full_like(proved, 0.6)
    found, fooling = torch.zeros_like(y, dtype=torch.bool), x.clone()
    for _ in range(9):
        eps = torch.where(found, 0.5 * (low + high), high)
        worst = pgd(net, x, y, autodual.LInf(eps, domain=DOMAIN), steps=100)
        with torch.no_grad():
            fooled = net(worst).argmax(1) != y
        fooling = torch.where(fooled[:, None, None, None], worst, fooling)
        high, low = torch.where(fooled, eps, high), torch.where(fooled, low, eps)
        found |= fooled
    return found, high, fooling
