"""Operators that hand the values on: copies, conversions, and dropout in evaluation mode."""

from __future__ import annotations

import operator
from abc import ABC
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers.contract import INPUT, Call, Facts, Interval, RuleSample, Slot, slots
from dual_layers.linear import Homogeneous
from dual_layers.registry import register, spelling
from dual_layers.sample_values import wave

_ATEN = torch.ops.aten
_WIDE = (torch.float32, torch.float64)


class Identity(Homogeneous, ABC):
    """``f(z) = z`` in real arithmetic. The transpose is written out, since the derivative of ``detach`` is zero."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, positionwise=True, injective=True, aliases=True)
    source: ClassVar[str] = "design, section 1"

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Hand ``nu`` back in the input's dtype and on its device; an input that only lent its dtype gets zeros."""
        source, *lenders = inputs
        zeros = (nu.new_zeros((len(nu), *z.shape), dtype=z.dtype, device=z.device) for z in lenders)
        return (nu.to(device=source.device, dtype=source.dtype), *zeros)


class Conversion(Identity, ABC):
    """Another dtype or device, of 32 or 64 bits: fewer round by more than the bounds allow for, and integers truncate."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """Convert; a dtype taken from another tensor is known only now."""
        result = self.call(*inputs)
        if result.dtype not in (*_WIDE, inputs[0].dtype):
            raise TypeError(_not_wide(result.dtype))
        return result


def _not_wide(dtype: torch.dtype) -> str:
    return f"conversion to {dtype} rounds or truncates: bounds follow torch.float32 and torch.float64 only"


@register(
    nn.Identity, operator.pos, torch.positive, "positive", "__pos__", "contiguous",
    _ATEN.contiguous.default, _ATEN.alias.default, _ATEN.positive.default,
)  # fmt: skip
class DualIdentity(Identity):
    """The input itself, or another view of the same memory. Source: design, section 1."""

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, also with a memory format."""
        yield RuleSample("module", Call(nn.Identity()), ((2, 3),))
        yield RuleSample("contiguous", Call("contiguous", (INPUT,), {"memory_format": torch.channels_last}), ((2, 3, 4, 5),))
        yield RuleSample("aten", Call(_ATEN.alias.default), ((2, 3),))
        wrong = Call("contiguous", (INPUT,), {"memory_format": torch.channels_last})
        yield RuleSample("wrong rank", wrong, ((2, 3),), error=RuntimeError, message="rank 4")


@register(torch.detach, "detach", _ATEN.detach.default)
class DualDetach(Identity):
    """The input without its derivative. Source: design, section 1.

    The primal walk cuts the derivative as the model does. A bound is a function of the parameters in its own right: it
    depends on what was detached as much as on anything else, and its derivative says so.
    """

    def linear(self, *tangents: Tensor) -> Tensor:
        """Hand on."""
        return tangents[0]

    def interval(self, *boxes: Interval) -> Interval:
        """Hand on."""
        return boxes[0]

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("method", Call("detach"), ((2, 3),))
        yield RuleSample("aten", Call(_ATEN.detach.default), ((2, 3, 2),))


