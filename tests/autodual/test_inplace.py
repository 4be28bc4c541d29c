"""Mutations: rewritten to the same function, or refused; never a graph of another function."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autodual import operators
from autodual.errors import TraceError
from autodual.export import export
from autodual.trace import trace
from dual_layers import Call, Slot, keys_of, lookup, registered_rules
from tests.reference.tracing import check, line, run_graph

BIG = 1000.0


class Model(nn.Module):
    """A body between two linear layers; the body is a plain function of a tensor."""

    def __init__(self, body, width=6):
        super().__init__()
        self.body, self.first, self.last = body, nn.Linear(6, 6), nn.Linear(width, 3)

    def forward(self, x):
        return self.last(self.body(self.first(x)))


def result_unused(x):
    x.relu_()
    return x


def identity_added(x):
    identity = x
    out = x
    out += torch.sigmoid(x)
    return identity + out


def old_name(x):
    y = x
    y = y.add_(BIG)
    return x - y + x


def twice(x):
    y = x * 2
    z = y
    y += 1
    z *= 3
    return y + z


def every_augmented(x):
    y = x * 1
    for step in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
        y = step(y, 3.0)
    y **= 2
    y //= 1.5
    y %= 4
    z = y
    y -= x
    return y + z


def columns(x):
    x[:, 0] = 0
    x[:, 1:3] += 2
    x[:, 3] *= x[:, 4]
    x[..., -1] = x[:, 0] + 5
    return x


def view_then_base(x):
    x[:, 0].mul_(3)
    return x


def view_of_view(x):
    y = x.view(-1, 6)
    inner = y[:, 1:5][:, ::2]
    inner.clamp_(min=0.1)
    return y


def sibling_views(x):
    y = x * 1
    left, right, whole = y[:, :3], y[:, 2:5], y.unsqueeze(0)
    left.add_(BIG)
    return y + F.pad(right, (0, 3)) + whole[0]


def transposed_view_reread(x):
    y = x * 1
    z = y.t()
    y += 1
    return z.t() + y


def split_reread(x):
    y = x * 1
    a, b = y.split(3, 1)
    y *= 2
    return torch.cat([b, a], 1)


def number(x):
    n = x.size(1)
    m = n
    n += 2
    n -= m
    size = x.shape[:1]
    size += (m,)
    return x.view(size) * n


def overwritten(x):
    y = torch.zeros_like(x)
    y.copy_(x)
    z = y[:, :2]
    y[:, 2:].fill_(0.5)
    y[:, 0:1].zero_()
    return y + F.pad(z, (0, 4))


def preallocated(x):
    out = torch.zeros(x.size(0), 6)
    out[:, :3] = x[:, 3:]
    out[:, 3:] += x[:, :3]
    return out


def functional(x):
    y = F.relu(x, inplace=True)
    z = F.hardtanh(F.leaky_relu(y - 1, 0.1, True), inplace=True)
    torch.relu_(y)
    return x + y + z


def masked(x):
    y = x.clone()
    y[y > 0] = -1.0
    y.masked_fill_(x > 1, 2.0)
    return y + x


def constant_written(x):
    row = torch.zeros(6)
    y = x + row
    row += 1
    row[2] = 7
    return y * row


def input_of_copy(x):
    y = x.clone()
    y += BIG
    return x + 0 * y


def metadata(x):
    y = x * 2
    y.unsqueeze_(0)
    y.squeeze_(0)
    return y


def advanced_indices(x):
    y = x * 1
    y[:, [0, 2]] *= 2
    y[y > 1] += 5
    y[:, torch.tensor([3, 4])] -= x[:, :2]
    z = y[:, [1]]
    y += 1
    return y + z


def uninitialised(x):
    out = torch.empty_like(x)
    out[:, 0] = x[:, 0]
    for i in range(1, 6):
        out[:, i] = out[:, i - 1] + x[:, i]
    other = x.new_empty(x.shape[0], 6)
    other.copy_(x)
    return out + other


def list_of_tensors(x):
    parts = [x * 1, x * 2]
    parts[0] += 1
    parts[1][:, 0] = 0
    total = parts[0]
    total += parts[1]
    return total + parts[0]


REWRITTEN = [
    result_unused, identity_added, old_name, twice, every_augmented, columns, view_then_base, view_of_view, sibling_views,
    transposed_view_reread, split_reread, number, overwritten, preallocated, functional, masked, constant_written,
    input_of_copy, metadata,
    list_of_tensors, advanced_indices, uninitialised,
]  # fmt: skip


@pytest.mark.parametrize("body", REWRITTEN, ids=lambda body: body.__name__)
def test_rewritten(body):
    torch.manual_seed(0)
    graph = check(Model(body), (6,))
    for node in graph.nodes:
        if node.kind == "call":
            assert operators.out_of_place(node.operator, node.args, dict(node.kwargs)) is None, node


@pytest.mark.thinned(3)
@pytest.mark.parametrize("body", REWRITTEN, ids=lambda body: body.__name__)
def test_exported_too(body):
    torch.manual_seed(0)
    model = Model(body)
    if body in (split_reread, advanced_indices):
        pytest.skip("autograd forbids the one, the other indexes with a mask whose size depends on values")
    graph = export(model, {"x": torch.randn(3, 6)}, ("x",), ())
    for batch in (2, 4):
        x = torch.randn(batch, 6)
        torch.testing.assert_close(run_graph(graph, model, {"x": x}), model(x))


def test_uninitialised_memory_shows():
    class Leaks(nn.Module):
        def forward(self, x):
            y = torch.empty(x.size(0), 3)
            y[:, 0] = 1
            return x + y

    assert run_graph(trace(Leaks()), Leaks(), {"x": torch.zeros(2, 3)}).isnan().sum() == 4


def test_own_input():
    class Own(nn.Module):
        def forward(self, x):
            y = x + 1
            x.relu_()
            x[:, 0] = 5
            return x * y

    check(Own(), (6,))


def reshaped(x):
    y = x.reshape(-1, 2, 3)
    y += 1  # reshaped
    return x


def flat_view(x):
    x.view(-1).add_(1)  # flat_view
    return x


def transposed_write(x):
    x.t().mul_(torch.arange(6.0)[:, None])  # transposed_write
    return x


def maybe_contiguous(x):
    y = x.contiguous()
    x += 1  # maybe_contiguous
    return y + x


@pytest.mark.parametrize("body", [reshaped, flat_view, transposed_write, maybe_contiguous], ids=lambda body: body.__name__)
def test_refused_without_example_and_exported_with(body):
    torch.manual_seed(0)
    with pytest.raises(TraceError, match=r"shared with .* example_input") as caught:
        trace(Model(body))
    assert line(body.__name__, __file__) in str(caught.value)
    check(Model(body), (6,), example=torch.randn(1, 6))


def expanded(x):
    y = x[:1].expand(x.size(0), 6)
    y[0] = 5  # expanded
    return y + x


def test_overlapping_memory_is_refused():
    with pytest.raises(TraceError, match="expanded tensor") as caught:
        trace(Model(expanded))
    assert line("expanded", __file__) in str(caught.value)


def out_argument(x):
    y = torch.zeros_like(x)
    torch.add(x, 1, out=y)  # out_argument
    return y


def test_out_argument_is_refused():
    with pytest.raises(TraceError, match="out=") as caught:
        trace(Model(out_argument))
    assert line("out_argument", __file__) in str(caught.value)


class Counter(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("calls", torch.zeros(1))
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        if self.how == "method":
            self.calls.add_(1)  # method
        elif self.how == "item":
            self.calls[0] = 5  # item
        elif self.how == "augmented":
            self.calls += 1  # augmented
        elif self.how == "view":
            self.calls.view(1)[:] = 2  # view
        elif self.how == "data":
            self.weight.data.mul_(2)  # data
        elif self.how == "assigned":
            self.calls = self.calls + x.mean()  # assigned
        return x * self.weight + self.calls


@pytest.mark.parametrize("how", ["method", "item", "augmented", "view", "data", "assigned"])
@pytest.mark.parametrize("example", [None, torch.ones(2, 3)], ids=["fx", "example"])
def test_changing_the_model_is_refused(how, example):
    model = Counter(how)
    with pytest.raises(TraceError) as caught:
        trace(model, example=example)
    if example is None:
        assert line(how, __file__) in str(caught.value)
    assert model.calls.item() == 0
    assert type(model.calls) is torch.Tensor
    assert torch.equal(model.weight, torch.ones(3))


def tainted(x):
    row = torch.zeros(2, 6)
    row[0] = x.mean(0)
    double = row * 2  # tainted
    return x + double[0]


def test_constant_with_a_value_in_it_is_not_read_early():
    """Plain tracing would multiply the zeros at once."""
    with pytest.raises(TraceError, match="after a value was written into it") as caught:
        trace(Model(tainted))
    assert line("tainted", __file__) in str(caught.value)


class Resnet(nn.Module):
    """Rectifiers in place, one of them used for two different values."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.down = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4))
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Sequential(nn.ReLU6(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x):
        identity = self.down(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.head(self.relu(out)) + out.mean((2, 3))[:, :3]


def test_residual_network():
    torch.manual_seed(0)
    model = Resnet().eval()
    for bn in (model.bn1, model.bn2, model.down[1]):
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    check(model, (2, 5, 5))
    graph = check(Resnet().train(), (2, 5, 5), batches=(2, 3))
    assert sum(node.batch_statistics for node in graph.nodes) == 6


class InplaceSequential(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Linear(6, 6), nn.LeakyReLU(0.2, True), nn.Identity(), nn.Hardtanh(-1, 1, inplace=True), nn.ReLU(True)
        )


def test_inplace_modules_of_a_sequential():
    graph = check(InplaceSequential(), (6,))
    assert [node.origin for node in graph.nodes][1:] == ["0", "1", "2", "3", "4"]


class ThroughIdentity(nn.Module):
    def __init__(self):
        super().__init__()
        self.same, self.drop = nn.Identity(), nn.Dropout(0.5)

    def forward(self, x):
        y = x * 2
        z = self.drop(self.same(y))
        y += 1  # through
        return z + y


def test_modules_that_return_their_input():
    with pytest.raises(TraceError, match="shared with") as caught:
        trace(ThroughIdentity().eval())
    assert line("through", __file__) in str(caught.value)


def test_assignment_into_a_slice_of_one_example_has_a_transpose():
    """The memory of such a slice is laid out in a way that vmap does not differentiate."""
    part, value, nu = torch.rand(1, 6)[:, 1:5], torch.rand(1, 2), torch.rand(3, 1, 4)
    index = (slice(None), slice(None, None, 2))
    rule = lookup(operators.assign())(Call(operators.assign(), (Slot(0), index, Slot(1))))
    into_part, into_value = rule.transpose(nu, (part, value))
    assert torch.equal(into_part, nu * torch.tensor([0.0, 1.0, 0.0, 1.0]))
    assert torch.equal(into_value, nu[..., ::2])


def _shares_memory(sample):
    inputs = [torch.rand(shape) * (min(sample.high, 1) - max(sample.low, -1)) + max(sample.low, -1) for shape in sample.shapes]
    result = sample.call(*inputs)
    storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return result.untyped_storage().data_ptr() in storages


@pytest.mark.parametrize("rule", registered_rules(), ids=lambda rule: rule.__name__)
def test_rules_declare_what_they_alias(rule):
    """Functionalisation believes ``facts.aliases``: a rule that hides a view would make a graph wrong."""
    if rule.facts.aliases:
        return
    for sample in rule.samples():
        if sample.error is None:
            assert not _shares_memory(sample), sample.label


def test_certain_views_are_views():
    """Views that are replayed on a new value must really be views."""
    x = torch.rand(2, 3, 4)
    calls = [
        ("view", 2, 12), ("transpose", 0, 1), ("view_as", x),
        ("permute", 2, 0, 1), ("movedim", 0, 1), ("squeeze",), ("unsqueeze", 0), ("select", 1, 0),
        ("narrow", 1, 0, 2), ("expand", 5, 2, 3, 4), ("detach",), ("unflatten", 2, (2, 2)), ("diagonal",), ("swapaxes", 0, 1),
        ("unfold", 2, 2, 1), ("broadcast_to", (5, 2, 3, 4)), ("adjoint",), ("expand_as", x),
    ]  # fmt: skip
    for name, *args in calls:
        assert operators.is_view(name, (x, *args)), name
        assert getattr(x, name)(*args).untyped_storage().data_ptr() == x.untyped_storage().data_ptr(), name


def test_every_view_by_keys():
    """What the registry knows under the name of a certain view is declared as an alias."""
    for rule in registered_rules():
        for key in keys_of(rule):
            if not isinstance(key, type) and operators.is_view(key, (None, None)):
                assert rule.facts.aliases, key
