"""Softmax and its relatives, written in ``logsumexp``: log-odds keep no trace of it, probabilities a common factor."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers.contract import INPUT, Call, Facts, Interval, RuleSample, Slot
from dual_layers.families import Composite
from dual_layers.logsumexp import finite, others
from dual_layers.refusals import named_arguments, unless_only
from dual_layers.registry import register
from dual_layers.sample_values import wave
from dual_layers.spellings import spellings

_ATEN = torch.ops.aten


class Softmax(Composite, ABC):
    """What softmax and its logarithm share: the spellings of their arguments, and where their extremes are. Abstract.

    Either grows with its own input and falls with all the others, so it is largest where its own input is largest and the
    others are smallest: the ends are exact.
    """

    @staticmethod
    def parameters(
        input: Any, dim: Any = None, *rest: Any, dtype: torch.dtype | None = None, _stacklevel: int = 3
    ) -> dict[str, Any]:
        """Name the arguments; what comes third is a dtype, a stack level or whether to convert, by spelling."""
        given = [value for value in (dtype, *rest) if isinstance(value, torch.dtype)]
        return {"input": input, "dim": dim, "dtype": given[0] if given else None}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse an axis that PyTorch would guess, and conversion from half precision on the way."""
        arguments = named_arguments(cls, call)
        if isinstance(arguments, str):
            return arguments
        if arguments.dim is None:
            return "dim=None lets PyTorch guess the axis from the number of axes: name it"
        return "conversion from half precision on the way" if any(value is True for value in call.args[2:]) else None

    @staticmethod
    @abstractmethod
    def of_odds(odds: Tensor) -> Tensor:
        """Return the value at given log-odds against all other inputs together."""

    def interval(self, *boxes: Interval) -> Interval:
        """Take every element at its own two corners."""
        dtype, dim = self.arguments.dtype or boxes[0].lower.dtype, self.arguments.dim
        lower, upper = finite(boxes[0].map(lambda end: end.to(dtype).movedim(dim, -1)))
        least, most = self.of_odds(lower - others(upper)), self.of_odds(upper - others(lower))
        return Interval(least.movedim(-1, dim), most.movedim(-1, dim))


@register(
    *spellings("log_softmax", "_log_softmax"), torch.special.log_softmax, _ATEN.special_log_softmax.default
)  # fmt: skip
class DualLogSoftmax(Softmax):
    """Logarithm of softmax: the input less its ``logsumexp``, which differences of two classes cancel. Source: its definition.

    Example:
        >>> box = Interval(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        >>> DualLogSoftmax(Call(torch.log_softmax, (INPUT, 1))).interval(box).upper
        tensor([[-0.6931, -0.3133]])
    """

    @staticmethod
    def compose(input: Any, dim: int, dtype: torch.dtype | None = None) -> Any:
        """Subtract ``logsumexp``."""
        input = input if dtype is None else input.to(dtype)
        return input - torch.logsumexp(input, dim, keepdim=True)

    @staticmethod
    def of_odds(odds: Tensor) -> Tensor:
        """Return the logistic function's logarithm; from odds that stand for an infinite end, infinity."""
        return torch.where(odds > -torch.finfo(odds.dtype).max / 64, F.logsigmoid(odds), -torch.inf)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, axes from both ends, a single class, and another dtype."""
        yield RuleSample("function", Call(F.log_softmax, (INPUT, 1)), ((2, 4),))
        yield RuleSample("middle axis", Call("log_softmax", (INPUT, -2)), ((2, 3, 2),), low=-2.0, high=1.0)
        yield RuleSample("keywords", Call(torch.log_softmax, (INPUT,), {"dim": 1, "dtype": torch.float64}), ((2, 3),))
        yield RuleSample("dtype third", Call(torch.log_softmax, (INPUT, 1, torch.float64)), ((2, 3),))
        yield RuleSample("one class", Call(torch.special.log_softmax, (INPUT, 1)), ((2, 1),))
        yield RuleSample("aten", Call(_ATEN._log_softmax.default, (INPUT, 1, False)), ((2, 3),), low=-1e3, high=1e3)
        yield RuleSample("no axis", Call(F.log_softmax), ((2, 3),), error=ValueError, message="name it")
        half = Call(_ATEN._log_softmax.default, (INPUT, 1, True))
        yield RuleSample("from half", half, ((2, 3),), error=ValueError, message="half precision")


@register(
    nn.Softmax2d, *spellings("softmax", "_softmax", "_safe_softmax"), torch.special.softmax, _ATEN.special_softmax.default
)  # fmt: skip
class DualSoftmax(Softmax):
    """Softmax: the exponential of its logarithm. Source: its definition.

    Example:
        >>> box = Interval(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1000.0]]))
        >>> DualSoftmax(Call(torch.softmax, (INPUT, 1))).interval(box).upper
        tensor([[0.5000, 1.0000]])
    """

    @staticmethod
    def from_module(module: nn.Softmax2d, input: Any) -> dict[str, Any]:
        """Take the channels of an image."""
        return {"input": input, "dim": -3, "dtype": None}

    @staticmethod
    def compose(input: Any, dim: int, dtype: torch.dtype | None = None) -> Any:
        """Take the exponential of the logarithm."""
        return torch.exp(torch.log_softmax(input, dim, dtype))

    @staticmethod
    def of_odds(odds: Tensor) -> Tensor:
        """Return the logistic function."""
        return torch.sigmoid(odds)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, axes from both ends, and images."""
        yield RuleSample("function", Call(F.softmax, (INPUT,), {"dim": 1}), ((2, 4),), low=-4.0, high=4.0)
        yield RuleSample("with a stack level", Call(F.softmax, (INPUT, -1, 5)), ((2, 3, 2),), low=-4.0, high=4.0)
        yield RuleSample("first axis but one", Call("softmax", (INPUT, -2)), ((2, 3, 2),), low=-4.0, high=4.0)
        yield RuleSample("in double", Call(torch.softmax, (INPUT, 1, torch.float64)), ((2, 3),), low=-4.0, high=4.0)
        yield RuleSample("images", Call(nn.Softmax2d()), ((2, 3, 2, 2),), low=-4.0, high=4.0)
        yield RuleSample("aten", Call(_ATEN._softmax.default, (INPUT, 1, False)), ((2, 3),), low=-50.0, high=50.0)
        yield RuleSample("no axis", Call(F.softmax), ((2, 3),), error=ValueError, message="name it")


