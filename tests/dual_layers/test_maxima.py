"""Maxima: planes against corners, linear programs and points; pooling windows against PyTorch's; whole networks."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linprog
from torch import Tensor, nn

import autodual
from autodual import LInf
from autodual.errors import TraceError, UnsupportedOperatorError
from dual_layers import INPUT, Call, Interval, Slopes, Slot, choose
from dual_layers.largest import DualLargest, largest, largest_of
from dual_layers.max_pooling import windows

CHOICES = ("parallel", "adaptive")
METHODS = [
    "interval",
    "dual",
    "adaptive",
    autodual.Dual(walk="forward"),
    autodual.Dual(strict=True),
    autodual.Adaptive(strict=True),
]


def uniform(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1


def drawn(count: int, n: int, seed: int) -> Interval:
    """Boxes of n elements: ordinary, narrow, degenerate, apart, and with ends in common."""
    center, radius = 3 * uniform(count, n, seed=seed), 2 * uniform(count, n, seed=seed + 1).abs()
    kind = torch.arange(count)[:, None] % 6
    radius = torch.where(kind == 1, 1e-6 * radius, radius)
    radius = torch.where((kind == 2) & (uniform(count, n, seed=seed + 2) > 0), 0.0, radius)
    center = torch.where(kind == 3, 10 * center, center)
    lower, upper = center - radius, center + radius
    lower = torch.where(kind == 4, lower.round(), lower)
    return Interval(lower, torch.where(kind == 4, torch.maximum(upper.round(), lower), upper))


def layer(at: Tensor | int, *, evidence: bool = False, distinct: Tensor | None = None) -> DualLargest:
    at = torch.as_tensor(at)
    at = at[None] if at.ndim == 0 else at
    return DualLargest(Call(largest, (INPUT, at, Slot(1) if evidence else None, distinct)))


def planes(rule: DualLargest, boxes: tuple[Interval, ...], seed: int = 9) -> list[tuple[str, Slopes]]:
    shape = tuple(boxes[0].lower.shape)
    one, other = (uniform(*shape, seed=seed),), (1.5 * uniform(*shape, seed=seed + 1),)
    own = [(choice, rule.slopes(boxes, choice)) for choice in CHOICES]
    return [*own, ("random", Slopes(one, other)), ("random parallel", Slopes(one, one))]


def lowest(slope: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> float:
    """Minimise ``max_j z_j - slope . z`` over a box: a linear program in z and the maximum."""
    n = len(slope)
    above = np.hstack([np.eye(n), -np.ones((n, 1))])
    bounds = [*zip(lower, upper, strict=True), (None, None)]
    return linprog(np.append(-slope, 1.0), A_ub=above, b_ub=np.zeros(n), bounds=bounds).fun


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_offsets_are_exact_over_a_box(n: int) -> None:
    box = drawn(36, n, seed=n)
    rule = layer(n // 2)
    corners = torch.stack([torch.where(torch.tensor(c), box.upper, box.lower) for c in product([False, True], repeat=n)])
    for name, slopes in planes(rule, (box,)):
        offsets = rule.conjugate(slopes, (box,))
        highest = (corners.amax(-1) - (slopes.upper[0] * corners).sum(-1)).amax(0)
        torch.testing.assert_close(offsets.upper, highest, atol=1e-9, rtol=1e-9, msg=name)
        for i in range(len(box.lower)):
            found = lowest(slopes.lower[0][i].numpy(), box.lower[i].numpy(), box.upper[i].numpy())
            assert offsets.lower[i].item() == pytest.approx(found, abs=1e-7), name


@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_own_planes_are_better_than_random_ones(n: int) -> None:
    box, rule = drawn(60, n, seed=20 + n), layer(0)
    parallel, adaptive = (rule.slopes((box,), choice) for choice in CHOICES)
    offsets = rule.conjugate(parallel, (box,))
    gap = offsets.upper - offsets.lower
    offsets = rule.conjugate(adaptive, (box,))
    above = offsets.upper + (adaptive.upper[0] * box.center).sum(-1)
    below = offsets.lower + (adaptive.lower[0] * box.center).sum(-1)
    torch.testing.assert_close(below, box.center.amax(-1), atol=1e-9, rtol=0)
    for seed in range(300):
        other = uniform(60, n, seed=seed).abs()
        other = other / other.sum(-1, keepdim=True) * (1 if seed % 2 else 2 * seed / 300)
        offsets = rule.conjugate(Slopes((other,), (other,)), (box,))
        assert (gap <= offsets.upper - offsets.lower + 1e-9).all()
        assert (above <= offsets.upper + (other * box.center).sum(-1) + 1e-9).all()


def test_two_elements_have_the_chord_of_relu() -> None:
    box = drawn(30, 2, seed=3)
    slope = layer(0).slopes((box,), "parallel").lower[0]
    low, high = box.lower[:, 0] - box.upper[:, 1], box.upper[:, 0] - box.lower[:, 1]
    crossing = (low < 0) & (high > 0)
    torch.testing.assert_close(slope[crossing, 0], (high / (high - low))[crossing])
    torch.testing.assert_close(slope.sum(-1), torch.ones(30, dtype=torch.float64))


def correlated(count: int, n: int, sources: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Elements that are affine in a few sources in [-1, 1]: matrices, centres, and points ``[count, points, n]``."""
    matrix, center = uniform(count, n, sources, seed=seed), 0.5 * uniform(count, n, seed=seed + 1)
    matrix = matrix + 2 * uniform(count, 1, sources, seed=seed + 2)  # what all elements share
    s = uniform(count, 4000, sources, seed=seed + 3)
    s = torch.where(torch.arange(4000)[:, None] % 2 == 0, s.sign(), s)
    return matrix, center, center[:, None] + s @ matrix.mT


