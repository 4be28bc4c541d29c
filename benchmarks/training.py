"""Robust training measured: what a step costs, and what every loss makes of the same short time.

    python benchmarks/training.py cost [--batch 50] [--repeats 7]
    python benchmarks/training.py losses --data DIR [--minutes 5] [--eps 0.1 0.3] [--only interval sabr]

``cost`` times a training step of the thesis' small architecture beside a plain one in the same run, and steps of peers that
can be imported (auto_LiRPA, convex_adversarial). Its last column counts the multiplications of convolutions and matrix
products in plain steps: below that no step comes whose arithmetic runs as fast as a plain one's.
``losses`` trains that architecture on MNIST by each loss for equally long, certifies the whole test set, and draws clean
against certified error; rows in the output folder's ``losses.csv`` are not done again.
Everything is seeded; times mean something on an idle machine only.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset
from torch.utils.flop_counter import flop_registry

import autodual
from autodual.losses import (
    CCIBPLoss,
    CROWNIBPLoss,
    FGSMLoss,
    IntervalLoss,
    Loss,
    MTLIBPLoss,
    PGDLoss,
    RobustLoss,
    SABRLoss,
    TRADESLoss,
)
from autodual.training import Config, train
from autodual.training.judgement import judge
from autodual.training.memory import keep_freed_memory
from benchmarks.common import Published, load_images, machine, table
from benchmarks.networks import small

DOMAIN = (0.0, 1.0)
TRAIN, TEST = (Published("", f"mnist_{part}.npz", 0.1, 0, 0, 0, ()) for part in ("train", "test"))
DUAL_IBP, ADAPTIVE_IBP = (kind(intermediate="interval") for kind in (autodual.Dual, autodual.Adaptive))

STEPS: dict[str, Callable[[autodual.BoundModule], Loss]] = {
    "interval": IntervalLoss,
    "CROWN-IBP, parallel": lambda net: CROWNIBPLoss(net, DUAL_IBP),
    "CROWN-IBP, adaptive": lambda net: CROWNIBPLoss(net, ADAPTIVE_IBP),
    "CROWN-IBP, parallel, 3 rivals": lambda net: CROWNIBPLoss(net, DUAL_IBP, rivals=3),
    "CROWN-IBP, adaptive, 3 rivals": lambda net: CROWNIBPLoss(net, ADAPTIVE_IBP, rivals=3),
    "CROWN-IBP, parallel, 1 rival": lambda net: CROWNIBPLoss(net, DUAL_IBP, rivals=1),
    "CROWN-IBP, parallel, fused": lambda net: CROWNIBPLoss(net, DUAL_IBP, objective="fused"),
    "CROWN-IBP, adaptive, fused": lambda net: CROWNIBPLoss(net, ADAPTIVE_IBP, objective="fused"),
    "Projected(r=10)": lambda net: RobustLoss(net, autodual.Projected(r=10)),
    "Projected(r=10), 3 rivals": lambda net: RobustLoss(net, autodual.Projected(r=10), rivals=3),
    "Projected(r=10), fused": lambda net: RobustLoss(net, autodual.Projected(r=10), objective="fused"),
    "Projected(r=10), last estimated": lambda net: RobustLoss(net, autodual.Projected(r=10, last_exact=False)),
    "Projected(r=50)": lambda net: RobustLoss(net, autodual.Projected(r=50)),
    "dual, exact": RobustLoss,
    "SABR, 3 steps": lambda net: SABRLoss(net, steps=3),
    "MTL-IBP, 3 steps": lambda net: MTLIBPLoss(net, steps=3),
    "CC-IBP, 3 steps": lambda net: CCIBPLoss(net, steps=3),
    "FGSM": FGSMLoss,
    "PGD, 8 steps": PGDLoss,
    "TRADES, 8 steps": TRADESLoss,
}


def cost(arguments: argparse.Namespace) -> None:
    """Time one step (loss, gradients, Adam) of every loss in turns with a plain one, so that a slow spell hits both."""
    keep_freed_memory()
    torch.manual_seed(0)
    x, y = torch.rand(arguments.batch, 1, 28, 28), torch.randint(10, (arguments.batch,))
    region = autodual.LInf(0.1, domain=DOMAIN) if arguments.domain else autodual.LInf(0.1)
    model = small()
    net, optimizer = autodual.certify(model), torch.optim.Adam(model.parameters(), 1e-4)

    def step(loss: Callable[[], Tensor]) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        return time.perf_counter() - wall, time.process_time() - cpu

    def plain() -> Tensor:
        return F.cross_entropy(model(x), y)

    def multiplications(loss: Callable[[], Tensor]) -> int:
        with Multiplications() as counted:
            step(loss)
        return counted.total

    rows = []
    step(plain)
    least = multiplications(plain)
    losses = {name: _call(make(net), x, y, region) for name, make in STEPS.items()} | _peers(model, x, y)
    for name, loss in losses.items():
        if arguments.only and name not in arguments.only:
            continue
        step(loss)
        count = multiplications(loss) / least
        own, reference = [], []
        for _ in range(arguments.repeats):
            own.append(step(loss))
            reference += [step(plain) for _ in range(3)]
        walls = [wall for wall, _ in own]
        shares = [_ratio(own, reference, clock, pick) for clock in (0, 1) for pick in (min, statistics.median)]
        rows.append(
            [name, f"{1e3 * min(walls):.1f}", f"{1e3 * statistics.median(walls):.1f}", *map("{:.2f}".format, [*shares, count])]
        )
    print(f"One training step, batch {arguments.batch}, {region!r}, small architecture; {machine()}")
    print(
        table(["loss", "ms min", "ms median", "x plain min", "x plain median", "CPU min", "CPU median", "x plain mults"], rows)
    )


class Multiplications(TorchDispatchMode):
    """Counts what convolutions and matrix products multiply, as torch's own counter does, which hooks every module besides."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and add up."""
        result = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        self.total += count(*args, **(kwargs or {}), out_val=result) // 2 if count else 0
        return result


