"""Average pooling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from dual_layers.contract import INPUT, Call, Facts, RuleSample
from dual_layers.linear import Homogeneous
from dual_layers.refusals import named_arguments
from dual_layers.registry import register

_ATEN = torch.ops.aten


@register(
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    _ATEN.avg_pool1d.default, _ATEN.avg_pool2d.default, _ATEN.avg_pool3d.default,
)  # fmt: skip
class DualAveragePool(Homogeneous):
    """Average over windows: non-negative coefficients. Source: design, section 1."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True)
    source: ClassVar[str] = "design, section 1"

    @staticmethod
    def parameters(
        input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: Any = False,
        count_include_pad: Any = True, divisor_override: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Name the arguments of ``F.avg_pool2d``; the operator itself heeds the others."""
        return {"input": input, "divisor_override": divisor_override}

    @staticmethod
    def from_module(module: nn.AvgPool2d, input: Any) -> dict[str, Any]:
        """Read the arguments off the module."""
        return {"input": input, "divisor_override": getattr(module, "divisor_override", None)}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a divisor that is negative or not known to be positive."""
        arguments = named_arguments(cls, call)
        if isinstance(arguments, str):
            return arguments
        divisor = arguments.divisor_override
        if divisor is None or (isinstance(divisor, int) and divisor > 0):
            return None
        return f"divisor_override={divisor} is not a positive integer literal"

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield windows that overlap, leave gaps or a remainder, and every way to count the padding."""
        image = ((2, 3, 7, 5),)
        yield RuleSample("2d, remainder", Call(nn.AvgPool2d(2)), image)
        yield RuleSample("2d, ceil", Call(F.avg_pool2d, (INPUT, (3, 2), 2), {"ceil_mode": True}), image)
        padded = {"stride": (2, 3), "padding": (1, 0), "ceil_mode": True, "count_include_pad": False}
        yield RuleSample("2d, padding not counted", Call(F.avg_pool2d, (INPUT, (3, 2)), padded), image)
        yield RuleSample("2d, padding counted", Call(nn.AvgPool2d(3, 2, 1, ceil_mode=True)), image)
        yield RuleSample("2d, divisor", Call(nn.AvgPool2d(2, divisor_override=3)), image)
        yield RuleSample("2d, unbatched", Call(F.avg_pool2d, (INPUT, 2)), ((3, 4, 5),), batch_axis=None)
        yield RuleSample("1d, gaps", Call(nn.AvgPool1d(2, 3)), ((2, 3, 8),))
        yield RuleSample("1d, padding", Call(F.avg_pool1d, (INPUT, 3, 2, 1, True, False)), ((2, 3, 6),))
        yield RuleSample("3d", Call(nn.AvgPool3d((1, 2, 3), stride=(1, 1, 2), padding=(0, 1, 1))), ((2, 1, 2, 3, 5),))
        yield RuleSample("aten", Call(_ATEN.avg_pool2d.default, (INPUT, [2, 2], [1, 2], [0, 1])), image)
        negative = Call(F.avg_pool2d, (INPUT, 2), {"divisor_override": -3})
        yield RuleSample("negative divisor", negative, image, error=ValueError, message="not a positive integer")
        yield RuleSample("too small", Call(F.avg_pool2d, (INPUT, 6)), image, error=RuntimeError, message="too small")


@register(
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    _ATEN.adaptive_avg_pool1d.default, _ATEN.adaptive_avg_pool2d.default, _ATEN.adaptive_avg_pool3d.default,
    _ATEN._adaptive_avg_pool2d.default, _ATEN._adaptive_avg_pool3d.default,
)  # fmt: skip
class DualAdaptiveAveragePool(Homogeneous):
    """Average over as many windows as asked for: non-negative coefficients. Source: design, section 1."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True)
    source: ClassVar[str] = "design, section 1"

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield windows of unequal size, global pooling, an axis left alone, and more windows than positions."""
        image = ((2, 3, 7, 5),)
        yield RuleSample("2d, unequal windows", Call(nn.AdaptiveAvgPool2d((3, 2))), image)
        yield RuleSample("2d, global", Call(F.adaptive_avg_pool2d, (INPUT, 1)), image)
        yield RuleSample("2d, one axis", Call(F.adaptive_avg_pool2d, (INPUT, (None, 2))), image)
        yield RuleSample("1d, more than there are", Call(nn.AdaptiveAvgPool1d(5)), ((2, 3, 4),))
        yield RuleSample("3d", Call(nn.AdaptiveAvgPool3d((1, 2, 3))), ((1, 2, 2, 3, 4),))
        yield RuleSample("aten", Call(_ATEN._adaptive_avg_pool2d.default, (INPUT, [3, 2])), image)
        wrong = Call(nn.AdaptiveAvgPool2d(2))
        yield RuleSample("too few axes", wrong, ((2, 3),), error=RuntimeError, message="3D or 4D")
