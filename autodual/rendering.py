"""What tables and pictures have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
