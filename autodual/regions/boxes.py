"""Boxes: the region ``Box`` and what every box-shaped region has in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from autodual.regions.base import Region
from autodual.regions.checks import as_limit, check_input, check_limits, describe, take_limit
from autodual.regions.supports import dot, total
from dual_layers.contract import Interval


class BoxShaped(Region):
    """A region that is its own hull: the support is ``v . midpoint + |v| . half width``, coordinate by coordinate."""

    @property
    def symmetric(self) -> bool:
        """A box is symmetric about its midpoint."""
        return True

    @property
    def separable(self) -> bool:
        """The support is a sum over coordinates."""
        return True

    @abstractmethod
    def hull(self, x: Tensor) -> Interval:
        """Return the box itself."""

    def support(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the largest value of each row over the box."""
        return dot(v, self.center(x)) + self.excess(x, v)

    def excess(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``|v| . half width`` for each row."""
        return total((v * self.hull(x).radius).abs_())  # in place: one temporary of the size of v, not two

    def center(self, x: Tensor) -> Tensor:
        """Return the midpoint."""
        return self.hull(x).center

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a random point per example; about half of the coordinates lie on the boundary, or all of them."""
        box = self.hull(x)
        place = uniform(x, x.shape, generator)
        reach = 0.5 + 2 * uniform(x, (len(x), *(1,) * (x.dim() - 1)), generator).square()  # 0.5: inside; 2.5: corners, mostly
        position = ((place - 0.5) * 2 * reach + 0.5).clamp(0, 1)
        corner = uniform(x, reach.shape, generator) < 0.25
        position = torch.where(corner, place.round(), position)
        return torch.minimum(torch.maximum(torch.lerp(box.lower, box.upper, position), box.lower), box.upper)

    def project(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the nearest point of the box, in every l_p norm."""
        box = self.hull(x)
        return torch.clamp(z, box.lower, box.upper)

    def contains(self, x: Tensor, z: Tensor, tolerance: float = 0.0) -> Tensor:
        """Tell for each example whether ``z`` lies in the box."""
        inside = self.hull(x).contains(z, tolerance)
        return inside.flatten(1).all(1) if inside.dim() > 1 else inside


@dataclass(frozen=True, eq=False, repr=False)
class Box(BoxShaped):
    """The box ``lower <= z <= upper``, whatever the input; the input gives batch, shape and dtype.

    Args:
        lower: a number or a tensor that broadcasts to the input.
        upper: likewise.

    Example:
        >>> region = Box(0.0, torch.tensor([1.0, 2.0]))  # two intervals, the same for every example
        >>> region.support(torch.zeros(1, 2), torch.tensor([[[3.0, -4.0]]]))  # the largest 3 a - 4 b
        tensor([[3.]])
    """

    lower: float | Tensor
    upper: float | Tensor

    def hull(self, x: Tensor) -> Interval:
        """Return the box; ends that cross by a rounding error meet in the middle."""
        lower, upper = (as_limit(end, x).expand_as(x) for end in (self.lower, self.upper))
        return Interval(torch.minimum(lower, upper), torch.maximum(lower, upper))

    def take(self, index: Tensor, x: Tensor) -> Region:
        """Choose examples."""
        if type(self) is not Box:
            return super().take(index, x)
        return Box(take_limit(self.lower, index, x), take_limit(self.upper, index, x))

    def validate(self, x: Tensor, name: str = "x") -> None:
        """Raise ``SpecificationError`` unless both ends are finite, in order and fit ``x``."""
        check_input(x, name)
        check_limits(self.lower, self.upper, x, (f"{name}: lower", f"{name}: upper"), finite=True)

    def __repr__(self) -> str:
        """Return the constructor's call, tensors abridged."""
        return f"Box({describe(self.lower)}, {describe(self.upper)})"


def uniform(x: Tensor, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Draw numbers from [0, 1) with the dtype and device of ``x``."""
    return torch.rand(shape, generator=generator, dtype=x.dtype, device=x.device)
