"""Every rule under every spelling it is registered for, with the batch on each axis that PyTorch allows, and in place.

The matrix is read from the registry, so a new rule is covered unasked: ``tests/reference/coverage.py`` says how. For each
cell a model that does nothing else than this call (it moves the examples where the cell wants them, and back) is certified.

    python tests/test_coverage.py        prints the matrix, with the reasons why cells are empty
"""

from __future__ import annotations

import inspect
import math
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autodual
from autodual.errors import AutoDualError
from dual_layers import DualLayer, cases, keys_of, lookup, registered_rules, spelling
from tests.reference.coverage import AXES, NO_TWIN, Cell, Key, row, run

METHODS = ("interval", "dual")

REFLECTED = ("__rsub__", "__rtruediv__", "__rdiv__")  # torch.fx spells them as operators

pytestmark = pytest.mark.filterwarnings("ignore")


class Single(nn.Module):
    """One call and nothing else."""

    def __init__(self, cell: Cell, inplace: bool = False) -> None:
        super().__init__()
        self.module = cell.call.operator if isinstance(cell.call.operator, nn.Module) else None
        self.cell, self.inplace = cell, inplace

    def run(self, *inputs: Tensor) -> Tensor:
        inputs = tuple(z.movedim(0, self.cell.axis) if self.cell.axis else z for z in inputs)
        if self.inplace:
            written = inputs[0] != 0 if self.cell.mask else inputs[0].clone()
            self.cell.call(written, *inputs[1:])
            written = written.double() if self.cell.mask else written
            return written.movedim(self.cell.output, 0) if self.cell.output else written
        result = self.cell.call(*inputs)
        result = result.double() if self.cell.truth else result
        return result.movedim(self.cell.output, 0) if self.cell.output else result


class One(Single):
    def forward(self, x):
        return self.run(x)


class Two(Single):
    def forward(self, x, y):
        return self.run(x, y)


class Three(Single):
    def forward(self, x, y, z):
        return self.run(x, y, z)


MODELS = {1: One, 2: Two, 3: Three}


def certified(
    cell: Cell, rule: type[DualLayer], inplace: bool = False, methods: tuple[str, ...] = METHODS
) -> dict[str, autodual.Bounds]:
    """Bound a cell's model; raise if the rule is not used, or a point leaves the bounds."""
    model = MODELS[cell.call.arity](cell, inplace).double().eval()
    lower, upper = cell.boxes()
    x = tuple(0.5 * (a + b) for a, b in zip(lower, upper, strict=True))
    names = list(inspect.signature(model.forward).parameters)
    moving = len(names) - cell.fixed
    region = {name: autodual.Box(a, b) for name, a, b in zip(names[:moving], lower, upper, strict=False)}
    lower, upper = (*lower[:moving], *x[moving:]), (*upper[:moving], *x[moving:])
    net, generator = autodual.certify(model, x), torch.Generator().manual_seed(2)
    program = net._problem(x, region).program
    used = {*program.rules.values(), *(part.rule for parts in program.enclosures.values() for part in parts)}
    spelled_otherwise = cell.call.operator in REFLECTED or inplace
    assert rule in used or spelled_otherwise, f"the model is traced to {sorted(each.__name__ for each in used)}"
    found = {method: net.bounds(x, region, method=method) for method in methods}
    for point in range(6):
        at = [torch.rand(a.shape, generator=generator, dtype=a.dtype) for a in lower]
        at = [share.round() if point % 2 else share for share in at]
        values = model(*(a + share * (b - a) for a, b, share in zip(lower, upper, at, strict=True))).reshape(len(x[0]), -1)
        tolerance = 64 * max(torch.finfo(values.dtype).eps, 1e-11) * (1 + values.abs().max())
        for method, bounds in found.items():
            outside = int((~(bounds.contains(values, tolerance) | values.isnan())).sum())
            assert outside == 0, f"a point is outside the {method} bounds"
    return found


def alike(left: dict[str, autodual.Bounds], right: dict[str, autodual.Bounds]) -> bool:
    both = left.keys() & right.keys()
    pairs = [(getattr(left[method], side), getattr(right[method], side)) for method in both for side in ("lower", "upper")]
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True) for a, b in pairs)


RULES = pytest.mark.parametrize("rule", registered_rules(), ids=lambda rule: rule.__name__)


@RULES
def test_cells_are_certified(rule: type[DualLayer]) -> None:
    """A function, a method and a module on every axis and in place; every second other spelling, with the examples first."""
    keys = keys_of(rule)
    chosen = {kind(key): key for key in reversed(keys)}
    others = [key for key in keys if chosen[kind(key)] is not key]
    drawn = Random(rule.__name__).sample(others, math.ceil(len(others) / 2))
    check(rule, dict.fromkeys(chosen.values(), (*AXES, "in place")) | dict.fromkeys(drawn, ("first",)))


@pytest.mark.slow
@RULES
def test_all_cells_are_certified(rule: type[DualLayer]) -> None:
    check(rule, dict.fromkeys(keys_of(rule), (*AXES, "in place")))


def kind(key: Key) -> str:
    return type(key).__name__ if isinstance(key, (str, type, torch._ops.OpOverload)) else "function"


