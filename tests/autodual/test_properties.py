"""Whatever network, region and input hypothesis draws: bounds contain every point that is found, and the walks agree."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import autodual
from autodual.attacks import minimize, pgd
from autodual.testing import inputs, networks, regions

METHODS = ["interval", "dual", autodual.Dual(strict=True), autodual.Dual(walk="forward"), "adaptive"]
BATCH = 2


def property_test(count):
    """The same draws in every run; tracing a network takes longer than hypothesis' deadline."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def draw(data, dtype=torch.float64):
    network = data.draw(networks(dtype=dtype))
    return network, data.draw(inputs((BATCH, *network.input_shape), dtype=dtype)), data.draw(regions())


@pytest.mark.parametrize("method", METHODS, ids=str)
@property_test(8)
@given(data=st.data())
def test_bounds_contain_what_attacks_and_samples_reach(method, data):
    network, x, region = draw(data)
    net = autodual.certify(network)
    bounds = net.bounds(x, region, method=method)
    assert bounds.guarantee == autodual.REAL
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    found, points = minimize(network, x, region, rows, steps=8, generator=generator)
    tolerance = 1e-9 * max(1.0, float(found.abs().max()))
    assert (bounds.lower <= found[:, :3] + tolerance).all()
    assert (bounds.upper >= -found[:, 3:] - tolerance).all()
    drawn = torch.cat([region.sample(x, generator) for _ in range(50)])
    with torch.no_grad():
        assert bounds.contains(network(drawn).unflatten(0, (50, BATCH)), tolerance).all()
    assert points.shape == (BATCH, 6, *network.input_shape)


@pytest.mark.parametrize("method", ["interval", "dual", "adaptive"])
@property_test(8)
@given(data=st.data())
def test_an_example_does_not_depend_on_its_batch(method, data):
    network, x, region = draw(data)
    net = autodual.certify(network)
    together = net.bounds(x, region, method=method)
    for index in range(BATCH):
        alone = net.bounds(x[index : index + 1], region, method=method)
        torch.testing.assert_close(alone.lower[0], together.lower[index], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(alone.upper[0], together.upper[index], atol=1e-9, rtol=1e-9)


@property_test(10)
@given(data=st.data())
def test_forward_and_backward_walk_agree(data):
    network, x, region = draw(data)
    net = autodual.certify(network)
    forward, backward = (net.bounds(x, region, method=autodual.Dual(walk=walk)) for walk in ("forward", "backward"))
    torch.testing.assert_close(forward.lower, backward.lower, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(forward.upper, backward.upper, atol=1e-9, rtol=1e-9)


@property_test(10)
@given(data=st.data())
def test_what_is_certified_in_float32_survives_attacks(data):
    network, x, region = draw(data, torch.float32)
    center = region.center(x)
    y = network(center).argmax(1)
    report = autodual.certify(network).verify(x, y, region)
    attacked = pgd(network, x, y, region, steps=8, restarts=3, generator=torch.Generator().manual_seed(0))
    survived = network(attacked).argmax(1) == y
    assert (survived | ~report.certified).all()


@property_test(10)
@given(data=st.data())
def test_a_region_of_one_point_gives_the_output(data):
    network, x, _ = draw(data)
    bounds = autodual.certify(network).bounds(x, autodual.LInf(0.0))
    with torch.no_grad():
        torch.testing.assert_close(bounds.lower, network(x), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(bounds.upper, network(x), atol=1e-9, rtol=1e-9)
