"""Losses: bounds of what they claim to bound, equal to each other where they must be, differentiable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autodual
from autodual import attacks
from autodual.bounds import relaxed_rows
from autodual.errors import SpecificationError
from autodual.losses import (
    LOSSES,
    CCIBPLoss,
    CROWNIBPLoss,
    EnvelopeLoss,
    FGSMLoss,
    IntervalLoss,
    MTLIBPLoss,
    PGDLoss,
    RobustLoss,
    SABRLoss,
    TRADESLoss,
)
from autodual.losses.mixed import small_box
from autodual.losses.regularizers import interval_regularizer
from dual_layers import Interval
from tests.reference.networks import NETWORKS, random_network

CROWN_IBP = (autodual.Dual(intermediate="interval"), autodual.Adaptive(intermediate="interval"))


def problem(kind: str = "mlp", seed: int = 0, batch: int = 5) -> tuple[autodual.BoundModule, Tensor, Tensor]:
    model, shape = random_network(kind, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, *shape, generator=generator, dtype=torch.float64)
    return autodual.certify(model), x, torch.randint(3, (batch,), generator=generator)


class Curved(nn.Module):
    """Products, a smooth function, a maximum and a composite operator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.first(x)) * torch.sigmoid(self.gate(x))
        return self.head(F.max_pool1d(F.layer_norm(z, (8,))[:, None], 2)[:, 0])


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(
    "region",
    [autodual.LInf(0.1), autodual.LInf(0.1, domain=(0.0, 1.0)), autodual.L2(0.2), autodual.L2(0.4, domain=(0.0, 1.0))],
    ids=str,
)
@pytest.mark.parametrize("method", ["interval", "dual", *CROWN_IBP], ids=str)
def test_a_loss_has_the_margins_of_a_claim(kind: str, region: autodual.Region, method: autodual.methods.Method) -> None:
    net, x, y = problem(kind)
    found, claimed = net.loss_bounds(x, y, region).margins(method), net.margins(x, y, region, method)
    torch.testing.assert_close(found, claimed, rtol=1e-9, atol=1e-9)
    assert (found.gather(1, y[:, None]) == 0).all()


@pytest.mark.parametrize("method", ["interval", *CROWN_IBP], ids=str)
def test_curved_networks(method: autodual.methods.Method) -> None:
    torch.manual_seed(0)
    net, x, y = autodual.certify(Curved().double()), torch.rand(4, 6).double(), torch.tensor([0, 1, 2, 0])
    region = autodual.LInf(0.05)
    found = net.loss_bounds(x, y, region).margins(method)
    torch.testing.assert_close(found, net.margins(x, y, region, method), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", NETWORKS)
def test_one_walk_over_interval_boxes_is_sound_and_better_than_none(kind: str) -> None:
    for seed in range(3):
        net, x, y = problem(kind, seed)
        region = autodual.LInf(0.2)
        crown_ibp = net.margins(x, y, region, CROWN_IBP[1])
        assert crown_ibp.mean() > net.margins(x, y, region, "interval").mean()
        points = torch.stack([region.sample(x) for _ in range(300)])
        with torch.no_grad():
            scores = torch.stack([net(point) for point in points])
        margins = (scores.gather(2, y[None, :, None].expand(300, -1, 1)) - scores).amin(0)
        assert (crown_ibp <= margins + 1e-9).all()


def test_one_walk_is_the_adaptive_bound_behind_one_hidden_layer() -> None:
    torch.manual_seed(0)
    net = autodual.certify(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)).double())
    x, y = torch.rand(3, 4).double(), torch.tensor([0, 1, 2])
    for one, whole in zip(CROWN_IBP, ("dual", "adaptive"), strict=True):
        torch.testing.assert_close(net.margins(x, y, autodual.LInf(0.3), one), net.margins(x, y, autodual.LInf(0.3), whole))


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    net, x, y = problem("convolutional", seed=1)
    loss = LOSSES[name](net)
    parameter = net.model.second.weight

    def value() -> Tensor:
        torch.manual_seed(0)  # random starts
        return loss(x, y, autodual.LInf(0.02))

    (gradient,) = torch.autograd.grad(value(), parameter)
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ends = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            parameter.add_(step * direction)
            ends.append(value())
    expected = (ends[0] - ends[1]) / 2e-6
    if name in ("fgsm", "pgd", "trades", "sabr", "mtl-ibp", "cc-ibp"):  # what is attacked moves too, which no gradient sees
        assert abs((gradient * direction).sum() - expected) < 0.05 * gradient.norm() * direction.norm()
    else:
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-5, atol=1e-7)


