"""The second route: torch.export on one example, with a batch of any size."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from autodual.errors import TraceError
from autodual.graph import ModuleRef
from autodual.trace import trace
from tests.reference.tracing import check, ends_at, line, run_graph


class Loops(nn.Module):
    """Loops over sizes, over a tensor and over chunks; a parametrised layer, a buffer, a plain tensor, a constant."""

    def __init__(self):
        super().__init__()
        self.mix = parametrizations.weight_norm(nn.Linear(4, 4))
        self.register_buffer("shift", torch.randn(4), persistent=False)
        self.plain = torch.randn(4)
        self.head = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x):
        state = torch.zeros(x.size(0), 4)
        for t in range(x.size(1)):
            state = torch.relu(self.mix(x[:, t]) + state * self.plain)  # loop
        for part in x.unbind(1):
            state = state + part.clamp(-1, 1)  # iterate
        state[:, 0] += 3
        return self.head(state - self.shift + torch.arange(4)) * len(x.shape)  # last


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loops_over_sizes(size):
    torch.manual_seed(0)
    model = Loops()
    graph = check(model, (3, 4), example=torch.randn(size, 3, 4), batches=(1, 2, 3, 5))
    assert graph.shapes == {"x": (None, 3, 4)}
    origins = [node.origin for node in graph.nodes]
    assert any(ends_at(origin, "loop", __file__) for origin in origins)
    assert any(ends_at(origin, "iterate", __file__) for origin in origins)
    assert ends_at(graph.by_name[graph.output].origin, "last", __file__)
    paths = {node.operator for node in graph.nodes if node.kind == "attribute"}
    assert {"shift", "plain", "head.0.weight", "mix.parametrizations.weight.original0"} <= paths


def test_parameters_are_the_models_own():
    model = Loops()
    graph, x = trace(model, example=torch.randn(2, 3, 4)), torch.randn(2, 3, 4)
    assert not any(name in dict(model.named_parameters()) for name in graph.constants)
    with torch.no_grad():
        model.head[0].weight.mul_(2)
        model.shift.add_(1)
    torch.testing.assert_close(run_graph(graph, model, {"x": x}), model(x))
    run_graph(graph, model, {"x": x}).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.head = kind(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])  # recurrent


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_are_unrolled(kind):
    model = Recurrent(kind)
    graph = check(model, (3, 4), example=torch.randn(1, 3, 4))
    assert not any(isinstance(node.operator, ModuleRef) for node in graph.nodes)
    assert all(ends_at(node.origin, "recurrent", __file__) for node in graph.nodes if node.kind == "call" and node.origin)
    names = {getattr(node.operator, "__name__", "") for node in graph.nodes}
    assert not any(name.startswith(("gru", "lstm", "rnn")) for name in names)
    graph = check(nn.Sequential(nn.Linear(4, 4), First(kind(4, 5, batch_first=True))), (3, 4), example=torch.randn(1, 3, 4))
    assert graph.nodes[-1].origin


class First(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0]


class Images(nn.Module):
    """High-level operators stay whole."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), nn.BatchNorm2d(3)
        self.up, self.drop, self.head = nn.ConvTranspose2d(3, 2, 2, stride=2), nn.Dropout(), nn.Linear(2, 3)

    def forward(self, x):
        if x.shape[-1] != 6:
            raise ValueError("wrong size")
        y = self.bn(self.conv(x)).relu_()
        y = F.max_pool2d(self.drop(y), 2)
        y = self.up(F.avg_pool2d(y, 2, padding=1))
        return self.head(y.mean((2, 3)).squeeze())


def test_images():
    torch.manual_seed(0)
    model = Images().eval()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    graph = check(model, (2, 6, 6), example=torch.randn(2, 2, 6, 6), batches=(2, 3, 4))
    assert len([node for node in graph.nodes if node.kind == "call"]) < 16
    with pytest.raises(TraceError, match=r"dropout.*training mode"):
        trace(Images(), example=torch.randn(2, 2, 6, 6))


@pytest.mark.parametrize("track", [True, False])
def test_batch_norm_in_training_mode(track):
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4, track_running_stats=track)

        def forward(self, x):
            return self.bn(x) if x.dim() == 2 else x

    model = Normalised()
    nn.init.normal_(model.bn.weight)
    graph = check(model, (4,), example=torch.randn(3, 4), batches=(2, 3))
    assert [node.item for node in graph.nodes if node.batch_statistics] == [0, 1]


class FixedBatch(nn.Module):
    def forward(self, x):
        y = x
        for row in range(x.shape[0]):
            y = y + row  # rows
        return y


class Halves(nn.Module):
    def forward(self, x):
        a, b = x.view(2, -1, *x.shape[1:])
        return torch.cat([a + 1, b], 0)


@pytest.mark.parametrize("model", [FixedBatch(), Halves()])
def test_a_batch_that_is_baked_in_is_refused(model):
    with pytest.raises(TraceError, match="batch"):
        trace(model, example=torch.randn(4, 3))


class Pair(nn.Module):
    def forward(self, x, positions, *, scale, mask=None):
        for i in range(x.size(1)):
            x = x + scale[i] * positions
        return x if mask is None else x * mask


def test_several_inputs():
    example = {"x": torch.randn(2, 3), "positions": torch.randn(3), "scale": torch.randn(3)}
    graph = trace(Pair(), example=example)
    assert graph.shapes == {"x": (None, 3), "positions": (3,), "scale": (3,)}
    for batch in (1, 2, 3):
        inputs = example | {"x": torch.randn(batch, 3)}
        torch.testing.assert_close(run_graph(graph, Pair(), inputs), Pair()(**inputs))
    with pytest.raises(TraceError, match="needs a tensor for 'mask'"):
        trace(Pair(), ("x", "positions", "scale", "mask"), example)


def test_an_example_without_examples():
    with pytest.raises(TraceError, match="at least one example"):
        trace(FixedBatch(), example=torch.randn(0, 3))


class Broken(nn.Module):
    def forward(self, x):
        for _ in range(x.size(1)):
            x = x @ x.new_ones(7, 7)  # broken
        return x


def test_errors_of_the_model_itself_name_the_line():
    message = r"the model itself raises RuntimeError on shapes \{'x': \(2, 3\)\}: .*multiplied \(2x3 and 7x7\)"
    with pytest.raises(TraceError, match=message) as caught:
        trace(Broken(), example=torch.randn(2, 3))
    assert line("broken", __file__) in str(caught.value)


class Outputs(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        for _ in range(x.size(1)):
            x = x.relu()
        return (x, x + 1) if self.how == "two" else (x,)


def test_outputs():
    with pytest.raises(TraceError, match="returns 2 values"):
        trace(Outputs("two"), example=torch.randn(2, 3))
    assert trace(Outputs("one"), example=torch.randn(2, 3)).output


def test_the_model_is_left_alone():
    model = Recurrent(nn.GRU)
    before = copy.deepcopy(model)
    trace(model, example=torch.randn(2, 3, 4))
    assert all(type(weight) is nn.Parameter for weight in model.rnn._flat_weights)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(model(x), before(x))