@pytest.mark.parametrize("n", [2, 4, 9])
def test_differences_tighten_planes_and_keep_them_true(n: int) -> None:
    matrix, center, points = correlated(40, n, 4, seed=n)
    at = center.argmax(-1, keepdim=True)
    radius, apart = matrix.abs().sum(-1), matrix - matrix.gather(1, at[..., None].expand(-1, -1, 4))
    middle, width = center - center.gather(1, at), apart.abs().sum(-1)
    box, behind = Interval(center - radius, center + radius), Interval(middle - width, middle + width)
    values = points.amax(-1)
    plain, helped = layer(at), layer(at, evidence=True)
    for name, slopes in planes(helped, (box, behind)):
        offsets, looser = helped.conjugate(slopes, (box, behind)), plain.conjugate(slopes, (box,))
        rest = [values - (side[0][:, None] * points).sum(-1) for side in (slopes.lower, slopes.upper)]
        assert (rest[0].amin(1) >= offsets.lower - 1e-9).all(), name
        assert (rest[1].amax(1) <= offsets.upper + 1e-9).all(), name
        assert (offsets.lower >= looser.lower - 1e-9).all()
        assert (offsets.upper <= looser.upper + 1e-9).all()
    gaps = [rule.conjugate(rule.slopes(boxes, "parallel"), boxes) for rule, boxes in ((plain, (box,)), (helped, (box, behind)))]
    ratio = (gaps[1].upper - gaps[1].lower) / (gaps[0].upper - gaps[0].lower)
    assert ratio.median() < 0.8
    assert ratio.max() <= 1 + 1e-9


def test_a_difference_that_is_never_positive_decides() -> None:
    box = Interval(torch.tensor([[0.0, 0.0, -9.0]]).double(), torch.tensor([[5.0, 4.0, 9.0]]).double())
    behind = Interval(torch.tensor([[0.0, -3.0, -2.0]]).double(), torch.tensor([[0.0, -1.0, 0.0]]).double())
    rule = layer(0, evidence=True)
    assert not rule.undecided((box, behind)).any()
    assert layer(0).undecided((box,)).all()
    for choice in CHOICES:
        slopes = rule.slopes((box, behind), choice)
        offsets = rule.conjugate(slopes, (box, behind))
        assert slopes.upper[0].tolist() == [[1, 0, 0]]
        assert (offsets.lower.item(), offsets.upper.item()) == (0, 0)


def test_ties_between_points_leave_one_to_be_the_largest() -> None:
    point = torch.tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]]).double()
    for at in range(3):
        rule, boxes = layer(at), (Interval(point, point),)
        for choice in CHOICES:
            slopes = rule.slopes(boxes, choice)
            offsets = rule.conjugate(slopes, boxes)
            for side, offset in ((slopes.lower, offsets.lower), (slopes.upper, offsets.upper)):
                torch.testing.assert_close((side[0] * point).sum(-1) + offset, point.amax(-1))


def test_repeated_elements_do_not_count_twice() -> None:
    box = Interval(torch.tensor([[0.0, 0.0, 0.0, 0.0]]).double(), torch.tensor([[3.0, 2.0, 3.0, 3.0]]).double())
    distinct = torch.tensor([True, True, False, False])
    slopes = layer(0, distinct=distinct).slopes((box,), "adaptive")
    pair = layer(0).slopes((Interval(box.lower[:, :2], box.upper[:, :2]),), "adaptive")
    torch.testing.assert_close(slopes.upper[0][:, :2], pair.upper[0])
    assert (slopes.upper[0][:, 2:] == 0).all()


