"""Slopes that climb: sound, never worse than fixed ones, as tight as the linear program, one example at a time."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn

import autodual
from autodual.bounds import combined
from autodual.bounds.pair_ascent import PairAscent
from autodual.errors import SpecificationError
from autodual.methods import Optimized
from tests.reference.lp import Ball, Relu, minimum
from tests.reference.networks import NETWORKS, random_network

BOTH = Optimized(steps=4, hidden_steps=2)


class Own(autodual.Region):
    """A region known by its support only, of another size for each example."""

    def __init__(self, size):
        self.size = size

    def support(self, x, v):
        return (v * x).flatten(2).sum(-1) + self.size * v.flatten(2).abs().amax(-1)

    def sample(self, x, generator=None):
        corner = torch.nn.functional.one_hot(torch.randint(x[0].numel(), (len(x),), generator=generator), x[0].numel())
        sign = torch.randint(2, (len(x), 1), generator=generator) * 2 - 1
        return x + (self.size[:, None] * sign * corner).reshape(x.shape)


class Product(nn.Module):
    """A product of two maps behind a curve, and a maximum."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(2, 3)

    def forward(self, x):
        z = torch.tanh(self.left(x)) * self.right(x).relu()
        return self.last(nn.functional.max_pool1d(z[:, None], 2)[:, 0])


class Sequence(nn.Module):
    """The batch is merged with another axis on the way, and lies behind it."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, x):
        z = self.one(x.reshape(-1, 2, 3).transpose(0, 1).reshape(-1, 3)).relu()
        return self.two(z.reshape(2, -1, 6).transpose(0, 1)[:, 1].sigmoid())


class Two(nn.Module):
    """Two inputs, and a fixed one that scales."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, x, other, scale):
        return self.two((self.one(x) + self.one(other).relu()).relu() * scale)


class Channels(nn.Module):
    """A rectifier with parameters by channel, and a curve."""

    def __init__(self):
        super().__init__()
        self.conv, self.rectifier, self.last = nn.Conv2d(1, 3, 3), nn.PReLU(3), nn.Linear(12, 3)
        with torch.no_grad():
            self.rectifier.weight.copy_(torch.tensor([0.3, -0.4, 1.6]))

    def forward(self, x):
        return self.last(nn.functional.gelu(self.rectifier(self.conv(x))).flatten(1))


def mlp(*activations):
    layers, width = [], 5
    for activation in activations:
        layers += [nn.Linear(width, 8), activation]
        width = 8
    return nn.Sequential(*layers, nn.Linear(width, 3))


MODELS = {
    "relu": (lambda: mlp(nn.ReLU(), nn.ReLU()), (5,)),
    "curves": (lambda: mlp(nn.Tanh(), nn.SiLU()), (5,)),
    "steps": (lambda: mlp(nn.Hardtanh(), nn.LeakyReLU(0.2)), (5,)),
    "product": (Product, (5,)),
    "sequence": (Sequence, (6,)),
    "channels": (Channels, (1, 4, 4)),
}
REGIONS = {
    "linf": lambda n: autodual.LInf(torch.linspace(0.2, 0.5, n)),
    "linf in 0..1": lambda n: autodual.LInf(0.4, domain=(0.0, 1.0)),
    "l2": lambda n: autodual.L2(torch.linspace(0.3, 0.6, n)),
    "own": lambda n: Own(torch.linspace(0.3, 0.6, n)),
}


