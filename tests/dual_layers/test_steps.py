"""Functions that jump: both limits at every jump, wherever the box ends; lines of any slope; tightness by brute force."""

from __future__ import annotations

import math
import operator

import pytest
import torch
from torch import Tensor, nn

import autodual
from benchmarks.curved import curved_rules, intervals, measure
from dual_layers import INPUT, Call, DualLayer, Interval, PiecewiseLinear, RuleSample, Slopes, choose
from dual_layers._probes import prepare
from dual_layers.steps import DualHeaviside, DualSign, Steps

CPU = torch.device("cpu")
CURVES = [pytest.param(rule, sample, id=f"{rule.__name__}-{sample.label}") for rule, sample in curved_rules(PiecewiseLinear)]
OPERATORS = {
    "sign": (torch.sign, ()), "floor": (torch.floor, ()), "ceil": (torch.ceil, ()), "trunc": (torch.trunc, ()),
    "round": (torch.round, ()), "frac": (torch.frac, ()), "// 2": (operator.floordiv, (2,)),
    "// -0.7": (operator.floordiv, (-0.7,)), "% 2": (operator.mod, (2,)), "% -0.7": (operator.mod, (-0.7,)),
    "fmod 1.3": (torch.fmod, (1.3,)), "fmod -1.3": (torch.fmod, (-1.3,)),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", OPERATORS)
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def layer_of(function, *constants, **options) -> PiecewiseLinear:
    call = Call(function, (INPUT, *constants), options)
    return choose(call)[0](call)


def box(*ends: tuple[float, float], dtype: torch.dtype = torch.float64) -> Interval:
    lower, upper = torch.tensor(ends, dtype=dtype).unbind(1)
    return Interval(lower, upper)


def drawn(count: int, reach: float, dtype: torch.dtype) -> Interval:
    """Draw boxes of every width, a part of which begin or end at a multiple of a half, or just beside one."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.rand(count, generator=generator, dtype=torch.float64)  # noqa: E731
    first = reach * (2 * draw() - 1)
    ends = [first, first + reach * 10 ** (-6 * draw())]
    for number in range(2):
        exact = torch.where(draw() < 0.4, (2 * ends[number]).round() / 2, ends[number]).to(dtype)
        beside = torch.nextafter(exact, exact + torch.where(draw() < 0.5, 1.0, -1.0).to(dtype))
        ends[number] = torch.where(draw() < 0.3, beside, exact)
    return Interval(torch.minimum(*ends), torch.maximum(*ends))


def inside(layer: PiecewiseLinear, boxes: Interval, count: int = 500) -> Tensor:
    """List points of the boxes: a grid, and the floats about every place at which the rule looks for a jump."""
    shares = torch.linspace(0, 1, count, dtype=boxes.lower.dtype)[:, None]
    found = [boxes.lower + shares * (boxes.upper - boxes.lower)]
    for place, _ in layer.points(boxes):
        for side in (-1.0, 1.0):
            step = torch.nextafter(place, place + side)
            found += [place[None], step[None], torch.nextafter(step, step + side)[None]]
    return torch.minimum(torch.maximum(torch.cat(found), boxes.lower), boxes.upper)


def all_slopes(layer: PiecewiseLinear, boxes: Interval) -> list[Slopes]:
    generator = torch.Generator().manual_seed(1)
    random = [torch.randn(boxes.lower.shape, generator=generator, dtype=torch.float64).to(boxes.lower) for _ in range(3)]
    any_two = Slopes((random[0],), (random[1],))
    steep = Slopes((100 * random[2],), (-100 * random[2],))
    return [layer.slopes((boxes,), "parallel"), layer.slopes((boxes,), "adaptive"), any_two, steep]


def assert_sound(layer: PiecewiseLinear, boxes: Interval) -> None:
    z, limits = inside(layer, boxes), torch.finfo(boxes.lower.dtype)
    values, eps, reach = layer.forward(z).double(), limits.eps, torch.maximum(boxes.lower.abs(), boxes.upper.abs()).double()
    ends = layer.interval(boxes)
    assert (ends.lower.double() <= values + 8 * eps * values.abs()).all()
    assert (ends.upper.double() >= values - 8 * eps * values.abs()).all()
    for slopes in all_slopes(layer, boxes):
        offsets = layer.conjugate(slopes, (boxes,))
        for slope, offset, side in ((slopes.lower[0], offsets.lower, 1), (slopes.upper[0], offsets.upper, -1)):
            line = slope.double() * z.double()
            room = side * (values - line - offset.double())
            allowance = 300 * (eps * (values.abs() + slope.double().abs() * reach + offset.double().abs()) + limits.tiny * eps)
            assert (side * offset < math.inf).all(), "a lower line at infinity is above everything"
            assert ((room >= -allowance) | line.isinf()).all()


@EVERY
@BOTH
@pytest.mark.parametrize("reach", [1e-3, 1.0, 10.0, 1e4])
def test_lines_of_any_slope_are_sound(name: str, dtype: torch.dtype, reach: float) -> None:
    function, constants = OPERATORS[name]
    assert_sound(layer_of(function, *constants), drawn(400, reach, dtype))


@EVERY
@BOTH
def test_awkward_boxes_are_sound(name: str, dtype: torch.dtype) -> None:
    function, constants = OPERATORS[name]
    tiny, large = torch.finfo(dtype).tiny, 1e-4 * torch.finfo(dtype).max
    ends = [0.0, tiny, tiny / 8, 0.5, 1.0, 1.5, 7.0, 1e6, 1e15, 1e30, large]
    ends = [-end for end in reversed(ends)] + ends
    pairs = [(low, high) for number, low in enumerate(ends) for high in ends[number:]]
    assert_sound(layer_of(function, *constants), box(*pairs, dtype=dtype))


@EVERY
def test_unbounded_and_unknown_boxes_give_no_false_line(name: str) -> None:
    function, constants = OPERATORS[name]
    layer = layer_of(function, *constants)
    boxes = box((-math.inf, 2.3), (-1.7, math.inf), (-math.inf, math.inf), (math.nan, 2.3), (math.nan, math.nan))
    z = torch.linspace(-1.7, 2.3, 1001, dtype=torch.float64)[:, None].expand(-1, 5)
    values = layer.forward(z)
    ends = layer.interval(boxes)
    assert (ends.lower <= values).all()
    assert (ends.upper >= values).all()
    for choice in ("parallel", "adaptive"):
        slopes = layer.slopes((boxes,), choice)
        offsets = layer.conjugate(slopes, (boxes,))
        assert (slopes.lower[0] * z + offsets.lower <= values + 1e-9).all()
        assert (slopes.upper[0] * z + offsets.upper >= values - 1e-9).all()


@pytest.mark.parametrize(
    ("function", "constants", "ends", "expected"),
    [
        (torch.floor, (), (0.2, 0.8), (0, 0)),
        (torch.floor, (), (0.2, 1.0), (0, 1)),
        (torch.floor, (), (1.0, 1.5), (0, 1)),
        (torch.floor, (), (-2.5, 3.5), (-3, 3)),
        (torch.ceil, (), (1.0, 1.5), (1, 2)),
        (torch.trunc, (), (-0.9, 0.9), (0, 0)),
        (torch.trunc, (), (-1.0, 0.9), (-1, 0)),
        (torch.round, (), (-0.5, 0.4), (-1, 0)),
        (torch.frac, (), (-0.9, 0.9), (-0.9, 0.9)),
        (torch.frac, (), (0.5, 1.2), (0, 1)),
        (torch.frac, (), (-1.2, 0.3), (-1, 0.3)),
        (torch.sign, (), (0.0, 0.0), (0, 0)),
        (torch.sign, (), (0.0, 2.0), (-1, 1)),
        (torch.sign, (), (1e-300, 2e-300), (1, 1)),
        (operator.mod, (2,), (0.5, 1.5), (0.5, 1.5)),
        (operator.mod, (2,), (1.5, 2.5), (0, 2)),
        (operator.mod, (-2,), (1.5, 2.5), (-2, 0)),
        (operator.floordiv, (2,), (-0.5, 4.5), (-1, 2)),
        (operator.floordiv, (-2,), (-0.5, 4.5), (-3, 0)),
    ],
)
def test_the_interval_has_both_limits_at_every_jump(function, constants, ends, expected) -> None:
    found = layer_of(function, *constants).interval(box(ends))
    assert (found.lower.item(), found.upper.item()) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.5, -3.0, 4.0])
def test_the_step_knows_the_value_at_zero(value: float) -> None:
    layer = layer_of(torch.heaviside, torch.tensor(value, dtype=torch.float64))
    found = layer.interval(box((-1.0, 1.0), (0.0, 1.0), (-1.0, 0.0), (0.0, 0.0), (0.5, 1.0), (-1.0, -0.5)))
    low, high = min(0.0, value), max(1.0, value)
    assert found.lower.tolist() == [low, low, low, value, 1, 0]
    assert found.upper.tolist() == [high, high, high, value, 1, 0]


@pytest.mark.parametrize("decimals", [-2, 1, 2, 5])
@BOTH
def test_rounding_to_decimals_is_sound(decimals: int, dtype: torch.dtype) -> None:
    layer, period = layer_of(torch.round, decimals=decimals), 10.0**-decimals
    assert_sound(layer, drawn(300, 30 * period, dtype))
    ties = period * (torch.arange(-20, 20, dtype=torch.float64) + 0.5)
    beside = torch.stack([torch.nextafter(ties.to(dtype), ties.to(dtype) + side) for side in (-1.0, 0.0, 1.0)])
    for low in beside:
        for high in beside:
            assert_sound(layer, Interval(torch.minimum(low, high), torch.maximum(low, high)))


def test_many_steps_are_followed_by_a_sloping_band() -> None:
    boxes = box((-2.5, 300.5))
    for function, offsets in ((torch.floor, (-1, 0)), (torch.ceil, (0, 1)), (torch.round, (-0.5, 0.5))):
        layer = layer_of(function)
        for choice in ("parallel", "adaptive"):
            slopes = layer.slopes((boxes,), choice)
            found = layer.conjugate(slopes, (boxes,))
            assert slopes.lower[0].item() == pytest.approx(1, abs=0.01)
            assert found.lower.item() == pytest.approx(offsets[0], abs=1.0)
            assert (found.upper - found.lower).item() <= (1 + 1e-9 if choice == "parallel" else 2.0)


def test_a_divisor_for_each_element_gives_the_lines_of_each() -> None:
    divisors = torch.tensor([1.5, -0.7, 2.0, -3.0], dtype=torch.float64)
    boxes = drawn(200, 5.0, torch.float64)
    wide = Interval(*(end[:, None].expand(-1, 4) for end in (boxes.lower, boxes.upper)))
    for function in (torch.remainder, torch.fmod, torch.floor_divide):
        found = layer_of(function, divisors).interval(wide)
        for number, divisor in enumerate(divisors.tolist()):
            own = layer_of(function, divisor).interval(boxes)
            torch.testing.assert_close(found.lower[:, number], own.lower)
            torch.testing.assert_close(found.upper[:, number], own.upper)


@pytest.mark.parametrize(("rule", "sample"), CURVES)
def test_lines_are_sound_and_as_tight_as_brute_force(rule: type[DualLayer], sample: RuleSample) -> None:
    layer = rule(prepare(sample.call, torch.float64, CPU))
    found = measure(layer, intervals(sample, 60, torch.Generator().manual_seed(1)), points=1_000, grid=500)
    assert found.outside == 0
    assert found.loose <= 0.01
    for choice in ("parallel", "adaptive"):
        assert found.ratios[choice].median() <= 1.01, choice
        assert found.ratios[choice].quantile(0.95) <= 1.05, choice
        assert found.ratios[choice].min() >= 0.99, "brute force is a lower bound, up to its grid"


def test_every_step_is_tried_above() -> None:
    rules = {rule for rule, _ in (parameter.values for parameter in CURVES)}
    assert {DualSign, DualHeaviside} <= rules
    assert len([rule for rule in rules if issubclass(rule, Steps)]) >= 9


class Cancelling(nn.Module):
    """A function of numbers that were moved far away and back, which in float32 leaves them on a coarse grid."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function((x + 1e4) - 1e4)


JUMPING = {
    "floor": torch.floor,
    "floor of a product": lambda z: torch.floor(z * z.flip(1)),
    "comparison": lambda z: (z > 0.25).float(),
    "hardshrink": lambda z: nn.functional.hardshrink(z, 0.25),
}


@pytest.mark.parametrize("method", ["interval", "dual", "adaptive", autodual.Dual(strict=True), autodual.Adaptive(strict=True)])
@pytest.mark.parametrize("name", JUMPING)
def test_a_jump_is_seen_through_terms_that_cancel(name: str, method: object) -> None:
    """Rounding of the argument may carry it over the jump: that costs the jump's height, strict or not."""
    torch.manual_seed(0)
    model = Cancelling(JUMPING[name])
    x = torch.tensor([[0.9995, 1.0005, 0.2495, 0.2505, -0.0005, 0.0005, 0.5, 2.0]])
    for eps in (1e-4, 4e-4):
        bounds = autodual.certify(model).bounds(x, autodual.LInf(eps), method=method, allow_rounding=True)
        points = (x + eps * (2 * torch.rand(1000, 8) - 1)).clamp(x - eps, x + eps)
        assert bounds.contains(model(points)).all()


def test_boxes_before_a_jump_keep_their_derivative() -> None:
    layers = nn.Sequential(nn.Linear(3, 4), nn.Hardshrink(0.1), nn.Linear(4, 2)).double()
    bounds = autodual.certify(layers).bounds(torch.ones(1, 3).double(), autodual.LInf(0.3))
    (gradient,) = torch.autograd.grad(bounds.lower.sum(), layers[0].weight)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
