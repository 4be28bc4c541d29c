"""Mistakes that are easily made: each is answered in words, with what to do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autodual
from autodual import Normalize
from autodual.errors import SpecificationError, TraceError, UnsupportedOperatorError
from autodual.specification import check_inputs, check_labels, check_rows
from autodual.trace import trace

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


class Body(nn.Module):
    """A model that is one function."""

    def __init__(self, body):
        super().__init__()
        self.body, self.norm = body, nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.body(x))


def looped(x):
    for _ in range(x.size(1)):
        x = x + 1
    return x


def key_error(x):
    return looped(x) + {}["bias"]


def wrong_shape(x):
    return looped(x) @ torch.ones(7, 7)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (key_error, r"test_messages\.py:\d+: the model itself raises KeyError on shapes {'x': \(4, 3\)}: 'bias'$"),
        (wrong_shape, r"the model itself raises RuntimeError .* cannot be multiplied \(4x3 and 7x7\)$"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_error_of_the_model_is_not_one_of_tracing(body, message):
    model = Body(body)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TraceError, match=message):
        trace(model, example=torch.rand(4, 3))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def reads_data(x):
    return x.data * 2


def writes_data(x):
    y = x * 1
    y.data = y * 2
    return y


def changes_data(x):
    y = x * 1
    y.data.mul_(2)
    return y


@pytest.mark.parametrize("example", [None, torch.rand(4, 3)], ids=["fx", "example"])
@pytest.mark.parametrize("body", [reads_data, writes_data, changes_data], ids=lambda body: body.__name__)
def test_data_is_named(body, example):
    with pytest.raises(TraceError, match=r"test_messages\.py:\d+: \.data reads or changes a tensor unseen"):
        trace(Body(body), example=example)


def test_the_data_of_a_parameter_is_only_a_view():
    class Scaled(nn.Linear):
        def forward(self, x):
            return x * self.bias.data

    assert trace(Scaled(3, 3)).output


@pytest.mark.parametrize(
    ("body", "sizes"),
    [
        (lambda x: looped(x).view(4, 3), "here 4"),
        (lambda x: looped(x).view(2, -1, 3).reshape(-1, 3), "here 2*n with a whole number n"),
        (lambda x: x if x.shape[0] == 4 else -x, "here 4"),
    ],
    ids=["view", "halves", "branch"],
)
def test_a_batch_size_that_is_baked_in(body, sizes):
    with pytest.raises(TraceError) as caught:
        trace(Body(body), example=torch.rand(4, 3))
    text = str(caught.value)
    assert f"forward works for some batch sizes only ({sizes})" in text
    assert "forward: forward" not in text
    assert "TORCH_LOGS" not in text


def test_normalize_names_the_channels():
    layer = Normalize([0.5, 0.5, 0.5], (0.2, 0.2, 0.2))
    for x, found in ((torch.zeros(2, 1, 4, 4), "has 1 in axis 1"), (torch.zeros(3), "has no axis 1")):
        with pytest.raises(ValueError, match=rf"Normalize has 3 channels, but the input of shape .* {found}"):
            layer(x)
    with pytest.raises(RuntimeError, match="Bool"):
        layer(torch.zeros(2, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("mean", "std"), [([0.0], [1.0, 1.0]), ([0.0], [0.0]), ([float("nan")], [1.0]), ([0.0], [float("inf")]), ([0.0], [-1.0])]
)
def test_normalize_refuses_what_is_no_normalisation(mean, std):
    with pytest.raises(ValueError, match="mean and std need the same length, finite numbers and positive std"):
        Normalize(mean, std)


def test_normalize_takes_whole_numbers_shows_them_and_is_traced():
    model = nn.Sequential(Normalize([0, 1], torch.tensor([1, 4])), nn.Linear(2, 3))
    assert "Normalize(mean=(0, 1), std=(1, 4))" in repr(model)
    x = torch.rand(2, 2)
    bounds = autodual.certify(model).bounds(x, autodual.LInf(0.0))
    torch.testing.assert_close(bounds.lower, model(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(SpecificationError, match="Normalize has 2 channels"):
        autodual.certify(model).bounds(torch.rand(2, 3), autodual.LInf(0.0))


def test_explain_says_module_where_there_is_no_line():
    net = autodual.certify(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    assert [row.source for row in net.explain().rows[1:]] == ['module "0"', 'module "1"']
    lines = [row.source for row in autodual.certify(Body(lambda x: x + 1).eval()).explain().rows]
    assert any(line.startswith("tests/autodual/test_messages.py:") or line.startswith("test_messages.py:") for line in lines)


class Pooled(nn.Module):
    """A function that PyTorch makes of two others."""

    def forward(self, x):
        return F.adaptive_max_pool2d(x, 2, return_indices=True)[1] + x.mean()


def test_an_operator_is_named_as_users_write_it():
    with pytest.raises(UnsupportedOperatorError, match=r"F\.adaptive_max_pool2d") as caught:
        autodual.certify(Pooled())
    assert "<locals>" not in str(caught.value)
