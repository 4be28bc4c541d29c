"""Comparisons and decisions: steps at their jump, planes against corners and points, whole networks."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

import autodual
from autodual import LInf
from autodual.errors import TraceError, UnsupportedOperatorError
from dual_layers import INPUT, Call, Interval, Slopes, Slot, choose
from dual_layers.comparisons import DualStep, step
from dual_layers.decisions import DualPick, pick

CHOICES = ("parallel", "adaptive")
METHODS = [
    "interval",
    "dual",
    "adaptive",
    autodual.Dual(walk="forward"),
    autodual.Dual(strict=True),
    autodual.Adaptive(strict=True),
]
TRUTH = Slot(0, truth=True)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1


@pytest.mark.parametrize("closed", [False, True])
def test_a_step_holds_on_both_sides_of_its_jump(closed: bool, dtype: torch.dtype) -> None:
    ends = torch.tensor(
        [(-1, 0), (0, 1), (0, 0), (-2, 3), (-0.0, 1), (-3, -1), (1, 2), (-1e-30, 1e-30), (0, 1e-30)], dtype=dtype
    )
    box, rule = Interval(ends[:, 0], ends[:, 1]), DualStep(Call(step, (INPUT, closed)))
    points = torch.stack([*(box.lower + share * box.width for share in torch.linspace(0, 1, 21, dtype=dtype)), box.upper])
    points = torch.cat([points, torch.zeros_like(ends[:, 0]).clamp(box.lower, box.upper)[None]])
    values = step(points, closed)
    found = rule.interval(box)
    assert (found.lower <= values).all()
    assert (found.upper >= values).all()
    assert found.width[[2, 5, 6]].tolist() == [0, 0, 0], "a point and what stays on one side are exact"
    for choice in CHOICES:
        slopes = rule.slopes((box,), choice)
        offsets = rule.conjugate(slopes, (box,))
        assert (slopes.lower[0] * points + offsets.lower <= values + 1e-6).all()
        assert (slopes.upper[0] * points + offsets.upper >= values - 1e-6).all()


def test_a_step_agrees_with_the_comparison_of_neighbouring_numbers(dtype: torch.dtype) -> None:
    one = torch.tensor([1.0, -3.5, 1e-30, 0.0, 1e30], dtype=dtype)
    for other in (one, torch.nextafter(one, one + 1e31), torch.nextafter(one, one - 1e31)):
        assert torch.equal(step(one - other, False), (one > other).to(dtype))
        assert torch.equal(step(one - other, True), (one >= other).to(dtype))


def random_boxes(count: int, seed: int) -> tuple[Interval, Interval, Interval]:
    """Boxes of a condition and of two values: decided or not, ordinary, degenerate, apart."""
    kind = torch.arange(count) % 4
    condition = Interval((kind == 1).double(), (kind != 2).double())
    center, radius = 2 * uniform(2, count, seed=seed), uniform(2, count, seed=seed + 1).abs()
    radius = torch.where(uniform(2, count, seed=seed + 2) > 0.7, 0.0, radius)
    return (
        condition,
        Interval(center[0] - radius[0], center[0] + radius[0]),
        Interval(center[1] - radius[1], center[1] + radius[1]),
    )


def test_offsets_of_decisions_are_exact() -> None:
    boxes = random_boxes(80, seed=1)
    rule = DualPick(Call(pick, (TRUTH, Slot(1), Slot(2))))
    corners = [
        tuple(box.upper if high else box.lower for high, box in zip(corner, boxes, strict=True))
        for corner in product([False, True], repeat=3)
    ]
    values = torch.stack([pick(*corner) for corner in corners])
    random = [tuple(uniform(80, seed=seed + part) for part in range(3)) for seed in (10, 20)]
    own = {choice: rule.slopes(boxes, choice) for choice in CHOICES}
    for name, slopes in (*own.items(), ("random", Slopes(*random))):
        offsets = rule.conjugate(slopes, boxes)
        rest = [
            values - torch.stack([sum(map(torch.mul, side, corner)) for corner in corners])
            for side in (slopes.lower, slopes.upper)
        ]
        torch.testing.assert_close(offsets.lower, rest[0].amin(0), atol=1e-9, rtol=0, msg=name)
        torch.testing.assert_close(offsets.upper, rest[1].amax(0), atol=1e-9, rtol=0, msg=name)
    decided = boxes[0].lower == boxes[0].upper
    assert torch.equal(rule.undecided(boxes), ~decided)
    for slopes in own.values():
        offsets = rule.conjugate(slopes, boxes)
        assert (offsets.upper - offsets.lower)[decided].abs().max() < 1e-9


def test_planes_of_decisions_are_better_than_random_ones() -> None:
    boxes = random_boxes(60, seed=3)
    rule = DualPick(Call(pick, (TRUTH, Slot(1), Slot(2))))
    middle = tuple(box.center for box in boxes)

    def heights(slopes: Slopes) -> tuple[Tensor, Tensor, Tensor]:
        offsets = rule.conjugate(slopes, boxes)
        below, above = (sum(map(torch.mul, side, middle)) for side in (slopes.lower, slopes.upper))
        return offsets.upper - offsets.lower, below + offsets.lower, above + offsets.upper

    gap = heights(rule.slopes(boxes, "parallel"))[0]
    _, below, above = heights(rule.slopes(boxes, "adaptive"))
    for seed in range(400):
        part = tuple(1.5 * uniform(60, seed=1000 + 3 * seed + number) for number in range(3))
        part = (4 * part[0], *part[1:])
        other = heights(Slopes(part, part))
        undecided = boxes[0].lower < boxes[0].upper
        assert (below >= other[1] - 1e-9)[undecided].all()
        assert (above <= other[2] + 1e-9)[undecided].all()
        assert (gap <= 1.35 * other[0] + 1e-9).all(), "a few parallel planes are tried"


def test_the_difference_of_two_values_tightens_a_decision() -> None:
    """Two values that move together, as ``h`` and ``h / 10`` do: points on which they fit stay between the planes."""
    boxes = (Interval(torch.zeros(1), torch.ones(1)), Interval(torch.tensor([-4.0]), torch.tensor([6.0])))
    boxes = (*boxes, Interval(torch.tensor([-3.0]), torch.tensor([5.0])), Interval(torch.tensor([-1.0]), torch.tensor([1.0])))
    plain = DualPick(Call(pick, (TRUTH, Slot(1), Slot(2))))
    helped = DualPick(Call(pick, (TRUTH, Slot(1), Slot(2), Slot(3))))
    a, d = torch.linspace(-4, 6, 101), torch.linspace(-1, 1, 21)
    a, d = (part.flatten() for part in torch.meshgrid(a, d, indexing="ij"))
    inside = (a - d >= -3) & (a - d <= 5)
    a, b = a[inside], (a - d)[inside]
    for choice in CHOICES:
        slopes = helped.slopes(boxes, choice)
        offsets, looser = helped.conjugate(slopes, boxes), plain.conjugate(plain.slopes(boxes[:3], choice), boxes[:3])
        for condition in (torch.zeros_like(a), torch.ones_like(a)):
            value = pick(condition, a, b)
            assert (value >= sum(map(torch.mul, slopes.lower, (condition, a, b))) + offsets.lower - 1e-5).all()
            assert (value <= sum(map(torch.mul, slopes.upper, (condition, a, b))) + offsets.upper + 1e-5).all()
        assert len(slopes.lower) == 3, "the difference is no input of the planes"
        if choice == "parallel":
            assert offsets.upper - offsets.lower <= 1.0 + 1e-6
            assert looser.upper - looser.lower >= 4.0


def test_a_value_without_end_harms_only_where_it_may_be_taken(dtype: torch.dtype) -> None:
    inf = torch.inf
    condition = Interval(torch.tensor([0.0, 1.0, 0.0], dtype=dtype), torch.tensor([0.0, 1.0, 1.0], dtype=dtype))
    a = Interval(torch.full((3,), torch.nan, dtype=dtype), torch.full((3,), inf, dtype=dtype))
    b = Interval(torch.full((3,), -1.0, dtype=dtype), torch.full((3,), 2.0, dtype=dtype))
    rule = DualPick(Call(pick, (TRUTH, Slot(1), Slot(2))))
    found = rule.interval(condition, a, b)
    assert (found.lower.tolist(), found.upper.tolist()) == ([-1, -inf, -inf], [2, inf, inf])
    for choice in CHOICES:
        slopes = rule.slopes((condition, a, b), choice)
        offsets = rule.conjugate(slopes, (condition, a, b))
        assert all(part.isfinite().all() for side in (slopes.lower, slopes.upper) for part in side)
        assert not torch.cat([offsets.lower, offsets.upper]).isnan().any()
        assert (offsets.lower[0], offsets.upper[0]) == (0, 0)
        assert offsets.upper[2] == inf


class After(nn.Module):
    """A function of an affine layer's outputs, with another affine layer behind it."""

    def __init__(self, function, features: int = 6, last: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.function = nn.Linear(4, features), function
        self.last = nn.Linear(last, 2) if last else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def set_masked(h: Tensor) -> Tensor:
    h = h.clone()
    h[h < 0.1] = 0.5
    return h


def set_rows(h: Tensor) -> Tensor:
    h = h.clone()
    h[h[:, 0] > 0] = -1.0
    return h


MODELS = {
    "where": lambda h: torch.where(h > 0, h, 0.1 * h),
    "where of two": lambda h: torch.where(h[:, :3] > h[:, 3:], h[:, :3], -h[:, 3:]),
    "where, numbers": lambda h: torch.where(h >= 0.1, 1.0, -0.5).to(h.dtype) * h,
    "where, one number": lambda h: torch.where(h < 0, h, 0.25),
    "where, constant": lambda h: torch.where(h <= 0, torch.linspace(-1, 1, 6).to(h.dtype), h),
    "where, widened": lambda h: torch.where(h[:, :1] > 0, h, -h),
    "where, untaken branch without bounds": lambda h: torch.where(h > 0.2, 1 / h, h),
    "method where": lambda h: h.where(h > 0, h / 2),
    "gate": lambda h: h * (h > 0),
    "gated by another": lambda h: h[:, :3] * torch.ge(h[:, 3:], 0.1).to(h.dtype),
    "masked_fill": lambda h: h.masked_fill(h < 0, 0.5),
    "masked_fill, not": lambda h: h[:, :3].masked_fill(~(h[:, 3:] > 0), -0.5),
    "reflected": lambda h: h + (h > 0.2).type_as(h),
    "greater": lambda h: torch.greater(h, 0.1).to(h.dtype),
    "less_equal": lambda h: h[:, :3].le(h[:, 3:]).double().to(h.dtype),
    "equal": lambda h: (h == 0).to(h.dtype) + h,
    "unequal": lambda h: torch.where(h != 0.5, h, 0.5),
    "and, or": lambda h: torch.where(((h[:, :3] > 0) & (h[:, 3:] > 0)) | (h[:, :3] > 0.5), h[:, :3], h[:, 3:]),
    "xor": lambda h: torch.logical_xor(h[:, :3] > 0, h[:, 3:] > 0).to(h.dtype),
    "and a constant": lambda h: torch.logical_and(h > 0, torch.tensor([True, False] * 3)).to(h.dtype) * h,
    "any": lambda h: torch.where((h > 0.2).any(1, keepdim=True), h, 0.0),
    "all": lambda h: torch.where((h[:, :2] > -0.2).all(1, keepdim=True), h, 0.0),
    "count": lambda h: (h > 0).sum(1, keepdim=True).to(h.dtype),
    "reshaped condition": lambda h: torch.where((h > 0).unsqueeze(1), h.unsqueeze(1), 0.5).flatten(1),
    "bool": lambda h: torch.where((h > 0).bool().clone(), h, 0.0),
    "condition chosen": lambda h: torch.where(h > 0, h > 0.5, h < -0.5).to(h.dtype) + h,
    "assigned": set_masked,
    "assigned rows": set_rows,
    "deep": lambda h: torch.where(torch.where(h > 0, h, -h) > 0.3, h.relu(), h),
}


def sampled(model: nn.Module, x: Tensor, eps: float, count: int = 3000) -> Tensor:
    """Outputs at random points and corners of every example's box, ``[batch, points, outputs]``."""
    moves = 2 * torch.rand(len(x), count, x.shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 1
    moves[:, ::2] = moves[:, ::2].sign()
    with torch.no_grad():
        return model((x[:, None] + eps * moves.to(x.dtype)).flatten(0, 1)).reshape(len(x), count, -1)


EXPORTED = ["where", "where, one number", "gate", "masked_fill", "reflected", "and, or", "assigned"]


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("name", "example"), [*((name, False) for name in MODELS), *((name, True) for name in EXPORTED)])
def test_bounds_of_networks_hold(name: str, example: bool) -> None:
    model, x = After(MODELS[name]).double(), uniform(3, 4, seed=5)
    net = autodual.certify(model, example_input=x if example else None)
    for eps in (0.03, 0.4):
        values = sampled(model, x, eps)
        for method in METHODS if eps > 0.1 else METHODS[:3]:
            bounds = net.bounds(x, LInf(eps), method=method)
            assert (values <= bounds.upper[:, None] + 1e-6).all(), (method, eps)
            assert (values >= bounds.lower[:, None] - 1e-6).all(), (method, eps)
            if method in ("dual", "adaptive") and not (eps > 0.1 and "without bounds" in name):  # there it may be taken
                loss = (bounds.upper - bounds.lower).mean() / (values.amax(1) - values.amin(1)).mean().clamp(min=1e-3)
                assert loss < 4, (method, eps)
    exact = net.bounds(x, LInf(0.0))
    torch.testing.assert_close(exact.lower, model(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(exact.upper, model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["where of two", "gate", "masked_fill, not", "and, or"])
def test_bounds_hold_behind_more_layers_and_in_float32(name: str) -> None:
    last = MODELS[name](torch.zeros(1, 6)).shape[1]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        model = nn.Sequential(After(MODELS[name], last=last), nn.ReLU(), nn.Linear(2, 2)).to(dtype)
        x = uniform(3, 4, seed=7).to(dtype)
        values, net = sampled(model, x, 0.3), autodual.certify(model)
        for method in METHODS:
            bounds = net.bounds(x, LInf(0.3), method=method)
            assert (values <= bounds.upper[:, None] + tolerance).all(), method
            assert (values >= bounds.lower[:, None] - tolerance).all(), method


class Jump(nn.Module):
    """The comparison of an input with a number."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x).to(x.dtype) + 0 * x


@pytest.mark.parametrize("method", METHODS[:3])
@pytest.mark.parametrize(
    ("function", "below", "at", "above"),
    [
        (lambda x: x > 1, 0, 0, 1),
        (lambda x: x >= 1, 0, 1, 1),
        (lambda x: x < 1, 1, 0, 0),
        (lambda x: x <= 1, 1, 1, 0),
        (lambda x: x == 1, 0, 1, 0),
        (lambda x: x != 1, 1, 0, 1),
        (lambda x: (x > 1) & (x > 0), 0, 0, 1),
        (lambda x: (x > 1) ^ (x >= 1), 0, 1, 0),
    ],
)
def test_a_box_that_ends_on_the_jump(function, below: int, at: int, above: int, method: str) -> None:
    net = autodual.certify(Jump(function))
    cases = (
        (0.5, 0.5, {below, at}),
        (1.5, 0.5, {at, above}),
        (1.0, 0.0, {at}),
        (1.0, 0.25, {below, at, above}),
        (0.0, 0.5, {below}),
        (2.5, 0.5, {above}),
    )
    centers, radii = (torch.tensor([case[part] for case in cases], dtype=torch.float64) for part in (0, 1))
    bounds = net.bounds(centers[:, None], LInf(radii), method=method)
    for (center, eps, held), lower, upper in zip(cases, bounds.lower, bounds.upper, strict=True):
        assert lower.item() <= min(held) + 1e-9
        assert upper.item() >= max(held) - 1e-9
        assert lower.item() >= -1e-9
        assert upper.item() <= 1 + 1e-9
        if abs(center - 1) > eps:
            assert upper.item() - lower.item() < 1e-9


def test_a_point_on_the_jump_is_exact_where_nothing_was_rounded() -> None:
    for function, value in ((lambda x: x > 0, 0), (lambda x: x >= 0, 1), (lambda x: x < 0, 0), (lambda x: x <= 0, 1)):
        bounds = autodual.certify(Jump(function)).bounds(torch.zeros(1, 1), LInf(0.0))
        assert (bounds.lower.item(), bounds.upper.item()) == pytest.approx((value, value), abs=1e-5)


def test_a_constant_condition_stays_affine() -> None:
    mask = torch.tensor([True, False, True, False, True, False])
    model, x = After(lambda h: torch.where(mask, h, -h)).double(), uniform(3, 4, seed=5)
    assert "DualWhere" in str(autodual.certify(model).explain(x, LInf(0.1)))
    bounds = autodual.certify(model).bounds(x, LInf(0.1))
    torch.testing.assert_close(bounds.upper - bounds.lower, (0.2 * model.first.weight.abs().sum(1)).expand(3, 6))


def test_decided_conditions_are_exact() -> None:
    model, x = After(lambda h: torch.where(h > -50, h, 7.0) * (h < 50) + (h > 99).to(h.dtype)).double(), uniform(3, 4, seed=5)
    for method in METHODS[:3]:
        bounds = autodual.certify(model).bounds(x, LInf(0.1), method=method)
        expected = (0.2 * model.first.weight.abs().sum(1)).expand(3, 6)
        torch.testing.assert_close(bounds.upper - bounds.lower, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", ["dual", "adaptive"])
def test_bounds_are_differentiable_in_the_parameters(method: str) -> None:
    model, x = After(MODELS["where of two"]).double(), uniform(2, 4, seed=9)
    net, weight = autodual.certify(model), model.first.weight
    direction, h = uniform(*weight.shape, seed=10), 1e-6
    (gradient,) = torch.autograd.grad(net.bounds(x, LInf(0.1), method=method).lower.sum(), weight)
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * h * direction
            found.append(net.bounds(x, LInf(0.1), method=method).lower.sum())
            weight -= sign * h * direction
    assert (gradient * direction).sum().item() == pytest.approx(((found[0] - found[1]) / (2 * h)).item(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda h: torch.logical_not(h).to(h.dtype), "compare it with something first"),
        (lambda h: torch.logical_or(h > 0, h).to(h.dtype), "compare it with something first"),
        (lambda h: ((h > 0) + (h > 1)).to(h.dtype), "write &, | and ~"),
        (lambda h: h[h > 0], "must not depend on the input"),
        (lambda h: torch.where(h > 0)[0].to(h.dtype), "depends on the input discontinuously"),
    ],
)
def test_what_is_no_decision_is_refused_with_a_reason(function, message: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=message):
        autodual.certify(After(function)).bounds(uniform(2, 4).float(), LInf(0.1))


def test_as_many_values_as_a_mask_selects_are_refused() -> None:
    def scatter(h: Tensor) -> Tensor:
        h = h.clone()
        h[h < 9] = h.flatten().tanh()  # all of them, as it happens
        return h

    with pytest.raises(UnsupportedOperatorError, match="how many depends on the input"):
        autodual.certify(After(scatter)).bounds(uniform(2, 4).float(), LInf(0.1))


def test_a_model_that_returns_truth_values_says_so() -> None:
    with pytest.raises(TraceError, match=r"returns torch\.bool"):
        autodual.certify(After(lambda h: h > 0)).bounds(uniform(2, 4).float(), LInf(0.1))


def test_every_comparison_is_covered_in_every_spelling() -> None:
    for name in ("gt", "ge", "lt", "le", "eq", "ne"):
        aten = getattr(torch.ops.aten, name)
        for operator in (getattr(torch, name), name, f"__{name}__", aten.Tensor, aten.Scalar):
            rule, reason = choose(Call(operator, (INPUT, 0.5)))
            assert rule is not None, reason
