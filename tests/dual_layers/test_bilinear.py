"""Products and quotients of two perturbed values, against corners, exact enumerations, linear programs and samples."""

from __future__ import annotations

import operator
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor, nn

import autodual
from dual_layers import INPUT, Call, Interval, Slopes, Slot, choose
from dual_layers.bilinear import Bilinear, DualMatrixProduct, DualTensorProduct

BOTH = (INPUT, Slot(1))
MATMUL = Call(torch.matmul, BOTH)
EINSUM = Call(torch.einsum, ("bij,bjk->bik", *BOTH))
CHOICES = ("parallel", "adaptive")
INF = torch.inf


def layer_of(operator, *args, **kwargs) -> Bilinear:
    call = Call(operator, args or BOTH, kwargs)
    return choose(call)[0](call)


def boxes(*shapes: tuple[int, ...], seed: int = 0, low: float = -3.0, high: float = 3.0) -> tuple[Interval, ...]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in shapes:
        ends = low + (high - low) * torch.rand(2, *shape, generator=generator, dtype=torch.float64)
        found.append(Interval(ends.amin(0), ends.amax(0)))
    return tuple(found)


def corners(*given: Interval) -> list[tuple[Tensor, ...]]:
    """All corners of a few small boxes taken together."""
    sizes = [box.lower.numel() for box in given]
    found = []
    for choice in product((0.0, 1.0), repeat=sum(sizes)):
        parts = torch.tensor(choice, dtype=torch.float64).split(sizes)
        shares = [part.reshape(box.lower.shape) for part, box in zip(parts, given, strict=True)]
        found.append(tuple(torch.where(share > 0, box.upper, box.lower) for share, box in zip(shares, given, strict=True)))
    return found


def box(*ends: tuple[float, float]) -> Interval:
    return Interval(*torch.tensor(ends, dtype=torch.float64).unbind(1))


def test_the_interval_of_a_product_is_attained() -> None:
    x, y = boxes((500,), (500,))
    found = layer_of(torch.mul).interval(x, y)
    values = torch.stack([a * b for a in (x.lower, x.upper) for b in (y.lower, y.upper)])
    assert torch.equal(found.lower, values.amin(0))
    assert torch.equal(found.upper, values.amax(0))


def test_infinite_factors() -> None:
    x = box((0, 1), (0, 0), (-INF, INF), (1, 2), (0, INF), (-INF, -1), (INF, INF))
    y = box((0, INF), (-INF, INF), (0, 0), (-INF, 3), (0, INF), (2, 5), (-1, 1))
    found = layer_of(torch.mul).interval(x, y)
    assert found.lower.tolist() == [0, 0, 0, -INF, 0, -INF, -INF]
    assert found.upper.tolist() == [INF, 0, 0, 6, INF, -2, INF]


@pytest.mark.parametrize("choice", CHOICES)
def test_lines_of_infinite_boxes_say_nothing_false_and_no_nan(choice: str) -> None:
    layer = layer_of(torch.mul)
    x, y = box((0, INF), (-INF, INF), (1, 2), (-INF, 3)), box((1, 2), (4, 4), (-INF, 0), (-INF, INF))
    slopes = layer.slopes((x, y), choice)
    offsets = layer.conjugate(slopes, (x, y))
    for side in (*slopes.lower, *slopes.upper):
        assert side.isfinite().all()
    inside = [torch.tensor(values, dtype=torch.float64) for values in ((3.0, -70, 1.5, -9), (1.2, 4, -50, 1e5))]
    assert (layer.push(slopes.lower, tuple(inside)) + offsets.lower <= inside[0] * inside[1]).all()
    assert (layer.push(slopes.upper, tuple(inside)) + offsets.upper >= inside[0] * inside[1]).all()
    assert offsets.lower[1].item() == offsets.upper[1].item() == 0  # a fixed factor: exact, whatever the other one is
    if choice == "adaptive":
        assert offsets.lower[0].item() == 0  # x y >= x for x >= 0 and y >= 1


