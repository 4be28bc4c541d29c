"""``autodual evaluate``: clean, attacked and certified accuracy, the last by the union of several methods."""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

import autodual
from autodual.cli import output
from autodual.cli.common import DTYPES, CommandError, Formatter, add_run_options, positive, progress_bar, radius, require
from autodual.cli.inputs import add_data_options, add_model_options, load_data, load_model
from autodual.cli.launch import group
from autodual.methods import METHODS
from autodual.report import why_none
from autodual.training import NORMS, Judgement, by_cost, judge
from dual_layers import NONE

DESCRIPTION = """\
Judge a classifier on a data set, from both sides: what an attack breaks, and what
some method proves. Each method is asked about the examples that the cheaper ones
before it left undecided.
"""

EPILOG = """\
examples:
  The digit classifier that comes with the library:
    autodual evaluate --model autodual.digits:load_model --data digits \\
        --eps 0.05 0.1 --domain 0 1 --methods interval dual auto --attack 40

  Weights that were trained by `autodual train`, every example in a table:
    autodual evaluate --model autodual.digits:build --weights runs/digits/best.pt --data digits \\
        --eps 0.1 --domain 0 1 --csv examples.csv

  On four processors:
    torchrun --nproc-per-node 4 -m autodual evaluate --model ...

exit code: 0 done; 2 cannot be carried out; 3 an attack broke a certified example (please
report it: it must never happen).
"""


@dataclass(frozen=True)
class Outcome:
    """The outcome at one radius.

    Attributes:
        eps: the radius.
        methods: by name, in the order in which they were asked.
        found: what was found out about each example.
        attack: steps of the attack; None if there was none.
        seconds: wall time.
    """

    eps: float
    methods: Sequence[str]
    found: Judgement
    attack: int | None
    seconds: float

    def totals(self) -> dict[str, Any]:
        """Return counts by name."""
        found = self.found
        counts = {"examples": len(found.y), "clean": int(found.right.sum()), "certified": int(found.certified.sum())}
        counts |= {f"certified_by_{name}": int((found.by == i).sum()) for i, name in enumerate(self.methods)}
        attacked = {"attacked": int(found.survived.sum()), "contradictions": found.contradictions} if self.attack else {}
        return {"eps": self.eps, **counts, **attacked, "seconds": round(self.seconds, 3)}

    def examples(self) -> list[dict[str, Any]]:
        """Return one record per example."""
        found = self.found
        columns = (found.index, found.y, found.predicted, found.by, found.survived, found.margin)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [
            {
                "index": index,
                "eps": self.eps,
                "label": label,
                "predicted": predicted,
                "verdict": "certified" if by >= 0 else "unknown" if survived else "falsified",
                "method": self.methods[by] if by >= 0 else "",
                "margin": margin,
            }
            for index, label, predicted, by, survived, margin in rows
        ]


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "evaluate",
        help="judge a classifier by several methods and an attack",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
        usage="autodual evaluate --model FILE.py:NAME [--weights FILE] --data FILE.npz --eps E [options]",
    )
    add_model_options(parser)
    add_data_options(parser)
    asked = parser.add_argument_group("question")
    asked.add_argument("--eps", nargs="+", required=True, type=radius, metavar="E", help="radius, one or several")
    asked.add_argument("--norm", choices=NORMS, default="linf", help="norm of the ball (default: linf)")
    asked.add_argument("--domain", nargs=2, type=float, metavar=("LOW", "HIGH"), help="valid inputs, usually 0 1")
    asked.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["interval", "dual", "auto"], help="default: interval dual auto"
    )
    asked.add_argument("--attack", type=positive, metavar="STEPS", help="also attack by projected gradient descent")
    add_run_options(parser, batch=50)
    results = parser.add_argument_group("output")
    results.add_argument("--json", type=Path, metavar="FILE", help="write settings, totals and every example (- for stdout)")
    results.add_argument("--csv", type=Path, metavar="FILE", help="write one line per example and eps (- for stdout)")
    parser.set_defaults(run=run, command="evaluate")


