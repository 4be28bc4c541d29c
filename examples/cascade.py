"""A cascade of robust networks in the plane, and why earlier stages must agree: out/cascade.png. Half a minute on one core.

    python examples/cascade.py                    (needs matplotlib: pip install 'autodual[plot]')

The first network is too small to leave every box whole. The next one is trained on the points that the first does not certify,
and so on. Then two inputs at most eps apart are looked for that the cascade answers differently: with the check that earlier
stages agree there are none, and cannot be any; without it there are many. Source: thesis, section 3.4.7, Figure 3.17.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import autodual
from autodual.cascade import ABSTAINED
from autodual.rendering import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EPS, GAP = 0.08, 0.2
REGION = autodual.LInf(EPS)
PROVED, OPEN, SILENT, ZERO, ONE = "#1b7f6b", "#c8452f", "#ffffff", "#dbe5f3", "#f6e3cf"

# %% The data: points whose boxes do not meet.


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw points of the unit square, no two of them closer than the gap, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Tensor] = []
    while len(chosen) < count:
        point = torch.rand(2, generator=generator)
        if all((point - other).abs().max() >= GAP for other in chosen):
            chosen.append(point)
    return torch.stack(chosen), torch.randint(0, 2, (count,), generator=generator)


# %% The training: each stage on what the stages before it do not certify.


def train(x: Tensor, y: Tensor, width: int, steps: int) -> autodual.BoundModule:
    """Train one small network on the bound of its worst loss over growing boxes."""
    net = autodual.certify(
        nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
    )
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for step in range(steps):
        loss = net.robust_loss(x, y, autodual.LInf(EPS * min(1.0, 2 * step / steps)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def train_cascade(x: Tensor, y: Tensor, stages: int, width: int, steps: int) -> list[autodual.BoundModule]:
    """Train stage after stage; stop when every point is certified."""
    nets: list[autodual.BoundModule] = []
    while len(nets) < stages and len(x):
        print(f"stage {len(nets)}: trained on {len(x)} points", end="")
        nets.append(train(x, y, width, steps))
        left = autodual.Cascade(nets[-1:]).uncertified(x, REGION)
        x, y = x[left], y[left]
        print(f", {len(x)} of them not certified")
    return nets


# %% The search: answers on a grid, and all pairs of them within one box.


def contradictions(answers: Tensor, grid: Tensor) -> Tensor:
    """Return pairs ``(count, 2)`` of places on the grid, at most eps apart, the first answered 0 and the second 1."""
    zero, one = ((answers == label).nonzero()[:, 0] for label in (0, 1))
    near = (torch.cdist(grid[zero], grid[one], p=torch.inf) <= EPS - 1e-6).nonzero()
    return torch.stack([zero[near[:, 0]], one[near[:, 1]]], 1)


def draw(axes: Axes, answers: Tensor, size: int, x: Tensor, y: Tensor, pair: Tensor | None) -> None:
    """Draw what the cascade answers everywhere, the points with their boxes, and a pair that contradicts itself."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    colours = ListedColormap([SILENT, ZERO, ONE])
    axes.imshow(answers.reshape(size, size).T, origin="lower", extent=(0, 1, 0, 1), cmap=colours, vmin=-1, vmax=1)
    for point, label in zip(x.tolist(), y.tolist(), strict=True):
        axes.plot(*point, "o" if label else "s", color="#b4610b" if label else "#31619c", ms=6, mec="white")
    if pair is not None:
        centre, other = pair.tolist()
        corner = [value - EPS for value in centre]
        axes.add_patch(Rectangle(corner, 2 * EPS, 2 * EPS, fill=False, edgecolor=OPEN, lw=1.6))
        axes.plot(*zip(centre, other, strict=True), color=OPEN, marker="x", ms=7, mew=2, lw=1.2)
    axes.set(xticks=[0, 1], yticks=[0, 1], xlim=(0, 1), ylim=(0, 1))


def main() -> None:
    """Train, search, draw, and check the claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--width", type=int, default=10, help="of each stage's two hidden layers")
    parser.add_argument("--steps", type=int, default=250, help="of training per stage")
    parser.add_argument("--grid", type=int, default=121, help="places per axis that are asked")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("out/cascade.png"))
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    x, y = points(14, arguments.seed)
    nets = train_cascade(x, y, arguments.stages, arguments.width, arguments.steps)
    first = int(autodual.Cascade(nets[:1]).verify(x, y, REGION).certified.sum())
    print(f"the first stage alone certifies {first} of {len(x)}")
    line = torch.linspace(0, 1, arguments.grid)
    grid = torch.cartesian_prod(line, line)
    counts, certified = {}, {}
    with canvas(arguments.output, (9.0, 5.0), f"Answers of a cascade of {len(nets)} stages, white where it abstains") as figure:
        for axes, agreement in zip(figure.subplots(1, 2), (True, False), strict=True):
            cascade = autodual.Cascade(nets, agreement=agreement)
            answers = cascade.predict(grid, REGION)
            pairs, report = contradictions(answers, grid), cascade.verify(x, y, REGION)
            counts[agreement], certified[agreement] = len(pairs), int(report.certified.sum())
            pair = grid[pairs[len(pairs) // 2]] if len(pairs) else None
            draw(axes, answers, arguments.grid, x, y, pair)
            name = "with the check of agreement" if agreement else "without it"
            share = (answers == ABSTAINED).double().mean()
            pairs_of = f"{len(pairs)} pairs" if len(pairs) else "no two inputs"
            answered = f"{name}: {int(report.correct.sum())} of {len(x)} points answered rightly"
            axes.set_title(f"{answered},\n{pairs_of} within eps are answered differently")
            right = f"{int(report.correct.sum())} of {len(x)} points answered rightly, {int(report.certified.sum())} certified"
            print(f"{name}: {right}, abstains on {share:.1%} of the grid, {len(pairs)} pairs within eps contradict each other")
            if pair is not None:
                print(f"  for instance {pair[0].tolist()} and {pair[1].tolist()}")
    print(f"picture: {arguments.output}")
    if certified[True] <= first:
        raise SystemExit("later stages add nothing here: take another seed")
    if counts[True]:
        raise SystemExit("a cascade with the check contradicted itself: the guarantee is wrong")
    if not counts[False]:
        raise SystemExit("no counterexample without the check: this cascade shows nothing, take another seed")


if __name__ == "__main__":
    main()