@register(F.softmin)
class DualSoftmin(Softmax):
    """Softmax of minus the input. Source: its definition."""

    @staticmethod
    def compose(input: Any, dim: int, dtype: torch.dtype | None = None) -> Any:
        """Negate first."""
        return torch.softmax(-input, dim, dtype)

    @staticmethod
    def of_odds(odds: Tensor) -> Tensor:
        """Return the logistic function."""
        return torch.sigmoid(odds)

    def interval(self, *boxes: Interval) -> Interval:
        """Negate first."""
        return super().interval(Interval(-boxes[0].upper, -boxes[0].lower))

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield axes from both ends, and another dtype."""
        yield RuleSample("last axis", Call(F.softmin, (INPUT, -1)), ((2, 3, 2),), low=-4.0, high=4.0)
        yield RuleSample(
            "in double", Call(F.softmin, (INPUT,), {"dim": 1, "dtype": torch.float64}), ((2, 3, 2),), low=-4.0, high=4.0
        )
        yield RuleSample("no axis", Call(F.softmin), ((2, 3),), error=ValueError, message="name it")


class LogAddExp(Composite, ABC):
    """Logarithm of the sum of two powers of one base. Abstract.

    Written with the difference of the two, whose bounds know what they have in common.
    """

    facts: ClassVar[Facts] = Facts(monotone=True)

    def interval(self, *boxes: Interval) -> Interval:
        """Take the ends: exact."""
        return Interval(self.forward(*(box.lower for box in boxes)), self.forward(*(box.upper for box in boxes)))

    @classmethod
    def both(cls, function: Any, method: str, overload: Any) -> Iterator[RuleSample]:
        """Yield two inputs, constants on either side, broadcasting, and one input twice."""
        yield RuleSample("two inputs", Call(function, (INPUT, Slot(1))), ((2, 3), (2, 3)))
        yield RuleSample("constant", Call(method, (INPUT,), {"other": 3 * wave(4, 3)}), ((2, 1, 3),))
        yield RuleSample("constant first", Call(overload, (wave(3), INPUT)), ((2, 3),))
        yield RuleSample("wider second", Call(function, (INPUT, Slot(1))), ((2, 3, 1), (2, 1, 2)))
        yield RuleSample("one input twice", Call(function, (INPUT, INPUT)), ((2, 3),))
        wrong = Call(function, (INPUT, wave(4)))
        yield RuleSample("shapes differ", wrong, ((2, 3),), error=RuntimeError, message="must match the size")


@register(*spellings("logaddexp"))
class DualLogAddExp(LogAddExp):
    """Logarithm of the sum of two exponentials. Source: its definition."""

    @staticmethod
    def compose(input: Any, other: Any) -> Any:
        """Write it as the first, and what the second adds."""
        return input - F.logsigmoid(input - other)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield from cls.both(torch.logaddexp, "logaddexp", _ATEN.logaddexp.default)


@register(*spellings("logaddexp2"))
class DualLogAddExp2(LogAddExp):
    """Logarithm to base two of the sum of two powers of two. Source: its definition."""

    @staticmethod
    def compose(input: Any, other: Any) -> Any:
        """Write it as the first, and what the second adds."""
        return input - F.logsigmoid((input - other) * math.log(2)) * (1 / math.log(2))

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield from cls.both(torch.logaddexp2, "logaddexp2", _ATEN.logaddexp2.default)


@register(*spellings("glu"))
class DualGLU(Composite):
    """Gated linear unit: one half of the input times the logistic function of the other. Source: its definition."""

    @staticmethod
    def compose(input: Any, dim: int = -1) -> Any:
        """Split and multiply."""
        value, gate = input.chunk(2, dim)
        return value * torch.sigmoid(gate)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the axis given, and left to its default."""
        yield RuleSample("default axis", Call(F.glu), ((2, 3, 4),))
        yield RuleSample("middle axis", Call(F.glu, (INPUT,), {"dim": -2}), ((2, 4, 3),))
        yield RuleSample("aten", Call(_ATEN.glu.default, (INPUT, 1)), ((2, 6),))
        yield RuleSample("odd", Call(F.glu), ((2, 3),), error=RuntimeError, message="must be even")