def stretched(model, factor=2.0):
    """Make a network's weights larger, so that more of its elements are undecided."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= factor
    return model


def build(name, batch=4, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    return stretched(make().to(dtype).eval()), torch.rand(batch, *shape, dtype=dtype)


def to(region, dtype):
    if isinstance(region, Own):
        return Own(region.size.to(dtype))
    return region.with_eps(region.eps.to(dtype)) if isinstance(region.eps, torch.Tensor) else region


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("name", "region"),
    [
        *((name, "linf in 0..1") for name in MODELS),
        *(("relu", region) for region in REGIONS),
        ("curves", "own"),
        ("steps", "l2"),
    ],
)
def test_bounds_are_sound_and_no_worse_than_fixed_slopes(name, region):
    model, x = build(name)
    region = to(REGIONS[region](len(x)), x.dtype)
    net = autodual.certify(model)
    with torch.no_grad():
        rows = torch.cat([torch.eye(3), torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])]).to(x)
        found = net.bounds(x, region, rows, method=BOTH)
        for method in ("dual", "adaptive"):
            other = net.bounds(x, region, rows, method=method)
            assert (found.lower >= other.lower - 1e-9).all(), method
            assert (found.upper <= other.upper + 1e-9).all(), method
        generator = torch.Generator().manual_seed(1)
        for _ in range(100):
            outputs = model(region.sample(x, generator)) @ rows.T
            assert ((outputs >= found.lower - 1e-9) & (outputs <= found.upper + 1e-9)).all()


def test_it_climbs_to_the_linear_program():
    closed = []
    for kind in NETWORKS:
        model, shape = random_network(kind, 0)
        x = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        net, region, rows = autodual.certify(model), autodual.LInf(0.25), torch.eye(3).double()
        boxes = net.intermediate(x, region, method=Optimized(0))
        parents = [step.parent for step in model.steps() if isinstance(step, Relu)]
        ends = {name: (boxes[name].lower.detach(), boxes[name].upper.detach()) for name in parents}
        best = torch.tensor([above for _, above in minimum(model.steps(), x, Ball(float("inf"), 0.25), ends, rows)])
        with torch.no_grad():
            start, end = (net.bounds(x, region, rows, method=Optimized(steps, hidden_steps=0)).lower[0] for steps in (0, 50))
        assert (end <= best + 1e-7).all()
        closed += [((b - a) / (c - a)).item() for a, b, c in zip(start, end, best, strict=True) if c - a > 1e-6]
    assert len(closed) >= 6
    assert statistics.median(closed) > 0.98
    assert min(closed) > 0.85


def test_intermediate_steps_tighten_the_boxes():
    model, x = build("relu")
    net, region = autodual.certify(model), autodual.LInf(0.5)
    with torch.no_grad():
        plain = net.intermediate(x, region, method=Optimized(0))
        climbed = net.intermediate(x, region, method=Optimized(0, hidden_steps=10))
        assert all((climbed[name].width <= plain[name].width + 1e-12).all() for name in plain)
        assert any((climbed[name].width < plain[name].width - 1e-4).any() for name in plain)
        widths = [net.bounds(x, region, method=Optimized(20, steps)).width.mean() for steps in (0, 10)]
    assert widths[1] < widths[0]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("kind", "region"),
    [*((kind, autodual.LInf(0.2, domain=(0.0, 1.0))) for kind in NETWORKS), ("convolutional", autodual.L2(0.5))],
    ids=str,
)
def test_pairs_climb_where_whole_rows_do(kind, region, monkeypatch):
    climbs_where_whole_rows_do(*random_network(kind, 3), region, monkeypatch)


@pytest.mark.parametrize("rows", ["windows", "whole rows"])
def test_rows_of_images_climb_in_pairs(rows, monkeypatch):
    """Rows with several channels, sizes that differ along the axes, and a padding, in whatever order they lie in memory."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 3, (3, 2)), nn.ReLU()]
    last = [nn.Conv2d(3, 3, 2)] if rows == "windows" else [nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, 3)]
    model = stretched(nn.Sequential(*convolutions, *last, nn.Flatten()).double().eval())
    climbs_where_whole_rows_do(model, (2, 7, 12) if rows == "windows" else (2, 9, 9), autodual.LInf(0.1), monkeypatch)