def test_unbounded_and_unknown_boxes_give_true_planes_without_nan(dtype: torch.dtype) -> None:
    inf, nan = torch.inf, torch.nan
    rows = [
        ((0, inf), (0, 1), (0, 2)),
        ((-inf, 1), (0, 2), (0, 3)),
        ((-inf, 1), (-inf, 2), (-inf, 3)),
        ((0, inf), (0, inf), (0, inf)),
        ((nan, nan), (0, 1), (0, 2)),
        ((-inf, -inf), (0, 1), (1, 2)),
        ((-inf, inf), (-inf, inf), (-inf, inf)),
    ]
    ends = torch.tensor(rows, dtype=dtype)
    box = Interval(ends[..., 0], ends[..., 1])
    inside = Interval(box.lower.nan_to_num(nan=-900, neginf=-900), box.upper.nan_to_num(nan=900, posinf=900, neginf=-900))
    points = inside.lower + inside.width * (0.5 + 0.5 * uniform(500, 7, 3)).to(dtype)
    for at in range(3):
        rule = layer(at)
        for name, slopes in planes(rule, (box,)):
            lower, upper = ((side[0].to(dtype),) for side in (slopes.lower, slopes.upper))
            offsets = rule.conjugate(Slopes(lower, upper), (box,))
            assert not offsets.lower.isnan().any(), name
            assert not offsets.upper.isnan().any(), name
            tolerance = 1e-9 if dtype == torch.float64 else 1e-2
            assert (points.amax(-1) >= (lower[0] * points).sum(-1) + offsets.lower - tolerance).all(), name
            assert (points.amax(-1) <= (upper[0] * points).sum(-1) + offsets.upper + tolerance).all(), name
            if name in CHOICES:
                assert lower[0].isfinite().all()
                assert upper[0].isfinite().all()
                assert offsets.upper[[1, 2, 5]].isfinite().all(), name
                assert offsets.lower[[0, 1, 4, 5]].isfinite().all(), name


SETTINGS = [
    (kernel, stride, padding, dilation, ceil)
    for kernel, stride, padding, dilation, ceil in product((1, 2, 3), (None, 1, 2, 3), (0, 1), (1, 2), (False, True))
    if padding <= kernel // 2
]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_windows_are_pytorchs(rank: int) -> None:
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[rank]
    for size in (4, 5, 7) if rank < 3 else (5,):
        x = uniform(2, 3, *range(size, size + rank), seed=size)
        for settings in SETTINGS:
            call = Call(pool, (INPUT, *settings))
            try:
                call(x)
            except RuntimeError:
                continue  # PyTorch finds the image too small
            torch.testing.assert_close(rule_of(call).composed(x), call(x), atol=0, rtol=0)
    shared = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}[rank]
    for count in (1, 2, 3, 5, 9):
        call = Call(shared, (INPUT, count))
        torch.testing.assert_close(rule_of(call).composed(x), call(x), atol=0, rtol=0)


def rule_of(call: Call):
    rule, reason = choose(call)
    assert rule is not None, reason
    return rule(call)


def test_padding_is_never_the_largest() -> None:
    x = -5 - uniform(1, 1, 4, 4).abs()
    call = Call(F.max_pool2d, (INPUT, 3, 2, 1))
    pooled = rule_of(call).composed(x)
    assert (pooled < 0).all()
    wide = windows(x, (((0, 1), (1, 2)), ((0, 1), (1, 1))))
    assert wide.shape == (1, 1, 2, 2, 4)
    assert largest_of(wide).shape == (1, 1, 2, 2)
    with pytest.raises(ValueError, match="nothing but padding"):
        rule_of(Call(F.max_pool1d, (INPUT, 2, 1, 2, 4))).composed(uniform(1, 1, 1))


