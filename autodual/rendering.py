"""What tables and pictures have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#1f2430", "#e6e8ec"


def table(rows: Sequence[Sequence[str]], aligned: str) -> str:
    """Lay rows out in plain text; the first row is the heading.

    Args:
        rows: the cells.
        aligned: ``l`` or ``r`` for every column.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(aligned))]
    turn = {"l": str.ljust, "r": str.rjust}
    lines = [
        "  ".join(turn[a](cell, width) for a, cell, width in zip(aligned, row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def figure_class() -> type[Figure]:
    """Return matplotlib's figure, which needs no screen.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("draw() needs matplotlib: pip install 'autodual[plot]'") from error
    return matplotlib.figure.Figure


@contextmanager
def canvas(path: Path, size: tuple[float, float], title: str) -> Iterator[Figure]:
    """Give a figure to draw on, and write it when all is drawn.

    Args:
        path: where to write; missing folders are made.
        size: width and height in inches.
        title: a line above everything.

    Yields:
        The figure.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure_of = figure_class()
    import matplotlib

    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9.5, "text.color": INK, "axes.labelcolor": INK}):
        figure = figure_of(figsize=size, layout="constrained", facecolor="white")
        figure.suptitle(title, x=0.01, ha="left")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)


def plain(axes: Axes) -> None:
    """Give axes a light grid behind what is drawn, and no frame above and to the right."""
    axes.grid(color=GRID, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
