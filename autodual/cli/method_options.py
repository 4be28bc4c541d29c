"""``--method`` and its options: the flags are the fields of the methods' dataclasses, their help is the docstrings."""

from __future__ import annotations

import argparse
import dataclasses
import re
import textwrap
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from autodual.cli.common import CommandError
from autodual.methods import METHODS, Method


def add_method_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--method`` and one flag for every field of the methods' option classes."""
    group = parser.add_argument_group("method", "\n".join(_described(name, kind) for name, kind in METHODS.items()))
    group.add_argument("--method", choices=METHODS, default="dual", help="how to bound (default: dual)")
    for name, field_type, owners, text in _method_fields():
        help_text = f"{' and '.join(owners)}: {text.rstrip('.')}"
        flag, destination = f"--{name.replace('_', '-')}", f"option_{name}"
        if field_type is bool:
            group.add_argument(flag, dest=destination, action=argparse.BooleanOptionalAction, default=None, help=help_text)
        elif get_origin(field_type) is Literal:
            group.add_argument(flag, dest=destination, choices=get_args(field_type), help=help_text)
        else:
            group.add_argument(flag, dest=destination, type=_converter(field_type), metavar="V", help=help_text)


def method_from(arguments: argparse.Namespace) -> Method:
    """Build the chosen method's options from the flags.

    Raises:
        CommandError: a flag was given that the chosen method does not have.
    """
    kind = METHODS[arguments.method]
    given = {key.removeprefix("option_"): value for key, value in vars(arguments).items() if key.startswith("option_")}
    given = {name: value for name, value in given.items() if value is not None}
    unknown = [name for name in given if name not in {field.name for field in dataclasses.fields(kind)}]
    if unknown:
        owners = [name for name, other in METHODS.items() if unknown[0] in {field.name for field in dataclasses.fields(other)}]
        flag = unknown[0].replace("_", "-")
        raise CommandError(f"--{flag} is not an option of --method {arguments.method}, only of {', '.join(owners)}")
    return kind(**given)


def _method_fields() -> list[tuple[str, Any, list[str], str]]:
    fields: dict[str, tuple[str, Any, list[str], str]] = {}
    for method, kind in METHODS.items():
        types_of, texts = get_type_hints(kind), _attribute_texts(kind)
        for field in dataclasses.fields(kind):
            entry = fields.setdefault(field.name, (field.name, types_of[field.name], [], texts.get(field.name, "")))
            entry[2].append(method)
    return list(fields.values())


def _described(name: str, kind: type) -> str:
    line = (kind.__doc__ or "").strip().splitlines()[0]
    text = line.split(":", 1)[-1].strip().rstrip(".").replace("``", "")
    return textwrap.fill(f"{name:<10}  {text}", 80, subsequent_indent=" " * 12)


def _attribute_texts(kind: type) -> dict[str, str]:
    """Read the text about each field from the docstring, so that help and documentation cannot disagree."""
    section = (kind.__doc__ or "").partition("Attributes:")[2]
    found = re.findall(r"^ {8}(\w+): (.*?)(?=^ {8}\w+:|\Z)", section, flags=re.M | re.S)
    return {
        name: re.split(r"(?<=\.)\s", " ".join(text.split()))[0].replace("%", "%%").replace("``", "") for name, text in found
    }


def _converter(field_type: Any) -> Callable[[str], Any]:
    plain = [kind for kind in get_args(field_type) or (field_type,) if kind is not type(None)]
    return str if get_origin(plain[0]) is Literal else plain[0]  # the class itself says what it takes
