"""The picture of an account: the way down from the reference point, and where on the way a margin is lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from autodual.account import Account, Entry
from autodual.rendering import INK, canvas, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KEPT, LOST, REGION = "#1b7f6b", "#c8452f", "#5b7db1"
CURVES = 7
"""How many entries, those that take most, have a curve of their own."""

SMALLEST = 4
"""An input with two axes of at least this size is shown as an image."""


def draw(account: Account, path: Path) -> Path:
    """Draw an account.

    Args:
        account: what to draw.
        path: where to write.

    Returns:
        The path written.

    Raises:
        ImportError: matplotlib is missing.
    """
    images = [entry for entry in account.entries if _is_image(entry)]
    height = max(3.8, 0.42 * len(account.entries) + 2.0)
    title = f"{account.title}: {type(account.method).__name__}, {account.region}"
    with canvas(path, (12.0 if images else 9.0, height), title) as figure:
        widths = (1.5, 1.0, 1.0) if images else (1.5, 1.0)
        axes = figure.subplots(1, len(widths), width_ratios=widths)
        _waterfall(axes[0], account)
        _concentration(axes[1], account)
        if images:
            _heat(axes[2], max(images, key=lambda entry: entry.amount))
    return path


def _is_image(entry: Entry) -> bool:
    shape = entry.nu.shape
    return entry.is_input and entry.amounts is not None and len(shape) in (2, 3) and min(shape[-2:]) >= SMALLEST


def _waterfall(axes: Axes, account: Account) -> None:
    """Draw the margin at the centre, one step down for each entry, and the margin that is left."""
    names = ["at the centre", *map(_label, account.entries), account.outcome]
    steps = np.array([entry.amount for entry in account.entries])
    left = account.reference - np.concatenate([[0.0], np.cumsum(steps)])
    rows = np.arange(len(names))
    axes.barh(rows[0], account.reference, color=KEPT)
    axes.barh(rows[1:-1], -steps, left=left[:-1], color=_colours(account))
    axes.barh(rows[-1], account.margin, color=KEPT if account.margin > account.allowance else LOST)
    for row, end in zip(rows[:-1], left, strict=True):
        axes.plot([end, end], [row - 0.4, row + 1.4], color=INK, lw=0.6, alpha=0.5)
    axes.axvline(0, color=INK, lw=1.0)
    taken = (f"-{step:.3g}  ({account.share(step):.1%})" for step in steps)
    ends = [max(account.reference, 0.0), *left[:-1], max(account.margin, 0.0)]
    for row, end, number in zip(rows, ends, (f"{account.reference:.3g}", *taken, f"{account.margin:.3g}"), strict=True):
        axes.annotate(number, (end, row), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(rows, names)
    axes.invert_yaxis()
    axes.use_sticky_edges = False
    axes.margins(x=0.24)
    axes.set(xlabel="margin", title="from the reference point down to the bound")
    plain(axes)


def _label(entry: Entry) -> str:
    source = f"\n{entry.source}" if entry.source not in ("", "-") else ""
    return entry.node if entry.is_input else f"{entry.node}  {entry.operator}{source}"


def _colours(account: Account) -> list[Any]:
    """Return one colour for each entry: inputs in one, relaxations from dark to light in the order of the model."""
    from matplotlib import colormaps

    relaxed = sum(not entry.is_input for entry in account.entries)
    shades = iter(colormaps["YlOrRd"](np.linspace(0.85, 0.4, max(relaxed, 1))))
    return [REGION if entry.is_input else next(shades) for entry in account.entries]


def _concentration(axes: Axes, account: Account) -> None:
    """Draw how much of its loss each entry's largest elements hold: steep where few elements are to blame."""
    from matplotlib.ticker import PercentFormatter

    least = sorted((entry.amount for entry in account.entries), reverse=True)[:CURVES][-1:]
    for entry, colour in zip(account.entries, _colours(account), strict=True):
        if entry.contributing and entry.amount >= least[0]:
            amounts = entry.amounts.double().flatten().sort(descending=True).values.cpu().numpy()
            count, reached = np.arange(1, len(amounts) + 1), np.cumsum(amounts) / entry.amount
            name = entry.node if entry.is_input else f"{entry.operator}  {entry.node}"
            axes.plot(count, reached, color=colour, lw=1.8, label="\N{ZERO WIDTH SPACE}" + name)  # "_1" would get no label
            axes.plot(count[entry.half - 1], reached[entry.half - 1], "o", color=colour, ms=5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(xlabel="elements, largest first (dot: half)", title="share of its loss in so many elements")
    if axes.lines:
        axes.legend(frameon=False, loc="lower right")
    plain(axes)


def _heat(axes: Axes, entry: Entry) -> None:
    """Show where in an image its region takes the margin, channels added up."""
    amounts = entry.amounts.double().cpu().numpy()
    image = axes.imshow(amounts if amounts.ndim == 2 else amounts.sum(0), cmap="magma", vmin=0)
    axes.set(xticks=[], yticks=[], title=f"lost to the region of {entry.node}")
    axes.figure.colorbar(image, ax=axes, shrink=0.75)
