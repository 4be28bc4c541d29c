"""Attention: averages of values, weighted by a softmax of scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dual_layers._recorded import recorded
from dual_layers.contract import INPUT, Call, Interval, RuleSample, Slot
from dual_layers.families import Composite
from dual_layers.refusals import named_arguments, unless_only
from dual_layers.registry import register
from dual_layers.sample_values import wave
from dual_layers.spellings import spellings

_ROUNDING = 16.0


@recorded
def average(weights: Tensor, values: Tensor) -> Tensor:
    """Average values.

    Args:
        weights: ``[..., rows, terms]``, not negative; every row adds up to one.
        values: ``[..., terms, features]``.
    """
    return weights @ values


@register(average)
class DualAverage(Composite):
    """Weighted averages: a product of matrices that stays between the values. Source: fractional knapsack.

    The largest average gives every value its least weight, and what is then missing to one to the largest values first.

    Example:
        >>> weights = Interval(torch.tensor([[0.1, 0.2, 0.1]]), torch.tensor([[0.6, 0.7, 0.8]]))
        >>> values = torch.tensor([[1.0], [2.0], [4.0]])
        >>> DualAverage(Call(average, (INPUT, Slot(1)))).interval(weights, Interval(values, values)).upper
        tensor([[3.3000]])
    """

    @staticmethod
    def compose(weights: Any, values: Any) -> Any:
        """Multiply."""
        return weights @ values

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse arguments without a name here."""
        return unless_only(cls, call, "weights", "values")

    def interval(self, *boxes: Interval) -> Interval | None:
        """Give the free weight to the smallest values, and to the largest; of vectors nothing more is known."""
        given = (self.arguments.weights, self.arguments.values)
        weights, values = (boxes[each.index] if isinstance(each, Slot) else Interval(each, each) for each in given)
        if weights.lower.ndim < 2 or values.lower.ndim < 2:
            return None
        weights = Interval(weights.lower.nan_to_num(0.0).clamp(0, 1), weights.upper.nan_to_num(1.0).clamp(0, 1))
        least, most = values.lower.nan_to_num(nan=-torch.inf), values.upper.nan_to_num(nan=torch.inf)
        lower, upper = (torch.stack([_largest(weights, column) for column in end.unbind(-1)], -1) for end in (-least, most))
        return Interval(-lower, upper)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield perturbed values; a box of weights holds some that do not add up to one."""
        weights = torch.softmax(wave(2, 3, 4), -1)
        yield RuleSample("values", Call(average, (weights, INPUT)), ((2, 4, 2),), batch_axis=None)
        yield RuleSample("weights without batch", Call(average, (weights[0], INPUT)), ((2, 4, 3),))
        wrong = Call(average, (weights, INPUT))
        yield RuleSample("wrong number", wrong, ((2, 3, 2),), error=RuntimeError, message="size")


def _largest(weights: Interval, values: Tensor) -> Tensor:
    """Return the largest average of values, ``[..., terms]``, that weights of a box, ``[..., rows, terms]``, can give."""
    ranked, order = (part.unsqueeze(-2) for part in values.sort(-1, descending=True))
    shape = torch.broadcast_shapes(order.shape, weights.lower.shape)
    least, most = (end.expand(shape).gather(-1, order.expand(shape)) for end in (weights.lower, weights.upper))
    room = most - least
    missing = 1 - least.sum(-1, keepdim=True) - (room.cumsum(-1) - room)
    share = least + torch.minimum(room, missing.clamp(min=0))
    ranked = torch.where(share == 0, 0.0, ranked)
    slack = _ROUNDING * torch.finfo(values.dtype).eps * ranked.abs().amax(-1)
    return (share * ranked).sum(-1) + slack.detach()


@register(*spellings("scaled_dot_product_attention"))
class DualAttention(Composite):
    """Scaled dot-product attention: averages of values, weighted by the softmax of scores. Source: its definition."""

    @staticmethod
    def compose(
        query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        """Score every query against every key; a score that is masked is as low as numbers go."""
        if enable_gqa:
            key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
        scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-2, -1)
        kept = None
        if is_causal:
            kept = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        elif attn_mask is not None:
            kept = attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf
            scores = scores if attn_mask.dtype == torch.bool else scores + attn_mask.masked_fill(~kept, 0.0)
        if kept is None:
            return average(torch.softmax(scores, -1), value)
        scores = torch.where(kept, scores, -torch.finfo(query.dtype).max / 64)
        return average(torch.softmax(scores, -1), value) * kept.any(-1, keepdim=True)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a perturbed mask, and dropout."""
        reason = unless_only(cls, call, "query", "key", "value")
        if reason is None and named_arguments(cls, call).dropout_p != 0:
            reason = "dropout draws random numbers: use dropout_p=0"
        return reason

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield each argument perturbed alone and all together, masks of both kinds, and a row that sees nothing."""
        every, shapes = (INPUT, Slot(1), Slot(2)), ((2, 2, 3), (2, 4, 3), (2, 4, 2))
        attention = F.scaled_dot_product_attention
        yield RuleSample("plain", Call(attention, every), shapes, low=-2.0, high=2.0)
        memory = Call(attention, (INPUT, wave(4, 3), wave(4, 2)), {"scale": 0.7})
        yield RuleSample("fixed memory", memory, ((2, 3, 3),), low=-2.0, high=2.0)
        heads = ((2, 2, 3, 4),) * 3
        yield RuleSample("causal", Call(attention, every, {"is_causal": True}), heads, low=-2.0, high=2.0)
        seen = torch.tensor([[True, False, True, True], [False, False, False, False]])
        yield RuleSample("mask", Call(attention, (*every, seen)), shapes, low=-2.0, high=2.0)
        added = wave(2, 4).masked_fill(torch.tensor([[False, True, False, False]] * 2), -torch.inf)
        yield RuleSample("added mask", Call(attention, every, {"attn_mask": added}), shapes, low=-2.0, high=2.0)
        one = Call(attention, (INPUT, INPUT, INPUT))
        yield RuleSample("one tensor thrice", one, ((2, 3, 4),), low=-2.0, high=2.0)
        grouped = Call(attention, every, {"enable_gqa": True})
        yield RuleSample("grouped", grouped, ((2, 4, 2, 3), (2, 2, 3, 3), (2, 2, 3, 3)), low=-2.0, high=2.0)
        dropped = Call(attention, every, {"dropout_p": 0.1})
        yield RuleSample("dropout", dropped, shapes, error=ValueError, message="random numbers")
        moving = Call(attention, (*every, Slot(3)))
        yield RuleSample("perturbed mask", moving, (*shapes, (2, 4)), error=ValueError, message="attn_mask must not depend")
