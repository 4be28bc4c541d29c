"""What interval bounds cost beside a forward pass, in time and memory, on image models written as torchvision writes them.

Time: medians of several calls in one process. Memory: the most bytes that PyTorch's allocator had handed out at once during
the call, above what was there before it, from the events of ``torch.profiler`` (temporaries inside kernels included; what
Python itself takes is not). The model and its bounds are compiled before anything is measured.

    python benchmarks/interval.py [--model ResNet] [--batch 8] [--eps 0.0001]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import autodual
from benchmarks.common import machine, median_seconds, table
from examples.torchvision_style import MODELS, image_model


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the most bytes allocated at once during a call, above what was allocated before."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@torch.no_grad()
def measure(name: str, model: nn.Module, batch: int, eps: float) -> list[str]:
    """Return one row of the table."""
    x = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    region, start = autodual.LInf(eps, domain=(0.0, 1.0)), time.perf_counter()
    net = autodual.certify(model)
    bounds = net.bounds(x, region, method="interval")
    compiled = time.perf_counter() - start
    forward, bound = (lambda: model(x)), (lambda: net.bounds(x, region, method="interval"))
    seconds = median_seconds(forward), median_seconds(bound)
    memory = peak_bytes(forward), peak_bytes(bound)
    finite = bool((bounds.lower.isfinite() & bounds.upper.isfinite()).all())
    return [
        name,
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}",
        f"{compiled:.1f}",
        f"{1e3 * seconds[0]:.1f}",
        f"{1e3 * seconds[1]:.1f}",
        f"{seconds[1] / seconds[0]:.1f}",
        f"{memory[0] / 2**20:.1f}",
        f"{memory[1] / 2**20:.1f}",
        f"{memory[1] / memory[0]:.1f}",
        f"{bounds.width.median():.2g}",
        "yes" if finite else "no",
    ]


def main() -> int:
    """Print one line per model; the exit status tells whether some bound was not finite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="only models whose names contain this")
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--eps", type=float, default=1e-4, help="l_inf radius, pixels in 0..1")
    options = parser.parse_args()
    rows = [
        measure(name, image_model(build), options.batch, options.eps)
        for name, build in MODELS.items()
        if options.model is None or options.model in name
    ]
    header = ["model", "M params", "compile s", "forward ms", "bounds ms", "x time", "forward MiB", "bounds MiB", "x memory"]
    print(table([*header, "width", "finite"], rows))
    print(f"batch {options.batch}, eps {options.eps:g}, float32, random weights, {machine()}")
    return int(any(row[-1] != "yes" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
