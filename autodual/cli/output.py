"""What ``certify`` found: as a table, as JSON, as CSV."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from autodual.cli.common import CommandError, require
from autodual.cli.evaluation import Certification

SETTINGS = ("model", "weights", "data", "norm", "domain", "method", "dtype", "device", "limit", "attack")
STDOUT = Path("-")


@dataclass(frozen=True)
class Outcome:
    """The outcome at one radius.

    Attributes:
        eps: the radius.
        y: labels.
        result: what was proved.
        kept: which examples survived the attack; None if there was none.
    """

    eps: float
    y: Tensor
    result: Certification
    kept: Tensor | None

    @property
    def clean(self) -> float:
        """Share of the examples that get their label."""
        return _share(self.result.predicted == self.y)

    @property
    def certified(self) -> float:
        """Share of the examples that provably keep their label in the whole region."""
        return _share(self.result.certified)

    @property
    def attacked(self) -> float | None:
        """Share of the examples that the attack did not break."""
        return None if self.kept is None else _share(self.kept)

    @property
    def contradictions(self) -> int | None:
        """Number of certified examples that the attack broke: not zero only if a bound is wrong."""
        return None if self.kept is None else int((self.result.certified & ~self.kept).sum())

    def totals(self) -> dict[str, Any]:
        """Return the numbers of the table, by name."""
        names = ("eps", "clean", "certified", "attacked", "contradictions")
        timing = {"guarantee": self.result.guarantee, "milliseconds_per_example": self.result.milliseconds}
        sampling = self.result.sampling
        drawn = {} if sampling is None else {"sampling": dataclasses.asdict(sampling)}
        return {name: getattr(self, name) for name in names} | timing | drawn

    def examples(self) -> list[dict[str, Any]]:
        """Return one record per example."""
        falsified = self.result.predicted != self.y
        if self.kept is not None:
            falsified = falsified | ~self.kept
        verdicts = torch.where(self.result.certified, 0, torch.where(falsified, 1, 2)).tolist()
        columns = zip(self.y.tolist(), self.result.predicted.tolist(), verdicts, self.result.margin.tolist(), strict=True)
        return [
            {
                "index": index,
                "eps": self.eps,
                "label": label,
                "predicted": predicted,
                "verdict": ("certified", "falsified", "unknown")[verdict],
                "margin": margin,
            }
            for index, (label, predicted, verdict, margin) in enumerate(columns)
        ]


def table(outcomes: Sequence[Outcome], arguments: argparse.Namespace) -> Any:
    """Lay the totals out as a rich table, one line per radius."""
    title = f"{Path(arguments.model).name} on {arguments.data.name}\n{len(outcomes[0].y)} examples"
    result = require("rich.table", "cli").Table(title=title)
    attack = ("accuracy\nattacked", "contra-\ndictions") if arguments.attack else ()
    headers = (
        f"eps\n{arguments.norm}",
        "accuracy\nclean",
        f"certified\n{arguments.method}",
        *attack,
        "guarantee",
        "ms per\nexample",
    )
    for header in headers:
        result.add_column(header, justify="right")
    for outcome in outcomes:
        attacked = (f"{outcome.attacked:.1%}", str(outcome.contradictions)) if arguments.attack else ()
        timing = (outcome.result.guarantee, f"{outcome.result.milliseconds:.2f}")
        result.add_row(f"{outcome.eps:g}", f"{outcome.clean:.1%}", f"[bold]{outcome.certified:.1%}[/]", *attacked, *timing)
    return result


def check_writable(arguments: argparse.Namespace) -> None:
    """See before the work that ``--json`` and ``--csv`` can be written after it.

    Raises:
        CommandError: a folder is missing, a file cannot be written, or both would go to stdout.
    """
    if arguments.json == arguments.csv == STDOUT:
        raise CommandError("--json - and --csv - cannot both go to stdout; name a file for one of them")
    for flag, path in (("--json", arguments.json), ("--csv", arguments.csv)):
        if path is None or path == STDOUT:
            continue
        if path.is_dir():
            raise CommandError(f"{flag}: cannot write {path}: it is a folder")
        if not path.parent.is_dir():
            raise CommandError(f"{flag}: cannot write {path}: there is no folder {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise CommandError(f"{flag}: cannot write {path}: no permission")


def write(outcomes: Sequence[Outcome], arguments: argparse.Namespace) -> None:
    """Write the files that ``--json`` and ``--csv`` ask for.

    Raises:
        CommandError: a file cannot be written.
    """
    examples = [example for outcome in outcomes for example in outcome.examples()]
    try:
        if arguments.json:
            settings = {key: getattr(arguments, key) for key in SETTINGS}
            settings |= {
                key.removeprefix("option_"): value for key, value in vars(arguments).items() if key.startswith("option_")
            }
            content = {"settings": settings, "totals": [outcome.totals() for outcome in outcomes], "examples": examples}
            with opened(arguments.json) as file:
                file.write(json.dumps(content, indent=1, default=str) + "\n")
        if arguments.csv:
            with opened(arguments.csv) as file:
                writer = csv.DictWriter(file, ("index", "eps", "label", "predicted", "verdict", "margin"))
                writer.writeheader()
                writer.writerows(examples)
    except OSError as error:
        raise CommandError(f"cannot write {error.filename}: {error.strerror}") from error


def opened(path: Path) -> AbstractContextManager[TextIO]:
    """Open a file to write, or stdout for ``-``."""
    return nullcontext(sys.stdout) if path == STDOUT else path.open("w", newline="")


def _share(mask: Tensor) -> float:
    return mask.double().mean().item() if len(mask) else float("nan")
