"""``autodual demo``: certify the bundled digit classifier at several radii, print a table, draw a picture."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import autodual
from autodual import digits
from autodual.cli.common import CommandError, Formatter, positive, progress_bar, require
from autodual.cli.evaluation import Certification, certify, survives

DOMAIN = (0.0, 1.0)
ATTACK_STEPS = 40
BATCH = 50


@dataclass(frozen=True)
class Ball:
    """One norm of the demo: how it is written, its region, and the radii of the table."""

    name: str
    region: Callable[..., autodual.Region]
    radii: tuple[float, ...]


BALLS = (Ball("l_inf", autodual.LInf, (0.01, 0.03, 0.1, 0.15)), Ball("l_2", autodual.L2, (0.05, 0.1, 0.25, 0.4)))


@dataclass(frozen=True)
class Line:
    """One line of the table: what two methods prove and an attack finds at one radius."""

    ball: Ball
    eps: float
    interval: Certification
    dual: Certification
    kept: Tensor

    @property
    def contradictions(self) -> int:
        """Number of certified examples that the attack broke: not zero only if a bound is wrong."""
        return int(((self.interval.certified | self.dual.certified) & ~self.kept).sum())


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "demo",
        help="certify a small digit classifier",
        formatter_class=Formatter,
        description=(
            "Certify the digit classifier that comes with the library (450 test images, 8x8 pixels in [0, 1]):\n"
            "what interval arithmetic proves, what the dual network proves, and what an attack finds."
        ),
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N images")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="also draw a picture")
    parser.set_defaults(run=run, command="demo")


def run(arguments: argparse.Namespace) -> int:
    """Compute, print, draw."""
    console = require("rich.console", "cli").Console()
    if arguments.output:
        require("matplotlib", "plot")
    net = autodual.certify(digits.load_model())
    x, y = (part[: arguments.limit] for part in digits.load_test_set())
    with progress_bar() as bar:
        task = bar.add_task("certify and attack", total=sum(len(ball.radii) for ball in BALLS))
        lines = []
        for ball in BALLS:
            for eps in ball.radii:
                lines.append(_line(net, x, y, ball, eps))
                bar.advance(task)
    console.print(_table(lines, y))
    contradictions = sum(line.contradictions for line in lines)
    console.print(f"Contradictions (certified, yet broken by the attack): {contradictions}")
    if arguments.output:
        with progress_bar() as bar:
            task = bar.add_task("radii and picture", total=3)
            _draw(net, x, y, arguments.output, lambda: bar.advance(task))
        console.print(f"Picture: {arguments.output}", highlight=False)
    return 3 if contradictions else 0


def _draw(net: autodual.BoundModule, x: Tensor, y: Tensor, path: Path, step: Callable[[], None]) -> None:
    from autodual.cli.picture import draw  # matplotlib is an extra

    try:
        draw(net, x, y, path, step=step)
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error


def _line(net: autodual.BoundModule, x: Tensor, y: Tensor, ball: Ball, eps: float) -> Line:
    region = ball.region(eps, domain=DOMAIN)
    interval, dual = (certify(net, x, y, region=region, method=method, batch=BATCH) for method in ("interval", "dual"))
    return Line(ball, eps, interval, dual, survives(net, x, y, region=region, steps=ATTACK_STEPS, batch=len(x)))


def _table(lines: list[Line], y: Tensor) -> Any:
    title = f"A digit classifier on {len(y)} test images, clean accuracy {_percent(lines[0].dual.predicted == y)}"
    table = require("rich.table", "cli").Table(title=title, box=require("rich.box", "cli").SIMPLE_HEAD)
    table.add_column("norm", justify="right")
    headers = ("radius", "certified\ninterval", "certified\ndual", "survive\nPGD", "interval\nms/image", "dual\nms/image")
    for header in headers:
        table.add_column(header, justify="right")
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        table.add_row(
            line.ball.name,
            f"{line.eps:g}",
            _percent(line.interval.certified),
            f"[bold]{_percent(line.dual.certified)}[/]",
            _percent(line.kept),
            f"{line.interval.milliseconds:.2f}",
            f"{line.dual.milliseconds:.2f}",
            end_section=following is not None and following.ball is not line.ball,
        )
    return table


def _percent(mask: Tensor) -> str:
    return f"{mask.double().mean().item():.1%}"
