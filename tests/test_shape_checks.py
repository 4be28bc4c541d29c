"""The suite checks the shapes in annotations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError

import autodual
from autodual.specification import check_labels, margin_rows
from tests.reference.shape_checks import Finder


def test_a_wrong_shape_is_noticed() -> None:
    labels = torch.tensor([0, 1])
    assert margin_rows(labels, 3, torch.zeros(2, 3)).shape == (2, 3, 3)
    with pytest.raises(TypeCheckError, match="y"):
        margin_rows(labels[None], 3, torch.zeros(2, 3))


def test_a_method_and_a_dataclass_are_checked() -> None:
    report = autodual.certify(torch.nn.Linear(2, 3)).verify(torch.zeros(2, 2), torch.tensor([0, 1]), autodual.LInf(0.1))
    with pytest.raises(TypeCheckError, match="margins"):
        replace(report, margins=report.margins[0])


def test_only_what_has_shapes_is_wrapped() -> None:
    assert hasattr(margin_rows, "__wrapped__")
    assert hasattr(check_labels, "__wrapped__")
    assert not hasattr(autodual.bounds.pairs.PairWalk.bounds, "__wrapped__")
    assert Finder("autodual.bounds").find_spec("autodual.boundary", None) is None
