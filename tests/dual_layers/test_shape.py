"""Shape queries, spellings and assignments: what the rules' own samples cannot show."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F

from dual_layers import INPUT, Call, Slot, is_shape_query, lookup
from dual_layers.shape import assign
from dual_layers.spellings import spellings


def test_assign_leaves_the_base_alone() -> None:
    base = torch.zeros(2, 3)
    result = assign(base, (slice(None), 1), 5.0)
    assert result.tolist() == [[0, 5, 0], [0, 5, 0]]
    assert not base.any()


def test_assign_to_an_expanded_base_writes_one_element() -> None:
    assert assign(torch.zeros(1, 3).expand(2, 3), (0, 0), 1.0).sum() == 1


@pytest.mark.parametrize("query", ["size", "new_zeros", torch.zeros_like, torch.ops.aten.sym_size.int, len])
def test_shape_queries(query: object) -> None:
    assert is_shape_query(query)


@pytest.mark.parametrize("operation", [torch.empty_like, torch.rand_like, "new_empty", "item", torch.ops.aten.fill.Tensor])
def test_values_and_garbage_are_no_shape_queries(operation: object) -> None:
    assert not is_shape_query(operation)


def test_spellings_of_one_name_are_one_operator() -> None:
    assert set(spellings("flip")) == {torch.flip, "flip", torch.ops.aten.flip.default}
    with pytest.raises(LookupError, match="no operator is called 'flap'"):
        spellings("flap")


def test_two_operators_called_unfold_have_two_rules() -> None:
    assert lookup("unfold") is not lookup(F.unfold)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (Call(operator.getitem, (INPUT, (slice(None), Slot(1)))), "argument 1 must not depend on the input"),
        (Call(torch.gather, (INPUT, 1, Slot(1))), "argument 2 must not depend on the input"),
        (Call(torch.where, (Slot(0), Slot(1), 0.0)), "the condition must not depend on the input"),
        (Call(torch.where, (INPUT,)), "depends on the input discontinuously"),
        (Call("masked_fill", (INPUT, Slot(1), 0.0)), "the mask must not depend on the input"),
        (Call(F.pad, (INPUT, (1, 1)), {"value": Slot(1)}), "'value' must not depend on the input"),
        (Call("repeat_interleave", (INPUT, Slot(1))), "argument 1 must not depend on the input"),
        (Call("scatter", (INPUT, 1, Slot(1), 0.0)), "argument 2 must not depend on the input"),
        (Call(torch.ops.aten.scatter.reduce, (INPUT, 1, 0, Slot(1)), {"reduce": "multiply"}), "only replacing"),
        (Call(torch.index_add, (INPUT, 1, 0, Slot(1)), {"alpha": -1}), "only alpha=1"),
    ],
)
def test_refusals_say_why(call: Call, reason: str) -> None:
    rule = lookup(call.operator)
    assert rule is not None
    assert reason in str(rule.refuse(call))


def test_an_infinite_mask_has_no_tangent() -> None:
    call = Call("masked_fill", (INPUT, torch.tensor([True, False]), -torch.inf))
    assert lookup("masked_fill")(call).linear(torch.ones(1, 2)).tolist() == [[0.0, 1.0]]
