"""Norms, distances and normalised vectors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers.bilinear import known, ordered, times
from dual_layers.contract import INPUT, Call, Choice, Facts, Interval, Offsets, RuleSample, Slopes, Slot
from dual_layers.families import Composite, Relaxed
from dual_layers.refusals import unless_only
from dual_layers.registry import register
from dual_layers.sample_values import wave
from dual_layers.spellings import spellings

_ATEN = torch.ops.aten
_BOTH = (INPUT, Slot(1))
_VECTOR_NORM = (torch.linalg.vector_norm, _ATEN.linalg_vector_norm.default)


@register(*_VECTOR_NORM)
class DualEuclideanNorm(Relaxed):
    """Euclidean norm over some axes, or all.

    From below ``|x| >= g . x`` for every ``|g| <= 1``, with equality along ``g``. From above, for every ``t > 0``,

        |x|  <=  t / 2 + |x|^2 / (2 t)

    a sum of parabolas, each largest at an end of its interval. With ``c`` and ``r`` the centre and radius of the box, the
    upper line that is lowest at the centre has ``t = sqrt(|c|^2 + |r|^2)``, slope ``c / t``, and height ``t`` there.
    Source: Cauchy and Schwarz; thesis, Theorem 3 (eq. 3.42).
    """

    facts: ClassVar[Facts] = Facts()
    source: ClassVar[str] = "Cauchy and Schwarz; thesis, Theorem 3 (eq. 3.42)"

    @staticmethod
    def parameters(x: Any, ord: Any = 2, dim: Any = None, keepdim: Any = False, *, dtype: Any = None) -> dict[str, Any]:
        """Name the arguments of ``torch.linalg.vector_norm``."""
        return {"x": x, "ord": ord, "dim": dim, "keepdim": keepdim, "dtype": dtype}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse other norms, and conversions."""
        reason = unless_only(cls, call, "x")
        if reason is not None:
            return reason
        given = cls(call).arguments
        if given.dtype is not None:
            return f"dtype={given.dtype}: convert before the norm"
        return None if given.ord == 2 else f"ord={given.ord} is no Euclidean norm"

    def interval(self, *boxes: Interval) -> Interval:
        """Take the norms of the points nearest to zero and farthest from it: exact."""
        return Interval(self.forward(nearest(boxes[0])), self.forward(farthest(boxes[0])))

    def slopes(self, bounds: tuple[Interval, ...], choice: Choice) -> Slopes:
        """Point from zero to the centre: the upper line as low as it can be there, the lower one, left alone, exact."""
        center, reach = known(bounds[0].center), self._reach(bounds[0])
        upper = (center / torch.where(reach > 0, reach, 1.0),)
        return Slopes(upper if choice == "parallel" else (self._unit(center),), upper)

    def conjugate(self, slopes: Slopes, bounds: tuple[Interval, ...]) -> Offsets:
        """Bound from below by the best of three ``g``; from above by parabolas, or by the largest norm if that is less."""
        (box,), (lower,), (upper,) = bounds, slopes.lower, slopes.upper
        directions = (self._unit(lower, at_least=1.0), self._unit(known(box.center)), self._unit(nearest(box)))
        below = [self._sum(torch.minimum(times(g - lower, box.lower), times(g - lower, box.upper))) for g in directions]
        reach = self._reach(box)
        t = torch.where(reach > 0, reach, 1.0)
        parabolas = torch.maximum(*(end.square() / (2 * t) - times(upper, end) for end in (box.lower, box.upper)))
        above = self._sum(parabolas) + t.amax(self._axes(t), keepdim=self.arguments.keepdim) / 2
        longest = self.forward(farthest(box)) - self._sum(torch.minimum(times(upper, box.lower), times(upper, box.upper)))
        best = ordered(reduce(torch.fmax, below), torch.fmin(above, longest))
        return Offsets(best.lower, best.upper)

    def pull(self, nu: Tensor, slopes: Slopes, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Hand every element its share of ``nu``."""
        if not self.arguments.keepdim:
            for axis in sorted(axis + inputs[0].ndim + 1 for axis in self._axes(inputs[0])):
                nu = nu.unsqueeze(axis)
        return super().pull(nu, slopes, inputs)

    def push(self, slopes: tuple[Tensor, ...], points: tuple[Tensor, ...]) -> Tensor:
        """Sum the elements' shares."""
        return self._sum(slopes[0] * points[0], slopes[0])

    def _axes(self, z: Tensor) -> tuple[int, ...]:
        """Return the axes, counted from the last one."""
        dim = self.arguments.dim
        chosen = range(z.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
        return tuple(axis % z.ndim - z.ndim for axis in chosen)

    def _sum(self, value: Tensor, like: Tensor | None = None) -> Tensor:
        return value.sum(self._axes(value if like is None else like), keepdim=self.arguments.keepdim)

    def _reach(self, box: Interval) -> Tensor:
        """Return ``sqrt(|c|^2 + |r|^2)``, the root mean square of the norms of the box' corners."""
        both = torch.stack([known(box.center), known(box.radius)])
        return torch.linalg.vector_norm(both, dim=(0, *self._axes(box.lower)), keepdim=True).squeeze(0)

    def _unit(self, value: Tensor, at_least: float = 0.0) -> Tensor:
        """Divide by the norm, where that is not below some number; zero stays zero."""
        size = torch.linalg.vector_norm(value, dim=self._axes(value), keepdim=True).clamp(min=at_least)
        return value / torch.where(size > 0, size, 1.0)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield one axis, several, all, kept or not, near zero and far from it, and another norm."""
        norm = torch.linalg.vector_norm
        yield RuleSample("one axis", Call(norm, (INPUT,), {"dim": 1}), ((2, 3),))
        yield RuleSample("axis kept", Call(norm, (INPUT, 2.0, -2, True)), ((2, 3, 4),), low=-1.0, high=3.0)
        yield RuleSample("several axes", Call(norm, (INPUT,), {"dim": (3, -3)}), ((2, 2, 2, 3),), low=0.5, high=2.0)
        yield RuleSample("several axes, kept", Call(norm, (INPUT, 2, [1, 2], True)), ((2, 2, 3),), low=-3.0, high=-1.0)
        yield RuleSample("all", Call(_ATEN.linalg_vector_norm.default), ((1, 3),), batch_axis=None)
        other = Call(norm, (INPUT, 3), {"dim": 1})
        yield RuleSample("another norm", other, ((2, 3),), error=ValueError, message="no Euclidean norm")
        converted = Call(norm, (INPUT,), {"dim": 1, "dtype": torch.float64})
        yield RuleSample("converted", converted, ((2, 3),), error=ValueError, message="convert before")


@register(*_VECTOR_NORM, case=True)
class DualVectorNorm(Composite):
    """Sum or maximum of absolute values over some axes, or all. Source: its definition."""

    @staticmethod
    def compose(x: Any, ord: Any = 2, dim: Any = None, keepdim: Any = False) -> Any:
        """Add up the absolute values, or take the largest."""
        size, axes = x.abs(), tuple(range(x.ndim)) if dim is None else dim
        return size.sum(axes, keepdim=keepdim) if ord == 1 else torch.amax(size, axes, keepdim=keepdim)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse other norms."""
        reason = super().refuse(call)
        return reason or (None if cls(call).arguments.ord in (1, math.inf) else "norms are supported for ord 1, 2 and inf")

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield both norms over axes and all of them, and another one."""
        norm = torch.linalg.vector_norm
        yield RuleSample("sum", Call(norm, (INPUT, 1), {"dim": -2}), ((2, 3, 4),))
        yield RuleSample("sum of all", Call(norm, (INPUT, 1.0), {"keepdim": True}), ((1, 3),), batch_axis=None)
        yield RuleSample("maximum", Call(norm, (INPUT, math.inf, (1, 2), True)), ((2, 3, 4),))
        other = Call(norm, (INPUT, 3), {"dim": 1})
        yield RuleSample("another norm", other, ((2, 3),), error=ValueError, message="1, 2 and inf")


@register(torch.norm, "norm")
class DualNorm(Composite):
    """Norm of vectors, by its older name: the Frobenius norm is the Euclidean one. Source: its definition."""

    @staticmethod
    def compose(input: Any, p: Any = "fro", dim: Any = None, keepdim: Any = False) -> Any:
        """Call ``torch.linalg.vector_norm``."""
        return torch.linalg.vector_norm(input, 2 if p in ("fro", None) else p, dim, keepdim)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse what is no norm of vectors."""
        reason = super().refuse(call)
        return reason or ("the nuclear norm has no dual" if cls(call).arguments.p == "nuc" else None)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield its names and numbers."""
        yield RuleSample("default", Call(torch.norm, (INPUT,), {"dim": 1}), ((2, 3),))
        yield RuleSample("method", Call("norm", (INPUT, 1, -1, True)), ((2, 3, 4),))
        yield RuleSample("pairs of axes", Call(torch.norm, (INPUT, 2, (1, 2))), ((2, 3, 4),))
        nuclear = Call(torch.norm, (INPUT, "nuc"))
        yield RuleSample("nuclear", nuclear, ((2, 3),), error=ValueError, message="nuclear norm")


@register(torch.linalg.norm)
class DualLinalgNorm(Composite):
    """Norm of vectors, or Frobenius norm of matrices. Source: its definition."""

    @staticmethod
    def compose(A: Any, ord: Any = None, dim: Any = None, keepdim: Any = False) -> Any:
        """Call the norm of vectors; that of matrices where two axes and an order are named."""
        matrix = A.ndim == 2 if dim is None else isinstance(dim, (tuple, list)) and len(dim) == 2
        if ord is None or not matrix:
            return torch.linalg.vector_norm(A, 2 if ord is None else ord, dim, keepdim)
        return torch.linalg.matrix_norm(A, ord, (0, 1) if dim is None else dim, keepdim)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield vectors and matrices."""
        yield RuleSample("vectors", Call(torch.linalg.norm, (INPUT,), {"dim": 1}), ((2, 3),))
        yield RuleSample("largest", Call(torch.linalg.norm, (INPUT, math.inf, -1, True)), ((2, 3),))
        yield RuleSample("matrices", Call(torch.linalg.norm, (INPUT, "fro", (1, 2))), ((2, 3, 4),))
        yield RuleSample("all", Call(torch.linalg.norm, (INPUT, None)), ((1, 3),), batch_axis=None)
        nowhere = Call(torch.linalg.norm, (INPUT, 2, 3))
        yield RuleSample("no such axis", nowhere, ((2, 3),), error=IndexError, message="out of range")


@register(torch.linalg.matrix_norm, _ATEN.linalg_matrix_norm.default, _ATEN.linalg_matrix_norm.str_ord)
class DualMatrixNorm(Composite):
    """Frobenius norm: the Euclidean norm of all elements of a matrix. Source: its definition."""

    @staticmethod
    def compose(A: Any, ord: Any = "fro", dim: Any = (-2, -1), keepdim: Any = False) -> Any:
        """Call the norm of vectors."""
        return torch.linalg.vector_norm(A, 2, dim, keepdim)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse other norms."""
        reason = super().refuse(call)
        return reason or (None if cls(call).arguments.ord == "fro" else "of matrix norms only the Frobenius norm has a dual")

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield both axes, kept or not, and another norm."""
        yield RuleSample("matrices", Call(torch.linalg.matrix_norm), ((2, 3, 4),))
        yield RuleSample("kept", Call(torch.linalg.matrix_norm, (INPUT, "fro", (1, -1), True)), ((2, 3, 2, 4),))
        spectral = Call(torch.linalg.matrix_norm, (INPUT, 2))
        yield RuleSample("spectral", spectral, ((2, 3, 4),), error=ValueError, message="only the Frobenius norm")


@register(F.normalize)
class DualNormalize(Composite):
    """Vectors divided by their norm, or by ``eps`` if that is more: within [-1, 1], and for the Euclidean norm exactly known.

    A coordinate of ``x / |x|`` rises with that coordinate of ``x`` and moves towards zero as the other ones grow.
    Source: monotone in each coordinate.
    """

    @staticmethod
    def compose(input: Any, p: Any = 2.0, dim: Any = 1, eps: Any = 1e-12) -> Any:
        """Divide by the norm."""
        return input / torch.linalg.vector_norm(input, p, dim, True).clamp_min(eps)

    def interval(self, *boxes: Interval) -> Interval:
        """Take either end of a coordinate with the others as small, or as large, as they may be."""
        given, (box,) = self.arguments, boxes
        if given.p != 2:
            return Interval(torch.full_like(box.lower, -1.0), torch.full_like(box.upper, 1.0))
        small, large = (end.square() for end in (nearest(box), farthest(box)))
        small, large = ((part.sum(given.dim, keepdim=True) - part).clamp(min=0) for part in (small, large))

        def share(end: Tensor, others: Tensor) -> Tensor:
            return end / torch.sqrt((end.square() + others).clamp(min=given.eps**2))

        lower = share(box.lower, torch.where(box.lower <= 0, small, large)).nan_to_num(nan=-1.0)
        upper = share(box.upper, torch.where(box.upper >= 0, small, large)).nan_to_num(nan=1.0)
        slack = 16 * torch.finfo(lower.dtype).eps
        return Interval((lower - slack).clamp(min=-1.0), (upper + slack).clamp(max=1.0))

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield norms and axes, and an ``eps`` that matters."""
        yield RuleSample("default", Call(F.normalize), ((2, 3),))
        yield RuleSample("channels", Call(F.normalize, (INPUT,), {"dim": 1}), ((2, 3, 2, 2),), low=-1.0, high=3.0)
        yield RuleSample("large eps", Call(F.normalize, (INPUT, 2, -1, 2.5)), ((2, 3, 4),), low=-2.0, high=2.0)
        yield RuleSample("sum", Call(F.normalize, (INPUT,), {"p": 1.0}), ((2, 3),), low=0.2, high=3.0)
        nowhere = Call(F.normalize, (INPUT,), {"dim": 3})
        yield RuleSample("no such axis", nowhere, ((2, 3),), error=IndexError, message="out of range")


@register(nn.CosineSimilarity, F.cosine_similarity)
class DualCosineSimilarity(Composite):
    """Product of two normalised vectors: within [-1, 1]. Source: Cauchy and Schwarz."""

    @staticmethod
    def compose(x1: Any, x2: Any, dim: Any = 1, eps: Any = 1e-8) -> Any:
        """Normalise, multiply and add up; a tensor with fewer axes is widened first, as the axis is counted afterwards."""
        axes = max(x1.ndim, x2.ndim)
        dim = dim - axes if dim >= 0 else dim
        x1, x2 = (x.reshape((1,) * (axes - x.ndim) + tuple(x.shape)) if x.ndim < axes else x for x in (x1, x2))
        longest = max(x1.shape[dim], x2.shape[dim])
        x1, x2 = (x.repeat_interleave(longest, dim) if x.shape[dim] < longest else x for x in (x1, x2))
        return (F.normalize(x1, 2.0, dim, eps) * F.normalize(x2, 2.0, dim, eps)).sum(dim)

    def interval(self, *boxes: Interval) -> Interval:
        """Return what Cauchy and Schwarz say."""
        like = self.forward(*(box.lower for box in boxes))
        return Interval(torch.full_like(like, -1.0), torch.full_like(like, 1.0))

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield axes, broadcasting, a constant, and an ``eps`` that matters."""
        yield RuleSample("two inputs", Call(F.cosine_similarity, _BOTH), ((2, 3), (2, 3)))
        yield RuleSample(
            "module", Call(nn.CosineSimilarity(dim=-1, eps=3.0), _BOTH), ((2, 2, 3), (2, 1, 3)), low=-2.0, high=2.0
        )
        yield RuleSample("prototypes", Call(F.cosine_similarity, (INPUT, wave(4, 3), -1)), ((2, 1, 3),))
        yield RuleSample("fewer axes", Call(F.cosine_similarity, (wave(3, 1), INPUT), {"dim": 1}), ((2, 3, 4),))
        wrong = Call(F.cosine_similarity, _BOTH)
        yield RuleSample("shapes differ", wrong, ((2, 3), (2, 4)), error=RuntimeError, message="must match the size")


@register(nn.PairwiseDistance, F.pairwise_distance)
class DualPairwiseDistance(Composite):
    """Norm of a difference, ``|x1 - x2 + eps|``, along the last axis. Source: its definition."""

    @staticmethod
    def compose(x1: Any, x2: Any, p: Any = 2.0, eps: Any = 1e-6, keepdim: Any = False) -> Any:
        """Take the norm."""
        return torch.linalg.vector_norm(x1 - x2 + eps, p, -1, keepdim)

    @classmethod
    def from_module(cls, module: nn.PairwiseDistance, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read the arguments off the module."""
        return cls.parameters(*args, p=module.norm, eps=module.eps, keepdim=module.keepdim, **kwargs)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the module and the function, with each argument."""
        yield RuleSample("module", Call(nn.PairwiseDistance(1.0, 0.5, True), _BOTH), ((2, 3), (2, 3)))
        yield RuleSample("function", Call(F.pairwise_distance, (wave(2, 3), INPUT), {"eps": 0.1}), ((2, 3),))
        wrong = Call(F.pairwise_distance, _BOTH)
        yield RuleSample("shapes differ", wrong, ((2, 3), (2, 4)), error=RuntimeError, message="must match the size")


@register(torch.cdist, *spellings("cdist"))
class DualDistances(Composite):
    """Norms of all differences of two lists of vectors. Source: its definition."""

    @staticmethod
    def compose(x1: Any, x2: Any, p: Any = 2.0, compute_mode: Any = None) -> Any:
        """Take the norms; how the operator computes them changes rounding alone."""
        return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield two inputs, and a constant."""
        yield RuleSample("two inputs", Call(torch.cdist, _BOTH), ((2, 2, 3), (2, 4, 3)))
        yield RuleSample("centres", Call(torch.cdist, (INPUT, wave(4, 3)), {"p": 1.0}), ((2, 3),))
        wrong = Call(torch.cdist, _BOTH)
        yield RuleSample("shapes differ", wrong, ((2, 3), (2, 4)), error=RuntimeError, message="same number of columns")


def into(value: Tensor, box: Interval) -> Tensor:
    """Move a value into a box."""
    return torch.minimum(torch.maximum(value, box.lower), box.upper)


def nearest(box: Interval) -> Tensor:
    """Return the point of a box that is nearest to zero."""
    return into(torch.zeros_like(box.lower), box)


def farthest(box: Interval) -> Tensor:
    """Return the sizes of the farthest point of a box from zero."""
    return torch.maximum(box.lower.abs(), box.upper.abs())