def test_parallel_lines_of_a_product_are_two_radii_apart_and_none_are_closer() -> None:
    x, y = boxes((20,), (20,))
    layer = layer_of(torch.mul)
    slopes = layer.slopes((x, y), "parallel")
    offsets = layer.conjugate(slopes, (x, y))
    gap = offsets.upper - offsets.lower
    torch.testing.assert_close(gap, 2 * x.radius * y.radius)
    for index in range(20):  # smallest gap of any two parallel planes: variables a, b, lower, upper
        points = [(a, b) for a in (x.lower[index], x.upper[index]) for b in (y.lower[index], y.upper[index])]
        above = [[-float(a), -float(b), 0, -1] for a, b in points]
        below = [[float(a), float(b), 1, 0] for a, b in points]
        values = [-float(a * b) for a, b in points] + [float(a * b) for a, b in points]
        best = linprog([0, 0, -1, 1], above + below, values, bounds=[(None, None)] * 4)
        assert gap[index].item() == pytest.approx(best.fun, rel=1e-8)


def test_adaptive_lines_of_a_product_touch_the_hull() -> None:
    """A single line has the least mean distance that any plane below (above) the product has, found by linear programming."""
    x, y = boxes((20,), (20,), seed=1)
    layer = layer_of(torch.mul)
    slopes = layer.slopes((x, y), "adaptive")
    offsets = layer.conjugate(slopes, (x, y))
    center = (x.center, y.center)
    heights = [layer.push(side, center) + end for side, end in ((slopes.lower, offsets.lower), (slopes.upper, offsets.upper))]
    for index in range(20):
        points = [(float(a), float(b)) for a in (x.lower[index], x.upper[index]) for b in (y.lower[index], y.upper[index])]
        rows, values = np.array([[a, b, 1] for a, b in points]), np.array([a * b for a, b in points])
        middle = np.array([center[0][index].item(), center[1][index].item(), 1])
        highest = -linprog(-middle, rows, values, bounds=[(None, None)] * 3).fun
        lowest = linprog(middle, -rows, -values, bounds=[(None, None)] * 3).fun
        assert heights[0][index].item() == pytest.approx(highest, rel=1e-8, abs=1e-10)
        assert heights[1][index].item() == pytest.approx(lowest, rel=1e-8, abs=1e-10)


def test_of_two_planes_the_one_that_stays_nearer_to_the_interval_is_taken() -> None:
    x, y = boxes((400,), (400,), seed=2)
    layer = layer_of(torch.mul)
    slopes, interval = layer.slopes((x, y), "adaptive"), layer.interval(x, y)
    offsets = layer.conjugate(slopes, (x, y))
    ends = [(a, b) for a in (x.lower, x.upper) for b in (y.lower, y.upper)]
    lowest = torch.stack([layer.push(slopes.lower, point) + offsets.lower for point in ends]).amin(0)
    highest = torch.stack([layer.push(slopes.upper, point) + offsets.upper for point in ends]).amax(0)
    known = (x.lower >= 0) | (x.upper <= 0) | (y.lower >= 0) | (y.upper <= 0)
    assert known.float().mean() > 0.3
    torch.testing.assert_close(lowest[known], interval.lower[known])  # nothing is lost against interval arithmetic
    torch.testing.assert_close(highest[known], interval.upper[known])
    planes = [(y.lower, x.lower), (y.upper, x.upper)]
    others = [torch.stack([a * p + b * q - a * b for p, q in ends]).amin(0) for a, b in planes]
    assert (lowest >= torch.maximum(*others) - 1e-12).all()


def test_offsets_of_a_product_are_exact_for_any_slopes() -> None:
    x, y = boxes((2, 1, 3), (4, 1), seed=3)
    layer = layer_of(torch.mul)
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = torch.randn(4, 2, 4, 3, generator=generator, dtype=torch.float64)
    offsets = layer.conjugate(Slopes((a, b), (c, d)), (x, y))
    ends = [(p, q) for p in (x.lower, x.upper) for q in (y.lower, y.upper)]
    torch.testing.assert_close(offsets.lower, torch.stack([p * q - a * p - b * q for p, q in ends]).amin(0))
    torch.testing.assert_close(offsets.upper, torch.stack([p * q - c * p - d * q for p, q in ends]).amax(0))


