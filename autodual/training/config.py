"""What a training run does, as one frozen value: read from TOML, changed by flags, written into the run's folder."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from autodual.errors import SpecificationError
from autodual.methods import METHODS, Method
from autodual.regions import L1, L2, LInf, Region
from autodual.report import why_none
from autodual.training.schedules import Constant, Schedule, as_table, schedule_from
from dual_layers import NONE

NORMS = {"linf": LInf, "l2": L2, "l1": L1}


@dataclass(frozen=True)
class Data:
    """The examples, where they come from files, and how they are varied.

    Attributes:
        train: ``.npz`` with inputs ``x`` and labels ``y``; or the word ``digits``.
        test: ``.npz`` of examples for the last judgement, which nothing is chosen by.
        keys: names of inputs and labels in the files.
        scale: stored inputs are divided by it: 255 for 8-bit pixels.
        shape: shape of one input, if stored in another.
        limit: only the first so many training examples.
        held_out: how many training examples are kept for choosing the best weights and for stopping early.
        shift: images are padded by so many zeros on each side and cropped at a random place.
        flip: images are mirrored left to right at random.
    """

    train: str | None = None
    test: str | None = None
    keys: tuple[str, ...] = ("x", "y")
    scale: float | None = None
    shape: tuple[int, ...] | None = None
    limit: int | None = None
    held_out: int = 0
    shift: int = 0
    flip: bool = False


@dataclass(frozen=True)
class Loss:
    """What is minimised.

    Attributes:
        name: one of ``autodual.losses.LOSSES``.
        method: how it bounds, where it leaves the choice: a name, or a table with ``name`` and the method's options. By
            default the loss' own choice.
        numbers: the loss' own numbers, where they are not scheduled.
        options: what else the loss can be told, such as ``steps`` of an attack.
    """

    name: str = "robust"
    method: str | dict[str, Any] | None = None
    numbers: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Optimizer:
    """How it is minimised: Adam, whose learning rate is the schedule ``lr``.

    Attributes:
        weight_decay: of the parameters (decoupled, as in AdamW, where it is not 0).
        clip: largest norm of the whole gradient; longer ones are shortened.
    """

    weight_decay: float = 0.0
    clip: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """How the weights are judged on the way.

    Attributes:
        every: epochs between two evaluations; the last epoch always has one.
        eps: radius; by default where the schedule of ``eps`` ends.
        methods: bounds, each for the examples that those before it leave undecided.
        attack: steps of projected gradient descent; 0 for none.
        train: so many training examples are judged too, for the picture.
        limit: at most so many held-out or test examples on the way; the final judgement takes all.
        batch: examples at a time.
        patience: stop after so many evaluations without a better held-out result, once radius and numbers have settled.
    """

    every: int = 1
    eps: float | None = None
    methods: tuple[str, ...] = ("interval", "dual")
    attack: int = 10
    train: int = 200
    limit: int | None = None
    batch: int = 100
    patience: int | None = None


@dataclass(frozen=True)
class Config:
    """A training run.

    Attributes:
        model: ``FILE.py:NAME`` or ``package.module:NAME`` of a function that builds the model, for the command line.
        data: the examples.
        loss: what is minimised.
        schedules: ``eps``, ``lr`` and numbers of the loss, each a number or a table such as
            ``{kind = "smooth", start = 0, end = 0.1, begin = 1, length = 10}``.
        optimizer: how it is minimised.
        evaluation: how the weights are judged on the way.
        norm: of the ball around each example: ``linf``, ``l2`` or ``l1``.
        domain: the two ends of valid inputs.
        epochs: passes through the training examples.
        minutes: stop after so many minutes of training, whatever the epoch; schedules do not stretch.
        batch: examples for each step, all processes together; a last incomplete batch of an epoch is left out.
        seed: of the initial weights, the order of the examples and all random numbers on the way.
        initialization: ``default`` keeps what the model's builder made, ``interval`` draws weights for which interval bounds
            keep their width from layer to layer.
        checkpoint: steps between two checkpoints; there is one after each epoch in any case.
        threads: of each process; another number adds up in another order, which changes the last bits. By default torch's
            choice.
        device: ``cpu``, ``cuda``, ``cuda:1``.

    Example:
        >>> config = Config.build({"epochs": 3, "loss": {"name": "robust"}, "schedules": {"eps": 0.1}})
        >>> config.epochs, config.schedules["eps"], config.schedules["lr"]
        (3, Constant(value=0.1), Constant(value=0.001))
        >>> Config.build({"epoch": 3})
        Traceback (most recent call last):
        autodual.errors.SpecificationError: unknown setting 'epoch'; known are model, data, ...
    """

    model: str | None = None
    data: Data = Data()
    loss: Loss = Loss()
    schedules: dict[str, Schedule] = field(default_factory=dict)
    optimizer: Optimizer = Optimizer()
    evaluation: Evaluation = Evaluation()
    norm: Literal["linf", "l2", "l1"] = "linf"
    domain: tuple[float, ...] | None = None
    epochs: int = 20
    minutes: float | None = None
    batch: int = 100
    seed: int = 0
    initialization: Literal["default", "interval"] = "default"
    checkpoint: int = 200
    threads: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check what can be checked without model and data."""
        given = {name: schedule_from(value, name) for name, value in self.schedules.items()}
        object.__setattr__(self, "schedules", {"eps": Constant(0.1), "lr": Constant(1e-3)} | given)
        _check_counts(self)
        both = [name for name in self.loss.numbers if name in self.schedules]
        if both:
            raise SpecificationError(f"{both[0]} is given twice: in loss.numbers and in schedules; keep one of them")
        if self.domain is not None and (len(self.domain) != 2 or not self.domain[0] < self.domain[1]):
            raise SpecificationError(f"domain must be two numbers, the lower one first, got {list(self.domain)}")
        if self.evaluation.patience is not None and math.isinf(max(part.settled for part in self.schedules.values())):
            raise SpecificationError("evaluation.patience needs schedules that settle")
        if min(self.schedules["eps"](epoch) for epoch in range(self.epochs + 1)) < 0:
            raise SpecificationError(f"eps must never be negative, its schedule is {self.schedules['eps']}")
        _ = self.method
        for method in map(method_from, self.evaluation.methods):
            if method.guarantee == NONE:
                raise SpecificationError(f"evaluation.methods: {method} proves nothing: {why_none(method)}")

    @property
    def method(self) -> Method | None:
        """The options of the method that bounds the loss, if it is not the loss' own choice."""
        return None if self.loss.method is None else method_from(self.loss.method)

    def region(self, eps: float) -> Region:
        """Return the ball of radius ``eps``."""
        return NORMS[self.norm](eps, domain=self.domain)

    @property
    def judged_eps(self) -> float:
        """The radius of evaluations."""
        return self.schedules["eps"](self.epochs) if self.evaluation.eps is None else self.evaluation.eps

    @staticmethod
    def build(content: Mapping[str, Any], changes: Iterable[tuple[str, Any]] = ()) -> Config:
        """Make a configuration from nested dicts.

        Args:
            content: settings by name, those of a part as a dict.
            changes: names with dots and values that replace what ``content`` says.

        Raises:
            SpecificationError: an unknown name, a value of the wrong type or out of range.

        Example:
            >>> Config.build({}, [("data.held_out", 50), ("schedules.lr", 0.01)]).data.held_out
            50
        """
        content = _copied(content)
        for name, value in changes:
            *path, last = name.split(".")
            place = content
            for part in path:
                place = place.setdefault(part, {})
                if not isinstance(place, dict):
                    raise SpecificationError(f"{name}: {part} is a value, not a table of settings")
            place[last] = value
        return _made(Config, content, "")

    @staticmethod
    def read(path: Path, changes: Iterable[tuple[str, Any]] = ()) -> Config:
        """Read a TOML file; see ``build``.

        Raises:
            SpecificationError: the file is missing or no TOML, or as for ``build``.
        """
        try:
            content = tomllib.loads(path.read_text())
        except OSError as error:
            raise SpecificationError(f"cannot read {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SpecificationError(f"{path} is no TOML: {error}") from error
        try:
            return Config.build(content, changes)
        except SpecificationError as error:
            raise SpecificationError(f"{path}: {error}") from error

    def as_dict(self) -> dict[str, Any]:
        """Return nested dicts that ``build`` turns into an equal configuration."""
        return _plain(self)

    def to_toml(self) -> str:
        """Return the text of a TOML file that ``read`` turns into an equal configuration."""
        content = self.as_dict()
        flat = [f"{key} = {_written(value)}" for key, value in content.items() if not isinstance(value, dict)]
        for key, table in content.items():
            if isinstance(table, dict):
                flat += ["", f"[{key}]", *(f"{_written_key(name)} = {_written(value)}" for name, value in table.items())]
        return "\n".join(flat) + "\n"


def method_from(value: Any) -> Method:
    """Make a method's options from its name, or from a table with its name and options.

    Raises:
        SpecificationError: there is no such method or option.
    """
    table = {"name": value} if isinstance(value, str) else dict(value)
    name = table.pop("name", None)
    if name not in METHODS:
        raise SpecificationError(f"unknown method {name!r}; known are {', '.join(METHODS)}")
    known = [part.name for part in dataclasses.fields(METHODS[name])]
    unknown = [key for key in table if key not in known]
    if unknown:
        raise SpecificationError(f"method {name} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return METHODS[name](**table)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name what differs between two configurations as dicts, one line each."""
    lines = []
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{name}.")
        elif before != after:
            lines.append(f"{prefix}{name} was {before!r}, is {after!r}")
    return lines


def _made(kind: type, content: Mapping[str, Any], prefix: str) -> Any:
    """Build a dataclass from a dict, every value checked against its annotation."""
    types_of = get_type_hints(kind)
    unknown = [name for name in content if name not in types_of]
    if unknown:
        raise SpecificationError(f"unknown setting '{prefix}{unknown[0]}'; known are {', '.join(types_of)}")
    return kind(**{name: _value(types_of[name], value, f"{prefix}{name}") for name, value in content.items()})


def _value(kind: Any, value: Any, name: str) -> Any:
    """Check a value against an annotation, and turn lists into tuples and dicts into the dataclasses they describe."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise SpecificationError(f"{name} is a table of settings, got {value!r}")
        return _made(kind, value, f"{name}.")
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    for option in options:
        if _matches(option, value):
            return tuple(value) if get_origin(option) is tuple else float(value) if option is float else value
    raise SpecificationError(f"{name} must be {' or '.join(map(_spoken, options))}, got {value!r}")


def _matches(kind: Any, value: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and all(_matches(get_args(kind)[0], part) for part in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _spoken(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list, each {_spoken(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "a table"
    return {float: "a finite number", int: "a whole number", str: "a text", bool: "true or false"}.get(kind, "left out")


def _check_counts(config: Config) -> None:
    """Check every number that has a smallest value."""
    least = {
        "epochs": 1, "batch": 1, "checkpoint": 1, "minutes": 0, "seed": 0, "threads": 1, "data.limit": 1, "data.held_out": 0,
        "data.shift": 0, "optimizer.weight_decay": 0, "evaluation.every": 1, "evaluation.eps": 0, "evaluation.attack": 0,
        "evaluation.train": 0, "evaluation.limit": 1, "evaluation.batch": 1, "evaluation.patience": 1,
    }  # fmt: skip
    for name, smallest in least.items():
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if value is not None and value < smallest:
            raise SpecificationError(f"{name} must be at least {smallest}, got {value}")
    if config.optimizer.clip is not None and config.optimizer.clip <= 0:
        raise SpecificationError(f"optimizer.clip must be positive, got {config.optimizer.clip}; leave it out for no limit")
    try:
        torch.device(config.device)
    except RuntimeError as error:
        raise SpecificationError(f"device {config.device!r}: {str(error).splitlines()[0]}") from error


def _copied(content: Any) -> Any:
    return {key: _copied(value) for key, value in content.items()} if isinstance(content, Mapping) else content


def _plain(value: Any) -> Any:
    """Turn dataclasses, schedules and tuples into what TOML and JSON have; what is None is left out."""
    if isinstance(value, Schedule):
        return as_table(value)
    if dataclasses.is_dataclass(value):
        return _plain({part.name: getattr(value, part.name) for part in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items() if part is not None}
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _written(value: Any) -> str:
    """Write a value as TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_written_key(key)} = {_written(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _written_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() else json.dumps(key)
