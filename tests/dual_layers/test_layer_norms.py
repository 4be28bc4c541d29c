"""Normalisation by the input's own statistics: its intervals against points, and whole networks of every kind."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autodual
from dual_layers import INPUT, Call, Interval
from dual_layers._normalised import _least_spread
from dual_layers.layer_norms import DualBySize, DualLayerNorm, divided_by_size

METHODS = ("interval", "dual", "adaptive")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer_norm(count: int, eps: float = 1e-5) -> DualLayerNorm:
    return DualLayerNorm(Call(F.layer_norm, (INPUT, (count,)), {"eps": eps}))


def rms_norm(count: int, eps: float = 1e-5) -> DualBySize:
    return DualBySize(Call(divided_by_size, (INPUT, -1, eps)))


def boxes(count: int, scale: float, radius: float) -> Interval:
    rng = generator(count)
    center = scale * torch.randn(30, count, generator=rng, dtype=torch.float64)
    reach = radius * scale * torch.rand(30, count, generator=rng, dtype=torch.float64)
    return Interval(center - reach, center + reach)


@pytest.mark.parametrize("make", [layer_norm, rms_norm])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_intervals_hold_every_point(make, count: int, scale: float) -> None:
    for radius in (0.0, 1e-3, 0.3, 3.0):
        box, layer = boxes(count, scale, radius), make(count)
        ends = layer.interval(box)
        rng = generator(1)
        z = box.lower + box.width * torch.rand(3_000, 30, count, generator=rng, dtype=torch.float64)
        z[1_000:] = torch.where(torch.rand(z[1_000:].shape, generator=rng) < 0.5, box.lower, box.upper)
        values = layer.forward(torch.minimum(torch.maximum(z, box.lower), box.upper))
        allowance = 1e-9 * max(1.0, scale if count == 1 else 1.0)
        assert (values >= ends.lower - allowance).all()
        assert (values <= ends.upper + allowance).all()
        limit = math.sqrt(max(count - 1, 0) if make is layer_norm else count)
        assert (ends.upper <= limit + 1e-9).all()
        assert (ends.lower >= -limit - 1e-9).all()
        if count > 1 and radius in (1e-3, 0.3) and scale == 1:
            reached = (values.amax(0) - values.amin(0)) / ends.width
            assert reached.median() > 0.5


def test_intervals_of_two_elements_are_exact() -> None:
    """``y = +-t / sqrt(t^2 + eps)`` grows with ``t``, half the difference."""
    box = boxes(2, 1.0, 0.7)
    ends = layer_norm(2, 0.1).interval(box)
    furthest = 0.5 * torch.stack([box.upper[:, 0] - box.lower[:, 1], box.upper[:, 1] - box.lower[:, 0]], 1)
    torch.testing.assert_close(ends.upper, furthest / (furthest.square() + 0.1).sqrt(), rtol=1e-9, atol=1e-9)


def test_intervals_of_awkward_boxes() -> None:
    inf, nan = torch.inf, torch.nan
    lower = torch.tensor([[-inf, 0.0, 0.0], [nan, 1.0, 2.0], [-1e30, -1e30, 3.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0]])
    upper = torch.tensor([[inf, 1.0, 1.0], [nan, 1.0, 2.0], [1e30, 2e30, 3.0], [2.0, 2.0, 2.0], [1e-30, 0.0, 0.0]])
    for make, limit in ((layer_norm, math.sqrt(2)), (rms_norm, math.sqrt(3))):
        ends = make(3).interval(Interval(lower, upper))
        assert not (ends.lower.isnan() | ends.upper.isnan()).any()
        assert (ends.upper <= limit * 1.001).all()
        assert (ends.lower >= -limit * 1.001).all()
        torch.testing.assert_close(ends.upper[0, 0], torch.tensor(limit), rtol=1e-3, atol=0)
        torch.testing.assert_close(ends.lower[1, 0], torch.tensor(-limit), rtol=1e-3, atol=0)
    assert layer_norm(3).interval(Interval(lower, upper)).upper[3:].abs().max() < 1e-2


def test_the_least_spread_is_that_of_a_search() -> None:
    box = boxes(6, 1.0, 1.0)
    search = torch.linspace(-4, 4, 20_001, dtype=torch.float64)[:, None, None]
    gaps = search - torch.minimum(torch.maximum(search, box.lower), box.upper)
    expected = gaps.square().sum(-1).amin(0)
    found = _least_spread(box.lower, box.upper)[:, 0]
    assert (found <= expected + 1e-12).all()
    assert (found >= expected - 1e-6).all()


class Hand(nn.Module):
    """Functions in place of modules."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 12), nn.Linear(12, 3), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.norm(self.first(x))))


class Deep(nn.Module):
    """Two layer norms, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.n, self.m = nn.LayerNorm(12), nn.LayerNorm(12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.m(self.b(torch.relu(self.n(self.a(x)))))))


class Pictures(nn.Module):
    """A norm of channels between convolutions, on six numbers as an image of one channel."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv2d(1, 4, 1), norm, nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.first(x.reshape(-1, 1, 2, 3)))).flatten(1))


class Sequences(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Conv1d(2, 4, 1), norm, nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.first(x.unflatten(1, (2, 3)))).flatten(1))


