"""Resampling of images and sequences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers.contract import INPUT, Call, Facts, RuleSample
from dual_layers.linear import Homogeneous
from dual_layers.registry import register

_ATEN = torch.ops.aten
_OVERLOADS = [
    getattr(getattr(_ATEN, name), overload)
    for name in (
        "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
        "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d",
        "upsample_trilinear3d", "_upsample_bilinear2d_aa", "upsample_bicubic2d", "_upsample_bicubic2d_aa",
    )
    for overload in ("default", "vec")
]  # fmt: skip


@register(
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d,
    F.interpolate, F.upsample, F.upsample_nearest, F.upsample_bilinear, *_OVERLOADS,
)  # fmt: skip
class DualInterpolate(Homogeneous):
    """Interpolation in every mode; bicubic weights are of both signs, all others non-negative. Source: design, section 1."""

    facts: ClassVar[Facts] = Facts(affine=True)
    source: ClassVar[str] = "design, section 1"

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Fold the rows of nearest-exact, whose derivative torch cannot vmap at speed, into the batch; leave the others."""
        example = inputs[0].shape[1:]
        if not self._uses("nearest-exact", "nearest_exact"):
            return super().transpose(nu, (nu.new_empty((nu.shape[1], *example)),))
        with torch.enable_grad():
            source = nu.new_zeros((len(nu) * nu.shape[1], *example)).requires_grad_()
            result = self.call(source)
        (pulled,) = torch.autograd.grad(result, source, nu.flatten(0, 1), create_graph=torch.is_grad_enabled())
        return (pulled.unflatten(0, nu.shape[:2]),)

    def magnitude(self, *radii: Tensor) -> Tensor:
        """Interpolate with absolute weights.

        The weights are the product of a matrix for each of the two axes, whose rows sum to one. So the operator itself,
        run on an image of the k-th unit vector along one axis and constant along the other, gives that axis' column k.
        """
        if not self._uses("bicubic"):
            return self.call(*radii)
        radius = radii[0]
        height, width = radius.shape[-2:]
        unit = {"dtype": radius.dtype, "device": radius.device}
        rows = self.call(torch.eye(height, **unit).unsqueeze(-1).expand(-1, -1, width).unsqueeze(0))[0, :, :, 0]
        columns = self.call(torch.eye(width, **unit).unsqueeze(1).expand(-1, height, -1).unsqueeze(0))[0, :, 0, :]
        return rows.abs().mT @ radius @ columns.abs()

    def _uses(self, *modes: str) -> bool:
        """Tell whether this is one of the modes; an overload has it in its name."""
        call = self.call
        if isinstance(call.operator, nn.Module):
            return call.operator.mode in modes
        words = [word for word in (*call.args, *call.kwargs.values(), str(call.operator)) if isinstance(word, str)]
        return any(mode in word for mode in modes for word in words)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield every mode, up and down, by size and by factor, aligned and not."""
        image, sequence, volume = ((2, 3, 4, 5),), ((2, 3, 5),), ((1, 2, 2, 3, 3),)

        def interpolate(**options: Any) -> Call:
            return Call(F.interpolate, (INPUT,), options)

        yield RuleSample("nearest", Call(nn.Upsample(scale_factor=2)), image)
        yield RuleSample("nearest, 1d, factor", interpolate(scale_factor=1.7), sequence)
        yield RuleSample("nearest, 3d", interpolate(size=(3, 2, 5)), volume)
        yield RuleSample("nearest-exact", interpolate(size=(7, 3), mode="nearest-exact"), image)
        yield RuleSample("linear", interpolate(size=8, mode="linear"), sequence)
        yield RuleSample("bilinear", Call(nn.Upsample(scale_factor=(2, 1.5), mode="bilinear")), image)
        yield RuleSample("bilinear, aligned", interpolate(size=(3, 9), mode="bilinear", align_corners=True), image)
        yield RuleSample("bilinear, antialiased", interpolate(size=(2, 3), mode="bilinear", antialias=True), image)
        recomputed = interpolate(scale_factor=1.3, mode="bilinear", recompute_scale_factor=True)
        yield RuleSample("bilinear, recomputed factor", recomputed, image)
        yield RuleSample("trilinear", interpolate(size=(3, 2, 5), mode="trilinear"), volume)
        yield RuleSample("area", interpolate(size=(3, 2), mode="area"), image)
        yield RuleSample("bicubic", interpolate(scale_factor=(1.5, 0.7), mode="bicubic"), image)
        yield RuleSample("bicubic, aligned", Call(nn.Upsample(size=(3, 7), mode="bicubic", align_corners=True)), image)
        yield RuleSample("bicubic, antialiased", interpolate(size=(3, 2), mode="bicubic", antialias=True), image)
        yield RuleSample("aten bicubic", Call(_ATEN.upsample_bicubic2d.vec, (INPUT, [5, 9], False, None)), image)
        yield RuleSample("aten bilinear", Call(_ATEN.upsample_bilinear2d.vec, (INPUT, None, False, [2.0, 2.0])), image)
        yield RuleSample("aten nearest-exact", Call(_ATEN._upsample_nearest_exact2d.vec, (INPUT, [5, 3], None)), image)
        yield RuleSample("aten nearest", Call(_ATEN.upsample_nearest2d.default, (INPUT, [5, 3])), image)
        wrong = interpolate(scale_factor=2, mode="bilinear")
        yield RuleSample("wrong axes", wrong, sequence, error=NotImplementedError, message="bilinear")
