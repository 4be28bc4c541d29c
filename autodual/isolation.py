"""Tracing runs the user's code with symbolic values: nothing of that may stay behind or pass unnoticed."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autodual.errors import TraceError

RANDOM = "forward draws random numbers; move them out of forward, or pass them in as an argument"
STATE = "forward changes the model's own {}; a model must not change its state while it computes its output"


@contextmanager
def same_random_state(owner: str) -> Iterator[None]:
    """Refuse code that draws from PyTorch's, Python's or NumPy's generator, and rewind all three.

    Args:
        owner: what the message names; which line it was is no longer known here.

    Yields:
        None.

    Raises:
        TraceError: the state of a generator has changed.
    """
    before = _random_states()
    try:
        yield
        changed = _comparable(_random_states()) != _comparable(before)
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        if before[2] is not None:
            sys.modules["numpy"].random.set_state(before[2])
    if changed:
        raise TraceError(f"{owner}: {RANDOM}")


def _random_states() -> tuple[torch.Tensor, Any, Any]:
    numpy = sys.modules.get("numpy")
    return torch.get_rng_state(), random.getstate(), None if numpy is None else numpy.random.get_state(legacy=True)


def _comparable(states: tuple[torch.Tensor, Any, Any]) -> tuple[Any, ...]:
    numbers, python, numpy = states
    return numbers.numpy().tobytes(), python, numpy and (numpy[1].tobytes(), *numpy[2:])


@contextmanager
def restored_model(model: nn.Module) -> Iterator[None]:
    """Undo what forward stores on the model, one level of lists, dicts and sets included.

    Args:
        model: the model whose attributes are kept.

    Yields:
        None.

    Raises:
        TraceError: forward replaced a parameter or a buffer.
    """
    kept = []
    for module in model.modules():
        state = dict(vars(module))
        kept.append(
            (module, state, {name: value.copy() for name, value in state.items() if isinstance(value, (dict, list, set))})
        )
    tensors = _identities(model)
    try:
        yield
        now = _identities(model)
        changed = [name for name, identity in tensors.items() if now.get(name) != identity]
    finally:
        for module, state, copies in kept:
            vars(module).clear()
            vars(module).update(state)
            for name, value in copies.items():
                if isinstance(value, list):
                    state[name][:] = value
                else:
                    state[name].clear()
                    state[name].update(value)
    if changed:
        raise TraceError(f"{type(model).__name__}: {STATE.format(changed[0])}")


def _identities(model: nn.Module) -> dict[str, int]:
    return {name: id(value) for name, value in (*model.named_parameters(), *model.named_buffers())}