def climbs_where_whole_rows_do(model, shape, region, monkeypatch):
    """Boxes are the same, and so are bounds, whose derivatives lead uphill; windows that stick out count nothing."""
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    net, found = autodual.certify(model), []
    for in_pairs in (True, False):
        walks, rows = [], 32 if in_pairs else 10**6
        method = Optimized(3, hidden_steps=4, hidden_rows=rows)
        if in_pairs:
            monkeypatch.setattr(combined, "PairAscent", lambda *args, seen=walks: seen.append(args[1]) or PairAscent(*args))
        else:
            monkeypatch.setattr(combined, "climbing_run", lambda *args: None)
        boxes = net.intermediate(x, region, method=replace(method, steps=0))
        value = net.bounds(x, region, method=method).lower
        with torch.no_grad():
            assert torch.allclose(value, net.bounds(x, region, method=method).lower)
        found.append((walks, boxes, value))
        if in_pairs:
            derivatives = torch.autograd.grad(value.sum(), list(model.parameters()))
    (walks, boxes, value), (_, others, other) = found
    assert walks
    for name, box in boxes.items():
        torch.testing.assert_close(box.lower, others[name].lower, rtol=0, atol=1e-9)
        torch.testing.assert_close(box.upper, others[name].upper, rtol=0, atol=1e-9)
    torch.testing.assert_close(value, other, rtol=0, atol=1e-8)
    length = sum(derivative.square().sum() for derivative in derivatives)
    with torch.no_grad():
        for parameter, derivative in zip(model.parameters(), derivatives, strict=True):
            parameter += 1e-5 * derivative
        gain = net.bounds(x, region, method=method).lower.sum() - value.sum()
    assert 0.5 * 1e-5 * length < gain < 1.5 * 1e-5 * length


@pytest.mark.parametrize(("name", "region"), [("relu", "linf"), ("relu", "own"), ("sequence", "l2")])
def test_no_example_changes_another(name, region):
    model, x = build(name, batch=3)
    region = to(REGIONS[region](len(x)), x.dtype)
    y = model(x).argmax(1)
    net = autodual.certify(model, memory_budget=2**13)
    with torch.no_grad():
        together = net.verify(x, y, region, method=BOTH)
        for i in range(len(x)):
            only = torch.tensor([i, i])
            alone = net.verify(x[only], y[only], region.take(only, x), method=BOTH)
            torch.testing.assert_close(alone.margins[0], together.margins[i], rtol=0, atol=1e-9)
        assert torch.equal(net.margins(x, y, region, method=BOTH), net.margins(x, y, region, method=BOTH))


def test_float32_one_example_and_none():
    model, x = build("relu", batch=1, dtype=torch.float32)
    net, wide = autodual.certify(model), autodual.certify(build("relu")[0])
    with torch.no_grad():
        found = net.bounds(x, autodual.LInf(0.3), method=BOTH, allow_rounding=True)
        precise = wide.bounds(x.double(), autodual.LInf(0.3), method=BOTH)
        torch.testing.assert_close(found.lower.double(), precise.lower, rtol=0, atol=1e-3)
        assert net.bounds(x[:0], autodual.LInf(0.3), method="optimized").lower.shape == (0, 3)
        assert net.verify(x[:0], torch.zeros(0).long(), autodual.LInf(0.3), method="optimized").verdict == ()


def test_two_inputs_and_a_fixed_one_that_ties_the_examples():
    torch.manual_seed(0)
    model, x, other = stretched(Two().double(), 3.0), torch.rand(3, 3).double(), torch.rand(3, 3).double()
    scale = torch.rand(3, 6).double()
    net, region = autodual.certify(model), {"x": autodual.LInf(1.0), "other": autodual.L2(1.0)}
    with torch.no_grad():
        found = net.bounds((x, other, scale), region, method=Optimized(20, 5))
        fixed = net.bounds((x, other, scale), region, method="adaptive")
        assert (found.width <= fixed.width + 1e-9).all()
        assert found.width.mean() < fixed.width.mean() - 1e-3
        for _ in range(100):
            outputs = model(autodual.LInf(1.0).sample(x), autodual.L2(1.0).sample(other), scale)
            assert found.contains(outputs, 1e-9).all()


def test_verify_stops_where_a_margin_is_proved_and_margins_do_not():
    model, x = build("relu", batch=6)
    y = model(x).argmax(1)
    net, region = autodual.certify(model), autodual.LInf(0.2)
    report = net.verify(x, y, region, method="optimized")
    with torch.no_grad():
        margins = net.margins(x, y, region, method="optimized")
    assert (report.margins <= margins + 1e-9).all()
    assert torch.equal(report.certified, ((margins > 0) | nn.functional.one_hot(y, 3).bool()).all(1))
    assert (report.certified | ~net.verify(x, y, region, method="adaptive").certified).all()


