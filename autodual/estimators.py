"""Norms from random projections: what a few samples of a stable variable say about its scale.

A projection of a vector ``w`` on independent stable variables is again stable, with the norm of ``w`` for its scale:
``sum_j w_j C_j`` is ``||w||_1`` times a Cauchy variable, ``sum_j w_j G_j`` is ``||w||_2`` times a normal one
(thesis, Theorem 4). Here are the ways to read the scale off the magnitudes of ``r`` such samples: two *estimates* without
bias, and *bounds* that lie above it except with a stated probability.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from autodual.threads import in_threads
from dual_layers.families import root_of_squares

Estimator = Literal["median", "log-mean", "geometric", "order", "tightest"]
"""``median`` and ``log-mean`` estimate; ``geometric`` and ``order`` bound; ``tightest`` is the better one of these two."""

BOUNDING = ("geometric", "order", "tightest")
FEWEST = 3
"""Fewer Cauchy samples than this have no median of finite mean."""

_BISECTIONS = 64
_CANDIDATES = 32
_BLOCK = 1024
_CACHE = 2**20
_MOST_WIRES = 32
_WORTH_THREADS = 16


@dataclass(frozen=True)
class Sampling:
    """What the random numbers behind a result were.

    Attributes:
        r: number of projections.
        seed: of all random numbers.
        estimator: how norms were read off them.
        estimates: number of norms per example that were estimated.
        delta: probability that one of them, among all ``examples``, is too small; None for estimates without a guarantee.
        examples: number of examples that ``delta`` covers together.
    """

    r: int
    seed: int
    estimator: str
    estimates: int
    delta: float | None
    examples: int

    def __str__(self) -> str:
        """Say it in a line."""
        drawn = f"{self.r} projections, seed {self.seed}, {self.estimator}, {self.estimates} estimates per example"
        if self.delta is None:
            return f"{drawn}: no guarantee"
        each = self.delta / self.examples
        together = f"; with probability {1 - self.delta:g} all {self.examples} hold" if self.examples > 1 else ""
        return f"{drawn}: each certificate fails with probability at most {each:.3g}{together}"


@cache
def median_rank(r: int) -> int:
    """Return which of ``r`` samples in ascending order is the median, from 1: the lower of two middle ones."""
    return (r + 1) // 2


@cache
def median_mean(r: int) -> float:
    """Return the mean of the median of ``r`` magnitudes of Cauchy variables: what an estimate is divided by.

        E = integral over u in (0, 1) of tan(pi u / 2) p(u),     p the density of Beta(k, r - k + 1)

    since the magnitudes' quantile function is ``tan(pi u / 2)``. The density vanishes where the tangent has its pole.
    """
    if r < FEWEST:
        raise ValueError(f"the median of {r} Cauchy samples has no finite mean: take {FEWEST} or more")
    k = median_rank(r)
    spread = 14 / math.sqrt(r)  # fourteen standard deviations of the Beta, or the whole interval
    low, high = max(0.0, k / (r + 1) - spread), min(1.0, k / (r + 1) + spread)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    u = low + (high - low) * (nodes + 1) / 2
    log_beta = math.lgamma(k) + math.lgamma(r - k + 1) - math.lgamma(r + 1)
    density = np.exp((k - 1) * np.log(u) + (r - k) * np.log1p(-u) - log_beta)
    return float((weights * density * np.tan(math.pi * u / 2)).sum() * (high - low) / 2)


@cache
def log_mean_mean(r: int) -> float:
    """Return the mean of ``exp(mean log |C|)`` over ``r`` Cauchy variables.

    It is ``(E |C|^p)^r`` with ``p = 1 / r``, and ``E |C|^p = 1 / cos(pi p / 2)``.
    """
    return math.cos(math.pi / (2 * r)) ** -r


@cache
def root_mean_square_mean(r: int) -> float:
    """Return the mean of the root mean square of ``r`` standard normal variables."""
    return math.sqrt(2 / r) * math.exp(math.lgamma((r + 1) / 2) - math.lgamma(r / 2))


@lru_cache(maxsize=4096)
def geometric_factor(r: int, delta: float) -> float:
    """Return ``g`` such that ``g * exp(mean log |C|) < 1`` has probability at most ``delta``.

    By Chernoff's bound with ``E |C|^-s = 1 / cos(pi s / 2)``, and the best ``s = (2 / pi) atan y``,

        P(mean log |C| <= -t)  <=  exp(-r (y atan y - log(1 + y^2) / 2)),     y = 2 t / pi

    Source: thesis (3.92) with ``t = -log(1 - eps)``; pooling all samples has the exponent of the maximum over groups.
    """
    wanted = -math.log(delta) / r

    def exponent(t: float) -> float:
        y = 2 * t / math.pi
        return y * math.atan(y) - 0.5 * math.log1p(y * y)

    return math.exp(_least(lambda t: exponent(t) >= wanted, 0.0, 2 * wanted + 4))


@lru_cache(maxsize=4096)
def order_factor(r: int, delta: float) -> tuple[int, float]:
    """Return a rank and a factor ``g`` such that ``g`` times that order statistic of ``|C|`` is below 1 at most with ``delta``.

    The order statistic of rank k lies below ``t`` exactly when at least k of the samples do: a binomial tail, computed without
    approximation. Of the ranks the one whose bound is smallest at its expected place is taken, whatever the samples are.
    """
    ranks = np.unique(np.linspace(max(1, 0.1 * r), r, _CANDIDATES).astype(int))
    low, high = np.zeros(len(ranks)), np.ones(len(ranks))
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        small = _binomial_tail(r, middle, ranks) <= delta
        low, high = np.where(small, middle, low), np.where(small, high, middle)
    reached = np.tan(0.5 * math.pi * low)  # the largest t whose tail is small enough, from below
    expected = np.tan(0.5 * math.pi * ranks / (r + 1))
    inflation = np.where(reached > 0, expected / np.where(reached > 0, reached, 1.0), np.inf)
    best = int(np.argmin(inflation))
    return int(ranks[best]), float(1 / reached[best]) if reached[best] > 0 else math.inf


@lru_cache(maxsize=4096)
def normal_factor(r: int, delta: float) -> float:
    """Return ``g`` such that ``g * sqrt(mean G^2) < 1`` has probability at most ``delta`` for ``r`` normal variables.

    Chernoff's bound of the chi-squared distribution: ``P(mean G^2 <= q) <= exp(-r (q - 1 - log q) / 2)`` for ``q < 1``.
    """
    wanted = -2 * math.log(delta) / r
    return math.exp(0.5 * _least(lambda s: math.expm1(-s) + s >= wanted, 0.0, wanted + 2))  # q = exp(-s)


def _least(enough: Callable[[float], bool], low: float, high: float) -> float:
    """Bisect for the least value that is enough; the answer is."""
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _binomial_tail(r: int, p: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Return ``P(Binomial(r, p) >= k)`` for each pair of ``p`` and ``k``."""
    counts = np.arange(r + 1)
    log_choose = math.lgamma(r + 1) - np.array([math.lgamma(n + 1) + math.lgamma(r - n + 1) for n in counts])
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = counts * np.log(p)[:, None] + (r - counts) * np.log1p(-p)[:, None] + log_choose
    terms = np.where(counts >= ranks[:, None], terms, -np.inf)
    top = terms.max(1, keepdims=True)
    return np.exp(top[:, 0]) * np.exp(terms - np.where(np.isfinite(top), top, 0.0)).sum(1)


