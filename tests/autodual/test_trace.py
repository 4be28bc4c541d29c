"""Symbolic tracing: the same function for every batch size, the right source lines, and the right refusals."""

import copy
import operator
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import autodual
from autodual.errors import TraceError
from autodual.graph import ModuleRef
from autodual.trace import trace
from tests.reference import shape_asserts
from tests.reference.tracing import check, ends_at, line, run_graph


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(5))
        self.register_buffer("shift", torch.randn(4))
        self.plain = torch.randn(4)
        self.blocks = nn.ModuleList([nn.Linear(5, 5), nn.Linear(10, 5)])
        self.extra = nn.ParameterList([torch.randn(5), torch.randn(5)])

    def forward(self, x):
        x = (x - self.shift) / (1 + self.plain**2)  # normalise
        z = F.linear(x, self.weight, bias=self.bias)  # linear
        for block in self.blocks:
            z = torch.cat([z, block(z).relu()], dim=1)[:, -10:]  # dense
        z = z.view(x.size(0), -1) + torch.arange(10) / 7  # constant
        return -z[:, :5] @ self.weight.T.mT * self.extra[0].sum() + 2  # last


def test_functional_model():
    torch.manual_seed(0)
    model = Functional()
    graph = check(model, (4,))
    at = {node.name: node.origin for node in graph.nodes}
    assert ends_at(at["linear"], "linear", __file__)
    assert ends_at(at["shift"], "normalise", __file__)
    assert ends_at(at["blocks_0"], "dense", __file__)
    assert ends_at(at["view"], "constant", __file__)
    paths = {node.operator for node in graph.nodes if node.kind == "attribute"}
    assert {"weight", "bias", "shift", "plain", "extra.0"} < paths
    assert set(graph.constants) == paths - {"weight", "bias", "shift", "plain", "extra.0"}
    assert graph.by_name[graph.output].operator is operator.add


def test_parameters_stay_differentiable_and_current():
    model = Functional()
    graph = trace(model)
    x = torch.randn(2, 4)
    run_graph(graph, model, {"x": x}).sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name != "extra.1")
    with torch.no_grad():
        model.weight.mul_(2)
        model.shift.add_(1)
        model.plain.add_(1)
    torch.testing.assert_close(run_graph(graph, model, {"x": x}), model(x))
    double = copy.deepcopy(model).double()
    double.plain = double.plain.double()
    torch.testing.assert_close(run_graph(graph, double, {"x": x.double()}), double(x.double()))