def _call(loss: Loss, x: Tensor, y: Tensor, region: autodual.Region) -> Callable[[], Tensor]:
    return lambda: loss(x, y, region)


def _ratio(
    own: list[tuple[float, float]], reference: list[tuple[float, float]], clock: int, pick: Callable[..., float]
) -> float:
    return pick([each[clock] for each in own]) / pick([each[clock] for each in reference])


def _peers(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Return the losses of peers that are installed, over the same parameters."""
    return _auto_lirpa(model, x, y) | _convex_adversarial(model, x, y)


def _convex_adversarial(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    try:
        from convex_adversarial import robust_loss
    except ImportError:
        return {}

    class Flatten(nn.Module):  # the peer has rules for classes of this name that have no other arguments
        def forward(self, z: Tensor) -> Tensor:
            return z.flatten(1)

    layers = nn.Sequential(*(Flatten() if isinstance(layer, nn.Flatten) else layer for layer in model))
    projected = {f"convex_adversarial, {r} projections": {"proj": r, "norm_type": "l1_median"} for r in (10, 50)}
    return {
        name: lambda options=options: robust_loss(layers, 0.1, x, y, **options)[0]
        for name, options in {**projected, "convex_adversarial exact": {}}.items()
    }


def _auto_lirpa(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor]]:
    try:
        from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm
    except ImportError:
        return {}
    bounded = BoundedModule(model, torch.empty_like(x))
    rivals = torch.eye(10)[y][:, None, :] - torch.eye(10)[None]
    rivals = rivals[torch.arange(10)[None] != y[:, None]].view(len(x), 9, 10)
    ball = PerturbationLpNorm(norm=torch.inf, eps=0.1)

    def loss(method: str) -> Callable[[], Tensor]:
        def value() -> Tensor:
            lower, _ = bounded.compute_bounds(x=(BoundedTensor(x, ball),), method=method, C=rivals, bound_upper=False)
            return F.cross_entropy(torch.cat([torch.zeros(len(x), 1), -lower], 1), torch.zeros(len(x), dtype=torch.long))

        return value

    return {f"auto_LiRPA {method}": loss(method) for method in ("IBP", "CROWN-IBP")}


BY_TIME: dict[str, dict[str, Any]] = {
    "interval": {"kappa": (1.0, 0.0)},
    "cc-ibp": {"alpha": 0.5, "options": {"steps": 1}},
    "mtl-ibp": {"alpha": 0.3, "options": {"steps": 1}},
    "sabr": {"shrink": 0.6, "options": {"steps": 1}},
    "crown-ibp": {
        "method": {"name": "dual", "intermediate": "interval"},
        "options": {"rivals": 3},
        "beta": (1.0, 0.0),
        "kappa": (1.0, 0.0),
    },
    "robust": {"method": {"name": "projected", "r": 10}, "options": {"rivals": 3}},
    "envelope": {},
    "pgd": {},
    "trades": {},
    "fgsm": {},
    "clean": {},
}
"""Losses by name and their numbers: one that moves while the radius grows as a pair."""


def losses(arguments: argparse.Namespace) -> None:
    """Train by each loss for equally long and certify the whole test set."""
    keep_freed_memory()
    data, test = _mnist(arguments.data, TRAIN, arguments.images), _mnist(arguments.data, TEST, arguments.test)
    methods = ("interval", "adaptive")
    print(
        f"small architecture, {len(data)} MNIST images, {arguments.minutes:g} minutes of one core each, seed 0, domain 0..1;",
        machine(),
        flush=True,
    )
    print(f"certified by any of {', '.join(methods)}; attacked by PGD, 20 steps; {len(test)} test images", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "losses.csv"
    rows = list(csv.reader(path.open())) if path.exists() else []  # of a run that was stopped
    for eps in arguments.eps:
        for name in arguments.only or BY_TIME:
            if any(row[:2] == [f"{eps:g}", name] for row in rows):
                continue
            config = _timed(name, eps, data, arguments.minutes)
            torch.manual_seed(0)
            model = small()
            result = train(model, data, config, clock=time.process_time)
            found = judge(autodual.certify(model), test, config.region(eps), methods, index=torch.arange(len(test)), attack=20)
            totals = found.totals()
            errors = [f"{100 * (1 - totals[key]):.2f}" for key in ("clean", "attacked", "certified")]
            epochs = result.rows[-1]["epoch"]
            rows.append([f"{eps:g}", name, f"{epochs:.1f}", *errors, str(found.contradictions)])
            with path.open("a", newline="") as file:
                csv.writer(file).writerow(rows[-1])
            print("  ".join(rows[-1]), flush=True)
    print(table(["eps", "loss", "epochs", "clean error, %", "PGD error, %", "robust error, %", "contradictions"], rows))
    _draw([(float(row[0]), row[1], float(row[3]), float(row[5])) for row in rows], arguments.output / "losses.png")


def _mnist(folder: Path, part: Published, limit: int | None) -> TensorDataset:
    return TensorDataset(*load_images(folder, part, limit))


def _timed(name: str, eps: float, data: TensorDataset, minutes: float) -> Config:
    """Make the configuration whose schedules fill the time: epochs follow from a few steps that are timed first."""
    numbers = dict(BY_TIME[name])
    loss = {"name": name} | {key: numbers.pop(key) for key in ("method", "options") if key in numbers}
    epochs = 1.0
    for measured in (True, False):
        ramp = {"begin": 0.05 * epochs, "length": 0.45 * epochs}
        moved = {
            key: {"kind": "linear", "start": value[0], "end": value[1], **ramp}
            for key, value in numbers.items()
            if isinstance(value, tuple)
        }
        fixed = {key: value for key, value in numbers.items() if not isinstance(value, tuple)}
        if "regularize" in autodual.losses.LOSSES[name].numbers:
            moved["regularize"] = {"kind": "linear", "start": 0.5, "end": 0.0, **ramp}
        if name == "clean":
            radius: Any = eps
        else:
            radius = {"kind": "smooth", "start": 0.0, "end": eps, **ramp}
        settings = {
            "epochs": max(1, round(epochs)),
            "batch": 100,
            "domain": DOMAIN,
            "threads": torch.get_num_threads(),
            "initialization": "default" if name in ("clean", "fgsm", "pgd", "trades", "robust") else "interval",
            "loss": loss | {"numbers": fixed},
            "schedules": {
                "eps": radius,
                "lr": {"kind": "steps", "start": 1e-3, "factor": 0.2, "at": [0.7 * epochs, 0.88 * epochs]},
            }
            | moved,
            "optimizer": {"clip": 10.0},
            "evaluation": {"eps": eps, "methods": ["interval"], "attack": 0, "train": 0, "every": 10**6, "limit": 1},
        }
        if measured:
            images, spent = (500, 500, 3500), []
            for count in images:  # the difference leaves out what each run does once; the first does what is done once for all
                start = time.process_time()
                train(small(), TensorDataset(*(part[:count] for part in data.tensors)), Config.build(settings))
                spent.append(time.process_time() - start)
            epoch = (spent[2] - spent[1]) * len(data) / (images[2] - images[1])
            epochs = max(1.0, float(int(60 * minutes / epoch)))
    return Config.build(settings | {"minutes": minutes})


def _draw(points: list[tuple[float, str, float, float]], path: Path) -> None:
    """Draw robust error over clean error, one panel for each radius."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    radii = list(dict.fromkeys(eps for eps, *_ in points))
    figure = Figure(figsize=(6.5 * len(radii), 5.5), layout="constrained")
    for axes, eps in zip(figure.subplots(1, len(radii), squeeze=False)[0], radii, strict=True):
        own = [point for point in points if point[0] == eps]
        best = [p for p in own if not any(q[2] <= p[2] and q[3] <= p[3] and q is not p for q in own)]
        best.sort(key=lambda point: point[2])
        axes.step([p[2] for p in best], [p[3] for p in best], where="post", color="#1b7f6b", lw=1.2)
        for _, name, clean, robust in own:
            axes.scatter(clean, robust, color="#1b7f6b" if any(p[1] == name for p in best) else "#8a8f98")
        for together in _close(own):
            rightmost = max(together, key=lambda point: point[2])
            names = ", ".join(point[1] for point in together)
            axes.annotate(names, rightmost[2:], xytext=(5, 4), textcoords="offset points", fontsize=9)
        axes.set(
            title=f"l_inf radius {eps:g}",
            xlabel="clean error, %",
            ylabel="robust error (certified), %",
            xscale="log",
            yscale="log",
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
        axes.margins(0.12, 0.05)
        axes.grid(color="#e6e8ec", lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"picture: {path}")


def _close(points: list[tuple[float, str, float, float]]) -> list[list[tuple[float, str, float, float]]]:
    """Gather points so close to each other, by ratio, that their names would overlap."""
    groups: list[list[tuple[float, str, float, float]]] = []
    for point in sorted(points, key=lambda point: point[2:]):
        for group in groups:
            if all(abs(math.log(a / b)) < 0.15 for a, b in zip(group[-1][2:], point[2:], strict=True)):
                group.append(point)
                break
        else:
            groups.append([point])
    return groups


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("cost", "losses"))
    parser.add_argument("--data", type=Path, help="folder with mnist_train.npz and mnist_test.npz")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for pictures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--domain", action="store_true", help="cost: cut the ball by 0..1, as training does")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--images", type=int, help="training images")
    parser.add_argument("--test", type=int, help="test images")
    parser.add_argument("--eps", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--only", nargs="+", help="names of losses")
    arguments = parser.parse_args()
    if arguments.part != "cost" and arguments.data is None:
        parser.error(f"{arguments.part} needs --data")
    with _threads(arguments.threads):
        {"cost": cost, "losses": losses}[arguments.part](arguments)


if __name__ == "__main__":
    main()