@lru_cache(maxsize=4096)
def tightest(r: int, delta: float) -> Literal["geometric", "order"]:
    """Return which bound is smaller at its expected place for this many samples, whatever they are."""
    rank, factor = order_factor(r, delta)
    return "order" if factor * math.tan(0.5 * math.pi * rank / (r + 1)) < geometric_factor(r, delta) else "geometric"


class Reduction(ABC):
    """One number per element out of samples that arrive in parts along axis 0.

    A part is digested first, which may be done where it is computed, and done again in a backward pass.
    """

    @abstractmethod
    def digest(self, part: Tensor) -> Tensor:
        """Return what must be kept of some samples."""

    @abstractmethod
    def add(self, digested: Tensor) -> None:
        """Take in what was kept of some samples."""

    @abstractmethod
    def value(self) -> Tensor:
        """Reduce all samples taken in."""


class OrderStatistic(Reduction):
    """The magnitude of the given rank, from 1, in ascending order; NaN counts as largest.

    Its derivative reaches one sample of each element and no other.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.parts: list[Tensor] = []

    def digest(self, part: Tensor) -> Tensor:
        """Keep the samples: all are needed at once."""
        return part

    def add(self, digested: Tensor) -> None:
        """Take in samples."""
        self.parts.append(digested)

    def value(self) -> Tensor:
        """Pick the sample."""
        shape = self.parts[0].shape[1:]
        with torch.no_grad():
            chosen = _ranked([part.detach().flatten(1) for part in self.parts], self.rank).reshape(shape)
        return _Chosen.apply(chosen, *self.parts)


class _Chosen(torch.autograd.Function):
    """A magnitude of one sample of each element, and its derivative by that sample."""

    @staticmethod
    def forward(ctx: Any, chosen: Tensor, *parts: Tensor) -> Tensor:
        """Return what was chosen."""
        ctx.save_for_backward(chosen, *parts)
        return chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Give the first sample of the right magnitude the gradient, by its sign. Masks of numbers: of booleans are slow."""
        chosen, *parts = ctx.saved_tensors
        found = [torch.empty_like(part) for part in parts]
        free = torch.ones_like(chosen)
        for part, own in zip(parts, found, strict=True):
            for sample, derivative in zip(part, own, strict=True):
                differs = sample.abs().sub_(chosen).sgn_().abs_()
                torch.mul(sample.sgn(), gradient, out=derivative).mul_(torch.addcmul(free, free, differs, value=-1))
                free.mul_(differs)
        return None, *found


