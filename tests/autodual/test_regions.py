"""Regions: supports against solvers and against proofs of optimality, samples, projections, gradients, messages."""

import dataclasses
import math
import pathlib
import re
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

from autodual.errors import SpecificationError
from autodual.regions import L1, L2, Box, LInf, Region

DTYPES = [torch.float32, torch.float64]
BALLS = [LInf, L2, L1]
INF = math.inf


def tolerance(dtype):
    return 1e-9 if dtype == torch.float64 else 2e-5


def make(seed):
    return torch.Generator().manual_seed(seed)


def rows_for(x, rows=6, seed=0):
    """Rows of all kinds: dense, sparse, one coordinate, zero, constant, wide range of magnitudes."""
    g = make(seed)
    v = torch.randn(rows, *x.shape, generator=g, dtype=x.dtype)
    v[1] *= torch.rand(x.shape, generator=g) < 0.5
    v[2] = 0
    v[3] = 0
    v[3].view(len(x), math.prod(x.shape[1:]))[:, :1] = -2
    v[4] = 1
    v[5] *= 10 ** (4 * torch.randn(x.shape, generator=g, dtype=x.dtype))
    return v


def regions_for(x, seed=0):
    """Every built-in region, plain and cut, with every form of radius and domain."""
    g = make(seed)
    per_example = torch.rand(len(x), generator=g, dtype=x.dtype)
    per_coordinate = torch.rand(x.shape[1:], generator=g, dtype=x.dtype)
    low = -torch.rand(x.shape, generator=g, dtype=x.dtype)
    domains = [None, (0.0, 1.0), (0, INF), (-INF, 1.0), (-INF, INF), (x.new_tensor(0.0), torch.ones_like(x)), (low, low + 2)]
    for ball in BALLS:
        for domain in domains:
            yield from (ball(eps, domain=domain) for eps in (0, 0.3, 100.0, per_example, torch.tensor(0.5)))
    yield LInf(per_coordinate)
    yield LInf(torch.zeros_like(per_coordinate), domain=(0.0, 1.0))
    yield LInf(per_coordinate, domain=(0.0, 1.0))
    yield Box(-1.0, 2)
    yield Box(x - per_coordinate, x + 0.5)
    yield Box(x, x)


def inputs(dtype, shape=(3, 2, 3), seed=0):
    """Points of [0, 1] with coordinates at both ends and inside."""
    return (2 * torch.rand(shape, generator=make(seed), dtype=dtype) - 0.5).clamp(0, 1)


def contract(v, z):
    """The inner product of every row and example, for any shape."""
    return (v * z).reshape(*v.shape[:2], math.prod(v.shape[2:])).sum(-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 2, 3), (4, 5), (3,), (2, 1), (0, 3)])
def test_built_in_regions_keep_their_promises(dtype, shape):
    x = inputs(dtype, shape)
    v, generator = rows_for(x), make(1)
    near = 200 * torch.finfo(dtype).eps
    for region in regions_for(x):
        region.validate(x)
        support, excess, center, box = region.support(x, v), region.excess(x, v), region.center(x), region.hull(x)
        assert support.shape == excess.shape == v.shape[:2]
        assert support.dtype == excess.dtype == center.dtype == box.lower.dtype == box.upper.dtype == dtype
        assert center.shape == box.lower.shape == box.upper.shape == x.shape
        assert (excess >= 0).all(), region
        assert (excess[2] == 0).all(), region  # the zero row
        assert (box.lower <= box.upper).all()
        assert region.contains(x, center, near).all()
        allowance = tolerance(dtype) * (1 + contract(v.abs(), 1 + center.abs()))
        assert ((support - contract(v, center) - excess).abs() <= allowance).all()
        for _ in range(3):
            z = region.sample(x, generator)
            assert (z.shape, z.dtype) == (x.shape, dtype)
            assert region.contains(x, z, 100 * near).all(), region
            assert box.contains(z, 100 * near).all()
            assert (contract(v, z) <= support + allowance).all(), region
        if region.symmetric:
            torch.testing.assert_close(region.excess(x, -v), excess)
        if region.separable:
            assert ((contract(v.abs(), box.radius) - excess).abs() <= allowance).all()


