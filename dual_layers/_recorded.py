"""Functions of our own that a trace records as one call, as it does PyTorch's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch.overrides import handle_torch_function, has_torch_function

Function = TypeVar("Function", bound=Callable[..., Any])


def recorded(function: Function) -> Function:
    """Let a function be seen by whatever stands in for tensors, so that compositions may call it and rules may be its own."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        return handle_torch_function(call, values, *args, **kwargs) if has_torch_function(values) else function(*args, **kwargs)

    return call  # type: ignore[return-value]
