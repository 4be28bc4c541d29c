"""Products of two values that are known together: by their own boxes, and by those of a sum and a difference of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from dual_layers._recorded import recorded
from dual_layers.bilinear import DualProduct, known
from dual_layers.contract import INPUT, Call, Choice, Interval, Offsets, RuleSample, Slopes, Slot
from dual_layers.families import Relaxed
from dual_layers.refusals import unless_only
from dual_layers.registry import register

_ROUNDING = 16.0
Held = tuple[Tensor, ...]

TIE = 1e-9
"""Costs are equal that differ by this share or less."""


@recorded
def joint_product(
    x: Tensor, y: Tensor, plus: Tensor | None = None, minus: Tensor | None = None, ratio: Tensor | None = None
) -> Tensor:
    """Multiply.

    Args:
        x: any shape.
        y: broadcasts with ``x`` to its shape.
        plus: ``x + ratio * y``. Like ``minus`` it changes no value; its bounds help those of the product.
        minus: ``x - ratio * y``.
        ratio: held, positive; best where it is the ratio of how far ``x`` and ``y`` may move.
    """
    return x * y


def product_of(x: Any, y: Any, ratio: Any) -> Any:
    """Multiply, written so that a sum and a difference of the factors are bounded too; see ``joint_product``."""
    scaled = y * ratio
    return joint_product(x, y, x + scaled, x - scaled, ratio)


@register(joint_product)
class DualJointProduct(Relaxed):
    """Product of two perturbed values, given the boxes of ``p = x + r y`` and ``m = x - r y`` as well.

    For lines that hold the factors at ``A`` and ``B``, what is left is ``(x - B) (y - A)``. It is bounded twice: over the
    boxes of the factors, and since

        4 r (x - B) (y - A)  =  (p - B - r A)^2 - (m - B + r A)^2

    over those of the sum and the difference, whose bounds come from the whole network before them. Where the factors move
    independently of each other but not against each other, sums of many small terms that they are, that halves the gap. The
    sum and the difference receive no ``nu`` of their own, being linear in the factors.

    Source: McCormick's planes and differences of squares; thesis, Theorem 3 (eq. 3.42), over the boxes.
    """

    source: ClassVar[str] = "McCormick's planes and differences of squares; thesis, Theorem 3 (eq. 3.42)"
    product: ClassVar[DualProduct] = DualProduct(Call(torch.mul, (INPUT, Slot(1))))

    @staticmethod
    def parameters(x: Any, y: Any, plus: Any = None, minus: Any = None, ratio: Any = None) -> dict[str, Any]:
        """Name the arguments of ``joint_product``."""
        return {"x": x, "y": y, "plus": plus, "minus": minus, "ratio": ratio}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a perturbed ratio, and a constant factor."""
        reason = unless_only(cls, call, "x", "y", "plus", "minus")
        return reason or (None if call.arity in (2, 4) else "a product with constants is affine")

    def interval(self, *boxes: Interval) -> Interval:
        """Take the extremes over the corners of the factors' boxes: exact."""
        return self.product.interval(*boxes[:2])

    def slopes(self, bounds: tuple[Interval, ...], choice: Choice) -> Slopes:
        """Hold the factors at the centres of their boxes, or where sum and difference are at the centres of theirs.

        Parallel lines take what leaves the smaller gap. Each line alone takes what is nearest to the product in the middle of
        the factors' boxes, a pair of corners among it.
        """
        if len(bounds) == 2:
            return self.product.slopes(bounds, choice)
        held = [self.product.centers(bounds[:2]), self._centers_of_sums(bounds)]
        if choice == "parallel":
            both = self._least(held, bounds, lambda lines, rest: rest.upper - rest.lower)
            return Slopes(both, both)
        corners, middle = self.product.slopes(bounds[:2], choice), held[0][::-1]
        lower = self._least([*held, corners.lower], bounds, lambda lines, rest: -rest.lower - self.push(lines, middle))
        upper = self._least([*held, corners.upper], bounds, lambda lines, rest: rest.upper + self.push(lines, middle))
        return Slopes(lower, upper)

    def _centers_of_sums(self, bounds: tuple[Interval, ...]) -> tuple[Tensor, Tensor]:
        """Return slopes: ``y`` and ``x`` of which sum and difference are the centres of their boxes."""
        plus, minus = known(bounds[2].center), known(bounds[3].center)
        return known(0.5 * (plus - minus) / self.arguments.ratio), 0.5 * (plus + minus)

    def _least(self, candidates: list[Held], bounds: tuple[Interval, ...], cost: Callable[[Held, Offsets], Tensor]) -> Held:
        """Choose, element by element, the lines of least cost; of equal ones the first, whatever rounding says."""
        best, lowest = candidates[0], None
        for lines in candidates:
            found = cost(lines, self.conjugate(Slopes(lines, lines), bounds))
            better = (
                torch.zeros_like(found, dtype=torch.bool)
                if lowest is None
                else found < lowest - TIE * lowest.abs().nan_to_num(posinf=0.0)
            )
            best = tuple(torch.where(better, *pair) for pair in zip(lines, best, strict=True))
            lowest = found if lowest is None else torch.where(better, found, lowest)
        return best

    def conjugate(self, slopes: Slopes, bounds: tuple[Interval, ...]) -> Offsets:
        """Enclose what the lines leave over both pairs of boxes, and keep the better bound of each side."""
        offsets = self.product.conjugate(slopes, bounds[:2])
        if len(bounds) == 2:
            return offsets
        below, above = self._squares(slopes.lower, bounds).lower, self._squares(slopes.upper, bounds).upper
        return Offsets(torch.maximum(offsets.lower, below), torch.minimum(offsets.upper, above))

    def _squares(self, held: Held, bounds: tuple[Interval, ...]) -> Interval:
        """Enclose what lines leave by the squares of a sum and a difference."""
        (y_held, x_held), ratio = held, self.arguments.ratio
        sums = x_held + ratio * y_held, x_held - ratio * y_held
        usable, scale = (ratio > 0) & (ratio < torch.inf), 0.25 / ratio
        for box in bounds[2:]:
            usable = usable & box.lower.isfinite() & box.upper.isfinite()
        scale = torch.where(usable, scale, 0.0)
        plus, minus = (_square(box, by, usable) for box, by in zip(bounds[2:], sums, strict=True))
        with torch.no_grad():
            size = sum(by.square() for by in sums) + plus.upper + minus.upper
            slack = _ROUNDING * torch.finfo(size.dtype).eps * scale * size
        lower, upper = scale * (plus.lower - minus.upper) - slack, scale * (plus.upper - minus.lower) + slack
        constant = x_held * y_held
        return Interval(torch.where(usable, lower - constant, -torch.inf), torch.where(usable, upper - constant, torch.inf))

    def pull(self, nu: Tensor, slopes: Slopes, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Transpose the held maps."""
        return self.product.pull(nu, slopes, inputs[:2])

    def push(self, slopes: tuple[Tensor, ...], points: tuple[Tensor, ...]) -> Tensor:
        """Apply the held maps; the points may have a leading axis of rows."""
        return self.product.push(slopes, points[:2])

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield factors alone: a box of four values holds some that belong to no two factors."""
        yield RuleSample("one shape", Call(joint_product, (INPUT, Slot(1))), ((2, 3), (2, 3)))
        yield RuleSample("broadcast", Call(joint_product, (INPUT, Slot(1))), ((2, 3, 4), (2, 3, 1)), low=-1.0, high=3.0)
        constant = Call(joint_product, (INPUT, 2.0))
        yield RuleSample("constant", constant, ((2, 3),), error=ValueError, message="constants is affine")
        moving = Call(joint_product, (INPUT, Slot(1)), {"ratio": Slot(2)})
        yield RuleSample("perturbed ratio", moving, ((2, 3),) * 3, error=ValueError, message="ratio must not depend")


def _square(box: Interval, by: Tensor, known: Tensor) -> Interval:
    """Enclose the square of the distance from a place, where the box is known."""
    low, high = torch.where(known, box.lower - by, 0.0), torch.where(known, box.upper - by, 0.0)
    return Interval(torch.maximum(low, -high).clamp(min=0).square(), torch.maximum(-low, high).square())
