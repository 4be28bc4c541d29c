"""A traced graph that computes another function is the worst bug there is: each way to get one is an error."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autodual
from autodual import LInf, TraceError
from autodual.layout import Layout

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Branch(nn.Module):
    """Symbolic tracing takes another branch than the model: a proxy's type is not Tensor."""

    def forward(self, x):
        return F.relu(x) if type(x) is torch.Tensor else x


class Noise(nn.Module):
    def forward(self, x):
        return x + 1e-9 * torch.rand(3)


class Mixing(nn.Module):
    def forward(self, x):
        return F.relu(x - x.mean(0, keepdim=True))


class Shift(nn.Module):
    def forward(self, x):
        return x.roll(1, 0)


class Total(nn.Module):
    def forward(self, x):
        return F.relu(x).sum()


class Baked(nn.Module):
    def forward(self, x):
        return F.relu(x.reshape(4, 3))


class Gram(nn.Module):
    def forward(self, x):
        return x[:, None] + x[None]


class Counter(nn.Module):
    calls = 0

    def forward(self, x):
        Counter.calls += 1
        return x * Counter.calls


class OnlyForOne(nn.Module):
    def forward(self, x):
        return F.relu(x.reshape(1, -1))


class Flipped(nn.Module):
    """Leaves the middle one of three examples in place."""

    def forward(self, x):
        return F.relu(0.7 * x + 0.3 * x.flip(0))


class Rolled(nn.Module):
    """Is the identity on three examples."""

    def forward(self, x):
        return F.relu(x.roll(3, 0))


class Whole(nn.Module):
    def forward(self, x):
        return F.relu(x).to(torch.zeros(1, dtype=torch.long).dtype).float()


BAD = {
    "flipped examples": (Flipped, "mixes the examples"),
    "examples rolled by three": (Rolled, "mixes the examples"),
    "whole numbers": (Whole, "."),
    "branch on the type": (Branch, "does not compute the model's function"),
    "random numbers": (Noise, "random"),
    "batch mean": (Mixing, "mixed"),
    "shifted examples": (Shift, "mixes the examples"),
    "sum over the batch": (Total, "mixed|baked"),
    "batch size baked in": (Baked, "."),
    "pairs of examples": (Gram, "mixed|baked"),
    "state": (Counter, "does not compute the model's function"),
    "batch of one only": (OnlyForOne, "axis 0 must be the batch"),
}


@pytest.mark.parametrize("case", BAD)
def test_another_function_is_an_error(case):
    make, message = BAD[case]
    with pytest.raises(autodual.AutoDualError, match=message):
        autodual.certify(make()).bounds(X, LInf(0.1))
    with pytest.raises(autodual.AutoDualError):
        autodual.certify(make(), example_input=X).bounds(X, LInf(0.1))


def test_a_branch_on_isinstance_is_followed():
    class Instance(nn.Module):
        def forward(self, x):
            return F.relu(x) if isinstance(x, torch.Tensor) else x

    assert autodual.certify(Instance()).bounds(X, LInf(0.0)).lower.min() >= 0


def test_the_mode_is_part_of_the_graph():
    class Moody(nn.Module):
        def forward(self, x):
            return F.relu(x) if self.training else -F.relu(x)

    model = Moody()
    net = autodual.certify(model)
    assert net.bounds(X, LInf(0.0)).lower.min() >= 0
    net.eval()
    assert net.bounds(X, LInf(0.0)).upper.max() <= 0
    torch.testing.assert_close(net.bounds(X, LInf(0.0)).lower, model(X))


