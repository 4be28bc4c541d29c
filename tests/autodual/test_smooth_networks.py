"""Whole networks with smooth activations: no sampled or attacked point leaves its bounds, and the bounds are useful."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autodual
from autodual.attacks import minimize

METHODS = ("interval", "dual", "adaptive")


class Gates(nn.Module):
    """Functional style: one gate times a constant, a residual sum, and functions that compose."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.first(x), approximate="tanh")
        h = h + F.silu(self.second(h))
        return self.head(torch.log1p(torch.exp(h)) - 0.5 * torch.sin(h) ** 2)


class Roots(nn.Module):
    """Functions with a domain, behind others that keep them inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.softplus(self.first(x)) + 0.5
        return self.head(h.sqrt() + torch.rsqrt(h) - h.log() + h.reciprocal())


def mlp(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 3))


ACTIVATIONS = (
    nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Softsign, nn.Hardswish,
    nn.LogSigmoid, nn.Tanhshrink,
)  # fmt: skip
NETWORKS = {activation.__name__: (lambda activation=activation: mlp(activation)) for activation in ACTIVATIONS}
NETWORKS |= {"Gates": Gates, "Roots": Roots}
TIGHT = {"Tanh": 1.5, "Sigmoid": 1.2, "GELU": 1.5, "SiLU": 1.4}
"""Median width over the range that was reached, at eps 0.05: far more than measured, far less than interval arithmetic's."""


def built(name: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return NETWORKS[name]().double(), torch.randn(3, 4, dtype=torch.float64)


@torch.no_grad()
def reached(model: nn.Module, x: Tensor, region: autodual.Region) -> tuple[Tensor, Tensor]:
    """The extremes of the outputs over 1,000 samples and an attack on every output from both sides."""
    generator = torch.Generator().manual_seed(0)
    samples = model(region.sample(x.repeat(1_000, 1), generator)).unflatten(0, (1_000, len(x)))
    rows = torch.cat([torch.eye(3), -torch.eye(3)]).double()
    attacked, _ = minimize(model, x, region, rows, steps=20, restarts=1, generator=generator)
    lowest, highest = torch.minimum(samples.amin(0), attacked[:, :3]), torch.maximum(samples.amax(0), -attacked[:, 3:])
    return lowest, highest


@pytest.mark.thinned(2)
@pytest.mark.parametrize("eps", [1e-3, 0.05, 0.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_point_leaves_its_bounds(name: str, eps: float) -> None:
    model, x = built(name)
    region = autodual.LInf(eps)
    lowest, highest = reached(model, x, region)
    net, widths = autodual.certify(model), {}
    for method in METHODS:
        bounds = net.bounds(x, region, method=method)
        assert (bounds.lower <= lowest + 1e-9 * (1 + lowest.abs())).all(), method
        assert (bounds.upper >= highest - 1e-9 * (1 + highest.abs())).all(), method
        widths[method] = (bounds.width / (highest - lowest)).median().item()
    if eps == 0.05:
        assert widths["dual"] < 0.7 * widths["interval"]
        assert widths["dual"] <= TIGHT.get(name, 3.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_forward_walk_agrees(name: str) -> None:
    model, x = built(name)
    net, region = autodual.certify(model), autodual.LInf(0.1)
    backward, forward = (net.bounds(x, region, method=autodual.Dual(walk=walk)) for walk in ("backward", "forward"))
    torch.testing.assert_close(forward.lower, backward.lower, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(forward.upper, backward.upper, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["Tanh", "GELU", "Roots"])
def test_single_precision_holds_the_samples_of_double(name: str) -> None:
    model, x = built(name)
    lowest, highest = reached(model, x, autodual.LInf(0.05))
    bounds = autodual.certify(model.float()).bounds(x.float(), autodual.LInf(0.05))
    assert (bounds.lower <= lowest + 1e-5).all()
    assert (bounds.upper >= highest - 1e-5).all()


@pytest.mark.parametrize("name", ["Tanh", "GELU", "Gates", "Roots"])
def test_bounds_are_differentiable_in_the_parameters(name: str) -> None:
    model, x = built(name)
    net, weight = autodual.certify(model), next(iter(model.parameters()))
    towards = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5), dtype=weight.dtype)

    def total() -> Tensor:
        return net.bounds(x, autodual.LInf(0.1)).lower.sum()

    (grad,) = torch.autograd.grad(total(), [weight])
    with torch.no_grad():
        weight += 1e-5 * towards
        ahead = total()
        weight -= 2e-5 * towards
        behind = total()
    assert (grad * towards).sum().item() == pytest.approx((ahead - behind).item() / 2e-5, rel=1e-4)


def test_training_on_the_bound_certifies_more() -> None:
    model, _ = built("Tanh")
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    y, region, net = x[:, :3].argmax(1), autodual.LInf(0.1), autodual.certify(model)
    before = net.verify(x, y, region).certified.sum()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(25):
        optimizer.zero_grad()
        net.robust_loss(x, y, region).backward()
        optimizer.step()
    assert net.verify(x, y, region).certified.sum() > before + 15


class Logarithm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x) @ torch.ones(2, 2, dtype=x.dtype)


@pytest.mark.parametrize("method", METHODS)
def test_leaving_the_domain_is_no_bound_for_that_example_alone(method: str) -> None:
    x = torch.tensor([[0.05, 1.0], [1.0, 2.0]], dtype=torch.float64)
    bounds = autodual.certify(Logarithm()).bounds(x, autodual.LInf(0.1), method=method)
    assert (bounds.lower[0] == -torch.inf).all()
    assert (bounds.upper[0] == torch.inf).all()
    assert bounds.lower[1].isfinite().all()
    assert bounds.upper[1].isfinite().all()
    report = autodual.certify(Logarithm()).verify(x, torch.tensor([0, 0]), autodual.LInf(0.1), method=method)
    assert not report.certified.any()
