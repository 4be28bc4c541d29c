"""What a dual layer is: the values that go in and out, and the promise it makes.

Sign convention, stated here once. We bound ``c . f(x)`` from below (an upper bound is minus the lower bound of
``-c``) and sweep from ``nu = c`` at the output. Every dual layer promises, for every ``z`` it may see,

    nu_out . f(z)  >=  nu_in . z - h(nu_out)

``nu_out`` arrives at an operator's output, ``nu_in`` leaves for its inputs. Both are ``[rows, *shape]``: a leading
axis of specification rows, then the shape of the tensor they belong to, batch included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

Choice = Literal["parallel", "adaptive"]


@dataclass(frozen=True)
class Guarantee:
    """How far a bound can be trusted. Combining two values with ``&`` keeps the weaker guarantee.

    ``REAL`` is sound in exact arithmetic, ``ROUNDED`` in floating point too, ``PROBABILISTIC(delta)`` holds with
    probability at least ``1 - delta``, and ``NONE`` marks an estimate, which never certifies.
    """

    kind: Literal["NONE", "PROBABILISTIC", "REAL", "ROUNDED"]
    delta: float = 0.0

    _ORDER: ClassVar[tuple[str, ...]] = ("NONE", "PROBABILISTIC", "REAL", "ROUNDED")

    def __and__(self, other: Guarantee) -> Guarantee:
        """Return the weaker of two guarantees; two probabilistic ones add their failure probabilities."""
        if self.kind == other.kind == "PROBABILISTIC":
            return Guarantee("PROBABILISTIC", min(1.0, self.delta + other.delta))
        return min(self, other, key=lambda guarantee: self._ORDER.index(guarantee.kind))

    def __str__(self) -> str:
        """Return the name, with delta where there is one."""
        return f"PROBABILISTIC({self.delta:g})" if self.kind == "PROBABILISTIC" else self.kind


NONE = Guarantee("NONE")
REAL = Guarantee("REAL")
ROUNDED = Guarantee("ROUNDED")


def probabilistic(delta: float) -> Guarantee:
    """Return the guarantee of a bound that fails with probability at most ``delta``."""
    return Guarantee("PROBABILISTIC", delta)


@dataclass(frozen=True)
class Interval:
    """An element-wise box ``lower <= z <= upper`` and the guarantee it carries; public as ``autodual.Bounds``."""

    lower: Tensor
    upper: Tensor
    guarantee: Guarantee = REAL

    @property
    def center(self) -> Tensor:
        """The midpoint, computed so that huge ends do not overflow."""
        return 0.5 * self.lower + 0.5 * self.upper

    @property
    def radius(self) -> Tensor:
        """Half the width; never negative for ``lower <= upper``, and zero where an infinite value is all there is."""
        return torch.where(self.upper == self.lower, 0.0, 0.5 * self.upper - 0.5 * self.lower)

    @property
    def width(self) -> Tensor:
        """``upper - lower``."""
        return self.upper - self.lower

    def map(self, function: Callable[[Tensor], Tensor]) -> Interval:
        """Apply one function to both ends: sound for a non-decreasing function only."""
        return replace(self, lower=function(self.lower), upper=function(self.upper))

    def contains(self, z: Tensor, tolerance: float | Tensor = 0.0) -> Tensor:
        """Tell element by element whether ``z`` lies inside; NaN never does."""
        return (z >= self.lower - tolerance) & (z <= self.upper + tolerance)


@dataclass(frozen=True)
class Facts:
    """What is true of an operator; algorithms ask these, never the class. Each is tested by ``check_rule``.

    Attributes:
        affine: ``f(z) = A z + b`` in all perturbed inputs jointly.
        monotone: non-decreasing in every perturbed input, so a box maps end by end.
        convex: convex in its (single) perturbed input, element by element.
        positionwise: output element i depends on element i of its (single) input only.
        injective: affine with at most one non-zero per row *and* per column: permutations, scalings, selections.
            Coordinates that vary independently still do afterwards.
        elementwise: affine and element by element after broadcasting: positionwise and injective wherever the output has
            its single input's shape.
        selection: affine with at most one non-zero per row: every output element is one input element, scaled and shifted.
            Implied by injective and by elementwise with one input; said of repetitions such as overlapping windows.
        exact_when_stable: the relaxation is exact wherever ``undecided`` is false.
        aliases: the result may share memory with an input, so mutating one may change the other.
        outputs_tuple: the operator returns a tuple; the layer stands for one of its items.
    """

    affine: bool = False
    monotone: bool = False
    convex: bool = False
    positionwise: bool = False
    injective: bool = False
    elementwise: bool = False
    selection: bool = False
    exact_when_stable: bool = False
    aliases: bool = False
    outputs_tuple: bool = False


@dataclass(frozen=True)
class Slopes:
    """Slopes of the lower and upper line of a relaxed operator, one tensor per perturbed input.

    ``lower is upper`` (the same tuple) marks parallel lines: then the dual network is linear in the specification.
    """

    lower: tuple[Tensor, ...]
    upper: tuple[Tensor, ...]

    @property
    def parallel(self) -> bool:
        """Whether one line's slopes serve both sides."""
        return self.lower is self.upper

    @property
    def bare(self) -> Slopes:
        """These slopes without what a rule found on the way and only their conjugate has a use for."""
        return self


@dataclass(frozen=True)
class Field:
    """How an operator's outputs reach into its input, ``[batch, channels, *spatial]``, alike at every position.

    Along each spatial axis output position ``i`` depends on input position ``stride * i - padding`` and the ``extent - 1`` that
    follow it; those beyond the input's ends count as zero.
    """

    extent: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


