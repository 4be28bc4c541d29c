"""Methods in turn: each for the examples that are left, never worse than one of them, and examples may be chosen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autodual
from autodual.errors import SpecificationError
from autodual.methods import Auto
from autodual.report import Verdict
from tests.autodual.test_optimize import Own, Sequence, Two, build


def near(model, x):
    """Radii at which it takes the methods some effort, of many sizes."""
    net, y = autodual.certify(model), model(x).argmax(1)
    with torch.no_grad():
        radius = net.radius(x, y, method="adaptive", max_radius=50.0)
    return net, y, autodual.LInf(radius * torch.linspace(0.3, 1.1, len(x), dtype=x.dtype))


def test_each_method_settles_what_those_before_it_left():
    model, x = build("relu", batch=12, seed=1)
    net, y, region = near(model, x)
    report = net.verify(x, y, region, method="auto")
    assert {"interval", "dual", "optimized"} <= set(report.settled)
    assert tuple(report.certified.tolist()) == tuple(name is not None for name in report.settled)
    order = ("interval", "dual", "adaptive", "optimized")
    proved = torch.stack([net.verify(x, y, region, method=method).certified for method in order], 1)
    for i, name in enumerate(report.settled):
        assert (order[proved[i].tolist().index(True)] if proved[i].any() else None) == name
    assert "settled" in report.summary()
    assert f"{report.settled.count('dual')} by dual" in report.summary()


def test_examples_do_not_change_each_other():
    model, x = build("relu", batch=8)
    net, y, region = near(model, x)
    together, some = net.verify(x, y, region, method="auto"), torch.tensor([6, 1, 7])
    apart = net.verify(x[some], y[some], region.take(some, x), method="auto")
    torch.testing.assert_close(apart.margins, together.margins[some], rtol=0, atol=1e-9)
    assert apart.settled == tuple(together.settled[i] for i in some.tolist())


def test_bounds_keep_the_best_end_of_all():
    model, x = build("steps", batch=3)
    net, region = autodual.certify(model), autodual.L2(0.4)
    with torch.no_grad():
        found = net.bounds(x, region, method="auto")
        for method in ("interval", "dual", "adaptive", "optimized"):
            other = net.bounds(x, region, method=method)
            assert (found.lower >= other.lower - 1e-9).all(), method
            assert (found.upper <= other.upper + 1e-9).all(), method
        assert set(net.intermediate(x, region, method="auto")) == set(net.intermediate(x, region, method="optimized"))


def test_a_wrong_prediction_costs_nothing_further():
    model, x = build("relu", batch=3)
    y = model(x).argmax(1)
    y[1] = (y[1] + 1) % 3
    report = autodual.certify(model).verify(x, y, autodual.LInf(0.01), method="auto")
    assert report.verdict == (Verdict.CERTIFIED, Verdict.FALSIFIED, Verdict.CERTIFIED)
    assert report.settled[1] is None


def test_no_time_means_one_method():
    model, x = build("relu", batch=12)
    net, y, region = near(model, x)
    report = net.verify(x, y, region, method=Auto(budget=0.0))
    assert set(report.settled) <= {"interval", None}
    with torch.no_grad():
        torch.testing.assert_close(report.margins, net.margins(x, y, region, method="interval"))


def test_flag_radius_loss_and_margins():
    model, x = build("relu", batch=4)
    net, y, region = near(model, x)
    report = net.verify(x, y, region, method="auto")
    assert torch.equal(net.flag(x, region, method="auto"), ~report.certified)
    with torch.no_grad():
        assert (net.radius(x[:2], y[:2], method=Auto(3)) >= net.radius(x[:2], y[:2], method="dual") * 0.999).all()
        torch.testing.assert_close(net.margins(x, y, region, method="auto"), report.margins)
        losses = [net.robust_loss(x, y, region, method=method) for method in ("auto", "optimized")]
        torch.testing.assert_close(*losses)
    net.robust_loss(x, y, region, method=Auto(2)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_empty_batches_and_regions_of_ones_own():
    model, x = build("relu", batch=5)
    net, y = autodual.certify(model), model(x).argmax(1)
    assert net.verify(x[:0], y[:0], autodual.LInf(0.1), method="auto").settled == ()
    region = Own(torch.linspace(0.05, 0.8, 5, dtype=x.dtype))
    report = net.verify(x, y, region, method="auto")
    best = net.verify(x, y, region, method="optimized")
    assert torch.equal(report.certified, best.certified)


def test_models_whose_examples_belong_together_go_on_as_a_whole():
    torch.manual_seed(0)
    model, x, other, scale = Two().double(), torch.rand(3, 3).double(), torch.rand(3, 3).double(), torch.rand(3, 6).double()
    y = model(x, other, scale).argmax(1)
    net = autodual.certify(model)
    for size in (0.02, 0.1, 0.3):
        region = {"x": autodual.LInf(size), "other": autodual.L2(size)}
        report = net.verify((x, other, scale), y, region, method="auto")
        best = net.verify((x, other, scale), y, region, method="optimized")
        assert (report.certified | ~best.certified).all()


def test_merged_batches_are_divided():
    torch.manual_seed(0)
    model, x = Sequence().double(), torch.rand(6, 6).double()
    net, y, region = near(model, x)
    report = net.verify(x, y, region, method="auto")
    assert (report.certified | ~net.verify(x, y, region, method="adaptive").certified).all()


@pytest.mark.parametrize("budget", [-1.0, "soon", True])
def test_the_budget_is_checked(budget):
    with pytest.raises(SpecificationError, match="budget must be None or a number of seconds"):
        Auto(budget=budget)
    with pytest.raises(SpecificationError, match="steps must be an integer"):
        Auto(steps=-1)


X = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(0))
TAKEN = {
    "linf": autodual.LInf(0.1),
    "linf, scalar tensor": autodual.LInf(torch.tensor(0.1), domain=(0.0, 1.0)),
    "linf, per example": autodual.LInf(torch.linspace(0.1, 0.4, 4)),
    "linf, per coordinate": autodual.LInf(torch.linspace(0.1, 0.4, 3)),
    "linf, per element": autodual.LInf(torch.linspace(0.1, 0.4, 24).reshape(4, 2, 3)),
    "linf, one for all": autodual.LInf(torch.linspace(0.1, 0.4, 6).reshape(1, 2, 3)),
    "l2 in a domain": autodual.L2(torch.linspace(0.1, 0.4, 4), domain=(torch.zeros(3), torch.ones(4, 2, 3))),
    "l1": autodual.L1(torch.linspace(0.1, 0.4, 4), domain=(0.0, 1.0)),
    "box": autodual.Box(X - 0.1, torch.full((3,), 1.5)),
    "own": Own(torch.linspace(0.1, 0.4, 4)),
}


@pytest.mark.parametrize("index", [[2], [3, 0], [1, 1, 3, 1], [2, 0, 0], []])
@pytest.mark.parametrize("name", TAKEN)
def test_a_region_gives_up_examples(name, index):
    region, index = TAKEN[name], torch.tensor(index, dtype=torch.long)
    taken, chosen = region.take(index, X), X[index]
    v = torch.randn(5, len(index), 2, 3, generator=torch.Generator().manual_seed(1))
    for row, i in enumerate(index.tolist()):
        whole = torch.zeros(5, *X.shape)
        whole[:, i] = v[:, row]
        torch.testing.assert_close(taken.support(chosen, v)[:, row], region.support(X, whole)[:, i])
        torch.testing.assert_close(taken.excess(chosen, v)[:, row], region.excess(X, whole)[:, i])
    for end in ("lower", "upper"):
        torch.testing.assert_close(getattr(taken.hull(chosen), end).expand(chosen.shape), getattr(region.hull(X), end)[index])
    torch.testing.assert_close(taken.center(chosen), region.center(X)[index])
    scales = (part.scale.expand(shape) for part, shape in ((taken.noise(chosen), chosen.shape), (region.noise(X), X.shape)))
    torch.testing.assert_close(next(scales), next(scales)[index])
    again = torch.arange(len(index)).flip(0)
    torch.testing.assert_close(
        taken.take(again, chosen).support(chosen[again], v[:, again]), taken.support(chosen, v)[:, again]
    )


def test_a_chosen_region_knows_membership():
    class Known(Own):
        def contains(self, x, z, tolerance=0.0):
            return ((z - x).flatten(1).abs().sum(1) <= self.size + tolerance) & z.flatten(1).isfinite().all(1)

    index, region = torch.tensor([1, 1, 3]), Known(torch.linspace(0.1, 0.4, 4))
    taken, far = region.take(index, X), X[index].clone()
    far[1] += 1
    assert taken.contains(X[index], far).tolist() == [True, False, True]
    assert repr(taken) == repr(region)


def test_a_class_derived_from_a_ball_is_asked_as_a_whole():
    class Wider(autodual.LInf):
        def hull(self, x):
            return self.box_around(x) if len(x) == 4 else None

    region, index = Wider(0.1, domain=(0.0, 1.0)), torch.tensor([2, 0])
    assert torch.equal(region.take(index, X).hull(X[index]).lower, region.hull(X).lower[index])


def test_nothing_but_lines_depends_on_what_was_taken():
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), X
    net = autodual.certify(model)
    with torch.no_grad():
        run = net._run(net._problem(x, TAKEN["linf, per example"]))
        index = torch.tensor([3, 1, 3])
        for name in run.program.rules:
            hull, part = run.hull(name), run.take(index).hull(name)
            torch.testing.assert_close(part.lower, hull.lower[index])
        _ = run.fork()
        assert not run.lines
