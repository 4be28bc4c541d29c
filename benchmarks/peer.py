"""The zoo beside auto_LiRPA, in one run: the same models, boxes and points. Needs auto_LiRPA, from its repository.

A width is that of the bounds over the range that points and attacks reach, the median over outputs and boxes. A peer's
bounds that leave out a point that was reached are marked: they are wrong, however narrow. Its bounds are computed in
float32, for which it is made; a thousandth of the range is allowed for that. Ours are in float64.

    python benchmarks/peer.py [--model lstm] [--eps 0.05] [--points 2000] [--steps 20]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import sys
import warnings
from collections.abc import Iterator

import torch
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from torch import Tensor

import autodual
from autodual.errors import AutoDualError
from benchmarks.common import machine
from benchmarks.zoo import Effort, Trial
from tests.zoo.collection import ZOO, Entry

OURS = ("interval", "dual", "adaptive")
PEERS = ("IBP", "CROWN")


def compare(entry: Entry, eps: float, effort: Effort) -> dict[str, str]:
    """Bound one model by each of our methods and the peer's; a cell is a width or why there is none."""
    net = autodual.certify(entry.model())
    trial, cells = Trial(entry, net, eps, effort), {}
    with torch.no_grad():
        values = torch.cat([trial.sampled(), trial.attacked()])
        for method in OURS:
            bounds = net.bounds(entry.form(trial.x), trial.region, method=method)
            cells[method] = _cell(bounds.lower, bounds.upper, values, effort.boxes, 1e-9)
    for method in PEERS:
        try:
            with _quiet():
                lower, upper = _peer(entry, trial, method)
            cells[f"peer's {method}"] = _cell(lower, upper, values, effort.boxes, 1e-3)
        except Exception as error:  # whatever stops it
            cells[f"peer's {method}"] = f"- {type(error).__name__}"
    return cells


def _peer(entry: Entry, trial: Trial, method: str) -> tuple[Tensor, Tensor]:
    from auto_LiRPA import BoundedModule, BoundedTensor
    from auto_LiRPA.perturbations import PerturbationLpNorm

    example = {name: value.float() if value.is_floating_point() else value for name, value in trial.x.items()}
    inputs = []
    for name, value in example.items():
        if name in trial.radii:
            radius = trial.radii[name].float()
            ball = PerturbationLpNorm(norm=float("inf"), x_L=value - radius, x_U=value + radius)
            value = BoundedTensor(value, ball)
        inputs.append(value)
    model = BoundedModule(entry.model().float(), tuple(example.values()))
    lower, upper = model.compute_bounds(x=tuple(inputs), method=method)
    return lower.reshape(trial.batch, -1).double(), upper.reshape(trial.batch, -1).double()


def _cell(lower: Tensor, upper: Tensor, values: Tensor, boxes: int, tolerance: float) -> str:
    lowest, highest = values.amin(0), values.amax(0)
    reach = highest - lowest
    slack = tolerance * (reach + values.abs().amax(0))
    outside = ((lowest < lower - slack) | (highest > upper + slack)).any()
    moving = (reach > 1e-9 * values.abs().amax(0).clamp(min=1.0))[:boxes]
    ratios = ((upper - lower) / reach)[:boxes][moving].tolist()
    return f"{statistics.median(ratios) if ratios else 1.0:.3g}" + (" unsound" if outside else "")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def main() -> int:
    """Print one row per model and what the comparable rows say together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="*", metavar="NAME", help="only models whose names contain one of these")
    parser.add_argument("--eps", type=float, default=0.05)
    parser.add_argument("--points", type=int, default=2_000)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    try:
        import auto_LiRPA  # noqa: F401
    except ImportError as error:
        print(f"auto_LiRPA is not installed ({error}); get it from its repository and put it on PYTHONPATH")
        return 2
    chosen = [entry for name, entry in ZOO.items() if not options.model or any(part in name for part in options.model)]
    columns = [*OURS, *(f"peer's {method}" for method in PEERS)]
    table = Table("model", *columns, box=box.SIMPLE, title=f"width over the reached range, eps {options.eps:g}")
    rows = []
    with Live(table, console=Console(width=None if sys.stdout.isatty() else 130), refresh_per_second=1):
        for entry in chosen:
            try:
                cells = compare(entry, options.eps, Effort(points=options.points, steps=options.steps))
            except AutoDualError as error:
                cells = {"interval": f"refused: {error}"[:40]}
            rows.append(cells)
            table.add_row(entry.name, *(cells.get(column, "") for column in columns))
    _summarise(rows)
    print(machine())
    return 0


def _summarise(rows: list[dict[str, str]]) -> None:
    for ours, theirs in (("interval", "peer's IBP"), ("dual", "peer's CROWN"), ("adaptive", "peer's CROWN")):
        pairs = [(row[ours], row.get(theirs, "-")) for row in rows if not row[ours].startswith("refused")]
        sound = [(float(a), float(b)) for a, b in pairs if not b.startswith("-") and "unsound" not in b]
        ratio = statistics.median(a / b for a, b in sound) if sound else float("nan")
        wrong, missing = sum("unsound" in b for _, b in pairs), sum(b.startswith("-") for _, b in pairs)
        print(
            f"{ours} over {theirs}: median ratio {ratio:.3f} on {len(sound)} models; wider on "
            f"{sum(a > 1.001 * b for a, b in sound)}; the peer fails on {missing}, leaves out reached points on {wrong}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
