"""Where the batch lives inside a node's tensor: not always axis 0, and sometimes merged with another axis."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """The batch sits in ``axis``, whose size is ``batch * factor``.

    Attributes:
        axis: index of the axis.
        factor: how many entries of the axis belong to one example (``view(B * T, C)`` has T).
        before: into how many groups the axis is split before the batch splits each of them, a divisor of ``factor``: 1 where an
            example's entries are contiguous (``B * T``), ``factor`` where they are strided (``T * B``), T for ``T * B * S``.
    """

    axis: int = 0
    factor: int = 1
    before: int = 1

    def examples(self, value: Tensor, batch: int, lead: int = 0) -> Tensor:
        """Bring ``[*lead, *node]`` to ``[*lead, batch, features]``; a view where strides allow."""
        axis = lead + self.axis
        if self.factor == 1:
            moved = value.movedim(axis, lead)
        else:
            split = (self.before, batch, self.factor // self.before)
            moved = value.unflatten(axis, split).movedim(axis + 1, lead)
        return moved.reshape(*moved.shape[: lead + 1], prod(moved.shape[lead + 1 :]))  # -1 is ambiguous without rows

    def node(self, value: Tensor, shape: tuple[int, ...], lead: int = 0) -> Tensor:
        """Undo ``examples``: bring ``[*lead, batch, features]`` to ``[*lead, *shape]``, the node's own shape."""
        batch = value.shape[lead]
        rest = [size for i, size in enumerate(shape) if i != self.axis]
        if self.factor == 1:
            return value.reshape(*value.shape[: lead + 1], *rest).movedim(lead, lead + self.axis)
        inner = [*shape[: self.axis], self.before, self.factor // self.before, *shape[self.axis + 1 :]]
        opened = value.reshape(*value.shape[:lead], batch, *inner)
        return opened.movedim(lead, lead + self.axis + 1).flatten(lead + self.axis, lead + self.axis + 2)
