"""How to bound: one small frozen dataclass per method. A method's string names its default instance."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, Literal, Self, get_args

import numpy as np

from autodual.errors import SpecificationError
from autodual.estimators import BOUNDING, FEWEST, Estimator
from dual_layers import NONE, REAL, Guarantee, probabilistic

RowLayout = Literal["auto", "dense", "whole", "windows"]


class Proof:
    """What methods have in common whose bounds hold in exact arithmetic."""

    @property
    def guarantee(self) -> Guarantee:
        """What their bounds are worth."""
        return REAL

    def part(self, index: int, count: int) -> Self:
        """Return the method for one of several uses whose results are claimed together."""
        return self

    def __repr__(self) -> str:
        """Return the constructor's call without what is not set."""
        shown = {each.name: getattr(self, each.name) for each in fields(self) if each.repr}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items() if value is not None)})"


@dataclass(frozen=True)
class IBP(Proof):
    """``"interval"``: interval arithmetic through the network, the last affine segment merged with the specification.

    Where intervals leave the domain of an operator, such as a divisor's that hold 0, its input is bounded by the dual network.

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


@dataclass(frozen=True, repr=False)
class Dual(Proof):
    """``"dual"``: the dual network with parallel slopes, the thesis' bound (Algorithms 1 and 2).

    Attributes:
        strict: take no liberty. By default an element that interval arithmetic proves stable is taken as stable and gets
            no row of its own: sound, rarely different, much cheaper; and outputs bounded without a specification are met with
            their interval bounds. Published figures are checked with ``strict=True``.
        walk: ``backward`` sweeps rows from the bounded element to the input; ``forward`` pushes every noise symbol from the
            input on (Algorithm 2). The numbers agree; forwards is cheaper for networks with few inputs.
        rows: how the backward walk lays out the rows of hidden elements: each in every example (``dense``), undecided ones
            alone (``whole``), as the windows that they depend on where those are small (``windows``). The numbers agree; by
            default each node's rows take the layout that visits the fewest elements, which ``explain`` shows.
        intermediate: ``"interval"`` bounds the inputs of nonlinear operators by intervals, which leaves one walk, that of the
            rows asked for: CROWN-IBP (Zhang et al., 2020) with ``Adaptive``. By default they are bounded by the same method.

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
    rows: RowLayout = field(default="auto", repr=False)
    intermediate: Literal["interval"] | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if self.walk not in ("backward", "forward"):
            raise SpecificationError(f'walk must be "backward" or "forward", got {self.walk!r}')
        _check_rows(self.rows)
        _check_intermediate(self.intermediate)