@pytest.mark.parametrize("ball", BALLS)
def test_thousands_of_samples_stay_below_the_support_and_come_close(ball):
    x = inputs(torch.float64, (1, 4)).repeat(4000, 1)
    v = torch.randn(8, 1, 4, generator=make(3), dtype=torch.float64).expand(-1, 4000, -1)
    for domain in (None, (0.0, 1.0)):
        region = ball(0.4, domain=domain)
        z = region.sample(x, make(4))
        values, support = (v * z).sum(-1), region.support(x, v)
        assert (values <= support + 1e-12).all()
        assert ((support - values).amin(1) <= 0.1 * region.excess(x, v).amax(1)).all()  # the boundary is visited
        assert region.contains(x, z, 1e-12).all()
        distance = (z - x).norm(p={LInf: INF, L2: 2, L1: 1}[ball], dim=1)
        assert (distance < 0.3).any()


def corner_cases():
    """(v, x, low, high, eps): random small problems with zeros, ties, points on the boundary, infinite ends."""
    rng = np.random.default_rng(0)
    for trial in range(60):
        n = int(rng.integers(1, 6))
        v = rng.normal(size=n) * 10.0 ** rng.integers(-2, 3, size=n if trial % 3 else 1)
        low, high = -rng.random(n), rng.random(n)
        x = low + (high - low) * rng.random(n)
        match trial % 6:
            case 1:
                x = np.where(rng.random(n) < 0.5, low, high)
            case 2:
                v = np.where(rng.random(n) < 0.5, 0, v)
            case 3:
                v = np.sign(v) * 1.5
                low, high = low - high.max() - 1, high + 1
            case 4:
                low, high = np.where(rng.random(n) < 0.5, -INF, low), np.where(rng.random(n) < 0.5, INF, high)
            case 5:
                low = high = x
        yield v, x, low, high, float(rng.choice([0.0, 1e-3, 0.2, 0.7, 5.0]))


def solve(ball, v, x, low, high, eps):
    """The support by a general solver, in terms of d = z - x, both halves of d non-negative."""
    above, below = np.minimum(high - x, eps), np.minimum(x - low, eps)
    if ball is not L2:
        limits = {"A_ub": np.ones((1, 2 * len(v))), "b_ub": [eps]} if ball is L1 else {}
        result = linprog(np.r_[-v, v], bounds=[(0, b) for b in np.r_[above, below]], method="highs", **limits)
        assert result.status == 0
        return v @ x - result.fun
    if eps == 0:
        return v @ x
    size = max(np.abs(v).max(), 1e-9)
    start = np.clip(0.1 * eps * np.sign(v) / math.sqrt(len(v)), -below, above)
    ball_constraint = {"type": "ineq", "fun": lambda d: 1 - (d / eps) @ (d / eps), "jac": lambda d: -2 * d / eps**2}
    best = minimize(
        lambda d: -(v @ d) / (size * eps), start, jac=lambda d: -v / (size * eps), bounds=list(zip(-below, above, strict=True)),
        constraints=[ball_constraint], method="SLSQP", options={"maxiter": 500, "ftol": 1e-13},
    )  # fmt: skip
    return v @ x + v @ best.x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ball", BALLS)
def test_supports_agree_with_general_solvers(ball, dtype):
    for v, x, low, high, eps in corner_cases():
        as_row = partial(torch.tensor, dtype=dtype)
        region = ball(eps, domain=(as_row(low)[None], as_row(high)[None]))
        region.validate(as_row(x)[None])
        found = region.support(as_row(x)[None], as_row(v)[None, None]).item()
        scale = np.abs(v) @ (np.abs(x) + eps) + 1e-3
        assert found == pytest.approx(solve(ball, v, x, low, high, eps), abs=scale * (1e-6 if dtype == torch.float64 else 1e-5))


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("coordinates", [1, 7, 300])
def test_the_gradient_is_a_maximiser_inside_the_region(ball, coordinates):
    """A point of the region that attains the value proves the upper bound exact, to the last digits."""
    x = inputs(torch.float64, (4, coordinates), seed=coordinates)
    eps = torch.tensor([0.05, 0.5, 2.0, 30.0], dtype=torch.float64)
    for domain in ((0.0, 1.0), (-0.25, INF), (-2.0, 1.0), None):
        region = ball(eps, domain=domain)
        v = rows_for(x, rows=8, seed=coordinates)[[0, 1, 2, 3, 5, 6, 7]].requires_grad_()  # without ties
        excess = region.excess(x, v)
        (way,) = torch.autograd.grad(excess.sum(), v)
        for step in way:
            assert region.contains(x, region.center(x) + step, 1e-9).all()
        assert ((excess - (v * way).sum(-1)).abs() <= 1e-9 * (1e-9 + excess)).all()