def test_hidden_elements_climb_for_examples_that_are_open(monkeypatch):
    model, x = build("relu", batch=8)
    y = model(x).argmax(1)
    net, region, asked = autodual.certify(model), autodual.LInf(torch.linspace(0.1, 1.5, 8).double()), []
    climb = combined.Combined._climb_hidden
    monkeypatch.setattr(
        combined.Combined, "_climb_hidden", lambda self, examples: asked.append(examples) or climb(self, examples)
    )
    with torch.no_grad():
        settled = net.verify(x, y, region, method=Optimized(0)).certified
        assert asked == []
        assert 0 < settled.sum() < 8
        report = net.verify(x, y, region, method=Optimized(3))
        assert torch.equal(asked.pop(), ~settled)
        best = net.margins(x, y, region, method=Optimized(3))
        assert asked == [None]
    torch.testing.assert_close(report.margins[~report.certified], best[~report.certified], rtol=0, atol=1e-9)


def test_a_step_down_the_gradient_of_a_loss_lowers_it_by_as_much():
    model, x = build("relu", batch=2, seed=1)
    y, region = model(x).argmax(1), autodual.LInf(0.3)
    net, method, parameters = autodual.certify(model), Optimized(steps=40, hidden_steps=2), list(model.parameters())
    before = net.robust_loss(x, y, region, method=method)
    gradients = torch.autograd.grad(before, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= 1e-3 * gradient
        after = net.robust_loss(x, y, region, method=method)
    expected = 1e-3 * sum(gradient.square().sum() for gradient in gradients)
    torch.testing.assert_close(before.detach() - after, expected, rtol=0.1, atol=0)


def test_training_and_batch_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, y = torch.rand(6, 5), torch.randint(3, (6,))
    loss = autodual.certify(model.train()).robust_loss(x, y, autodual.LInf(0.1), method=Optimized(3))
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_domains_left_are_unknown_here_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.Softplus(), nn.Linear(4, 2))

    class Logarithm(nn.Module):
        def forward(self, x):
            return model(x.log())

    x = torch.tensor([[0.5, 0.5], [0.05, 0.5]])
    net = autodual.certify(Logarithm())
    report = net.verify(x, model(x.log()).argmax(1), autodual.LInf(0.1), method=Optimized(3))
    assert not report.certified[1]
    assert report.margins[0].isfinite().all()
    assert any("example 1" in text for text in report.violations)


