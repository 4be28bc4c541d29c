"""Convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers.contract import INPUT, Call, Facts, Field, RuleSample, Slot
from dual_layers.families import Affine, root_of_squares
from dual_layers.refusals import unless_only
from dual_layers.registry import register
from dual_layers.sample_values import wave, waves

_ATEN = torch.ops.aten
_FEW = 4
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONVOLVE_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Convolution(Affine, ABC):
    """What all spellings share: the geometry, and that each of the two convolutions is the other's transpose.

    A rule names its arguments ``input, weight, stride, padding, padding_mode, dilation, groups, transposed,
    output_padding, output_size``; everything is computed from those.
    """

    facts: ClassVar[Facts] = Facts(affine=True)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a perturbed weight or bias."""
        return unless_only(cls, call, "input")

    def linear(self, *tangents: Tensor) -> Tensor:
        """Convolve without the bias."""
        arguments = self.arguments
        return _apply(tangents[0], arguments, arguments.weight)

    def magnitude(self, *radii: Tensor) -> Tensor:
        """Convolve with the absolute weight."""
        arguments = self.arguments
        return _apply(radii[0], arguments, arguments.weight.abs())

    def euclidean(self, *lengths: Tensor) -> Tensor | None:
        """Convolve squares with the squared weight; not where padding may bring one element into a window twice."""
        arguments = self.arguments
        if not arguments.transposed and arguments.padding_mode != "zeros":
            return None
        return root_of_squares(_apply(lengths[0].double().square(), arguments, arguments.weight.double().square()), lengths[0])

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Convolve the other way, with the rows folded into the batch: one large convolution, no vmap."""
        arguments = self.arguments
        dimensions = arguments.weight.dim() - 2
        batched = inputs[0].dim() == dimensions + 2
        flat = nu.flatten(0, 1) if batched else nu
        size = inputs[0].shape[-dimensions:]
        pull = _pull_transposed if arguments.transposed else _pull
        result = pull(flat, arguments, size)
        return (result.unflatten(0, nu.shape[:2]) if batched else result,)

    def field(self) -> Field | None:
        """Return the reach of a plain convolution whose padding is zeros."""
        arguments = self.arguments
        if arguments.transposed or arguments.padding_mode != "zeros":
            return None
        kernel, stride, dilation = _geometry(arguments)
        amounts, padding = _padding(arguments)
        before = amounts[::2][::-1] or padding
        extent = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
        return Field(extent, stride, tuple(before))

    def pull_windows(self, nu: Tensor) -> Tensor:
        """Transpose the convolution without its padding."""
        arguments = self.arguments
        kernel, stride, dilation = _geometry(arguments)
        none = (0,) * len(kernel)
        if len(nu) and _has_few_inputs(arguments):
            axes = zip(nu.shape[2:], kernel, stride, dilation, strict=True)
            window = tuple((n - 1) * s + d * (k - 1) + 1 for n, k, s, d in axes)
            return _scatter(nu, arguments.weight, window, kernel, dilation, none, stride)
        return _CONVOLVE_TRANSPOSED[len(kernel)](nu, arguments.weight, None, stride, none, none, arguments.groups, dilation)

    def has_phases(self) -> bool:
        """Tell whether there are strides, and nothing that phases cannot hold."""
        arguments, field = self.arguments, self.field()
        if field is None or arguments.groups > 1:
            return False
        _, stride, dilation = _geometry(arguments)
        return max(stride) > 1 and max(dilation) == 1

    def pull_in_phases(self, nu: Tensor) -> Tensor:
        """Convolve plainly: every phase of the input meets each ``stride``-th row of the kernel, whatever its place."""
        return _in_phases(nu, self.arguments)


def _per_axis(value: Any, dimensions: int) -> tuple[int, ...]:
    """Spread a number, or the one number in a sequence, over the spatial axes."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dimensions if len(values) == 1 else values