def test_parts_without_weight_are_left_out() -> None:
    net, x, y = problem()
    region = autodual.LInf(0.1)
    clean, interval, attacked = F.cross_entropy(net(x), y), IntervalLoss(net)(x, y, region), PGDLoss(net)(x, y, region)
    torch.testing.assert_close(IntervalLoss(net)(x, y, region, kappa=1.0), clean)
    torch.testing.assert_close(RobustLoss(net, "interval")(x, y, region), interval)
    torch.testing.assert_close(CROWNIBPLoss(net)(x, y, region, beta=0.0), interval)
    torch.testing.assert_close(SABRLoss(net)(x, y, region, shrink=1.0), interval)
    torch.testing.assert_close(SABRLoss(net)(x, y, region, shrink=0.0), attacked)
    torch.testing.assert_close(TRADESLoss(net)(x, y, region, weight=0.0), clean)
    torch.testing.assert_close(EnvelopeLoss(net)(x, y, region, weight=0.0), clean)
    for mixture in (MTLIBPLoss(net), CCIBPLoss(net)):
        torch.testing.assert_close(mixture(x, y, region, alpha=1.0), interval)
        torch.testing.assert_close(mixture(x, y, region, alpha=0.0), attacked)


def test_mixtures_lie_between_their_parts() -> None:
    net, x, y = problem()
    region = autodual.LInf(0.1)
    interval, attacked = IntervalLoss(net)(x, y, region), PGDLoss(net)(x, y, region)
    torch.testing.assert_close(MTLIBPLoss(net, alpha=0.3)(x, y, region), 0.7 * attacked + 0.3 * interval)
    convex = CCIBPLoss(net, alpha=0.3)(x, y, region)  # of a convex function: below the mean of its ends
    assert attacked < convex < 0.7 * attacked + 0.3 * interval
    small = SABRLoss(net, shrink=0.3)(x, y, region)
    assert attacked < small < interval


def test_the_hinge_bounds_the_zero_one_loss() -> None:
    net, x, y = problem("residual")
    region = autodual.LInf(0.05)
    losses = RobustLoss(net, reduction="none", objective="hinge")(x, y, region)
    certified = net.verify(x, y, region).certified
    assert (losses >= (~certified).double()).all()
    assert ((losses == 0) <= certified).all()
    others = net.margins(x, y, region).scatter(1, y[:, None], torch.inf).amin(1)
    torch.testing.assert_close(losses, (1 - others).clamp(min=0))


@pytest.mark.parametrize("domain", [None, (0.0, 1.0)])
def test_small_boxes_lie_in_the_region_around_the_point(domain: tuple[float, float] | None) -> None:
    region, x = autodual.LInf(0.2, domain=domain), torch.rand(4, 7, generator=torch.Generator().manual_seed(0))
    hull, around = region.hull(x), region.sample(x)
    small = small_box(region, x, around, 0.3)
    assert (small.lower >= hull.lower).all()
    assert (small.upper <= hull.upper).all()
    torch.testing.assert_close(small.upper - small.lower, 0.3 * (hull.upper - hull.lower))
    inner = (around > hull.lower + 0.15 * (hull.upper - hull.lower)) & (around < hull.upper - 0.15 * (hull.upper - hull.lower))
    torch.testing.assert_close((0.5 * (small.lower + small.upper))[inner], around[inner])
    with pytest.raises(SpecificationError, match="box-shaped"):
        small_box(autodual.L2(0.2), x, around, 0.3)