class Transposed(nn.Module):
    """A view of the norm's result, whose input lies across memory."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.unflatten(1, (3, 2)).transpose(1, 2)).view(-1, 6))


NETWORKS = {
    "layer norm": lambda: nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 3)),
    "no parameters": lambda: nn.Sequential(
        nn.Linear(6, 12), nn.LayerNorm(12, elementwise_affine=False), nn.Tanh(), nn.Linear(12, 3)
    ),
    "rms norm": lambda: nn.Sequential(nn.Linear(6, 12), nn.RMSNorm(12, eps=1e-3), nn.ReLU(), nn.Linear(12, 3)),
    "function": lambda: Hand(lambda h: F.layer_norm(h, (12,), eps=0.1)),
    "two layer norms": Deep,
    "group norm": lambda: Pictures(nn.GroupNorm(2, 4)),
    "instance norm": lambda: Pictures(nn.InstanceNorm2d(4, affine=True)),
    "running statistics": lambda: Pictures(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    "instance norm, sequences": lambda: Sequences(nn.InstanceNorm1d(4)),
    "local response": lambda: Sequences(nn.LocalResponseNorm(3, alpha=0.5)),
    "transposed": Transposed,
}
WIDTHS = {"layer norm": 1.4, "rms norm": 1.4, "two layer norms": 2.2, "function": 1.3, "local response": 1.3}
"""Largest median width over the range that was reached, at eps 0.05, by the dual method."""


def built(name: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = NETWORKS[name]().double().eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        for buffer_name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand_like(buffer) + (0.5 if buffer_name.endswith("var") else 0.0))
        return model, torch.randn(3, 6, dtype=torch.float64)


@cache
def certified(name: str) -> tuple[autodual.BoundModule, Tensor]:
    """Trace each network once for all radii."""
    model, x = built(name)
    return autodual.certify(model), x


@torch.no_grad()
def reached(model: nn.Module, x: Tensor, eps: float, points: int = 2_000) -> tuple[Tensor, Tensor]:
    moves = 2 * torch.rand(points, *x.shape, generator=generator(5), dtype=x.dtype) - 1
    moves[points // 2 :] = moves[points // 2 :].sign()
    values = model((x + eps * moves).flatten(0, 1)).unflatten(0, (points, len(x)))
    return values.amin(0), values.amax(0)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("eps", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_point_leaves_its_bounds(name: str, eps: float) -> None:
    net, x = certified(name)
    lowest, highest = reached(net.model, x, eps)
    widths = {}
    for method in METHODS:
        bounds = net.bounds(x, autodual.LInf(eps), method=method)
        assert bounds.lower.isfinite().all()
        assert bounds.upper.isfinite().all()
        assert (bounds.lower <= lowest + 1e-9).all(), method
        assert (bounds.upper >= highest - 1e-9).all(), method
        widths[method] = bounds.width / (highest - lowest)
    assert (widths["dual"] <= widths["interval"] + 1e-9).all()
    if eps == 0.05:
        assert widths["dual"].median() <= WIDTHS.get(name, 3.0)


@pytest.mark.parametrize("name", ["layer norm", "two layer norms", "rms norm"])
def test_the_forward_walk_agrees(name: str) -> None:
    model, x = built(name)
    net = autodual.certify(model)
    for eps in (0.05, 0.5):
        methods = autodual.Dual(walk="backward"), autodual.Dual(walk="forward")
        backward, forward = (net.bounds(x, autodual.LInf(eps), method=method) for method in methods)
        torch.testing.assert_close(forward.lower, backward.lower, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(forward.upper, backward.upper, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", ["layer norm", "group norm", "two layer norms"])
def test_bounds_are_differentiable_in_the_parameters(name: str) -> None:
    model, x = built(name)
    net, weights = autodual.certify(model), list(model.parameters())
    rng = generator(6)
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


def test_constant_inputs_have_no_variance() -> None:
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)).double()
    x = torch.ones(2, 6, dtype=torch.float64)
    for method in METHODS:
        for eps in (0.0, 1e-6, 1e-2):
            lowest, highest = reached(model, x, eps)
            bounds = autodual.certify(model).bounds(x, autodual.LInf(eps), method=method)
            assert bounds.width.max() < 15
            assert (bounds.lower <= lowest + 1e-6).all()
            assert (bounds.upper >= highest - 1e-6).all()
        assert bounds.width.min() > 0


def test_single_precision_holds_the_points_of_double() -> None:
    model, x = built("two layer norms")
    lowest, highest = reached(model, x, 0.05)
    bounds = autodual.certify(model.float()).bounds(x.float(), autodual.LInf(0.05))
    assert (bounds.lower <= lowest + 1e-5).all()
    assert (bounds.upper >= highest - 1e-5).all()


def test_statistics_that_would_move_are_refused() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.InstanceNorm1d(3, track_running_stats=True)).train()
    with pytest.raises((autodual.UnsupportedOperatorError, autodual.TraceError), match="evaluation mode"):
        autodual.certify(model)
    mean = model[1].running_mean.clone()
    autodual.certify(model.eval()).bounds(torch.randn(2, 2, 4), autodual.LInf(0.1))
    assert torch.equal(model[1].running_mean, mean)