def _geometry(arguments: SimpleNamespace) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return kernel size, stride and dilation per spatial axis."""
    kernel = tuple(arguments.weight.shape[2:])
    return kernel, _per_axis(arguments.stride, len(kernel)), _per_axis(arguments.dilation, len(kernel))


def _padding(arguments: SimpleNamespace) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Split the padding into what ``F.pad`` must add beforehand and what the convolution adds itself.

    Returns:
        The amounts for ``F.pad``, empty if there is nothing to add, and the convolution's own padding per axis.
    """
    kernel, _, dilation = _geometry(arguments)
    none = (0,) * len(kernel)
    if arguments.padding == "valid":
        return (), none
    if arguments.padding == "same":  # an even kernel needs one more element on the right
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(amount, amount) for amount in _per_axis(arguments.padding, len(kernel))]
    if arguments.padding_mode == "zeros" and all(left == right for left, right in sides):
        return (), tuple(left for left, _ in sides)
    return tuple(amount for side in reversed(sides) for amount in side), none


def _pad(z: Tensor, amounts: tuple[int, ...], arguments: SimpleNamespace) -> Tensor:
    mode = "constant" if arguments.padding_mode == "zeros" else arguments.padding_mode
    return F.pad(z, amounts, mode=mode) if amounts else z


def _apply(z: Tensor, arguments: SimpleNamespace, weight: Tensor) -> Tensor:
    """Run the convolution, in either direction, with another weight and no bias."""
    kernel, stride, dilation = _geometry(arguments)
    if not arguments.transposed:
        amounts, padding = _padding(arguments)
        z = _pad(z, amounts, arguments)
        return _CONVOLVE[len(kernel)](z, weight, None, stride, padding, dilation, arguments.groups)
    padding = _per_axis(arguments.padding, len(kernel))
    extra = _per_axis(arguments.output_padding, len(kernel))
    if arguments.output_size is not None:
        smallest = _smallest_source(z.shape[-len(kernel) :], arguments, padding)
        extra = tuple(n - m for n, m in zip(arguments.output_size[-len(kernel) :], smallest, strict=True))
    return _CONVOLVE_TRANSPOSED[len(kernel)](z, weight, None, stride, padding, extra, arguments.groups, dilation)


def _smallest_source(size: tuple[int, ...], arguments: SimpleNamespace, padding: tuple[int, ...]) -> tuple[int, ...]:
    """Return the smallest size that a convolution maps to ``size``; its stride makes larger ones possible."""
    axes = zip(size, *_geometry(arguments), padding, strict=True)
    return tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, d, p in axes)


def _pull(nu: Tensor, arguments: SimpleNamespace, size: tuple[int, ...]) -> Tensor:
    """Transpose a convolution: which of the possible input sizes it is, only the input can tell."""
    kernel, stride, dilation = _geometry(arguments)
    amounts, padding = _padding(arguments)
    added = [amounts[i] + amounts[i + 1] for i in range(0, len(amounts), 2)][::-1] or [0] * len(kernel)
    padded = tuple(n + a for n, a in zip(size, added, strict=True))
    if len(nu) and _has_few_inputs(arguments):
        if nu.requires_grad and torch.is_grad_enabled() and max(stride) > 1 and max(dilation) == 1:
            result = _woven(nu, arguments, padded, padding)
        else:
            result = _scatter(nu, arguments.weight, padded, kernel, dilation, padding, stride)
    else:
        smallest = _smallest_source(nu.shape[-len(kernel) :], arguments, padding)
        extra = tuple(n - m for n, m in zip(padded, smallest, strict=True))
        convolve = _CONVOLVE_TRANSPOSED[len(kernel)]
        result = convolve(nu, arguments.weight, None, stride, padding, extra, arguments.groups, dilation)
    if not amounts or not len(nu):
        return result[(..., *(slice(n) for n in size))]
    with torch.enable_grad():
        image = nu.new_zeros((1, result.shape[1], *size)).requires_grad_()
        wide = _pad(image, amounts, arguments)
    (result,) = torch.autograd.grad(
        wide, image, result.unsqueeze(1), is_grads_batched=True, create_graph=torch.is_grad_enabled()
    )
    return result.squeeze(1)