@pytest.mark.parametrize("ball", BALLS)
def test_gradients_agree_with_finite_differences(ball):
    generator = make(7)
    x = (0.1 + 0.8 * torch.rand(2, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    v = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64).requires_grad_()
    low = torch.full((1, 4), 0.0, dtype=torch.float64, requires_grad=True)
    high = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    for size in (0.13, 0.6, 1.3):
        for eps in (torch.tensor([size, 0.7 * size], dtype=torch.float64), torch.tensor(size, dtype=torch.float64)):
            eps.requires_grad_()
            assert torch.autograd.gradcheck(lambda v, x, eps: ball(eps).excess(x, v), (v, x, eps))
            call = lambda v, x, eps, low, high: ball(eps, domain=(low, high)).excess(x, v)  # noqa: E731
            assert torch.autograd.gradcheck(call, (v, x, eps, low, high))
            assert torch.autograd.gradcheck(lambda v, x, eps: ball(eps, domain=(0.0, 1.0)).support(x, v), (v, x, eps))
            assert torch.autograd.gradcheck(lambda x, eps: ball(eps, domain=(0.0, 1.0)).hull(x).upper, (x, eps))
    radii = torch.rand(4, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, eps: LInf(eps).excess(x, v), (v, radii))
    assert torch.autograd.gradcheck(lambda v, low, high: Box(low, high).support(x, v), (v, low, high))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("domain", [None, (0.0, 1.0), (0.0, INF), (-INF, INF), (0.5, 0.5)])
def test_gradients_are_finite_where_they_are_not_unique(ball, domain, dtype):
    x = torch.tensor([[0.0, 1.0, 0.5], [0.5, 0.5, 0.5]], dtype=dtype)
    x = (x.clamp(0.5, 0.5) if domain == (0.5, 0.5) else x).requires_grad_()
    v = torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 0.0], [1.0, 1.0, 1.0], [-1e-30, 1e15, 1.0]], dtype=dtype)
    v = v[:, None].repeat(1, 2, 1).requires_grad_()
    for radius in (0.0, 0.5, 1e-15, 1e6):
        eps = torch.tensor([radius, radius / 2], dtype=dtype, requires_grad=True)
        excess = ball(eps, domain=domain).excess(x, v)
        assert excess.isfinite().all()
        assert (radius > 0) or (excess == 0).all()
        for gradient in torch.autograd.grad(excess.sum(), (x, v, eps), allow_unused=True):
            assert gradient is None or gradient.isfinite().all()