@dataclass(frozen=True, repr=False)
class Adaptive(Proof):
    """``"adaptive"``: lower and upper lines chosen separately for smallest area; two signs per walk.

    Attributes:
        strict: as for ``Dual``.
        rows: as for ``Dual``.
        intermediate: as for ``Dual``.

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
    rows: RowLayout = field(default="auto", repr=False)
    intermediate: Literal["interval"] | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        _check_rows(self.rows)
        _check_intermediate(self.intermediate)


def _check_rows(rows: object) -> None:
    if rows not in get_args(RowLayout):
        raise SpecificationError(f"rows must be one of {', '.join(get_args(RowLayout))}, got {rows!r}")


def _check_intermediate(intermediate: object) -> None:
    if intermediate not in (None, "interval"):
        raise SpecificationError(f'intermediate must be None or "interval", got {intermediate!r}')


HIDDEN_STEPS = 12
"""The most steps that hidden elements climb by default: later ones cost more than they gain (decision 0012)."""


@dataclass(frozen=True, repr=False)
class Optimized(Proof):
    """``"optimized"``: the slopes of every row climb the dual objective; for ReLU networks towards the linear program's value.

    Inputs of nonlinear operators are bounded by ``"dual"``, by ``"adaptive"`` and by intervals; each end is the best of these,
    and those of undecided elements climb from there, node after node (alpha-CROWN; Xu et al., 2021). Each row starts from the
    better of both methods' slopes and climbs, by steps that are a share of a slope's range. No bound is worse than
    ``"dual"``'s or ``"adaptive"``'s, up to rounding. ``verify`` stops for each margin as soon as it is proved to be positive,
    and has nothing climb for an example that fixed slopes prove; ``bounds`` and ``margins`` take all steps. A loss may use it:
    slopes are constants to the loss, which by the envelope theorem changes no derivative where they are best.

    Attributes:
        steps: uphill steps for each row; with 0 the bound is the best of both methods' slopes, on the boxes of both.
        hidden_steps: steps for both ends of undecided inputs of nonlinear operators; 0 leaves the boxes as both methods find
            them, which takes a fraction of the time. By default as many as ``steps``, 12 at most, where only convolutions,
            linear layers, sums and piecewise-linear functions of single elements come before, and none elsewhere (behind
            max pooling, say), where they are dear.
        hidden_rows: how many undecided elements of a node of one example climb: those whose lines are furthest apart. Where
            they climb in windows, as many do as cost what so many whole rows do. By default all climb.

    Example:
        >>> import autodual, torch
        >>> _ = torch.manual_seed(0)
        >>> hidden = torch.nn.Linear(2, 9), torch.nn.ReLU(), torch.nn.Linear(9, 9), torch.nn.ReLU()
        >>> net = autodual.certify(torch.nn.Sequential(*hidden, torch.nn.Linear(9, 1)))
        >>> x, region = torch.zeros(1, 2), autodual.LInf(1.0)
        >>> adaptive, best = (net.bounds(x, region, method=method) for method in ("adaptive", "optimized"))
        >>> bool((best.lower > adaptive.lower).all() and (best.upper < adaptive.upper).all())
        True
    """

    steps: int = 20
    hidden_steps: int | None = None
    hidden_rows: int | None = None

    strict: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options."""
        for name, value in vars(self).items():
            if value != 0 and not _is_count(value) and (value is not None or name == "steps"):
                raise SpecificationError(f"{name} must be an integer of at least 0, got {value!r}")

    @property
    def steps_inside(self) -> int:
        """Steps for hidden elements."""
        return min(self.steps, HIDDEN_STEPS) if self.hidden_steps is None else self.hidden_steps


