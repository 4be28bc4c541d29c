"""Rectifiers: ReLU and its leaky variants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from dual_layers.contract import Call, Facts, RuleSample
from dual_layers.families import PiecewiseLinear
from dual_layers.registry import register


@register(nn.ReLU, F.relu, torch.relu, "relu", torch.ops.aten.relu.default)
class DualReLU(PiecewiseLinear):
    """Rectified linear unit, ``max(z, 0)``.

    Source: thesis, Corollary 5 (eq. 3.53), Theorem 1 (eq. 3.9); parallel slope ``u / (u - l)`` of eq. 3.18.

    Example:
        >>> layer = DualReLU(Call(torch.relu))
        >>> box = Interval(torch.tensor([-1.0]), torch.tensor([3.0]))
        >>> layer.slopes((box,), "parallel").lower[0].item()
        0.75
    """

    facts: ClassVar[Facts] = Facts(monotone=True, convex=True, positionwise=True, exact_when_stable=True)
    source: ClassVar[str] = "thesis, Corollary 5"

    def breakpoints(self) -> tuple[float, ...]:
        """Return the kink at zero."""
        return (0.0,)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("module", Call(nn.ReLU()), ((2, 3),))
        yield RuleSample("method on an image", Call("relu"), ((2, 3, 4, 4),))
