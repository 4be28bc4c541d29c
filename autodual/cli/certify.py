"""``autodual certify``: which examples of a data set keep their class in a region around them, provably."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import autodual
from autodual.account import Account
from autodual.cli import output
from autodual.cli.common import (
    DTYPES,
    CommandError,
    Formatter,
    add_run_options,
    fraction,
    positive,
    progress_bar,
    radius,
    require,
)
from autodual.cli.evaluation import certify, survives
from autodual.cli.inputs import add_data_options, add_model_options, load_data, load_model
from autodual.cli.method_options import add_method_options, method_from
from autodual.methods import Method, Projected
from autodual.report import why_none
from autodual.training import NORMS
from dual_layers import NONE

DESCRIPTION = """\
Certify a classifier: for how many examples of a data set does the predicted
class provably stay the same under every perturbation of size --eps?

  certified   right, and provably no input of the region changes the class
  falsified   the clean input, or one found by --attack, gets another class
  unknown     neither proved nor refuted
"""

EPILOG = """\
examples:
  The digit classifier that comes with the library, two radii, checked by an attack:
    autodual certify --model autodual.digits:load_model --data digits \\
        --eps 0.05 0.1 --domain 0 1 --attack 40

  Your own: model.py holds `def build(): return nn.Sequential(...)`, 8-bit images in test.npz:
    autodual certify --model model.py:build --weights weights.pt --data test.npz \\
        --scale 255 --shape 1 28 28 --eps 8/255 --domain 0 1 --json report.json

units of --eps: those of the model's input, after --scale and before anything the model
does itself. With pixels in [0, 1], --eps 0.1 moves each pixel by a tenth of its range;
a model that wants normalised pixels should normalise them inside (autodual.Normalize).

exit code: 0 done; 1 done, but less than --require is certified; 2 cannot be carried out;
3 an attack broke a certified example (please report it: it must never happen).
"""


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "certify",
        help="certify a classifier on a data set",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
        usage="autodual certify --model FILE.py:NAME [--weights FILE] --data FILE.npz --eps E [options]",
    )
    add_model_options(parser)
    add_data_options(parser)
    region = parser.add_argument_group("region")
    region.add_argument(
        "--eps",
        nargs="+",
        required=True,
        type=radius,
        metavar="E",
        help="radius in the model's input units, one or several; 8/255 is understood",
    )
    region.add_argument("--norm", choices=NORMS, default="linf", help="norm of the ball (default: linf)")
    region.add_argument(
        "--domain", nargs=2, type=float, metavar=("LOW", "HIGH"), help="valid inputs lie in [LOW, HIGH]: tighter, usually 0 1"
    )
    add_method_options(parser)
    add_run_options(parser, batch=50)
    results = parser.add_argument_group("output")
    results.add_argument(
        "--attack",
        type=positive,
        metavar="STEPS",
        help="also attack by projected gradient descent: the bound from the other side",
    )
    results.add_argument(
        "--require", type=fraction, metavar="FRACTION", help="exit with 1 if less is certified at any eps, e.g. 0.9"
    )
    results.add_argument(
        "--explain",
        type=int,
        action="append",
        metavar="I",
        help="also print where the worst margin of example I (from 0) is lost; may be repeated",
    )
    results.add_argument("--json", type=Path, metavar="FILE", help="write settings, totals and every example (- for stdout)")
    results.add_argument("--csv", type=Path, metavar="FILE", help="write one line per example and eps (- for stdout)")
    parser.set_defaults(run=run, command="certify")


def run(arguments: argparse.Namespace) -> int:
    """Certify, print a table, write the files asked for."""
    arguments.dtype = DTYPES[arguments.dtype]
    method = method_from(arguments)
    if method.guarantee == NONE:
        raise CommandError(f"--method {arguments.method} proves nothing: {why_none(method)}")
    output.check_writable(arguments)
    x, y = load_data(arguments)
    missing = [example for example in arguments.explain or () if not 0 <= example < len(x)]
    if missing:
        raise CommandError(f"--explain {missing[0]}: there are {len(x)} examples, numbered from 0")
    method = _settled(method, arguments.option_examples or len(x) * len(arguments.eps))
    net = autodual.certify(load_model(arguments.model, arguments.weights, arguments.dtype, arguments.device))
    outcomes = _evaluate(net, x, y, method, arguments)
    console = require("rich.console", "cli").Console(stderr=output.STDOUT in (arguments.json, arguments.csv))
    console.print(output.table(outcomes, arguments))
    output.write(outcomes, arguments)
    for example in arguments.explain or ():
        for eps in arguments.eps:
            account = _account(net, x, y, method, _region(arguments, eps), example)
            console.print(f"\n{account}", markup=False, highlight=False, soft_wrap=True)
    if any(outcome.contradictions for outcome in outcomes):
        return 3
    return int(arguments.require is not None and min(outcome.certified for outcome in outcomes) < arguments.require)


def _settled(method: Method, examples: int) -> Method:
    """Let one delta cover the whole table unless something else was asked for, and one seed all its batches."""
    if not isinstance(method, Projected):
        return method
    seed = int(torch.randint(2**62, ())) if method.seed is None else method.seed
    return replace(method, seed=seed, examples=examples)


def _evaluate(
    net: autodual.BoundModule, x: Tensor, y: Tensor, method: Method, arguments: argparse.Namespace
) -> list[output.Outcome]:
    outcomes = []
    with progress_bar() as bar:
        for eps in arguments.eps:
            common = {"region": _region(arguments, eps), "batch": arguments.batch}
            result = certify(net, x, y, method=method, step=_task(bar, f"certify, eps {eps:g}", len(x)), **common)
            kept = None
            if arguments.attack:
                kept = survives(net, x, y, steps=arguments.attack, step=_task(bar, f"attack, eps {eps:g}", len(x)), **common)
            outcomes.append(output.Outcome(eps, y.cpu(), result, kept))
    return outcomes


def _region(arguments: argparse.Namespace, eps: float) -> autodual.Region:
    return NORMS[arguments.norm](eps, domain=arguments.domain and tuple(arguments.domain))


def _account(net: autodual.BoundModule, x: Tensor, y: Tensor, method: Method, region: autodual.Region, example: int) -> Account:
    one = slice(example, example + 1)
    return replace(net.verify(x[one], y[one], region, method).explain(0), example=example)


def _task(bar: Any, text: str, total: int) -> Callable[[int], None]:
    task = bar.add_task(text, total=total)
    return lambda count: bar.advance(task, count)
