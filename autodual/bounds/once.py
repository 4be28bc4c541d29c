"""Bounds have one derivative: whoever asks for a second is told so, for it would be wrong without a word."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Once(torch.autograd.Function):
    """The identity, whose derivative refuses to become part of a graph."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        """Return the value, as a tensor of its own that may be written into."""
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Keep nothing."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "bounds can be differentiated once, not twice: leave out create_graph=True, and take torch.autograd.grad or "
                "backward in place of torch.func.grad, which prepares for a second derivative"
            )
        return gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        """Return the tangent."""
        return tangent.clone()


def once(value: Tensor) -> Tensor:
    """Return a bound that can be differentiated once.

    Slopes, cells and touching points are chosen without derivatives, and many first derivatives are written down: the envelope
    theorem makes the first ones right, and nothing makes the second ones so. torch's ``once_differentiable`` would not
    object, since at a loss the incoming gradient is a constant.
    """
    return _Once.apply(value) if value.requires_grad else value
