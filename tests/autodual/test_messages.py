"""Mistakes that are easily made: each is answered in words, with what to do."""

from __future__ import annotations

import pytest
import torch

from autodual.errors import SpecificationError
from autodual.specification import check_inputs, check_labels, check_rows

CPU = torch.device("cpu")
META = torch.zeros(2, 3, device="meta")


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "y must hold one integer class label per example, got None"),
        ("cat", "got str"),
        ({"y": 1}, "got dict"),
        ([0, None], "got list"),
        ([[0], [1, 2]], "got list"),
        (META[:, 0], r"meta tensor of shape \(2,\): it has no values"),
        ([0.0, 1.0], "integer class labels, got dtype torch.float32"),
        ([0, 1, 2], r"shape \(2,\), one label per example, got \(3,\)"),
        ([0, 3], r"label y\[1\] = 3 is out of range"),
    ],
    ids=str,
)
def test_labels(y, message):
    with pytest.raises(SpecificationError, match=message):
        check_labels(y, 2, 3, CPU)


def test_labels_of_any_integer_kind():
    for y in ([0, 2], (0, 2), torch.tensor([0, 2], dtype=torch.uint8), torch.tensor([0, 2]).numpy()):
        assert check_labels(y, 2, 3, CPU).tolist() == [0, 2]


def test_rows_on_another_device():
    with pytest.raises(SpecificationError, match=r"spec is on meta but the input is on cpu: use spec\.to\('cpu'\)"):
        check_rows(META, 4, 3, torch.zeros(()))


def test_inputs_without_a_batch_axis_are_looked_at_too():
    check_inputs({"x": torch.zeros(6)}, ("x",), None)
    check_inputs({"x": torch.zeros(0, 6)}, ("x",), None)
    with pytest.raises(SpecificationError, match="NaN or infinity, first in example 4"):
        check_inputs({"x": torch.tensor([0.0, 0.0, 0.0, 0.0, float("nan")])}, ("x",), None)
