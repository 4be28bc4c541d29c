"""Softmax behind a small network, bounded as one operator and written out: how wide over what points reach?

The written-out one is ``e = exp(z); e * reciprocal(sum(e))``, and the logarithm of that.
*Odds* are differences of log-probabilities to the first class. Points are random, corners, and those that attacks find for up
to 8 outputs. Widths are medians over outputs and examples, over the range that the points reach; 1 is the least there can be.

    python benchmarks/softmax.py [--classes 3 10 100] [--eps 0.001 0.05 0.5] [--points 4000] [--steps 30]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autodual
from autodual.attacks import minimize
from benchmarks.common import machine, table

METHODS = ("interval", "dual", "adaptive")
OUTPUTS = ("probabilities", "odds")
ATTACKED = 8


class Head(nn.Module):
    """Class scores of a network with one hidden layer, turned into probabilities or log-odds.

    Args:
        classes: how many.
        output: which of the two.
        whole: use PyTorch's operators, instead of writing them out.
    """

    def __init__(self, classes: int, output: str, *, whole: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(classes)
            self.first, self.second = nn.Linear(16, 32), nn.Linear(32, classes)
        with torch.no_grad():  # scores of some size, so that classes differ
            self.second.weight *= 4
        self.output, self.whole = output, whole

    def forward(self, x: Tensor) -> Tensor:
        """Return one number per class, or per class but the first."""
        z = self.second(torch.relu(self.first(x)))
        if self.whole and self.output == "probabilities":
            return F.softmax(z, -1)
        powers = None if self.whole else torch.exp(z)
        shares = None if powers is None else powers * torch.reciprocal(powers.sum(-1, keepdim=True))
        if self.output == "probabilities":
            return shares
        logs = F.log_softmax(z, -1) if shares is None else torch.log(shares)
        return logs[:, 1:] - logs[:, :1]


@torch.no_grad()
def reached(model: nn.Module, x: Tensor, eps: float, points: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return the extremes of the outputs that were found."""
    rng = torch.Generator().manual_seed(0)
    moves = 2 * torch.rand(points, *x.shape, generator=rng, dtype=x.dtype) - 1
    moves[points // 2 :] = moves[points // 2 :].sign()
    values = model((x + eps * moves).flatten(0, 1)).unflatten(0, (points, len(x)))
    lowest, highest = values.amin(0), values.amax(0)
    chosen = torch.eye(values.shape[-1], dtype=x.dtype)[:ATTACKED]
    rows = torch.cat([chosen, -chosen])
    _, found = minimize(model, x, autodual.LInf(eps), rows, steps=steps, restarts=1, generator=rng)
    values = model(found.flatten(0, 1)).unflatten(0, found.shape[:2])
    return torch.minimum(lowest, values.amin(1)), torch.maximum(highest, values.amax(1))


def main() -> int:
    """Print the table; the exit status tells whether a point was outside its bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[3, 10, 100])
    parser.add_argument("--eps", type=float, nargs="+", default=[0.001, 0.05, 0.5])
    parser.add_argument("--points", type=int, default=4_000)
    parser.add_argument("--steps", type=int, default=30, help="of each attack")
    options = parser.parse_args()
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows, outside = [], 0
    for classes in options.classes:
        for output in OUTPUTS:
            models = [Head(classes, output, whole=whole).double() for whole in (True, False)]
            nets = [autodual.certify(model) for model in models]
            for eps in options.eps:
                lowest, highest = reached(models[0], x, eps, options.points, options.steps)
                cells = []
                for method in METHODS:
                    for net in nets:
                        with torch.no_grad():
                            bounds = net.bounds(x, autodual.LInf(eps), method=method)
                        outside += int(((bounds.lower > lowest + 1e-9) | (bounds.upper < highest - 1e-9)).sum())
                        cells.append(f"{(bounds.width / (highest - lowest)).median().item():.3g}")
                rows.append([str(classes), output, f"{eps:g}", *cells])
    header = ["classes", "output", "eps", *(f"{method}, {kind}" for method in METHODS for kind in ("whole", "written out"))]
    print(table(header, rows))
    print(f"{outside} outputs outside their bounds; {machine()}")
    return int(outside > 0)


if __name__ == "__main__":
    raise SystemExit(main())
