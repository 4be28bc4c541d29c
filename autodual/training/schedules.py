"""Schedules: how a radius, a learning rate or a number of a loss moves while training, as values of the epochs done so far.

A schedule is a frozen dataclass that is called with the progress in epochs, a fraction inside an epoch: ``schedule(2.5)`` is
the value half-way through the third epoch. It depends on nothing else, so that a resumed run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, get_args

from autodual.errors import SpecificationError

Shape = Literal["cosine", "linear"]


class Schedule(ABC):
    """A value for every moment of a training run."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Return the value after ``progress`` epochs."""

    @property
    @abstractmethod
    def settled(self) -> float:
        """The number of epochs after which the value no longer changes."""


@dataclass(frozen=True)
class Constant(Schedule):
    """Always the same value.

    Attributes:
        value: that value.

    Example:
        >>> Constant(0.1)(7.5)
        0.1
    """

    value: float

    def __post_init__(self) -> None:
        """Check the number."""
        _check_numbers(self, "value")

    def __call__(self, progress: float) -> float:
        """Return the value."""
        return self.value

    @property
    def settled(self) -> float:
        """It is settled from the start."""
        return 0.0


@dataclass(frozen=True)
class Ramp(Schedule):
    """A way from one value to another; constant before and after.

    Attributes:
        start: value up to ``begin``.
        end: value from ``begin + length`` on.
        begin: epochs before it moves.
        length: epochs that it moves for.
    """

    start: float
    end: float
    begin: float = 0.0
    length: float = field(kw_only=True)

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check_numbers(self, "start", "end", "begin", "length")
        kind = type(self).__name__
        if self.begin < 0:
            raise SpecificationError(f"{kind}: begin, in epochs, must be at least 0, got {self.begin!r}")
        if self.length <= 0:
            raise SpecificationError(
                f"{kind}: length, in epochs, must be positive, got {self.length!r}; for a value that never moves use Constant"
            )

    def __call__(self, progress: float) -> float:
        """Return the value after ``progress`` epochs."""
        share = min(max((progress - self.begin) / self.length, 0.0), 1.0)
        return _between(self.start, self.end, self.height(share) if share < 1 else 1.0)

    @property
    def settled(self) -> float:
        """The end of the way."""
        return self.begin + self.length

    @abstractmethod
    def height(self, share: float) -> float:
        """Return how far it has come, from 0 to 1, when a share of ``length`` is done."""


@dataclass(frozen=True)
class Linear(Ramp):
    """A straight line from ``start`` to ``end``; numbers as for ``Ramp``.

    Example:
        >>> warm_up = Linear(0.0, 0.1, begin=1, length=4)
        >>> [warm_up(epoch) for epoch in (0, 1, 3, 5, 9)]
        [0.0, 0.0, 0.05, 0.1, 0.1]
    """

    def height(self, share: float) -> float:
        """Return the share."""
        return share


@dataclass(frozen=True)
class Smooth(Ramp):
    """A slow start ``a t^power`` that goes over into a straight line at ``middle`` of the way, with one derivative there.

    Growing radii are usually given this form: the first steps, when the bounds of the untrained network are worst, are the
    smallest. With ``m`` for ``middle`` and ``t`` for the share of ``length`` that is done, ``a`` is ``1 / (m^p + p m^(p-1) (1 -
    m))``, so that the line ends at ``end``. Source: the smoothed schedule of auto_LiRPA (Xu et al., 2020), there with the same
    defaults. Other numbers as for ``Ramp``.

    Attributes:
        middle: share of ``length`` that the slow start takes, between 0 and 1.
        power: of the slow start, at least 1; with 1 the whole is a straight line.

    Example:
        >>> ramp = Smooth(0.0, 0.1, length=10)
        >>> [round(ramp(epoch), 4) for epoch in (0, 1, 2.5, 5, 10)]
        [0.0, 0.0002, 0.0077, 0.0385, 0.1]
    """

    middle: float = 0.25
    power: float = 4.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        super().__post_init__()
        _check_numbers(self, "middle", "power")
        if not 0 < self.middle < 1:
            raise SpecificationError(f"Smooth: middle must lie between 0 and 1, got {self.middle!r}; 0.25 is usual")
        if self.power < 1:
            raise SpecificationError(f"Smooth: power must be at least 1, got {self.power!r}; 4 is usual")

    def height(self, share: float) -> float:
        """Return the power, then the line."""
        slope, corner = self.power * self.middle ** (self.power - 1), self.middle**self.power
        height = share**self.power if share <= self.middle else corner + slope * (share - self.middle)
        return height / (corner + slope * (1 - self.middle))


@dataclass(frozen=True)
class Cosine(Ramp):
    """Half a cosine from ``start`` to ``end``, flat at both ends; numbers as for ``Ramp``.

    Example:
        >>> falling = Cosine(0.01, 0.0, length=10)
        >>> [round(falling(epoch), 4) for epoch in (0, 5, 10, 11)]
        [0.01, 0.005, 0.0, 0.0]
    """

    def height(self, share: float) -> float:
        """Return the cosine's."""
        return _bent(share)


@dataclass(frozen=True)
class Steps(Schedule):
    """``start``, multiplied by ``factor`` at each of the epochs ``at``.

    Attributes:
        start: value before the first step.
        factor: by which each step multiplies.
        at: the epochs, increasing.

    Example:
        >>> drops = Steps(0.008, factor=0.5, at=(30, 40))
        >>> [drops(epoch) for epoch in (0, 29.9, 30, 45)]
        [0.008, 0.008, 0.004, 0.002]
    """

    start: float
    factor: float
    at: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check_numbers(self, "start", "factor")
        _check_increasing(self, "at", fewest=1)

    def __call__(self, progress: float) -> float:
        """Return the value after ``progress`` epochs."""
        return self.start * self.factor ** sum(progress >= epoch for epoch in self.at)

    @property
    def settled(self) -> float:
        """The last step."""
        return self.at[-1]


