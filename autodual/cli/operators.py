"""``autodual operators``: the table of what a model may consist of."""

from __future__ import annotations

import argparse
from typing import Any

from autodual.cli.common import Formatter, require
from autodual.support import support_table, to_markdown


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "operators",
        help="list the supported operators",
        formatter_class=Formatter,
        description="List every operator with a dual layer by family, in the spellings recognised (ATen too with --markdown).",
    )
    parser.add_argument("filter", nargs="?", default="", help="only rows that contain this text, e.g. conv")
    parser.add_argument("--markdown", action="store_true", help="print as Markdown, as in docs/operators.md")
    parser.set_defaults(run=run, command="operators")


def run(arguments: argparse.Namespace) -> int:
    """Print the table."""
    rows = [row for row in support_table() if arguments.filter.lower() in str(row).lower()]
    console = require("rich.console", "cli").Console()
    if arguments.markdown:
        console.print(to_markdown(rows), markup=False, highlight=False, soft_wrap=True, end="")
        return 0
    table = require("rich.table", "cli").Table(title=f"{len(rows)} dual layers", show_lines=True)
    for header in ("family", "dual layer", "kind", "spellings"):
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(
            row.family, row.rule, row.kind, "  ".join(name for name in row.spellings if not name.startswith("torch.ops."))
        )
    console.print(table)
    return 0