def check(rule: type[DualLayer], columns: dict[Key, tuple[str, ...]]) -> None:
    """Each cell is traced to this rule and sound; calls that give the same values have the same bounds.

    The dual bounds one of them, intervals all: spelling and place change what is traced, not how a rule's lines are walked.
    """
    faults, known, walked = [], {}, set()
    for key, names in columns.items():
        found = row(rule, key)
        for column, cell in found.cells.items():
            if isinstance(cell, str) or (column not in names and isinstance(found.cells["first"], Cell)):
                continue
            same = fingerprint(cell)
            again = same in walked or cell.axis > 0 or isinstance(key, torch._ops.OpOverload)
            walked |= set() if again else {same}
            try:
                bounds = certified(cell, rule, column == "in place", ("interval",) if again else METHODS)
            except (AutoDualError, AssertionError, RuntimeError, ValueError, TypeError, IndexError) as error:
                faults.append(f"{found.name}, {column}: {type(error).__name__}: {error}")
                continue
            name, first = known.setdefault(same, (f"{found.name}, {column}", bounds))
            if not alike(first, bounds):
                faults.append(f"{found.name}, {column}: other bounds than {name}")
    assert not faults, "\n".join(faults)


def test_a_wrong_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = lookup(torch.abs)
    honest = rule.interval
    monkeypatch.setattr(
        rule, "interval", lambda self, box: autodual.Bounds(honest(self, box).lower, 0.9 * honest(self, box).upper)
    )
    with pytest.raises(AssertionError, match=r"Tensor\.abs, in place.*outside the interval bounds"):
        check(rule, {"abs": (*AXES, "in place")})


# Rows without a cell on any axis: PyTorch itself has none in which the examples stay apart.
ABSENT = {
    "one number, or one matrix, comes out for all examples together": (
        "dot vdot mm mv addmv inner outer kron tensordot diag masked_select sum mean var std var_mean std_mean prod any all"
    ),
    "the value is a single number, and no example's": "fill fill.Tensor",
    "the number of examples is an argument": "native_group_norm",
    "it takes no values, only positions, a condition or lists": (
        "repeat_interleave.Tensor where.Scalar where eq.Tensor_list ne.Tensor_list"
    ),
    "it reads the bits as another type": "view.dtype",
    "refused by the rule, whatever the values": (
        "scatter.reduce scatter.value_reduce linalg_matrix_norm remainder.Scalar_Tensor "
        "bitwise_and.Scalar_Tensor bitwise_or.Scalar_Tensor bitwise_xor.Scalar_Tensor"
    ),
    "a device of its own": "cuda",
}


def bare(name: str) -> str:
    """Take the last part of a spelling; of an overload that is no default the last two."""
    return name.rpartition("aten.")[2].removesuffix(".default") if "aten." in name else name.rpartition(".")[2]


def test_no_cell_is_empty_that_pytorch_allows() -> None:
    """A row without a cell is named above, or an overload that takes numbers where this case wants tensors."""
    known = {name for names in ABSENT.values() for name in names.split()}
    empty, used = [], set()
    for rule in registered_rules():
        for key in keys_of(rule):
            found = row(rule, key)
            if any(isinstance(found.cells[column], Cell) for column in AXES):
                continue
            others = [each for each in cases(key) if each is not rule]
            number = isinstance(key, torch._ops.OpOverload) and any(
                isinstance(row(each, key).cells["first"], Cell) for each in others
            )
            name = bare(found.name)
            used.add(name)
            if name not in known and not number:
                empty.append(f"{rule.__name__}: {found.name}: {found.cells['first']}")
    assert not empty, "\n".join(empty)
    assert known <= used, f"these are not empty, or not registered: {sorted(known - used)}"


def test_what_pytorch_has_in_place_is_covered() -> None:
    """Each operator that PyTorch has in place has a cell under at least one of its cases."""
    empty = {}
    for rule in registered_rules():
        for key in keys_of(rule):
            cells = row(rule, key).cells
            reason = cells["in place"] if any(isinstance(cells[column], Cell) for column in AXES) else NO_TWIN
            if isinstance(reason, Cell) or reason == NO_TWIN or isinstance(key, torch._ops.OpOverload):
                continue
            if not any(isinstance(row(each, key).cells["in place"], Cell) for each in cases(key)):
                empty[spelling(key)] = reason
    assert not empty, "\n".join(f"{name}: {reason}" for name, reason in empty.items())


def fingerprint(cell: Cell) -> Any:
    """Tell calls apart by what they take and give."""
    inputs = [z.movedim(0, cell.axis) for z in cell.boxes()[0]]
    values = run(cell.call, [inputs[0] != 0, *inputs[1:]] if cell.mask else inputs)
    return cell.shapes, cell.axis, cell.output, cell.fixed, tuple(values.flatten().tolist())


def main() -> None:
    """Print the matrix."""
    for rule in registered_rules():
        for key in keys_of(rule):
            cells = row(rule, key).cells
            marks = "".join("x" if isinstance(cell, Cell) else "." for cell in cells.values())
            reasons = "; ".join(f"{column}: {cell[:80]}" for column, cell in cells.items() if isinstance(cell, str))
            print(f"{marks}  {rule.__name__:28} {spelling(key):44} {reasons}")  # noqa: T201


if __name__ == "__main__":
    main()
