"""Robust training in the plane, where everything can be seen: out/plane.png and out/polytopes.png. Two minutes on one core.

    python examples/plane.py                      (needs matplotlib: pip install 'autodual[plot]')

Twelve points with random labels, each with a box of radius 0.08 at some distance from the others. A network trained as usual
separates the points and cuts through some boxes; one trained on ``robust_loss`` is proved to leave every box whole. Beside it
the outputs over one box, all of them and the polygon that bounds them. Source: thesis, section 3.2, Figures 3.3 to 3.5.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autodual
from autodual.analysis import cut, outline
from autodual.rendering import INK, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EPS, GAP = 0.08, 0.2
PROVED, OPEN, ZERO, ONE = "#1b7f6b", "#c8452f", "#dbe5f3", "#f6e3cf"

# %% The data: points whose boxes do not meet, so that some classifier makes no error on any box.


def points(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw points of the unit square, one after the other, no two of them closer than the gap, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    chosen: list[Tensor] = []
    while len(chosen) < count:
        point = torch.rand(2, generator=generator)
        if all((point - other).abs().max() >= GAP for other in chosen):
            chosen.append(point)
    return torch.stack(chosen), torch.randint(0, 2, (count,), generator=generator)


def network(layers: int, seed: int) -> nn.Sequential:
    """Build a network 2-100-...-100-2."""
    torch.manual_seed(seed)
    hidden = [part for i in range(layers) for part in (nn.Linear(100 if i else 2, 100), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(100, 2))


def untrained(seed: int) -> nn.Sequential:
    """Build a network 2-100-100-100-2 with weights of variance 1 / inputs and biases of variance 1."""
    model = network(3, seed)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.normal_(layer.bias)
    return model


# %% The two ways to train: the loss at the points, or a bound of the loss over their boxes, which grow to full size.


def train(x: Tensor, y: Tensor, steps: int, seed: int, *, robust: bool) -> autodual.BoundModule:
    """Train on all points at once with Adam."""
    net = autodual.certify(network(4, seed))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for step in range(steps):
        region = autodual.LInf(EPS * min(1.0, 2 * step / steps))
        loss = net.robust_loss(x, y, region) if robust else F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


# %% The pictures.


def draw_plane(axes: Axes, net: autodual.BoundModule, x: Tensor, y: Tensor, certified: Tensor) -> Tensor:
    """Draw both classes' territory and every box, green where it is proved; return which boxes the boundary crosses."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle

    line = torch.linspace(-0.1, 1.1, 601)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        scores = net(grid)
    wins = (scores[:, 1] > scores[:, 0]).reshape(601, 601).T
    axes.imshow(wins, origin="lower", extent=(-0.1, 1.1, -0.1, 1.1), cmap=ListedColormap([ZERO, ONE]), vmin=0, vmax=1)
    axes.contour(line, line, (scores[:, 1] - scores[:, 0]).reshape(601, 601).T, levels=[0.0], colors=INK, linewidths=0.8)
    inside = (grid[:, None] - x[None]).abs().amax(-1) <= EPS
    crossed = ((scores.argmax(1)[:, None] != y[None]) & inside).any(0)
    for point, label, good in zip(x.tolist(), y.tolist(), certified.tolist(), strict=True):
        corner = [value - EPS for value in point]
        colour = PROVED if good else OPEN
        axes.add_patch(Rectangle(corner, 2 * EPS, 2 * EPS, fill=False, edgecolor=colour, lw=1.8))
        axes.plot(*point, "o" if label else "s", color="#b4610b" if label else "#31619c", ms=6, mec="white")
    axes.set(xticks=[0, 1], yticks=[0, 1], xlim=(-0.1, 1.1), ylim=(-0.1, 1.1))
    return crossed


def reached(net: autodual.BoundModule, x: Tensor, eps: float) -> Tensor:
    """Return the outputs on a dense grid over the box around one point."""
    line = torch.linspace(-eps, eps, 201)
    with torch.no_grad():
        return net(x + torch.cartesian_prod(line, line))