@register(torch.clone, "clone", _ATEN.clone.default, _ATEN.lift_fresh_copy.default)
class DualClone(Identity):
    """A copy in fresh memory: changing it leaves the input alone. Source: design, section 1."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, positionwise=True, injective=True)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("function", Call(torch.clone), ((2, 3),))
        yield RuleSample("method", Call("clone", (INPUT,), {"memory_format": torch.contiguous_format}), ((2, 3, 4),))


@register(
    "to", "float", "double", "cpu", "cuda", _ATEN.to.dtype, _ATEN.to.dtype_layout, _ATEN.to.device, _ATEN._to_copy.default,
)  # fmt: skip
class DualConvert(Conversion):
    """Another dtype or device, by name or like a constant. Source: design, section 1."""

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse conversion to integers, booleans and half precision."""
        if call.arity != 1:
            return "to(other) with another tensor that depends on the input: write to(other.dtype) or type_as(other)"
        wrong = [v for v in (*call.args, *call.kwargs.values()) if isinstance(v, torch.dtype) and v not in _WIDE]
        return _not_wide(wrong[0]) if wrong else None

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield each spelling, also with the dtype of another input, and a dtype that truncates."""
        yield RuleSample("to double", Call("to", (INPUT, torch.float64)), ((2, 3),))
        yield RuleSample("to device and dtype", Call("to", (INPUT,), {"device": "cpu", "dtype": torch.float32}), ((2, 3),))
        yield RuleSample("float", Call("float"), ((2, 3),))
        yield RuleSample("double", Call("double"), ((2, 3),))
        yield RuleSample("like a constant", Call("to", (INPUT, wave(2))), ((2, 3),))
        yield RuleSample("aten", Call(_ATEN._to_copy.default, (INPUT,), {"dtype": torch.float64}), ((2, 3),))
        wrong = Call("to", (INPUT, torch.zeros(1, dtype=torch.int64)))
        yield RuleSample("like an integer tensor", wrong, ((2, 3),), error=TypeError, message="torch.int64")
        wrong = Call("to", (INPUT,), {"dtype": torch.float16})
        yield RuleSample("half precision", wrong, ((2, 3),), error=ValueError, message="conversion to torch.float16 rounds")


@register("type_as", _ATEN.type_as.default, _ATEN.to.other)
class DualConvertLike(Conversion):
    """The dtype of another tensor, which may depend on the input as well. Source: design, section 1."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True, injective=True, aliases=True)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a constant that takes the dtype of a perturbed value: it does not depend on the input."""
        return None if slots(call.args[:1]) == [0] else "the converted tensor itself must depend on the input, and come first"

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield a constant, another input and the input itself as model."""
        yield RuleSample("like a constant", Call("type_as", (INPUT, wave(2))), ((2, 3),))
        yield RuleSample("like another input", Call("type_as", (INPUT, Slot(1))), ((2, 3), (2, 4)))
        yield RuleSample("like itself", Call(_ATEN.type_as.default, (INPUT, INPUT)), ((2, 3),))
        wrong = Call(_ATEN.to.other, (INPUT, torch.zeros(1, dtype=torch.int64)))
        yield RuleSample("like an integer tensor", wrong, ((2, 3),), error=TypeError, message="torch.int64")


@register(
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout,
    _ATEN.dropout.default, _ATEN.alpha_dropout.default, _ATEN.feature_dropout.default, _ATEN.feature_alpha_dropout.default,
)  # fmt: skip
class DualDropout(Identity):
    """Dropout in evaluation mode does nothing. Source: design, section 4 (in training mode it is an error)."""

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse training mode, which is the functions' default and draws random numbers."""
        return None if _training(call) is False else "dropout in training mode is random: call eval() or pass training=False"

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield modules, functions and torch spellings."""
        for module in (nn.Dropout(0.3), nn.Dropout2d(), nn.AlphaDropout()):
            yield RuleSample(f"module {type(module).__name__}", Call(module.eval()), ((2, 3, 4, 2),))
        yield RuleSample("function", Call(F.dropout, (INPUT,), {"training": False}), ((2, 3),))
        yield RuleSample("function, positional", Call(F.dropout2d, (INPUT, 0.5, False)), ((2, 3, 2, 2),))
        yield RuleSample("function, default", Call(F.alpha_dropout), ((2, 3),))
        yield RuleSample("aten", Call(_ATEN.dropout.default, (INPUT, 0.5, False)), ((2, 3),))
        for training in (Call(nn.Dropout(0.3).train()), Call(F.dropout)):
            label = f"training mode, {spelling(training.operator)}"
            yield RuleSample(label, training, ((2, 3),), error=ValueError, message="random")
        wrong = Call(F.dropout, (INPUT, 1.5, False))
        yield RuleSample("not a probability", wrong, ((2, 3),), error=ValueError, message="between 0 and 1")


def _training(call: Call) -> Any:
    """Find the training flag, or the default of this spelling."""
    if isinstance(call.operator, nn.Module):
        return call.operator.training
    for name in ("training", "train"):
        if name in call.kwargs:
            return call.kwargs[name]
    if len(call.args) > 2:
        return call.args[2]
    return call.operator not in (F.alpha_dropout, F.feature_alpha_dropout)