@dataclass(frozen=True)
class Offsets:
    """Intercepts: ``slope_lo . z + lower <= f(z) <= slope_up . z + upper`` over the box."""

    lower: Tensor
    upper: Tensor


@dataclass(frozen=True)
class Slot:
    """The place of perturbed input number ``index`` among an operator's arguments.

    Attributes:
        index: number of the input.
        truth: whether the model has truth values there, which are 0 and 1 to a rule; None while that is not known.
    """

    index: int
    truth: bool | None = None


INPUT = Slot(0)


@dataclass(frozen=True, repr=False)
class Unknown:
    """Stands for a constant argument whose value is not known yet, when a call is judged before it is run.

    Attributes:
        truth: whether it holds truth values, or None while that is not known either.
    """

    truth: bool | None = None

    def __repr__(self) -> str:
        """Return a short mark."""
        return "<constant>"


UNKNOWN = Unknown()


def fill(value: Any, inputs: tuple[Any, ...]) -> Any:
    """Replace every ``Slot`` in nested tuples, lists, dicts and slices by the input it names."""
    if isinstance(value, Slot):
        return inputs[value.index]
    if isinstance(value, (tuple, list)):
        items = [fill(item, inputs) for item in value]
        if isinstance(value, torch.Size):
            return tuple(items)
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        return {key: fill(item, inputs) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(fill(value.start, inputs), fill(value.stop, inputs), fill(value.step, inputs))
    return value


def slots(value: Any) -> list[int]:
    """List the indices of the slots in an argument, in order of appearance."""
    return [slot.index for slot in _places(value)]


def _places(value: Any) -> list[Slot]:
    if isinstance(value, Slot):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, slice):
        value = [value.start, value.stop, value.step]
    return [slot for item in value for slot in _places(item)] if isinstance(value, (tuple, list)) else []


@dataclass(frozen=True)
class Call:
    """One call of an operator: constants filled in, ``Slot`` where a perturbed input goes.

    Attributes:
        operator: a module instance, a function (``torch.ops`` overloads included) or a tensor method's name.
        args: positional arguments; for a method the tensor itself comes first.
        kwargs: keyword arguments.
        item: for an operator that returns a tuple, which of its items this call stands for.
    """

    operator: nn.Module | Callable[..., Any] | str
    args: tuple[Any, ...] = (INPUT,)
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    item: int | None = None

    def __call__(self, *inputs: Any) -> Any:
        """Run the operator itself on these inputs."""
        inputs = tuple(z != 0 if index in self.truths else z for index, z in enumerate(inputs))
        args, kwargs = fill(self.args, inputs), fill(self.kwargs, inputs)
        if isinstance(self.operator, str):
            result = getattr(args[0], self.operator)(*args[1:], **kwargs)
        else:
            result = self.operator(*args, **kwargs)
        return result if self.item is None else result[self.item]

    @cached_property
    def truths(self) -> frozenset[int]:
        """Indices of the inputs that are 0 and 1 and that the operator takes as truth values."""
        return frozenset(slot.index for slot in _places((self.args, self.kwargs)) if slot.truth)

    @property
    def arity(self) -> int:
        """Number of perturbed inputs."""
        return len(set(slots(self.args) + slots(self.kwargs)))


@dataclass(frozen=True)
class RuleSample:
    """One call to test a rule on, good or bad.

    Attributes:
        label: short name shown when the sample fails.
        call: the operator with its constant arguments.
        shapes: shape of each perturbed input; axis 0 is the batch unless ``batch_axis`` says otherwise.
        low: smallest input value a box may reach.
        high: largest input value a box may reach.
        error: for a bad sample, the type of the exception that running the rule must raise.
        message: for a bad sample, a part of the exception's text.
        batch_axis: axis of the batch in the first input, or None when the operator itself mixes it away.
    """

    label: str
    call: Call
    shapes: tuple[tuple[int, ...], ...]
    low: float = -10.0
    high: float = 10.0
    error: type[Exception] | None = None
    message: str = ""
    batch_axis: int | None = 0


class DualLayer(ABC):
    """One operator call and its dual. Subclasses are final, stateless and registered by decorator."""

    facts: ClassVar[Facts] = Facts()
    source: ClassVar[str] = ""

    def __init__(self, call: Call) -> None:
        self.call = call

    def forward(self, *inputs: Tensor) -> Tensor:
        """Run the operator itself; the only reference the rule's tests use."""
        return self.call(*inputs)

    @property
    def arguments(self) -> SimpleNamespace:
        """The call's arguments under the names of ``parameters``, whatever the spelling of the operator."""
        if isinstance(self.call.operator, nn.Module):
            return SimpleNamespace(**self.from_module(self.call.operator, *self.call.args, **self.call.kwargs))
        return SimpleNamespace(**self.parameters(*self.call.args, **self.call.kwargs))

    @staticmethod
    def parameters(*args: Any, **kwargs: Any) -> dict[str, Any]:
        """Name the arguments of the functional spelling; a rule that reads its arguments defines this."""
        raise NotImplementedError("this rule does not name its operator's arguments")

    @staticmethod
    def from_module(module: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Name the arguments of the module spelling; a rule that reads its arguments defines this."""
        raise NotImplementedError("this rule does not name its module's arguments")

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Say why this particular call has no dual here, or None if it has one.

        Asked before anything is run: constants that are not Python literals appear as ``UNKNOWN``.
        """
        return None

    @abstractmethod
    def interval(self, *boxes: Interval) -> Interval:
        """Enclose the operator's values over a box, element by element."""

    @classmethod
    @abstractmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield calls, good and bad, that the generic checker runs this rule on."""
