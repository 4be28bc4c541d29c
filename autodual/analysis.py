"""Numbers behind pictures of bounds: which units may switch, and the outline of all outputs."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from autodual.errors import SpecificationError
from autodual.methods import Method
from autodual.network import BoundModule
from autodual.regions import Region


@torch.no_grad()
def sign_shares(
    net: BoundModule, x: Tensor, region: Region, method: str | Method = "dual"
) -> dict[str, Float[Tensor, "batch 3"]]:
    """Tell of each layer how many units are never positive, undecided and never negative over the region.

    They are the index sets I-, I and I+ of ReLU networks: only undecided units cost tightness and rows. Source: thesis (3.20).

    Args:
        net: what ``certify`` returned.
        x: the model's input.
        region: the inputs to cover.
        method: how to bound the units.

    Returns:
        For each input of a nonlinear operator, by node name in the model's order, shares ``(batch, 3)`` that add up to 1. A
        unit that is 0 everywhere counts as never positive.

    Example:
        >>> import autodual
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 4, bias=False), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> model[0].weight.data = torch.tensor([[1.0], [2.0], [-1.0], [-2.0]])
        >>> shares = sign_shares(autodual.certify(model), torch.tensor([[0.5], [0.0]]), autodual.LInf(0.1))
        >>> list(shares.values())
        [tensor([[0.5000, 0.0000, 0.5000],
                [0.0000, 1.0000, 0.0000]])]
    """
    shares = {}
    for name, box in net.intermediate(x, region, method).items():
        negative = box.upper.flatten(1) <= 0
        positive = (box.lower.flatten(1) >= 0) & ~negative
        kinds = torch.stack([negative, ~negative & ~positive, positive], -1)
        shares[name] = kinds.to(box.lower.dtype).mean(1)
    return shares


@torch.no_grad()
def outline(
    net: BoundModule, x: Tensor, region: Region, method: str | Method = "dual", *, directions: int = 90
) -> list[Float[Tensor, "corners 2"]]:
    """Enclose, example by example, what two outputs may be by a polygon: the outer bound of thesis, Figures 3.4 and 3.5.

    Every direction c has a bound c . f >= l, a half-plane; the polygon is what they have in common.

    Args:
        net: what ``certify`` returned, for a model of two outputs.
        x: the model's input.
        region: the inputs to cover.
        method: how to bound.
        directions: how many half-planes.

    Returns:
        Corners in order for each example, ``(corners, 2)``.

    Raises:
        SpecificationError: the model has not two outputs, or there are fewer than three directions.

    Example:
        >>> import autodual
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = torch.nn.init.eye_(model.weight), torch.nn.init.zeros_(model.bias)
        >>> (polygon,) = outline(autodual.certify(model), torch.zeros(1, 2), autodual.LInf(1.0), directions=4)
        >>> sorted(polygon.round().tolist())
        [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]
    """
    if directions < 3:
        raise SpecificationError(f"a polygon needs three directions or more, got {directions}")
    angles = torch.arange(directions, dtype=torch.float64) * (2 * math.pi / directions)
    rows = torch.stack([angles.cos(), angles.sin()], 1).to(x)
    lower = net.bounds(x, region, rows, method).lower
    return [cut(rows.double(), limits.double()) for limits in lower]


def cut(rows: Tensor, limits: Tensor) -> Tensor:
    """Return the corners of the polygon ``rows . z >= limits``: a square that holds it, cut by one line after the other."""
    size = 2 * float(limits.abs().max()) + 1
    corners = torch.tensor([[-size, -size], [size, -size], [size, size], [-size, size]], dtype=rows.dtype)
    for row, limit in zip(rows, limits, strict=True):
        height = corners @ row - limit
        following = height.roll(-1)
        inside, crossing = height >= 0, (height >= 0) != (following >= 0)
        place = (height / torch.where(crossing, height - following, 1.0))[:, None]
        crossings = torch.lerp(corners, corners.roll(-1, 0), place)
        corners = torch.stack([corners, crossings], 1)[torch.stack([inside, crossing], 1)]
    return corners