def test_elements_that_tighter_bounds_could_help() -> None:
    x, y = box((1, 1), (1, 2), (0, 3), (2, 2)), box((0, 5), (4, 4), (-1, 1), (3, 3))
    layer = layer_of(torch.mul)
    assert layer.undecided((x, y)).tolist() == [False, False, True, False]
    for choice in CHOICES:
        offsets = layer.conjugate(layer.slopes((x, y), choice), (x, y))
        gap = offsets.upper - offsets.lower
        assert gap[[0, 1, 3]].tolist() == [0, 0, 0]
        assert choice == "adaptive" or gap[2] > 0


@pytest.mark.parametrize("rule", [DualMatrixProduct, DualTensorProduct])
def test_centred_lines_of_a_contraction_are_exact(rule: type[Bilinear]) -> None:
    x, y = boxes((1, 2, 2), (1, 2, 2), seed=4)
    layer = rule(MATMUL if rule is DualMatrixProduct else EINSUM)
    for choice in CHOICES:
        slopes = layer.slopes((x, y), choice)
        offsets = layer.conjugate(slopes, (x, y))
        rest = torch.stack([p @ q - layer.push(slopes.lower, (p, q)) for p, q in corners(x, y)])
        torch.testing.assert_close(offsets.lower, rest.amin(0))
        torch.testing.assert_close(offsets.upper, rest.amax(0))
        torch.testing.assert_close(offsets.upper - offsets.lower, 2 * x.radius @ y.radius)


def test_offsets_of_a_contraction_hold_for_any_slopes() -> None:
    x, y = boxes((1, 2, 2), (1, 2, 2), seed=5)
    layer, generator = DualMatrixProduct(MATMUL), torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = 3 * torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64)
        offsets = layer.conjugate(Slopes((a, b), (b, a)), (x, y))
        assert (torch.stack([p @ q - p @ a - b @ q for p, q in corners(x, y)]).amin(0) >= offsets.lower - 1e-12).all()
        assert (torch.stack([p @ q - p @ b - a @ q for p, q in corners(x, y)]).amax(0) <= offsets.upper + 1e-12).all()


def exact(x: Interval, y: Interval) -> Interval:
    """Intervals of matrix products, one product of elements at a time."""
    ends = torch.stack([a.unsqueeze(-1) * b.unsqueeze(-3) for a in (x.lower, x.upper) for b in (y.lower, y.upper)])
    return Interval(ends.amin(0).sum(-2), ends.amax(0).sum(-2))


@pytest.mark.parametrize("low", [-3.0, 0.0])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("negative", [False, True])
def test_intervals_of_matrix_products(low: float, swapped: bool, negative: bool) -> None:
    """Exact where one factor's signs are known, at most half as wide again otherwise."""
    (x,), (y,) = boxes((2, 4, 5), seed=6, low=low), boxes((2, 5, 3), seed=7)
    if negative:
        x = Interval(-x.upper, -x.lower)
    if swapped:
        x, y = (Interval(part.lower.mT, part.upper.mT) for part in (y, x))
    found, best = layer_of(torch.matmul).interval(x, y), exact(x, y)
    if low == 0:
        torch.testing.assert_close(found.lower, best.lower)
        torch.testing.assert_close(found.upper, best.upper)
    assert (found.lower <= best.lower + 1e-10).all()
    assert (found.upper >= best.upper - 1e-10).all()
    assert (found.width <= 1.5 * best.width + 1e-10).all()