@dataclass(frozen=True, repr=False)
class Auto(Proof):
    """``"auto"``: interval, dual, adaptive and optimized bounds in turn, each for the examples that are still undecided.

    ``verify``, ``flag``, ``radius`` and ``margins`` leave an example once all its margins are proved to be positive, and give
    up one that is misclassified without any perturbation; ``bounds``, without such a question, runs all methods for all
    examples. Every end is the best one seen. ``Report.settled`` says which method settled what. A loss takes the last method
    at once.

    Attributes:
        steps: as for ``Optimized``.
        hidden_steps: as for ``Optimized``.
        budget: seconds after which no further method is begun; the results then depend on how fast the computer is.

    Example:
        >>> import autodual, torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 9), torch.nn.ReLU(), torch.nn.Linear(9, 2))
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> net = autodual.certify(model)
        >>> net.verify(x, model(x).argmax(1), autodual.LInf(0.01), method=autodual.Auto(budget=60.0)).settled
        ('interval', 'interval')
    """

    steps: int = 20
    hidden_steps: int | None = None
    budget: float | None = None

    strict: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options."""
        _ = self.best
        number = isinstance(self.budget, (int, float)) and not isinstance(self.budget, bool)
        if self.budget is not None and not (number and self.budget >= 0):
            raise SpecificationError(f"budget must be None or a number of seconds of at least 0, got {self.budget!r}")

    @property
    def best(self) -> Optimized:
        """The last method."""
        return Optimized(self.steps, self.hidden_steps)

    @property
    def stages(self) -> tuple[tuple[str, Method], ...]:
        """The methods by name, in their order."""
        return ("interval", IBP()), ("dual", Dual()), ("adaptive", Adaptive()), ("optimized", self.best)


HEAVY = 200
"""Symbols that a certificate by projections walks exactly, by default."""


@dataclass(frozen=True)
class Projected:
    """``"projected"``: the dual network with parallel slopes by random projections, some ``r + 2`` forward passes.

    A hidden unit's radius is a norm over all noise symbols before it. One stream of ``r`` random vectors, pushed forward,
    carries them all; the magnitudes of its samples tell the norm (thesis, section 3.4.5 and Algorithm 3). With ``median`` or
    ``log-mean`` the result is an *estimate* (guarantee ``NONE``): made to train on, it certifies nothing. With ``geometric``,
    ``order`` or ``tightest`` each radius is an upper bound except with a stated probability (section 3.4.6, errata 10 and
    11), every hidden layer has projections of its own, and the guarantee is ``PROBABILISTIC``.

    Attributes:
        r: number of projections; an estimate's relative spread is about ``1.6 / sqrt(r)``.
        estimator: ``median`` (to train on: gradients reach one sample per unit), ``log-mean`` (no sort, but gradients of heavy
            tails, since samples near 0 count most), ``geometric`` (Chernoff's tail), ``order`` (exact binomial tail) or
            ``tightest`` (the better of these two).
        seed: of the random numbers, which no batch changes; by default drawn from torch's global generator. A certificate's
            probability is over them: it says nothing about weights or inputs that were chosen knowing the seed.
        delta: with ``geometric``, ``order`` and ``tightest``, the probability that a certificate among ``examples`` fails.
        examples: how many examples ``delta`` covers together: 1 for a statement about each alone, or the size of the data set,
            which is what the command line takes by itself.
        first_exact: bound what lies behind the first affine segment exactly instead.
        last_exact: walk the rows of the specification back exactly where there are at most ``r`` of them.
        intersect: meet every estimate with the interval bound, and spare elements that this one proves stable.
        heavy: with ``geometric``, ``order`` and ``tightest``, how many symbols are walked exactly beside the projections: those
            that weigh most, which often hold most of a radius; 200 by default.
        at_once: projections walked at a time, to save memory: every layer is then reached anew from the input, and in training
            recomputed in the backward pass. By default all streams are kept on the way.

    Example:
        >>> import autodual, torch
        >>> _ = torch.manual_seed(0)
        >>> hidden = [module for _ in range(3) for module in (torch.nn.Linear(64, 64), torch.nn.ReLU())]
        >>> net = autodual.certify(torch.nn.Sequential(*hidden, torch.nn.Linear(64, 2)).double())
        >>> x, region = torch.zeros(1, 64).double(), autodual.LInf(0.1)
        >>> exact, few = net.bounds(x, region), net.bounds(x, region, method=autodual.Projected(r=200, seed=0))
        >>> str(few.guarantee), bool(((few.upper - few.lower) / (exact.upper - exact.lower) - 1).abs().max() < 0.2)
        ('NONE', True)
        >>> sure = net.bounds(x, region, method=autodual.Projected(r=50, estimator="tightest", delta=0.01, seed=0))
        >>> str(sure.guarantee), bool(((sure.upper - sure.lower) / (exact.upper - exact.lower)).max() < 1.2)
        ('PROBABILISTIC(0.01)', True)
    """

    r: int = 50
    estimator: Estimator = "median"
    seed: int | None = None
    delta: float = 0.01
    examples: int = 1
    first_exact: bool = True
    last_exact: bool = True
    intersect: bool = True
    heavy: int | None = None
    at_once: int | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        known = get_args(Estimator)
        if self.estimator not in known:
            raise SpecificationError(f"estimator must be one of {', '.join(known)}, got {self.estimator!r}")
        fewest = 1 if self.estimator in BOUNDING else FEWEST
        if not _is_count(self.r) or self.r < fewest:
            raise SpecificationError(f"r, the number of projections, must be an integer of at least {fewest}, got {self.r!r}")
        if self.seed is not None and not (self.seed == 0 or _is_count(self.seed)):
            raise SpecificationError(f"seed must be None or an integer of at least 0, got {self.seed!r}")
        if not isinstance(self.delta, (int, float)) or not 1e-100 < self.delta < 1:
            raise SpecificationError(f"delta, the probability of failure, must lie between 0 and 1, got {self.delta!r}")
        if not _is_count(self.examples):
            raise SpecificationError(f"examples must be a positive integer, got {self.examples!r}")
        if self.heavy is not None and self.heavy != 0 and not (self.bounding and _is_count(self.heavy)):
            raise SpecificationError(
                f"heavy must be None or an integer of at least 0, and for an estimate 0 or None, got {self.heavy!r} "
                f'with estimator "{self.estimator}"'
            )
        if self.at_once is not None and not _is_count(self.at_once):
            raise SpecificationError(f"at_once must be None or a positive integer, got {self.at_once!r}")
        if self.bounding and not (self.last_exact and self.intersect):
            raise SpecificationError(
                f'estimator "{self.estimator}" needs last_exact and intersect: they only sharpen a certificate'
            )

    @property
    def bounding(self) -> bool:
        """Whether radii are upper bounds except with a stated probability."""
        return self.estimator in BOUNDING

    @property
    def columns(self) -> int:
        """How many symbols are walked exactly beside the projections."""
        if not self.bounding:
            return 0
        return HEAVY if self.heavy is None else self.heavy

    @property
    def strict(self) -> bool:
        """As for ``Dual``: whether no element is spared."""
        return not self.intersect

    @property
    def guarantee(self) -> Guarantee:
        """What one example's bounds are worth."""
        return probabilistic(self.delta / self.examples) if self.bounding else NONE

    def part(self, index: int, count: int) -> Self:
        """Return the method for one of several uses whose results are claimed together.

        Each has its share of delta, and random numbers of its own: what is asked next may depend on the last answer.
        """
        seed = None if self.seed is None else int(np.random.SeedSequence((self.seed, index)).generate_state(1, np.uint64)[0])
        return replace(self, delta=self.delta / count, seed=seed)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class LP(Proof):
    """``"lp"``: the optimum of the linear relaxation (thesis, eq. 3.6) by scipy's HiGHS, for reference and small networks.

    One program for every row of every example, over the boxes that another method finds. The bound does not rest on the solver:
    its multipliers only choose the slopes of an ordinary dual network, and where it fails the other method's bound remains.

    Attributes:
        intermediate: the method that bounds the inputs of nonlinear nodes: a name, or options such as ``Dual(strict=True)``.
        cells: slopes tried for a curved operator, which has no finite number of best lines.
        time_limit: seconds that one program may take; None for no limit.

    Example:
        >>> import autodual, torch
        >>> class Gap(torch.nn.Module):  # takes the values 0 to 1 for x from -1 to 3
        ...     def forward(self, x):
        ...         return torch.relu(x) - x
        >>> net, x, region = autodual.certify(Gap()), torch.zeros(1, 1), autodual.Box(-1.0, 3.0)
        >>> bounds = net.bounds(x, region, method=autodual.LP(intermediate="dual"))
        >>> bounds.lower, bounds.upper
        (tensor([[0.]]), tensor([[1.]]))
    """

    intermediate: str | Method = "adaptive"
    cells: int = 16
    time_limit: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        if not isinstance(self.base, Proof) or isinstance(self.base, (Auto, LP)):
            raise SpecificationError(
                f'intermediate must prove its boxes by walks, as "dual" and "adaptive" do, got {self.intermediate!r}'
            )
        if not _is_count(self.cells):
            raise SpecificationError(f"cells must be a positive integer, got {self.cells!r}")
        if self.time_limit is not None and not self.time_limit > 0:
            raise SpecificationError(f"time_limit must be None or a positive number of seconds, got {self.time_limit!r}")

    @property
    def base(self) -> Method:
        """The options of the method that finds the boxes."""
        return resolve(self.intermediate)


Method = IBP | Dual | Adaptive | Optimized | Auto | Projected | LP

METHODS: dict[str, type[Method]] = {
    "interval": IBP,
    "dual": Dual,
    "adaptive": Adaptive,
    "optimized": Optimized,
    "auto": Auto,
    "projected": Projected,
    "lp": LP,
}


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


def at_once(method: Method) -> Method:
    """Return the last of several methods, for what cannot be settled one after the other."""
    return method.best if isinstance(method, Auto) else method
