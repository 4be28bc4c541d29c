"""The objects that stand for one operator: functions, tensor methods and ATen overloads that share its name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def spellings(*names: str) -> list[Any]:
    """Collect the registry keys of operators that are called the same everywhere, whatever this torch version has of them.

    Only for names that mean one thing: ``unfold`` does not (an image's patches in ``F``, windows as a method). Overloads
    that write into ``out=`` or name their axes are left out.

    Args:
        *names: bare names, such as ``permute``.

    Returns:
        Functions of ``torch`` and ``torch.nn.functional``, names of tensor methods and overloads of ``torch.ops.aten``.

    Raises:
        LookupError: nothing has one of these names.
    """
    keys: list[Any] = []
    for name in names:
        functions = [getattr(place, name, None) for place in (torch, F)]
        found = [function for function in functions if callable(function)]
        found += [name] if callable(getattr(Tensor, name, None)) else []
        found += _overloads(getattr(aten, name)) if hasattr(aten, name) else []
        if not found:
            raise LookupError(f"no operator is called {name!r}")
        keys += found
    return list(dict.fromkeys(keys))


def _overloads(packet: Any) -> list[Any]:
    names = [name for name in packet.overloads() if "out" not in name.lower() and "name" not in name.lower()]
    overloads = [getattr(packet, name) for name in names]
    return [overload for overload in overloads if _takes_tensors(overload)]


def _takes_tensors(overload: Any) -> bool:
    """Whether a tensor is among the arguments: ATen names some functions of lists and strings alike."""
    return any("Tensor" in str(argument.type) for argument in overload._schema.arguments)
