"""Operators made of others: what the program shows of them, and that nothing of the model is frozen into them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import autodual
import dual_layers
from autodual import LInf
from dual_layers import INPUT, Call, Composite, Interval, RuleSample, Slot, register, registry
from dual_layers.testing import RuleError, check_rule


class Ridge(nn.Module):
    """``max(w x, x)`` with a weight for each feature."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1.0, 1.0, features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x * self.weight, x]).amax(0)


def fold(x: Tensor, y: Tensor, shift: float = 0.0) -> Tensor:
    """Stand for an operator that tracing records whole."""
    return torch.maximum(x, y) + shift


torch.fx.wrap("fold")


@pytest.fixture(autouse=True)
def rules() -> Iterator[None]:
    kept = {key: list(value) for key, value in registry._RULES.items()}

    @register(Ridge)
    class DualRidge(Composite):
        """Ridge. Source: max(a, b) = b + relu(a - b)."""

        @staticmethod
        def compose(x: Tensor, weight: Tensor) -> Tensor:
            assert x.shape[-1] == len(weight)
            return x + torch.relu(x * weight - x)

        @classmethod
        def samples(cls) -> Iterator[RuleSample]:
            yield RuleSample("module", Call(Ridge(3)), ((2, 3),))

    @register(fold)
    class DualFold(Composite):
        """Larger of two. Source: as Ridge."""

        @staticmethod
        def compose(x: Tensor, y: Tensor, shift: float = 0.0) -> Tensor:
            left, right = torch.cat([x, y], -1).chunk(2, -1)
            return right + torch.relu(left - right) + shift

        def interval(self, *boxes: Interval) -> Interval:
            return Interval(self.forward(*(box.lower for box in boxes)), self.forward(*(box.upper for box in boxes)))

        @classmethod
        def samples(cls) -> Iterator[RuleSample]:
            yield RuleSample("two", Call(fold, (INPUT, Slot(1))), ((2, 3), (2, 3)))

    yield
    registry._RULES.clear()
    registry._RULES.update(kept)


class Folding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(fold(self.first(x), self.second(x), shift=0.5))


def points_in(x: Tensor, eps: float, count: int = 500) -> Tensor:
    return x + eps * (2 * torch.rand(count, *x.shape) - 1)


@pytest.mark.parametrize("method", ["interval", "dual", "adaptive", autodual.Dual(walk="forward"), autodual.Dual(strict=True)])
@pytest.mark.parametrize("model", [Folding(), nn.Sequential(nn.Linear(3, 4), Ridge(4), nn.Linear(4, 2))], ids=["fold", "ridge"])
def test_bounds_hold(model: nn.Module, method: object) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 3)
    bounds = autodual.certify(model).bounds(x, LInf(0.3), method=method)
    for point in points_in(x, 0.3):
        assert bounds.contains(model(point), 1e-5).all()


def test_the_program_shows_the_parts_under_the_call() -> None:
    net = autodual.certify(Folding())
    before, after = str(net.explain()), str(net.explain(torch.zeros(2, 3), LInf(0.1)))
    assert "DualFold" in before
    assert "DualFold" not in after
    for name in ("fold.cat", "fold.relu", "fold.getitem", "DualReLU"):
        assert name in after


def test_parameters_stay_the_models_own() -> None:
    model = nn.Sequential(Ridge(3), nn.Linear(3, 2))
    net, x = autodual.certify(model), torch.randn(2, 3)
    bounds = net.bounds(x, LInf(0.1))
    (gradient,) = torch.autograd.grad(bounds.lower.sum(), model[0].weight)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        model[0].weight.mul_(3.0)
    fresh = autodual.certify(model).bounds(x, LInf(0.1))
    assert torch.equal(net.bounds(x, LInf(0.1)).lower, fresh.lower)
    model[0].weight = nn.Parameter(torch.ones(3))
    assert torch.allclose(net.bounds(x, LInf(0.0)).lower, model(x), atol=1e-5)


def test_a_tensor_that_is_computed_anew_is_refused() -> None:
    model = parametrizations.weight_norm(Ridge(3), dim=None)
    with pytest.raises(autodual.TraceError, match=r"computed anew in each call.*parametrizations"):
        autodual.certify(model).bounds(torch.zeros(1, 3), LInf(0.1))