class Mean(Reduction):
    """A mean of some function of the samples; only a sum is kept.

    Args:
        r: number of samples there will be.
    """

    def __init__(self, r: int) -> None:
        self.r = r
        self.total: Tensor | float = 0.0

    def add(self, digested: Tensor) -> None:
        """Add up."""
        self.total = self.total + digested


class AbsoluteSum(Reduction):
    """``sum |v|``: the l_1 norm itself, where the samples are the columns."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0

    def digest(self, part: Tensor) -> Tensor:
        """Add up magnitudes."""
        return part.abs().sum(0)

    def add(self, digested: Tensor) -> None:
        """Add up."""
        self.total = self.total + digested

    def value(self) -> Tensor:
        """Return the sum."""
        return self.total


class GeometricMean(Mean):
    """``exp(mean log |v|)``; a sample of 0 counts as the smallest number there is."""

    def digest(self, part: Tensor) -> Tensor:
        """Add up logarithms."""
        return part.abs().clamp(min=torch.finfo(part.dtype).tiny).log().sum(0)

    def value(self) -> Tensor:
        """Return the exponential of the mean."""
        return (self.total / self.r).exp()


class RootMeanSquare(Mean):
    """``sqrt(mean v^2)``, with derivative 0 at 0."""

    def digest(self, part: Tensor) -> Tensor:
        """Add up squares."""
        self.like = part[:0]
        return part.double().square().sum(0)

    def value(self) -> Tensor:
        """Return the root of the mean."""
        return root_of_squares(self.total / self.r, self.like)


def _ranked(parts: list[Tensor], rank: int) -> Tensor:
    """Return the magnitude of the given rank in each column.

    A network of comparators works on whole rows at once and is the fastest way for a few of them; beyond, on the CPU,
    numpy's partition is several times faster than a sort.
    """
    r, like = sum(map(len, parts)), parts[0]
    if r <= _MOST_WIRES:
        return _in_blocks(parts, _CACHE // (r * like.element_size()), lambda rows: _by_comparators(rows, rank))
    if like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64):
        return _in_blocks(parts, _BLOCK, lambda rows: _by_partition(rows, rank))
    return torch.cat(parts).abs().kthvalue(rank, 0).values


def _in_blocks(parts: list[Tensor], width: int, pick: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Work on blocks of columns that are small enough to stay in fast memory."""
    like = parts[0]
    if like.device.type != "cpu":
        return pick(parts)
    result = like.new_empty(like.shape[1])

    def work(start: int) -> None:
        result[start : start + width] = pick([part[:, start : start + width] for part in parts])

    starts = range(0, len(result), width)
    if len(starts) >= _WORTH_THREADS:
        in_threads(work, starts, like)
    else:
        for start in starts:
            work(start)
    return result


