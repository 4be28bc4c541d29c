"""What the benchmark scripts share: the published weights, the test images, a clock and a table. No bound is computed here."""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Published:
    """One trained classifier with the figures its authors printed.

    Attributes:
        weights: file name of the state dict.
        data: file name of the test images.
        epsilon: radius of the l_inf ball the robust error is stated for, pixels in 0..1.
        clean_error: published error on the test set, percent.
        robust_error: published bound on the robust error, percent.
        wrong: misclassified test images, measured with plain PyTorch.
        uncertified: test images without a certificate, for each domain given to the region.
    """

    weights: str
    data: str
    epsilon: float
    clean_error: float
    robust_error: float
    wrong: int
    uncertified: tuple[tuple[tuple[float, float] | None, int], ...]


PUBLISHED = {
    "mnist": Published("mnist.pt", "mnist_test.npz", 0.1, 1.80, 5.82, 180, ((None, 582),)),
    "fashion_mnist": Published("fashion_mnist.pt", "fashion_mnist_test.npz", 0.1, 21.73, 34.53, 2173, ((None, 3453),)),
    "mnist_small_0_3_stage0": Published(
        "mnist_small_0_3_stage0.pt", "mnist_test.npz", 0.3, 14.87, 43.10, 1477, ((None, 4379), ((0.0, 1.0), 4312))
    ),
}


def small(state: dict[str, Tensor]) -> nn.Sequential:
    """Build the "small" convolutional classifier around a state dict with keys 0, 2, 5 and 7."""
    channels, features = state["0.weight"].shape[1], state["5.weight"].shape[1]
    model = nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(features, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
    model.load_state_dict(state)
    return model.eval()


def load_model(folder: Path, entry: Published) -> nn.Sequential:
    """Read one published classifier."""
    return small(torch.load(folder / entry.weights, weights_only=True))


def load_images(folder: Path, entry: Published, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Read the first ``limit`` test images, pixels scaled to 0..1, as ``(batch, 1, height, width)``, and their labels."""
    with np.load(folder / entry.data) as archive:
        images, labels = archive["x"][:limit], archive["y"][:limit]
    return torch.from_numpy(images).float().div(255.0).unsqueeze(1), torch.from_numpy(labels).long()


def data_arguments(description: str) -> argparse.ArgumentParser:
    """Start a command line with the two folders every script on published weights needs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist_test.npz and its like")
    parser.add_argument("--models", type=Path, required=True, help="folder with mnist.pt and its like")
    return parser


def median_seconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Time a call: one run to warm up, then the median of ``repeats``."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_memory() -> float:
    """Largest resident set of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # macOS counts bytes, Linux KiB


def machine() -> str:
    """Describe in one line what the figures were measured on."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{versions}, {platform.machine()}, {torch.get_num_threads()} threads"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows under a header in columns of equal width."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