def test_gradient_in_eps_at_zero_radius_is_the_dual_norm_of_the_free_coordinates():
    x, v = torch.tensor([[0.0, 0.5, 0.5]]), torch.tensor([[[-9.0, 3.0, 4.0]]])
    for ball, expected in ((L2, 5.0), (L1, 4.0)):
        eps = torch.tensor(0.0, requires_grad=True)
        ball(eps, domain=(0.0, 1.0)).excess(x, v).sum().backward()
        assert eps.grad.item() == pytest.approx(expected)


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e25])
def test_tiny_and_huge_rows_keep_their_digits_in_float32(ball, scale):
    x = inputs(torch.float32, (3, 50))
    v = rows_for(x)[:5]
    region = ball(0.7, domain=(0.0, 1.0))
    torch.testing.assert_close(region.excess(x, v * scale) / scale, region.excess(x, v), rtol=1e-5, atol=0)
    exact = region.excess(x.double(), v.double())
    torch.testing.assert_close(region.excess(x, v).double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("region", [ball(0.5, domain=domain) for ball in BALLS for domain in (None, (0.0, 1.0))])
def test_nan_is_never_hidden(region):
    x = torch.tensor([[0.0, 1.0]])
    v = torch.tensor([[[math.nan, 1.0]], [[1.0, math.nan]], [[math.nan, math.nan]]])
    assert region.excess(x, v).isnan().all()
    assert not region.contains(x, torch.tensor([[math.nan, 1.0]]), 1.0).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_hull_is_the_support_of_the_coordinates(dtype):
    x = inputs(dtype)
    for region in regions_for(x):
        default, own = Region.hull(region, x), region.hull(x)
        torch.testing.assert_close(own.lower, default.lower, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)
        torch.testing.assert_close(own.upper, default.upper, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-6)


def test_the_default_hull_works_in_chunks(monkeypatch):
    x, region = inputs(torch.float64), L2(0.3, domain=(0.0, 1.0))
    whole = Region.hull(region, x)
    monkeypatch.setattr("autodual.regions.base._HULL_ELEMENTS", 40)
    assert torch.equal(Region.hull(region, x).upper, whole.upper)
    assert torch.equal(Region.hull(region, x).lower, whole.lower)


@pytest.mark.parametrize("dtype", DTYPES)
def test_projections_land_inside_move_nothing_that_is_inside_and_are_nearest(dtype):
    x, generator = inputs(dtype), make(11)
    near = 1e-5 if dtype == torch.float32 else 1e-10
    for region in regions_for(x):
        z = x + torch.randn(x.shape, generator=generator, dtype=dtype)
        landed = region.project(x, z)
        assert region.contains(x, landed, near).all(), region
        torch.testing.assert_close(region.project(x, landed), landed, rtol=near, atol=near)
        inside = region.sample(x, generator)
        torch.testing.assert_close(region.project(x, inside), inside, rtol=near, atol=near)
        # nearest: no other point of the region lies on the far side of the hyperplane through the landing point
        away = (z - landed)[None]
        product = (away * landed).flatten(2).sum(-1)
        assert (region.support(x, away) <= product + 1e3 * near).all(), region


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_example_alone_is_the_example_in_its_batch(dtype):
    x = inputs(dtype, (5, 40))
    v, eps = rows_for(x), torch.linspace(0.0, 3.0, 5, dtype=dtype)
    for ball in BALLS:
        for domain in (None, (0.0, 1.0)):
            together = ball(eps, domain=domain).excess(x, v)
            for i in range(5):
                alone = ball(eps[i : i + 1], domain=domain).excess(x[i : i + 1], v[:, i : i + 1])
                torch.testing.assert_close(alone[:, 0], together[:, i], rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)


def test_non_contiguous_rows_give_the_same_values():
    x = inputs(torch.float64, (2, 3, 4, 4))
    v = rows_for(x).contiguous()
    strange = v.transpose(2, 4).contiguous().transpose(2, 4)
    for region in regions_for(x):
        torch.testing.assert_close(region.excess(x, strange), region.excess(x, v))


def test_eps_per_example_comes_before_broadcasting():
    x, v = torch.zeros(2, 2), torch.ones(1, 2, 2)
    assert LInf(torch.tensor([1.0, 2.0])).excess(x, v).tolist() == [[2.0, 4.0]]
    assert LInf(torch.tensor([[1.0, 2.0]])).excess(x, v).tolist() == [[3.0, 3.0]]


def test_eps_of_another_dtype_follows_the_input():
    x, v = torch.zeros(2, 2), torch.ones(1, 2, 2)
    for ball in BALLS:
        for domain in (None, (-1.0, 1.0)):
            assert ball(torch.tensor([0.1, 0.2], dtype=torch.float64), domain=domain).excess(x, v).dtype == torch.float32


def test_what_is_symmetric_and_separable():
    assert LInf(0.1).symmetric
    assert LInf(0.1, domain=(0, 1)).symmetric
    assert Box(0, 1).symmetric
    assert LInf(0.1).separable
    assert LInf(0.1, domain=(0, 1)).separable
    assert Box(0, 1).separable
    assert L2(0.1).symmetric
    assert L1(0.1).symmetric
    assert not L2(0.1, domain=(0, 1)).symmetric
    assert not L1(0.1, domain=(0, 1)).symmetric
    assert not L2(0.1).separable
    assert not L1(0.1).separable


def test_regions_are_frozen_values_with_a_readable_form():
    region = L2(0.25, domain=(0.0, 1.0))
    assert repr(region) == "L2(0.25, domain=(0.0, 1.0))"
    assert repr(LInf(torch.tensor([0.1, 0.3]))) == "LInf(tensor of shape (2,), 0.1 to 0.3)"
    assert repr(Box(0.0, torch.tensor(2.0))) == "Box(0.0, 2)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        region.eps = 1.0
    wider = region.with_eps(0.5)
    assert (type(wider), wider.eps, wider.domain, region.eps) == (L2, 0.5, (0.0, 1.0), 0.25)


X = torch.full((2, 3), 0.5)
OUTSIDE = torch.tensor([[0.5, 0.5, 0.5], [0.5, 1.5, 0.5]])
BAD = [
    *[(ball(-0.1), X, "x: eps = -0.1 is negative") for ball in BALLS],
    *[(ball(math.nan), X, "x: eps = nan is NaN") for ball in BALLS],
    (L2(INF), X, "eps = inf is infinite"),
    (L1(torch.tensor([0.1, -1.0])), X, r"eps\[1\] = -1 is negative"),
    (LInf(torch.tensor([[0.1, math.nan, 0.0]])), X, r"eps\[0, 1\] = nan is NaN"),
    (L2(torch.tensor([0.1, 0.2, 0.3])), X, r"eps has shape \(3,\); allowed is a number or one .*, shape \(2,\)$"),
    (LInf(torch.zeros(4)), X, r"eps has shape \(4,\).* broadcasts to \(2, 3\)"),
    (LInf(torch.zeros(1, 1, 1)), X, "eps has shape"),
    (LInf(torch.tensor(1)), X, r"eps has dtype torch.int64: convert to float"),
    (L2("0.1"), X, "eps must be a number or a tensor, got str"),
    (L2(True), X, "eps must be a number or a tensor, got bool"),
    (LInf(torch.zeros(2, device="meta")), X, "eps is on meta but the input is on cpu"),
    (LInf(0.1, domain=1.0), X, "domain must be None or a pair"),
    (LInf(0.1, domain=(0.0, 1.0, 2.0)), X, "domain must be None or a pair"),
    (L2(0.1, domain=(1.0, 0.0)), X, "^x: domain is reversed: 1 > 0$"),
    (LInf(0.1, domain=(torch.tensor([0.0, 2.0, 0.0]), 1.0)), X, r"^x: domain is reversed at \[1\]: 2 > 1$"),
    (L1(0.1, domain=(math.nan, 1.0)), X, "lower end of the domain = nan is not allowed$"),
    (L2(0.1, domain=(torch.zeros(2), 1.0)), X, r"lower end of the domain has shape \(2,\): it does not broadcast to \(2, 3\)"),
    (L2(0.1, domain=(0.0, 1.0)), OUTSIDE, r"x: example 1 lies outside the domain: x\[1, 1\] = 1.5 is not in \[0, 1\]; L2"),
    (L1(9.0, domain=(0.0, 1.0)), OUTSIDE, r"example 1 lies outside the domain"),
    (LInf(0.1, domain=(0.0, 1.0)), OUTSIDE, r"x\[1, 1\] = 1.5 is not in \[0, 1\]; with eps 0.1 the region is infeasible"),
    (LInf(0.1, domain=(-1.0, 0.2)), X, r"example 0 lies outside .* infeasible"),
    (Box(torch.tensor([0.0, 0.7, 0.0]), 0.5), X, r"x: lower is greater than x: upper at \[1\]: 0.7 > 0.5"),
    (Box(-INF, 0.5), X, "lower = -inf is not allowed; unbounded regions are not supported"),
    (Box(0.0, torch.tensor([1.0, math.nan, 1.0])), X, r"upper\[1\] = nan is not allowed$"),
    (Box(torch.zeros(2), 1.0), X, "does not broadcast"),
    (Box(None, 1.0), X, "lower must be a number or a tensor, got NoneType"),
    *[(region, X.long(), r"integer input \(torch.int64\): convert to float") for region in (LInf(1), L2(1), Box(0, 1))],
    (L2(0.1), X.bool(), "bool input"),
    (L2(0.1), [0.5], "expected a tensor, got list"),
    (L2(0.1), torch.tensor(0.5), "no batch axis"),
    (L2(0.1), torch.zeros(2, 0), r"examples of shape \(0,\) have no elements"),
    (Box(0, 1), torch.tensor([[0.0, math.nan]]), r"x: not finite: x\[0, 1\] = nan"),
]


@pytest.mark.parametrize(("region", "x", "message"), BAD, ids=range(len(BAD)))
def test_bad_regions_say_what_is_wrong(region, x, message):
    with pytest.raises(SpecificationError, match=message):
        region.validate(x)


def test_messages_start_with_the_name_of_the_argument():
    with pytest.raises(SpecificationError, match=r"^image: eps"):
        L2(-1.0).validate(X, "image")


@pytest.mark.parametrize("eps", [1e-45, 1.2e-38, 1e-30, 1e-22, 1e-19])
@pytest.mark.parametrize("ball", [L2, L1])
def test_tiny_radii_neither_overflow_nor_vanish(ball, eps):
    x = torch.tensor([[0.5, 0.0, 1.0]])
    v = torch.tensor([[[3.0, -4.0, 0.0]], [[3e3, 4e3, -1.0]]]).requires_grad_()
    eps = torch.tensor(eps).requires_grad_()
    excess = ball(eps, domain=(0.0, 1.0)).excess(x, v)
    free = v.detach().clone()
    free[0, 0, 1] = 0  # no room below the second coordinate
    exact = eps.detach().double() * torch.linalg.vector_norm(free.double(), 2 if ball is L2 else math.inf, dim=-1)
    torch.testing.assert_close(excess.detach().double(), exact, rtol=1e-5, atol=2e-45 * 3e3)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(excess.sum(), (v, eps)))


