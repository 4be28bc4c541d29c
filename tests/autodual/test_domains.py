"""Regions that leave an operator's domain: unknown for that example, named in the report, an error only at the centre."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import autodual
from autodual import SpecificationError, Verdict
from dual_layers import elementwise

METHODS = ("interval", "dual", "adaptive", autodual.Dual(walk="forward"), autodual.Dual(strict=True))
EVERY_METHOD = pytest.mark.parametrize("method", METHODS, ids=str)


class Behind(nn.Module):
    """One function between two linear maps that leave its input alone and mix its outputs."""

    def __init__(self, function: Callable[[Tensor], Tensor], *, width: int = 2) -> None:
        super().__init__()
        self.function = function
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.last = nn.Linear(width, 3)
            nn.init.normal_(self.last.weight)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(x)
        return self.last(h + 0.5 * h)


def line_of(model: type[nn.Module], text: str) -> str:
    lines, first = inspect.getsourcelines(model.forward)
    return f"test_domains.py:{first + next(number for number, line in enumerate(lines) if text in line)}"


# For each function: an example whose box of radius 0.1 leaves the domain in its first number, and one that does not.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], list[float], list[float]]] = {
    "log": (torch.log, [0.05, 1.0], [1.0, 2.0]),
    "sqrt": (torch.sqrt, [0.05, 1.0], [1.0, 2.0]),
    "rsqrt": (torch.rsqrt, [0.05, 1.0], [1.0, 2.0]),
    "reciprocal": (torch.reciprocal, [-0.05, 1.0], [-1.0, 2.0]),
    "log1p": (torch.log1p, [-0.95, 1.0], [1.0, 2.0]),
    "power": (lambda z: z**0.5, [0.05, 1.0], [1.0, 2.0]),
    "acos": (torch.acos, [0.95, 0.0], [0.5, -0.5]),
    "acosh": (torch.acosh, [1.05, 2.0], [1.5, 3.0]),
    "atanh": (torch.atanh, [-0.95, 0.0], [0.5, -0.5]),
    "logit": (torch.logit, [0.05, 0.5], [0.5, 0.3]),
    "tan": (torch.tan, [math.pi / 2 + 0.05, 0.3], [0.1, 3.0]),
}
EVERY_FUNCTION = pytest.mark.parametrize("name", FUNCTIONS)


def batch(name: str) -> tuple[Behind, Tensor]:
    """Put an example that leaves the domain between two that do not."""
    function, bad, good = FUNCTIONS[name]
    return Behind(function), torch.tensor([good, bad, [good[0], good[1] + 0.01]], dtype=torch.float64)


@EVERY_FUNCTION
@EVERY_METHOD
def test_an_example_outside_is_unknown_and_harms_no_other(name: str, method) -> None:
    model, x = batch(name)
    net, region = autodual.certify(model), autodual.LInf(0.1)
    bounds, alone = net.bounds(x, region, method=method), net.bounds(x[[0, 2]], region, method=method)
    assert (bounds.lower[1] == -math.inf).all()
    assert (bounds.upper[1] == math.inf).all()
    torch.testing.assert_close(bounds.lower[[0, 2]], alone.lower, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(bounds.upper[[0, 2]], alone.upper, atol=1e-12, rtol=1e-12)
    assert alone.lower.isfinite().all()
    assert alone.upper.isfinite().all()


@EVERY_FUNCTION
@EVERY_METHOD
def test_the_report_names_the_node_its_line_the_interval_and_the_example(name: str, method) -> None:
    model, x = batch(name)
    with torch.no_grad():
        y = model(x).argmax(1)
    report = autodual.certify(model).verify(x, y, autodual.LInf(0.1), method=method)
    assert report.verdict[1] is Verdict.UNKNOWN
    assert not report.certified[1]
    low, high = x[1, 0].item() - 0.1, x[1, 0].item() + 0.1
    (text,) = report.violations
    assert text.startswith("example 1: the input of ")
    assert f"[{low:.6g}, {high:.6g}], which leaves its domain, node " in text
    assert "test_domains.py:" in text
    assert text in report.summary()


class Twice(nn.Module):
    """Two places where a domain may be left, one behind the other, and one on another way."""

    def forward(self, x: Tensor) -> Tensor:
        first = torch.log(x[:, :1])
        second = torch.sqrt(first + 5)
        third = (x[:, 1:2] - 1).reciprocal()
        return torch.cat([first, second, third], 1)


def test_only_the_first_place_on_each_way_is_listed() -> None:
    x = torch.tensor([[0.05, 1.05], [2.0, 3.0]], dtype=torch.float64)
    report = autodual.certify(Twice()).verify(x, [0, 0], autodual.LInf(0.1))
    assert len(report.violations) == 2
    assert "torch.log" in report.violations[0]
    assert line_of(Twice, "torch.log") in report.violations[0]
    assert "Tensor.reciprocal" in report.violations[1]
    assert line_of(Twice, "reciprocal") in report.violations[1]
    assert all(text.startswith("example 0") for text in report.violations)


def test_a_value_that_may_overflow_is_listed_too() -> None:
    x = torch.tensor([[707.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    report = autodual.certify(Behind(torch.exp)).verify(x, [0, 0], autodual.LInf(5.0))
    (text,) = report.violations
    assert "example 0: the input of torch.exp may lie in [702, 712], where it is not bounded" in text
    assert not report.certified[0]


def test_a_summary_lists_a_few() -> None:
    x = torch.full((8, 2), 0.05, dtype=torch.float64)
    report = autodual.certify(Behind(torch.log)).verify(x, [0] * 8, autodual.LInf(0.1))
    assert len(report.violations) == 8
    assert report.summary().count("torch.log") == 5
    assert "and 3 more, in .violations" in report.summary()
    assert "not bounded" not in autodual.certify(Behind(torch.log)).verify(x + 1, [0] * 8, autodual.LInf(0.1)).summary()


@pytest.mark.parametrize("method", ["bounds", "verify", "robust_loss"])
def test_an_input_outside_is_an_error_that_names_node_line_and_value(method: str) -> None:
    net, region = autodual.certify(Behind(torch.log)), autodual.LInf(0.1)
    x = torch.tensor([[1.0, 1.0], [2.0, -0.3]], dtype=torch.float64)
    arguments = (x, region) if method == "bounds" else (x, torch.tensor([0, 0]), region)
    wrong = rf'output for example 1 is not finite; torch.log is nan at -0.3, node "log" at .*{line_of(Behind, "function")}'
    with pytest.raises(SpecificationError, match=wrong):
        getattr(net, method)(*arguments)


class Squashed(nn.Module):
    """The output is finite even where the operator has no value."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.exp(-torch.reciprocal(x).abs()), x], 1)


