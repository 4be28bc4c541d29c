"""Norms, distances, variances and products over axes, against brute force, exact optima, samples and finite differences."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor, nn

import autodual
from dual_layers import INPUT, Call, DualLayer, Interval, Slopes, Slot, choose

NORM = Call(torch.linalg.vector_norm, (INPUT,), {"dim": -1})
INF = torch.inf


def layer_of(call: Call) -> DualLayer:
    return choose(call)[0](call)


def some_boxes(count: int, width: int, seed: int = 0, low: float = -3.0, high: float = 3.0) -> Interval:
    generator = torch.Generator().manual_seed(seed)
    ends = low + (high - low) * torch.rand(2, count, width, generator=generator, dtype=torch.float64)
    return Interval(ends.amin(0), ends.amax(0))


def corners(box: Interval) -> Tensor:
    """All corners of boxes ``[count, width]``: ``[corners, count, width]``."""
    choices = product((False, True), repeat=box.lower.shape[-1])
    return torch.stack([torch.where(torch.tensor(choice), box.upper, box.lower) for choice in choices])


def grid(box: Interval, steps: int) -> Tensor:
    """A grid of points of boxes ``[count, width]``: ``[points, count, width]``."""
    shares = torch.linspace(0, 1, steps, dtype=torch.float64)
    choices = torch.cartesian_prod(*[shares] * box.lower.shape[-1])
    return box.lower + choices[:, None] * box.width


def test_the_interval_of_a_norm_is_attained() -> None:
    box = some_boxes(200, 3)
    found = layer_of(NORM).interval(box)
    torch.testing.assert_close(found.upper, corners(box).norm(dim=-1).amax(0))
    nearest = torch.clamp(torch.zeros_like(box.lower), box.lower, box.upper)
    torch.testing.assert_close(found.lower, nearest.norm(dim=-1))


def test_lines_of_a_norm() -> None:
    """Below, the plane touches along the whole ray through the centre; above, it is as low there as its derivation says."""
    box = some_boxes(300, 4, low=-1.0)
    layer = layer_of(NORM)
    slopes = layer.slopes((box,), "adaptive")
    offsets = layer.conjugate(slopes, (box,))
    torch.testing.assert_close(slopes.lower[0].norm(dim=-1), torch.ones(300).double())
    straddling = ((box.lower < 0) & (box.upper > 0)).all(1)
    assert (offsets.lower[straddling] == 0).all()
    height = (slopes.upper[0] * box.center).sum(-1) + offsets.upper
    expected = (box.center.square() + box.radius.square()).sum(-1).sqrt()
    farthest = torch.maximum(box.lower.abs(), box.upper.abs()).norm(dim=-1)
    assert (height <= expected + 1e-12).all()
    assert (height < farthest).all()
    mean = corners(box).norm(dim=-1).mean(0)  # no plane above can be lower at the centre than the corners' mean
    assert (height >= mean - 1e-12).all()
    assert (height - mean <= 0.12 * mean).all()


def test_offsets_of_a_norm_hold_for_any_slopes_and_are_seldom_loose() -> None:
    box, generator = some_boxes(40, 3, seed=1), torch.Generator().manual_seed(0)
    points, ends = torch.cat([grid(box, 9), corners(box)]), corners(box)
    layer = layer_of(NORM)
    for scale in (0.0, 0.3, 1.0, 3.0):
        slope = scale * torch.randn(40, 3, generator=generator, dtype=torch.float64)
        offsets = layer.conjugate(Slopes((slope,), (slope,)), (box,))
        rest = points.norm(dim=-1) - (slope * points).sum(-1)
        above = (ends.norm(dim=-1) - (slope * ends).sum(-1)).amax(0)
        assert (offsets.lower <= rest.amin(0) + 1e-12).all()
        assert (offsets.upper >= above - 1e-12).all()
        if scale == 0:
            torch.testing.assert_close(offsets.upper, above)
            torch.testing.assert_close(offsets.lower, layer.interval(box).lower)
        assert (offsets.upper - above).median() <= 0.15 * above.abs().median()


def test_a_norm_at_zero_and_without_ends() -> None:
    layer = layer_of(NORM)
    zero = Interval(torch.zeros(1, 3), torch.zeros(1, 3))
    open_ = Interval(torch.tensor([[-INF, 0.0, 1.0]]), torch.tensor([[INF, 1.0, 2.0]]))
    for choice in ("parallel", "adaptive"):
        slopes = layer.slopes((zero,), choice)
        offsets = layer.conjugate(slopes, (zero,))
        assert offsets.lower.item() == offsets.upper.item() == 0
        slopes = layer.slopes((open_,), choice)
        offsets = layer.conjugate(slopes, (open_,))
        point = torch.tensor([[-7.0, 0.5, 1.5]])
        assert layer.push(slopes.lower, (point,)) + offsets.lower <= point.norm()
        assert offsets.upper.item() == INF
    assert layer.interval(open_).lower.item() == 1
    assert layer.interval(open_).upper.item() == INF


@pytest.mark.parametrize("eps", [1e-12, 1.5])
def test_the_interval_of_normalised_vectors_is_attained(eps: float) -> None:
    box = some_boxes(60, 3, seed=2)
    call = Call(F.normalize, (INPUT,), {"dim": -1, "eps": eps})
    found = layer_of(call).interval(box)
    candidates = torch.cat([grid(box, 9), corners(box)])
    pinned = torch.where((box.lower < 0) & (box.upper > 0), 0.0, candidates)  # others vanish where they may
    for index in range(3):
        keep = torch.arange(3) == index
        values = torch.cat([call(torch.where(keep, candidates, other))[..., index] for other in (candidates, pinned)])
        assert (found.lower[:, index] <= values.amin(0) + 1e-12).all()
        assert (found.upper[:, index] >= values.amax(0) - 1e-12).all()
        assert (values.amin(0) - found.lower[:, index]).max() < 1e-12
        assert (found.upper[:, index] - values.amax(0)).max() < 1e-12


def test_the_interval_of_a_variance_is_close_to_exact() -> None:
    """The smallest variance is a convex program, solved by L-BFGS-B; the largest is attained at a corner."""
    box = some_boxes(40, 5, seed=3, low=-1.0, high=2.0)
    centre = box.center
    for scale in (0.05, 0.3, 1.0):
        part = Interval(centre - scale * box.radius, centre + scale * box.radius)
        found = layer_of(Call(torch.var, (INPUT, -1), {"correction": 0})).interval(part)
        highest = corners(part).var(-1, correction=0).amax(0)
        assert (found.upper >= highest - 1e-12).all()
        assert (found.upper <= 1.4 * highest).all()
        for index in range(40):
            ends = list(zip(part.lower[index].tolist(), part.upper[index].tolist(), strict=True))
            start = part.center[index].numpy()
            best = minimize(lambda z: z.var(), start, jac=lambda z: 2 * (z - z.mean()) / 5, bounds=ends, tol=1e-14).fun
            assert found.lower[index].item() <= best + 1e-9
            assert found.lower[index].item() >= best - 1e-7


def test_a_product_over_an_axis_is_bounded_exactly_by_intervals() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.prod(-1, keepdim=True)

    box = some_boxes(30, 5, seed=4)
    region = autodual.Box(box.lower, box.upper)
    bounds = autodual.certify(Product()).bounds(box.center, region, method="interval")
    values = corners(box).prod(-1)
    torch.testing.assert_close(bounds.lower[:, 0], values.amin(0))
    torch.testing.assert_close(bounds.upper[:, 0], values.amax(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (Call(torch.norm, (INPUT, "nuc"), {"dim": (1, 2)}), "nuclear"),
        (Call(torch.linalg.vector_norm, (INPUT, 3)), "1, 2 and inf"),
        (Call(torch.linalg.vector_norm, (INPUT,), {"dtype": torch.float32}), "convert before"),
        (Call(torch.linalg.matrix_norm, (INPUT, 2)), "Frobenius"),
        (Call(F.mse_loss, (INPUT, Slot(1)), {"size_average": False}), "not supported"),
        (Call(torch.cumprod, (INPUT, 1)), ""),
    ],
)
def test_refusals(call: Call, message: str) -> None:
    rule, reason = choose(call)
    assert rule is None
    assert message in reason


class Statistics(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function, self.first, self.second = function, nn.Linear(4, 6), nn.Linear(4, 6)
        self.centers = nn.Parameter(torch.randn(1, 3, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.first(x), self.second(x), self.centers)


FUNCTIONS = {
    "norm": lambda a, b, c: a.norm(dim=1, keepdim=True),
    "norm of what may be zero": lambda a, b, c: torch.relu(a).norm(dim=1, keepdim=True),
    "root of a sum of squares that may be zero": lambda a, b, c: torch.relu(a).square().mean(1, keepdim=True).sqrt(),
    "sum of absolute values": lambda a, b, c: torch.linalg.norm(a, 1, dim=1, keepdim=True),
    "Frobenius": lambda a, b, c: torch.linalg.matrix_norm(a.view(-1, 2, 3))[:, None],
    "normalize": lambda a, b, c: F.normalize(a, dim=1),
    "cosine": lambda a, b, c: F.cosine_similarity(a[:, None], c, dim=-1),
    "distance": lambda a, b, c: F.pairwise_distance(a, b, keepdim=True),
    "kernel": lambda a, b, c: torch.exp(-torch.cdist(a[:, None], c)[:, 0]),
    "squared error": lambda a, b, c: F.mse_loss(a, b, reduction="none").mean(1, keepdim=True),
    "absolute error": lambda a, b, c: F.l1_loss(a, b, reduction="none").sum(1, keepdim=True),
    "variance": lambda a, b, c: a.var(1, unbiased=False, keepdim=True),
    "deviation and mean": lambda a, b, c: torch.cat([torch.std_mean(a, 1, keepdim=True)[i] for i in (0, 1)], 1),
    "product": lambda a, b, c: torch.tanh(a).prod(1, keepdim=True),
}
METHODS = ("interval", "dual", "adaptive")


def built(name: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Statistics(FUNCTIONS[name]).double(), torch.randn(3, 4, dtype=torch.float64)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("eps", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_point_leaves_its_bounds(name: str, eps: float) -> None:
    model, x = built(name)
    region, generator = autodual.LInf(eps), torch.Generator().manual_seed(0)
    with torch.no_grad():
        many = x.repeat(300, 1)
        ends = many + eps * (2 * torch.randint(0, 2, many.shape, generator=generator) - 1).to(x)
        values = model(torch.cat([ends, region.sample(many, generator)])).unflatten(0, (600, len(x)))
    net, widths = autodual.certify(model), {}
    for method in METHODS:
        bounds = net.bounds(x, region, method=method)
        assert (bounds.lower <= values.amin(0) + 1e-9).all()
        assert (bounds.upper >= values.amax(0) - 1e-9).all()
        assert bounds.width.isfinite().all()
        widths[method] = bounds.width.mean() / (values.amax(0) - values.amin(0)).mean()
    if eps == 0.05:
        assert widths["dual"] < 0.9 * widths["interval"]
        assert widths["dual"] < 2.0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_forward_walk_agrees(name: str) -> None:
    model, x = built(name)
    net, region = autodual.certify(model), autodual.LInf(0.05)
    backward, forward = (net.bounds(x, region, method=autodual.Dual(walk=walk)) for walk in ("backward", "forward"))
    torch.testing.assert_close(forward.lower, backward.lower, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(forward.upper, backward.upper, atol=1e-9, rtol=1e-9)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bounds_are_differentiable_in_the_parameters(name: str, method: str) -> None:
    model, x = built(name)
    net, weight = autodual.certify(model), model.first.weight
    towards = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5), dtype=weight.dtype)

    def total() -> Tensor:
        return net.bounds(x, autodual.LInf(0.03), method=method).lower.sum()

    (grad,) = torch.autograd.grad(total(), [weight])
    with torch.no_grad():
        weight += 1e-6 * towards
        ahead = total()
        weight -= 2e-6 * towards
        behind = total()
    assert (grad * towards).sum().item() == pytest.approx((ahead - behind).item() / 2e-6, rel=1e-3, abs=1e-6)


class Length(nn.Module):
    """Norms, by name and by hand, of features that are all zero in a corner of the region."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(x)
        lengths = [x.norm(dim=1), x.square().sum(1).sqrt(), (x.pow(2).mean(1) / 2) ** 0.5, x.std(1)]
        return torch.stack(lengths, 1)


