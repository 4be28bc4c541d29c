"""How far the dual network is from the linear program it bounds: the figure of the thesis' section 3.3.1 (Figure 3.8).

Three networks of one architecture, on the bundled digits: trained robustly, with random weights, and trained the usual way.
For every margin that is asked of a test image: the optimum of the linear relaxation (3.6) and the lower bound by the dual
network, over the same boxes, and the smallest margin an attack finds. The text gives neither its network nor its radius, so the
comparison is repeated, not its figures.

    python benchmarks/linear_programs.py --output out/linear_programs.png        (needs scikit-learn, matplotlib, scipy)
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import autodual
from autodual.attacks import minimize
from autodual.digits import build, load_model, load_test_set
from benchmarks.common import machine, table
from examples.train_digits import as_tensors, split

TOLERANCE = 1e-6
CLASSES = 10


@dataclass(frozen=True)
class Outcome:
    """What one network showed, each ``(images, other classes)``.

    Attributes:
        accuracy: share of the whole test set that is classified correctly.
        program: the optimum of the linear program, by the solver.
        proved: the bound that its multipliers led to.
        dual: the bound by the method whose boxes the program has.
        attack: the smallest margins found.
        seconds: for one program, assembly included.
    """

    accuracy: float
    program: Tensor
    proved: Tensor
    dual: Tensor
    attack: Tensor
    seconds: float

    def faults(self) -> list[str]:
        """Say what contradicts the theory."""
        pairs = {
            "a dual bound exceeds the program": self.dual - self.program,
            "the program exceeds a margin that is reached": self.program - self.attack,
            "the walk misses the program": (self.proved - self.program).abs(),
        }
        scale = 1 + self.program.abs().max()
        return [text for text, excess in pairs.items() if not bool((excess <= TOLERANCE * scale).all())]


def usual(epochs: int) -> nn.Sequential:
    """Train without regard to robustness."""
    x, y = as_tensors(*split()[:2])
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(y)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
    return model.eval()


def rows_of(y: Tensor) -> Tensor:
    """Return ``e_y - e_j`` for the other classes, ``(images, 9, 10)``."""
    identity = torch.eye(CLASSES, dtype=torch.float64)
    others = torch.stack([torch.tensor([j for j in range(CLASSES) if j != label]) for label in y.tolist()])
    return identity[y][:, None] - identity[others]


@torch.no_grad()
def examine(model: nn.Module, images: int, eps: float, method: str) -> Outcome:
    """Compare the bounds of one network."""
    x, y = load_test_set()
    accuracy = (model(x).argmax(1) == y).double().mean().item()
    model, x, y = model.double(), x[:images].double(), y[:images]
    net, region, rows = autodual.certify(model), autodual.LInf(eps, domain=(0.0, 1.0)), rows_of(y)
    start = time.perf_counter()
    found = net.linear_program(x, region, rows, autodual.LP(intermediate=method))
    seconds = (time.perf_counter() - start) / found.optimum.numel()
    dual = net.bounds(x, region, rows, method).lower
    with torch.enable_grad():
        attack = minimize(model, x, region, rows, steps=40, restarts=2)[0].detach()
    return Outcome(accuracy, found.optimum, found.bound, dual, attack, seconds)


def line(name: str, outcome: Outcome) -> list[str]:
    """Sum one network up."""
    gap, distance = outcome.program - outcome.dual, outcome.attack - outcome.dual
    means = (outcome.attack, outcome.program, outcome.dual)
    return [
        name,
        f"{outcome.accuracy:.1%}",
        *(f"{value.mean():.3f}" for value in means),
        f"{gap.median():.3f}",
        f"{gap.median() / outcome.program.abs().median():.0%}",
        f"{gap.sum() / distance.sum():.0%}",
        f"{(outcome.proved - outcome.program).abs().max():.0e}",
        f"{outcome.seconds:.2f}",
    ]


HEADER = ["network", "accuracy", "attack", "LP", "bound", "gap", "of |LP|", "of the way", "walk - LP", "s / LP"]


def draw(outcomes: dict[str, Outcome], eps: float, path: Path) -> None:
    """Plot the dual bound over the program's optimum, one panel for each network."""
    figure = Figure(figsize=(4.2 * len(outcomes), 4.2), layout="constrained")
    for axes, (name, outcome) in zip(figure.subplots(1, len(outcomes)), outcomes.items(), strict=True):
        ends = [min(outcome.dual.min().item(), outcome.program.min().item()), outcome.program.max().item()]
        axes.plot(ends, ends, color="#999999", linewidth=1, label="equal")
        axes.plot(outcome.program.flatten(), outcome.dual.flatten(), ".", color="#2f6690", markersize=5, label="a margin")
        axes.set(title=f"{name}, eps {eps:g}", xlabel="optimum of the linear program", ylabel="bound by the dual network")
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Print the table and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=6, help="test images, nine programs each")
    parser.add_argument("--eps", type=float, default=0.1, help="radius, pixels in [0, 1]")
    parser.add_argument("--method", choices=("dual", "adaptive"), default="dual", help="what is compared, and whose boxes")
    parser.add_argument("--epochs", type=int, default=30, help="of the usual training")
    parser.add_argument("--output", type=Path, default=Path("out/linear_programs.png"))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    networks = {"robust training": load_model(), "random weights": build().eval(), "usual training": usual(arguments.epochs)}
    outcomes = {}
    for name, model in networks.items():
        outcomes[name] = examine(model, arguments.images, arguments.eps, arguments.method)
        print(f"{name}: done", flush=True)
    setting = f"{arguments.images} images, LInf({arguments.eps:g}) in 0..1, method {arguments.method!r}, float64, seed 0"
    print(f"\nmargins f_y - f_j: {setting}; {machine()}")
    print("attack, LP, bound: means; gap: median of LP - bound, its share of the median |LP| and of the way to the attack\n")
    print(table(HEADER, [line(name, outcome) for name, outcome in outcomes.items()]))
    draw(outcomes, arguments.eps, arguments.output)
    print(f"\nwrote {arguments.output}")
    faults = [f"{name}: {fault}" for name, outcome in outcomes.items() for fault in outcome.faults()]
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