def test_infinite_elements_of_a_matrix_product_reach_the_outputs_they_meet() -> None:
    x = Interval(torch.zeros(2, 2), torch.tensor([[1.0, 1.0], [1.0, INF]]))
    y = Interval(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
    layer = layer_of(torch.mm)
    slopes = layer.slopes((x, y), "parallel")
    offsets = layer.conjugate(slopes, (x, y))
    for found in (layer.interval(x, y), offsets):
        for end in (found.lower, found.upper):
            assert end.isinf().tolist() == [[False, False], [False, True]]
            assert not end.isnan().any()


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (Call(torch.mul, (Slot(1), INPUT)), ((2, 3, 4), (4,))),
        (Call(torch.matmul, BOTH), ((2, 1, 3, 4), (5, 4, 2))),
        (Call(torch.matmul, (INPUT, INPUT)), ((2, 3, 3),)),
        (
            Call(torch.einsum, ("bi,ij,bj->b", INPUT, torch.tensor([[1.0, -2], [0.5, 3], [-1, 1]]).double(), Slot(1))),
            ((2, 3), (2, 2)),
        ),
        (Call(torch.einsum, ("bi,bj->bij", INPUT, INPUT)), ((2, 3),)),
        (Call(torch.tensordot, BOTH, {"dims": ([2, 1], [0, 1])}), ((2, 3, 4), (4, 3, 2))),
    ],
)
def test_thousands_of_points_stay_between_the_lines(call: Call, shapes: tuple[tuple[int, ...], ...]) -> None:
    layer = choose(call)[0](call)
    generator = torch.Generator().manual_seed(8)
    for seed in range(3):
        given = boxes(*shapes, seed=seed)
        interval = layer.interval(*given)
        sides = [(slopes, layer.conjugate(slopes, given)) for slopes in (layer.slopes(given, choice) for choice in CHOICES)]
        for number in range(500):
            shares = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
            shares = [share.round() for share in shares] if number % 2 else shares
            points = tuple(each.lower + share * each.width for each, share in zip(given, shares, strict=True))
            value = call(*points)
            assert interval.contains(value, 1e-9).all()
            for slopes, offsets in sides:
                assert (layer.push(slopes.lower, points) + offsets.lower <= value + 1e-9).all()
                assert (layer.push(slopes.upper, points) + offsets.upper >= value - 1e-9).all()


def test_rows_are_pushed_one_by_one() -> None:
    for call, shapes in ((Call(torch.mul, BOTH), ((2, 3, 4), (4,))), (MATMUL, ((2, 3, 4), (4, 5)))):
        layer = choose(call)[0](call)
        slopes = layer.slopes(boxes(*shapes), "adaptive").lower
        rows = tuple(torch.randn(7, *shape, dtype=torch.float64) for shape in shapes)
        expected = torch.stack([layer.push(slopes, one) for one in zip(*rows, strict=True)])
        torch.testing.assert_close(layer.push(slopes, rows), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (Call(torch.einsum, ("bi,bi,bi->b", INPUT, Slot(1), Slot(2))), "3 perturbed values"),
        (Call(torch.div, BOTH, {"rounding_mode": "trunc"}), "piecewise constant"),
        (Call(operator.floordiv, BOTH), ""),
        (Call(torch.mul, BOTH, {"out": torch.zeros(2)}), "not supported"),
    ],
)
def test_refusals(call: Call, message: str) -> None:
    rule, reason = choose(call)
    assert rule is None
    assert message in reason


def test_the_interval_of_a_quotient_is_attained_and_knows_poles() -> None:
    (x,), (y,) = boxes((300,), seed=9), boxes((300,), seed=10)
    call = Call(operator.truediv, BOTH)
    found = choose(call)[0](call).interval(x, y)
    pole = (y.lower <= 0) & (y.upper >= 0)
    values = torch.stack([a / b for a in (x.lower, x.upper) for b in (y.lower, y.upper)])
    assert torch.equal(found.lower, torch.where(pole, -INF, values.amin(0)))
    assert torch.equal(found.upper, torch.where(pole, INF, values.amax(0)))


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.gate(x)) * torch.relu(self.value(x)))


class Attention(nn.Module):
    """Scores of tokens of the input, and what they weigh, without the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 2, 2)
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 3**0.5
        return torch.einsum("bij,bjd->bid", scores, self.value(x)).flatten(1)


class Quotient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.over, self.under = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        over, under = self.over(x), 1 + self.under(x).square()
        return over / under + 1 / under - under.__rtruediv__(0.5) - 2.5 / (2 + F.relu(over))


class Hypernetwork(nn.Module):
    """Weights made of the input, a bilinear form, and the fused forms of products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.form = nn.Linear(4, 3), nn.Linear(4, 3), nn.Bilinear(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x)
        row = torch.baddbmm(a[:, None, :], b[:, None, :], (a[:, :, None] * b[:, None, :])).squeeze(1)
        pieces = [self.form(a, b), row, torch.addcmul(a, b, b, value=-0.5), torch.addcdiv(a, b, a.exp())]
        pieces += [torch.lerp(a, b, torch.sigmoid(row)), torch.linalg.cross(a, b)]
        return torch.cat([*pieces, torch.einsum("bi,bi->b", a, a)[:, None]], 1)


