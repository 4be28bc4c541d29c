"""Speed and tightness of the methods, in tables: published weights, random networks, and peers where they are installed.

Each time is the median of ``--repeats`` calls, in a process of its own, whose peak of memory is that of the measured method;
multiples are of one plain forward pass of the same images in the same process. On a busy machine ``--clock cpu`` counts the
seconds that this process computes, on all its threads.

    python benchmarks/bounds.py speed     --data DIR --models DIR [--images 100] [--only mnist] [--method dual ...]
    python benchmarks/bounds.py numbers   --data DIR --models DIR      # layouts agree; adaptive and optimized are no worse
    python benchmarks/bounds.py rows      --data DIR --models DIR      # layouts of hidden rows against the cost model's choice
    python benchmarks/bounds.py tightness                              # the gap to the linear program that slopes close
    python benchmarks/bounds.py accuracy  --data DIR --models DIR      # certified share of 200 images of CIFAR-10
                                            [--open]                   # bounds only what is open: see ``still_open``

Peers are auto_LiRPA and convex_adversarial: put their repositories on PYTHONPATH, or their rows say that they are missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import autodual
from benchmarks.common import PUBLISHED, load_images, load_model, machine, peak_memory, small, table

NETWORKS = ("mnist", "cifar_cnn_a_mix", "resnet2b")
CIFAR = {
    "cifar_cnn_a_mix": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "resnet2b": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
}
OURS: dict[str, autodual.methods.Method] = {
    "dual": autodual.Dual(),
    "adaptive": autodual.Adaptive(),
    "optimized 0": autodual.Optimized(steps=0),
    "optimized 20": autodual.Optimized(steps=20),
    "optimized 20+0": autodual.Optimized(steps=20, hidden_steps=0),
    "optimized 20+12, 32 rows": autodual.Optimized(steps=20, hidden_steps=12, hidden_rows=32),
    "optimized 20+20": autodual.Optimized(steps=20, hidden_steps=20),
    "optimized 100": autodual.Optimized(steps=100),
}
PEERS = ("auto_LiRPA same-slope", "auto_LiRPA CROWN", "auto_LiRPA CROWN-Optimized 20", "convex_adversarial exact")


class ResNet2b(nn.Module):
    """The ResNet-2B of VNN-COMP 2021, under the names of its published weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.layer1 = nn.ModuleList([Block(8, 2), Block(16, 1)])
        self.linear1, self.linear2 = nn.Linear(1024, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify."""
        x = torch.relu(self.conv1(x))
        for block in self.layer1:
            x = block(x)
        return self.linear2(torch.relu(self.linear1(x.flatten(1))))


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, 16, 3, stride, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, 16, 1, stride)) if stride > 1 else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        """Add the two ways."""
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


@dataclass(frozen=True)
class Task:
    """One network, its images in 0..1, their labels, and a radius in that unit."""

    name: str
    plain: nn.Module
    images: Tensor
    labels: Tensor
    epsilon: float
    scale: tuple[tuple[float, ...], tuple[float, ...]] | None

    @property
    def model(self) -> nn.Module:
        """The network on images in 0..1."""
        return self.plain if self.scale is None else nn.Sequential(autodual.Normalize(*self.scale), self.plain).eval()


def load(name: str, data: Path, models: Path, images: int) -> Task:
    """Read a network and its first images."""
    if name == "mnist":
        entry = PUBLISHED[name]
        return Task(name, load_model(models, entry), *load_images(data, entry, images), entry.epsilon, None)
    state = torch.load(models / f"{name}.pt", weights_only=True)
    if name == "resnet2b":
        plain = ResNet2b().eval()
        plain.load_state_dict(state)
    else:
        plain = small(state)
    with np.load(data / "cifar10_sdp200.npz") as archive:
        x, y = archive["x"][:images], archive["y"][:images]
    return Task(
        name, plain, torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y).long(), 2 / 255, CIFAR[name]
    )


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(function: Callable[[], object], repeats: int, clock: str) -> list[float]:
    """Time some calls, after one to warm up."""
    function()
    times, now = [], CLOCKS[clock]
    for _ in range(repeats):
        start = now()
        function()
        times.append(now() - start)
    return times


def bounder(task: Task, method: str) -> Callable[[], Tensor]:
    """Return a call that bounds the margins of every image to the other classes, ``(images, 9)``."""
    if method in OURS:
        net, options = autodual.certify(task.model), OURS[method]
        others = ~nn.functional.one_hot(task.labels, 10).bool()
        region = autodual.LInf(task.epsilon)
        return lambda: net.margins(task.images, task.labels, region, method=options)[others].reshape(-1, 9)
    return _lirpa(task, method) if method.startswith("auto_LiRPA") else _convex_adversarial(task)


def in_batches(task: Task, method: str, size: int | None) -> Callable[[], Tensor]:
    """Return a call that bounds so many images at a time, all of them by default."""
    size = size or len(task.images)
    parts = zip(task.images.split(size), task.labels.split(size), strict=True)
    calls = [bounder(replace(task, images=images, labels=labels), method) for images, labels in parts]
    return lambda: torch.cat([call() for call in calls])


def still_open(task: Task, method: str, size: int | None) -> tuple[Task, int]:
    """Leave out images that an attack breaks, and those that a method's start certifies, which it is never worse than.

    Returns:
        The images that the method must still bound, and how many its start certifies.
    """
    start = "auto_LiRPA CROWN" if method.startswith("auto_LiRPA") else "adaptive"
    region = autodual.LInf(task.epsilon)
    with torch.no_grad():
        proved = (in_batches(task, start, size)() > 0).all(1)
    generator = torch.Generator().manual_seed(0)
    worst = autodual.attacks.pgd(task.model, task.images, task.labels, region, steps=100, restarts=3, generator=generator)
    with torch.no_grad():
        kept = (task.model(torch.cat([task.images, worst])).argmax(1).reshape(2, -1) == task.labels).all(0)
    left = kept & ~proved
    return replace(task, images=task.images[left], labels=task.labels[left]), int(proved.sum())


def _lirpa(task: Task, method: str) -> Callable[[], Tensor]:
    from auto_LiRPA import BoundedModule, BoundedTensor
    from auto_LiRPA.perturbations import PerturbationLpNorm

    mean, deviation = (torch.tensor(part).reshape(1, -1, 1, 1) for part in task.scale or ((0.0,), (1.0,)))
    x, radius = (task.images - mean) / deviation, task.epsilon / deviation
    kind = method.removeprefix("auto_LiRPA ")
    options = {"activation_bound_option": "same-slope"} if kind == "same-slope" else {}
    options |= {"optimize_bound_args": {"iteration": 20}} if kind.startswith("CROWN-Optimized") else {}
    bounded = BoundedModule(task.plain, torch.zeros_like(x), bound_opts=options, device="cpu")
    others = ~nn.functional.one_hot(task.labels, 10).bool()
    rows = (torch.eye(10)[task.labels][:, None] - torch.eye(10))[others].reshape(-1, 9, 10)
    ball = PerturbationLpNorm(norm=float("inf"), x_L=x - radius, x_U=x + radius)
    name = "CROWN-Optimized" if kind.startswith("CROWN-Optimized") else "CROWN"

    def call() -> Tensor:
        point = BoundedTensor(x, ball)
        return bounded.compute_bounds(x=(point,), C=rows, method=name, bound_upper=False)[0].detach()

    return call


def _convex_adversarial(task: Task) -> Callable[[], Tensor]:
    from convex_adversarial import DualNetwork

    mean, deviation = (torch.tensor(part).reshape(1, -1, 1, 1) for part in task.scale or ((0.0,), (1.0,)))
    if task.scale is not None or not isinstance(task.plain, nn.Sequential):
        raise ImportError("takes one radius for all channels, and no skips without rewriting the model")
    x = (task.images - mean) / deviation
    others = ~nn.functional.one_hot(task.labels, 10).bool()
    rows = torch.eye(10)[task.labels][:, None] - torch.eye(10)
    layers = nn.Sequential(*(_Flatten() if isinstance(layer, nn.Flatten) else layer for layer in task.plain))

    def call() -> Tensor:
        network = DualNetwork(layers, x, task.epsilon)
        return network(rows)[others].reshape(-1, 9)

    return call


class _Flatten(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def measure(options: argparse.Namespace) -> dict[str, float | str]:
    """Measure one method on one network: run in a process of its own."""
    (name,), (method,) = options.only, options.method
    task = load(name, options.data, options.models, options.images)
    grad = torch.enable_grad if "Optimized" in method else torch.no_grad
    total, settled = len(task.images), 0
    with grad():
        try:
            if options.open:
                task, settled = still_open(task, method, options.batch)
            call = in_batches(task, method, options.batch)
        except ImportError as error:
            return {"error": str(error)}
        with torch.no_grad():
            forward = statistics.median(seconds(lambda: task.model(task.images), 50, options.clock))
        before, now = peak_memory(), CLOCKS[options.clock]
        start = now()
        margins = call()
        first = now() - start
        times = seconds(call, options.repeats, options.clock) if options.repeats else [first]
    return {
        "ms": 1000 * statistics.median(times) / len(task.images),
        "least": 1000 * min(times) / len(task.images),
        "forward": 1000 * forward / len(task.images),
        "margin": margins.mean().item(),
        "certified": (settled + (margins > 0).all(1).sum().item()) / total,
        "images": len(task.images),
        "memory": 1024 * peak_memory(),
        "before": 1024 * before,
    }


def apart(options: argparse.Namespace, name: str, method: str, images: int, repeats: int) -> dict[str, float | str]:
    """Measure in a process of its own."""
    arguments = ["--data", options.data, "--models", options.models, "--images", images, "--repeats", repeats]
    arguments += ["--clock", options.clock, "--threads", options.threads]
    arguments += ["--batch", options.batch] if options.batch else []
    arguments += ["--open"] if options.open else []
    command = [sys.executable, __file__, "measure", "--only", name, "--method", method, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:60]}
    return json.loads(done.stdout.splitlines()[-1])


def speed(options: argparse.Namespace) -> None:
    """Print time, multiples of a forward pass, margins, certified share and memory of every method on every network."""
    for name in options.only:
        rows = []
        for method in options.method:
            slow = "ptimized" in method
            images = min(options.images, options.slow_images if "CROWN-Optimized" in method else options.images)
            found = apart(options, name, method, images, 1 if slow else options.repeats)
            if "error" in found:
                rows.append([method, str(images), str(found["error"]), *[""] * 6])
            else:
                share = f"{100 * found['certified']:.1f} %"
                cells = (f"{found['ms']:.2f}", f"{found['least']:.2f}", f"{found['ms'] / found['forward']:.0f}")
                rows.append(
                    [
                        method,
                        str(images),
                        *cells,
                        f"{found['margin']:.4f}",
                        share,
                        f"{found['memory']:.0f}",
                        f"{found['before']:.0f}",
                    ]
                )
            print(f"{name}: {' | '.join(rows[-1])}", file=sys.stderr, flush=True)
        header = ["method", "images", "ms", "least ms", "forwards", "mean margin", "certified", "peak MiB", "before MiB"]
        print(f"\n{name}\n{table(header, rows)}", flush=True)


def numbers(options: argparse.Namespace) -> None:
    """Print how far layouts of rows differ, and whether a better method is better in every row."""
    rows = []
    for name in options.only:
        task = load(name, options.data, options.models, min(options.images, 50))
        net, region = autodual.certify(task.model), autodual.LInf(task.epsilon)
        found = {}
        with torch.no_grad():
            for kind in (autodual.Dual, autodual.Adaptive):
                dense = net.margins(task.images, task.labels, region, method=kind(rows="dense"))
                for layout in ("windows", "whole", "auto"):
                    other = net.margins(task.images, task.labels, region, method=kind(rows=layout))
                    found[kind.__name__, layout] = ((other - dense).abs().max() / dense.abs().max()).item()
            others = ~nn.functional.one_hot(task.labels, 10).bool()
            ends = {
                m: net.margins(task.images, task.labels, region, method=OURS[m])[others]
                for m in ("dual", "adaptive", "optimized 20")
            }
        gain, step = ends["optimized 20"] - ends["adaptive"], ends["adaptive"] - ends["dual"]
        scale = ends["dual"].abs().max()
        rows.append([
            name, f"{max(found.values()):.1e}", f"{step.mean():.4f}", f"{100 * (step > 0).float().mean():.1f} %",
            f"{gain.mean():.4f}", f"{100 * (gain > 1e-6 * scale).float().mean():.1f} %", f"{gain.min():.1e}",
        ])  # fmt: skip
    header = ["network", "layouts", "adaptive - dual", "better", "optimized 20 - adaptive", "better", "least"]
    print(table(header, rows))


def examples_of_rows(options: argparse.Namespace) -> Iterator[tuple[str, nn.Module, Tensor, float]]:
    """Yield networks whose hidden rows differ in number and field: name, model, images and radius."""
    torch.manual_seed(0)
    if options.data and options.models:
        for name in NETWORKS:
            task = load(name, options.data, options.models, options.images)
            yield name, task.model, task.images, task.epsilon

    def head(*layers: nn.Module) -> nn.Sequential:
        return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10)).eval()

    def stack(depth: int, channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
        layers, before = [], 3
        for i in range(depth):
            layers += [nn.Conv2d(before, channels, kernel, stride if i < 2 else 1, kernel // 2), nn.ReLU()]
            before = channels
        return head(*layers)

    x = torch.rand(options.images, 3, 32, 32)
    yield "6 convolutions, 3x32x32", stack(6, 8, 3, 2), x, 2 / 255
    yield "3 convolutions, stride 1", stack(3, 4, 3), x[:, :, :16, :16], 1 / 255
    yield "2 wide kernels", stack(2, 8, 7, 2), x[:, :, :16, :16], 2 / 255
    pooled = [
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
    ]
    yield "average pooling", head(*pooled), x, 2 / 255
    pixels = x.flatten(1)[:, :784]
    for width, eps in ((100, 0.002), (100, 0.05), (400, 0.01)):
        layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        yield f"MLP {width}, eps {eps:g}", head(*layers), pixels, eps


def rows(options: argparse.Namespace) -> None:
    """Print the time of every layout, and of what the cost model chooses, on networks of several kinds."""
    lines = []
    for name, model, images, eps in examples_of_rows(options):
        with torch.no_grad():
            model(images)
            net, region, times = autodual.certify(model), autodual.LInf(eps), {}
            for layout in ("dense", "whole", "windows", "auto"):
                method = autodual.Dual(rows=layout)
                spent = seconds(partial(net.bounds, images, region, method=method), options.repeats, options.clock)
                times[layout] = 1000 * statistics.median(spent) / len(images)
            shown = net.explain(images, region, autodual.Dual())
        best = min(times[layout] for layout in ("dense", "whole", "windows"))
        walked = "; ".join(row.bounded for row in shown.rows if " rows" in row.bounded)
        lines.append([name, *(f"{value:.2f}" for value in times.values()), f"{times['auto'] / best:.2f}", walked])
        print(" | ".join(lines[-1]), file=sys.stderr, flush=True)
    print(table(["network", "dense ms", "whole ms", "windows ms", "auto ms", "auto / best", "rows"], lines))


def tightness(options: argparse.Namespace) -> None:
    """Print which share of the gap to the linear program's value, on the same boxes, the ascent closes."""
    closed, above, kinds = [], [], {}
    for seed in range(options.networks):
        model, x = _random_network(seed)
        net, region = autodual.certify(model), autodual.LInf(0.1 if seed % 2 else 0.05)
        with torch.no_grad():
            start = net.bounds(x, region, method=autodual.Optimized(steps=0)).lower
            found = net.bounds(x, region, method=autodual.Optimized(steps=100, hidden_steps=0)).lower
            value = net.linear_program(x, region, method=autodual.LP(intermediate=autodual.Optimized(steps=0))).optimum
        gap = value - start
        wide = gap > 1e-6 * (1 + value.abs())
        share = ((found - start) / gap)[wide]
        closed += share.tolist()
        kinds.setdefault("convolutional" if seed % 2 else "MLP", []).extend(share.tolist())
        above.append((found - value).max().item())
        print(f"{seed}: closes {share.mean():.3f}, above by {above[-1]:.1e}", file=sys.stderr, flush=True)
    lines = [
        [kind, str(len(part)), *(f"{q:.4f}" for q in np.quantile(part, (0.05, 0.25, 0.5, 0.75)))]
        for kind, part in [*kinds.items(), ("all", closed)]
    ]
    print(table(["networks", "rows", "5 %", "25 %", "median", "75 %"], lines))
    print(f"largest excess over the linear program's value: {max(above):.1e}")


def _random_network(seed: int) -> tuple[nn.Module, Tensor]:
    """Make a small network and two inputs, in double precision."""
    torch.manual_seed(seed)
    if seed % 2:
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(24, 12), nn.ReLU(), nn.Linear(12, 3),
        )  # fmt: skip
        return model.double().eval(), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    width, depth = 10 + seed % 15, 2 + seed % 3
    layers = [module for i in range(depth) for module in (nn.Linear(width if i else 8, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 3)).double().eval(), torch.rand(2, 8, dtype=torch.float64)


def accuracy(options: argparse.Namespace) -> None:
    """Print the certified share of 200 images of CIFAR-10 at 2/255, by our methods and the peer's."""
    chosen = [name for name in options.only if name in CIFAR]
    for name in chosen:
        lines = []
        for method in options.method:
            found = apart(options, name, method, options.images, 0 if "ptimized" in method else 1)
            if "error" in found:
                lines.append([method, str(found["error"]), "", "", ""])
            else:
                cells = (f"{found['images']}", f"{found['margin']:.4f}", f"{found['ms']:.1f}")
                lines.append([method, f"{100 * found['certified']:.1f} %", *cells])
            print(f"{name}: {' | '.join(lines[-1])}", file=sys.stderr, flush=True)
        print(
            f"\n{name}, {options.images} images\n{table(['method', 'certified', 'bounded', 'their mean margin', 'ms'], lines)}",
            flush=True,
        )


COMMANDS = {"speed": speed, "numbers": numbers, "rows": rows, "tightness": tightness, "accuracy": accuracy, "measure": measure}


def main() -> int:
    """Run one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--batch", type=int, help="images that are bounded together; all of them by default")
    parser.add_argument("--open", action="store_true", help="accuracy: leave out images that are settled without the method")
    parser.add_argument("--slow-images", type=int, default=10, help="images for the peer's optimisation")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--networks", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--method", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    options = parser.parse_args()
    if options.command not in ("tightness", "rows") and not (options.data and options.models):
        parser.error("this table needs --data and --models")
    torch.set_num_threads(options.threads)
    result = COMMANDS[options.command](options)
    print(json.dumps(result) if result else machine())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
