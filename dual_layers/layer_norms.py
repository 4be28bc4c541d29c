"""Normalisation by the input's own statistics: what is left of the mean, times the inverse of its size."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers._normalised import normalised
from dual_layers._recorded import recorded
from dual_layers.contract import INPUT, Call, Facts, Interval, RuleSample, Slot
from dual_layers.families import Composite
from dual_layers.joint_product import product_of
from dual_layers.refusals import named_arguments, unless_only
from dual_layers.registry import register, register_held
from dual_layers.sample_values import wave, waves
from dual_layers.spellings import spellings

_ATEN = torch.ops.aten


class OwnStatistics(Composite, ABC):
    """What is common to normalisations by the input's own statistics. Abstract."""

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse perturbed parameters."""
        return unless_only(cls, call, "input")


class OverLastAxes(OwnStatistics, ABC):
    """Normalisation over the last axes. Abstract."""

    centered: ClassVar[bool]

    def interval(self, *boxes: Interval) -> Interval | None:
        """Evaluate every element at its two ends; weight and bias are left to the parts."""
        arguments = self.arguments
        if arguments.weight is not None or getattr(arguments, "bias", None) is not None:
            return None
        axes = tuple(range(-len(arguments.normalized_shape), 0))
        return normalised(boxes[0], axes, _eps(arguments.eps, boxes[0].lower.dtype), centered=self.centered)


def _eps(eps: float | None, dtype: torch.dtype) -> float:
    """Return a number to keep the size away from zero; None stands for the dtype's own."""
    return torch.finfo(dtype).eps if eps is None else eps


@recorded
def proportion(inverse: Tensor, count: int) -> Tensor:
    """Guess how much further the elements move than the inverse of their root mean square: it is a mean of their moves."""
    return 0.5 * math.sqrt(max(count, 4)) / inverse.square()


register_held(proportion)


@recorded
def divided_by_size(input: Tensor, dim: Any, eps: float) -> Tensor:
    """Divide by the root mean square over some axes."""
    return input * torch.rsqrt(input.square().mean(dim, keepdim=True) + eps)


@register(divided_by_size)
class DualBySize(OwnStatistics):
    """Division by the root mean square over any axes. Source: its definition; products and curves of the parts."""

    @staticmethod
    def compose(input: Any, dim: Any, eps: float) -> Any:
        """Multiply by the inverse."""
        inverse = torch.rsqrt(input.square().mean(dim, keepdim=True) + eps)
        count = math.prod(input.shape[axis] for axis in _axes(dim))
        return product_of(input, inverse, proportion(inverse, count))

    def interval(self, *boxes: Interval) -> Interval:
        """Evaluate every element at its two ends."""
        arguments = self.arguments
        return normalised(boxes[0], _axes(arguments.dim), arguments.eps, centered=False)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield one axis and several, from both ends."""
        yield RuleSample("last axis", Call(divided_by_size, (INPUT, -1, 1e-5)), ((2, 4),), low=-3.0, high=3.0)
        yield RuleSample("first axis but one", Call(divided_by_size, (INPUT, (1,), 0.5)), ((2, 3, 2),), low=-3.0, high=3.0)
        yield RuleSample("two axes", Call(divided_by_size, (INPUT, [1, -1], 0.1)), ((2, 2, 3, 2),), low=-3.0, high=3.0)
        wrong = Call(divided_by_size, (INPUT, 3, 0.1))
        yield RuleSample("no such axis", wrong, ((2, 3),), error=IndexError, message="out of range")


def _axes(dim: Any) -> tuple[int, ...]:
    return (dim,) if isinstance(dim, int) else tuple(dim)


@register(*spellings("layer_norm"))
class DualLayerNorm(OverLastAxes):
    """Layer normalisation over the last axes. Source: its definition; products and curves of the parts.

    Example:
        >>> box = Interval(torch.zeros(1, 5), torch.ones(1, 5))
        >>> DualLayerNorm(Call(F.layer_norm, (INPUT, (5,)))).interval(box).upper.max()
        tensor(1.9999)
    """

    centered: ClassVar[bool] = True

    @staticmethod
    def compose(
        input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enable: bool = True
    ) -> Any:
        """Subtract the mean and divide by the deviation; then weight and bias."""
        if weight is not None or bias is not None:
            result = F.layer_norm(input, normalized_shape, eps=eps)
            result = result if weight is None else result * weight
            return result if bias is None else result + bias
        axes = tuple(range(-len(normalized_shape), 0))
        deviation = input - input.mean(axes, keepdim=True)
        return DualBySize.compose(deviation, axes, eps)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield one axis and two, with and without parameters, and a large eps."""
        weight, bias = wave(3, 2), wave(3, 2, phase=1.0)
        yield RuleSample("plain", Call(F.layer_norm, (INPUT, (4,))), ((2, 4),), low=-3.0, high=3.0)
        yield RuleSample("two axes", Call(F.layer_norm, (INPUT, [3, 2]), {"eps": 0.1}), ((2, 2, 3, 2),), low=-3.0, high=3.0)
        yield RuleSample("parameters", Call(F.layer_norm, (INPUT, (3, 2), weight, bias, 0.5)), ((2, 3, 2),), low=-3.0, high=3.0)
        yield RuleSample("no bias", Call(torch.layer_norm, (INPUT, (4,), wave(4))), ((2, 4),), low=-3.0, high=3.0)
        yield RuleSample("bias only", Call(F.layer_norm, (INPUT, (4,)), {"bias": wave(4)}), ((2, 4),), low=-3.0, high=3.0)
        overload = Call(_ATEN.layer_norm.default, (INPUT, [2], None, None, 0.2, False))
        yield RuleSample("two elements", overload, ((2, 2),), low=-3.0, high=3.0)
        yield RuleSample("one element", Call(F.layer_norm, (INPUT, (1,))), ((2, 1),))
        wrong = Call(F.layer_norm, (INPUT, (4,)))
        yield RuleSample("wrong width", wrong, ((2, 3),), error=RuntimeError, message="normalized_shape")
        perturbed = Call(F.layer_norm, (INPUT, (3,), Slot(1)))
        yield RuleSample("perturbed weight", perturbed, ((2, 3), (3,)), error=ValueError, message="weight must not depend")


