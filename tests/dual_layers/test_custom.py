"""Element-wise functions of the user's own: sound on dense samples, as tight as rules written by hand, honest in refusing."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autodual
from benchmarks.curved import COMPOSED, intervals, measure
from dual_layers import INPUT, Call, Interval, RuleSample, Slopes, Slot, elementwise, lookup, registry
from dual_layers.custom import Elementwise
from dual_layers.testing import RuleError, check_rule

CHOICES = ("parallel", "adaptive")
METHODS = ("interval", "dual", "adaptive", autodual.Dual(walk="forward"))


@pytest.fixture(autouse=True)
def scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules made by a test are forgotten after it."""
    monkeypatch.setattr(registry, "_RULES", {key: list(rules) for key, rules in registry._RULES.items()})


def swishy(z: Tensor, b: Any = 1.5) -> Tensor:
    return z * torch.sigmoid(b * z) + 0.1 * torch.sin(z)


def stairs(z: Tensor) -> Tensor:
    return 0.5 * z + 0.3 * torch.floor(2 * z)


def signed_square(z: Tensor) -> Tensor:
    return torch.sign(z) * z**2 - 0.2 * torch.heaviside(z - 1, torch.tensor(2.0, dtype=z.dtype))


def cases(z: Tensor) -> Tensor:
    inner = torch.where((z > -1) & (z <= 1.5), torch.sin(3 * z), z.clamp(max=0.0))
    return torch.where(~(z < 2), 4 - z, inner)


def roots(z: Tensor) -> Tensor:
    return torch.where(z > 0, torch.sqrt(z + 0.01) - torch.log(1 + z), z**3 / (1 + z.abs()))


def extremes(z: Tensor) -> Tensor:
    return torch.maximum(torch.cos(z), 0.3 * z) + (2 * z.square()).sqrt() - torch.minimum(z, z**2 / 4) / (2 + torch.tanh(z))


def modules(z: Tensor) -> Tensor:
    return nn.GELU()(z) - nn.Softplus(beta=2)(z) + F.hardtanh(2 * z)


def wrapped(z: Tensor) -> Tensor:
    return 1.0 - (2.0**z + torch.remainder(z, 2.0) + 0.5).reciprocal() * 0.1 + z % 1.5


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Any]]] = {
    "swishy": (swishy, {}),
    "stairs": (stairs, {}),
    "signed_square": (signed_square, {}),
    "cases": (cases, {}),
    "roots": (roots, {}),
    "extremes": (extremes, {}),
    "modules": (modules, {}),
    "wrapped": (wrapped, {}),
    "i0e": (torch.special.i0e, {"derivative_bound": (-1.0, 1.0)}),
    "sine": (torch.sinc, {"derivative_bound": 1.4}),
    "erfcx": (torch.special.erfcx, {"derivative": lambda z: 2 * z * torch.exp(z**2) * torch.erfc(z) - 2 / math.sqrt(math.pi)}),
}
EVERY = pytest.mark.parametrize("name", FUNCTIONS)
BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def made(name: str) -> Elementwise:
    function, options = FUNCTIONS[name]
    return layer_of(elementwise(lambda z: function(z), **options))