class Penalised(nn.Module):
    """Reads its parameters without asking for them by name."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.table = [torch.randn(3)]

    def forward(self, x):
        norm = sum(parameter.abs().sum() for parameter in self.parameters())
        return self.layer(x) / norm + self._modules["layer"]._parameters["bias"].exp() + self.table[0]


def test_parameters_read_by_other_ways_are_not_baked_in():
    model = Penalised()
    graph = check(model, (3,))
    with torch.no_grad():
        model.layer.weight.mul_(3)
    x = torch.randn(2, 3)
    torch.testing.assert_close(run_graph(graph, model, {"x": x}), model(x))
    assert len(graph.constants) == 1


class Shapes(nn.Module):
    def forward(self, x):
        batch, time, width = x.shape
        y = x.reshape(batch * time, width) * width**-0.5
        y = y.view(batch, time, -1).transpose(0, 1)
        y = y[time // 2] + x.mean(dim=[1])
        zero = torch.zeros(batch, 3, dtype=x.dtype, device=x.device)
        y = torch.cat([y, zero, x.new_ones(x.size(0), 2)], 1)
        y = y + torch.full(y.shape, 0.5) + torch.ones_like(y)
        return y.unflatten(1, (3, y.shape[-1] // 3)).flatten(1).T.t()


def test_sizes_stay_symbolic():
    graph = check(Shapes(), (5, 4))
    x = torch.randn(2, 7, 4)
    torch.testing.assert_close(run_graph(graph, Shapes(), {"x": x}), Shapes()(x))
    assert not graph.shapes


class Tuples(nn.Module):
    def forward(self, x):
        a, b, c = torch.split(x, [1, 2, 3], dim=1)
        d, e = c.chunk(2, 1)[-2:] if False else (c.chunk(2, 1)[0], c.chunk(2, 1)[-1])
        first = x.unbind(1)[-1]
        return torch.cat([a, b, d, e], 1) * first[:, None]


def test_items_of_tuples_are_fused():
    graph = check(Tuples(), (6,))
    items = [(node.operator, node.item) for node in graph.nodes if node.item is not None]
    assert {(torch.split, 0), (torch.split, 1), ("chunk", 0), ("chunk", -1), ("unbind", -1)} <= set(items)
    assert not [node for node in graph.nodes if node.operator is operator.getitem and type(node.args[1]) is int]


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, y, mask=None, *, scale=2.0, shift=None):
        z = self.layer(x) * scale + self.layer(y)
        if mask is not None:
            z = z * mask
        if shift is not None:
            z = z + shift
        return z


def test_several_and_optional_arguments():
    assert [node.operator for node in check(Several(), (3,), (3,)).inputs] == ["x", "y"]
    graph = check(Several(), (3,), (3,), (3,), (3,), names=["x", "y", "mask", "shift"], given=("x", "y", "mask", "shift"))
    assert [node.operator for node in graph.inputs] == ["x", "y", "mask", "shift"]
    check(Several(), (3,), (3,), (3,), names=["x", "y", "shift"], given=("y", "x", "shift"))
    example = {"x": torch.ones(2, 3), "y": torch.ones(2, 3), "mask": torch.ones(2, 3)}
    assert [node.operator for node in trace(Several(), example=example).inputs] == ["x", "y", "mask"]
    assert [node.operator for node in trace(Several(), example=tuple(example.values())).inputs] == ["x", "y", "mask"]


def test_arguments_that_do_not_fit():
    with pytest.raises(TraceError, match=r"no argument 'z'; it takes x, y, mask, scale, shift"):
        trace(Several(), ("x", "y", "z"))
    with pytest.raises(TraceError, match="needs 'y' too"):
        trace(Several(), ("x",))
    with pytest.raises(TraceError, match="the example has 5 values"):
        trace(Several(), example=[torch.ones(1)] * 5)

    class Stars(nn.Module):
        def forward(self, *args, **kwargs):
            return args[0]

    with pytest.raises(TraceError, match=r"names no arguments .*wrap it in a module"):
        trace(Stars())


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.third = nn.Linear(4, 4)
        self.third.weight = self.first.weight

    def forward(self, x):
        return self.third(self.second(self.first(x)).relu())


def test_shared_modules_and_parameters():
    graph = check(Shared(), (4,))
    assert [node.operator for node in graph.nodes if isinstance(node.operator, ModuleRef)] == [
        ModuleRef("first"), ModuleRef("first"), ModuleRef("third")
    ]  # fmt: skip


class MyLinear(nn.Linear):
    """Another constructor, the same forward."""


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    """Keeps forward and replaces a part of it."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


def test_which_modules_are_leaves():
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: F.linear(x, 2 * patched.weight)
    model = nn.Sequential(MyLinear(4, 4), Doubled(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)), patched)
    graph = check(model, (4,))
    assert [node.operator.path for node in graph.nodes if isinstance(node.operator, ModuleRef)] == ["0", "2"]
    model = nn.Sequential(Standardised(1, 2, 3), nn.Conv2d(2, 2, 3))
    graph = check(model, (1, 6, 6))
    assert [node.operator.path for node in graph.nodes if isinstance(node.operator, ModuleRef)] == ["1"]


def test_parametrised_and_hooked_modules():
    torch.manual_seed(0)
    spectral = parametrizations.spectral_norm(nn.Linear(4, 4)).eval()
    orthogonal = parametrizations.orthogonal(nn.Linear(4, 4))
    check(nn.Sequential(spectral, nn.ReLU(), orthogonal), (4,))
    with pytest.warns(FutureWarning):
        old = nn.utils.weight_norm(nn.Linear(4, 4))
    model = nn.Sequential(nn.Linear(4, 4), old)
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    graph, x = trace(model), torch.randn(3, 4)
    torch.testing.assert_close(run_graph(graph, model, {"input": x}), model(x))
    assert not any(isinstance(node.operator, ModuleRef) for node in graph.nodes)

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = parametrizations.weight_norm(nn.Linear(4, 4))

        def forward(self, x):
            return F.linear(x, self.layer.weight)

    graph = check(Inside(), (4,))
    assert "layer.parametrizations.weight.original0" in {node.operator for node in graph.nodes}


