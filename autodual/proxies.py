"""Symbolic values: what the user's code holds while a model is traced."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

_DATA = ".data reads or changes a tensor unseen, so it cannot be followed; write .detach(), and give a changed value a name"


class Unfollowable(Exception):
    """Symbolic tracing cannot follow a line whose outcome is fixed by shapes: torch.export may."""

    def __init__(self, reason: str, origin: str) -> None:
        super().__init__(reason)
        self.reason, self.origin = reason, origin


class TracedProxy(fx.Proxy):
    """A symbolic value. Unlike plain fx it records augmented and item assignment as the mutations they are."""

    def is_instance_of(self, kind: Any) -> bool:
        """Answer the user's ``isinstance``: a symbolic tensor is a tensor; what a size or a tuple is, is not known."""
        meta = self.node.meta
        if meta["tuple"] or not meta["tensor"]:
            self.tracer.halt("isinstance() asks what a size or a tuple of tensors is")
        if kind in (nn.Parameter, nn.Buffer):
            return self.node.op == "get_attr" and isinstance(self.tracer.tensors.get(self.node.target), kind)
        return isinstance(kind, type) and issubclass(torch.Tensor, kind)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute that is recorded once it is called or used."""
        if name == "data" and _depends_on_input(self.node):
            self.tracer.refuse(_DATA)
        return TracedAttribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse: an attribute such as ``.data`` would change the value unseen."""
        if name == "data":
            self.tracer.refuse(_DATA)
        if name not in ("node", "tracer", "root", "attr", "_node"):
            self.tracer.halt(f"assigning to the attribute .{name} of a tensor is not supported")
        object.__setattr__(self, name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Record the assignment."""
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __delattr__(self, name: str) -> None:
        """Refuse."""
        self.tracer.halt(f"deleting the attribute .{name} of a tensor is not supported")

    def __copy__(self) -> TracedProxy:
        """Return the same value: nothing is mutable."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Record a copy."""
        return self.clone()

    def __len__(self) -> int:
        """Refuse to give a number."""
        return self.tracer.halt("len() asks for a size")

    def __int__(self) -> int:
        """Refuse to give a number."""
        return self.tracer.concretize(self, "int() asks for a number")

    def __index__(self) -> int:
        """Refuse to give a number."""
        return self.tracer.concretize(self, "a Python integer is needed here, for instance by range()")

    def __float__(self) -> float:
        """Refuse to give a number."""
        return self.tracer.concretize(self, "float() asks for a number")

    def __contains__(self, item: Any) -> bool:
        """Refuse to give a truth value."""
        return self.tracer.concretize(self, "'in' looks at the elements of a value")


def _depends_on_input(node: fx.Node) -> bool:
    seen, waiting = set(), [node]
    while waiting:
        step = waiting.pop()
        if step.op == "placeholder":
            return True
        if step not in seen:
            seen.add(step)
            waiting += step.all_input_nodes
    return False


class TracedAttribute(TracedProxy, fx.proxy.Attribute):
    """``x.name``, which becomes a method call or, when it is used as it stands, an attribute access."""


def _augmented(function: Callable[..., Any]) -> Callable[[TracedProxy, Any], Any]:
    def assign(self: TracedProxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return assign


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift"):
    setattr(TracedProxy, f"__{_name}__", _augmented(getattr(operator, _name)))
