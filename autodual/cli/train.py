"""``autodual train``: train a classifier to be provably robust, as a configuration file or flags say."""

from __future__ import annotations

import argparse
import logging
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from autodual import losses
from autodual.cli.common import CommandError, Formatter, positive, progress_bar, radius, require
from autodual.cli.inputs import load_data, load_model
from autodual.cli.launch import group
from autodual.methods import METHODS
from autodual.training import NORMS, Config, Progress, Result, train
from autodual.training.memory import keep_freed_memory

DESCRIPTION = """\
Train a classifier so that its predictions are provably the same under every
perturbation of size eps. Settings come from a TOML file, from flags, or both.
"""

EPILOG = """\
examples:
  A minute of training on the digits that come with the library:
    autodual train examples/train_digits.toml --out runs/digits

  The same from flags, with another seed:
    autodual train --model autodual.digits:build --train digits --held-out 100 --eps 0.1 --ramp 8 \\
        --epochs 16 --batch 50 --lr 0.003 --domain 0 1 --seed 1 --out runs/flags

  Go on after a crash, with the same result, bit for bit, as without one:
    autodual train --out runs/digits --resume

  On four processors:
    torchrun --nproc-per-node 4 -m autodual train examples/train_digits.toml --out runs/four

The folder of a run holds config.toml, log.csv, summary.json, curves.png, best.pt (a
plain state dict) and last.pt (the checkpoint). docs/training.md explains all settings.
"""

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "--model": ("model", {"metavar": "FILE.py:NAME", "help": "function without arguments that returns the model"}),
    "--train": ("data.train", {"metavar": "FILE.npz", "help": "inputs 'x' and labels 'y'; or the word digits"}),
    "--test": ("data.test", {"metavar": "FILE.npz", "help": "examples judged once, at the end"}),
    "--scale": ("data.scale", {"type": float, "metavar": "S", "help": "divide the stored inputs by S: 255 for 8-bit pixels"}),
    "--shape": ("data.shape", {"type": positive, "nargs": "+", "metavar": "D", "help": "shape of one input, e.g. 1 28 28"}),
    "--limit": ("data.limit", {"type": positive, "metavar": "N", "help": "only the first N training examples"}),
    "--held-out": (
        "data.held_out",
        {"type": int, "metavar": "N", "help": "training examples kept to choose the best weights by"},
    ),
    "--loss": ("loss.name", {"choices": losses.LOSSES, "help": "what to minimise"}),
    "--method": ("loss.method", {"choices": METHODS, "help": "how the loss bounds"}),
    "--norm": ("norm", {"choices": NORMS, "help": "norm of the ball"}),
    "--domain": ("domain", {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH"), "help": "valid inputs, usually 0 1"}),
    "--epochs": ("epochs", {"type": positive, "metavar": "N", "help": "passes through the training examples"}),
    "--minutes": ("minutes", {"type": float, "metavar": "M", "help": "stop after M minutes, whatever the epoch"}),
    "--batch": ("batch", {"type": positive, "metavar": "N", "help": "examples for each step, all processes together"}),
    "--lr": ("schedules.lr", {"type": float, "metavar": "LR", "help": "learning rate of Adam"}),
    "--seed": ("seed", {"type": int, "metavar": "N", "help": "of weights, order and all other random numbers"}),
    "--threads": ("threads", {"type": positive, "metavar": "N", "help": "threads of each process"}),
    "--device": ("device", {"metavar": "D", "help": "cpu, cuda, cuda:1, ..."}),
}
"""Flags for the most usual settings: the setting's name, and what argparse needs."""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "train",
        help="train a provably robust classifier",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
        usage="autodual train [CONFIG.toml] [--out DIR] [--resume] [--set NAME=VALUE ...] [options]",
    )
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="settings; flags and --set come after them")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/ and the name of CONFIG.toml)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in DIR; begin it if there is none yet")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="any setting, its value as in TOML: evaluation.patience=5; may be repeated",
    )
    settings = parser.add_argument_group("settings")
    for flag, (name, options) in SETTINGS.items():
        settings.add_argument(flag, dest=f"setting_{name}", **options)
    settings.add_argument("--eps", type=radius, metavar="E", help="radius; 8/255 is understood")
    settings.add_argument("--ramp", type=float, metavar="N", help="let the radius grow smoothly from 0 over the first N epochs")
    parser.set_defaults(run=run, command="train")


