"""Models of every usual kind: no sampled or attacked point leaves their finite bounds. A fast cut of the benchmark."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import autodual
from benchmarks.zoo import RADII, Effort, Findings, examine
from examples import torchvision_style
from tests.zoo.collection import FAMILIES, ZOO

EFFORT = Effort(boxes=1, points=200, steps=5, restarts=1, node_points=2)

# How wide dual bounds may be at radius 0.05, over the range that the fast cut reaches: a quarter more than measured.
USEFUL = {
    "mlp relu": 1.5, "mlp sigmoid": 1.3, "mlp tanh": 1.4, "mlp gelu": 1.4, "mlp silu": 1.4, "softmax probabilities": 1.5,
    "log-probabilities": 1.5, "entropy": 1.6, "cosine classifier": 1.4, "lenet": 6.8, "convolution in 1-D": 1.3,
    "pointnet-like": 1.3, "resnet, basic blocks": 2.3, "squeeze and excitation": 1.5, "single-head attention": 1.6,
    "scaled_dot_product_attention": 1.6, "nn.MultiheadAttention": 1.8, "nn.TransformerEncoderLayer": 1.8, "vit-tiny": 22.0,
    "layer norm": 1.5, "group norm": 4.2, "instance norm": 3.3, "nn.RMSNorm": 1.5, "lstm cell, by hand": 1.4,
    "lstm cell loop": 1.4, "nn.LSTM, batch first": 1.4, "nn.GRU, time first": 1.3, "swiglu": 1.4, "bilinear fusion": 1.6,
    "maxout": 1.4, "cart-pole step": 1.3, "huber loss inside": 1.3, "attitude from quaternion": 1.9, "black-scholes-like": 1.9,
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ZOO)
def test_no_point_leaves_its_bounds(name: str) -> None:
    """By intervals in boxes of every radius at once; by the dual at one, hidden nodes too, where the bounds must be of use."""
    entry = ZOO[name]
    net = autodual.certify(entry.model())
    for eps, effort, method in ((RADII, replace(EFFORT, boxes=len(RADII), node_points=0), "interval"), (0.05, EFFORT, "dual")):
        findings = examine(entry, eps, effort, (method,), net)
        assert findings.points >= 200
        assert findings.faults() == []
        assert 1 - 1e-6 <= findings.widths[method] <= (USEFUL.get(name, math.inf) if method == "dual" else math.inf)


def test_the_zoo_is_large_and_its_models_are_small() -> None:
    assert len(ZOO) >= 64
    assert len(FAMILIES) >= 5
    for entry in ZOO.values():
        assert sum(parameter.numel() for parameter in entry.model().parameters()) < 3_000


def test_models_are_the_same_every_time() -> None:
    entry = ZOO["lenet"]
    for left, right in zip(entry.model().state_dict().values(), entry.model().state_dict().values(), strict=True):
        assert torch.equal(left, right)
    assert torch.equal(entry.example(2)["x"], entry.example(2)["x"])


def test_a_wrong_bound_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds moved inwards by a fifth are caught on every model of a handful, whichever method they come from."""
    honest = autodual.network.BoundModule.bounds

    def too_tight(self, *args, **kwargs):
        found = honest(self, *args, **kwargs)
        return autodual.Bounds(0.2 * found.center + 0.8 * found.lower, 0.2 * found.center + 0.8 * found.upper)

    monkeypatch.setattr(autodual.network.BoundModule, "bounds", too_tight)
    for name in ("mlp tanh", "all-convolutional", "neural ode, euler steps"):
        assert examine(ZOO[name], 1e-3, EFFORT, ("dual",)).faults() != []


def test_faults_are_named() -> None:
    findings = Findings(points=7, outside={"interval": 0, "dual": 2}, endless={"interval": 1, "dual": 0})
    assert findings.faults() == ["dual: 2 of 7 points outside their bounds", "interval: 1 bounds are not finite"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "ViT-tiny" else ()) for name in torchvision_style.SMALL]
)  # the zoo has a vision transformer too
def test_models_of_torchvision_style_compile(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A fraction as wide as in the example; a corner of the region outside the bounds would end it."""
    torchvision_style.main({name: torchvision_style.SMALL[name]}, eps=1e-5)
    assert "inf" not in capsys.readouterr().out