def draw_polytope(axes: Axes, net: autodual.BoundModule, x: Tensor, eps: float) -> tuple[bool, float, float]:
    """Draw every output over the box and the dual network's polygon.

    Returns:
        Whether the bounds enclose all outputs; areas of the polygons, dual and interval, over that of the outputs' hull.
    """
    outputs, region = reached(net, x, eps), autodual.LInf(eps)
    polygons = {method: outline(net, x, region, method)[0] for method in ("dual", "interval")}
    closed = torch.cat([polygons["dual"], polygons["dual"][:1]])
    axes.plot(closed[:, 0], closed[:, 1], color=PROVED, lw=2.0, label="bound by the dual network")
    axes.plot(outputs[:, 0], outputs[:, 1], ".", color="#4a5568", ms=1.0, rasterized=True, label="outputs")
    low, high = polygons["dual"].amin(0), polygons["dual"].amax(0)
    room = 0.12 * (high - low)
    axes.set(xlim=(low[0] - room[0], high[0] + room[0]), ylim=(low[1] - room[1], high[1] + room[1]))
    axes.locator_params(nbins=4)
    angles = torch.arange(90, dtype=torch.float64) * (torch.pi / 45)
    rows = torch.stack([angles.cos(), angles.sin()], 1)
    hull = area(cut(rows, (outputs.double() @ rows.T).amin(0)))
    sound = all(encloses(polygon, outputs) for polygon in polygons.values())
    return sound, area(polygons["dual"]) / hull, area(polygons["interval"]) / hull


def area(polygon: Tensor) -> float:
    """Return the area of a polygon."""
    following = torch.roll(polygon, -1, 0)
    return 0.5 * float((polygon[:, 0] * following[:, 1] - polygon[:, 1] * following[:, 0]).sum())


def encloses(polygon: Tensor, outputs: Tensor) -> bool:
    """Tell whether all points lie within a polygon whose corners go round to the left, up to float rounding."""
    edges = torch.roll(polygon, -1, 0) - polygon
    ways = outputs.double()[:, None] - polygon[None]
    return bool((edges[:, 0] * ways[..., 1] - edges[:, 1] * ways[..., 0] >= -1e-5 * edges.norm(dim=1)).all())


def main() -> None:
    """Train twice, draw, and check what the pictures claim."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    x, y = points(12, arguments.seed)
    nets, start = {}, time.perf_counter()
    for name in ("standard", "robust"):
        nets[name] = train(x, y, arguments.steps, arguments.seed, robust=name == "robust")
    print(f"trained in {time.perf_counter() - start:.0f} s")

    certified = {name: net.verify(x, y, autodual.LInf(EPS)).certified for name, net in nets.items()}
    crossed = {}
    with canvas(arguments.output / "plane.png", (9.0, 5.0), f"Twelve points, boxes of radius {EPS:g}") as figure:
        for axes, (name, net) in zip(figure.subplots(1, 2), nets.items(), strict=True):
            crossed[name] = draw_plane(axes, net, x, y, certified[name])
            count, through = int(certified[name].sum()), int(crossed[name].sum())
            axes.set_title(f"{name} training: {count} of {len(x)} boxes proved, the boundary crosses {through}")
            print(f"{name:<9} proved {count:>2} of {len(x)}, crossed by the boundary {through}")

    random, sound = autodual.certify(untrained(arguments.seed)), []
    panels = [(f"random network, eps {eps:g}", random, torch.full((1, 2), 0.5), eps) for eps in (0.05, 0.1, 0.25)]
    panels.append((f"after robust training, eps {EPS:g}", nets["robust"], x[:1], EPS))
    with canvas(arguments.output / "polytopes.png", (13.0, 3.9), "All outputs over a box, and what bounds them") as figure:
        every = figure.subplots(1, len(panels))
        for axes, (title, net, centre, eps) in zip(every, panels, strict=True):
            good, dual, interval = draw_polytope(axes, net, centre, eps)
            sound.append(good)
            axes.set(title=f"{title}\narea {dual:.3g} times that of the outputs' hull", xlabel="output 0")
            print(f"{title}: area of the outline over that of the outputs' hull, dual {dual:.3g}, interval {interval:.3g}")
        every[0].set_ylabel("output 1")
        figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, markerscale=8)
    print(f"outlines that enclose every output: {sum(sound)} of {len(sound)}")

    proved_but_crossed = sum(int((certified[name] & crossed[name]).sum()) for name in nets)
    if proved_but_crossed or not all(sound):
        raise SystemExit("a bound is wrong")
    if not certified["robust"].sum() > certified["standard"].sum():
        raise SystemExit("robust training proved no more boxes than standard training")
    print(f"pictures: {arguments.output / 'plane.png'}, {arguments.output / 'polytopes.png'}")


if __name__ == "__main__":
    main()
