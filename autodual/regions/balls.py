"""Norm balls around the input, optionally cut by the domain of valid inputs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from autodual.regions.base import CAUCHY, NORMAL, Noise, Region
from autodual.regions.boxes import BoxShaped, uniform
from autodual.regions.checks import as_limit, check_domain, check_epsilon, check_input, check_inside, describe, take_limit
from autodual.regions.supports import (
    dot,
    flat,
    l1_excess_in_box,
    l1_norm,
    l2_excess_in_box,
    l2_norm,
    linf_norm,
    shrink_into_ball,
    total,
)
from dual_layers.contract import Interval

Domain = tuple[float | Tensor, float | Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Ball(Region):
    """A norm ball of radius ``eps`` around the input, intersected with ``domain``, in the units of the input.

    Args:
        eps: the radius: a number, a scalar tensor or one value per example, shape (batch,); may require grad.
        domain: None, or the ends ``(lower, upper)`` of the valid inputs, numbers or tensors that broadcast to the input.
    """

    eps: float | Tensor
    domain: Domain | None = None

    def with_eps(self, eps: float | Tensor) -> Self:
        """Return the same kind of region with another radius."""
        return replace(self, eps=eps)

    def __repr__(self) -> str:
        """Return the constructor's call, tensors abridged."""
        domain = "" if self.domain is None else f", domain={describe(tuple(self.domain))}"
        return f"{type(self).__name__}({describe(self.eps)}{domain})"

    def radius_of(self, x: Tensor) -> Tensor:
        """Return eps in a shape that broadcasts to ``x``; a value per example comes before any other reading."""
        eps = as_limit(self.eps, x)
        return eps.reshape(-1, *(1,) * (x.dim() - 1)) if eps.shape == x.shape[:1] else eps

    def domain_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ends of the domain as tensors."""
        lower, upper = self.domain if self.domain is not None else (-torch.inf, torch.inf)
        return as_limit(lower, x), as_limit(upper, x)

    def take(self, index: Tensor, x: Tensor) -> Region:
        """Choose examples; a class derived from these balls may know more than they do, and is asked as a whole."""
        if type(self) not in (LInf, L2, L1):
            return super().take(index, x)
        per_example = isinstance(self.eps, Tensor) and self.eps.shape == x.shape[:1]
        eps = self.eps[index] if per_example else take_limit(self.eps, index, x)
        domain = self.domain and tuple(take_limit(end, index, x) for end in self.domain)
        return replace(self, eps=eps, domain=domain)

    def box_around(self, middle: Tensor) -> Interval:
        """Return the box ``middle +- eps`` cut by the domain. An empty cut, which ``validate`` refuses, gives one point."""
        radius = self.radius_of(middle)
        return Interval(self.into_domain(middle - radius), self.into_domain(middle + radius))

    def into_domain(self, z: Tensor) -> Tensor:
        """Return the point of the domain that is nearest to ``z``."""
        return z if self.domain is None else torch.clamp(z, *self.domain_of(z))


class LInf(Ball, BoxShaped):
    """The box ``|z - x| <= eps``, intersected with ``domain``. Here eps may also differ from coordinate to coordinate.

    Args:
        eps: the radius: a number, a scalar tensor, one value per example, shape (batch,), or anything that broadcasts
            to the input; may require grad.
        domain: None, or the ends ``(lower, upper)`` of the valid inputs, numbers or tensors that broadcast to the input.

    Example:
        >>> LInf(0.1, domain=(0.0, 1.0)).hull(torch.tensor([[0.0, 0.5]])).upper
        tensor([[0.1000, 0.6000]])
    """

    def hull(self, x: Tensor) -> Interval:
        """Return the region itself."""
        return self.box_around(x)

    def center(self, x: Tensor) -> Tensor:
        """Return ``x``, or the middle of what the domain leaves."""
        return x if self.domain is None else super().center(x)

    def excess(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``eps * ||v||_1``, or ``|v| . half width`` where the radius differs between coordinates."""
        if self.domain is None:
            eps = as_limit(self.eps, x)
            return eps * l1_norm(v) if eps.shape in ((), x.shape[:1]) else total((v * eps).abs_())
        return super().excess(x, v)

    def noise(self, x: Tensor) -> Noise:
        """Return Cauchy noise of scale eps, or of half the width that the domain leaves."""
        return Noise(CAUCHY, self.radius_of(x)) if self.domain is None else super().noise(x)

    def validate(self, x: Tensor, name: str = "x") -> None:
        """Raise ``SpecificationError`` for a bad radius or domain, or where ball and domain do not meet."""
        check_input(x, name)
        check_epsilon(self.eps, x, name, per_coordinate=True)
        check_domain(self.domain, x, name)
        advice = f"with eps {describe(self.eps)} the region is infeasible (empty)"
        check_inside(x, self.domain, name, reach=self.radius_of(x).detach(), advice=advice)