class After(nn.Module):
    """A function of an affine layer's outputs, brought to a shape, between two affine layers."""

    def __init__(self, function, features: int, shape: tuple[int, ...] | None = None, last: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(features)
        self.first, self.function, self.shape = nn.Linear(4, features), function, shape
        self.last = nn.Linear(last, 2) if last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h if self.shape is None else h.unflatten(1, self.shape)
        return self.last(self.function(h).flatten(1))


MODELS = {
    "amax": (lambda h: h.amax(1, keepdim=True), 6),
    "amin over two axes": (lambda h: h.amin((1, -1)), 24, (3, 4, 2)),
    "max, item 0": (lambda h: h.max(2, True)[0], 12, (3, 4)),
    "torch.max, values": (lambda h: torch.max(h, dim=1).values, 12, (3, 4)),
    "min, both items": (lambda h: (lambda pair: pair[0])(torch.min(h, -1)), 12, (3, 4)),
    "maximum": (lambda h: torch.maximum(h[:, :3], h[:, 3:]), 6, None, 3),
    "minimum that broadcasts": (lambda h: torch.min(h[:, :1], h[:, 1:]), 6, None, 5),
    "fmax of three": (lambda h: torch.fmax(torch.fmax(h[:, :2], h[:, 2:4]), h[:, 4:]), 6, None, 2),
    "clamp": (lambda h: h[:, :2].clamp(h[:, 2:4], h[:, 4:]), 6, None, 2),
    "clamp_min": (lambda h: torch.clamp_min(h[:, :3], h[:, 3:]), 6, None, 3),
    "MaxPool1d": (nn.MaxPool1d(3, 2, 1), 12, (2, 6), 6),
    "MaxPool2d": (nn.MaxPool2d(2), 32, (2, 4, 4), 8),
    "MaxPool2d, overlapping": (nn.MaxPool2d(3, 2, 1, ceil_mode=True), 32, (2, 4, 4), 18),
    "MaxPool3d": (nn.MaxPool3d((1, 2, 2), 1), 24, (1, 2, 3, 4), 12),
    "pooling to the size": (lambda h: F.max_pool2d(h, h.size()[2:]), 32, (2, 4, 4)),
    "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d((3, 2)), 32, (2, 4, 4), 12),
    "pool, then relu": (lambda h: F.relu(F.max_pool2d(h, 2)), 32, (2, 4, 4), 8),
    "relu, then pools": (lambda h: F.max_pool2d(F.max_pool2d(F.relu(h), 3, 1), 2), 50, (2, 5, 5), 2),
    "margin": (lambda h: h[:, :1] - h[:, 1:].amax(1, keepdim=True), 6),
    "maxout": (lambda h: F.relu(h.amax(1)), 12, (3, 4), 4),
}


def sampled(model: nn.Module, x: Tensor, eps: float, count: int = 3000) -> Tensor:
    """Outputs at random points and corners of every example's box, ``[batch, points, outputs]``."""
    moves = 2 * torch.rand(len(x), count, x.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1
    moves[:, ::2] = moves[:, ::2].sign()
    with torch.no_grad():
        return model((x[:, None] + eps * moves.to(x.dtype)).flatten(0, 1)).reshape(len(x), count, -1)


EXPORTED = ["max, item 0", "maximum", "clamp", "MaxPool2d, overlapping", "AdaptiveMaxPool2d"]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("name", "example"), [*((name, False) for name in MODELS), *((name, True) for name in EXPORTED)])
def test_bounds_of_networks_hold_and_are_useful(name: str, example: bool) -> None:
    model, x = After(*MODELS[name]).double(), uniform(3, 4, seed=5)
    net = autodual.certify(model, example_input=x if example else None)
    for eps in (0.05, 0.5):
        values = sampled(model, x, eps)
        for method in METHODS if eps > 0.1 else METHODS[:3]:
            bounds = net.bounds(x, LInf(eps), method=method)
            assert (values <= bounds.upper[:, None] + 1e-9).all(), (method, eps)
            assert (values >= bounds.lower[:, None] - 1e-9).all(), (method, eps)
            if method in ("dual", "adaptive"):
                loss = (bounds.upper - bounds.lower).mean() / (values.amax(1) - values.amin(1)).mean()
                assert loss < (1.4 if eps < 0.1 else 3.5), (method, eps)
    exact = net.bounds(x, LInf(0.0))
    torch.testing.assert_close(exact.lower, model(x), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(exact.upper, model(x), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["MaxPool2d, overlapping", "relu, then pools", "maxout", "clamp"])
def test_interval_bounds_take_the_ends(name: str) -> None:
    function, features, shape, *_ = MODELS[name]
    model = After(function, features, shape).double()
    x = uniform(3, 4, seed=6)
    bounds = autodual.certify(model).bounds(x, LInf(0.3), method="interval")
    hull, radius = model.first(x), 0.3 * model.first.weight.abs().sum(1)
    ends = [(hull + sign * radius) if shape is None else (hull + sign * radius).unflatten(1, shape) for sign in (-1, 1)]
    if name == "clamp":  # increasing in all three, each of which is an input of its own here
        assert (bounds.lower <= function(ends[0]) + 1e-9).all()
    torch.testing.assert_close(bounds.lower, function(ends[0]).flatten(1), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(bounds.upper, function(ends[1]).flatten(1), atol=1e-9, rtol=1e-9)


def test_what_all_elements_share_cancels() -> None:
    """Slopes that sum to one follow it: the largest of shifted elements less the shift depends on the elements alone."""

    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            shift = 50 * x[:, 3:]
            return (x[:, :3] + shift).amax(1, keepdim=True) - shift

    x = torch.tensor([[0.1, 0.0, -0.1, 0.3]], dtype=torch.float64)
    bounds = autodual.certify(Shifted()).bounds(x, LInf(0.2), method="dual")
    assert (bounds.upper - bounds.lower).item() < 0.7
    assert bounds.lower.item() <= -0.1 + 1e-9
    assert bounds.upper.item() >= 0.3 - 1e-9


def test_decided_windows_are_affine() -> None:
    """Boxes of neighbours overlap, their differences do not reach zero: then the bounds are exact."""

    class Ramp(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sequence = x + torch.arange(6.0, dtype=x.dtype)  # what x adds is the same everywhere
            return F.max_pool1d(sequence[:, None], 3, 1).sum(-1)

    x = torch.tensor([[0.25]], dtype=torch.float64)
    for method in ("dual", "adaptive"):
        bounds = autodual.certify(Ramp()).bounds(x, LInf(3.0), method=method)
        torch.testing.assert_close(bounds.lower, torch.tensor([[4 * (0.25 - 3) + 14]]).double())
        torch.testing.assert_close(bounds.upper, torch.tensor([[4 * (0.25 + 3) + 14]]).double())


@pytest.mark.parametrize("method", ["interval", "dual", "adaptive"])
def test_examples_of_a_batch_do_not_meet(method: str) -> None:
    model, x = After(*MODELS["relu, then pools"]).double(), uniform(5, 4, seed=8)
    net = autodual.certify(model)
    together = net.bounds(x, LInf(0.2), method=method)
    for i in range(5):
        alone = net.bounds(x[i : i + 1], LInf(0.2), method=method)
        torch.testing.assert_close(together.lower[i], alone.lower[0], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(together.upper[i], alone.upper[0], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", ["dual", "adaptive"])
def test_bounds_are_differentiable_in_the_parameters(method: str) -> None:
    model, x = After(*MODELS["MaxPool2d, overlapping"]).double(), uniform(2, 4, seed=9)
    net, weight = autodual.certify(model), model.first.weight
    direction, step = uniform(*weight.shape, seed=10), 1e-6
    (gradient,) = torch.autograd.grad(net.bounds(x, LInf(0.1), method=method).lower.sum(), weight)
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * direction
            found.append(net.bounds(x, LInf(0.1), method=method).lower.sum())
            weight -= sign * step * direction
    assert (gradient * direction).sum().item() == pytest.approx(((found[0] - found[1]) / (2 * step)).item(), rel=1e-3, abs=1e-5)


def test_float32_bounds_hold() -> None:
    model, x = After(*MODELS["relu, then pools"]), uniform(3, 4, seed=11).float()
    values = sampled(model, x, 0.2)
    for method in METHODS:
        bounds = autodual.certify(model).bounds(x, LInf(0.2), method=method)
        assert (values <= bounds.upper[:, None] + 1e-5).all()
        assert (values >= bounds.lower[:, None] - 1e-5).all()


JUMPS = "the positions of the largest elements jump"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda h: h.max(1)[1].to(h.dtype)[:, None], JUMPS),
        (lambda h: h.max(1, keepdim=True).indices.to(h.dtype), JUMPS),
        (
            lambda h: F.max_pool1d(h[:, None], 2, return_indices=True)[1].to(h.dtype),
            "the positions of the largest elements jump",
        ),
        (nn.Sequential(nn.Unflatten(1, (1, 6)), nn.MaxPool1d(2, return_indices=True)), "leave out return_indices"),
        (lambda h: h / h.max(), "name its axes"),
    ],
)
def test_what_has_no_bounds_is_refused_with_a_reason(function, message: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=message):
        autodual.certify(After(function, 6)).bounds(uniform(2, 4).float(), LInf(0.1))


def test_a_maximum_over_the_batch_is_refused() -> None:
    with pytest.raises(TraceError, match="batch"):
        autodual.certify(After(lambda h: h - h.amax(0, keepdim=True), 6)).bounds(uniform(2, 4).float(), LInf(0.1))
