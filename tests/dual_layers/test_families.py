"""Piecewise-linear rules against brute force, and against the source text's formulas."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dual_layers import INPUT, Affine, Call, Interval, PiecewiseLinear, RuleSample, Slopes, lookup
from dual_layers.contract import Choice
from dual_layers.testing import check_rule

ATOL = 1e-9


def zigzag(z: Tensor) -> Tensor:
    return (z + 2).abs() - 2 * (z - 0.5).abs() + 1.5 * (z - 1).relu()


def stairs(z: Tensor) -> Tensor:
    return torch.where(z > 1, z - 3, torch.where(z > -1, z / 2, torch.tensor(1.0, dtype=z.dtype)))


class Zigzag(PiecewiseLinear):
    """Neither convex nor monotone."""

    def breakpoints(self) -> tuple[float, ...]:
        return (-2.0, 0.5, 1.0)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        yield RuleSample("zigzag", Call(zigzag), ((3, 5),))


class Stairs(PiecewiseLinear):
    """Two jumps, down both times."""

    def breakpoints(self) -> tuple[float, ...]:
        return ()

    def jumps(self) -> tuple[tuple[float, float, float], ...]:
        return ((-1.0, 1.0, -0.5), (1.0, 0.5, -2.0))

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        yield RuleSample("stairs", Call(stairs), ((3, 5),))


def layer_of(operator, *constants) -> PiecewiseLinear:
    return lookup(operator)(Call(operator, (INPUT, *constants)))


LAYERS = {
    "zigzag": Zigzag(Call(zigzag)),
    "stairs": Stairs(Call(stairs)),
    "relu": layer_of(torch.relu),
    "hardtanh": layer_of(F.hardtanh),
    "leaky": layer_of(F.leaky_relu, 0.3),
    "abs": layer_of(torch.abs),
}
EVERY = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


@pytest.fixture
def boxes() -> Interval:
    """A thousand boxes of all widths."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: 3 * torch.randn(1000, generator=generator, dtype=torch.float64)  # noqa: E731
    center, radius = draw(), draw().abs() * torch.rand(1000, generator=generator, dtype=torch.float64)
    return Interval(center - radius, center + radius)


def graph(layer: PiecewiseLinear, box: Interval) -> tuple[Tensor, Tensor]:
    """The function at a fine grid of every box, its corners and both sides of its jumps included: ``[points, boxes]``."""
    shares = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    special = [float(b) for b in layer.breakpoints()] + [float(jump[0]) for jump in layer.jumps()]
    around = torch.tensor([p + d for p in special for d in (-1e-12, 0, 1e-12)], dtype=torch.float64)[:, None]
    places = torch.cat([box.lower + shares * box.width, around + 0 * box.lower])
    places = torch.minimum(torch.maximum(places, box.lower), box.upper)
    return places, layer.forward(places)


def residuals(layer: PiecewiseLinear, box: Interval) -> Iterator[tuple[Tensor, Tensor]]:
    """For 321 slopes, the lowest and highest intercept seen on the grid."""
    places, values = graph(layer, box)
    for slope in torch.linspace(-4, 4, 321, dtype=torch.float64):
        rest = values - slope * places
        yield slope, torch.stack([rest.amin(0), rest.amax(0)])


@EVERY
def test_parallel_lines_have_the_smallest_gap(layer: PiecewiseLinear, boxes: Interval) -> None:
    slopes = layer.slopes((boxes,), "parallel")
    offsets = layer.conjugate(slopes, (boxes,))
    best = torch.stack([ends[1] - ends[0] for _, ends in residuals(layer, boxes)]).amin(0)
    gap = offsets.upper - offsets.lower
    assert slopes.parallel
    assert (gap <= best + ATOL).all()
    assert (gap[~layer.undecided((boxes,))].abs() <= ATOL).all()