@register(*spellings("rms_norm"))
class DualRMSNorm(OverLastAxes):
    """Division by the root mean square over the last axes. Source: its definition; products and curves of the parts."""

    centered: ClassVar[bool] = False

    @staticmethod
    def compose(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
        """Divide by the size; then the weight."""
        if weight is not None:
            return F.rms_norm(input, normalized_shape, None, eps) * weight
        axes = tuple(range(-len(normalized_shape), 0))
        return divided_by_size(input, axes, _eps(eps, input.dtype))

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield one axis and two, with and without weight and eps."""
        yield RuleSample("plain", Call(F.rms_norm, (INPUT, (4,))), ((2, 4),), low=-3.0, high=3.0)
        every = Call(torch.rms_norm, (INPUT, (3, 2), wave(3, 2), 0.5))
        yield RuleSample("weight and eps", every, ((2, 3, 2),), low=-3.0, high=3.0)
        overload = Call(_ATEN.rms_norm.default, (INPUT, [3]), {"eps": 0.1})
        yield RuleSample("aten", overload, ((2, 2, 3),), low=1.0, high=3.0)
        wrong = Call(F.rms_norm, (INPUT, (4,)))
        yield RuleSample("wrong width", wrong, ((2, 3),), error=RuntimeError, message="normalized_shape")


class FirstItem(OwnStatistics, ABC):
    """A normalisation that also returns the statistics. Abstract."""

    facts: ClassVar[Facts] = Facts(outputs_tuple=True)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse the statistics."""
        if call.item != 0:
            return "only the normalised output (item 0) has a dual, not the statistics"
        return super().refuse(call)


@register(_ATEN.native_layer_norm.default)
class DualNativeLayerNorm(FirstItem):
    """Layer normalisation as a decomposed program spells it. Source: as the function."""

    @staticmethod
    def compose(input: Any, normalized_shape: Any, weight: Any, bias: Any, eps: float) -> Any:
        """Hand on to the function."""
        return (F.layer_norm(input, normalized_shape, weight, bias, eps),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield item 0, and another one."""
        arguments = (INPUT, [3], wave(3), wave(3, phase=1.0), 0.5)
        whole = Call(_ATEN.native_layer_norm.default, arguments, item=0)
        yield RuleSample("item 0", whole, ((2, 2, 3),), low=-3.0, high=3.0)
        mean = Call(_ATEN.native_layer_norm.default, arguments, item=1)
        yield RuleSample("the mean", mean, ((2, 2, 3),), error=ValueError, message="not the statistics")


@register(_ATEN.native_group_norm.default)
class DualNativeGroupNorm(FirstItem):
    """Group normalisation as a decomposed program spells it. Source: as the function."""

    @staticmethod
    def compose(input: Any, weight: Any, bias: Any, N: Any, C: Any, HxW: Any, group: int, eps: float) -> Any:
        """Hand on to the function."""
        return (F.group_norm(input, group, weight, bias, eps),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield item 0, and another one."""
        arguments = (INPUT, wave(4), wave(4, phase=1.0), 2, 4, 3, 2, 0.5)
        whole = Call(_ATEN.native_group_norm.default, arguments, item=0)
        yield RuleSample("item 0", whole, ((2, 4, 3),), low=-3.0, high=3.0, batch_axis=None)
        mean = Call(_ATEN.native_group_norm.default, arguments, item=1)
        yield RuleSample("the mean", mean, ((2, 4, 3),), error=ValueError, message="not the statistics")


@register(*spellings("group_norm"))
class DualGroupNorm(OwnStatistics):
    """Normalisation of groups of channels. Source: layer normalisation of each group."""

    @staticmethod
    def compose(
        input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
    ) -> Any:
        """Normalise every group over its channels and positions; then weight and bias."""
        groups = input.unflatten(1, (num_groups, -1))
        return _by_channel(F.layer_norm(groups, groups.shape[2:], eps=eps).flatten(1, 2), weight, bias)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield vectors, sequences and images, with and without parameters."""
        yield RuleSample("vectors", Call(F.group_norm, (INPUT, 2)), ((2, 6),), low=-3.0, high=3.0)
        every = Call(torch.group_norm, (INPUT, 2, wave(4), wave(4, phase=1.0), 0.5))
        yield RuleSample("sequences", every, ((2, 4, 3),), low=-3.0, high=3.0)
        overload = Call(_ATEN.group_norm.default, (INPUT, 1, None, wave(2), 0.1, False))
        yield RuleSample("images, bias only", overload, ((2, 2, 2, 2),), low=-3.0, high=3.0)
        wrong = Call(F.group_norm, (INPUT, 2))
        yield RuleSample("wrong channels", wrong, ((2, 3),), error=RuntimeError, message="divisible")


class InstanceNorm(OwnStatistics, ABC):
    """Normalisation of every channel by itself, or by fixed statistics. Abstract."""

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse to update running statistics."""
        reason = super().refuse(call)
        if reason is not None:
            return reason
        arguments = named_arguments(cls, call)
        if arguments.use_input_stats and (arguments.running_mean is not None or arguments.running_var is not None):
            return "it updates its running statistics: use evaluation mode"
        return None

    @staticmethod
    def compose(
        input: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, use_input_stats: bool, momentum: float,
        eps: float,
    ) -> Any:  # fmt: skip
        """Normalise every channel over its positions, or all of them by what was given; then weight and bias."""
        if not use_input_stats:
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        return _by_channel(F.layer_norm(input, input.shape[2:], eps=eps), weight, bias)


@register(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, F.instance_norm)
class DualInstanceNorm(InstanceNorm):
    """Normalisation of every channel by itself, or by fixed statistics. Source: layer or batch normalisation of a channel."""

    @staticmethod
    def parameters(
        input: Any, running_mean: Any = None, running_var: Any = None, weight: Any = None, bias: Any = None,
        use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
    ) -> dict[str, Any]:  # fmt: skip
        """Name the arguments of ``F.instance_norm``."""
        return dict(locals())

    @staticmethod
    def from_module(module: nn.InstanceNorm1d, input: Any) -> dict[str, Any]:
        """Read the arguments off the module."""
        return {
            "input": input, "running_mean": module.running_mean, "running_var": module.running_var,
            "weight": module.weight, "bias": module.bias, "use_input_stats": module.training or not module.track_running_stats,
            "momentum": 0.0, "eps": module.eps,
        }  # fmt: skip

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield each dimension, parameters, a large eps, and running statistics, which must not move."""
        yield RuleSample("1d module", Call(waves(nn.InstanceNorm1d, 3, affine=True, eps=0.5)), ((2, 3, 4),), low=-3.0, high=3.0)
        yield RuleSample("2d module", Call(waves(nn.InstanceNorm2d, 2)), ((2, 2, 2, 2),), low=-3.0, high=3.0)
        tracking = waves(nn.InstanceNorm3d, 2, track_running_stats=True, affine=True)
        yield RuleSample("3d module, running statistics", Call(tracking), ((2, 2, 1, 2, 2),), low=-3.0, high=3.0)
        options = {"weight": wave(2), "bias": wave(2, phase=1.0), "eps": 0.1}
        yield RuleSample("function", Call(F.instance_norm, (INPUT,), options), ((2, 2, 3),), low=-3.0, high=3.0)
        updating = waves(nn.InstanceNorm1d, 3, track_running_stats=True).train()
        yield RuleSample("training mode", Call(updating), ((2, 3, 4),), error=ValueError, message="use evaluation mode")


@register(torch.instance_norm, _ATEN.instance_norm.default)
class DualInstanceNormTorch(InstanceNorm):
    """Instance normalisation in the argument order of ``torch.instance_norm``. Source: as the function."""

    @staticmethod
    def parameters(
        input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, use_input_stats: bool, momentum: float,
        eps: float, cudnn_enabled: bool,
    ) -> dict[str, Any]:  # fmt: skip
        """Name the arguments of ``torch.instance_norm``."""
        return {name: value for name, value in locals().items() if name != "cudnn_enabled"}

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield both kinds of statistics."""
        weight, bias, mean, variance = wave(2), wave(2, phase=1.0), wave(2, phase=2.0), 0.5 + wave(2).abs()
        own = Call(torch.instance_norm, (INPUT, weight, bias, None, None, True, 0.1, 0.5, False))
        yield RuleSample("own statistics", own, ((2, 2, 3),), low=-3.0, high=3.0)
        fixed = Call(_ATEN.instance_norm.default, (INPUT, weight, None, mean, variance, False, 0.1, 0.2, False))
        yield RuleSample("running statistics", fixed, ((2, 2, 3),), low=-3.0, high=3.0)
        updating = Call(torch.instance_norm, (INPUT, None, None, mean, variance, True, 0.1, 1e-5, False))
        yield RuleSample("updating", updating, ((2, 2, 3),), error=ValueError, message="use evaluation mode")


def _by_channel(input: Any, weight: Any, bias: Any) -> Any:
    """Apply one weight and one bias to each channel."""
    each = (-1, *[1] * (input.ndim - 2))
    input = input if weight is None else input * weight.reshape(each)
    return input if bias is None else input + bias.reshape(each)


@register(F.local_response_norm)
class DualLocalResponseNorm(OwnStatistics):
    """Division by a power of the squares of neighbouring channels. Source: its definition; curves of the parts."""

    @staticmethod
    def compose(input: Any, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Any:
        """Average the squares over channels, as pictures of one channel."""
        squares = input.square().flatten(2).unsqueeze(1)
        squares = F.avg_pool2d(F.pad(squares, (0, 0, size // 2, (size - 1) // 2)), (size, 1), stride=1).squeeze(1)
        return input * (squares.reshape_as(input) * alpha + k).pow(-beta)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield sequences and images, an even and an odd size, and every option."""
        yield RuleSample("sequences", Call(F.local_response_norm, (INPUT, 2)), ((2, 3, 4),), low=-3.0, high=3.0)
        every = Call(F.local_response_norm, (INPUT, 3, 0.5), {"beta": 0.6, "k": 2.0})
        yield RuleSample("images", every, ((2, 4, 2, 2),), low=-3.0, high=3.0)
        yield RuleSample(
            "vectors", Call(F.local_response_norm, (INPUT, 2)), ((2, 3),), error=ValueError, message="3D or higher"
        )