def test_origins_without_code_of_the_user():
    graph = check(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2))), (4,))
    assert [node.origin for node in graph.nodes] == ["", "0", "1.0", "1.1"]
    graph = check(nn.Linear(4, 2), (4,))
    assert [node.origin for node in graph.nodes] == ["", "Linear"]
    assert graph.nodes[-1].operator == ModuleRef("")


class IsInstance(nn.Module):
    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            return torch.zeros(3)
        if isinstance(x, (nn.Parameter, nn.Buffer, list, tuple)) or not torch.is_tensor(x + 1):
            return x - 1000
        return x.relu()


class IsInstanceOfSize(nn.Module):
    def forward(self, x):
        n = x.size(1)
        if isinstance(n, int):  # isinstance
            return x.relu()
        return x - 1000


def test_isinstance_does_not_lie():
    check(IsInstance(), (3,))
    with pytest.raises(TraceError, match=r"isinstance\(\).*Pass example_input=") as caught:
        trace(IsInstanceOfSize())
    assert line("isinstance", __file__) in str(caught.value)
    check(IsInstanceOfSize(), (3,), example=torch.randn(1, 3))


def test_asserts_about_shapes_are_taken_as_true():
    check(shape_asserts.ShapeAssert(), (2, 3))
    with pytest.raises(TraceError, match="depends on values") as caught:
        trace(shape_asserts.ValueAssert())
    assert line("value assert", shape_asserts.__file__) in str(caught.value)
    with pytest.raises(TraceError, match="example_input"):
        trace(shape_asserts.CombinedAssert())
    check(shape_asserts.CombinedAssert(), (2, 3), example=torch.randn(1, 2, 3))


def branch(x):
    return x if x.sum() > 0 else -x  # branch


def early_exit(x):
    while x.abs().max() > 1:  # early_exit
        x = x / 2
    return x


def number(x):
    return x * int(x.sum())  # number


def float_of(x):
    return x * float(x.mean())  # float_of


def item(x):
    if x.sum().item() > 0:  # item
        return x
    return -x


def index(x):
    return x[:, : int(x.argmax())]  # index


def swallowed(x):
    try:
        positive = bool((x > 0).all())  # swallowed
    except Exception:
        positive = False
    return x if positive else -x


def contains(x):
    return x * 2 if 0.0 in x else x  # contains