class ClassLoss(Composite, ABC):
    """A loss of scores and constant targets, one number for each example. Abstract."""

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse averages, which mix the examples, and perturbed targets."""
        reason = unless_only(cls, call, "input")
        if reason is None and named_arguments(cls, call).reduction != "none":
            reason = "an average or a sum over the batch mixes the examples: use reduction='none'"
        return reason


@register(F.nll_loss)
class DualNLLLoss(ClassLoss):
    """Minus the log-probability of the target, times its weight. Source: its definition."""

    @staticmethod
    def compose(
        input: Any, target: Any, weight: Any = None, size_average: None = None, ignore_index: int = -100, reduce: None = None,
        reduction: str = "mean",
    ) -> Any:  # fmt: skip
        """Pick the target's element; nothing counts where the target is to be ignored."""
        kept = target != ignore_index
        index = target * kept
        factor = kept.to(input.dtype) if weight is None else weight[index] * kept
        return input.gather(1, index.unsqueeze(1)).squeeze(1) * -factor

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield vectors and images, weights, and a target that is ignored."""
        target = torch.tensor([2, 0])
        plain = Call(F.nll_loss, (INPUT, target), {"reduction": "none"})
        yield RuleSample("plain", plain, ((2, 3),), batch_axis=None)
        options = {"weight": wave(3), "ignore_index": 0, "reduction": "none"}
        yield RuleSample("weights, ignored", Call(F.nll_loss, (INPUT, target), options), ((2, 3),), batch_axis=None)
        image = Call(F.nll_loss, (INPUT, torch.tensor([[2, 0], [1, -100]])), {"reduction": "none"})
        yield RuleSample("positions", image, ((2, 3, 2),), batch_axis=None)
        yield RuleSample("mean", Call(F.nll_loss, (INPUT, target)), ((2, 3),), error=ValueError, message="mixes the examples")


@register(F.cross_entropy)
class DualCrossEntropy(ClassLoss):
    """Cross-entropy of scores and constant targets, as classes or as probabilities. Source: its definition."""

    @staticmethod
    def compose(
        input: Any, target: Any, weight: Any = None, size_average: None = None, ignore_index: int = -100, reduce: None = None,
        reduction: str = "mean", label_smoothing: float = 0.0,
    ) -> Any:  # fmt: skip
        """Take the target's log-probability, and where labels are smoothed every class' share."""
        scores = torch.log_softmax(input, 1)
        classes, each = input.shape[1], (1, -1, *[1] * (input.ndim - 2))
        weighted = scores if weight is None else scores * weight.reshape(each)
        if target.dtype.is_floating_point:
            return (weighted * -(target * (1 - label_smoothing) + label_smoothing / classes)).sum(1)
        own = F.nll_loss(scores, target, weight, ignore_index=ignore_index, reduction="none")
        if label_smoothing == 0:
            return own
        share = label_smoothing / classes * (target != ignore_index).to(input.dtype)
        return own * (1 - label_smoothing) - weighted.sum(1) * share

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield classes and probabilities, weights, smoothed labels, and a target that is ignored."""
        target, options = torch.tensor([2, 0]), {"weight": 1.5 + wave(3), "label_smoothing": 0.2, "reduction": "none"}
        plain = Call(F.cross_entropy, (INPUT, target), {"reduction": "none"})
        yield RuleSample("classes", plain, ((2, 3),), batch_axis=None)
        every = Call(F.cross_entropy, (INPUT, target), {**options, "ignore_index": 0})
        yield RuleSample("classes, every option", every, ((2, 3),), batch_axis=None)
        soft = Call(F.cross_entropy, (INPUT, torch.softmax(wave(2, 3, 2), 1)), options)
        yield RuleSample("probabilities", soft, ((2, 3, 2),), batch_axis=None)
        mean = Call(F.cross_entropy, (INPUT, target))
        yield RuleSample("mean", mean, ((2, 3),), error=ValueError, message="mixes the examples")
