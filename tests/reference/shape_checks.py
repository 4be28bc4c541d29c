"""Check the shapes in annotations while tests run, of those functions and dataclasses alone that have any.

jaxtyping's own import hook wraps every function of a module, which made a third of the suite's time.
"""

from __future__ import annotations

import inspect
import re
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import FunctionType, ModuleType
from typing import Any

from beartype import beartype
from jaxtyping import jaxtyped

_SHAPED = re.compile(r"\b(Float|Int|Bool)\[Tensor, ")


class Finder(MetaPathFinder):
    """Finds the modules to be checked, and everything below them.

    Args:
        names: of modules or packages.
    """

    def __init__(self, *names: str) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if not any(f"{fullname}.".startswith(f"{name}.") for name in self.names):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _check(module, module.__name__)


def install(*names: str) -> None:
    """Check modules that are imported from now on."""
    assert not any(name in sys.modules for name in names), "imported already, unchecked"
    sys.meta_path.insert(0, Finder(*names))


def _check(holder: Any, module: str) -> None:
    for name, value in list(vars(holder).items()):
        function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        if getattr(function, "__module__", None) != module:
            continue
        if inspect.isclass(function):
            _check(function, module)
            if _is_shaped(vars(function).get("__annotations__", {})):
                jaxtyped(function, typechecker=beartype)  # a dataclass: what its __init__ is given
        elif isinstance(function, FunctionType) and _is_shaped(function.__annotations__):
            checked = jaxtyped(function, typechecker=beartype)
            setattr(holder, name, checked if value is function else type(value)(checked))


def _is_shaped(annotations: dict[str, Any]) -> bool:
    return any(_SHAPED.search(str(annotation)) for annotation in annotations.values())