@pytest.mark.parametrize("region", [LInf(0.0, domain=(0.0, 1.0)), L2(0.1, domain=(0.0, 1.0)), L1(0.1, domain=(0.0, 1.0))])
def test_rounding_outside_the_domain_is_forgiven(region):
    x = torch.tensor([[1 + 5e-7, -5e-7]], dtype=torch.float64)
    region.validate(x)
    box, default = region.hull(x), Region.hull(region, x)
    torch.testing.assert_close(
        torch.stack([box.lower, box.upper]), torch.stack([default.lower, default.upper]), rtol=0, atol=1e-12
    )
    assert (box.lower <= box.upper).all()
    assert (box.lower >= 0).all()
    assert (box.upper <= 1).all()
    assert (region.excess(x, torch.randn(5, 1, 2, generator=make(0), dtype=x.dtype)) >= 0).all()
    assert region.contains(x, region.center(x)).all()


def test_ends_of_a_box_may_cross_by_rounding():
    region = Box(torch.tensor([0.5 + 1e-7]), 0.5)
    region.validate(X)
    assert (region.hull(X).lower <= region.hull(X).upper).all()
    assert (region.excess(X, torch.ones(1, 2, 3)) >= 0).all()


def test_an_empty_batch_gives_empty_answers():
    x = torch.zeros(0, 2, 3)
    for region in [*(ball(0.1, domain=domain) for ball in BALLS for domain in (None, (0, 1))), Box(0, 1)]:
        region.validate(x)
        assert region.excess(x, torch.zeros(4, 0, 2, 3)).shape == (4, 0)
        assert region.hull(x).lower.shape == region.sample(x).shape == region.project(x, x).shape == x.shape
        assert region.contains(x, x).shape == (0,)
        assert Region.hull(region, x).lower.shape == x.shape


