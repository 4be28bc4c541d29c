"""Robust training on random projections beside training on the exact bound: same start, same images, same number of steps.

    python benchmarks/projected_training.py --data DIR [--network wide] [--epochs 5] [--images 10000] [--seed 0]

The network is the text's Wide(1) (section 3.5.3: two convolutions of 4 and 8 filters, 128 hidden units) or its small one
(twice 16 and 32 filters, 100 hidden units), trained by ``autodual.training.train``. Each method has a process of its own, so
that its peak memory is its own; all are judged by the exact dual bound and by an attack on the whole test set.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import autodual
from autodual.training import Config, judge, train
from autodual.training.memory import keep_freed_memory
from benchmarks.common import Published, load_images, machine, peak_memory, table
from benchmarks.networks import small

METHODS: dict[str, dict[str, Any]] = {
    "exact": {"method": {"name": "dual"}},
    "r=50": {"method": {"name": "projected", "r": 50}},
    "r=10": {"method": {"name": "projected", "r": 10}},
    "r=10, fused": {"method": {"name": "projected", "r": 10}, "options": {"objective": "fused"}},
    "r=10, last estimated": {"method": {"name": "projected", "r": 10, "last_exact": False}},
}
SHOWN = ("exact", "r=50", "r=10")
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


NETWORKS: dict[str, Callable[[], nn.Module]] = {"wide": wide, "small": small}


def images(folder: Path, part: str, limit: int | None) -> TensorDataset:
    """Read images, pixels scaled to 0..1, and labels."""
    return TensorDataset(*load_images(folder, Published("", f"mnist_{part}.npz", EPSILON, 0, 0, 0, ()), limit))


def one(name: str, arguments: argparse.Namespace) -> None:
    """Train by one method and print what came out as JSON."""
    keep_freed_memory()
    ramp = {"kind": "linear", "start": FIRST_EPSILON, "end": EPSILON, "length": RAMP * arguments.epochs}
    settings = {
        "epochs": arguments.epochs,
        "batch": BATCH,
        "seed": arguments.seed,
        "threads": arguments.threads,
        "loss": {"name": "robust", **METHODS[name]},
        "schedules": {"eps": ramp, "lr": 1e-3},
        "evaluation": {"methods": ["interval"], "attack": 0, "train": 0, "every": 10**6, "limit": 1},
    }
    torch.manual_seed(arguments.seed)
    model = NETWORKS[arguments.network]()
    result = train(model, images(arguments.data, "train", arguments.images), Config.build(settings))
    peak, test = peak_memory(), images(arguments.data, "test", arguments.test)
    index = torch.arange(len(test))
    found = judge(autodual.certify(model), test, autodual.LInf(EPSILON), ("dual",), index=index, attack=20)
    errors = {key: 100 * (1 - share) for key, share in found.totals().items() if key in ("clean", "attacked", "certified")}
    print(json.dumps({"seconds": result.seconds, "peak": peak, "contradictions": found.contradictions} | errors))


def main() -> None:
    """Train by every method and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist_train.npz and mnist_test.npz")
    parser.add_argument("--network", choices=NETWORKS, default="wide")
    parser.add_argument("--images", type=int, default=10000, help="training images")
    parser.add_argument("--test", type=int, help="test images, all by default")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=SHOWN, help="bounds to train by")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        one(arguments.one, arguments)
        return
    print(
        f"{arguments.network}, {arguments.images} MNIST images, {arguments.epochs} epochs, eps to {EPSILON}, no domain, "
        f"seed {arguments.seed}; {machine()}",
        flush=True,
    )
    rows: list[list[str]] = []
    first: dict[str, float] = {}
    for name in arguments.only:
        command = [sys.executable, *sys.argv, "--one", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        first = first or found
        rows.append([
            name, *(f"{found[key]:.2f} %" for key in ("clean", "attacked", "certified")),
            f"{found['certified'] - first['certified']:+.2f}", str(found["contradictions"]),
            f"{found['seconds']:.0f}", f"{found['seconds'] / first['seconds']:.3f}",
            f"{found['peak']:.2f}", f"{found['peak'] / first['peak']:.2f}",
        ])  # fmt: skip
        print("  ".join(rows[-1]), flush=True)
    errors = ["clean error", "PGD error", "robust error (dual)", "to the first", "contradictions"]
    print(table(["bound in training", *errors, "seconds", "share", "peak GiB", "share"], rows))


if __name__ == "__main__":
    main()