def test_a_centre_outside_is_an_error_even_if_the_output_is_finite() -> None:
    net, x = autodual.certify(Squashed()), torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    wrong = rf"region of example 1 is outside a domain: torch.reciprocal is inf at 0, node .*{line_of(Squashed, 'reciprocal')}"
    with pytest.raises(SpecificationError, match=wrong):
        net.bounds(x, autodual.LInf(0.1))


def test_a_centre_outside_is_an_error_even_if_the_input_is_inside() -> None:
    net, x = autodual.certify(Behind(torch.sqrt)), torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    with pytest.raises(SpecificationError, match=r"example 0 is outside a domain: torch.sqrt is nan at -0.5"):
        net.bounds(x, autodual.Box(-2.0, 1.0))


def test_nan_parameters_are_still_blamed_first() -> None:
    model = Behind(torch.exp)
    model.last.weight.data[0, 0] = math.nan
    with pytest.raises(SpecificationError, match=r"these parameters contain NaN or infinity: \['last.weight'\]"):
        autodual.certify(model).bounds(torch.ones(2, 2).double(), autodual.LInf(0.1))


class Masked(nn.Module):
    """What follows makes numbers of NaN and infinity again."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.log(x)
        h = h - 2 * h
        return torch.cat([torch.sign(h), torch.relu(h).clamp(max=1.0), torch.sigmoid(h)], 1)


@EVERY_METHOD
def test_an_unknown_box_certifies_nothing_even_behind_bounded_functions(method) -> None:
    x = torch.tensor([[0.05], [5.0]], dtype=torch.float64)
    net, region = autodual.certify(Masked()), autodual.LInf(0.1)
    bounds = net.bounds(x, region, method=method)
    samples = torch.stack([Masked()(x + shift) for shift in torch.linspace(-0.049, 0.1, 200, dtype=torch.float64)])
    assert (bounds.lower <= samples.amin(0) + 1e-9).all()
    assert (bounds.upper >= samples.amax(0) - 1e-9).all()
    assert not bounds.lower.isnan().any()
    assert not bounds.upper.isnan().any()
    alone = net.bounds(x[1:], region, method=method)
    torch.testing.assert_close(bounds.lower[1:], alone.lower, atol=1e-12, rtol=1e-12)
    report = net.verify(x, Masked()(x).argmax(1), region, method=method)
    assert report.certified.tolist()[0] is False
    assert report.violations


@EVERY_METHOD
def test_the_rest_of_the_batch_keeps_its_certificates_and_losses(method) -> None:
    model, x = batch("log")
    net, region, rest = autodual.certify(model), autodual.LInf(0.01), torch.tensor([0, 2])
    x[1] = torch.tensor([0.005, 1.0])
    with torch.no_grad():
        y = model(x).argmax(1)
    both, alone = net.verify(x, y, region, method), net.verify(x[rest], y[rest], region, method)
    assert both.certified.tolist() == [True, False, True]
    assert alone.certified.tolist() == [True, True]
    losses = net.robust_loss(x, y, region, method, reduction="none")
    torch.testing.assert_close(losses[rest], net.robust_loss(x[rest], y[rest], region, method, reduction="none"))
    assert (
        losses[1] == net.robust_loss(x, y, region, method) == net.robust_loss(x, y, region, method, reduction="sum") == math.inf
    )
    with pytest.raises(SpecificationError, match="reduction must be"):
        net.robust_loss(x, y, region, reduction="median")


def test_own_functions_say_where_their_domain_ends() -> None:
    entropy = elementwise(lambda z: torch.special.entr(z), derivative=lambda z: -1 - torch.log(z), domain=(0.0, math.inf))
    x = torch.tensor([[0.05, 1.0], [1.0, 2.0]], dtype=torch.float64)
    report = autodual.certify(Behind(entropy)).verify(x, [0, 0], autodual.LInf(0.1))
    (text,) = report.violations
    assert "[-0.05, 0.15], which leaves its domain" in text


class Kernel(nn.Module):
    """One over one plus a squared distance that is multiplied out: by intervals alone the divisor may be 0."""

    def forward(self, x):
        square = (x * x).sum(-1, keepdim=True) - 2 * x.sum(-1, keepdim=True) + x.shape[-1]
        return 1 / (1 + square)


@torch.no_grad()
def test_where_intervals_leave_a_domain_the_dual_network_bounds_the_input():
    """For that example alone: another one in its batch keeps its own bounds, to the bit."""
    net, x = autodual.certify(Kernel().double()), torch.tensor([[0.5, 1.5, 1.0], [0.9, 1.0, 1.1]], dtype=torch.float64)
    region = autodual.LInf(torch.tensor([0.6, 0.01], dtype=torch.float64))
    bounds = net.bounds(x, region, method="interval")
    assert bool(bounds.upper.isfinite().all())
    for _ in range(200):
        assert bounds.contains(net(region.sample(x))).all()
    for i in range(2):
        alone = net.bounds(x[i : i + 1], autodual.LInf(region.eps[i : i + 1]), method="interval")
        assert torch.equal(alone.lower, bounds.lower[i : i + 1])
        assert torch.equal(alone.upper, bounds.upper[i : i + 1])
    assert "interval, or dual where that leaves a domain" in str(net.explain(x, region, "interval"))


class Normalised(nn.Module):
    """A mean square whose range is wide beside the small number that is added to it."""

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


@torch.no_grad()
def test_roundoffs_of_a_large_end_do_not_take_a_small_one_out_of_a_domain():
    """In single precision they are larger than the small number."""
    net, x, region = autodual.certify(Normalised()), torch.tensor([[1.0, -2.0, 3.0]]), autodual.LInf(20.0)
    bounds = net.bounds(x, region, method="interval")
    assert bool(bounds.upper.isfinite().all())
    assert "dual where" not in str(net.explain(x, region, "interval"))
    for _ in range(100):
        assert bounds.contains(net(region.sample(x))).all()


class Moved(nn.Module):
    """Single elements are shifted and scaled, by numbers of all sizes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.scale, self.shift = (
            nn.Parameter(torch.randn(1000, generator=generator) * 10 ** (8 * torch.rand(1000, generator=generator) - 4))
            for _ in range(2)
        )

    def forward(self, x):
        return (0.1 - torch.add(x, self.shift, alpha=0.3) * self.scale / 3).relu()


@torch.no_grad()
def test_ends_of_single_elements_are_rounded_outwards():
    """The bounds hold for the model in single precision and for the same one in double, which is all but exact."""
    model, shape = Moved(), (4, 1000)
    low = -0.3 * model.shift * (1 + 1e-7 * torch.randn(shape, generator=torch.Generator().manual_seed(1)))  # sums cancel
    width = 10 ** (8 * torch.rand(shape, generator=torch.Generator().manual_seed(2)) - 6)
    region = autodual.Box(low, low + width)
    net, double = autodual.certify(model), copy.deepcopy(model).double()
    run = net._run(net._problem(low, region))
    bounds = run.hull(run.program.graph.output)
    for end in (low, low + width):
        assert bounds.contains(model(end)).all()
        assert (bounds.lower.double() <= double(end.double())).all()
        assert (bounds.upper.double() >= double(end.double())).all()
