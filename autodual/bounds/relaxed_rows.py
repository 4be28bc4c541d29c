"""Rows through a relaxed element-wise node with gradients, either way, and what the lines add to them, at once.

Written with plain operators, autograd would keep several tensors as large as all rows, and read and write each from main
memory. Here every pass is over a few examples at a time, which stay in the cache; the derivatives are written down.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 2**20
"""Bytes of the rows that are worked on at once: about what a core's own cache holds."""


class RelaxedRows(torch.autograd.Function):
    """Pull rows through lines and sum up what their offsets allow.

        rows * (lower where rows > 0, else upper),    sum rows * shift,    sum |rows| * spread

    Shapes: rows ``[rows, batch, features]``, everything else ``[batch, features]``; ``upper`` is None for parallel lines.
    The two sums are ``[rows, batch]``.
    """

    @staticmethod
    def forward(
        ctx: Any, nu: Tensor, lower: Tensor, upper: Tensor | None, shift: Tensor, spread: Tensor
    ) -> tuple[Float[Tensor, "rows batch features"], Float[Tensor, "rows batch"], Float[Tensor, "rows batch"]]:
        """Compute all three."""
        ctx.save_for_backward(nu, lower, upper, shift, spread)
        pulled = nu.new_empty(nu.shape)
        sums = [nu.new_empty(nu.shape[:2]) for _ in range(2)]
        for part in _parts(nu):
            rows = nu[:, part]
            if upper is None:
                torch.mul(rows, lower[part], out=pulled[:, part])
            else:  # not rows * upper + [rows]_+ * (lower - upper): where slopes are far apart the flat one would be lost
                torch.mul(rows.clamp(max=0), upper[part], out=pulled[:, part]).addcmul_(rows.clamp(min=0), lower[part])
            sums[0][:, part] = _sum(rows, shift[part])
            sums[1][:, part] = _sum(rows.abs(), spread[part])
        return pulled, *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pulled: Tensor, shifted: Tensor, spreaded: Tensor) -> tuple[Tensor | None, ...]:
        """Return the derivatives of what needs them."""
        nu, lower, upper, shift, spread = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        found = [torch.empty(like.shape, dtype=nu.dtype, device=nu.device) if need else None
                 for like, need in zip((nu, lower, upper, shift, spread), wanted, strict=True)]  # fmt: skip
        for part in _parts(nu):
            rows, given = nu[:, part], pulled[:, part]
            shifts, spreads = (side[:, part, None] for side in (shifted, spreaded))
            positive = None if upper is None else given * (rows > 0)
            if wanted[0]:
                own = torch.mul(given, (lower if upper is None else upper)[part], out=found[0][:, part])
                if positive is not None:
                    own.addcmul_(positive, lower[part] - upper[part])
                own.addcmul_(shifts, shift[part]).addcmul_(rows.sign().mul_(spread[part]), spreads)
            if wanted[1]:
                torch.sum((given if positive is None else positive) * rows, 0, out=found[1][part])
            if wanted[2]:
                torch.sum((given - positive) * rows, 0, out=found[2][part])
            if wanted[3]:
                found[3][part] = _back(shifts, rows)
            if wanted[4]:
                found[4][part] = _back(spreads, rows.abs())
        return tuple(found)


class NoisyRows(torch.autograd.Function):
    """Push rows of random vectors through parallel lines, and add noise as wide as half their gap.

        rows * slope + noise * spread

    Shapes: rows ``[rows, batch or 1, features]``, noise ``[rows, 1, features]``, slope and spread ``[batch, features]``.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slope: Tensor, noise: Tensor, spread: Tensor) -> Float[Tensor, "rows batch features"]:
        """Compute one row after the other."""
        ctx.save_for_backward(rows, slope, noise, spread)
        pushed = slope.new_empty(len(noise), *slope.shape)
        for row, drawn, out in zip(rows, noise, pushed, strict=True):
            torch.mul(slope, row, out=out).addcmul_(spread, drawn)
        return pushed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the derivatives of what needs them; noise does not."""
        rows, slope, noise, spread = ctx.saved_tensors
        wanted, shared = ctx.needs_input_grad, rows.shape[1] == 1
        found = [torch.zeros_like(like) if need else None
                 for like, need in zip((rows, slope, noise, spread), wanted, strict=True)]  # fmt: skip
        for i, given in enumerate(gradient):
            if wanted[0] and shared:
                torch.sum(given * slope, 0, keepdim=True, out=found[0][i])
            elif wanted[0]:
                torch.mul(given, slope, out=found[0][i])
            if wanted[1]:
                found[1].addcmul_(given, rows[i])
            if wanted[3]:
                found[3].addcmul_(given, noise[i])
        return found[0], found[1], None, found[3]


def _parts(nu: Tensor) -> list[slice]:
    """Split the examples."""
    step = max(1, _CHUNK // max(1, nu.shape[0] * nu.shape[2] * nu.element_size())) if nu.device.type == "cpu" else nu.shape[1]
    return [slice(start, start + step) for start in range(0, nu.shape[1], max(1, step))]


def _sum(rows: Tensor, weights: Tensor) -> Tensor:
    return torch.bmm(rows.transpose(0, 1), weights[..., None])[..., 0].T


def _back(weights: Tensor, rows: Tensor) -> Tensor:
    return torch.bmm(weights.permute(1, 2, 0), rows.transpose(0, 1))[:, 0]