def _by_partition(parts: list[Tensor], rank: int) -> Tensor:
    turned = [part.detach().numpy().T for part in parts]
    block = np.empty((len(turned[0]), sum(part.shape[1] for part in turned)), dtype=turned[0].dtype)
    np.concatenate(turned, axis=1, out=block)
    np.abs(block, out=block)
    block.partition(rank - 1, axis=1)
    return torch.from_numpy(block[:, rank - 1])


def _by_comparators(parts: list[Tensor], rank: int) -> Tensor:
    rows = [row.abs() for part in parts for row in part]
    if bool(torch.stack([row.sum() for row in rows]).sum().isnan()):  # which a comparator would hand to both sides
        rows = [row.nan_to_num(nan=torch.inf, posinf=torch.inf) for row in rows]
        unknown = sum(row.isnan() for part in parts for row in part) > len(rows) - rank
        return _by_comparators([torch.stack(rows)], rank).masked_fill(unknown, torch.nan)
    for low, high, wants_low, wants_high in _selection(len(rows), rank):
        a, b = rows[low], rows[high]
        rows[low] = torch.minimum(a, b) if wants_low else a
        rows[high] = torch.maximum(a, b, out=b) if wants_high else b
    return rows[rank - 1]


@cache
def _selection(wires: int, rank: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """Return comparators that bring the value of a rank, from 1, to the wire of that number: two wires, and which ends matter.

    Batcher's merge exchange sort (Knuth, The Art of Computer Programming, volume 3, algorithm 5.2.2M), less what the one wire
    does not depend on.
    """
    comparators = []
    top = p = 1 << max(0, (wires - 1).bit_length() - 1)
    while p > 0:
        q, r, d = top, 0, p
        while d > 0:
            comparators += [(i, i + d) for i in range(wires - d) if i & p == r]
            d, q, r = q - p, q // 2, p
        p //= 2
    needed, kept = {rank - 1}, []
    for low, high in reversed(comparators):
        if low in needed or high in needed:
            kept.append((low, high, low in needed, high in needed))
            needed |= {low, high}
    return tuple(reversed(kept))


def cauchy_reading(estimator: Estimator, r: int, delta: float) -> tuple[Reduction, float]:
    """Return how to read a scale off ``r`` samples of a Cauchy variable of that scale: a reduction, and what to multiply it by.

    Args:
        estimator: which one.
        r: number of samples.
        delta: for those that bound, the probability of lying below the scale.
    """
    if estimator == "tightest":
        estimator = tightest(r, delta)
    if estimator == "median":
        return OrderStatistic(median_rank(r)), 1 / median_mean(r)
    if estimator == "log-mean":
        return GeometricMean(r), 1 / log_mean_mean(r)
    if estimator == "geometric":
        return GeometricMean(r), geometric_factor(r, delta)
    rank, factor = order_factor(r, delta)
    return OrderStatistic(rank), factor


def normal_reading(estimator: Estimator, r: int, delta: float) -> tuple[Reduction, float]:
    """Return the same for samples of a normal variable: the root mean square, whatever the estimator, or its bound."""
    return RootMeanSquare(r), normal_factor(r, delta) if estimator in BOUNDING else 1 / root_mean_square_mean(r)
