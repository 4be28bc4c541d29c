"""What the subcommands share: the error a user sees, the layout of help, and readers of single words."""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import types
from typing import Any

import torch

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class CommandError(Exception):
    """The request cannot be carried out; the message is the one line a user sees."""


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help with descriptions kept as written and one column for all flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=min(100, shutil.get_terminal_size().columns))
        self._action_max_length = 26  # or the column would depend on what else is listed, and sub-commands overflow it


def require(module: str, extra: str) -> types.ModuleType:
    """Import an optional dependency.

    Raises:
        CommandError: it is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise CommandError(f"this needs {package}, which is not installed: pip install 'autodual[{extra}]'") from error


def progress_bar(*, time_left: bool = True) -> Any:
    """Return a progress bar on stderr, to be used as a context; silent where stderr is no terminal.

    Args:
        time_left: show a guess of the time left; False where the description says it.
    """
    console, kind = require("rich.console", "cli").Console(stderr=True), require("rich.progress", "cli").Progress
    columns = kind.get_default_columns()  # description, bar, share, time left
    return kind(*(columns if time_left else columns[:-1]), console=console, transient=True, disable=not console.is_terminal)


def radius(text: str) -> float:
    """Read a radius such as ``0.1`` or ``8/255``."""
    try:
        top, _, bottom = text.partition("/")
        value = float(top) / float(bottom) if bottom else float(top)
    except (ValueError, ZeroDivisionError):
        value = float("nan")
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a radius; write a number >= 0 such as 0.1 or 8/255")
    return value


def positive(text: str) -> int:
    """Read a whole number of at least one."""
    if not re.fullmatch(r"\d+", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def fraction(text: str) -> float:
    """Read a share between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction; write a number from 0 to 1, such as 0.9")
    return value


def device(text: str) -> torch.device:
    """Read a device such as ``cpu`` or ``cuda:0`` and see that it is there."""
    try:
        torch.zeros((), device=text)
        return torch.device(text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"device {text!r} cannot be used here: {reason}") from error


def add_run_options(parser: argparse.ArgumentParser, batch: int | None = None) -> None:
    """Add the flags that say where and how to compute, and how many examples at a time where there are examples."""
    group = parser.add_argument_group("computation")
    if batch is not None:
        group.add_argument("--batch", type=positive, default=batch, metavar="N", help=f"examples at a time (default: {batch})")
    group.add_argument("--device", type=device, default=torch.device("cpu"), help="cpu (default), cuda, cuda:1, ...")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="floating-point type (default: float32)")
