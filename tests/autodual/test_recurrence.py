"""Recurrent cells in Python loops and PyTorch's recurrent layers, unrolled: no point leaves its finite bounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autodual
from autodual.attacks import minimize

METHODS = ("interval", "dual", "adaptive")
STEPS, INPUTS, UNITS = 3, 3, 3


class Loop(nn.Module):
    """A cell in a loop over however many steps there are; the state starts at zero, left out."""

    def __init__(self, kind: type[nn.Module], **options) -> None:
        super().__init__()
        self.cell, self.head = kind(INPUTS, UNITS, **options), nn.Linear(UNITS, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Stacked(nn.Module):
    """Two LSTM cells, their states made in forward; the outputs of all steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.LSTMCell(INPUTS, UNITS), nn.LSTMCell(UNITS, UNITS), nn.Linear(UNITS, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = c = g = d = x.new_zeros(x.size(0), UNITS)
        outputs = []
        for t in range(STEPS):
            h, c = self.first(x[:, t], (h, c))
            g, d = self.second(h, (g, d))
            outputs.append(self.head(g))
        return torch.cat(outputs, 1)


class Layer(nn.Module):
    """One of PyTorch's layers; ``pick`` takes from its result, batch first, what the head reads."""

    def __init__(self, layer: nn.RNNBase, pick, features: int = UNITS) -> None:
        super().__init__()
        self.layer, self.pick, self.head = layer, pick, nn.Linear(features, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.layer.batch_first else x.transpose(0, 1)
        return self.head(self.pick(self.layer(x))).flatten(1)


def lstm(**options) -> nn.LSTM:
    return nn.LSTM(INPUTS, UNITS, **options)


def gru(**options) -> nn.GRU:
    return nn.GRU(INPUTS, UNITS, **options)


def both_ends(result) -> Tensor:
    return torch.cat([result[1][-2], result[1][-1]], 1)


NETWORKS = {
    "RNNCell": lambda: Loop(nn.RNNCell),
    "RNNCell, relu": lambda: Loop(nn.RNNCell, nonlinearity="relu", bias=False),
    "LSTMCell": lambda: Loop(nn.LSTMCell),
    "GRUCell, no bias": lambda: Loop(nn.GRUCell, bias=False),
    "LSTMCells on each other": Stacked,
    "LSTM, last output": lambda: Layer(lstm(batch_first=True), lambda result: result[0][:, -1]),
    "LSTM, last state of two layers": lambda: Layer(lstm(num_layers=2, dropout=0.3), lambda result: result[1][0][-1]),
    "LSTM, cell state, time first": lambda: Layer(lstm(), lambda result: result[1][1].squeeze(0)),
    "LSTM, projected": lambda: Layer(lstm(batch_first=True, proj_size=2), lambda result: result[0][:, -1], 2),
    "LSTM, both directions": lambda: Layer(
        lstm(batch_first=True, bidirectional=True), lambda result: result[0].mean(1), 2 * UNITS
    ),
    "GRU, all outputs, time first": lambda: Layer(gru(), lambda result: result[0].transpose(0, 1)),
    "GRU, both last states": lambda: Layer(gru(num_layers=2, bidirectional=True, batch_first=True), both_ends, 2 * UNITS),
    "RNN": lambda: Layer(nn.RNN(INPUTS, UNITS, batch_first=True), lambda result: result[1][0]),
    "RNN, relu, two layers": lambda: Layer(nn.RNN(INPUTS, UNITS, 2, nonlinearity="relu"), lambda result: result[0][-1]),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = NETWORKS[name]().double().eval()
        for parameter in model.parameters():
            parameter.data *= 1.3
        return model, torch.randn(2, STEPS, INPUTS, dtype=torch.float64)


@torch.no_grad()
def reached(model: nn.Module, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The extremes of the outputs over 2,000 points and an attack on every output from both sides."""
    rng = torch.Generator().manual_seed(0)
    moves = 2 * torch.rand(2_000, *x.shape, generator=rng, dtype=x.dtype) - 1
    moves[1_000:] = moves[1_000:].sign()
    values = model((x + eps * moves).flatten(0, 1)).unflatten(0, (2_000, len(x)))
    outputs = values.shape[-1]
    rows = torch.cat([torch.eye(outputs), -torch.eye(outputs)]).to(x.dtype)
    attacked, _ = minimize(model, x, autodual.LInf(eps), rows, steps=15, restarts=1, generator=rng)
    return torch.minimum(values.amin(0), attacked[:, :outputs]), torch.maximum(values.amax(0), -attacked[:, outputs:])


# The zoo has models of these kinds too.
LONG = {
    "RNNCell, relu", "LSTMCells on each other", "LSTM, last output", "LSTM, cell state, time first", "LSTM, both directions",
    "GRU, both last states", "RNN", "LSTM, last state of two layers", "GRUCell, no bias",
}  # fmt: skip


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in NETWORKS])
def test_no_point_leaves_its_bounds(name: str) -> None:
    model, x = built(name)
    net = autodual.certify(model)
    for eps in (1e-3, 0.05, 0.5):
        lowest, highest = reached(model, x, eps)
        for method in METHODS if eps == 0.05 else ("dual",):
            bounds = net.bounds(x, autodual.LInf(eps), method=method)
            assert bounds.lower.isfinite().all()
            assert bounds.upper.isfinite().all()
            assert (bounds.lower <= lowest + 1e-9).all(), (method, eps)
            assert (bounds.upper >= highest - 1e-9).all(), (method, eps)
            if method != "interval" and eps == 0.05:
                assert bounds.width.sum() < 1.5 * (highest - lowest).sum()


@pytest.mark.parametrize("name", ["RNNCell", pytest.param("GRU, all outputs, time first", marks=pytest.mark.slow)])
def test_any_number_of_examples_and_steps(name: str) -> None:
    """Steps are unrolled anew for every length; examples are never counted."""
    model, x = built(name)
    net, region = autodual.certify(model), autodual.LInf(0.05)
    whole = net.bounds(torch.cat([x, -x, x]), region)
    single = net.bounds(x[1:], region)
    torch.testing.assert_close(whole.lower[1], single.lower[0])
    torch.testing.assert_close(whole.upper[5], single.upper[0])
    longer = torch.cat([x, x[:, :1]], 1)
    bounds, value = net.bounds(longer, region), model(longer)
    assert ((bounds.lower <= value) & (value <= bounds.upper)).all()
    again = net.bounds(x, region)
    torch.testing.assert_close(again.lower, whole.lower[:2])


class Started(nn.Module):
    """The state comes with the input, and moves too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = lstm(batch_first=True), nn.Linear(UNITS, 2)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        _, (h, c) = self.layer(x, (h.unsqueeze(0), c.unsqueeze(0)))
        return self.head(h[-1] + c[-1])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("moving", [("x", "h", "c"), ("x",), pytest.param(("c",), marks=pytest.mark.slow)])
def test_a_state_that_is_given(moving: tuple[str, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Started().double()
    shapes = {"x": (2, STEPS, INPUTS), "h": (2, UNITS), "c": (2, UNITS)}
    inputs = {name: 0.5 * torch.randn(shape, generator=rng, dtype=torch.float64) for name, shape in shapes.items()}
    region = autodual.LInf(0.1)
    net = autodual.certify(model)
    for method in METHODS:
        bounds = net.bounds(inputs, dict.fromkeys(moving, region), method=method)
        many = {name: value.repeat(200, *[1] * (value.ndim - 1)) for name, value in inputs.items()}
        points = {name: region.sample(value, rng) if name in moving else value for name, value in many.items()}
        values = model(**points).unflatten(0, (200, 2))
        assert ((bounds.lower <= values + 1e-9) & (values - 1e-9 <= bounds.upper)).all()


def test_bounds_are_differentiable_in_the_parameters() -> None:
    model, x = built("GRUCell, no bias")
    net, weights = autodual.certify(model), list(model.parameters())
    rng = torch.Generator().manual_seed(6)
    towards = [torch.randn(weight.shape, generator=rng, dtype=weight.dtype) for weight in weights]

    def total() -> Tensor:
        return net.bounds(x, autodual.LInf(0.05)).lower.sum()

    grads = torch.autograd.grad(total(), weights)

    @torch.no_grad()
    def moved(step: float) -> float:
        for weight, direction in zip(weights, towards, strict=True):
            weight += step * direction
        value = total().item()
        for weight, direction in zip(weights, towards, strict=True):
            weight -= step * direction
        return value

    expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
    assert sum((grad * to).sum().item() for grad, to in zip(grads, towards, strict=True)) == pytest.approx(expected, rel=1e-3)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = gru(batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.tensor([x.shape[1]] * x.shape[0])
        return self.layer(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[1][-1]


def test_packed_sequences_are_refused_by_name() -> None:
    with pytest.raises(autodual.TraceError, match=r"packed sequences.*padded batch"):
        autodual.certify(Packed()).bounds(torch.randn(2, STEPS, INPUTS), autodual.LInf(0.1))


def test_dropout_between_layers_is_refused_in_training() -> None:
    model = Layer(lstm(num_layers=2, dropout=0.3, batch_first=True), lambda result: result[0][:, -1]).train()
    with pytest.raises(autodual.TraceError, match=r"training|eval|random"):
        autodual.certify(model).bounds(torch.randn(2, STEPS, INPUTS), autodual.LInf(0.1))