class Ellipsoid(Region):
    """|| (z - x) / axes ||_2 <= 1, given by its support alone."""

    def __init__(self, axes):
        self.axes = axes

    def support(self, x, v):
        return (v * x).flatten(2).sum(-1) + (v * self.axes).flatten(2).norm(dim=-1)


class Patch(Region):
    """Anything in [0, 1] in the first ``size`` columns of an image, nothing elsewhere."""

    def __init__(self, size):
        self.size = size

    def support(self, x, v):
        patch, rest = v[..., : self.size], v[..., self.size :]
        return patch.clamp(min=0).flatten(2).sum(-1) + (rest * x[..., self.size :]).flatten(2).sum(-1)


def test_a_region_of_ones_own_needs_its_support_only():
    axes = torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64)
    x = inputs(torch.float64, (2, 3))
    region, v = Ellipsoid(axes), rows_for(x)
    region.validate(x)
    assert not region.symmetric
    assert not region.separable
    torch.testing.assert_close(region.excess(x, v), (v * axes).norm(dim=-1), rtol=1e-6, atol=1e-9)
    assert torch.equal(region.center(x), x)
    torch.testing.assert_close(region.hull(x).upper, x + axes)
    torch.testing.assert_close(region.hull(x).lower, x - axes)
    with pytest.raises(SpecificationError, match="not finite"):
        region.validate(torch.tensor([[math.inf]]))


