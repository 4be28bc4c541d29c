"""Smooth rules: derivatives, soundness and tightness against brute force; domains, overflow and awkward boxes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from benchmarks.curved import curved_rules, intervals, measure, places
from dual_layers import INPUT, Call, DualLayer, Interval, RuleSample, Slopes, cases, choose
from dual_layers.smooth import Smooth

CURVES = [pytest.param(rule, sample, id=f"{rule.__name__}-{sample.label}") for rule, sample in curved_rules(Smooth)]
EVERY = pytest.mark.parametrize(("rule", "sample"), CURVES)
CHOICES = ("parallel", "adaptive")


def layer_of(operator, *constants) -> Smooth:
    call = Call(operator, (INPUT, *constants))
    return choose(call)[0](call)


def box(lower: list[float], upper: list[float], dtype: torch.dtype = torch.float64) -> Interval:
    return Interval(torch.tensor(lower, dtype=dtype), torch.tensor(upper, dtype=dtype))


def domain(layer: Smooth, sample: RuleSample) -> tuple[float, float]:
    if type(layer).outside is not Smooth.outside:  # it depends on the box or on constants
        return sample.low, sample.high
    left, right = layer.domain()
    return max(left + 0.02, -30.0), min(right, 30.0)


def finite_pieces(layer: Smooth, left: float, right: float) -> list[tuple[float, float, bool | None]]:
    whole = box([left], [right])
    ends = [
        (
            max(float(piece.lower), left),
            min(float(piece.upper), right),
            piece.convex if piece.convex is None else bool(piece.convex),
        )
        for piece in layer.pieces(whole)
    ]
    return [piece for piece in ends if piece[0] < piece[1]]


@EVERY
def test_the_derivative_is_the_operators(rule: type[DualLayer], sample: RuleSample) -> None:
    layer = rule(sample.call)
    left, right = domain(layer, sample)
    z = torch.linspace(left, right, 1001, dtype=torch.float64)
    for lower, upper, _ in finite_pieces(layer, left, right):
        z = z[(z - lower).abs() > 1e-6] if math.isfinite(lower) else z
        z = z[(z - upper).abs() > 1e-6] if math.isfinite(upper) else z
    z = z[layer.within(Interval(z, z))[1].logical_not()].requires_grad_()
    expected = torch.autograd.grad(layer.forward(z).sum(), z)[0] if layer.forward(z).requires_grad else torch.zeros_like(z)
    torch.testing.assert_close(layer.derivative(z.detach()), expected, atol=1e-12, rtol=1e-9)


@EVERY
def test_the_derivative_is_monotone_on_every_piece(rule: type[DualLayer], sample: RuleSample) -> None:
    layer = rule(sample.call)
    for lower, upper, convex in finite_pieces(layer, *domain(layer, sample)):
        inset = 1e-9 * (1 + abs(lower) + abs(upper))
        rates = layer.derivative(torch.linspace(lower + inset, upper - inset, 100_001, dtype=torch.float64))
        steps = rates.diff()
        rounding = 1e-14 * (1 + rates.abs())[1:]
        if convex is None:
            assert (steps.abs() <= rounding).all()
        else:
            assert ((steps if convex else -steps) >= -rounding).all(), (lower, upper, convex)


@EVERY
def test_pieces_cover_the_domain_without_gaps(rule: type[DualLayer], sample: RuleSample) -> None:
    layer = rule(sample.call)
    pieces = layer.pieces(box([1.0], [2.0]))
    ends = [(float(piece.lower), float(piece.upper)) for piece in pieces]
    assert all(left[1] >= right[0] - 1e-9 for left, right in pairwise(ends))
    assert min(ends[0]) <= max(layer.domain()[0], 1.0)
    assert max(ends[-1]) >= min(layer.domain()[1], 2.0)


@EVERY
def test_turning_points_have_the_slope(rule: type[DualLayer], sample: RuleSample) -> None:
    """Not needed for soundness, but for tightness."""
    layer = rule(sample.call)
    left, right = domain(layer, sample)
    whole = Interval(torch.full((200,), left, dtype=torch.float64), torch.full((200,), right, dtype=torch.float64))
    for number, piece in enumerate(layer.pieces(whole)):
        if piece.convex is None or isinstance(piece.lower, Tensor) or isinstance(piece.upper, Tensor):
            continue
        lower, upper = max(piece.lower, left, -8.0) + 1e-3, min(piece.upper, right, 8.0) - 1e-3
        if lower < upper:
            slope = layer.derivative(torch.linspace(lower, upper, 200, dtype=torch.float64))
            found = layer.turning(slope, layer.pieces(whole))[number]
            torch.testing.assert_close(layer.derivative(found), slope, atol=1e-9, rtol=1e-9)


@EVERY
def test_lines_are_sound_and_as_tight_as_brute_force(rule: type[DualLayer], sample: RuleSample) -> None:
    layer = rule(sample.call)
    drawn = intervals(sample, 60, torch.Generator().manual_seed(1))
    found = measure(layer, drawn, points=1_000, grid=500)
    assert found.outside == 0
    assert found.loose <= (0.01 if layer.jumps() else 1e-4), "a grid does not reach the limits at a jump"
    for choice in CHOICES:
        assert found.ratios[choice].median() <= 1.01, choice
        assert found.ratios[choice].quantile(0.95) <= 1.05, choice
        assert found.ratios[choice].min() >= 0.99, "brute force is a lower bound, up to its grid"


def awkward(layer: Smooth, sample: RuleSample, dtype: torch.dtype) -> Interval:
    """Degenerate, tiny, one-sided, far and enormous boxes, cut to the domain."""
    left, right = layer.domain()
    centers = torch.tensor([-1e6, -3e3, -87.0, -20.0, -1.0, -1e-7, 0.0, 1e-30, 1e-3, 0.7, 5.0, 30.0, 700.0, 1e6], dtype=dtype)
    widths = torch.tensor([0.0, 1e-30, 1e-6, 1e-2, 1.0, 20.0, 1e4, 1e6], dtype=dtype)
    low, high = (centers[:, None] - widths).flatten(), (centers[:, None] + widths).flatten()
    sides = torch.cat([low, centers.repeat_interleave(8), low]), torch.cat([high, high, centers.repeat_interleave(8)])
    return Interval(sides[0].clamp(min=left, max=right), sides[1].clamp(min=left, max=right))


@EVERY
def test_awkward_boxes_give_true_lines_without_nan(rule: type[DualLayer], sample: RuleSample, dtype: torch.dtype) -> None:
    layer = rule(sample.call)
    boxes = awkward(layer, sample, dtype)
    z = places(boxes, 301)
    values = layer.forward(z)
    rounding = 8 * torch.finfo(dtype).eps
    size = values.abs().clamp(max=torch.finfo(dtype).max)
    ends = layer.interval(boxes)
    assert not ends.lower.isnan().any()
    assert not ends.upper.isnan().any()
    known = ~layer.within(boxes)[1]
    assert (ends.lower <= values + rounding * size)[:, known].all()
    assert (ends.upper >= values - rounding * size)[:, known].all()
    generator = torch.Generator().manual_seed(2)
    random = (torch.randn(boxes.lower.shape, generator=generator, dtype=torch.float64).to(dtype),)
    for slopes in (layer.slopes((boxes,), "parallel"), layer.slopes((boxes,), "adaptive"), Slopes(random, random)):
        offsets = layer.conjugate(slopes, (boxes,))
        for slope, offset, side in ((slopes.lower[0], offsets.lower, 1), (slopes.upper[0], offsets.upper, -1)):
            assert slope.isfinite().all()
            assert not offset.isnan().any()
            room = side * (values.double() - slope.double() * z.double() - offset.double())
            allowance = rounding * (values.double().abs() + (slope.double() * z.double()).abs() + offset.double().abs())
            assert ((room >= -allowance) | room.isnan() | values.isinf())[:, known].all()


@EVERY
def test_unbounded_boxes_give_true_lines_without_nan(rule: type[DualLayer], sample: RuleSample, dtype: torch.dtype) -> None:
    layer = rule(sample.call)
    left = max(layer.domain()[0], -torch.inf)
    inner = 1.5 if sample.low > -2 else sample.low / 2
    boxes = box([left, left, inner, math.nan], [inner, torch.inf, torch.inf, 1.0], dtype)
    z = torch.linspace(max(left, -60.0) + 1e-3, inner, 100, dtype=dtype)
    ends = layer.interval(boxes)
    assert not torch.cat([ends.lower, ends.upper]).isnan().any()
    known = ~layer.within(boxes)[1]
    if known[0]:
        assert (layer.forward(z) >= ends.lower[0]).all()
        assert (layer.forward(z) <= ends.upper[0]).all()
    unbounded = ~(boxes.lower.isfinite() & boxes.upper.isfinite())
    for choice in CHOICES:
        slopes = layer.slopes((boxes,), choice)
        offsets = layer.conjugate(slopes, (boxes,))
        assert (slopes.lower[0] == 0)[unbounded].all()
        assert (slopes.upper[0] == 0)[unbounded].all()
        assert not torch.cat([offsets.lower, offsets.upper]).isnan().any()
        assert (offsets.lower <= ends.upper)[unbounded].all()


@pytest.mark.parametrize(
    ("operator", "constants", "ends"),
    [
        (torch.log, (), (-1.0, 2.0)),
        (torch.log1p, (), (-1.5, 2.0)),
        (torch.sqrt, (), (-1e-9, 4.0)),
        (torch.rsqrt, (), (0.0, 4.0)),
        (torch.reciprocal, (), (-1.0, 2.0)),
        (torch.reciprocal, (), (0.0, 2.0)),
        (torch.pow, (0.5,), (-1.0, 2.0)),
        (torch.pow, (-2,), (-1.0, 2.0)),
        (torch.asin, (), (0.5, 1.1)),
        (torch.acos, (), (-1.5, 2.0)),
        (torch.acosh, (), (0.5, 2.0)),
        (torch.atanh, (), (-1.1, 0.0)),
        (torch.logit, (), (-0.1, 0.5)),
        (torch.tan, (), (1.5, 1.6)),
        (torch.tan, (), (0.5, 4.0)),
        (torch.tan, (), (-1e300, 1e300)),
        (torch.tan, (), (1e17, 1e17)),
    ],
)
def test_a_box_that_leaves_the_domain_has_infinite_bounds_alone(operator, constants, ends) -> None:
    layer = layer_of(operator, *constants)
    valid = min(max(layer.domain()[0] + 0.2, 0.5), 2.0)
    boxes = box([ends[0], valid], [ends[1], valid + 0.1])
    found = layer.interval(boxes)
    assert found.lower[0] == -torch.inf
    assert found.upper[0] == torch.inf
    assert found.lower[1].isfinite()
    for choice in CHOICES:
        slopes = layer.slopes((boxes,), choice)
        offsets = layer.conjugate(slopes, (boxes,))
        assert slopes.lower[0][0] == slopes.upper[0][0] == 0
        assert offsets.lower[0] == -torch.inf
        assert offsets.upper[0] == torch.inf
        assert (offsets.upper - offsets.lower)[1].isfinite()


def test_a_logarithm_may_start_at_its_pole() -> None:
    found = layer_of(torch.log).interval(box([0.0], [2.0]))
    assert found.lower[0] == -torch.inf
    assert found.upper[0] == pytest.approx(math.log(2))
    found = layer_of(torch.sqrt).interval(box([0.0], [4.0]))
    assert (found.lower[0], found.upper[0]) == (0, 2)


@pytest.mark.parametrize("exponent", [2, 4, -2, torch.tensor(2), torch.tensor(4.0)])
def test_an_even_power_stays_in_the_domain_of_a_root(exponent) -> None:
    found = layer_of(torch.pow, exponent).interval(box([-1e-200, -1.0, 0.0], [1e-200, 3.0, 0.0]))
    assert ((found.lower >= 0) | found.lower.isinf()).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_exponent_for_each_element_gives_the_lines_of_each(dtype: torch.dtype) -> None:
    exponents = [2.0, 3.0, 4.0, 0.5, 2.5, -1.0, -2.0, -0.5, 1.0, 0.0]
    ends = [(-2.0, 3.0), (-2.0, -1.0), (0.0, 2.0), (1.0, 1.0), (0.5, 4.0), (-1e-3, 1e3)]
    lower, upper = (torch.tensor(side, dtype=dtype)[:, None].expand(-1, len(exponents)) for side in zip(*ends, strict=True))
    boxes, each = Interval(lower, upper), layer_of(torch.pow, torch.tensor(exponents, dtype=dtype))
    slopes = {choice: each.slopes((boxes,), choice) for choice in CHOICES}
    offsets = {choice: each.conjugate(slopes[choice], (boxes,)) for choice in CHOICES}
    found = each.interval(boxes)
    for number, exponent in enumerate(exponents):
        own, single = layer_of(torch.pow, exponent), Interval(lower[:, number], upper[:, number])
        size = 64 * torch.finfo(dtype).eps * (1 + own.interval(single).upper.nan_to_num(posinf=0.0).max().item())
        close = {"atol": size, "rtol": 1e2 * torch.finfo(dtype).eps}
        torch.testing.assert_close(found.lower[:, number], own.interval(single).lower, **close)
        torch.testing.assert_close(found.upper[:, number], own.interval(single).upper, **close)
        for choice in CHOICES:
            gap = (offsets[choice].upper - offsets[choice].lower)[:, number]
            best = own.slopes((single,), choice)
            expected = own.conjugate(best, (single,))
            if choice == "parallel":
                torch.testing.assert_close(gap, expected.upper - expected.lower, **close)
            given = Slopes(*((side[0][:, number],) for side in (slopes[choice].lower, slopes[choice].upper)))
            expected = own.conjugate(given, (single,))
            torch.testing.assert_close(offsets[choice].lower[:, number], expected.lower, **close)
            torch.testing.assert_close(offsets[choice].upper[:, number], expected.upper, **close)


def test_a_base_that_is_not_positive_gives_infinite_bounds_alone() -> None:
    operator = torch.pow
    bases = torch.tensor([2.0, 0.0, -1.0, math.nan, 0.5], dtype=torch.float64)
    layer = next(rule for rule in cases(operator) if rule.__name__ == "DualPowerOf")(Call(operator, (bases, INPUT)))
    boxes = box([-1.0] * 5, [2.0] * 5)
    found = layer.interval(boxes)
    assert layer.outside(boxes).tolist() == [False, True, True, True, False]
    assert found.lower.tolist() == pytest.approx([0.5, -math.inf, -math.inf, -math.inf, 0.25])
    assert found.upper.tolist() == pytest.approx([4.0, math.inf, math.inf, math.inf, 2.0])


def test_a_tangent_keeps_to_its_branch() -> None:
    layer = layer_of(torch.tan)
    boxes = box([-1.5, 2.0, 100.6], [1.5, 4.0, 102.0])
    assert not layer.outside(boxes).any()
    torch.testing.assert_close(layer.interval(boxes).lower, boxes.lower.tan())
    assert layer.outside(box([math.pi / 2], [math.pi / 2])).all()


def test_an_overflow_is_infinite_above_and_finite_below() -> None:
    layer, boxes = layer_of(torch.exp), box([0.0, 900.0], [1000.0, 1000.0])
    slopes = layer.slopes((boxes,), "parallel")
    offsets = layer.conjugate(slopes, (boxes,))
    assert offsets.upper.tolist() == [torch.inf, torch.inf]
    assert offsets.lower.isfinite().all()
    assert layer.interval(boxes).lower.isfinite().all()


def test_symmetric_lines_of_tanh_are_tangents_from_the_ends() -> None:
    """The parallel slope of an S-shaped function is that of the line from one end that touches the far side."""
    layer, boxes = layer_of(torch.tanh), box([-3.0], [3.0])
    slope = layer.slopes((boxes,), "parallel").lower[0]
    touching = layer.turning(slope, layer.pieces(boxes))[1]
    chord = (touching.tanh() + math.tanh(3.0)) / (touching + 3.0)
    torch.testing.assert_close(slope, chord, atol=1e-9, rtol=1e-9)


def test_the_step_of_softplus_at_its_threshold_is_enclosed() -> None:
    layer = layer_of(torch.nn.functional.softplus, 1.0, 2.0)
    edge = torch.tensor(2.0, dtype=torch.float64)
    for ends in ((1.9, 2.1), (2.0, 2.1), (1.0, 2.0)):
        found = layer.interval(box([ends[0]], [ends[1]]))
        values = layer.forward(torch.cat([torch.linspace(*ends, 100, dtype=torch.float64), edge.nextafter(edge + 1)[None]]))
        values = values if ends[1] > 2 else values[:-1]
        assert found.lower[0] <= values.min()
        assert found.upper[0] >= values.max()