def test_with_more_hidden_rows_more_boxes_are_tight():
    """So many elements of each example climb, those with the loosest lines; all of them where there are fewer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)).double()
    net, x, region = autodual.certify(model), torch.rand(2, 6, dtype=torch.float64), autodual.LInf(0.4)
    none, few, every = (net.intermediate(x, region, Optimized(5, 5, rows)) for rows in (0, 2, 10**30))
    for name, box in net.intermediate(x, region, Optimized(5, 0)).items():
        assert torch.equal(none[name].lower, box.lower)
        moved = (few[name].lower > box.lower) | (few[name].upper < box.upper)
        assert (moved.sum(1) <= 2).all()
        assert ((few[name].lower >= box.lower) & (few[name].upper <= box.upper)).all()
        assert ((every[name].lower >= few[name].lower) & (every[name].upper <= few[name].upper)).all()
        gap = -(box.lower * box.upper).clamp(max=0) / box.width  # between the two lines of a ReLU
        assert (gap.masked_fill(~moved, torch.inf).amin(1) >= gap.masked_fill(moved, -torch.inf).amax(1))[moved.any(1)].all()
    last = list(none)[-1]
    assert (few[last].width < none[last].width).sum() == 4
    assert (every[last].width < 0.999 * few[last].width).any()


@pytest.mark.parametrize(("kind", "as_many"), [(nn.ReLU, 3), (nn.Tanh, 0)])
def test_hidden_elements_climb_by_default_where_they_do_in_pairs(kind, as_many):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), kind(), nn.Linear(8, 8), kind(), nn.Linear(8, 8), kind(), nn.Linear(8, 3)).double()
    net, x, region = autodual.certify(model), torch.rand(2, 4, dtype=torch.float64), autodual.LInf(0.5)
    with torch.no_grad():
        lower = {steps: net.bounds(x, region, method=Optimized(3, steps)).lower for steps in (None, 0, 3)}
    assert torch.equal(lower[None], lower[as_many])
    assert (lower[0] < lower[3] - 1e-6).any()
    assert [Optimized(steps).steps_inside for steps in (0, 3, 100)] == [0, 3, 12]


@pytest.mark.parametrize("option", [{"steps": -1}, {"steps": 2.5}, {"hidden_steps": -3}, {"hidden_rows": -1}, {"steps": True}])
def test_options_are_checked(option):
    with pytest.raises(SpecificationError, match=f"{next(iter(option))} must be an integer of at least 0"):
        Optimized(**option)


def test_the_same_hidden_elements_climb_whether_or_not_derivatives_are_wanted():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 2), nn.BatchNorm2d(3), nn.ReLU(),
        nn.Flatten(), nn.Linear(12, 3),
    ).double().eval()  # fmt: skip
    net, x = autodual.certify(model), torch.randn(3, 1, 7, 7, dtype=torch.float64)
    for rows in (1, 2, 3):
        with torch.no_grad():
            alone = net.bounds(x, autodual.LInf(0.2), method=Optimized(2, 2, rows))
        found = net.bounds(x, autodual.LInf(0.2), method=Optimized(2, 2, rows))
        torch.testing.assert_close(found.lower, alone.lower, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.upper, alone.upper, rtol=0, atol=1e-12)


class Masked(nn.Module):
    """A weight for each example and element lies between layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 10), nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 3)])

    def forward(self, x, mask):
        x = torch.relu(self.layers[0](x) * mask)
        return self.layers[3](torch.relu(self.layers[2](torch.relu(self.layers[1](x)))))


def test_whether_hidden_elements_climb_by_default_depends_on_no_other_example():
    """Constants that differ from example to example keep a batch from climbing in pairs, and one example alone does."""
    torch.manual_seed(0)
    model = Masked().double()
    x, mask = torch.rand(2, 4).double(), torch.rand(2, 10).double() + 0.5
    net, y = autodual.certify(model), model(x, mask).argmax(1)
    regions = {"x": autodual.LInf(0.6)}
    with torch.no_grad():
        together, alone = (net.margins((x[:n], mask[:n]), y[:n], regions, method=Optimized(5)) for n in (2, 1))
        climbed = [net.margins((x[:n], mask[:n]), y[:n], regions, method=Optimized(5, 5)) for n in (2, 1)]
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-9)
    torch.testing.assert_close(climbed[0][:1], climbed[1], rtol=0, atol=1e-9)
    assert (climbed[0] > together + 1e-6).any()
    net.verify((x, mask), y, regions, method=Optimized(5)).explain(0)


def test_constants_and_sizes_on_the_way_let_hidden_elements_climb():
    torch.manual_seed(0)

    class Image(nn.Module):
        def __init__(self):
            super().__init__()
            self.normalize, self.conv = autodual.Normalize((0.5,), (0.2,)), nn.Conv2d(1, 3, 3)
            self.hidden, self.last = nn.Linear(48, 9), nn.Linear(9, 3)

        def forward(self, x):
            x = torch.relu(self.conv(self.normalize(x)))
            return self.last(torch.relu(self.hidden(x.view(x.size(0), -1))))

    net, x, region = autodual.certify(Image().double()), torch.rand(2, 1, 6, 6).double(), autodual.LInf(0.05)
    with torch.no_grad():
        lower = {steps: net.bounds(x, region, method=Optimized(3, steps)).lower for steps in (None, 0, 3)}
    assert torch.equal(lower[None], lower[3])
    assert (lower[3] > lower[0] + 1e-6).any()