@pytest.mark.parametrize("value", ["plain", "grad"])
def test_looking_at_a_model_leaves_no_trace(value):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, x = torch.get_rng_state(), X.clone().requires_grad_(value == "grad")
    autodual.certify(model).bounds(x, LInf(0.1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x.detach(), X)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("layout", [Layout(), Layout(2), Layout(0, 5), Layout(1, 5), Layout(1, 5, 5), Layout(2, 4, 2)], ids=str)
@pytest.mark.parametrize("lead", [0, 1])
def test_layouts_go_back_and_forth(layout, lead):
    batch, shape = 3, [2, 4, 6]
    shape[layout.axis] = batch * layout.factor
    value = torch.arange(float(7**lead * 2 * 4 * 6 * 15)).reshape(-1)[: 7**lead * torch.Size(shape).numel()]
    value = value.reshape(*[7] * lead, *shape)
    rows = layout.examples(value, batch, lead)
    assert rows.shape[lead] == batch
    assert rows.ndim == lead + 2
    assert torch.equal(layout.node(rows, tuple(shape), lead), value)


def test_a_merged_axis_knows_whose_entries_are_whose():
    class Merged(nn.Module):
        def __init__(self, outer):
            super().__init__()
            self.outer, self.linear = outer, nn.Linear(2, 2)

        def forward(self, x):
            batch = x.size(0)
            z = x if self.outer else x.transpose(0, 1)
            z = F.relu(self.linear(z.reshape(batch * 3, 2)))
            return z.view(batch, 6) if self.outer else z.view(3, batch, 2).transpose(0, 1).reshape(batch, 6)

    torch.manual_seed(0)
    x = torch.randn(4, 3, 2)
    for outer in (True, False):
        model = Merged(outer)
        net = autodual.certify(model)
        found = net.bounds(x, LInf(0.1))
        for i in range(4):
            torch.testing.assert_close(net.bounds(x[i : i + 1], LInf(0.1)).lower[0], found.lower[i])
        for _ in range(100):
            assert found.contains(model(x + 0.1 * (2 * torch.rand_like(x) - 1)), 1e-5).all()


def test_a_batch_between_two_merged_axes_is_found():
    """Frames as further examples, given to attention that wants time first: T * (B * F) rows."""

    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            z = x.flatten(0, 1).transpose(0, 1)
            z, _ = self.attention(z, z, z)
            return self.head(z.mean(0).view(x.size(0), -1, 4).mean(1))

    class Rows(nn.Module):
        def forward(self, x):
            z = torch.relu(x.transpose(0, 1).reshape(3 * x.size(0) * 2, 1))
            return z.view(3, x.size(0), 2).transpose(0, 1).flatten(1)

    torch.manual_seed(0)
    for model, x in ((Video(), torch.randn(3, 2, 5, 4)), (Rows(), torch.randn(4, 3, 2))):
        model = model.double().eval()
        net, x = autodual.certify(model), x.double()
        found = net.bounds(x, LInf(0.05))
        for i in range(len(x)):
            torch.testing.assert_close(net.bounds(x[i : i + 1], LInf(0.05)).lower[0], found.lower[i])
        for _ in range(50):
            assert found.contains(model(x + 0.05 * (2 * torch.rand_like(x) - 1)), 1e-9).all()


def test_a_fill_value_is_not_a_shape():
    class Fill(nn.Module):
        def forward(self, x):
            return x.new_full((1,), 2.0) + torch.zeros_like(x) + x.new_ones(x.size(0), 1)

    class Leak(nn.Module):
        def forward(self, x):
            return torch.full_like(x, x.sum()) + 0 * x

    assert autodual.certify(Fill()).bounds(X, LInf(0.1)).width.max() == 0
    with pytest.raises(autodual.AutoDualError):
        autodual.certify(Leak()).bounds(X, LInf(0.1))


def test_prompt_tokens_around_the_input_have_an_order():
    class Prompt(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.a(x)
            c = torch.zeros_like(h)
            return self.b(torch.stack([c, h, c]).flatten(0, 1).relu()).view(3, -1, 2).mean(0)

    torch.manual_seed(0)
    model, x = Prompt().double(), torch.randn(5, 2, dtype=torch.float64)
    region = LInf(torch.tensor([0.9, 0.01, 0.02, 0.3, 0.1], dtype=torch.float64))
    found = autodual.certify(model).bounds(x, region)
    for _ in range(300):
        assert found.contains(model(region.sample(x)), 1e-9).all()


class Sorted(nn.Module):
    """Sorts by lengths, as one does before packing, and forgets or remembers to undo it."""

    def __init__(self, undo):
        super().__init__()
        self.undo, self.linear = undo, nn.Linear(3, 2)

    def forward(self, x, lengths):
        order = lengths.argsort(descending=True)
        z = F.relu(self.linear(x[order]))
        return z[order.argsort()] if self.undo else z


def test_examples_that_meet_through_a_fixed_input():
    x, lengths = torch.randn(4, 3), torch.tensor([2, 5, 1, 7])
    for undo in (True, False):
        net = autodual.certify(Sorted(undo))
        with pytest.raises(TraceError, match="mixes the examples"):
            net.bounds((x, lengths), {"x": LInf(0.1)})


def test_a_python_argument_is_part_of_what_was_validated():
    class Roll(nn.Module):
        def forward(self, x, axis):
            return F.relu(x.roll(1, axis))

    net, x = autodual.certify(Roll()), torch.randn(4, 3)
    net.bounds({"x": x, "axis": 1}, {"x": LInf(0.1)})
    with pytest.raises(autodual.AutoDualError):
        net.bounds({"x": x, "axis": 0}, {"x": LInf(0.1)})


def test_one_huge_output_does_not_excuse_the_others():
    class Masked(nn.Module):
        calls = 0

        def forward(self, x):
            Masked.calls += 1
            sign = -1.0 if Masked.calls > 2 else 1.0
            return (x * sign).masked_fill(torch.tensor([False, False, True]), -1e9)

    with pytest.raises(TraceError, match="does not compute the model's function"):
        autodual.certify(Masked()).bounds(X, LInf(0.1))


def test_examples_that_meet_in_large_batches_or_by_a_changed_buffer():
    class Indexed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("index", torch.arange(12))

        def forward(self, x):
            return F.relu(self.linear(x))[self.index[: x.shape[0]]]

    model, x = Indexed(), torch.randn(12, 3)
    net = autodual.certify(model)
    net.bounds(x, LInf(0.1))
    model.index.copy_(torch.arange(12) ^ 1)
    with pytest.raises(TraceError, match="mixes the examples"):
        net.bounds(x, LInf(0.1))
    model.index.copy_(torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 9, 8, 11, 10]))
    net.bounds(x[:8], LInf(0.1))
    with pytest.raises(TraceError, match="mixes the examples"):
        net.bounds(x, LInf(0.1))
