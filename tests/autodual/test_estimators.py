"""Readings of a scale off stable samples: against simulation, scipy's distributions, sorting and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from autodual import estimators
from autodual.estimators import BOUNDING, GeometricMean, OrderStatistic, RootMeanSquare, cauchy_reading, normal_reading

RUNS = 20_000


def cauchy(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_cauchy(shape))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def read(reading, samples: torch.Tensor) -> torch.Tensor:
    reduction, factor = reading
    reduction.add(reduction.digest(samples))
    return factor * reduction.value()


@pytest.mark.parametrize("r", [4, 5, 10, 11, 50, 200])
@pytest.mark.parametrize("estimator", ["median", "log-mean"])
def test_estimates_have_no_bias(estimator, r):
    values = read(cauchy_reading(estimator, r, 0.0), 3.0 * cauchy(r, RUNS))
    error = values.std() / math.sqrt(RUNS)
    assert abs(values.mean() - 3.0) < 5 * error
    assert error < 0.05


@pytest.mark.parametrize("r", [1, 3, 10, 200])
def test_the_root_mean_square_has_no_bias(r):
    values = read(normal_reading("median", r, 0.0), 3.0 * normal(r, RUNS))
    assert abs(values.mean() - 3.0) < 5 * values.std() / math.sqrt(RUNS)


@pytest.mark.parametrize("r", [3, 10, 51, 400])
def test_the_mean_of_the_median_is_that_of_an_order_statistic(r):
    rank = estimators.median_rank(r)
    beta = stats.beta(rank, r - rank + 1)
    expected = beta.expect(lambda u: math.tan(math.pi * u / 2), epsabs=1e-12)
    assert estimators.median_mean(r) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("r", "delta"), [(1, 0.3), (20, 0.05), (50, 0.01), (200, 6e-10), (2000, 1e-12)])
def test_the_order_statistic_has_the_stated_tail(r, delta):
    rank, factor = estimators.order_factor(r, delta)
    below = 2 / math.pi * math.atan(1 / factor)
    assert stats.binom.sf(rank - 1, r, below) == pytest.approx(delta, rel=1e-6)
    assert stats.binom.sf(rank - 1, r, below) <= delta * (1 + 1e-9)


@pytest.mark.parametrize(("r", "delta"), [(1, 0.3), (20, 0.05), (50, 0.2)])
@pytest.mark.parametrize("estimator", BOUNDING)
def test_bounds_fail_no_more_often_than_stated(estimator, r, delta):
    failures = int((read(cauchy_reading(estimator, r, delta), cauchy(r, RUNS)) < 1).sum())
    assert failures <= stats.binom.ppf(1 - 1e-6, RUNS, delta)
    if estimator == "order":
        assert failures >= stats.binom.ppf(1e-6, RUNS, delta)  # its tail is exact


@pytest.mark.parametrize(("r", "delta"), [(1, 0.3), (20, 0.05), (200, 6e-10)])
def test_bounds_for_normal_samples_lie_above_the_exact_ones(r, delta):
    exact = math.sqrt(r / stats.chi2.ppf(delta, r))
    assert exact <= estimators.normal_factor(r, delta) < 3 * exact
    failures = int((read(normal_reading("order", r, delta), normal(r, RUNS)) < 1).sum())
    assert failures <= stats.binom.ppf(1 - 1e-6, RUNS, delta)


def test_the_tightest_bound_is_one_of_the_two():
    for r, delta in ((20, 0.05), (200, 6e-10), (2000, 1e-12)):
        chosen = estimators.tightest(r, delta)
        values = {kind: read(cauchy_reading(kind, r, delta), cauchy(r, 500)).median() for kind in BOUNDING}
        assert values["tightest"] == values[chosen]
        assert values["tightest"] <= 1.02 * min(values.values())


def test_more_samples_bring_bounds_closer():
    for factor in (estimators.geometric_factor, estimators.normal_factor):
        factors = [factor(r, 1e-6) for r in (20, 100, 1000, 10000)]
        assert factors == sorted(factors, reverse=True)
        assert 1 < factors[-1] < 1.2


@pytest.mark.parametrize("rank", [1, 4, 7])
@pytest.mark.parametrize("parts", [1, 3])
def test_order_statistics_are_those_of_a_sort(rank, parts, dtype, device):
    samples = cauchy(7, 3, 5).to(device, dtype)
    reduction = OrderStatistic(rank)
    for part in samples.chunk(parts):
        reduction.add(reduction.digest(part))
    assert torch.equal(reduction.value(), samples.abs().sort(0).values[rank - 1])


@pytest.mark.parametrize("r", [1, 2, 3, 5, 8, 10, 13, 32, 33])
def test_every_rank_is_that_of_a_sort(r):
    """Ties, zeros and infinities included; up to 32 samples are picked by comparators."""
    samples = torch.cat([cauchy(r, 40), cauchy(r, 40).round(), torch.zeros(r, 2, dtype=torch.float64)], 1)
    samples[0, :3] = math.inf
    for rank in range(1, r + 1):
        reduction = OrderStatistic(rank)
        reduction.add(reduction.digest(samples))
        assert torch.equal(reduction.value(), samples.abs().sort(0).values[rank - 1]), rank


def test_threads_pick_from_samples_that_are_differentiated():
    """Whether gradients are recorded is a matter of each thread."""
    threads = torch.get_num_threads()
    samples = cauchy(4, 2_000_000).float().requires_grad_()
    reduction = OrderStatistic(2)
    reduction.add(reduction.digest(samples))
    try:
        torch.set_num_threads(2)
        value = reduction.value()
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(value.detach(), samples.detach().abs().sort(0).values[1])
    value.sum().backward()
    assert int((samples.grad != 0).sum()) == samples.shape[1]


def test_many_columns_are_picked_like_few():
    samples = cauchy(9, 40_000).float()
    reduction = OrderStatistic(5)
    reduction.add(reduction.digest(samples))
    assert torch.equal(reduction.value(), samples.abs().sort(0).values[4])


@pytest.mark.parametrize(
    "reduction", [OrderStatistic(3), GeometricMean(5), RootMeanSquare(5)], ids=lambda value: type(value).__name__
)
def test_gradients_are_those_of_finite_differences(reduction):
    def value(samples):
        fresh = type(reduction)(3 if isinstance(reduction, OrderStatistic) else 5)
        for part in samples.split(2):
            fresh.add(fresh.digest(part))
        return fresh.value()

    samples = cauchy(5, 4).requires_grad_()
    assert torch.autograd.gradcheck(value, samples)


def test_the_gradient_of_a_median_reaches_one_sample_of_each_column():
    samples = cauchy(7, 4).requires_grad_()
    reduction = OrderStatistic(4)
    reduction.add(reduction.digest(samples))
    (gradient,) = torch.autograd.grad(reduction.value().sum(), samples)
    assert torch.equal((gradient != 0).sum(0), torch.ones(4, dtype=torch.long))
    assert torch.equal(gradient.abs().sum(0), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("build", [lambda: OrderStatistic(2), lambda: GeometricMean(4), lambda: RootMeanSquare(4)])
def test_no_noise_is_no_radius_and_has_a_finite_gradient(build):
    samples = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    reduction = build()
    reduction.add(reduction.digest(samples))
    value = reduction.value()
    assert bool((value < 1e-300).all())
    (gradient,) = torch.autograd.grad(value.sum(), samples)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("grad", [False, True])
def test_nan_never_makes_a_radius_smaller(grad):
    samples = torch.tensor([[1.0, 1.0], [math.nan, 2.0], [3.0, math.nan]], dtype=torch.float64, requires_grad=grad)
    for rank, expected in ((2, [3.0, 2.0]), (3, [math.nan, math.nan])):
        reduction = OrderStatistic(rank)
        reduction.add(reduction.digest(samples))
        torch.testing.assert_close(reduction.value().detach().tolist(), expected, equal_nan=True)
    for build in (GeometricMean, RootMeanSquare):
        reduction = build(3)
        reduction.add(reduction.digest(samples))
        assert not bool((reduction.value() > 0).any())