class RoundBall(Ball):
    """A ball that is no box: ``x`` must lie in the domain, and a domain makes it asymmetric about its centre ``x``."""

    @property
    def symmetric(self) -> bool:
        """Only the whole ball is symmetric."""
        return self.domain is None

    @staticmethod
    @abstractmethod
    def norm(v: Tensor) -> Tensor:
        """Return the ball's norm over the last axis, keeping the axis."""

    @staticmethod
    @abstractmethod
    def shrunk(displacement: Tensor, amount: Tensor) -> Tensor:
        """Return the displacement moved towards 0, from itself at 0 to nothing at 1, along the ball's projections."""

    @staticmethod
    @abstractmethod
    def onto(displacement: Tensor, eps: Tensor) -> Tensor:
        """Return the nearest displacement of norm at most ``eps``, shape (batch, 1)."""

    @abstractmethod
    def directions(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw directions, shape (batch, coordinates), uniform on the ball's boundary up to their length."""

    def support(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the largest value of each row over the region."""
        return dot(v, self.center(x)) + self.excess(x, v)

    def center(self, x: Tensor) -> Tensor:
        """Return ``x``; a rounding error outside the domain is removed, which only makes the region larger."""
        return self.into_domain(x)

    def hull(self, x: Tensor) -> Interval:
        """Return the box ``center +- eps`` cut by the domain: every end is reached along its own axis."""
        return self.box_around(self.center(x))

    def room(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return how far the domain reaches below and above the centre, each (batch, coordinates), at least 0."""
        center, (lower, upper) = self.center(x), self.domain_of(x)
        return flat((center - lower).expand_as(x), 1), flat((upper - center).expand_as(x), 1)

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a random point per example: all directions, single axes and diagonals, half of them on the boundary."""
        directions = self.directions(x, generator)
        examples, coordinates = directions.shape
        kind, on_boundary, length = uniform(x, (3, examples, 1), generator)
        signs = directions.sign()
        axis = directions.abs() == directions.abs().amax(1, keepdim=True)
        directions = torch.where(kind < 0.25, signs, torch.where(kind < 0.5, directions * axis, directions))
        length = torch.where(on_boundary < 0.5, 1, length ** (1 / coordinates))
        unit = directions / self.norm(directions).clamp(min=torch.finfo(x.dtype).tiny)
        moved = self.center(x) + (flat(self.radius_of(x).expand_as(x), 1) * length * unit).reshape(x.shape)
        return self.into_domain(moved)

    def project(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the nearest point of the region in the Euclidean norm, to rounding."""
        center, (below, above) = self.center(x), self.room(x)
        eps, displacement = flat(self.radius_of(x).expand_as(x), 1)[:, :1], flat(z - center, 1)
        if self.domain is None:
            return center + self.onto(displacement, eps).reshape(x.shape)
        moved = shrink_into_ball(
            lambda amount: torch.clamp(self.shrunk(displacement, amount), -below, above),
            lambda point: self.norm(point) <= eps,
            displacement,
        )
        return self.into_domain(center + moved.reshape(x.shape))

    def contains(self, x: Tensor, z: Tensor, tolerance: float = 0.0) -> Tensor:
        """Tell for each example whether ``z`` lies in the region."""
        displacement = flat(z - self.center(x), 1)
        eps = flat(self.radius_of(x).expand_as(x), 1)[:, :1]
        lower, upper = self.domain_of(x)
        valid = flat((z >= lower - tolerance) & (z <= upper + tolerance), 1).all(1)
        return valid & (self.norm(displacement) <= eps + tolerance).squeeze(1)

    def validate(self, x: Tensor, name: str = "x") -> None:
        """Raise ``SpecificationError`` for a bad radius or domain, or an ``x`` outside the domain."""
        check_input(x, name)
        check_epsilon(self.eps, x, name, per_coordinate=False)
        check_domain(self.domain, x, name)
        advice = f"{type(self).__name__} needs its centre inside: clamp the input or widen the domain"
        check_inside(x, self.domain, name, reach=0.0, advice=advice)


class L2(RoundBall):
    """The ball ``||z - x||_2 <= eps``, intersected with ``domain``; the support of the intersection is exact.

    Args:
        eps: the radius: a number, a scalar tensor or one value per example, shape (batch,); may require grad.
        domain: None, or the ends ``(lower, upper)`` of the valid inputs, numbers or tensors that broadcast to the input.

    Example:
        >>> x, v = torch.zeros(1, 2), torch.tensor([[[3.0, -4.0]]])
        >>> L2(1.0).support(x, v), L2(1.0, domain=(0.0, 1.0)).support(x, v)
        (tensor([[5.]]), tensor([[3.]]))
    """

    def excess(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``eps * ||v||_2``, or the one-dimensional dual where there is a domain."""
        eps = as_limit(self.eps, x)
        return eps * l2_norm(v) if self.domain is None else l2_excess_in_box(flat(v, 2), *self.room(x), eps)

    def noise(self, x: Tensor) -> Noise:
        """Return normal noise of scale eps: the whole ball's, also where a domain cuts it."""
        return Noise(NORMAL, self.radius_of(x))

    @staticmethod
    def norm(v: Tensor) -> Tensor:
        """Return the Euclidean norm over the last axis, keeping the axis."""
        return torch.linalg.vector_norm(v, dim=-1, keepdim=True)

    @staticmethod
    def shrunk(displacement: Tensor, amount: Tensor) -> Tensor:
        """Scale the displacement down."""
        return displacement * (1 - amount)

    @staticmethod
    def onto(displacement: Tensor, eps: Tensor) -> Tensor:
        """Scale the displacement down to length eps. Source: thesis (5.37)."""
        return displacement * (eps / L2.norm(displacement).clamp(min=torch.finfo(displacement.dtype).tiny)).clamp(max=1)

    def directions(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw from the normal distribution, which is uniform over directions."""
        return flat(torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device), 1)


class L1(RoundBall):
    """The ball ``||z - x||_1 <= eps``, intersected with ``domain``; the support of the intersection is exact.

    Args:
        eps: the radius: a number, a scalar tensor or one value per example, shape (batch,); may require grad.
        domain: None, or the ends ``(lower, upper)`` of the valid inputs, numbers or tensors that broadcast to the input.

    Example:
        >>> x, v = torch.full((1, 2), 0.5), torch.tensor([[[3.0, -4.0]]])
        >>> L1(1.0).excess(x, v), L1(1.0, domain=(0.0, 1.0)).excess(x, v)
        (tensor([[4.]]), tensor([[3.5000]]))
    """

    def excess(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``eps * ||v||_inf``, or the one-dimensional dual where there is a domain."""
        eps = as_limit(self.eps, x)
        return eps * linf_norm(v) if self.domain is None else l1_excess_in_box(flat(v, 2), *self.room(x), eps)

    def noise(self, x: Tensor) -> Noise:
        """Return normal noise of scale eps: that of the Euclidean ball around this one."""
        return Noise(NORMAL, self.radius_of(x))

    def climb(self, x: Tensor, z: Tensor, v: Tensor, size: float) -> Tensor:
        """Move the coordinates where ``v`` is largest, up to a tenth of them, each by the same amount.

        The steepest step for this norm moves one coordinate, which is slow; how many move here falls with ``size``. Those whose
        way is barred by the domain stay. Source: thesis, section 5.3.4; there their number is drawn at random.
        """
        lower, upper = self.domain_of(x)
        slope = flat(torch.where(((v > 0) & (z >= upper)) | ((v < 0) & (z <= lower)), 0, v), 1)
        count = max(1, round(size * slope.shape[1] / 10))
        chosen = slope.abs().topk(min(count, slope.shape[1]), 1).indices
        signs = torch.zeros_like(slope).scatter(1, chosen, slope.gather(1, chosen).sign())
        return size * self.radius_of(x) * signs.reshape(x.shape) / count

    @staticmethod
    def norm(v: Tensor) -> Tensor:
        """Return the sum of magnitudes over the last axis, keeping the axis."""
        return v.abs().sum(-1, keepdim=True)

    @staticmethod
    def shrunk(displacement: Tensor, amount: Tensor) -> Tensor:
        """Shrink every coordinate by the same distance: soft thresholding."""
        size = displacement.abs()
        return displacement.sign() * (size - amount * size.amax(-1, keepdim=True)).relu()

    @staticmethod
    def onto(displacement: Tensor, eps: Tensor) -> Tensor:
        """Shrink every coordinate by the threshold ``eta`` that leaves eps, found by sorting. Source: thesis, Algorithm 10.

        With the coordinates from the largest down, ``eta_j = (sum of the first j - eps) / j`` leaves eps on the first j alone;
        it rises as long as coordinate j exceeds it, so the right one is the largest.
        """
        size = displacement.abs()
        place = torch.arange(1, size.shape[-1] + 1, device=size.device, dtype=size.dtype)
        eta = ((size.sort(-1, descending=True).values.cumsum(-1) - eps) / place).amax(-1, keepdim=True)
        return displacement.sign() * (size - eta.clamp(min=0)).relu()

    def directions(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw from the Laplace distribution, which is uniform over the faces of the ball."""
        draws = 2 * flat(uniform(x, x.shape, generator), 1) - 1
        return -draws.sign() * torch.log1p(-draws.abs())
