"""Parse the command line, hand over to a subcommand, turn expected errors into one line and an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from autodual.cli import certify, demo, evaluate, explain, operators, train
from autodual.cli.common import CommandError, Formatter
from autodual.errors import AutoDualError

DESCRIPTION = """\
AutoDual turns a PyTorch model into its dual network, and bounds what the model
can output over a whole set of inputs. A certified example keeps its class for
*every* input in the region around it, not only for those that an attack tried.
"""

EPILOG = """\
examples:
  autodual demo                                     see a digit classifier certified
  autodual certify --help                           certify a model of your own
  autodual train --help                             train one that is easier to certify
  autodual evaluate --help                          judge one by several methods and an attack
  autodual operators                                what a model may consist of
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every subcommand."""
    parser = argparse.ArgumentParser("autodual", description=DESCRIPTION, epilog=EPILOG, formatter_class=Formatter)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (certify, demo, evaluate, explain, operators, train):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the words after ``autodual``; those of the process by default.

    Returns:
        The exit code, see ``autodual.cli``.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (CommandError, AutoDualError) as error:
        sys.stderr.write(f"autodual {arguments.command}: error: {error}\n")
        return 2
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has left; there is no one to tell
        return 141
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def _version() -> str:
    try:
        own = version("autodual")
    except PackageNotFoundError:
        own = "(not installed)"
    return f"autodual {own} (torch {torch.__version__}, Python {sys.version.split()[0]})"
