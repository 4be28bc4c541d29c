"""Batch normalisation with fixed statistics: an affine map of each channel."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers.contract import INPUT, Call, Facts, RuleSample
from dual_layers.families import Affine
from dual_layers.refusals import named_arguments, unless_only
from dual_layers.registry import register
from dual_layers.sample_values import wave, waves

_ATEN = torch.ops.aten


class BatchNorm(Affine, ABC):
    """What the spellings share: ``A`` is the diagonal ``weight / sqrt(variance + eps)``, one number per channel."""

    facts: ClassVar[Facts] = Facts(affine=True, positionwise=True, injective=True)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse batch statistics, which mix the examples, and perturbed parameters."""
        reason = unless_only(cls, call, "input")
        if reason is None and named_arguments(cls, call).training is not False:
            reason = "statistics of the batch are not affine in the input: use evaluation mode with running statistics"
        return reason

    def _scale(self, z: Tensor) -> Tensor:
        """Return the diagonal of ``A`` so that it broadcasts against ``z``, of any number of leading axes."""
        arguments = self.arguments
        scale = torch.rsqrt(arguments.running_var + arguments.eps)
        if arguments.weight is not None:
            scale = scale * arguments.weight
        return scale.to(z.dtype).reshape(-1, *[1] * (z.dim() - 2))

    def linear(self, *tangents: Tensor) -> Tensor:
        """Scale each channel."""
        return tangents[0] * self._scale(tangents[0])

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Scale each channel: a diagonal is its own transpose."""
        return (nu * self._scale(inputs[0]).to(nu.dtype),)

    def magnitude(self, *radii: Tensor) -> Tensor:
        """Scale each channel by the absolute value."""
        return radii[0] * self._scale(radii[0]).abs()


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, F.batch_norm)
class DualBatchNorm(BatchNorm):
    """Batch norm in evaluation mode. Source: thesis, Corollary 7, with the shift corrected to ``beta - gamma mu / sigma``."""

    source: ClassVar[str] = "thesis, Corollary 7 (corrected)"

    @staticmethod
    def parameters(
        input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: Any = False,
        momentum: float = 0.1, eps: float = 1e-5,
    ) -> dict[str, Any]:  # fmt: skip
        """Name the arguments of ``F.batch_norm``."""
        return {
            "input": input, "running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias,
            "training": training, "eps": eps,
        }  # fmt: skip

    @staticmethod
    def from_module(module: nn.BatchNorm2d, input: Any) -> dict[str, Any]:
        """Read the arguments off the module; without running statistics it always uses the batch's."""
        return {
            "input": input, "running_mean": module.running_mean, "running_var": module.running_var,
            "weight": module.weight, "bias": module.bias, "eps": module.eps,
            "training": module.training or module.running_mean is None or module.running_var is None,
        }  # fmt: skip

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield each dimension, with and without parameters, and a large eps that must not be forgotten."""
        yield RuleSample("1d module, no positions", Call(waves(nn.BatchNorm1d, 3)), ((4, 3),))
        yield RuleSample("1d module", Call(waves(nn.BatchNorm1d, 3, eps=0.5)), ((2, 3, 5),))
        yield RuleSample("2d module", Call(waves(nn.BatchNorm2d, 3)), ((2, 3, 4, 2),))
        yield RuleSample("2d module, not affine", Call(waves(nn.BatchNorm2d, 3, affine=False)), ((1, 3, 4, 2),))
        yield RuleSample("3d module", Call(waves(nn.BatchNorm3d, 2)), ((2, 2, 3, 1, 2),))
        yield RuleSample("synchronised", Call(waves(nn.SyncBatchNorm, 3)), ((2, 3, 4),))
        mean, variance = wave(3), 0.5 + wave(3).abs()
        options = {"weight": wave(3, phase=1.0), "bias": wave(3, phase=2.0), "eps": 0.1}
        yield RuleSample("function", Call(F.batch_norm, (INPUT, mean, variance), options), ((2, 3, 4),))
        yield RuleSample("function, weight only", Call(F.batch_norm, (INPUT, mean, variance, wave(3))), ((2, 3),))
        yield RuleSample("wrong channels", Call(waves(nn.BatchNorm1d, 3)), ((2, 4),), error=RuntimeError, message="elements")
        training = Call(waves(nn.BatchNorm1d, 3).train())
        yield RuleSample("training mode", training, ((2, 3),), error=ValueError, message="statistics of the batch")
        untracked = Call(waves(nn.BatchNorm1d, 3, track_running_stats=False))
        yield RuleSample("no statistics", untracked, ((2, 3),), error=ValueError, message="statistics of the batch")


@register(torch.batch_norm, _ATEN.batch_norm.default)
class DualBatchNormTorch(BatchNorm):
    """Batch norm in the argument order of ``torch.batch_norm``. Source: thesis, Corollary 7 (corrected)."""

    source: ClassVar[str] = "thesis, Corollary 7 (corrected)"

    @staticmethod
    def parameters(
        input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: Any, momentum: float, eps: float,
        cudnn_enabled: bool,
    ) -> dict[str, Any]:  # fmt: skip
        """Name the arguments of ``torch.batch_norm``."""
        return {
            "input": input, "running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias,
            "training": training, "eps": eps,
        }  # fmt: skip

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield both spellings."""
        weight, bias, mean, variance = wave(3), wave(3, phase=1.0), wave(3, phase=2.0), 0.5 + wave(3).abs()
        call = Call(torch.batch_norm, (INPUT, weight, bias, mean, variance, False, 0.1, 0.2, False))
        yield RuleSample("torch", call, ((2, 3, 4),))
        call = Call(_ATEN.batch_norm.default, (INPUT, None, None, mean, variance, False, 0.1, 1e-5, False))
        yield RuleSample("aten, no parameters", call, ((2, 3, 2, 3),))
        yield RuleSample("wrong channels", call, ((2, 4),), error=RuntimeError, message="elements")


@register(_ATEN._native_batch_norm_legit_no_training.default)
class DualBatchNormNative(BatchNorm):
    """Batch norm as a decomposed exported program spells it: the first of three results. Source: thesis, Corollary 7."""

    facts: ClassVar[Facts] = Facts(affine=True, positionwise=True, injective=True, outputs_tuple=True)
    source: ClassVar[str] = "thesis, Corollary 7 (corrected)"

    @staticmethod
    def parameters(
        input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: float, eps: float
    ) -> dict[str, Any]:
        """Name the arguments of ``aten._native_batch_norm_legit_no_training``."""
        return {
            "input": input, "running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias,
            "training": False, "eps": eps,
        }  # fmt: skip

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse the saved statistics, which are empty in evaluation mode."""
        if call.item != 0:
            return "only the normalised output (item 0) has a dual, not the saved statistics"
        return super().refuse(call)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield item 0 with and without parameters."""
        operator, mean, variance = _ATEN._native_batch_norm_legit_no_training.default, wave(3), 0.5 + wave(3).abs()
        full = (INPUT, wave(3, phase=1.0), wave(3, phase=2.0), mean, variance, 0.1, 0.2)
        yield RuleSample("with parameters", Call(operator, full, item=0), ((2, 3, 4, 2),))
        yield RuleSample("no parameters", Call(operator, (INPUT, None, None, mean, variance, 0.1, 1e-5), item=0), ((2, 3),))
        wrong = Call(operator, full, item=0)
        yield RuleSample("wrong channels", wrong, ((2, 4),), error=RuntimeError, message="must match|elements")
