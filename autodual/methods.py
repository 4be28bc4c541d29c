"""How to bound: one small frozen dataclass per method. A method's string names its default instance."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from autodual.errors import SpecificationError


@dataclass(frozen=True)
class IBP:
    """``"interval"``: interval arithmetic through the network, the last affine segment merged with the specification.

    Example:
        >>> import autodual, torch
        >>> class Gap(torch.nn.Module):  # takes the values 0 to 1 for x from -1 to 3
        ...     def forward(self, x):
        ...         return torch.relu(x) - x
        >>> net, x, region = autodual.certify(Gap()), torch.zeros(1, 1), autodual.Box(-1.0, 3.0)
        >>> bounds = net.bounds(x, region, method=autodual.IBP())
        >>> bounds.lower, bounds.upper  # the two terms are taken for independent
        (tensor([[-3.]]), tensor([[4.]]))
    """


@dataclass(frozen=True)
class Dual:
    """``"dual"``: the dual network with parallel slopes, the thesis' bound (Algorithms 1 and 2).

    Attributes:
        strict: take no liberty. By default an element that interval arithmetic proves stable is taken as stable and gets
            no row of its own: sound, rarely different, much cheaper; and outputs bounded without a specification are met with
            their interval bounds. Published figures are checked with ``strict=True``.
        walk: ``backward`` sweeps rows from the bounded element to the input; ``forward`` pushes every noise symbol from the
            input on (Algorithm 2). The numbers agree; forwards is cheaper for networks with few inputs.

    Example:
        >>> import autodual, torch
        >>> class Gap(torch.nn.Module):  # takes the values 0 to 1 for x from -1 to 3
        ...     def forward(self, x):
        ...         return torch.relu(x) - x
        >>> net, x, region = autodual.certify(Gap()), torch.zeros(1, 1), autodual.Box(-1.0, 3.0)
        >>> bounds = net.bounds(x, region, method=autodual.Dual(strict=True))
        >>> bounds.lower, bounds.upper  # two lines of one slope enclose the ReLU
        (tensor([[-0.7500]]), tensor([[1.]]))
    """

    strict: bool = False
    walk: Literal["backward", "forward"] = "backward"

    def __post_init__(self) -> None:
        """Check the options."""
        if self.walk not in ("backward", "forward"):
            raise SpecificationError(f'walk must be "backward" or "forward", got {self.walk!r}')


@dataclass(frozen=True)
class Adaptive:
    """``"adaptive"``: lower and upper lines chosen separately for smallest area; two signs per walk.

    Attributes:
        strict: as for ``Dual``.

    Example:
        >>> import autodual, torch
        >>> class Gap(torch.nn.Module):  # takes the values 0 to 1 for x from -1 to 3
        ...     def forward(self, x):
        ...         return torch.relu(x) - x
        >>> net, x, region = autodual.certify(Gap()), torch.zeros(1, 1), autodual.Box(-1.0, 3.0)
        >>> bounds = net.bounds(x, region, method=autodual.Adaptive())
        >>> bounds.lower, bounds.upper  # the lower line may have another slope than the upper one: here nothing is lost
        (tensor([[0.]]), tensor([[1.]]))
    """

    strict: bool = False


Method = IBP | Dual | Adaptive

METHODS: dict[str, type[Method]] = {"interval": IBP, "dual": Dual, "adaptive": Adaptive}


def resolve(method: str | Method) -> Method:
    """Turn a method's name into its default instance and check that it is one.

    Raises:
        SpecificationError: no such method.
    """
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]()
    if isinstance(method, tuple(METHODS.values())):
        return method
    known = ", ".join(
        f'"{name}" ({kind.__name__}({", ".join(f.name for f in fields(kind))}))' for name, kind in METHODS.items()
    )
    raise SpecificationError(f"unknown method {method!r}; known are {known}")