NETWORKS = {"gate": Gate, "attention": Attention, "quotient": Quotient, "hypernetwork": Hypernetwork}
METHODS = ("interval", "dual", "adaptive")


def built(name: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return NETWORKS[name]().double(), torch.randn(3, 4, dtype=torch.float64)


@cache
def certified(name: str) -> tuple[autodual.BoundModule, Tensor]:
    """Trace each network once for all radii."""
    model, x = built(name)
    return autodual.certify(model), x


@pytest.mark.parametrize("eps", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_point_leaves_its_bounds(name: str, eps: float) -> None:
    net, x = certified(name)
    region, generator = autodual.LInf(eps), torch.Generator().manual_seed(0)
    with torch.no_grad():
        points = x + eps * (2 * torch.rand(1_000, *x.shape, generator=generator, dtype=x.dtype) - 1)
        points[:500] = x + eps * (points[:500] - x).sign()
        values = net.model(points.flatten(0, 1)).unflatten(0, (1_000, len(x)))
    widths = {}
    for method in METHODS:
        bounds = net.bounds(x, region, method=method)
        assert (bounds.lower <= values.amin(0) + 1e-9).all()
        assert (bounds.upper >= values.amax(0) - 1e-9).all()
        widths[method] = (bounds.width / (values.amax(0) - values.amin(0))).median().item()
    if eps < 0.1:
        assert widths["dual"] < 0.9 * widths["interval"]
        assert widths["adaptive"] < 1.6


@pytest.mark.parametrize("name", NETWORKS)
def test_the_forward_walk_agrees(name: str) -> None:
    model, x = built(name)
    net, region = autodual.certify(model), autodual.LInf(0.05)
    backward, forward = (net.bounds(x, region, method=autodual.Dual(walk=walk)) for walk in ("backward", "forward"))
    torch.testing.assert_close(forward.lower, backward.lower, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(forward.upper, backward.upper, atol=1e-9, rtol=1e-9)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETWORKS)
def test_bounds_are_differentiable_in_the_parameters(name: str, method: str) -> None:
    model, x = built(name)
    net, parameters = autodual.certify(model), list(model.parameters())
    generator = torch.Generator().manual_seed(5)
    towards = [torch.randn(part.shape, generator=generator, dtype=part.dtype) for part in parameters]

    def total() -> Tensor:
        return net.bounds(x, autodual.LInf(0.1), method=method).lower.sum()

    grads = torch.autograd.grad(total(), parameters, allow_unused=True)
    slope = sum((grad * step).sum().item() for grad, step in zip(grads, towards, strict=True) if grad is not None)
    totals = []
    for scale in (1e-6, -2e-6):
        with torch.no_grad():
            for part, step in zip(parameters, towards, strict=True):
                part += scale * step
            totals.append(total().item())
    assert slope == pytest.approx((totals[0] - totals[1]) / 2e-6, rel=1e-4)


def test_single_precision_holds_the_samples_of_double() -> None:
    model, x = built("attention")
    generator = torch.Generator().manual_seed(0)
    values = torch.stack([model(autodual.LInf(0.05).sample(x, generator)) for _ in range(300)])
    for method in METHODS:
        bounds = autodual.certify(model.float()).bounds(x.float(), autodual.LInf(0.05), method=method)
        assert (bounds.lower <= values.amin(0) + 1e-5).all()
        assert (bounds.upper >= values.amax(0) - 1e-5).all()


def test_a_pole_inside_the_region_certifies_nothing() -> None:
    class Inverse(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1 / x

    x, y = torch.tensor([[0.05, 3.0], [1.0, 3.0]]), torch.tensor([0, 0])
    report = autodual.certify(Inverse()).verify(x, y, autodual.LInf(0.1))
    assert report.certified.tolist() == [False, True]
