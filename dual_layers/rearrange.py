"""Elements moved around: flips, shuffles, padding and windows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers.contract import Call, Facts, RuleSample
from dual_layers.registry import register
from dual_layers.shape import Merge, Rearrangement, example, perturbed_elsewhere
from dual_layers.spellings import spellings

aten = torch.ops.aten
_MODES = ("Reflection", "Replication", "Circular")
_PADDINGS = [getattr(nn, f"{mode}Pad{dimensions}d") for mode in _MODES for dimensions in (1, 2, 3)]


@register(
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    *spellings("flip", "fliplr", "flipud", "roll", "rot90", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
)
class DualShuffle(Rearrangement):
    """All elements, each once, in another order. Source: thesis, Corollary 3."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, injective=True, aliases=True)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every spelling."""
        yield example("flip", torch.flip, (1, 2))
        yield example("fliplr", "fliplr")
        yield example("flipud", "flipud", batch_axis=None)
        yield example("roll", "roll", (1, -2), (1, 2))
        yield example("roll through the batch", torch.roll, 1, batch_axis=None)
        yield example("rot90", torch.rot90, 3, (1, 2))
        yield example("nn.PixelShuffle", nn.PixelShuffle(2), shape=(2, 8, 2, 3))
        yield example("pixel_shuffle", F.pixel_shuffle, 2, shape=(2, 4, 2, 2))
        yield example("nn.PixelUnshuffle", nn.PixelUnshuffle(2), shape=(2, 2, 4, 2))
        yield example("pixel_unshuffle", aten.pixel_unshuffle.default, 2, shape=(2, 1, 4, 2))
        yield example("nn.ChannelShuffle", nn.ChannelShuffle(2), shape=(2, 6, 2, 2))
        yield example("channel_shuffle", F.channel_shuffle, 3, shape=(2, 6, 2, 2))
        wrong = "to be divisible by the square of upscale_factor"
        yield example("channels", F.pixel_shuffle, 2, shape=(2, 3, 2, 2), error=RuntimeError, message=wrong)


@register(
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
    *spellings("constant_pad_nd"),
)
class DualConstantPad(Merge):
    """Constants around the elements; negative widths crop. Source: thesis, Corollary 3."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, injective=True)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse perturbed widths and values."""
        return perturbed_elsewhere(call)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every dimension, a constant other than zero and a crop."""
        yield example("nn.ZeroPad1d", nn.ZeroPad1d((1, 2)))
        yield example("nn.ZeroPad2d", nn.ZeroPad2d((1, 0, 2, -1)))
        yield example("nn.ZeroPad3d", nn.ZeroPad3d(1), shape=(2, 2, 1, 2, 2))
        yield example("nn.ConstantPad1d", nn.ConstantPad1d(1, 3.5))
        yield example("nn.ConstantPad2d", nn.ConstantPad2d((0, 1, 1, 0), -1.0), shape=(2, 2, 2, 3))
        yield example("nn.ConstantPad3d", nn.ConstantPad3d((1, 0, 0, 1, 0, 0), 2.0), shape=(2, 1, 2, 2, 2))
        yield example("aten", aten.constant_pad_nd.default, [1, 1], 0.5)
        wrong = "length must be non-negative|negative output size"
        yield example("crop too much", nn.ZeroPad1d((-3, -2)), error=RuntimeError, message=wrong)


@register(
    *_PADDINGS,
    *spellings("pad", "_pad_circular"),
    *spellings(*(f"{mode}_pad{n}d" for mode in ("reflection", "replication") for n in (1, 2, 3))),
)
class DualPad(Merge):
    """Constants or copies of the elements around them, in any of the four modes. Source: thesis, Corollary 3."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, aliases=True)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse perturbed widths and values."""
        return perturbed_elsewhere(call)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every mode and dimension."""
        image, volume = (2, 2, 3, 4), (2, 1, 2, 3, 3)
        for mode in ("constant", "reflect", "replicate", "circular"):
            yield example(f"F.pad {mode}", F.pad, (1, 2, 0, 1), shape=image, kwargs={"mode": mode})
        yield example("F.pad with a value", F.pad, (1, -1), "constant", 3.0)
        yield example("F.pad of no width", F.pad, (0, 0))
        for number, pad in enumerate(_PADDINGS):
            shape = ((2, 3, 4), image, volume)[number % 3]
            yield example(pad.__name__, pad((1, 0, 0, 1, 1, 0)[: 2 * len(shape) - 4]), shape=shape)
        yield example("aten pad", aten.pad.default, [1, 1], "replicate")
        yield example("aten reflection", aten.reflection_pad2d.default, [1, 1, 0, 1], shape=image)
        wrong = "Padding size should be less than the corresponding input dimension"
        yield example("reflect too much", F.pad, (4, 0), "reflect", error=RuntimeError, message=wrong)


@register(F.unfold, F.fold, nn.Unfold, nn.Fold, aten.im2col.default, aten.col2im.default)
class DualPatches(Rearrangement):
    """Patches of an image cut out (unfold) or added up (fold). Source: thesis, Corollary 3."""

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield both directions and all parameters."""
        image = (2, 2, 4, 5)
        options = {"dilation": (1, 2), "padding": (1, 0), "stride": (2, 1)}
        yield example("F.unfold", F.unfold, (2, 3), shape=image)
        yield example("nn.Unfold", nn.Unfold((2, 2), **options), shape=image)
        yield example("F.fold", F.fold, (3, 3), 2, shape=(2, 8, 4))
        yield example("nn.Fold", nn.Fold((4, 5), (2, 2), **options), shape=(2, 4, 9))
        yield example("aten", aten.im2col.default, [2, 2], [1, 1], [0, 0], [2, 2], shape=image)
        wrong = "divisible by the product of kernel_size"
        yield example("wrong channels", F.fold, (3, 3), 2, shape=(2, 7, 4), error=RuntimeError, message=wrong)


@register("unfold", aten.unfold.default)
class DualWindows(Rearrangement):
    """Windows along one axis, laid along a new last one. Source: thesis, Corollary 3."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, aliases=True)

    @staticmethod
    def parameters(input: Any, dimension: int, size: int, step: int) -> dict[str, Any]:
        """Name the arguments of ``Tensor.unfold``."""
        return {"input": input, "dimension": dimension, "size": size, "step": step}

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Add the windows up for all rows at once; torch's derivative would take one row after another."""
        given = self.arguments
        shape = (len(nu), *inputs[0].shape)
        return (aten.unfold_backward(nu, shape, given.dimension % inputs[0].ndim + 1, given.size, given.step),)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield overlapping, disjoint and leftover windows."""
        yield example("overlapping", "unfold", 2, 2, 1)
        yield example("with a rest", "unfold", -1, 2, 3, shape=(2, 3, 6))
        yield example("aten", aten.unfold.default, 1, 3, 3, shape=(2, 6))
        wrong = "maximum size for tensor at dimension 2 is 4"
        yield example("too large", "unfold", 2, 5, 1, error=RuntimeError, message=wrong)