@dataclass(frozen=True)
class Periodic(Schedule):
    """From ``start`` to ``end`` in each period, then back to ``start`` at once.

    With resets ``T_0 < T_1 < ... < T_M``, epoch ``d`` in ``[T_{i-1}, T_i)`` and ``p = (d - T_{i-1}) / (T_i - T_{i-1})``, the
    value is

        start + (end - start) (1 - cos(pi p)) / 2    (``shape="cosine"``),   or   start + (end - start) p    (``"linear"``).

    Source: C. Liu et al., On the Loss Landscape of Adversarial Training (2020), periodic adversarial scheduling, for radii from
    the smallest to the largest; for learning rates the ends are exchanged. There ``d`` is the index of the epoch, here it moves
    inside epochs too. After the last reset the value stays at ``end``, before the first at ``start``.

    Attributes:
        start: value at the start of each period.
        end: value towards its end.
        resets: the epochs ``T_0, ..., T_M``, increasing.
        shape: ``cosine`` or ``linear``.

    Example:
        >>> radius = Periodic(0.0, 0.4, resets=(0, 10, 30))
        >>> [round(radius(epoch), 3) for epoch in (0, 5, 10, 20, 30, 40)]
        [0.0, 0.2, 0.0, 0.2, 0.4, 0.4]
    """

    start: float
    end: float
    resets: tuple[float, ...]
    shape: Shape = "cosine"

    def __post_init__(self) -> None:
        """Check the numbers."""
        _check_numbers(self, "start", "end")
        _check_increasing(self, "resets", fewest=2)
        if self.shape not in get_args(Shape):
            raise SpecificationError(f"Periodic: shape must be one of {', '.join(get_args(Shape))}, got {self.shape!r}")

    def __call__(self, progress: float) -> float:
        """Return the value after ``progress`` epochs."""
        passed = sum(progress >= reset for reset in self.resets)
        if passed == 0:
            return self.start
        if passed == len(self.resets):
            return self.end
        first, last = self.resets[passed - 1], self.resets[passed]
        share = (progress - first) / (last - first)
        return _between(self.start, self.end, _bent(share) if self.shape == "cosine" else share)

    @property
    def settled(self) -> float:
        """The last reset."""
        return self.resets[-1]


SCHEDULES: dict[str, type[Schedule]] = {
    kind.__name__.lower(): kind for kind in (Constant, Linear, Smooth, Cosine, Steps, Periodic)
}


def schedule_from(value: Any, name: str) -> Schedule:
    """Make a schedule from what a configuration says: a number, or a table with its kind and numbers.

    Args:
        value: a number, a dict such as ``{"kind": "linear", "start": 0, "end": 0.1, "length": 10}``, or a schedule.
        name: what it is for; every message starts with it.

    Raises:
        SpecificationError: unknown kind or names, or bad numbers.

    Example:
        >>> schedule_from({"kind": "cosine", "start": 0.01, "end": 0.0, "length": 10}, "lr")
        Cosine(start=0.01, end=0.0, begin=0.0, length=10)
    """
    if isinstance(value, Schedule):
        return value
    if _is_number(value):
        return Constant(float(value))
    if not isinstance(value, dict) or value.get("kind") not in SCHEDULES:
        raise SpecificationError(
            f"schedule of {name}: expected a number, or a table with a kind of {', '.join(SCHEDULES)}, got {value!r}"
        )
    kind = SCHEDULES[value["kind"]]
    given = {key: tuple(part) if isinstance(part, list) else part for key, part in value.items() if key != "kind"}
    fields = {part.name: part for part in dataclasses.fields(kind)}
    unknown = [key for key in given if key not in fields]
    missing = [key for key, part in fields.items() if key not in given and part.default is dataclasses.MISSING]
    if unknown or missing:
        problem = f"has no {unknown[0]!r}" if unknown else f"lacks {missing[0]!r}"
        raise SpecificationError(f"schedule of {name}: {value['kind']} {problem}; it has {', '.join(fields)}")
    try:
        return kind(**given)
    except SpecificationError as error:
        raise SpecificationError(f"schedule of {name}: {error}") from error


def as_table(schedule: Schedule) -> Any:
    """Write a schedule as ``schedule_from`` reads it."""
    if isinstance(schedule, Constant):
        return schedule.value
    content = {key: list(part) if isinstance(part, tuple) else part for key, part in dataclasses.asdict(schedule).items()}
    return {"kind": type(schedule).__name__.lower(), **content}


def _between(start: float, end: float, share: float) -> float:
    """Return the point between two values; the ends are met exactly."""
    return end if share == 1 else start + (end - start) * share


def _bent(share: float) -> float:
    return 0.5 * (1 - math.cos(math.pi * share))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_numbers(schedule: Schedule, *names: str) -> None:
    for name in names:
        if not _is_number(getattr(schedule, name)):
            kind, found = type(schedule).__name__, getattr(schedule, name)
            raise SpecificationError(f"{kind}: {name} must be a finite number, got {found!r}")


def _check_increasing(schedule: Schedule, name: str, fewest: int) -> None:
    kind, epochs = type(schedule).__name__, getattr(schedule, name)
    numbers = isinstance(epochs, (tuple, list)) and all(map(_is_number, epochs))
    if not numbers or len(epochs) < fewest or epochs[0] < 0 or any(a >= b for a, b in pairwise(epochs)):
        raise SpecificationError(
            f"{kind}: {name} must hold {fewest} or more epochs of at least 0 in increasing order, got {epochs!r}"
        )
    object.__setattr__(schedule, name, tuple(epochs))
