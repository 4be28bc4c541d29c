"""The picture of a run: loss and error over the epochs, robust and clean, on training and on held-out examples."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autodual.rendering import figure_class

logger = logging.getLogger("autodual.training")

INK, ROBUST, ATTACKED, CLEAN, GRID = "#1f2430", "#1b7f6b", "#c8452f", "#5b7db1", "#e6e8ec"
LOSSES = (("robust_loss", "robust", ROBUST), ("clean_loss", "clean", CLEAN))
ERRORS = (("certified", "robust (not certified)", ROBUST), ("attacked", "attacked", ATTACKED), ("clean", "clean", CLEAN))

Rows = Sequence[Mapping[str, Any]]


def draw(rows: Rows, path: Path, judged: str = "held out") -> Path:
    """Draw the log of a run, after the thesis' Figure 3.6.

    Args:
        rows: one dict per epoch.
        path: where to write.
        judged: what the examples are called that were judged beside those trained on.

    Returns:
        The path written.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_of = figure_class()
    import matplotlib

    with matplotlib.rc_context({"font.size": 9, "text.color": INK, "axes.labelcolor": INK}):
        figure = figure_of(figsize=(12.0, 4.0), layout="constrained", facecolor="white")
        loss, error, scheduled = figure.subplots(1, 3, width_ratios=(1.0, 1.0, 0.7))
        for name, label, colour in LOSSES:
            _pair(loss, rows, name, label, colour, lambda value: value, judged)
        for name, label, colour in ERRORS:
            _pair(error, rows, name, label, colour, lambda value: 100 * (1 - value), judged)
        loss.set(ylabel="loss", yscale="log")
        error.set(ylabel="error, %", ylim=(0, None))
        _line(scheduled, rows, "eps", "eps", ROBUST, "-")
        rates = scheduled.twinx()
        _line(rates, rows, "lr", "lr", CLEAN, "--")
        scheduled.set(ylabel="eps", ylim=(0, None))
        rates.set(ylabel="learning rate (dashed)", ylim=(0, None))
        for axes in (loss, error, scheduled):
            axes.set_xlabel("epoch")
            axes.grid(color=GRID, lw=0.7)
            axes.spines[["top"]].set_visible(False)
        for axes in (loss, error):
            axes.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=130)
    return path


def draw_if_possible(rows: Rows, path: Path, judged: str) -> None:
    """Draw, or say in the log what is missing."""
    if not rows:
        return
    try:
        draw(rows, path, judged)
    except ImportError as error:
        logger.info("no picture: %s", error)


def _pair(axes: Any, rows: Rows, name: str, label: str, colour: str, turned: Any, judged: str) -> None:
    _line(axes, rows, name, f"{label}, {judged}", colour, "-", turned)
    _line(axes, rows, f"train_{name}", f"{label}, training", colour, ":", turned)


def _line(axes: Any, rows: Rows, name: str, label: str, colour: str, style: str, turned: Any = lambda value: value) -> None:
    """Plot one column where it has finite values."""
    points = [(row["epoch"], turned(row[name])) for row in rows if name in row and math.isfinite(row[name])]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, linestyle=style, lw=1.6, label=label)