def test_the_default_excess_of_a_region_that_is_not_centred_is_never_negative():
    x = inputs(torch.float64, (2, 1, 3, 4))
    region, v = Patch(2), rows_for(x)
    assert (region.excess(x, v) >= 0).all()
    box = region.hull(x)
    assert (box.lower[..., :2] == 0).all()
    assert (box.upper[..., :2] == 1).all()
    assert torch.equal(box.lower[..., 2:], x[..., 2:])
    assert torch.equal(box.upper[..., 2:], x[..., 2:])


class Given(Region):
    """A region with the support that a test hands in."""

    def __init__(self, support, radius=0.5):
        self.function, self.radius, self._hidden = support, radius, 3

    def support(self, x, v):
        return self.function(x, v)


WRONG = {
    "no tensor": (lambda x, v: 1.0, r"x: Given\.support must return a tensor \(rows, batch\), here \(4, 2\), got float"),
    "axes swapped": (lambda x, v: (v * x).sum(-1).T, r"x: Given\.support must have shape .*\(4, 2\), got \(2, 4\)"),
    "features left": (lambda x, v: v * x, r"got \(4, 2, 3\)"),
    "unbounded": (lambda x, v: (v.relu() * INF).nan_to_num(0.0, INF).sum(-1), r"Given\.support is inf for example 0"),
    "NaN": (lambda x, v: v.sum(-1) * math.nan, r"Given\.support is nan for example 0"),
    "too small": (lambda x, v: (v * x).sum(-1) - 0.1 * v.norm(dim=-1), r"Given\.support\(x, v\) .* = -0\.2 .* never negative"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_support_that_cannot_be_one_is_refused(wrong):
    function, message = WRONG[wrong]
    with pytest.raises(SpecificationError, match=message):
        Given(function).validate(X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_point_is_a_region_in_every_dtype(dtype):
    state = torch.get_rng_state()
    far = 1000 * torch.randn(300, generator=make(0)).to(dtype)
    Given(lambda x, v: (v * x).sum(-1)).validate(far.expand(2, -1))
    Given(lambda x, v: (v * far).sum(-1)).validate(torch.zeros(2, 300, dtype=dtype))
    Given(lambda x, v: v * x + v.abs()).validate(torch.ones(3, dtype=dtype))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_region_of_ones_own_has_a_readable_form():
    assert repr(Ellipsoid(torch.tensor([0.5, 2.0]))) == "Ellipsoid(axes=tensor of shape (2,), 0.5 to 2)"
    assert repr(Given(None, radius=(1, torch.tensor(0.25)))) == "Given(radius=(1, 0.25))"
    assert repr(Given(None, torch.tensor([1 + 1j]))) == "Given(radius=tensor of shape (1,))"
    assert repr(Given(None, torch.zeros(2, device="meta"))) == "Given(radius=tensor of shape (2,))"


@pytest.mark.parametrize(("method", "arguments"), [("sample", 1), ("project", 2), ("contains", 2)])
def test_what_a_region_of_ones_own_lacks_is_named(method, arguments):
    with pytest.raises(NotImplementedError, match=rf"define Patch\.{method}\("):
        getattr(Patch(1), method)(*[X] * arguments)


def test_the_guide_runs_as_printed(capsys):
    guide = (pathlib.Path(__file__).parents[2] / "docs" / "regions.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(block, names)
    assert "upper=tensor([[0.1000, 0.2000, 0.0000]])" in capsys.readouterr().out
    x = inputs(torch.float32, (2, 1, 3, 3))
    mask = torch.arange(3) < 2
    box = names["Patch"](mask).hull(x)
    assert (box.upper[..., :2] == 1).all()
    assert torch.equal(box.upper[..., 2:], x[..., 2:])