def run(arguments: argparse.Namespace) -> int:
    """Train, say how it went."""
    config = _config(arguments)
    out = arguments.out or Path("runs") / (arguments.config.stem if arguments.config else "train")
    if config.model is None or config.data.train is None:
        missing = "model" if config.model is None else "data.train"
        raise CommandError(f"{missing} is not set: name it in CONFIG.toml or by --model and --train")
    console = require("rich.console", "cli").Console()
    keep_freed_memory()
    with group(config.device) as prints:
        if config.threads:
            torch.set_num_threads(config.threads)
        torch.manual_seed(config.seed)  # the builder draws the initial weights
        model = load_model(config.model, None, torch.float32, torch.device("cpu"))
        dataset = _dataset(config, config.data.train, config.data.limit)
        test = None if config.data.test is None else _dataset(config, config.data.test, None)
        with _reported(prints) as watch:
            result = train(model, dataset, config, test=test, out=out, resume=arguments.resume, watch=watch)
        if prints:
            console.print(_summary(result, config, out), markup=False, highlight=False, soft_wrap=True)
    return 0


def _config(arguments: argparse.Namespace) -> Config:
    """Read the file, then apply the flags, then ``--set``."""
    changes = [(key.removeprefix("setting_"), value) for key, value in vars(arguments).items() if key.startswith("setting_")]
    changes = [(name, value) for name, value in changes if value is not None]
    if arguments.ramp is not None and arguments.eps is None:
        raise CommandError("--ramp needs --eps, the radius to grow to")
    if arguments.eps is not None:
        ramp = {"kind": "smooth", "start": 0.0, "end": arguments.eps, "length": arguments.ramp}
        changes.append(("schedules.eps", ramp if arguments.ramp else arguments.eps))
    changes += arguments.set
    if arguments.config is not None:
        return Config.read(arguments.config, changes)
    begun = arguments.out and arguments.out / "config.toml"
    if arguments.resume and begun and begun.exists():
        return Config.read(begun, changes)
    return Config.build({}, changes)


def _setting(text: str) -> tuple[str, Any]:
    """Read ``NAME=VALUE``; a value that is no TOML is a text."""
    name, separator, value = text.partition("=")
    if not separator or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no setting; write NAME=VALUE, such as epochs=10")
    try:
        return name.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name.strip(), value.strip()


def _dataset(config: Config, path: str, limit: int | None) -> TensorDataset:
    data = config.data
    asked = argparse.Namespace(
        data=Path(path),
        keys=data.keys,
        scale=data.scale,
        shape=data.shape,
        limit=limit,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return TensorDataset(*load_data(asked))


@contextmanager
def _reported(prints: bool) -> Iterator[Callable[[Progress], None]]:
    """Show a bar where stderr is a terminal, and one line per epoch in any case; only in the process that prints."""
    if not prints:
        yield lambda _: None
        return
    logger = logging.getLogger("autodual.training")
    level = logger.level
    with progress_bar(time_left=False) as bar:
        task = bar.add_task("compile", total=None)
        handler = logging.StreamHandler(sys.stderr)  # that of the bar, which keeps itself below the lines
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield lambda progress: bar.update(
                task, completed=progress.step, total=progress.steps, description=_described(progress)
            )
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)


def _described(progress: Progress) -> str:
    row, minutes = progress.row or {}, progress.left / 60
    shares = [f"{name} {row[name]:.1%}" for name in ("clean", "attacked", "certified") if name in row]
    values = [f"loss {progress.loss:.3g}", f"eps {progress.values['eps']:.3g}"]
    return "  ".join([f"epoch {progress.epoch:.1f}", *values, *shares, f"{minutes:.1f} min left"])


def _summary(result: Result, config: Config, out: Path) -> str:
    lines = [f"stopped by {result.stopped} after {result.seconds:.0f} s; {out} holds best.pt, log.csv and summary.json"]
    judged = f"at eps {config.judged_eps:g} ({config.norm}) by {', '.join(config.evaluation.methods)}"
    if result.best and "certified" in result.best and config.data.held_out:
        lines.append(
            f"held out, {config.data.held_out} examples, epoch {result.best['epoch']:g}: {_shares(result.best)} {judged}"
        )
    if result.test is not None:
        lines.append(f"test, {len(result.test.y)} examples: {_shares(result.test.totals())} {judged}")
    return "\n".join(lines)


def _shares(totals: dict[str, Any]) -> str:
    return ", ".join(f"{name} {totals[name]:.1%}" for name in ("clean", "attacked", "certified"))