def test_an_enclosure_narrows_the_interval() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fold(x[:, :2], x[:, 2:])

    x = torch.tensor([[1.0, 0.0, 0.0, 5.0]])
    bounds = autodual.certify(Pair()).bounds(x, LInf(1.0), method="interval")
    assert bounds.lower.tolist()[0] == pytest.approx([0.0, 4.0], abs=1e-4)
    assert bounds.upper.tolist()[0] == pytest.approx([2.0, 6.0], abs=1e-4)


def test_calls_on_constants_stay_whole() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.level = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + fold(self.level, 2 * self.level)

    explained = str(autodual.certify(Shifted()).explain(torch.zeros(1, 3), LInf(0.1)))
    assert "fold.relu" not in explained


def test_the_batch_may_stand_in_another_axis() -> None:
    class Moved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rows = x.movedim(0, 1)  # (T, B, C)
            return fold(rows, rows.flip(-1)).movedim(1, 0)

    x = torch.randn(3, 2, 4)
    bounds = autodual.certify(Moved()).bounds(x, LInf(0.2))
    assert bounds.contains(Moved()(x).flatten(1), 1e-6).all()


def test_the_checker_catches_a_wrong_composition() -> None:
    class Wrong(registry.lookup(fold)):
        @staticmethod
        def compose(x: Tensor, y: Tensor, shift: float = 0.0) -> Tensor:
            return x + torch.relu(x - y) + shift

    class Narrow(registry.lookup(fold)):
        def interval(self, *boxes: Interval) -> Interval:
            return Interval(self.forward(*(box.center for box in boxes)), self.forward(*(box.upper for box in boxes)))

    check_rule(registry.lookup(fold))
    with pytest.raises(RuleError, match="composition against the operator"):
        check_rule(Wrong)
    with pytest.raises(RuleError, match="interval: lower end above"):
        check_rule(Narrow)


def test_further_cases_are_asked_in_order() -> None:
    def double(z: Tensor, times: int) -> Tensor:
        return z * times

    first, second = registry.lookup(torch.neg), registry.lookup(torch.relu)
    register(double)(first)
    register(double, case=True)(second)
    assert dual_layers.cases(double) == (first, second)
    assert dual_layers.choose(Call(double, (INPUT, 2))) == (first, "")
    register(double, override=True)(second)
    assert dual_layers.cases(double) == (second,)


def test_reasons_of_all_cases_are_reported() -> None:
    rule, reason = dual_layers.choose(Call(torch.max, (INPUT, Slot(1)), {"out": None}))
    assert rule is None
    assert reason


def test_an_unsupported_operator_comes_with_the_nearest_supported() -> None:
    class Unsupported(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.erfcx(x)

    with pytest.raises(autodual.UnsupportedOperatorError, match=r"the nearest supported: .*erf.*; or register a rule"):
        autodual.certify(Unsupported())


class Statistic(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("method", ["interval", "dual", "adaptive"])
@pytest.mark.parametrize(("middle", "spread"), [(1e3, 0.01), (1e5, 1.0)])
@pytest.mark.parametrize("name", ["std", "var"])
def test_terms_that_cancel_inside_an_operator_are_charged(name: str, middle: float, spread: float, method: str) -> None:
    """In float32 the deviation of values far from zero is off by roundoffs of the values, not of the deviation."""
    torch.manual_seed(0)
    x = middle + spread * torch.randn(4, 6)
    points = (x + 1e-6 * (2 * torch.rand(500, 4, 6) - 1)).clamp(x - 1e-6, x + 1e-6)
    model = Statistic(lambda x: getattr(x, name)(1))
    bounds = autodual.certify(model).bounds(x, LInf(1e-6), method=method, allow_rounding=True)
    assert bounds.contains(torch.stack([model(point)[:, None] for point in points])).all()
    computed = autodual.certify(model).bounds(x, LInf(1e-6), method=method)
    steepness = 1.0 if name == "std" else x.std(1).amax()
    assert (computed.width <= 64 * torch.finfo(torch.float32).eps * middle * steepness).all()