def _has_few_inputs(arguments: SimpleNamespace) -> bool:
    """Whether it is faster to transpose a convolution by a matrix product and a scatter: for images' few channels it is."""
    weight = arguments.weight
    few = weight.shape[1] <= _FEW or math.prod(weight.shape[1:]) <= weight.shape[0]
    return weight.dim() == 4 and arguments.groups == 1 and few


def _scatter(nu: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
    """Transpose as a matrix product and a scatter: faster than ``conv_transpose2d`` for few input channels."""
    columns = weight.flatten(1).t().expand(len(nu), -1, -1) @ nu.flatten(-2)  # expanded: else matmul transposes all of nu
    return F.fold(columns, *geometry)


def _in_phases(nu: Tensor, arguments: SimpleNamespace) -> Tensor:
    """Transpose without padding by a plain convolution: ``[rows, channels, *phases, *places]``."""
    kernel, stride, _ = _geometry(arguments)
    axes = len(kernel)
    taps = tuple(-(-k // s) for k, s in zip(kernel, stride, strict=True))
    wide = [(0, t * s - k) for t, s, k in zip(taps, stride, kernel, strict=True)]
    weight = F.pad(arguments.weight, [side for pair in reversed(wide) for side in pair])
    weight = weight.reshape(*weight.shape[:2], *(size for pair in zip(taps, stride, strict=True) for size in pair))
    weight = weight.permute(1, *range(3, 3 + 2 * axes, 2), 0, *range(2, 2 + 2 * axes, 2))
    weight = weight.flatten(0, axes).flip(tuple(range(2, 2 + axes)))
    result = _CONVOLVE[axes](nu, weight, None, 1, tuple(t - 1 for t in taps))
    return result.unflatten(1, (-1, *stride))


def _woven(nu: Tensor, arguments: SimpleNamespace, size: tuple[int, ...], padding: tuple[int, ...]) -> Tensor:
    """Transpose in phases and weave these: the derivative is a plain convolution, where a scatter's gathers again."""
    phases = _in_phases(nu, arguments)
    axes, places = len(size), phases.shape[2 + len(size) :]
    woven = phases.permute(0, 1, *(axis for i in range(axes) for axis in (2 + axes + i, 2 + i)))
    _, stride, _ = _geometry(arguments)
    woven = woven.reshape(*phases.shape[:2], *(n * s for n, s in zip(places, stride, strict=True)))
    missing = [(0, max(0, n + p - m)) for n, p, m in zip(size, padding, woven.shape[2:], strict=True)]
    woven = F.pad(woven, [side for pair in reversed(missing) for side in pair])
    return woven[(..., *(slice(p, p + n) for n, p in zip(size, padding, strict=True)))]


def _pull_transposed(nu: Tensor, arguments: SimpleNamespace, size: tuple[int, ...]) -> Tensor:
    """Transpose a transposed convolution: convolve, and drop windows that lie in the output padding only."""
    kernel, stride, dilation = _geometry(arguments)
    padding = _per_axis(arguments.padding, len(kernel))
    result = _CONVOLVE[len(kernel)](nu, arguments.weight, None, stride, padding, dilation, arguments.groups)
    for axis, n in enumerate(size, start=-len(kernel)):
        result = result.narrow(axis, 0, n)
    return result


@register(
    nn.Conv1d, nn.Conv2d, nn.Conv3d, F.conv1d, F.conv2d, F.conv3d,
    _ATEN.conv1d.default, _ATEN.conv2d.default, _ATEN.conv3d.default,
    _ATEN.conv1d.padding, _ATEN.conv2d.padding, _ATEN.conv3d.padding,
)  # fmt: skip
class DualConv(Convolution):
    """Convolution with every padding, padding mode, stride, dilation and grouping. Source: thesis, Corollary 3.

    ``magnitude`` equals ``|A| r`` except where reflected or replicated padding brings one element into a window twice:
    its two weights are then taken absolutely one by one, which is an upper bound.
    """

    source: ClassVar[str] = "thesis, Corollary 3"

    @staticmethod
    def parameters(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
    ) -> dict[str, Any]:
        """Name the arguments of ``F.conv2d``."""
        return {
            "input": input, "weight": weight, "bias": bias, "stride": stride, "padding": padding, "padding_mode": "zeros",
            "dilation": dilation, "groups": groups, "transposed": False,
        }  # fmt: skip

    @staticmethod
    def from_module(module: nn.Conv2d, input: Any) -> dict[str, Any]:
        """Read the arguments off the module."""
        return {
            "input": input, "weight": module.weight, "bias": module.bias, "stride": module.stride, "padding": module.padding,
            "padding_mode": module.padding_mode, "dilation": module.dilation, "groups": module.groups, "transposed": False,
        }  # fmt: skip

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every parameter with asymmetric sizes, and strides that leave a remainder."""
        weight = wave(6, 2, 3, 2)
        image = ((2, 4, 7, 6),)
        options = {"stride": (2, 3), "padding": (1, 2), "dilation": (2, 1), "groups": 2}
        yield RuleSample("2d, all options", Call(F.conv2d, (INPUT, weight, wave(6)), options), image)
        yield RuleSample("2d, same, even kernel", Call(F.conv2d, (INPUT, weight), {"padding": "same", "groups": 2}), image)
        unbatched = Call(F.conv2d, (INPUT, wave(3, 4, 3, 2)), {"stride": 2})
        yield RuleSample("2d, unbatched", unbatched, ((4, 6, 5),), batch_axis=None)
        for mode in ("zeros", "circular", "reflect", "replicate"):
            module = waves(nn.Conv2d, 4, 6, (3, 2), stride=2, padding=(2, 1), dilation=(1, 2), groups=2, padding_mode=mode)
            yield RuleSample(f"2d module, {mode}", Call(module), image)
            module = waves(nn.Conv1d, 2, 3, 4, padding="same", dilation=2, padding_mode=mode, bias=False)
            yield RuleSample(f"1d module, same, {mode}", Call(module), ((3, 2, 8),))
            module = waves(nn.Conv3d, 2, 2, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), padding_mode=mode)
            yield RuleSample(f"3d module, {mode}", Call(module), ((1, 2, 2, 5, 3),))
        yield RuleSample("1d, remainder", Call(F.conv1d, (INPUT, wave(3, 2, 2), wave(3), 3, 1)), ((2, 2, 9),))
        yield RuleSample("1d, padding beyond the kernel", Call(F.conv1d, (INPUT, wave(3, 2, 2), None, 2, 3)), ((2, 2, 4),))
        yield RuleSample("3d", Call(F.conv3d, (INPUT, wave(2, 1, 2, 1, 2), None, 2, 1, 1, 2)), ((2, 2, 3, 2, 4),))
        yield RuleSample("aten", Call(_ATEN.conv2d.default, (INPUT, weight, None, [2, 2], [1, 0], [1, 1], 2)), image)
        yield RuleSample("aten, same", Call(_ATEN.conv2d.padding, (INPUT, wave(2, 4, 2, 3), None, [1, 1], "same")), image)
        yield RuleSample("wrong channels", Call(F.conv2d, (INPUT, weight)), image, error=RuntimeError, message="channels")
        dynamic = Call(F.conv2d, (INPUT, Slot(1)))
        yield RuleSample(
            "perturbed weight", dynamic, (*image, (6, 4, 3, 2)), error=ValueError, message="weight must not depend"
        )


@register(
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    _ATEN.conv_transpose1d.default, _ATEN.conv_transpose2d.input, _ATEN.conv_transpose3d.input,
)  # fmt: skip
class DualConvTranspose(Convolution):
    """Transposed convolution; its transpose is the plain one. Source: thesis, Corollary 3."""

    source: ClassVar[str] = "thesis, Corollary 3"

    @staticmethod
    def parameters(
        input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
        groups: int = 1, dilation: Any = 1,
    ) -> dict[str, Any]:  # fmt: skip
        """Name the arguments of ``F.conv_transpose2d``."""
        return {
            "input": input, "weight": weight, "bias": bias, "stride": stride, "padding": padding, "dilation": dilation,
            "groups": groups, "transposed": True, "output_padding": output_padding, "output_size": None,
        }  # fmt: skip

    @staticmethod
    def from_module(module: nn.ConvTranspose2d, input: Any, output_size: Any = None) -> dict[str, Any]:
        """Read the arguments off the module; ``output_size`` overrides its output padding."""
        return {
            "input": input, "weight": module.weight, "bias": module.bias, "stride": module.stride, "padding": module.padding,
            "dilation": module.dilation, "groups": module.groups, "transposed": True,
            "output_padding": module.output_padding, "output_size": output_size,
        }  # fmt: skip

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every parameter with asymmetric sizes; output padding up to and beyond the stride."""
        weight = wave(4, 3, 3, 2)
        image = ((2, 4, 3, 4),)
        options = {"stride": (3, 2), "padding": (1, 2), "output_padding": (2, 1), "groups": 2, "dilation": (1, 2)}
        yield RuleSample("2d, all options", Call(F.conv_transpose2d, (INPUT, weight, wave(6)), options), image)
        beyond = {"output_padding": 1, "dilation": 2}
        yield RuleSample("2d, output padding beyond the stride", Call(F.conv_transpose2d, (INPUT, weight), beyond), image)
        module = waves(nn.ConvTranspose2d, 4, 2, (2, 3), stride=2, padding=1, groups=2, bias=False)
        yield RuleSample("2d module", Call(module), image)
        module = waves(nn.ConvTranspose2d, 4, 2, 3, stride=3, padding=1)
        yield RuleSample("2d module, output size", Call(module, (INPUT,), {"output_size": (8, 12)}), image)
        module = waves(nn.ConvTranspose1d, 2, 3, 4, stride=3, output_padding=2)
        yield RuleSample("1d module", Call(module), ((3, 2, 4),))
        module = waves(nn.ConvTranspose3d, 2, 1, (1, 3, 2), stride=(1, 2, 3), output_padding=(0, 1, 2))
        yield RuleSample("3d module", Call(module), ((1, 2, 2, 3, 2),))
        yield RuleSample("unbatched", Call(F.conv_transpose1d, (INPUT, wave(2, 3, 2), wave(3), 2)), ((2, 5),), batch_axis=None)
        aten = Call(_ATEN.conv_transpose2d.input, (INPUT, weight, None, [2, 2], [0, 1], [1, 0], 2, [1, 1]))
        yield RuleSample("aten", aten, image)
        wrong = Call(F.conv_transpose2d, (INPUT, weight))
        yield RuleSample("wrong channels", wrong, ((2, 3, 3, 4),), error=RuntimeError, message="channels")


@register(_ATEN.convolution.default, torch.convolution)
class DualConvolution(Convolution):
    """The general spelling that exported programs use, in both directions. Source: thesis, Corollary 3."""

    source: ClassVar[str] = "thesis, Corollary 3"

    @staticmethod
    def parameters(
        input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, output_padding: Any,
        groups: int,
    ) -> dict[str, Any]:  # fmt: skip
        """Name the arguments of ``torch.convolution``."""
        return {
            "input": input, "weight": weight, "bias": bias, "stride": stride, "padding": padding, "padding_mode": "zeros",
            "dilation": dilation, "groups": groups, "transposed": transposed, "output_padding": output_padding,
            "output_size": None,
        }  # fmt: skip

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield both directions."""
        plain = (INPUT, wave(6, 2, 3, 2), wave(6), [2, 3], [1, 0], [1, 2], False, [0, 0], 2)
        yield RuleSample("plain", Call(_ATEN.convolution.default, plain), ((2, 4, 6, 6),))
        transposed = (INPUT, wave(4, 3, 3, 2), wave(6), [2, 3], [1, 0], [1, 2], True, [1, 2], 2)
        yield RuleSample("transposed", Call(torch.convolution, transposed), ((2, 4, 3, 4),))
        sequence = (INPUT, wave(3, 2, 2), None, [2], [1], [1], False, [0], 1)
        yield RuleSample("1d", Call(torch.convolution, sequence), ((2, 2, 6),))
        wrong = Call(torch.convolution, plain)
        yield RuleSample("wrong channels", wrong, ((2, 3, 6, 6),), error=RuntimeError, message="channels")
