"""What an input region promises; everything but the support function has a default."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from autodual.errors import SpecificationError
from autodual.regions.checks import check_input, check_noise, check_support, describe
from autodual.regions.supports import dot
from dual_layers.contract import Interval

CAUCHY: Literal["cauchy"] = "cauchy"
NORMAL: Literal["normal"] = "normal"
_HULL_ELEMENTS = 2**22  # rows of +-e_i are pushed through ``support`` in chunks of about this many numbers
_PLAIN = (Tensor, int, float, str, tuple)  # attributes that tell something in a line


@dataclass(frozen=True)
class Noise:
    """Random inputs whose projections are as wide as a region: independent stable variables, one per coordinate.

    ``v . (scale * C)`` with Cauchy variables is a Cauchy variable of scale ``||scale * v||_1``, with normal ones a normal
    variable of scale ``||scale * v||_2``: the support of a box, or of a Euclidean ball, about its centre.

    Attributes:
        kind: ``"cauchy"`` or ``"normal"``.
        scale: non-negative, broadcasts to the input.
    """

    kind: Literal["cauchy", "normal"]
    scale: Tensor

    def __post_init__(self) -> None:
        """Check both; NaN is no scale."""
        if self.kind not in (CAUCHY, NORMAL):
            raise SpecificationError(f'the kind of noise must be "{CAUCHY}" or "{NORMAL}", got {self.kind!r}')
        if not bool((self.scale >= 0).all()):
            raise SpecificationError("the scale of noise must be a tensor of numbers of at least 0")


class Region(ABC):
    """A bounded convex set ``B(x)`` around each example ``x`` of a batch, known by its support function.

    A region of one's own is one small class with ``support``; every other method has a default built on it, and
    redefining one makes it faster, sharper or possible at all (``sample``, ``project``, ``climb`` and ``contains``, which
    only attacks and tests need). Sets of different examples are independent: axis 0 of ``x`` is the batch.

    Example:
        >>> class Ellipsoid(Region):
        ...     def __init__(self, axes):
        ...         self.axes = axes
        ...
        ...     def support(self, x, v):
        ...         return (v * x).flatten(2).sum(-1) + (v * self.axes).flatten(2).norm(dim=-1)
        >>> box = Ellipsoid(torch.tensor([1.0, 2.0])).hull(torch.zeros(1, 2))
        >>> box.upper
        tensor([[1., 2.]])
    """

    @property
    def symmetric(self) -> bool:
        """Whether ``excess(x, v) == excess(x, -v)``, so that one walk gives both ends of a bound."""
        return False

    @property
    def separable(self) -> bool:
        """Whether the support is a sum over coordinates; the region then equals its hull."""
        return False

    @abstractmethod
    def support(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the largest value of linear functions over the region.

            support(x, v)[r, n] = max of sum(v[r, n] * z) over z in B(x[n])

        A value that is too large makes bounds looser; one that is too small makes them wrong.

        Args:
            x: the examples, shape (batch, *features).
            v: the functions, shape (rows, batch, *features).

        Returns:
            Shape (rows, batch), differentiable in ``v``, ``x`` and the region's own tensors.
        """

    def excess(self, x: Tensor, v: Tensor) -> Tensor:
        """Return ``support(x, v) - v . center(x)``, never negative, shape (rows, batch).

        The default subtracts, which costs digits where the region is small beside its centre: define it directly
        for bounds in float32. Clamping at zero keeps an upper bound of the support, wherever the centre lies.
        """
        return (self.support(x, v) - dot(v, self.center(x))).clamp(min=0)

    def center(self, x: Tensor) -> Tensor:
        """Return the reference point that ``excess`` is measured from, shaped like ``x``; by default ``x`` itself."""
        return x

    def hull(self, x: Tensor) -> Interval:
        """Return the smallest box around the region, by default from the support of plus and minus each coordinate."""
        examples, features = x.shape[0], x[:1].numel() if len(x) else 0
        if features == 0:
            return Interval(x, x)
        step = max(1, _HULL_ELEMENTS // x.numel())
        lower, upper = [], []
        for start in range(0, features, step):
            coordinates = torch.arange(start, min(start + step, features), device=x.device)
            rows = torch.zeros(len(coordinates), features, dtype=x.dtype, device=x.device)
            rows[torch.arange(len(coordinates), device=x.device), coordinates] = 1
            rows = rows.reshape(len(coordinates), 1, *x.shape[1:]).expand(-1, examples, *x.shape[1:])
            upper.append(self.support(x, rows))
            lower.append(-self.support(x, -rows))
        return Interval(*(torch.cat(parts).T.reshape(x.shape) for parts in (lower, upper)))

    def noise(self, x: Tensor) -> Noise:
        """Return noise whose projections are at least as wide as the region about ``center(x)``; by default its hull's."""
        box, center = self.hull(x), self.center(x)
        return Noise(CAUCHY, torch.maximum(box.upper - center, center - box.lower).clamp(min=0))

    def sample(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a random point of the region for each example; built-in regions visit boundary and corners often."""
        raise NotImplementedError(f"{self!r} cannot be sampled: define {type(self).__name__}.sample(x, generator)")

    def project(self, x: Tensor, z: Tensor) -> Tensor:
        """Return a point of the region for each ``z``: the nearest one for built-in regions, ``z`` itself if inside."""
        raise NotImplementedError(f"{self!r} has no projection: define {type(self).__name__}.project(x, z)")

    def climb(self, x: Tensor, z: Tensor, v: Tensor, size: float) -> Tensor:
        """Return a step from ``z`` along which ``v . z`` rises, where repeated steps need one of their own; for attacks.

        Args:
            x: the examples.
            z: one point of the region per example.
            v: one direction per example, shaped like ``x``.
            size: length of the step, as a fraction of the region's radius.
        """
        raise NotImplementedError(f"{self!r} has no steps of its own: define {type(self).__name__}.climb(x, z, v, size)")

    def contains(self, x: Tensor, z: Tensor, tolerance: float = 0.0) -> Tensor:
        """Tell for each example whether ``z`` lies in the region, shape (batch,); a NaN never does.

        Args:
            x: the examples.
            z: one point per example, shaped like ``x``.
            tolerance: how far outside (in the ball's norm, and in each coordinate of a box) still counts as inside.
        """
        raise NotImplementedError(f"{self!r} has no test of membership: define {type(self).__name__}.contains(x, z, tolerance)")

    def validate(self, x: Tensor, name: str = "x") -> None:
        """Raise ``SpecificationError`` if the region cannot be placed around ``x``; run once before bounds are computed.

        The default tries ``support`` on a few rows: its shape, that it is finite, and that no width is negative.

        Args:
            x: the examples.
            name: what the user calls ``x``; every message starts with it.
        """
        check_input(x, name)
        check_support(self, self.support, x, name)
        if type(self).noise is not Region.noise:
            check_noise(self, x, name)

    def take(self, index: Tensor, x: Tensor) -> Region:
        """Return the region around some of the examples, which then stand for the whole batch.

        The default asks the whole region and is always right, since sets of different examples are independent; built-in
        regions index their own tensors, which costs less.

        Args:
            index: ``(chosen,)`` integers; an example may be chosen several times.
            x: the whole batch.

        Returns:
            A region for batches of as many examples as were chosen, to be given ``x[index]``.
        """
        return Selected(self, index, x)

    def __repr__(self) -> str:
        """Return the class with its numbers, texts and tensors, these abridged."""
        plain = {key: value for key, value in vars(self).items() if not key.startswith("_") and isinstance(value, _PLAIN)}
        return f"{type(self).__name__}({', '.join(f'{key}={describe(value)}' for key, value in plain.items())})"


class Selected(Region):
    """The sets of chosen examples of a batch, by asking the original region about the whole batch.

    Sets of different examples are independent, so whatever the other examples are asked is of no consequence: rows are
    scattered to where their examples were, and the answers gathered. An example chosen several times takes as many rows.

    Args:
        region: the region of the whole batch.
        index: ``(chosen,)`` integers, which may repeat.
        x: the whole batch.
    """

    def __init__(self, region: Region, index: Tensor, x: Tensor) -> None:
        self.region, self.index, self.whole = region, index, x
        order = index.argsort(stable=True)
        place = torch.arange(len(index), device=index.device) - torch.searchsorted(index[order], index[order])
        self._turn = torch.empty_like(order).scatter_(0, order, place)  # how often each was chosen before
        self._turns = int(self._turn.max()) + 1 if len(index) else 1

    @property
    def symmetric(self) -> bool:
        """As the original."""
        return self.region.symmetric

    @property
    def separable(self) -> bool:
        """As the original."""
        return self.region.separable

    def support(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the original's support."""
        return self._gathered(self.region.support(self.whole, self._scattered(v)), len(v))

    def excess(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the original's excess."""
        return self._gathered(self.region.excess(self.whole, self._scattered(v)), len(v))

    def center(self, x: Tensor) -> Tensor:
        """Return the original's centres."""
        return self.region.center(self.whole)[self.index]

    def hull(self, x: Tensor) -> Interval:
        """Return the original's boxes."""
        box = self.region.hull(self.whole)
        return Interval(*(end.expand_as(self.whole)[self.index] for end in (box.lower, box.upper)))

    def noise(self, x: Tensor) -> Noise:
        """Return the original's noise."""
        noise = self.region.noise(self.whole)
        return Noise(noise.kind, noise.scale.expand_as(self.whole)[self.index])

    def contains(self, x: Tensor, z: Tensor, tolerance: float = 0.0) -> Tensor:
        """Ask the original, in as many rounds as an example was chosen often."""
        result = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        for turn in range(self._turns):
            mine = self._turn == turn
            points = self.region.center(self.whole).clone()
            points[self.index[mine]] = z[mine]
            result[mine] = self.region.contains(self.whole, points, tolerance)[self.index[mine]]
        return result

    def take(self, index: Tensor, x: Tensor) -> Region:
        """Choose among the chosen."""
        return Selected(self.region, self.index[index], self.whole)

    def _scattered(self, v: Tensor) -> Tensor:
        """Bring ``[rows, chosen, ...]`` to ``[turns * rows, batch, ...]``, zero where nothing is asked."""
        whole = v.new_zeros(self._turns, len(self.whole), len(v), *v.shape[2:])
        whole = whole.index_put((self._turn, self.index), v.movedim(1, 0))
        return whole.movedim(2, 1).flatten(0, 1)

    def _gathered(self, answers: Tensor, rows: int) -> Tensor:
        """Undo ``_scattered`` for one number per row and example."""
        return answers.unflatten(0, (-1, rows))[self._turn, :, self.index].T

    def __repr__(self) -> str:
        """Return the original's text."""
        return repr(self.region)
