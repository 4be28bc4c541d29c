"""``autodual explain``: every node of a model, its dual layer, its shape and its line in the source."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import autodual
from autodual.cli.common import DTYPES, Formatter, add_run_options, positive, require
from autodual.cli.inputs import add_model_options, load_model

EPILOG = """\
examples:
  autodual explain --model autodual.digits:load_model --shape 1 8 8
  autodual explain --model model.py:build --shape 3 32 32 --draw graph.png
"""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "explain",
        help="show how a model is understood",
        epilog=EPILOG,
        formatter_class=Formatter,
        description="Show every node of a model: its operator, the dual layer that bounds it, its shape and source line.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--shape", nargs="+", type=positive, metavar="D", help="shape of one input without the batch, e.g. 1 28 28"
    )
    parser.add_argument("--draw", type=Path, metavar="FILE.png", help="write a picture of the graph")
    add_run_options(parser)
    parser.set_defaults(run=run, command="explain")


def run(arguments: argparse.Namespace) -> int:
    """Print the table, write the picture asked for."""
    dtype = DTYPES[arguments.dtype]
    example = torch.zeros(2, *arguments.shape, dtype=dtype, device=arguments.device) if arguments.shape else None
    net = autodual.certify(load_model(arguments.model, arguments.weights, dtype, arguments.device), example)
    require("rich.console", "cli").Console(soft_wrap=True).print(str(net.explain()), markup=False, highlight=False)
    if arguments.draw:
        require("matplotlib", "plot")
        net.explain().draw(arguments.draw)
    return 0
