"""Margins beside Algorithm 1 written out in float64: on random networks always, on published weights where they are at hand.

AUTODUAL_DATA=DIR AUTODUAL_MODELS=DIR pytest tests/test_published.py      (whole test sets: benchmarks/published.py)
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import autodual
from benchmarks import algorithm1
from benchmarks.common import PUBLISHED, load_images, load_model, table
from benchmarks.published import Result, checks, compare_alone, compare_with_reference, verify_all

FOLDERS = {name: os.environ.get(name, "") for name in ("AUTODUAL_DATA", "AUTODUAL_MODELS")}
with_weights = pytest.mark.skipif(
    not all(Path(folder).is_dir() and folder for folder in FOLDERS.values()),
    reason="published weights: set AUTODUAL_DATA and AUTODUAL_MODELS to their folders",
)
STRICT = autodual.Dual(strict=True)


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 4, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)).double()


@pytest.mark.parametrize("domain", [None, (0.0, 1.0)], ids=str)
@pytest.mark.parametrize("walk", ["backward", "forward"])
@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.3])
def test_strict_margins_are_those_of_algorithm_1(network, domain, walk, epsilon):
    x, y = torch.rand(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 4])
    region = autodual.LInf(epsilon, domain=domain)
    ours = autodual.certify(network).margins(x, y, region, method=autodual.Dual(strict=True, walk=walk))
    reference = algorithm1.dense(network, (1, 8, 8))
    for row, point, label in zip(ours, x.flatten(1).numpy(), y.tolist(), strict=True):
        expected = algorithm1.margins(reference, point, label, epsilon, domain)
        np.testing.assert_allclose(row.detach().numpy(), expected, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("method", [STRICT, "dual"], ids=str)
def test_intermediate_bounds_are_those_of_algorithm_1(network, method):
    """Without ``strict`` only elements that interval arithmetic proves stable may differ, and they stay stable."""
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    nodes = list(autodual.certify(network).intermediate(x, autodual.LInf(0.1), method=method).values())
    reference = algorithm1.dense(network, (1, 8, 8))
    assert len(nodes) == 3
    for index, point in enumerate(x.flatten(1).numpy()):
        lower, upper = algorithm1.activation_bounds(reference, point, 0.1)
        for layer, box in enumerate(nodes, start=2):
            below, above = (end[index].detach().flatten().numpy() for end in (box.lower, box.upper))
            stable = (below >= 0) | (above <= 0) if method != STRICT else np.zeros_like(below, dtype=bool)
            np.testing.assert_allclose(below[~stable], lower[layer][~stable], atol=1e-10)
            np.testing.assert_allclose(above[~stable], upper[layer][~stable], atol=1e-10)
            assert np.all((lower[layer] >= 0) | (upper[layer] <= 0) | ~stable)


def test_algorithm_1_is_sound_and_the_unrolled_network_exact(network):
    x, epsilon = torch.rand(1, 1, 8, 8, dtype=torch.float64), 0.1
    reference = algorithm1.dense(network, (1, 8, 8))
    margins = algorithm1.margins(reference, x.flatten().numpy(), 3, epsilon)
    drawn = x + epsilon * (2 * torch.rand(2000, 1, 8, 8, dtype=torch.float64) - 1).sign()
    with torch.no_grad():
        outputs = network(drawn)
        np.testing.assert_allclose(reference(drawn[0].flatten().numpy()), outputs[0].numpy(), atol=1e-12)
    assert np.all((outputs[:, [3]] - outputs).numpy() >= margins - 1e-12)
    assert margins[3] == 0


def test_faults_of_the_benchmark_are_named():
    good = Result("mnist", None, 10_000, 180, 582, 583, 1.0, 10.0, 0.5, 1e-5, 1e-6)
    assert checks([good], whole=True) == []
    bad = Result("mnist", None, 10_000, 181, 584, 584, 1.0, 10.0, 3.5, float("nan"), 1e-3)
    assert len(checks([bad], whole=True)) == 5
    assert len(checks([bad], whole=False)) == 3
    assert table(["a", "b"], [["long", "1"]]) == "a     b\n----  -\nlong  1"


@with_weights
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights(name):
    """The first images: what Algorithm 1 certifies is certified, to rounding with the same margins, alone or in a batch."""
    entry, data, models = PUBLISHED[name], Path(FOLDERS["AUTODUAL_DATA"]), Path(FOLDERS["AUTODUAL_MODELS"])
    model = load_model(models, entry)
    x, y = load_images(data, entry, 8)
    domain = entry.uncertified[-1][0]
    assert compare_with_reference(name, domain, model, x[:4], y[:4]) <= 1e-4
    assert compare_alone(name, domain, model, x[:3], y[:3]) <= 1e-4
    result = verify_all(name, domain, model, x, y)
    reference = algorithm1.dense(model, tuple(x.shape[1:]))
    pairs = zip(x.double().flatten(1).numpy(), y.tolist(), strict=True)
    rows = [(algorithm1.margins(reference, point, label, entry.epsilon, domain), label) for point, label in pairs]
    assert result.uncertified == sum(not np.all(np.delete(row, label) > 0) for row, label in rows)
