"""Assertions pass where the property holds, and otherwise show the worst margin and a counterexample that replays."""

import builtins

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import autodual
from autodual.errors import SpecificationError
from autodual.testing import NotCertifiedError, assert_certified, assert_output, inputs, networks, regions


@pytest.fixture
def classifier():
    """Three classes; the first two differ by the first two inputs, the third never wins."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]))
        model[0].bias.zero_()
    return model


X = torch.tensor([[0.9, 0.1, 0.5, 0.5], [0.3, 0.5, 0.5, 0.5]])
Y = torch.tensor([0, 1])


def test_certified(classifier):
    report = assert_certified(classifier, X, Y, autodual.LInf(0.05))
    assert report.certified.all()
    assert assert_certified(autodual.certify(classifier), X, Y, autodual.LInf(0.05), method="adaptive").certified.all()


def test_failure_names_margin_and_counterexample(classifier):
    region = autodual.LInf(0.2)
    with pytest.raises(AssertionError, match="1 of 2 examples are not certified over LInf") as caught:
        assert_certified(classifier, X, Y, region)
    text = str(caught.value)
    assert "worst margin    -0.2" in text
    assert "example 1, label 1 against class 0" in text
    assert "label 1, prediction 0, margin -0.2" in text
    assert "l_inf 0.2" in text
    assert "x[1, 0] 0.3 -> 0.5" in text
    found = caught.value.counterexample
    assert found.index == 1
    assert region.contains(X[1:], found.inputs, 1e-6).all()
    assert classifier(found.inputs).argmax() == 0
    literal = text.split("the point: ")[1]
    replayed = eval(literal, {"torch": torch})  # the message is the test's own, and meant to be pasted
    assert torch.equal(replayed, found.inputs)
    torch.testing.assert_close(classifier(replayed), found.outputs)


def test_failure_without_counterexample():
    """The bound is loose: a - a is zero, but interval arithmetic does not know."""

    class Loose(nn.Module):
        def forward(self, x):
            a = torch.relu(x) - 1.0
            b = torch.relu(a)
            return torch.stack([a[:, 0] - b[:, 0] + torch.relu(-a[:, 0]) + 0.1, 0 * x[:, 0]], 1)

    with pytest.raises(NotCertifiedError) as caught:
        assert_certified(Loose(), torch.ones(1, 2), [0], autodual.LInf(0.9), method="interval")
    assert caught.value.counterexample is None
    assert "no counterexample found: the property may hold, the bound is too loose" in str(caught.value)
    assert 'method="dual"' in str(caught.value)


def test_limits(classifier):
    region = autodual.Box(0.0, 1.0)
    bounds = assert_output(classifier, X, region, lower=-0.01, upper=1.01)
    assert (bounds.upper[:, :2] >= 1.0).all()
    difference = torch.tensor([[1.0, -1.0, 0.0]])
    assert_output(classifier, X, region, difference, lower=-1.01)
    with pytest.raises(NotCertifiedError) as caught:
        assert_output(classifier, X, region, difference, lower=-1.5, upper=torch.tensor([[0.5], [2.0]]))
    text = str(caught.value)
    assert "1 of 4 limits are not certified over Box(0.0, 1.0)" in text
    assert "worst margin    -0.5" in text
    assert "example 0, row 0: upper bound 1.0000" in text
    assert "upper limit 0.5" in text
    assert "row 0 is 0.8, upper limit 0.5" in text
    assert "distance      0: the model is wrong at the given input itself" in text
    output = classifier(caught.value.counterexample.inputs)[0]
    assert output[0] - output[1] > 0.5


def test_rows_per_example(classifier):
    rows = torch.stack([torch.eye(3)[:1], torch.eye(3)[1:2]])
    bounds = assert_output(classifier, X, autodual.L2(0.1), rows, lower=0.35, upper=1.1)
    assert bounds.lower.shape == (2, 1)
    with pytest.raises(NotCertifiedError, match="example 1, row 0: lower bound 0"):
        assert_output(classifier, X, autodual.L2(0.1), rows, lower=0.45)


def test_the_counterexample_moves_no_more_than_it_must():
    """One coordinate decides; the attack moves all of them, the counterexample only that one."""
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.01, 0.01, 0.01], [0.0, 0.0, 0.0, 0.0]]))
        model.bias.zero_()
    with pytest.raises(NotCertifiedError) as caught:
        assert_certified(model, torch.full((1, 4), 0.1), [0], autodual.LInf(0.2))
    moved = caught.value.counterexample.inputs - 0.1
    assert moved[0, 0] < 0
    assert (moved[0, 1:] == 0).all()


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2, bias=False)
            nn.init.eye_(self.layer.weight)

        def forward(self, image, state):
            return self.layer(image) + state

    state = torch.zeros(2, 2)
    assert_certified(Two(), (X, state), Y, {"image": autodual.LInf(0.05)})
    with pytest.raises(NotCertifiedError) as caught:
        assert_certified(Two(), {"image": X, "state": state}, Y, {"state": autodual.L2(0.3)})
    assert "from state[1]" in str(caught.value)
    assert set(caught.value.counterexample.inputs) == {"image", "state"}
    assert Two()(**caught.value.counterexample.inputs).argmax() == 0


def test_training_mode_is_explained():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(NotCertifiedError, match=r"call model.eval\(\)"):
        assert_certified(model, torch.randn(8, 4), torch.zeros(8, dtype=torch.long), autodual.LInf(1e-4))
    assert model.training


def test_bad_use(classifier):
    with pytest.raises(SpecificationError, match="needs a lower or an upper limit"):
        assert_output(classifier, X, autodual.LInf(0.1))
    with pytest.raises(SpecificationError, match="does not broadcast"):
        assert_output(classifier, X, autodual.LInf(0.1), lower=torch.zeros(5))
    with pytest.raises(SpecificationError, match="NaN"):
        assert_output(classifier, X, autodual.LInf(0.1), lower=float("nan"))
    assert assert_output(classifier, X[:0], autodual.LInf(0.1), lower=5.0).lower.shape == (0, 3)


def test_a_region_that_cannot_be_searched_is_no_error(classifier):
    class Cone(autodual.Region):
        def support(self, x, v):
            return (v * x).sum(-1) + 0.2 * v.abs().sum(-1)

    with pytest.raises(NotCertifiedError, match="label 1, prediction 0"):
        assert_certified(classifier, X, Y, Cone())


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_strategies_keep_their_word(data):
    shape = data.draw(st.sampled_from([(2, 3), (1, 1, 7, 7), (0, 2)]))
    x = data.draw(inputs(shape, -1.0, 2.0, dtype=torch.float64))
    assert x.shape == shape
    assert x.dtype == torch.float64
    assert ((x >= -1) & (x <= 2)).all()
    region = data.draw(regions(-1.0, 2.0))
    region.validate(x)
    network = data.draw(networks(outputs=4))
    assert not network.training
    assert network(torch.zeros(2, *network.input_shape)).shape == (2, 4)
    again = eval(repr(network), {"SmallNetwork": type(network), "torch": torch})
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True))


def test_without_hypothesis(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args):
        if name == "hypothesis":
            raise ImportError("no module named hypothesis")
        return original(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'autodual\[testing\]'"):
        regions()


def test_a_counterexample_of_a_model_that_writes_into_its_input():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)).eval()
    x, region = torch.randn(3, 4), autodual.LInf(3.0)
    y = model(x.clone()).argmax(1)
    with pytest.raises(NotCertifiedError) as caught:
        assert_certified(model, x, y, region)
    found = caught.value.counterexample
    assert (found.inputs < 0).any()
    assert region.contains(x, found.inputs.expand(3, -1), 1e-5)[found.index]
    assert model(found.inputs.clone()).argmax() != y[found.index]