def run(arguments: argparse.Namespace) -> int:
    """Judge, print a table, write the files asked for."""
    arguments.dtype = DTYPES[arguments.dtype]
    estimates = [name for name in arguments.methods if METHODS[name]().guarantee == NONE]
    if estimates:
        raise CommandError(f"--methods {estimates[0]} proves nothing: {why_none(METHODS[estimates[0]]())}")
    output.check_writable(arguments)
    with group(str(arguments.device)) as prints:
        x, y = load_data(arguments)
        net = autodual.certify(load_model(arguments.model, arguments.weights, arguments.dtype, arguments.device))
        outcomes = [_outcome(net, TensorDataset(x, y), eps, arguments, prints) for eps in arguments.eps]
        if prints:
            console = require("rich.console", "cli").Console(stderr=output.STDOUT in (arguments.json, arguments.csv))
            console.print(_table(outcomes, arguments))
            _write(outcomes, arguments)
    return 3 if any(outcome.found.contradictions for outcome in outcomes) else 0


def _outcome(
    net: autodual.BoundModule, dataset: TensorDataset, eps: float, arguments: argparse.Namespace, prints: bool
) -> Outcome:
    methods, begin = by_cost(arguments.methods), time.perf_counter()
    region = NORMS[arguments.norm](eps, domain=arguments.domain and tuple(arguments.domain))
    with progress_bar() as bar:
        task = bar.add_task(f"judge, eps {eps:g}", total=len(dataset), visible=prints)
        found = judge(
            net,
            dataset,
            region,
            methods,
            index=torch.arange(len(dataset)),
            attack=arguments.attack or 0,
            batch=arguments.batch,
            step=lambda count: bar.advance(task, count),
        )
    return Outcome(eps, methods, found, arguments.attack, time.perf_counter() - begin)


def _table(outcomes: Sequence[Outcome], arguments: argparse.Namespace) -> Any:
    """Lay the totals out, one line per radius."""
    examples = len(outcomes[0].found.y)
    result = require("rich.table", "cli").Table(
        title=f"{Path(arguments.model).name} on {arguments.data.name}\n{examples} examples"
    )
    attack = ("survive\nattack", "contra-\ndictions") if arguments.attack else ()
    by = [f"by\n{name}" for name in outcomes[0].methods]
    for header in (f"eps\n{arguments.norm}", "clean", *attack, "certified", *by):
        result.add_column(header, justify="right")
    for outcome in outcomes:
        totals = outcome.totals()

        def share(name: str, totals: dict[str, Any] = totals) -> str:
            return f"{totals[name]}\n{totals[name] / examples:.1%}" if examples else "0"

        attacked = (share("attacked"), str(totals["contradictions"])) if arguments.attack else ()
        proved = (str(totals[f"certified_by_{name}"]) for name in outcome.methods)
        cells = (share("clean"), *attacked, f"[bold]{share('certified')}[/]", *proved)
        result.add_row(f"{outcome.eps:g}", *cells)
    return result


def _write(outcomes: Sequence[Outcome], arguments: argparse.Namespace) -> None:
    examples = [example for outcome in outcomes for example in outcome.examples()]
    names = ("model", "weights", "data", "norm", "domain", "methods", "dtype", "device", "limit", "attack")
    content = {
        "settings": {name: getattr(arguments, name) for name in names},
        "totals": [outcome.totals() for outcome in outcomes],
        "examples": examples,
    }
    try:
        if arguments.json:
            with output.opened(arguments.json) as file:
                file.write(json.dumps(content, indent=1, default=str) + "\n")
        if arguments.csv:
            with output.opened(arguments.csv) as file:
                writer = csv.DictWriter(file, ("index", "eps", "label", "predicted", "verdict", "method", "margin"))
                writer.writeheader()
                writer.writerows(examples)
    except OSError as error:
        raise CommandError(f"cannot write {error.filename}: {error.strerror}") from error