@EVERY
def test_adaptive_lines_have_the_smallest_area(layer: PiecewiseLinear, boxes: Interval) -> None:
    slopes = layer.slopes((boxes,), "adaptive")
    offsets = layer.conjugate(slopes, (boxes,))
    middle = boxes.center
    below = slopes.lower[0] * middle + offsets.lower
    above = slopes.upper[0] * middle + offsets.upper
    tried = list(residuals(layer, boxes))
    assert (below >= torch.stack([slope * middle + ends[0] for slope, ends in tried]).amax(0) - ATOL).all()
    assert (above <= torch.stack([slope * middle + ends[1] for slope, ends in tried]).amin(0) + ATOL).all()


@EVERY
def test_offsets_and_intervals_are_the_extremes_on_the_grid(layer: PiecewiseLinear, boxes: Interval) -> None:
    places, values = graph(layer, boxes)
    slope = torch.linspace(-3, 3, 1000, dtype=torch.float64)
    both = (slope,)
    offsets, ends = layer.conjugate(Slopes(both, both), (boxes,)), layer.interval(boxes)
    rest = values - slope * places
    for exact, seen in ((offsets.lower, rest.amin(0)), (ends.lower, values.amin(0))):
        assert (exact <= seen + ATOL).all()
        assert (exact >= seen - 1e-6).all(), "attained, up to the distance of the grid from a jump"
    for exact, seen in ((offsets.upper, rest.amax(0)), (ends.upper, values.amax(0))):
        assert (exact >= seen - ATOL).all()
        assert (exact <= seen + 1e-6).all()


