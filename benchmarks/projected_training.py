"""Robust training on random projections beside training on the exact bound: same start, same images, same number of steps.

    python benchmarks/projected_training.py --data DIR [--epochs 5] [--images 10000]

The network is the text's Wide(1) (section 3.5.3: two convolutions of 4 and 8 filters, 128 hidden units). Each method trains
in a process of its own, so that its peak memory is its own; all are judged by the exact dual bound on the whole test set.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import autodual
from autodual.methods import Method
from benchmarks.common import machine, peak_memory, table

METHODS: dict[str, Method] = {"exact": autodual.Dual(), "r=50": autodual.Projected(r=50), "r=10": autodual.Projected(r=10)}
EPSILON, FIRST_EPSILON = 0.1, 0.01
RAMP = 0.6
"""Share of the training over which the radius grows."""
BATCH = 50


def wide(k: int = 1) -> nn.Sequential:
    """Build the text's Wide(k)."""
    return nn.Sequential(
        nn.Conv2d(1, 4 * k, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4 * k, 8 * k, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * k * 49, 128 * k),
        nn.ReLU(),
        nn.Linear(128 * k, 10),
    )


def images(path: Path, limit: int | None) -> tuple[Tensor, Tensor]:
    """Read images, pixels scaled to 0..1, and labels."""
    with np.load(path) as archive:
        x, y = archive["x"][:limit], archive["y"][:limit]
    return torch.from_numpy(x).float().div(255.0).unsqueeze(1), torch.from_numpy(y).long()


def train(method: Method, x: Tensor, y: Tensor, epochs: int) -> tuple[nn.Module, float]:
    """Train with Adam on the robust loss while the radius grows; return the model and the seconds it took."""
    torch.manual_seed(0)
    model = wide()
    network, optimizer = autodual.certify(model), torch.optim.Adam(model.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(0)
    steps, step, start = epochs * (len(x) // BATCH), 0, time.perf_counter()
    for epoch in range(epochs):
        for part in torch.randperm(len(x), generator=order).split(BATCH):
            if len(part) < BATCH:
                continue
            epsilon = FIRST_EPSILON + (EPSILON - FIRST_EPSILON) * min(1.0, step / (RAMP * steps))
            loss = network.robust_loss(x[part], y[part], autodual.LInf(epsilon), method)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        print(f"  epoch {epoch + 1}: loss {loss.item():.3f}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return model.eval(), time.perf_counter() - start


def judge(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return clean error and robust error by the exact dual bound, in percent."""
    network, wrong, open_ = autodual.certify(model), 0, 0
    for i in range(0, len(x), 100):
        report = network.verify(x[i : i + 100], y[i : i + 100], autodual.LInf(EPSILON))
        wrong += int((report.predicted != report.y).sum())
        open_ += int((~report.certified).sum())
    return 100 * wrong / len(x), 100 * open_ / len(x)


def one(name: str, arguments: argparse.Namespace) -> None:
    """Train by one method and print what came out as JSON."""
    x, y = images(arguments.data / "mnist_train.npz", arguments.images)
    model, seconds = train(METHODS[name], x, y, arguments.epochs)
    peak = peak_memory()
    clean, robust = judge(model, *images(arguments.data / "mnist_test.npz", arguments.test))
    print(json.dumps({"name": name, "seconds": seconds, "peak": peak, "clean": clean, "robust": robust}))


def main() -> None:
    """Train by every method and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist_train.npz and mnist_test.npz")
    parser.add_argument("--images", type=int, default=10000, help="training images")
    parser.add_argument("--test", type=int, default=None, help="test images, all by default")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        one(arguments.only, arguments)
        return
    print(f"Wide(1), MNIST, {arguments.images} images, {arguments.epochs} epochs, eps to {EPSILON}, seed 0; {machine()}")
    results = []
    for name in METHODS:
        found = subprocess.run([sys.executable, *sys.argv, "--only", name], check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(found.stdout.splitlines()[-1]))
    exact = results[0]
    rows = [
        [
            each["name"],
            f"{each['clean']:.2f} %",
            f"{each['robust']:.2f} %",
            f"{each['robust'] - exact['robust']:+.2f}",
            f"{each['seconds']:.0f}",
            f"{each['seconds'] / exact['seconds']:.3f}",
            f"{each['peak']:.2f}",
            f"{each['peak'] / exact['peak']:.2f}",
        ]
        for each in results
    ]
    header = ["bound", "clean error", "robust error", "to exact", "seconds", "share", "peak GiB", "share"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