@pytest.mark.parametrize("method", METHODS)
def test_lengths_that_may_vanish_have_finite_bounds_and_derivatives(method: str) -> None:
    x = torch.tensor([[0.1, 0.2, 0.05], [0.1, -1.0, 0.4]], dtype=torch.float64).requires_grad_()
    bounds = autodual.certify(Length()).bounds(x, autodual.LInf(0.3), method=method)
    assert (bounds.lower[0] == 0).all()
    assert bounds.upper.isfinite().all()
    (grad,) = torch.autograd.grad(bounds.upper.sum() - bounds.lower.sum(), [x])
    assert grad.isfinite().all()
    assert (grad != 0).any()


def test_a_loss_over_the_whole_batch_is_refused_with_its_place() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.mse_loss(x, torch.zeros_like(x)).expand(1, 1)

    with pytest.raises(autodual.TraceError, match="mixed"):
        autodual.certify(Mean()).bounds(torch.randn(3, 4), autodual.LInf(0.1))


def test_the_norm_of_infinite_order() -> None:
    model, x = (
        Statistics(lambda a, b, c: torch.linalg.norm(a, math.inf, dim=1, keepdim=True)).double(),
        torch.randn(3, 4).double(),
    )
    values = torch.stack([model(autodual.LInf(0.1).sample(x, torch.Generator().manual_seed(i))) for i in range(50)])
    bounds = autodual.certify(model).bounds(x, autodual.LInf(0.1))
    assert (bounds.lower <= values.amin(0) + 1e-9).all()
    assert (bounds.upper >= values.amax(0) - 1e-9).all()
