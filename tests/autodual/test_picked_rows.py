"""Functions whose derivatives are written down, against their definitions and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autodual.bounds.picked_rows import Height, PickedRows, Reach


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_rows_meet_the_line_of_their_sign():
    torch.manual_seed(0)
    rows, index, owner = drawn(3, 5), torch.tensor([0, 3, 10, 11, 14]), torch.tensor([0, 0, 2, 2, 2])
    counts = torch.tensor([2, 0, 3])  # a row may have none
    rest = drawn(15).index_fill(0, index, 0.0)
    lines = [drawn(5) for _ in range(4)]
    flat = rows.flatten()
    pulled, sums, part = PickedRows.apply(flat, rest, index, owner, counts, *lines)
    lower, upper, below, above = lines
    expected, total = flat * rest, torch.zeros(3, dtype=torch.float64)
    for i, (where, row) in enumerate(zip(index, owner, strict=True)):
        positive = flat[where] > 0
        expected[where] = flat[where] * (lower if positive else upper)[i]
        total[row] += flat[where] * (below if positive else above)[i]
    torch.testing.assert_close(pulled, expected)
    torch.testing.assert_close(sums, total)
    torch.testing.assert_close(part, flat[index])
    given = [flat, *lines]
    for each in given:
        each.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *sides: PickedRows.apply(x, rest, index, owner, counts, *sides)[:2], given)


@pytest.mark.parametrize("above", [False, True])
def test_a_line_lies_on_its_side_of_every_point_and_touches_one(above):
    torch.manual_seed(1)
    places, values, slope = drawn(4, 50), drawn(4, 50), drawn(50).requires_grad_()
    share = torch.rand(4, 50, dtype=torch.float64)
    share /= share.sum(0)
    point, reached = (share * places).sum(0), (share * values).sum(0)  # between the points
    height = Height.apply(slope, places, values, point, reached, above)
    distance = (reached + height + slope * (places - point) - values) * (1 if above else -1)
    assert (distance >= -1e-12).all()
    assert (distance.amin(0) < 1e-12).all()
    assert torch.autograd.gradcheck(lambda s: Height.apply(s, places, values, point, reached, above), slope)


@pytest.mark.parametrize("count", [1, 6])
def test_reach_is_the_weighted_sum_of_sizes(count):
    torch.manual_seed(2)
    rows, weights = drawn(6, 4).requires_grad_(), drawn(count, 4).abs().requires_grad_()
    torch.testing.assert_close(Reach.apply(rows, weights), (rows.abs() * weights).sum(1))
    assert torch.autograd.gradcheck(Reach.apply, (rows, weights))