@pytest.mark.parametrize("choice", ["parallel", "adaptive"])
@pytest.mark.parametrize("name", ["relu", "abs"])
def test_the_short_way_for_convex_functions_is_the_long_one(name: str, choice: Choice, boxes: Interval) -> None:
    """Slopes that know their points lead to the same offsets and derivatives as any others, also in boxes without width."""
    layer = LAYERS[name]
    upper = torch.where(torch.arange(len(boxes.upper)) % 2 == 0, boxes.upper, boxes.lower)
    for end in (boxes.upper, upper):
        found = []
        for short in (True, False):
            box = Interval(boxes.lower.clone().requires_grad_(), end.clone().requires_grad_())
            slopes = layer.slopes((box,), choice)
            offsets = layer.conjugate(slopes if short else slopes.bare, (box,))
            lines = (slopes.lower[0], slopes.upper[0], offsets.lower, offsets.upper)
            total = sum(weight * line.sum() for weight, line in enumerate(lines, start=1))
            found.append((*lines, *torch.autograd.grad(total, (box.lower, box.upper))))
        for short_way, long_way in zip(*found, strict=True):
            torch.testing.assert_close(short_way, long_way, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("choice", ["parallel", "adaptive"])
@pytest.mark.parametrize("name", ["relu", "abs"])
def test_lines_that_carry_derivatives_hold_however_large_the_box(name: str, choice: Choice) -> None:
    """The chord of a box whose width overflows has slope 0, and touches at the higher end only."""
    lower = torch.tensor([-torch.inf, -3.4e38, -3e38, -3e38, -1e30, -0.5, -torch.inf])
    upper = torch.tensor([1.0, 3e38, 3.4e38, 1.0, 1e-30, 1e8, torch.inf])
    for box in (Interval(a[None].requires_grad_(), b[None].requires_grad_()) for a, b in zip(lower, upper, strict=True)):
        slopes = LAYERS[name].slopes((box,), choice)
        offsets = LAYERS[name].conjugate(slopes, (box,))
        places = torch.stack([box.lower, torch.zeros(1), box.upper]).detach().double().clamp(-3.4e38, 3.4e38)
        values = LAYERS[name].forward(places)
        largest = values.abs().amax() + places.abs().amax()
        below, above = (slope[0].detach().double() * places for slope in (slopes.lower, slopes.upper))
        assert (below + offsets.lower <= values + 1e-6 * largest).all()
        assert (above + offsets.upper >= values - 1e-6 * largest).all()


@pytest.mark.parametrize("rule", [Zigzag, Stairs])
def test_unregistered_rules_keep_their_promises(rule: type[PiecewiseLinear], dtype: torch.dtype, device: str) -> None:
    check_rule(rule, dtype=dtype, device=device)


def test_relu_has_the_slope_of_the_text(boxes: Interval) -> None:
    lower, upper = boxes.lower, boxes.upper
    unstable = (lower < 0) & (upper > 0)
    expected = torch.where(unstable, upper / torch.where(unstable, upper - lower, 1.0), (lower >= 0).double())
    slopes = LAYERS["relu"].slopes((boxes,), "parallel")
    offsets = LAYERS["relu"].conjugate(slopes, (boxes,))
    torch.testing.assert_close(slopes.lower[0], expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(offsets.lower, torch.zeros_like(lower), atol=1e-12, rtol=0)
    torch.testing.assert_close(offsets.upper, torch.where(unstable, -expected * lower, 0.0), atol=1e-12, rtol=1e-12)


def test_relu_adaptive_follows_the_larger_side() -> None:
    box = Interval(torch.tensor([-1.0, -3.0]), torch.tensor([3.0, 1.0]))
    slopes = LAYERS["relu"].slopes((box,), "adaptive")
    assert slopes.lower[0].tolist() == [1.0, 0.0]
    assert slopes.upper[0].tolist() == [0.75, 0.25]


def test_hardtanh_has_the_corrected_slope() -> None:
    generator = torch.Generator().manual_seed(1)
    lower = -1 - 4 * torch.rand(1000, generator=generator, dtype=torch.float64)
    upper = 1 + 4 * torch.rand(1000, generator=generator, dtype=torch.float64)
    layer, box = LAYERS["hardtanh"], Interval(lower, upper)
    slopes = layer.slopes((box,), "parallel")
    offsets = layer.conjugate(slopes, (box,))
    expected = 2 / (1 + torch.maximum(upper, -lower))
    torch.testing.assert_close(slopes.lower[0], expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(offsets.upper, 1 - expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(offsets.lower, expected - 1, atol=1e-12, rtol=1e-12)


def test_hardtanh_offsets_for_any_slope() -> None:
    """The corrected conjugate: ``max(|l| D - 1, 1 - D)`` below and ``max(u D - 1, 1 - D)`` above, for D >= 0."""
    generator = torch.Generator().manual_seed(2)
    lower = -1 - 4 * torch.rand(1000, generator=generator, dtype=torch.float64)
    upper = 1 + 4 * torch.rand(1000, generator=generator, dtype=torch.float64)
    both = (2 * torch.rand(1000, generator=generator, dtype=torch.float64),)
    offsets = LAYERS["hardtanh"].conjugate(Slopes(both, both), (Interval(lower, upper),))
    highest = torch.maximum(-lower * both[0] - 1, 1 - both[0])
    lowest = -torch.maximum(upper * both[0] - 1, 1 - both[0])
    torch.testing.assert_close(offsets.upper, highest, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(offsets.lower, lowest, atol=1e-12, rtol=1e-12)


def test_the_free_transpose_needs_no_rows(dtype: torch.dtype, device: str) -> None:
    layer, z = lookup(F.pixel_shuffle)(Call(F.pixel_shuffle, (INPUT, 2))), torch.ones(2, 4, 2, 2, dtype=dtype, device=device)
    for rows in (0, 1, 3):
        (pulled,) = Affine.transpose(layer, torch.ones(rows, 2, 1, 4, 4, dtype=dtype, device=device), (z,))
        assert pulled.shape == (rows, 2, 4, 2, 2)
    (pulled,) = Affine.transpose(layer, torch.ones(3, 0, 1, 4, 4, dtype=dtype, device=device), (z[:0],))
    assert pulled.shape == (3, 0, 4, 2, 2)
