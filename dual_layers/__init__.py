"""Dual layers: what each operator contributes to a dual network. See ``contract`` for the promise they make."""

from __future__ import annotations

import importlib
import pkgutil

from dual_layers.contract import (
    INPUT, NONE, REAL, ROUNDED, UNKNOWN, Call, Choice, DualLayer, Facts, Field, Guarantee, Interval, Offsets, RuleSample,
    Slopes, Slot, probabilistic,
)
from dual_layers.families import Affine, Composite, PiecewiseLinear, Relaxed
from dual_layers.registry import (
    cases, choose, is_held, is_shape_query, is_key, keys_of, lookup, nearest, register, register_held, register_shape_query,
    registered_rules, spelling,
)
from dual_layers.smooth import Piece, Smooth

_NOT_FAMILIES = {"contract", "registry", "families", "checks", "smooth", "testing"}
for _module in pkgutil.iter_modules(__path__):  # every family file is imported: a forgotten one cannot go unnoticed
    if _module.name not in _NOT_FAMILIES and not _module.name.startswith("_"):
        importlib.import_module(f"dual_layers.{_module.name}")

from dual_layers.custom import elementwise  # noqa: E402  (its functions need the rules of all families)

__all__ = [
    "INPUT", "NONE", "REAL", "ROUNDED", "UNKNOWN", "Affine", "Call", "Choice", "Composite", "DualLayer", "Facts", "Field",
    "Guarantee", "Interval", "Offsets", "Piece", "PiecewiseLinear", "Relaxed", "RuleSample", "Slopes", "Slot", "Smooth",
    "cases", "choose", "elementwise", "is_held", "is_key", "is_shape_query", "keys_of", "lookup", "nearest", "probabilistic",
    "register",
    "register_held", "register_shape_query", "registered_rules", "spelling",
]
