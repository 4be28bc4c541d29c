"""Independent computations agree on random networks: two walks, a linear program solved by HiGHS, samples and attacks."""

import pytest
import torch

import autodual
from benchmarks.agreement import Effort, Findings, cases, examine
from dual_layers.contract import Offsets
from dual_layers.families import PiecewiseLinear
from tests.reference.lp import Ball, Relu, minimum, run
from tests.reference.networks import NETWORKS, Mlp, random_network

EFFORT = Effort(points=400, steps=4, rounds=3)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("label", cases())
def test_walks_program_and_points_agree(kind, label):
    seed = list(NETWORKS).index(kind) + 10 * list(cases()).index(label)
    findings = examine(kind, cases()[label], seed, EFFORT)
    assert findings.points >= 400
    assert findings.faults() == []


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_wrong_rule_is_noticed(kind, monkeypatch):
    conjugate = PiecewiseLinear.conjugate

    def too_small(self, slopes, bounds):
        offsets = conjugate(self, slopes, bounds)
        return Offsets(offsets.lower, 0.8 * offsets.upper)

    monkeypatch.setattr(PiecewiseLinear, "conjugate", too_small)
    assert examine(kind, cases()["linf in 0..1"], 0, EFFORT).faults() != []


def test_faults_are_named():
    findings = Findings(walks=1e-3, above_lp=1e-3, lp_above=float("nan"), points=7, violations=2)
    findings.widths["interval"], findings.widths["dual"] = [1.0], [2.0]
    assert len(findings.faults()) == 5


@pytest.mark.parametrize("kind", NETWORKS)
def test_descriptions_match_their_networks(kind):
    model, shape = random_network(kind, 3)
    x = torch.rand(5, *shape, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(run(model.steps(), x)[model.steps()[-1].name], model(x))


BALLS = {
    "linf": (autodual.LInf(0.2), Ball(float("inf"), 0.2)),
    "l2": (autodual.L2(0.4), Ball(2, 0.4)),
    "l2 in 0..1": (autodual.L2(0.6, domain=(0.0, 1.0)), Ball(2, 0.6, 0.0, 1.0)),
    "l1 in 0..1": (autodual.L1(0.5, domain=(0.0, 1.0)), Ball(1, 0.5, 0.0, 1.0)),
}


@pytest.mark.parametrize("label", BALLS)
@torch.no_grad()
def test_the_program_is_exact_where_the_network_is_affine(label):
    """With every unit on, the optimum is that of an affine function: by the region's support, and by hand for l_inf."""
    region, ball = BALLS[label]
    torch.manual_seed(0)
    model, x = Mlp().double(), torch.rand(1, 6, dtype=torch.float64)
    model.first.bias += 10.0
    model.second.bias += 100.0
    on = torch.zeros(1, 12, dtype=torch.float64), torch.full((1, 12), 1e3, dtype=torch.float64)
    bounds = {step.parent: on for step in model.steps() if isinstance(step, Relu)}
    weight = model.third.weight @ model.second.weight @ model.first.weight
    exact = model(x)[0] - weight @ x[0] - region.support(x, -weight[:, None])[:, 0]
    if label == "linf":
        torch.testing.assert_close(exact, model(x)[0] - 0.2 * weight.abs().sum(1))
    optima = minimum(model.steps(), x, ball, bounds, torch.eye(3, dtype=torch.float64), rounds=8)
    for (below, above), value in zip(optima, exact.tolist(), strict=True):
        assert below - 1e-6 <= value <= above + 1e-6
        assert above - below <= 1e-3 * abs(value)