def test_planes_of_a_linear_model_are_as_far_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    net, x = autodual.certify(model), torch.randn(6, 4).double()
    y = model(x).argmax(1)
    scores = model(x)
    for eps, region, order in ((0.3, autodual.LInf(0.3), 1), (0.5, autodual.L2(0.5), 2)):
        found = net.loss_bounds(x, y, region).distances(autodual.Dual())
        for example, label in enumerate(y.tolist()):
            others = [k for k in range(3) if k != label]
            for rival, k in enumerate(others):
                normal = model.weight[label] - model.weight[k]
                distance = (scores[example, label] - scores[example, k]) / normal.norm(order)  # to the plane, in the norm's own
                torch.testing.assert_close(found[example, rival], distance / eps)


def test_envelope_asks_nothing_of_planes_beyond_the_region() -> None:
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    net, x, y = autodual.certify(model), torch.tensor([[1.0, 0.0]]).double(), torch.tensor([0])
    clean = F.cross_entropy(model(x), y)
    for eps, penalty in ((0.4, 0.0), (0.5, 0.0), (1.0, 0.5), (2.0, 0.75)):  # the plane is 0.5 away
        torch.testing.assert_close(EnvelopeLoss(net)(x, y, autodual.LInf(eps)), clean + penalty)


def test_regularizer_by_hand() -> None:
    x = torch.zeros(1, 2)
    wide = Interval(torch.tensor([[-4.0, 2.0]]), torch.tensor([[4.0, 10.0]]))  # widths 8; one unit on, at 6, none off
    # Input width 2, so 2 / 8 falls short of 0.5 by a half; both ratios are 0 and fall short wholly.
    torch.testing.assert_close(interval_regularizer([wide], autodual.LInf(1.0), x), torch.tensor(0.5 + 1 + 1))
    balanced = Interval(torch.tensor([[1.0, -3.0]]), torch.tensor([[3.0, -1.0]]))  # as wide as the input, at 2 and -2
    torch.testing.assert_close(interval_regularizer([balanced], autodual.LInf(1.0), x), torch.tensor(0.0))
    torch.testing.assert_close(interval_regularizer([wide, balanced], autodual.LInf(1.0), x), torch.tensor(1.25))


def test_attacks_inside_losses_stay_in_the_region() -> None:
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    model = Watching()
    net, x, y = autodual.certify(model), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])
    region = autodual.LInf(0.1, domain=(0.0, 1.0))
    model.linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    FGSMLoss(net)(x, y, region)
    PGDLoss(net)(x, y, region)
    TRADESLoss(net)(x, y, region)
    assert len(seen) > 10
    for point in seen:
        assert region.contains(x, point).all()
    assert any(((point - x).abs() > 0.09).any() for point in seen)


def test_attacks_inside_losses_make_them_larger() -> None:
    net, x, y = problem("residual")
    region = autodual.LInf(0.1)
    clean = F.cross_entropy(net(x), y)
    assert PGDLoss(net)(x, y, region) > clean
    assert TRADESLoss(net)(x, y, region) > clean
    assert (attacks.pgd(net.model, x, y, region) - x).abs().max() <= 0.1 + 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_batch_statistics_move_once_for_bounds(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    net, x, y = autodual.certify(model.train()), torch.randn(8, 4), torch.randint(3, (8,))
    loss = LOSSES[name](net)
    before = model[1].num_batches_tracked.item()
    loss(x, y, autodual.LInf(0.1)).backward()
    assert model.training
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())
    # One ordinary forward pass at x or at the attacked point for each part of the loss; attacks themselves move nothing.
    assert 1 <= model[1].num_batches_tracked.item() - before <= 2


def test_losses_say_what_is_wrong() -> None:
    net, x, y = problem()
    region = autodual.LInf(0.1)
    with pytest.raises(SpecificationError, match="IntervalLoss has no number 'kapa'; it has: kappa, regularize"):
        IntervalLoss(net)(x, y, region, kapa=1.0)
    with pytest.raises(SpecificationError, match="must be a number of at least 0, got nan"):
        IntervalLoss(net, kappa=float("nan"))
    with pytest.raises(SpecificationError, match="kappa is a share"):
        IntervalLoss(net)(x, y, region, kappa=1.5)
    with pytest.raises(SpecificationError, match="reduction must be"):
        RobustLoss(net, reduction="average")
    with pytest.raises(SpecificationError, match="objective must be"):
        RobustLoss(net, objective="squared")
    with pytest.raises(SpecificationError, match="steps must be"):
        SABRLoss(net, steps=0)
    with pytest.raises(SpecificationError, match="labels"):
        IntervalLoss(net)(x, y.double(), region)
    with pytest.raises(SpecificationError, match="needs lines"):
        net.loss_bounds(x, y, region).distances("interval")