class Body(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("example", [None, torch.ones(2, 3)], ids=["fx", "example"])
@pytest.mark.parametrize(
    "body", [branch, early_exit, number, float_of, item, index, swallowed, contains], ids=lambda b: b.__name__
)
def test_python_that_depends_on_values_is_refused(body, example):
    with pytest.raises(TraceError, match="depends on values") as caught:
        trace(Body(body), example=example)
    assert line(body.__name__, __file__) in str(caught.value)


class ParameterBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x if self.scale > 0 else -x  # parameter


def test_branches_on_parameters_are_refused():
    with pytest.raises(TraceError, match="depends on values") as caught:
        trace(ParameterBranch(), example=torch.ones(2, 3))
    assert line("parameter", __file__) in str(caught.value)


def torch_noise(x):
    return x + torch.rand(3)  # torch_noise


def sized_noise(x):
    return x + torch.randn(x.shape)  # sized_noise


def noise_like(x):
    return x + torch.randn_like(x)  # noise_like


def dropped(x):
    return F.dropout(x, 0.1)  # dropped


def bernoulli(x):
    return x * x.sigmoid().bernoulli()  # bernoulli


def inplace_noise(x):
    return x + x.new_zeros(3).normal_()  # inplace_noise


@pytest.mark.parametrize("example", [None, torch.ones(2, 3)], ids=["fx", "example"])
@pytest.mark.parametrize(
    "body", [torch_noise, sized_noise, noise_like, dropped, bernoulli, inplace_noise], ids=lambda b: b.__name__
)
def test_random_numbers_are_refused(body, example):
    state = torch.get_rng_state()
    with pytest.raises(TraceError, match=r"random") as caught:
        trace(Body(body), example=example)
    assert line(body.__name__, __file__) in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
@pytest.mark.parametrize("example", [None, torch.ones(2, 3)], ids=["fx", "example"])
def test_random_numbers_of_other_generators_are_refused(draw, example):
    def body(x):
        sizes = range(x.shape[1]) if example is not None else ()
        return x * float(draw()) + len(list(sizes))

    with pytest.raises(TraceError, match="random numbers"):
        trace(Body(body), example=example)


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(3, 3), nn.Dropout(0.3)

    def forward(self, x):
        return F.dropout(self.drop(self.layer(x)), 0.5, self.training)  # dropout


def test_dropout():
    check(WithDropout().eval(), (3,))
    with pytest.raises(TraceError, match=r'dropout "drop" \(Dropout\) is in training mode.*net\.eval\(\)') as caught:
        trace(WithDropout())
    assert line("dropout", __file__) in str(caught.value)
    model = WithDropout()
    model.drop.eval()
    with pytest.raises(TraceError, match=r"F\.dropout is in training mode.*net\.eval\(\)"):
        trace(model)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (4,)), (nn.BatchNorm1d, (4, 5)), (nn.BatchNorm2d, (4, 3, 3))])
def test_batch_norm_in_training_mode(kind, shape, affine):
    model = nn.Sequential(nn.Identity(), kind(4, eps=0.1, affine=affine))
    if affine:
        nn.init.normal_(model[1].weight)
        nn.init.normal_(model[1].bias)
    graph = check(model, shape, batches=(2, 3))
    assert [node.item for node in graph.nodes if node.batch_statistics] == [0, 1]
    assert not any(node.batch_statistics for node in check(model.eval(), shape).nodes)
    untracked = nn.Sequential(kind(4, track_running_stats=False, affine=affine)).eval()
    assert any(node.batch_statistics for node in check(untracked, shape, batches=(2, 3)).nodes)


def test_functional_batch_norm_in_training_mode():
    def body(x):
        return F.batch_norm(x, None, None, None, torch.ones(4), training=True)

    assert sum(node.batch_statistics for node in check(Body(body), (4,), batches=(2, 3)).nodes) == 2


def test_gradient_reaches_the_batch_statistics():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    graph, x = trace(model), torch.randn(5, 4)
    run_graph(graph, model, {"input": x}).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4)


def loop(x):
    for i in range(x.size(1)):  # loop
        x = x + i
    return x


def iterate(x):
    return sum(row for row in x.t())  # iterate


def length(x):
    return x * len(x)  # length


def shape_branch(x):
    return x if x.dim() == 2 else -x  # shape_branch


def starred(x):
    return x.view(*x.shape, 1)  # starred


def product(x):
    return x.view(-1, int(np.prod(x.shape[1:])))  # product


def biggest(x):
    return x * max(x.shape)  # biggest


def method_of_size(x):
    return x.view(-1, np.prod(x.shape[1:]))  # method_of_size


def attribute(x):
    x.mark = 1  # attribute
    return x


def from_data(x):
    return x + torch.tensor([0.0]).expand(x.size(0), 3)  # from_data


LOST = [loop, iterate, length, shape_branch, starred, product, biggest, method_of_size, attribute, from_data]


@pytest.mark.parametrize("body", LOST, ids=lambda b: b.__name__)
def test_what_symbolic_tracing_cannot_follow_names_the_line(body):
    with pytest.raises(TraceError, match=r"Pass example_input=") as caught:
        trace(Body(body))
    assert line(body.__name__, __file__) in str(caught.value)


