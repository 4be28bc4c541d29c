"""Which rule covers which operator. Keys are the operators themselves, never names made from classes."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers.contract import Call, DualLayer

Key = Any  # a module class, a function or torch.ops overload, or a tensor method's name
Rule = TypeVar("Rule", bound=type[DualLayer])

_RULES: dict[Key, list[type[DualLayer]]] = {}
_SHAPE_QUERIES: set[Key] = set()
_HELD: set[Key] = set()


def register(*keys: Key, override: bool = False, case: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule under every spelling of its operator.

    Args:
        *keys: module classes, functions, ``torch.ops`` overloads and names of tensor methods.
        override: replace an existing registration instead of refusing.
        case: a further case of operators that may have rules already, for calls that those refuse: a product has one rule
            for a constant factor, another for two factors that depend on the input.

    Returns:
        The decorator; it hands the class back unchanged.

    Raises:
        ValueError: a key is taken and neither ``override`` nor ``case`` is set, or a name is none of a tensor's methods.
    """
    unknown = [key for key in keys if isinstance(key, str) and not hasattr(Tensor, key)]
    if unknown:
        raise ValueError(f"a name stands for a method or attribute of torch.Tensor, and it has no {unknown[0]!r}")

    def decorate(rule: Rule) -> Rule:
        for key in keys:
            taken = [] if override else _RULES.get(key, [])
            if taken and rule not in taken and not case:
                raise ValueError(
                    f"{spelling(key)} is already covered by {taken[0].__name__}; pass override=True to replace it, "
                    "or case=True to add a rule for calls that it refuses"
                )
            _RULES[key] = taken if rule in taken else [*taken, rule]
        return rule

    return decorate


def lookup(operator: Key) -> type[DualLayer] | None:
    """Find the rule for an operator, the first one where several share its cases: see ``cases``."""
    return next(iter(cases(operator)), None)


def cases(operator: Key) -> tuple[type[DualLayer], ...]:
    """Find the rules for an operator: a module instance, a function or a tensor method's name.

    A module is looked up through its class hierarchy, so that parametrised modules work, but only as long as the
    class still runs the registered class' ``forward``: a subclass with its own ``forward`` is another operator.
    """
    if not isinstance(operator, nn.Module):
        return tuple(_RULES.get(operator, ())) if operator.__hash__ is not None else ()
    for base in type(operator).__mro__:
        if base in _RULES:
            return tuple(_RULES[base]) if type(operator).forward is base.forward else ()
    return ()


def choose(call: Call) -> tuple[type[DualLayer] | None, str]:
    """Find the rule for a call: the first of its operator's cases that does not refuse it.

    Returns:
        The rule and an empty text; or None and the reasons of all cases, empty where the operator has none.
    """
    reasons = []
    for rule in cases(call.operator):
        reason = rule.refuse(call)
        if reason is None:
            return rule, ""
        reasons.append(reason)
    return None, "; ".join(dict.fromkeys(reasons))


def register_shape_query(*keys: Key) -> None:
    """Declare operators whose result depends on the shape, dtype or device of their inputs, never on values."""
    _SHAPE_QUERIES.update(keys)


def is_shape_query(operator: Key) -> bool:
    """Whether an operator's result is the same for every value its tensor inputs can take."""
    return not isinstance(operator, nn.Module) and operator in _SHAPE_QUERIES


def register_held(*keys: Key) -> None:
    """Declare operators whose value is read off at the region's centre and held there.

    For choices inside a composition that computes the same whatever is chosen: which element the others are compared with.
    """
    _HELD.update(keys)


def is_held(operator: Key) -> bool:
    """Whether an operator's value at the region's centre stands for its value everywhere."""
    return not isinstance(operator, nn.Module) and operator in _HELD


def registered_rules() -> list[type[DualLayer]]:
    """List every registered rule once, in order of registration."""
    return list(dict.fromkeys(rule for rules in _RULES.values() for rule in rules))


def keys_of(rule: type[DualLayer]) -> list[Key]:
    """List the operators a rule is registered under."""
    return [key for key, rules in _RULES.items() if rule in rules]


def is_key(operator: Key, rule: type[DualLayer]) -> bool:
    """Whether a rule is registered under an operator itself."""
    return rule in _RULES.get(operator, ())


def nearest(operator: Key, count: int = 3) -> list[str]:
    """Name the supported operators whose names are most like an unsupported one's, best first; often none."""
    names: dict[str, list[str]] = {}
    for key in _RULES:
        shown = spelling(key)
        if not shown.startswith("torch.ops."):
            names.setdefault(_bare(shown), []).append(shown)
    close = difflib.get_close_matches(_bare(spelling(operator)), names, n=count, cutoff=0.7)
    return [min(names[name], key=len) for name in close]


def _bare(shown: str) -> str:
    parts = shown.split(".")
    name = parts[3] if shown.startswith("torch.ops.") and len(parts) > 3 else parts[-1]
    return name.strip("_").removeprefix("special_").lower().replace("_", "")


def spelling(key: Key) -> str:
    """Name an operator the way a user writes it."""
    if isinstance(key, str):
        return f"Tensor.{key}"
    if isinstance(key, nn.Module):
        key = type(key)
    text = str(key)
    if text.startswith("aten."):
        return f"torch.ops.{text}"
    module = getattr(key, "__module__", None) or ""
    name = getattr(key, "__qualname__", None) or getattr(key, "__name__", text)
    if "<locals>" in name and module == F.__name__:  # functions that PyTorch makes of two others, such as F.max_pool1d
        name = next((public for public, value in vars(F).items() if value is key), name)
    if isinstance(key, type) and module.startswith("torch.nn"):
        return f"nn.{name}"
    if module in ("torch.nn.functional", "torch._C._nn"):
        return f"F.{name}"
    if module.startswith("torch") or "_VariableFunctionsClass" in name or module == "":
        return f"torch.{name.rsplit('.', 1)[-1]}"
    return f"{module.lstrip('_')}.{name}"
