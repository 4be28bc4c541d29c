"""Random projections measured: what they cost, how good the estimates are, and whether their certificates hold.

    python benchmarks/projections.py all --data DIR --models DIR [--output out] [--quick]
    python benchmarks/projections.py cost           # time and memory against hidden units, as the text's Figure 3.20
    python benchmarks/projections.py depth          # time against depth
    python benchmarks/projections.py histograms     # relative errors of the median, as Figure 3.19; needs --data, --models
    python benchmarks/projections.py streams        # one stream, or one per layer as in Algorithm 3
    python benchmarks/projections.py heavy          # what the heaviest columns hold of a radius; needs --data, --models
    python benchmarks/projections.py quality        # estimates on a trained network, l_inf; needs --data, --models
    python benchmarks/projections.py l2             # the same, l_2; needs --data, --models
    python benchmarks/projections.py certificates   # a test set at a stated probability; needs --data, --models
    python benchmarks/projections.py coverage       # how often a probabilistic bound fails

Every table says what it was measured on and is followed by what its columns mean. All random numbers are seeded; run it with
OMP_NUM_THREADS=1 on an idle machine for times that mean something. ``--quick`` takes a tenth of the draws and images.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.projections_cost import cost, depth
from benchmarks.projections_proofs import certificates, coverage
from benchmarks.projections_quality import heavy, histograms, l2, quality, streams

COMMANDS: dict[str, Callable[[argparse.Namespace], bool | None]] = {
    "cost": cost,
    "depth": depth,
    "histograms": histograms,
    "streams": streams,
    "heavy": heavy,
    "quality": quality,
    "l2": l2,
    "certificates": certificates,
    "coverage": coverage,
}
ON_IMAGES = {"histograms", "heavy", "quality", "l2", "certificates", "all"}


@torch.no_grad()
def main() -> int:
    """Run one benchmark or all; the exit status tells whether a bound failed more often than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=[*COMMANDS, "all"])
    parser.add_argument("--data", type=Path, help="folder with mnist_test.npz")
    parser.add_argument("--models", type=Path, help="folder with mnist.pt and its like")
    parser.add_argument("--output", type=Path, default=Path("out"), help="folder for pictures")
    parser.add_argument("--limit", type=int, help="certificates: only the first images")
    parser.add_argument("--quick", action="store_true", help="a tenth of the draws and images, and the smaller networks")
    parser.add_argument("--batch", type=int, default=1, help="cost: examples at a time")
    parser.add_argument("--family", help="cost: only this one, such as stack")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.command in ON_IMAGES and not (arguments.data and arguments.models):
        parser.error(f"{arguments.command} needs --data and --models")
    chosen = list(COMMANDS) if arguments.command == "all" else [arguments.command]
    failed = [COMMANDS[name](arguments) is False for name in chosen]
    return int(any(failed))


if __name__ == "__main__":
    raise SystemExit(main())