def test_a_region_that_leaves_a_domain_makes_the_loss_infinite() -> None:
    class Logarithm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.log(x))

    net, x, y = autodual.certify(Logarithm()), torch.full((2, 3), 0.5), torch.tensor([0, 1])
    assert IntervalLoss(net)(x, y, autodual.LInf(0.1)).isfinite()
    losses = IntervalLoss(net, reduction="none")(x, y, autodual.LInf(torch.tensor([0.1, 0.6])))
    assert losses.isfinite().tolist() == [True, False]


def test_a_model_that_broke_in_training_is_named() -> None:
    net, x, y = problem()
    loss = IntervalLoss(net)
    loss(x, y, autodual.LInf(0.1))
    with torch.no_grad():
        net.model.second.weight[0, 0] = torch.nan
    with pytest.raises(SpecificationError, match=r"second\.weight"):
        loss(x, y, autodual.LInf(0.1))


def test_reductions_and_empty_batches() -> None:
    net, x, y = problem()
    region = autodual.LInf(0.1)
    each = IntervalLoss(net, reduction="none")(x, y, region)
    assert each.shape == (5,)
    torch.testing.assert_close(IntervalLoss(net)(x, y, region), each.mean())
    torch.testing.assert_close(IntervalLoss(net, reduction="sum")(x, y, region), each.sum())
    alone = torch.cat([IntervalLoss(net, reduction="none")(x[i : i + 1], y[i : i + 1], region) for i in range(5)])
    torch.testing.assert_close(alone, each)
    assert IntervalLoss(net, reduction="sum")(x[:0], y[:0], region) == 0


@pytest.mark.parametrize("method", [*CROWN_IBP, autodual.Projected(r=20, seed=1)], ids=str)
def test_only_the_worst_rivals_are_walked(method: autodual.methods.Method) -> None:
    net, x, y = problem("convolutional", batch=6)
    bounds = net.loss_bounds(x, y, autodual.LInf(0.1))
    interval, every = bounds.margins("interval"), bounds.margins(method)
    one = bounds.margins(method, rivals=1)
    worst = interval.scatter(1, y[:, None], torch.inf).argmin(1)
    assert torch.allclose(one.gather(1, worst[:, None]), every.gather(1, worst[:, None]))
    rest = F.one_hot(worst, 3) == 0
    assert torch.equal(one[rest], interval[rest])
    assert not torch.allclose(one, interval)
    assert torch.equal(bounds.margins(method, rivals=2), every)
    with pytest.raises(SpecificationError, match="rivals must be a positive number of classes, got 0"):
        bounds.margins(method, rivals=0)


def test_a_loss_of_the_worst_rivals_trains_the_same_parameters() -> None:
    net, x, y = problem("convolutional", batch=6)
    loss = CROWNIBPLoss(net, CROWN_IBP[0], rivals=1, beta=0.5)
    value = loss(x, y, autodual.LInf(0.1))
    interval, full = (kind(x, y, autodual.LInf(0.1)) for kind in (IntervalLoss(net), CROWNIBPLoss(net, CROWN_IBP[0])))
    assert min(interval, full) < value < max(interval, full)
    value.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in net.model.parameters())


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("region", [autodual.LInf(0.15, domain=(0.0, 1.0)), autodual.L2(0.4, domain=(0.0, 1.0))], ids=str)
@pytest.mark.parametrize("method", ["interval", "dual", *CROWN_IBP], ids=str)
def test_the_fused_loss_bounds_the_worst_cross_entropy(
    kind: str, region: autodual.Region, method: autodual.methods.Method
) -> None:
    net, x, y = problem(kind)
    fused = RobustLoss(net, method, reduction="none", objective="fused")(x, y, region)
    with torch.no_grad():
        tried = [attacks.pgd(net.model, x, y, region), *(region.sample(x) for _ in range(200))]
        worst = torch.stack([F.cross_entropy(net(point), y, reduction="none") for point in tried]).amax(0)
    assert (fused >= worst - 1e-9).all()
    assert (fused <= IntervalLoss(net, reduction="none")(x, y, region) + 1e-9).all()
    torch.testing.assert_close(
        RobustLoss(net, method, objective="fused")(x, y, autodual.LInf(1e-9)), F.cross_entropy(net(x), y), rtol=1e-6, atol=1e-6
    )