def layer_of(operator: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Elementwise:
    return lookup(operator)(Call(operator, (INPUT, *args), kwargs))


def box(*ends: tuple[float, float], dtype: torch.dtype = torch.float64) -> Interval:
    lower, upper = torch.tensor(ends, dtype=dtype).unbind(1)
    return Interval(lower, upper)


def assert_sound(layer: Elementwise, boxes: Interval, count: int = 2001) -> None:
    """Compare with a grid, with the floats about every half, where the functions here jump, and beside the ends."""
    shares = torch.linspace(0, 1, count, dtype=boxes.lower.dtype)[:, None]
    grid = boxes.lower * (1 - shares) + boxes.upper * shares
    jumps = torch.arange(-6, 7, dtype=grid.dtype)[:, None] / 2
    beside = [torch.nextafter(jumps, jumps + side).expand(-1, grid.shape[1]) for side in (-1.0, 0.0, 1.0)]
    z = torch.minimum(torch.maximum(torch.cat([grid, *beside]), boxes.lower), boxes.upper)
    values, eps = layer.forward(z).double(), torch.finfo(z.dtype).eps
    ends = layer.interval(boxes)
    size = 1 + values.abs().nan_to_num(posinf=0.0).amax(0)
    assert (ends.lower.double() <= values + 64 * eps * size).logical_or(values.isnan()).all()
    assert (ends.upper.double() >= values - 64 * eps * size).logical_or(values.isnan()).all()
    generator = torch.Generator().manual_seed(3)
    random = [torch.randn(boxes.lower.shape, generator=generator, dtype=torch.float64).to(z) for _ in range(2)]
    chosen = [layer.slopes((boxes,), choice) for choice in CHOICES]
    for slopes in (*chosen, Slopes((random[0],), (random[1],)), Slopes((30 * random[1],), (-30 * random[0],))):
        offsets = layer.conjugate(slopes, (boxes,))
        for slope, offset, side in ((slopes.lower[0], offsets.lower, 1), (slopes.upper[0], offsets.upper, -1)):
            assert slope.isfinite().all()
            assert not offset.isnan().any()
            assert (side * offset < math.inf).all(), "a lower line at infinity is above everything"
            line = slope.double() * z.double()
            allowance = 64 * eps * (size + line.abs() + offset.double().abs())
            room = side * (values - line - offset.double())
            assert ((room >= -allowance) | ~values.isfinite() | line.isinf()).all()


@pytest.mark.thinned(2)
@EVERY
@BOTH
def test_every_line_is_sound(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    center, radius = 6 * torch.rand(2, 200, generator=generator, dtype=torch.float64) - 3
    radius = 3 * 10 ** (-radius.abs() * 2)
    ends = [(center - radius), (center + radius)]
    ends = [torch.where(torch.rand(200, generator=generator) < 0.3, (2 * end).round() / 2, end) for end in ends]
    assert_sound(made(name), Interval(ends[0].to(dtype), torch.maximum(*ends).to(dtype)))


@EVERY
@BOTH
def test_awkward_boxes_are_sound(name: str, dtype: torch.dtype) -> None:
    layer, tiny = made(name), torch.finfo(dtype).tiny
    ends = [-1e30, -1e6, -50.0, -1.0, -1e-3, -tiny, 0.0, tiny / 8, tiny, 1e-30, 1e-3, 1.0, 1.5, 50.0, 1e6, 1e30]
    pairs = [(low, high) for number, low in enumerate(ends) for high in ends[number:]]
    with torch.no_grad():
        assert_sound(layer, box(*pairs, dtype=dtype), 101)


@EVERY
def test_unbounded_and_unknown_boxes_are_sound(name: str) -> None:
    layer = made(name)
    boxes = box((-math.inf, 1.0), (-1.0, math.inf), (-math.inf, math.inf), (math.nan, 1.0), (math.nan, math.nan))
    values = layer.forward(torch.linspace(-1, 1, 501, dtype=torch.float64))[:, None]
    ends = layer.interval(boxes)
    assert (ends.lower <= values).all()
    assert (ends.upper >= values).all()
    for choice in CHOICES:
        slopes = layer.slopes((boxes,), choice)
        offsets = layer.conjugate(slopes, (boxes,))
        assert (slopes.lower[0] == 0).all()
        assert (offsets.lower <= values).all()
        assert (offsets.upper >= values).all()


CHECKED = {("stairs", torch.float64), ("i0e", torch.float32)}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) in CHECKED else pytest.mark.slow, id=f"{name}-{str(dtype)[6:]}")
        for name in FUNCTIONS
        for dtype in (torch.float64, torch.float32)
    ],
)
def test_the_checker_finds_nothing(name: str, dtype: torch.dtype) -> None:
    check_rule(type(made(name)), dtype=dtype)


@pytest.mark.parametrize("name", COMPOSED)
def test_compositions_are_nearly_as_tight_as_rules_written_by_hand(name: str) -> None:
    function, closed = COMPOSED[name]
    layer, own = layer_of(elementwise(lambda z: function(z))), layer_of(closed)
    boxes = intervals(RuleSample("", Call(closed), ((1,),), low=-5.0, high=5.0), 200, torch.Generator().manual_seed(1))
    found = measure(layer, boxes, points=1_000, grid=500)
    assert found.outside == 0
    for choice in CHOICES:
        sys.stdout.write(f"{name}, {choice}: {found.ratios[choice].median():.4f} times the smallest possible\n")
        assert found.ratios[choice].median() <= 1.05
    torch.testing.assert_close(layer.forward(boxes.lower), own.forward(boxes.lower), atol=1e-9, rtol=1e-9)


