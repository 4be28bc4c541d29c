"""Rows through nodes some of whose elements have slopes that are sought, with derivatives written down.

An ascent spends most of its time in passes over elements, so each of these functions takes as few as it can: see
``relaxed_rows.py`` for rows whose lines are given.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


class PickedRows(torch.autograd.Function):
    """Pull rows through a node, some of whose elements have lines of their own, and sum up what these allow.

        rows * (lower where rows > 0, else upper),    sum rows * (below where rows > 0, else above)

    Shapes: ``flat`` and ``rest`` are the rows and the slopes of all other elements, laid flat; ``index`` says which elements
    are picked, in order, ``owner`` whose row each is in, ``counts`` how many every row has; the lines are ``[picked]``. The
    sums are ``[rows]``. The picked elements of the rows are returned besides, without derivatives.
    """

    @staticmethod
    def forward(
        ctx: Any,
        flat: Float[Tensor, " elements"],
        rest: Float[Tensor, " elements"],
        index: Int[Tensor, " picked"],
        owner: Int[Tensor, " picked"],
        counts: Int[Tensor, " rows"],
        lower: Float[Tensor, " picked"],
        upper: Float[Tensor, " picked"],
        below: Float[Tensor, " picked"],
        above: Float[Tensor, " picked"],
    ) -> tuple[Float[Tensor, " elements"], Float[Tensor, " rows"], Float[Tensor, " picked"]]:
        """Compute all three."""
        part = flat.index_select(0, index)
        positive = part > 0
        slope, height = torch.where(positive, lower, upper), torch.where(positive, below, above)
        ctx.save_for_backward(rest, index, owner, part, positive, slope, height)
        ctx.mark_non_differentiable(part)
        sums = torch.segment_reduce(part * height, "sum", lengths=counts, unsafe=True)
        return (flat * rest).scatter_(0, index, part * slope), sums, part

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pulled: Tensor, summed: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return the derivatives of what needs them."""
        rest, index, owner, part, positive, slope, height = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        given, added = pulled.index_select(0, index), summed.index_select(0, owner)
        flat = None
        if wanted[0]:
            flat = (pulled * rest).scatter_(0, index, (given * slope).addcmul_(added, height))
        sides = (part * positive, part * ~positive) if wanted[6] or wanted[8] else (part * positive, None)
        lines = (
            side * each if need else None
            for side, each, need in zip((*sides, *sides), (given, given, added, added), wanted[5:], strict=True)
        )
        return flat, None, None, None, None, *lines


class Height(torch.autograd.Function):
    """Return how far lines of some slope are from a reference point, when they touch a function's graph from one side.

    A line touches the graph where ``value - slope * place`` is least, or greatest, among points of it. Its height over the
    reference point is that plus ``slope * point - reached``, but not above, or below, 0; the derivative by the slope is the
    distance from the place to the point (the envelope theorem). Of points that are touched at once any will do for an ascent.
    The reference point comes first, where the line passes through it, then whichever is named first.

    Shapes: ``places`` and ``values`` are ``[points, picked]``, all others ``[picked]``.
    """

    @staticmethod
    def forward(
        ctx: Any, slope: Tensor, places: Tensor, values: Tensor, point: Tensor, reached: Tensor, above: bool
    ) -> Float[Tensor, " picked"]:
        """Return the height."""
        touched, best = places[0], torch.addcmul(values[0], places[0], slope, value=-1)
        for place, value in zip(places[1:], values[1:], strict=True):
            other = torch.addcmul(value, place, slope, value=-1)
            touched = torch.where(other > best if above else other < best, place, touched)
            best = torch.maximum(best, other) if above else torch.minimum(best, other)
        height = (best - reached).addcmul_(slope, point)
        ctx.save_for_backward((point - touched).mul_(height > 0 if above else height < 0))
        return height.clamp_(min=0) if above else height.clamp_(max=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        """Return the derivative by the slope."""
        (distance,) = ctx.saved_tensors
        return given * distance, None, None, None, None, None


class Reach(torch.autograd.Function):
    """Sum the sizes of rows, weighted: ``sum |rows| * weights``.

    Shapes: rows ``[rows, features]``; weights alike, or one row of them for all.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Float[Tensor, " rows"]:
        """Return the sums."""
        ctx.save_for_backward(rows, weights)
        return weighted(rows.abs(), weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Float[Tensor, " rows"]) -> tuple[Tensor | None, Tensor | None]:
        """Return the derivatives of what needs them."""
        rows, weights = ctx.saved_tensors
        own = rows.sign().mul_(weights).mul_(given[:, None]) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return own, None
        sizes = rows.abs()
        return own, (given @ sizes)[None] if len(weights) == 1 else sizes.mul_(given[:, None])


def weighted(rows: Tensor, weights: Tensor) -> Float[Tensor, " rows"]:
    """Sum rows times weights, ``[rows, features]``; one row of weights stands for all."""
    return rows @ weights[0] if len(weights) == 1 else torch.bmm(rows[:, None], weights[..., None])[:, 0, 0]
