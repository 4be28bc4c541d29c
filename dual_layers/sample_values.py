"""Deterministic constants for the calls that rules give as samples: irregular, of both signs, drawn without a seed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def wave(*shape: int, phase: float = 0.3) -> Tensor:
    """Return a tensor of irregular values in [-1, 1] without symmetries that could hide a flip or a swap."""
    return torch.sin(1.7 * torch.arange(prod(shape)) + phase).reshape(shape)


def waves(module: Callable[..., Module], *args: Any, **kwargs: Any) -> Module:
    """Build a module in evaluation mode whose parameters and statistics are waves; variances stay positive."""
    with torch.random.fork_rng(devices=[]):  # the module's own initialisation must not move the caller's random numbers
        result = module(*args, **kwargs).eval()
    for index, (name, tensor) in enumerate(chain(result.named_parameters(), result.named_buffers())):
        if tensor.is_floating_point():
            values = wave(*tensor.shape, phase=0.3 + index)
            tensor.data.copy_(0.5 + values.abs() if name.endswith("running_var") else values)
    return result