class Library(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.rnn, self.soft = nn.MultiheadAttention(4, 2, batch_first=True), nn.GRU(4, 4), nn.Softmin(-1)

    def forward(self, x):
        y, _ = self.attention(x, x, x)  # attention
        return self.soft(self.rnn(y)[0]) + self.attention.out_proj.bias  # rnn


def test_library_modules_without_a_rule_stay_whole():
    """So that they are reported together with all other unsupported operators."""
    graph = trace(Library())
    found = {node.operator.path: node.origin for node in graph.nodes if isinstance(node.operator, ModuleRef)}
    assert set(found) == {"attention", "rnn"}
    assert ends_at(found["attention"], "attention", __file__)
    assert ends_at(found["rnn"], "rnn", __file__)


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.seen, self.count = None, [], 0

    def forward(self, x):
        self.features = x * 2
        self.seen.append(self.features)
        self.count += 1
        return self.features + 1


def test_nothing_symbolic_stays_on_the_model():
    model = Stateful()
    trace(model)
    assert model.features is None
    assert model.seen == []
    assert model.count == 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda x: (x, x + 1), "returns a tuple of 2"),
        (lambda x: {"a": x}, "returns a dict of 1"),
        (lambda x: None, "returns a NoneType"),
        (lambda x: 3.0, "returns a float"),
    ],
)
def test_output_must_be_one_tensor(body, message):
    with pytest.raises(TraceError, match=f"{message}.*wrap the model"):
        trace(Body(body))


def test_one_tensor_in_a_tuple():
    graph = trace(Body(lambda x: (x.relu(),)))
    assert graph.by_name[graph.output].operator == "relu"


def test_dead_code_is_dropped():
    def body(x):
        x.exp().sum()
        torch.erf(x)
        return x.relu()

    assert len(trace(Body(body)).nodes) == 2


def test_constants_on_the_left():
    def body(x):
        row = torch.arange(1.0, 4.0)
        return (row + x) * (row - x) / (row * x + 100) + (row ** x.sigmoid()) + torch.maximum(row, x) + row[None] @ x.T @ x

    check(Body(body), (3,))


def test_symbolic_values_do_not_leak_into_torch():
    before = torch.zeros, nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__
    with pytest.raises(TraceError):
        trace(Body(branch))
    assert before == (torch.zeros, nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__)


class Picked(nn.Module):
    """Only the first input can move: what the second one says is a position."""

    def forward(self, x, y):
        return 2 * x.gather(1, y.argmax(1, keepdim=True))


class Tabled(nn.Module):
    def forward(self, x, table):
        return x @ table


@pytest.mark.parametrize(("model", "shape"), [(Picked(), (2, 3)), (Tabled(), (3, 4))])
def test_some_inputs_of_an_example_may_turn_out_to_be_fixed(model, shape):
    """An example of every argument does not say which of them will move."""
    x, other = torch.randn(2, 3), torch.randn(shape)
    region = {"x": autodual.LInf(0.1)}
    found = autodual.certify(model, (x, other)).bounds((x, other), region)
    torch.testing.assert_close(found.lower, autodual.certify(model).bounds((x, other), region).lower)
    assert found.contains(model(x, other), 1e-5).all()
    with pytest.raises(autodual.errors.AutoDualError):
        autodual.certify(model, (x, other)).bounds((x, other), autodual.LInf(0.1))


class Fitted(nn.Module):
    """Constants made to fit the input's dtype and shape."""

    def __init__(self):
        super().__init__()
        self.register_buffer("labels", torch.tensor([0, 2, 1]))
        self.register_buffer("mask", torch.tensor([[True], [False], [True]]))

    def forward(self, x):
        one_hot = torch.nn.functional.one_hot(self.labels, 3).to(x)
        return x @ one_hot * self.mask.T.type_as(x) + self.mask[:1].float().expand_as(x)


@pytest.mark.parametrize("example", [None, torch.randn(2, 3)])
def test_constants_that_are_fitted_to_the_input_stay_constants(example):
    model, x = Fitted(), torch.randn(4, 3)
    found = autodual.certify(model, example).bounds(x, autodual.LInf(0.1))
    torch.testing.assert_close(found.width, 0.2 * torch.tensor([1.0, 0.0, 1.0]).expand(4, 3))
    assert found.contains(model(x), 1e-6).all()
