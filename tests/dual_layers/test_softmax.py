"""Logsumexp, softmax and averages against brute force: corners, dense searches, linear programs; awkward boxes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autodual
from dual_layers import INPUT, Call, Interval, Slopes, Slot, lookup
from dual_layers.attention import DualAverage, average
from dual_layers.joint_product import DualJointProduct, joint_product
from dual_layers.logsumexp import DualLogSumExp, others
from dual_layers.softmax import DualLogSoftmax, DualSoftmax

SUM = DualLogSumExp(Call(torch.logsumexp, (INPUT, -1)))
CHOICES = ("parallel", "adaptive")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_box(count: int, terms: int, radius: float, seed: int = 0) -> Interval:
    rng = generator(seed)
    center = 2 * torch.randn(count, terms, generator=rng, dtype=torch.float64)
    reach = radius * (0.2 + torch.rand(count, terms, generator=rng, dtype=torch.float64))
    return Interval(center - reach, center + reach)


def corners(box: Interval) -> Tensor:
    """All corners, ``[corners, ..., terms]``."""
    which = torch.tensor(list(itertools.product([False, True], repeat=box.lower.shape[-1])))
    return torch.where(which.reshape(len(which), *[1] * (box.lower.ndim - 1), -1), box.upper, box.lower)


def lowest(box: Interval, slope: Tensor) -> Tensor:
    """The minimum of ``logsumexp(z) - slope . z``, convex in ``z``: coordinate by coordinate until nothing moves."""
    z = 0.5 * (box.lower + box.upper)
    for _ in range(300):
        for j in range(z.shape[-1]):
            rest = torch.logsumexp(torch.cat([z[:, :j], z[:, j + 1 :]], 1), 1)
            rate = slope[:, j]
            best = torch.where(rate >= 1, torch.inf, rest + torch.logit(rate.clamp(1e-300, 1 - 1e-15)))
            z[:, j] = torch.minimum(torch.maximum(torch.where(rate <= 0, -torch.inf, best), box.lower[:, j]), box.upper[:, j])
    return torch.logsumexp(z, 1) - (slope * z).sum(1)


def slopes_to_try(box: Interval, seed: int) -> dict[str, Tensor]:
    rng = generator(seed)
    shape = box.lower.shape
    return {
        "own": SUM.slopes((box,), "parallel").lower[0],
        "shares": torch.softmax(torch.randn(shape, generator=rng, dtype=torch.float64), -1),
        "signed": torch.randn(shape, generator=rng, dtype=torch.float64),
        "steep": 1 + torch.rand(shape, generator=rng, dtype=torch.float64),
    }


@pytest.mark.thinned(2)
@pytest.mark.parametrize("radius", [1e-3, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("terms", [1, 2, 3, 6])
def test_offsets_of_logsumexp_are_the_best_ones(terms: int, radius: float) -> None:
    box = random_box(20, terms, radius)
    for name, slope in slopes_to_try(box, terms).items():
        found = SUM.conjugate(Slopes((slope,), (slope,)), (box,))
        z = corners(box)
        highest = (torch.logsumexp(z, -1) - (slope * z).sum(-1)).amax(0)
        least = lowest(box, slope) if terms > 1 else torch.minimum(*((1 - slope) * end for end in (box.lower, box.upper)))[:, 0]
        size = 1 + highest.abs() + least.abs()
        gap = highest - least
        assert (found.lower <= least + 1e-13 * size).all(), name
        assert (found.upper >= highest - 1e-13 * size).all(), name
        assert (found.lower >= least - 1e-3 * gap - 1e-12 * size).all(), name
        assert (found.upper <= highest + (1e-3 if terms <= 3 else 0.2) * gap + 1e-12 * size).all(), name


@pytest.mark.parametrize("terms", [2, 5, 40])
def test_parallel_slopes_leave_hardly_more_than_they_must(terms: int) -> None:
    """None of many other slopes, tangents at random points, has a much smaller gap."""
    for radius in (0.05, 0.5, 3.0):
        box = random_box(50, terms, radius)
        slopes = SUM.slopes((box,), "parallel")
        offsets = SUM.conjugate(slopes, (box,))
        slope, center = slopes.lower[0], box.center
        rivals = [torch.softmax(center, -1)]
        for seed in range(20):
            moved = center + radius * torch.randn(center.shape, generator=generator(seed), dtype=torch.float64)
            rivals.append(torch.softmax(moved, -1))
        for rival in rivals:
            other = SUM.conjugate(Slopes((rival,), (rival,)), (box,))
            ratio = (offsets.upper - offsets.lower) / (other.upper - other.lower)
            assert ratio.max() < 1.4
            assert ratio.median() < 1.02
        assert slope.sum(-1).allclose(torch.ones(50, dtype=torch.float64))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lines_of_logsumexp_hold_far_from_zero(choice: str, dtype: torch.dtype) -> None:
    rng = generator(3)
    for scale in (1e-6, 1.0, 1e2, 1e4, 1e6):
        center = scale * torch.randn(40, 7, generator=rng).to(dtype)
        reach = scale * 10 ** (-6 * torch.rand(40, 7, generator=rng)).to(dtype)
        box = Interval(center - reach, center + reach)
        slopes = SUM.slopes((box,), choice)
        offsets = SUM.conjugate(slopes, (box,))
        for _ in range(30):
            share = torch.rand(40, 7, generator=rng).round(decimals=1).to(dtype)
            z = torch.minimum(torch.maximum(box.lower + share * box.width, box.lower), box.upper).double()
            value = torch.logsumexp(z, -1)
            size = 64 * torch.finfo(dtype).eps * (1 + value.abs() + z.abs().amax(-1))
            assert (offsets.lower.double() + (slopes.lower[0].double() * z).sum(-1) <= value + size).all()
            assert (offsets.upper.double() + (slopes.upper[0].double() * z).sum(-1) >= value - size).all()


def test_unbounded_and_unknown_summands() -> None:
    inf, nan = torch.inf, torch.nan
    lower = torch.tensor([[0.0, -inf, -inf], [0.0, 1.0, -1.0], [0.0, -inf, 0.0], [nan, 0.0, 0.0], [0.0, 0.0, 0.0]])
    upper = torch.tensor([[1.0, -inf, 0.0], [1.0, inf, 1.0], [1.0, -inf, inf], [1.0, 1.0, 1.0], [nan, 1.0, 1.0]])
    box = Interval(lower.double(), upper.double())
    for choice in CHOICES:
        slopes = SUM.slopes((box,), choice)
        offsets = SUM.conjugate(slopes, (box,))
        assert not offsets.lower.isnan().any()
        assert not offsets.upper.isnan().any()
        assert offsets.upper.isinf().tolist() == [False, True, True, False, True]
        assert (offsets.lower > -inf).tolist() == [True, True, True, True, True]
        points = torch.tensor([[0.3, -inf, -7.0], [0.2, 50.0, 0.0], [0.5, -inf, 3.0], [-9.0, 0.5, 0.5], [30.0, 0.5, 0.5]])
        value = torch.logsumexp(points.double(), -1)
        assert (offsets.lower + SUM.push(slopes.lower, (points.double(),)) <= value + 1e-12).all()
        assert (offsets.upper + SUM.push(slopes.upper, (points.double(),)) >= value - 1e-12).all()
    steep = torch.full_like(box.lower, 0.5)
    offsets = SUM.conjugate(Slopes((steep,), (steep,)), (box,))
    assert (offsets.lower == -inf).all()
    assert (offsets.upper == inf).all()
    ends = SUM.interval(box)
    assert not ends.lower.isnan().any()
    assert not ends.upper.isnan().any()


def test_others_leaves_out_each_element_in_turn() -> None:
    z = torch.tensor([[0.0, 800.0, -3.0], [5.0, 5.0, 5.0], [1e-3, -900.0, -901.0]], dtype=torch.float64)
    expected = torch.stack([torch.logsumexp(z[:, [k for k in range(3) if k != j]], 1) for j in range(3)], 1)
    torch.testing.assert_close(others(z), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("rule", [DualSoftmax, DualLogSoftmax])
@pytest.mark.parametrize("radius", [0.01, 1.0, 300.0])
def test_intervals_of_softmax_are_exact(rule: type, radius: float) -> None:
    operator = torch.softmax if rule is DualSoftmax else torch.log_softmax
    box = random_box(10, 5, radius)
    values = operator(corners(box), -1)
    ends = rule(Call(operator, (INPUT, -1))).interval(box)
    torch.testing.assert_close(ends.lower, values.amin(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ends.upper, values.amax(0), rtol=1e-12, atol=1e-14)


def test_probabilities_stay_probabilities_whatever_the_box() -> None:
    inf = torch.inf
    box = Interval(
        torch.tensor([[-inf, -inf, torch.nan], [-1e30, 3.0, 3.0]]), torch.tensor([[inf, 2.0, 1.0], [1e30, 3.0, inf]])
    )
    ends = DualSoftmax(Call(torch.softmax, (INPUT, 1))).interval(box)
    assert (ends.lower >= 0).all()
    assert (ends.upper <= 1).all()
    assert ends.upper[0].tolist() == [1.0, 1.0, 1.0]
    odds = DualLogSoftmax(Call(torch.log_softmax, (INPUT, 1))).interval(box)
    assert (odds.lower[0] == -inf).all()
    assert (odds.upper <= 0).all()


class Head(nn.Module):
    """Class scores; ``end`` says what becomes of them."""

    def __init__(self, end, classes: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.first, self.second = nn.Linear(6, 16), nn.Linear(16, classes)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.second(torch.relu(self.first(x))))


X = torch.randn(3, 6, generator=generator(1), dtype=torch.float64)
ENDS = {
    "softmax": lambda z: F.softmax(z, dim=-1),
    "log_softmax": lambda z: F.log_softmax(z, 1),
    "softmin": lambda z: F.softmin(z, dim=1),
    "logsumexp": lambda z: torch.logsumexp(z, 1, keepdim=True),
    "logaddexp": lambda z: torch.logaddexp(z[:, :2], z[:, 2:]),
    "glu": lambda z: F.glu(z, 1),
    "temperature": lambda z: (z / 0.1).softmax(1),
    "masked": lambda z: z.masked_fill(torch.tensor([False, True, False, False]), -torch.inf).softmax(-1)[:, [0, 2, 3]],
    "entropy": lambda z: -(F.softmax(z, 1) * F.log_softmax(z, 1)).sum(1, keepdim=True),
}


@pytest.mark.parametrize("eps", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize("end", ENDS)
def test_no_point_leaves_its_bounds(end: str, eps: float) -> None:
    model, region = Head(ENDS[end]).double(), autodual.LInf(eps)
    net, rng = autodual.certify(model), generator(2)
    with torch.no_grad():
        moves = torch.rand(2_000, *X.shape, generator=rng, dtype=torch.float64) * 2 - 1
        moves[1_000:] = moves[1_000:].sign()
        values = model((X + eps * moves).flatten(0, 1)).unflatten(0, (2_000, 3))
        lowest, highest = values.amin(0), values.amax(0)
        widths = {}
        for method in ("interval", "dual", "adaptive"):
            bounds = net.bounds(X, region, method=method)
            assert bounds.lower.isfinite().all()
            assert bounds.upper.isfinite().all()
            assert (bounds.lower <= lowest + 1e-9).all(), method
            assert (bounds.upper >= highest - 1e-9).all(), method
            widths[method] = (bounds.width / (highest - lowest)).median().item()
        if eps == 0.05 and end != "entropy":
            assert widths["dual"] < 1.6
            assert widths["adaptive"] < 1.6


def test_log_odds_keep_no_trace_of_the_softmax() -> None:
    """The common term cancels on the way back: margins of log-probabilities are those of the scores."""
    scores, logs = (autodual.certify(Head(end).double()) for end in (lambda z: z, ENDS["log_softmax"]))
    for method in ("dual", "adaptive"):
        plain, found = (net.margins(X, [0, 1, 2], autodual.LInf(0.1), method=method) for net in (scores, logs))
        torch.testing.assert_close(found, plain, atol=1e-9, rtol=1e-9)
    assert scores.verify(X, [0, 1, 2], autodual.LInf(0.01)).verdict == logs.verify(X, [0, 1, 2], autodual.LInf(0.01)).verdict


@pytest.mark.parametrize("end", ["softmax", "log_softmax"])
def test_the_forward_walk_agrees(end: str) -> None:
    net = autodual.certify(Head(ENDS[end]).double())
    for eps in (0.05, 0.5):
        backward, forward = (
            net.bounds(X, autodual.LInf(eps), method=autodual.Dual(walk=walk)) for walk in ("backward", "forward")
        )
        torch.testing.assert_close(forward.lower, backward.lower, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(forward.upper, backward.upper, atol=1e-9, rtol=1e-9)


def test_losses_of_fixed_targets() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Head(lambda z: z)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(x), y, reduction="none", label_smoothing=0.1)[:, None]

    model, y = Loss().double(), torch.tensor([1, 3, 0])
    net, region = autodual.certify(model), autodual.LInf(0.1)
    bounds = net.bounds({"x": X, "y": y}, {"x": region})
    rng = generator(4)
    for _ in range(300):
        value = model(region.sample(X, rng), y)
        assert (bounds.lower <= value + 1e-9).all()
        assert (bounds.upper >= value - 1e-9).all()


def test_averages_are_those_of_a_linear_program() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = generator(6)
    weights = torch.softmax(torch.randn(1, 4, generator=rng, dtype=torch.float64), -1)
    reach = 0.3 * torch.rand(1, 4, generator=rng, dtype=torch.float64)
    box = Interval((weights - reach).clamp(min=0), (weights + reach).clamp(max=1))
    values = torch.randn(4, 3, generator=rng, dtype=torch.float64)
    moved = Interval(values - 0.1, values + 0.2)
    ends = DualAverage(Call(average, (INPUT, Slot(1)))).interval(box, moved)
    limits = list(zip(box.lower[0].tolist(), box.upper[0].tolist(), strict=True))
    for feature in range(3):
        for end, value, side in ((ends.lower, moved.lower, 1), (ends.upper, moved.upper, -1)):
            best = optimize.linprog(side * value[:, feature].numpy(), A_eq=torch.ones(1, 4).numpy(), b_eq=[1], bounds=limits)
            assert end[0, feature].item() == pytest.approx(side * best.fun, abs=1e-9)


def test_averages_of_unbounded_values() -> None:
    inf = torch.inf
    weights = Interval(torch.tensor([[0.0, 0.2]]), torch.tensor([[0.0, 1.0]]))
    values = Interval(torch.tensor([[-inf], [1.0]]), torch.tensor([[inf], [2.0]]))
    ends = DualAverage(Call(average, (INPUT, Slot(1)))).interval(weights, values)
    assert ends.upper.item() == pytest.approx(2.0, rel=1e-5)
    unknown = Interval(weights.lower * torch.nan, weights.upper * torch.nan)
    assert DualAverage(Call(average, (INPUT, Slot(1)))).interval(unknown, values).upper.item() == inf


@pytest.mark.parametrize("choice", CHOICES)
def test_joint_products_hold_where_sum_and_difference_do(choice: str) -> None:
    """Factors that move together, in boxes of their own and of their sum and difference, found by sampling."""
    rng = generator(7)
    mix = torch.randn(2, 30, 6, generator=rng, dtype=torch.float64)
    noise = 2 * torch.rand(4_000, 6, generator=rng, dtype=torch.float64) - 1
    noise[2_000:] = noise[2_000:].sign()
    x, y = (torch.einsum("fk,nk->nf", part, noise) + 2 * part[:, 0] for part in mix)
    ratio = 0.5 + torch.rand(30, generator=rng, dtype=torch.float64)
    plus, minus = x + ratio * y, x - ratio * y
    boxes = tuple(Interval(part.amin(0)[None], part.amax(0)[None]) for part in (x, y, plus, minus))
    layer = DualJointProduct(Call(joint_product, (INPUT, Slot(1), Slot(2), Slot(3)), {"ratio": ratio}))
    plain = DualJointProduct(Call(joint_product, (INPUT, Slot(1))))
    slopes = layer.slopes(boxes, choice)
    random = tuple(torch.randn(1, 30, generator=rng, dtype=torch.float64) for _ in range(2))
    for tried in (slopes, Slopes(random, random)):
        offsets = layer.conjugate(tried, boxes)
        assert (offsets.lower + layer.push(tried.lower, (x, y)) <= x * y + 1e-9).all()
        assert (offsets.upper + layer.push(tried.upper, (x, y)) >= x * y - 1e-9).all()
    gaps = [(found.upper - found.lower) for found in (layer.conjugate(slopes, boxes), plain.conjugate(slopes, boxes[:2]))]
    if choice == "parallel":
        assert (gaps[0] <= gaps[1] + 1e-12).all()
        assert (gaps[0] / gaps[1]).median() < 0.8
    unknown = (*boxes[:2], Interval(plus[:1] * torch.nan, plus[:1] + torch.inf), boxes[3])
    offsets = layer.conjugate(slopes, unknown)
    expected = plain.conjugate(slopes, boxes[:2])
    torch.testing.assert_close((offsets.lower, offsets.upper), (expected.lower, expected.upper))


def test_every_spelling_has_its_rule() -> None:
    for operator in (
        F.softmax,
        torch.softmax,
        torch.special.softmax,
        "softmax",
        torch.ops.aten._safe_softmax.default,
        nn.Softmax2d(),
    ):
        assert lookup(operator) is DualSoftmax
    for operator in (
        F.log_softmax,
        torch.log_softmax,
        torch.special.log_softmax,
        "log_softmax",
        torch.ops.aten._log_softmax.default,
    ):
        assert lookup(operator) is DualLogSoftmax
    for module in (nn.Softmax(-1), nn.LogSoftmax(1), nn.Softmin(1), nn.GLU(1)):
        net = autodual.certify(nn.Sequential(nn.Linear(6, 4), module).double())
        assert net.bounds(X, autodual.LInf(0.1)).lower.isfinite().all()