def test_more_cells_are_tighter() -> None:
    boxes = box((-3.0, 2.0), (0.5, 4.0))
    gaps = []
    for cells in (4, 16, 64, 256):
        layer = layer_of(elementwise(torch.special.i0e, derivative_bound=1.0, cells=cells))
        offsets = layer.conjugate(layer.slopes((boxes,), "parallel"), (boxes,))
        gaps.append(offsets.upper - offsets.lower)
    assert all((finer < coarser).all() for coarser, finer in pairwise(gaps))


def test_a_wrong_derivative_does_not_survive_the_checker() -> None:
    for options in ({"derivative_bound": 0.7}, {"derivative_bound": (0.1, 1.0)}, {"derivative": lambda z: 0.9 * torch.cos(z)}):
        operator = elementwise(lambda z: torch.sin(z), **options)
        with pytest.raises(RuleError):
            check_rule(lookup(operator))
    layer = layer_of(elementwise(lambda z: torch.sin(z), derivative=lambda z: torch.cos(z)))
    assert measure(layer, box((-2.0, 3.0), (0.1, 4.0)), points=1_000, grid=100).outside == 0


def test_outside_its_domain_nothing_is_known() -> None:
    operator = elementwise(lambda z: torch.special.entr(z), derivative=lambda z: -1 - torch.log(z), domain=(0.0, math.inf))
    layer, boxes = layer_of(operator), box((-0.1, 1.0), (0.2, 1.0), (1.0, 1.0))
    found = layer.interval(boxes)
    assert layer.outside(boxes).tolist() == [True, False, False]
    assert found.lower.isinf().tolist() == found.upper.isinf().tolist() == [True, False, False]
    check_rule(lookup(operator))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda z: torch.special.i0e(z) + z, "torch.special_i0e: there is no rule for it; give elementwise"),
        (lambda z: z - z.mean(), "Tensor.mean does not work element by element"),
        (lambda z: torch.softmax(z, -1), "does not work element by element"),
        (lambda z: z.reshape(-1), "does not work element by element"),
        (lambda z: z if z > 0 else -z, "a Python branch depends on values"),
        (lambda z: (z > 0) * z, "of a comparison; choose with torch.where"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_a_reason(function, message: str) -> None:
    operator = elementwise(function)
    assert message in lookup(operator).refuse(Call(operator))


def test_only_one_value_may_depend_on_the_input() -> None:
    operator = elementwise(lambda z, b: z * torch.sigmoid(b * z))
    assert lookup(operator).refuse(Call(operator, (INPUT, 2.0))) is None
    assert "the others must be constant" in lookup(operator).refuse(Call(operator, (INPUT, Slot(1))))


@pytest.mark.parametrize("options", [{}, {"derivative_bound": 2.0}])
def test_a_function_that_mixes_elements_is_an_error(options: dict[str, Any]) -> None:
    boxes = box((2.0, 3.0), (-1.0, 0.0))
    mixes = elementwise(lambda z: torch.sort(z, -1).values if options else z.sort(-1)[0], **options)
    with pytest.raises(ValueError, match="element"):
        layer_of(mixes).interval(boxes)
    axis = elementwise(lambda z: F.prelu(z, torch.tensor([0.1, 0.5], dtype=z.dtype)), **options)
    with pytest.raises(ValueError, match="not an element-wise function"):
        layer_of(axis).interval(Interval(-torch.ones(2, 2, 2).double(), torch.ones(2, 2, 2).double()))


def test_a_constant_that_widens_its_input_is_an_error() -> None:
    layer = layer_of(elementwise(swishy), torch.ones(3, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="widens its input"):
        layer.interval(box((-1.0, 1.0)))


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        elementwise(swishy, derivative=torch.cos, derivative_bound=1.0)
    with pytest.raises(ValueError, match="one cell or more"):
        elementwise(swishy, cells=0)


def test_a_function_of_pytorch_itself_is_sampled() -> None:
    operator = elementwise(torch.special.i1e, derivative_bound=0.5)
    assert len(list(lookup(operator).samples())) == 2
    operator = elementwise(lambda z, b: b * z.abs())
    with pytest.raises(TypeError, match="has no samples of its own; pass samples="):  # what b is nobody knows
        check_rule(lookup(operator))
    check_rule(lookup(operator), samples=[RuleSample("b", Call(operator, (INPUT, -2.0)), ((2, 3),))])


def test_the_operator_is_the_function() -> None:
    operator, z = elementwise(swishy), torch.randn(4, generator=torch.Generator().manual_seed(0))
    assert operator.__name__ == "swishy"
    torch.testing.assert_close(operator(z, b=0.3), swishy(z, b=0.3), atol=0, rtol=0)
    assert layer_of(operator, 0.3).interval(Interval(z, z)).contains(swishy(z, 0.3)).all()


class Network(nn.Module):
    """Own functions with a parameter for each channel, with one another inside, and an opaque one."""

    def __init__(self, jumps: bool) -> None:
        super().__init__()
        gate = elementwise(swishy)
        self.functions = (
            gate,
            elementwise(lambda z: gate(stairs(z), 0.7) - 0.5 * z) if jumps else gate,
            elementwise(lambda z, s: torch.special.i0e(s * z), derivative_bound=1.0),
        )
        self.first, self.second, self.last = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.b = nn.Parameter(torch.linspace(0.5, 2.0, 6))

    def forward(self, x: Tensor) -> Tensor:
        gate, nested, opaque = self.functions
        h = nested(self.second(gate(self.first(x), b=self.b)))
        return self.last(opaque(h, 0.9) + h)


def network(*, jumps: bool) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Network(jumps).double(), torch.randn(3, 3).double()


@pytest.mark.parametrize("eps", [1e-3, 1.0])
def test_no_point_of_a_network_leaves_its_bounds(eps: float) -> None:
    model, x = network(jumps=True)
    region, net, generator = autodual.LInf(eps), autodual.certify(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        samples = model(region.sample(x.repeat(500, 1), generator)).unflatten(0, (500, len(x)))
        found = {str(method): net.bounds(x, region, method=method) for method in METHODS}
    for bounds in found.values():
        assert (bounds.lower <= samples.amin(0) + 1e-9).all()
        assert (bounds.upper >= samples.amax(0) - 1e-9).all()
    near = {"atol": 1e-3 * (samples.amax(0) - samples.amin(0)).max().item(), "rtol": 0}  # the best slope is not always one
    torch.testing.assert_close(found["dual"].lower, found[str(METHODS[-1])].lower, **near)
    assert (found["dual"].width <= found["interval"].width).float().mean() >= 0.5


def test_bounds_are_differentiable_in_the_parameters_of_a_function() -> None:
    model, x = network(jumps=False)
    net, region = autodual.certify(model), autodual.LInf(0.05)

    def total() -> Tensor:
        return net.bounds(x, region).lower.sum()

    (grad,) = torch.autograd.grad(total(), [model.b])
    towards = torch.linspace(-1, 1, 6, dtype=torch.float64)
    with torch.no_grad():
        model.b += 1e-6 * towards
        ahead = total()
        model.b -= 2e-6 * towards
        behind = total()
    assert (grad * towards).sum().item() == pytest.approx((ahead - behind).item() / 2e-6, rel=1e-3)


class Looping(nn.Module):
    """Needs an example, so that torch.export traces it."""

    def __init__(self) -> None:
        super().__init__()
        self.function, self.layer = elementwise(swishy), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        for _ in range(h.shape[1]):
            h = h - 0.1 * self.function(h)
        return h


def test_the_export_route_sees_the_operators_inside() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, x = Looping().double(), torch.randn(3, 3).double()
    net, region, generator = autodual.certify(model, x), autodual.LInf(0.1), torch.Generator().manual_seed(0)
    bounds = net.bounds(x, region)
    with torch.no_grad():
        samples = model(region.sample(x.repeat(500, 1), generator)).unflatten(0, (500, len(x)))
    assert (bounds.lower <= samples.amin(0) + 1e-9).all()
    assert (bounds.upper >= samples.amax(0) - 1e-9).all()
    assert "sigmoid" in str(net.explain(x))