def test_the_fused_loss_of_a_linear_model_is_close_to_its_worst() -> None:
    """Chords over short intervals are nearly tangents; margins bounded one by one are attained at different points."""
    torch.manual_seed(0)
    model = nn.Linear(5, 4).double()
    net, x, y, region = autodual.certify(model), torch.rand(6, 5).double(), torch.arange(6) % 4, autodual.LInf(0.3)
    corners = x[:, None] + 0.3 * torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 5)
    scores = model(corners)
    worst = F.cross_entropy(scores.flatten(0, 1), y.repeat_interleave(32), reduction="none").view(6, 32).amax(1)  # convex
    fused = RobustLoss(net, reduction="none", objective="fused")(x, y, region)
    one_by_one = RobustLoss(net, reduction="none")(x, y, region)
    assert (worst <= fused).all()
    assert (fused < one_by_one).all()
    assert (fused - worst).mean() < 0.5 * (one_by_one - worst).mean()


def test_the_fused_loss_keeps_large_scores_finite_and_has_derivatives() -> None:
    net, x, y = problem("convolutional", seed=1)
    parameter = net.model.second.weight
    loss = CROWNIBPLoss(net, CROWN_IBP[0], objective="fused", beta=0.6)
    (gradient,) = torch.autograd.grad(loss(x, y, autodual.LInf(0.05)), parameter)
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ends = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            parameter.add_(step * direction)
            ends.append(loss(x, y, autodual.LInf(0.05)))
        parameter.mul_(3e4)
    torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7)
    value = CROWNIBPLoss(net, CROWN_IBP[0], objective="fused")(x, y, autodual.LInf(2.0))
    assert 1e4 < value < torch.inf
    assert torch.autograd.grad(value, parameter)[0].isfinite().all()
    with pytest.raises(SpecificationError, match="rivals must be None, got 3"):
        RobustLoss(net, objective="fused", rivals=3)


def test_large_scores_over_a_point_lose_nothing_to_cancellation() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    with torch.no_grad():
        model.weight.mul_(1e8)
    net, x, y = autodual.certify(model), torch.rand(50, 8), torch.randint(4, (50,))
    loss = RobustLoss(net, objective="fused")(x, y, autodual.LInf(0.0))
    torch.testing.assert_close(loss, F.cross_entropy(model(x), y), rtol=1e-4, atol=1.0)


class Cut(autodual.Region):
    """Support of a ball, hull cut at 0 and 1: sound and symmetric, yet the hull's middle is not the centre."""

    symmetric = True

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def support(self, x: Tensor, v: Tensor) -> Tensor:
        return (v * x).flatten(2).sum(-1) + self.excess(x, v)

    def excess(self, x: Tensor, v: Tensor) -> Tensor:
        return self.eps * v.flatten(2).norm(dim=-1)

    def hull(self, x: Tensor) -> Interval:
        return Interval((x - self.eps).clamp(0, 1), (x + self.eps).clamp(0, 1))


def test_boxes_whose_middle_is_not_the_centre_are_no_reference() -> None:
    net, x, y = problem("mlp")
    x = x.round()
    for method in CROWN_IBP:
        found, claimed = net.loss_bounds(x, y, Cut(0.3)).margins(method), net.margins(x, y, Cut(0.3), method)
        torch.testing.assert_close(found, claimed, rtol=1e-9, atol=1e-9)


