"""What is intercepted in PyTorch and in Python while a model is traced."""

from __future__ import annotations

import builtins
import dis
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from autodual import origins
from autodual.isolation import STATE
from autodual.proxies import TracedProxy

# Factories take sizes but dispatch on tensors only, so a symbolic size has to be caught before PyTorch parses it.
_FACTORIES = (
    "zeros", "ones", "full", "empty", "arange", "eye", "linspace", "tensor", "as_tensor", "scalar_tensor",
    "rand", "randn", "randint", "randperm", "normal",
)  # fmt: skip


class Tracer(Protocol):
    """What interception asks of a tracer."""

    paths: dict[int, str]

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Record a call."""

    def eager_call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run or record a call of concrete tensors."""

    def refuse(self, reason: str) -> Any:
        """Give up on the model."""


@contextmanager
def intercepted(tracer: Tracer) -> Iterator[None]:
    """Hand a tracer what plain fx does not see: calls of concrete tensors, factories with symbolic sizes, new state."""
    with _symbolic_factories(tracer), _guarded_state(tracer), _answered_isinstance(), _EagerCalls(tracer):
        yield


@contextmanager
def _answered_isinstance() -> Iterator[None]:
    """Let the user's ``isinstance`` see a symbolic tensor as a tensor.

    The builtin is replaced, not the values' ``__class__``: PyTorch's compiled code asks for the class too, and would
    read a tensor's memory where there is none.
    """
    original = builtins.isinstance

    def answer(value: Any, kinds: Any) -> bool:
        if issubclass(type(value), TracedProxy):
            code = sys._getframe(1).f_code
            if not origins.is_torch(code.co_filename) or code.co_name == "is_tensor":
                return any(original(value, kind) or value.is_instance_of(kind) for kind in _flatten(kinds))
        return original(value, kinds)

    builtins.isinstance = answer
    try:
        yield
    finally:
        builtins.isinstance = original


def _flatten(kinds: Any) -> Iterator[Any]:
    for kind in kinds if type(kinds) is tuple else getattr(kinds, "__args__", (kinds,)):
        if type(kind) is tuple:
            yield from _flatten(kind)
        else:
            yield kind


class _EagerCalls(TorchFunctionMode):
    """Sees every call that PyTorch would run at once while the model is traced."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.tracer.eager_call(func, args, kwargs or {})


@contextmanager
def _guarded_state(tracer: Tracer) -> Iterator[None]:
    """Refuse to replace a parameter or a buffer: the next call would compute another function."""
    original = nn.Module.__setattr__

    def assign(module: nn.Module, name: str, value: Any) -> None:
        old = (vars(module).get("_parameters", {}) | vars(module).get("_buffers", {})).get(name)
        if old is not None and old is not value and id(old) in tracer.paths:
            tracer.refuse(STATE.format(tracer.paths[id(old)]))
        original(module, name, value)

    nn.Module.__setattr__ = assign
    try:
        yield
    finally:
        nn.Module.__setattr__ = original


@contextmanager
def _symbolic_factories(tracer: Tracer) -> Iterator[None]:
    originals = {name: getattr(torch, name) for name in _FACTORIES}

    def symbolic(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def create(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return create

    try:
        for name, function in originals.items():
            setattr(torch, name, symbolic(function))
        yield
    finally:
        for name, function in originals.items():
            setattr(torch, name, function)


def inside_assert() -> bool:
    """Whether the user's code is evaluating the condition of an ``assert`` statement."""
    frame = sys._getframe(1)
    while frame is not None and origins.is_library(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return False
    instructions = [step for step in dis.get_instructions(frame.f_code) if step.opname not in ("CACHE", "TO_BOOL", "NOT_TAKEN")]
    rest = [step for step in instructions if step.offset >= frame.f_lasti]
    if len(rest) < 2 or "JUMP" not in rest[0].opname or not rest[0].opname.endswith("IF_TRUE"):
        return False
    return rest[1].opname == "LOAD_ASSERTION_ERROR" or rest[1].argval is AssertionError
