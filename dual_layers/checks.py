"""Checks of shape, dtype, device, finiteness and order of bounds, shared by the library and the rule checker.

Each raises with what was found, where, and what is allowed; each returns nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dual_layers.contract import Interval


class RuleRefusal(ValueError):
    """A rule's ``refuse`` said that a call has no dual; the checker raises it, and a bad sample may name it."""


def tolerance_of(dtype: torch.dtype, multiple: float = 64.0) -> float:
    """Return the relative rounding allowance of a dtype: ``multiple`` times its machine epsilon."""
    return multiple * torch.finfo(dtype).eps


def worst_index(badness: Tensor) -> tuple[int, ...]:
    """Return the index of the largest element; NaN counts as the largest of all."""
    flat = torch.where(badness.isnan(), torch.inf, badness).flatten()
    return tuple(int(i) for i in torch.unravel_index(flat.argmax(), badness.shape))


def check_like(value: Tensor, like: Tensor, what: str) -> None:
    """Raise unless a tensor has the shape, dtype and device of another one.

    Raises:
        ValueError: the shape or the device differs.
        TypeError: it is not a tensor, or the dtype differs.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a tensor, not {type(value).__name__}")
    if value.shape != like.shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)}; expected {tuple(like.shape)}")
    if value.dtype != like.dtype:
        raise TypeError(f"{what} has dtype {value.dtype}; expected {like.dtype}")
    if value.device != like.device:
        raise ValueError(f"{what} is on {value.device}; expected {like.device}")


def check_not_widened(value: Tensor, z: Tensor) -> None:
    """Raise if a constant argument of an element-wise operator widens its input: elements would no longer correspond.

    Raises:
        ValueError: the shapes differ.
    """
    if value.shape != z.shape:
        wider, own = tuple(value.shape), tuple(z.shape)
        raise ValueError(f"a constant argument widens its input from {own} to {wider}; expand the input first")


def check_rows(nu: Tensor, shape: Sequence[int], what: str) -> None:
    """Raise unless ``nu`` is ``[rows, *shape]``.

    Raises:
        ValueError: the shape is another one.
    """
    if nu.ndim != len(shape) + 1 or tuple(nu.shape[1:]) != tuple(shape):
        expected = ", ".join(["rows", *map(str, shape)])
        raise ValueError(f"{what} has shape {tuple(nu.shape)}; expected ({expected})")


def check_no_nan(value: Tensor, what: str) -> None:
    """Raise if a tensor holds NaN.

    Raises:
        ValueError: names the first such index and how many there are.
    """
    bad = value.isnan()
    if bad.any():
        raise ValueError(f"{what} holds NaN at {int(bad.sum())} of {bad.numel()} elements, first at {_first(bad)}")


def check_interval(box: Interval, what: str, tolerance: float | None = None) -> None:
    """Raise unless the two ends of a box agree in shape, hold no NaN and are in order, up to rounding.

    Args:
        box: the interval to judge.
        what: its name in the message, for instance the node it belongs to.
        tolerance: how far the ends may cross, relative to their size; default 64 times machine epsilon.

    Raises:
        ValueError: NaN, or an end above the other one.
        TypeError: the ends differ in dtype.
    """
    check_like(box.upper, box.lower, f"{what}: the upper end")
    check_no_nan(box.lower, f"{what}: the lower end")
    check_no_nan(box.upper, f"{what}: the upper end")
    tolerance = tolerance_of(box.lower.dtype) if tolerance is None else tolerance
    size = torch.maximum(box.lower.abs(), box.upper.abs()).clamp(min=1.0)
    crossed = box.lower > torch.where(size.isfinite(), box.upper + tolerance * size, box.upper)
    if crossed.any():
        at = worst_index(torch.where(crossed, box.lower - box.upper, -torch.inf))
        ends = f"lower {box.lower[at].item():.9g} > upper {box.upper[at].item():.9g}"
        raise ValueError(
            f"{what}: the ends are crossed at {int(crossed.sum())} of {crossed.numel()} elements; worst {ends} at {at}"
        )


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())