def test_a_constant_output_has_a_loss() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

        def forward(self, x: Tensor) -> Tensor:
            return self.scores.expand(x.shape[0], 3)

    model = Constant()
    net, x, y = autodual.certify(model), torch.rand(2, 4), torch.tensor([0, 2])
    expected = F.cross_entropy(model(x), y)
    for loss in (CROWNIBPLoss(net), CROWNIBPLoss(net, objective="fused"), RobustLoss(net, objective="fused")):
        torch.testing.assert_close(loss(x, y, autodual.LInf(0.1)), expected)


@pytest.mark.parametrize("objective", ["cross-entropy", "fused"])
def test_mixtures_with_an_infinite_part_are_infinite(objective: str) -> None:
    class Reciprocal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(1 / x)

    net, x, y = autodual.certify(Reciprocal()), torch.tensor([[0.5] * 3, [0.05] * 3]), torch.tensor([0, 1])
    for weights in ({"beta": 0.5}, {"beta": 1.0, "kappa": 0.3}, {"beta": 0.7, "kappa": 0.8}):
        losses = CROWNIBPLoss(net, reduction="none", objective=objective, **weights)(x, y, autodual.LInf(0.1))
        assert losses[0].isfinite()
        assert losses[1] == torch.inf


@pytest.mark.parametrize("two_slopes", [False, True])
def test_rows_through_lines_at_once_are_what_plain_operators_give(two_slopes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaxed_rows, "_CHUNK", 300)  # examples in several parts
    generator = torch.Generator().manual_seed(0)
    nu = torch.randn(3, 5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    lower, upper, shift, spread = (
        torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(4)
    )
    slopes = (lower, upper if two_slopes else None)
    pulled, shifted, spreaded = relaxed_rows.RelaxedRows.apply(nu, *slopes, shift, spread)
    steep = torch.where(nu > 0, lower, upper) if two_slopes else lower
    assert torch.allclose(pulled, nu * steep)
    assert torch.allclose(shifted, (nu * shift).sum(-1))
    assert torch.allclose(spreaded, (nu.abs() * spread).sum(-1))
    assert torch.autograd.gradcheck(relaxed_rows.RelaxedRows.apply, (nu, *slopes, shift, spread))


@pytest.mark.parametrize("examples", [1, 5])
def test_random_rows_through_lines_at_once_are_what_plain_operators_give(examples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, slope, noise, spread = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, examples, 7), (5, 7), (3, 1, 7), (5, 7))
    )
    differentiable = [part.requires_grad_() for part in (rows, slope, spread)]

    def pushed(rows: torch.Tensor, slope: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
        return relaxed_rows.NoisyRows.apply(rows, slope, noise, spread)

    assert torch.allclose(pushed(*differentiable), rows * slope + noise * spread)
    assert torch.autograd.gradcheck(pushed, differentiable)


def test_rows_through_slopes_that_are_far_apart_lose_nothing() -> None:
    nu = torch.tensor([[[3.0, -3.0]]])
    steep, flat = torch.tensor([[1e9, 1e9]]), torch.tensor([[0.1, 0.1]])
    zero = torch.zeros(1, 2)
    for lower, upper in ((flat, steep), (steep, flat)):
        pulled, *_ = relaxed_rows.RelaxedRows.apply(nu, lower, upper, zero, zero)
        assert torch.equal(pulled[0], nu[0] * torch.where(nu[0] > 0, lower, upper))


def test_a_learned_slope_has_its_derivative_through_the_lines() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 3)).double()
    net, x, y, region = autodual.certify(model), torch.rand(3, 4).double(), torch.tensor([0, 1, 2]), autodual.LInf(0.3)
    weight = model[1].weight
    for method in CROWN_IBP:
        (gradient,) = torch.autograd.grad(net.loss_bounds(x, y, region).margins(method).sum(), weight)
        for channel in range(6):
            ends = []
            with torch.no_grad():
                for step in (1e-6, -2e-6):
                    weight[channel] += step
                    ends.append(net.loss_bounds(x, y, region).margins(method).sum())
                weight[channel] += 1e-6
            assert abs(gradient[channel] - (ends[0] - ends[1]) / 2e-6) < 1e-6
        assert (gradient != 0).any()
