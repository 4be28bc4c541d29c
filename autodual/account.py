"""An account of one margin: its value at the reference point, and what the region and each relaxation take from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from autodual.methods import Method
from autodual.rendering import table
from dual_layers import NONE, Guarantee, Interval

LISTED = 8
"""How many elements the table lists."""


@dataclass(frozen=True)
class Element:
    """One element of an entry: what it takes, and why it does.

    Attributes:
        index: its place in the node's tensor, the batch left out.
        lower: lower end of its box.
        upper: upper end of its box.
        nu: the dual variable: how much the margin gains from one unit more of this element.
        amount: what it takes from the margin.
    """

    index: tuple[int, ...]
    lower: float
    upper: float
    nu: float
    amount: float


@dataclass(frozen=True)
class Entry:
    """What one perturbed input or one relaxed operator takes from a margin.

    Attributes:
        node: name of the node, as in ``net.explain()``.
        operator: what it computes; ``input`` for an input.
        source: its line in the model's source, or the path of its module.
        amount: what it takes, at least 0.
        amounts: how that is made up of the node's elements, shaped like one example. An input's add up to the excess of its
            region at ``nu`` (for a ball element i takes ``nu_i`` times the i-th change of the worst point); None for a region
            of one's own whose support is not positively homogeneous, or not differentiable.
        nu: the row of dual variables that arrives here.
        box: where the relaxation looks: bounds of the input of a function of one element, of the value of any other operator.
        of_input: whether ``box`` bounds the operator's input.
    """

    node: str
    operator: str
    source: str
    amount: float
    amounts: Tensor | None
    nu: Tensor
    box: Interval
    of_input: bool

    @property
    def is_input(self) -> bool:
        """Whether this is a perturbed input."""
        return self.operator == "input"

    @property
    def elements(self) -> int:
        """How many elements the node has."""
        return self.nu.numel()

    @property
    def contributing(self) -> int | None:
        """How many elements take something."""
        return None if self.amounts is None else int((self.amounts > 0).sum())

    @property
    def half(self) -> int | None:
        """How many elements, the largest first, take half of it."""
        if self.amounts is None or self.amount <= 0:
            return None
        sums = self.amounts.double().flatten().sort(descending=True).values.cumsum(0)
        return min(int((sums < 0.5 * self.amount).sum()) + 1, self.elements)

    def largest(self, count: int = LISTED) -> tuple[Element, ...]:
        """Return the elements that take most, largest first; those that take nothing are left out."""
        if self.amounts is None:
            return ()
        amounts = self.amounts.flatten()
        places = amounts.argsort(descending=True)[:count].tolist()
        columns = (self.box.lower.flatten(), self.box.upper.flatten(), self.nu.flatten(), amounts)
        rows = ((place, *(float(column[place]) for column in columns)) for place in places if amounts[place] > 0)
        return tuple(Element(_index(place, self.nu), *numbers) for place, *numbers in rows)


@dataclass(frozen=True)
class Sensitivity:
    """How a margin changes as all radii of a region grow alike.

    Attributes:
        total: derivative of the margin by eps. At a kink, as where a unit becomes unstable, that of one side.
        fixed: the part of it that is due to the larger region alone, the relaxation held fixed; the rest is the relaxation's.
        eps: the radius, None where it is not one number.
        crossing: an *estimate* of the radius at which the margin is 0: where its tangent is. It bounds nothing. None where
            eps is not one number, or the tangent is never 0.
    """

    total: float
    fixed: float
    eps: float | None
    crossing: float | None


@dataclass(frozen=True)
class Account:
    """Where a margin's bound is lost: ``reference - sum of all amounts = margin``. Print it, or draw it.

    Attributes:
        example: the example's number in the report.
        y: its label.
        target: the class whose margin ``f_y - f_target`` this is.
        margin: the lower bound that the report has.
        allowance: what float rounding may cost it; a certificate needs ``margin > allowance``.
        reference: the margin at the reference point, the region's centre.
        entries: perturbed inputs, then relaxed operators in the order of the model.
        sensitivity: how the margin depends on the radius, None where a region has none.
        method: the method.
        region: description of the region.
        guarantee: what the margin is worth; ``NONE`` makes it an estimate.
    """

    example: int
    y: int
    target: int
    margin: float
    allowance: float
    reference: float
    entries: tuple[Entry, ...]
    sensitivity: Sensitivity | None
    method: Method
    region: str
    guarantee: Guarantee

    @property
    def lost(self) -> float:
        """All that is taken from the margin at the reference point."""
        return math.fsum(entry.amount for entry in self.entries)

    def share(self, amount: float) -> float:
        """Return an amount as a share of all that is lost."""
        return amount / self.lost if self.lost > 0 else 0.0

    @property
    def title(self) -> str:
        """Which margin this is an account of."""
        return f"f_{self.y} - f_{self.target} of example {self.example}"

    @property
    def outcome(self) -> str:
        """What the margin is: a lower bound, or an estimate of one."""
        return "estimate" if self.guarantee == NONE else "lower bound"

    def __str__(self) -> str:
        """Lay the account out in plain text."""
        heading = f"margin  {self.title}\nregion  {self.region}\nmethod  {self.method}, guarantee {self.guarantee}"
        blocks = [heading, table(_ledger(self), "lrlrrrl")]
        listed = _listed(self)
        if listed:
            blocks.append(table([("largest elements", "box", "nu", "amount", "share"), *listed], "lrrrr"))
        return "\n\n".join([*blocks, "\n".join(_sensitivity(self.sensitivity))])

    def draw(self, path: str | Path) -> Path:
        """Draw the way from the margin at the reference point down to its bound, and where on the way it is lost.

        Args:
            path: where to write; the suffix picks the format (png, svg, pdf).

        Returns:
            The path written.

        Raises:
            ImportError: matplotlib is missing.
        """
        from autodual.account_picture import draw  # matplotlib is an extra

        return draw(self, Path(path))


def _ledger(account: Account) -> list[tuple[str, ...]]:
    """Return the rows of the table: the reference, what is taken, the margin that is left."""
    largest = max(abs(account.reference), abs(account.margin), 1e-30)
    digits = max(0, 4 - math.floor(math.log10(largest)))
    rows = [("", "margin", "operator", "share", "elements", "half in", "source")]
    rows.append(("at the centre", f"{account.reference:.{digits}f}", "", "", "", "", ""))
    for entry in account.entries:
        counted = f"{'?' if entry.contributing is None else entry.contributing} of {entry.elements}"
        half, share = "" if entry.half is None else str(entry.half), f"{account.share(entry.amount):.1%}"
        rows.append((entry.node, f"{-entry.amount:.{digits}f}", entry.operator, share, counted, half, entry.source))
    rows.append((account.outcome, f"{account.margin:.{digits}f}", "", "", "", "", ""))
    return rows


def _listed(account: Account) -> list[tuple[str, ...]]:
    """Return the rows of the table of elements, those of all entries together."""
    pairs = [(entry, element) for entry in account.entries for element in entry.largest()]
    pairs = sorted(pairs, key=lambda pair: -pair[1].amount)[:LISTED]
    return [
        (
            f"{entry.node}[{', '.join(map(str, element.index))}]",
            ("" if entry.of_input else "value ") + f"[{element.lower:.4g}, {element.upper:.4g}]",
            f"{element.nu:.4g}",
            f"{element.amount:.4g}",
            f"{account.share(element.amount):.1%}",
        )
        for entry, element in pairs
    ]


def _sensitivity(found: Sensitivity | None) -> list[str]:
    if found is None:
        return ["d margin / d eps  the region has no eps"]
    total, fixed, rest = (f"{part:.4g}" for part in (found.total, found.fixed, found.total - found.fixed))
    lines = [f"d margin / d eps  {total}: {fixed} from the larger region, {rest} from the looser relaxation"]
    if found.crossing is not None:
        lines.append(f"its tangent is 0   at eps = {found.crossing:.4g}, now {found.eps:.4g}: an estimate, no bound")
    return lines


def _index(place: int, tensor: Tensor) -> tuple[int, ...]:
    """Turn a place in a flattened tensor into its index."""
    return tuple(int(i) for i in np.unravel_index(place, tuple(tensor.shape)))
