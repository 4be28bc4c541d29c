"""A cascade with the check of agreement never answers two inputs of one ball differently; without it, it does."""

import itertools
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import autodual
from autodual import L1, L2, NONE, REAL, Box, Cascade, LInf, Region, SpecificationError, Verdict
from autodual.cascade import ABSTAINED


def linear(weight, bias):
    layer = nn.Linear(1, len(bias)).double()
    layer.weight.data, layer.bias.data = torch.tensor(weight).double()[:, None], torch.tensor(bias).double()
    return layer


def random_stage(inputs, seed, classes=3, scale=3.0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, 12), nn.ReLU(), nn.Linear(12, classes)).double()
    with torch.no_grad():
        model[0].weight.mul_(scale)
    return model


def contradictions(labels, points, distance, eps):
    """Count pairs of points within eps of each other that are answered differently."""
    answered = labels != ABSTAINED
    close = distance(points[:, None] - points[None]) <= eps
    differ = (labels[:, None] != labels[None]) & answered[:, None] & answered[None]
    return int((close & differ).sum())


def threshold(at):
    """Class 1 where x > at."""
    return linear([0.0, 1.0], [0.0, -at])


CONSTANT_ONE = linear([0.0, 0.0], [0.0, 1.0])
GRID = torch.linspace(-2, 2, 1001, dtype=torch.float64)[:, None]


def one_dimensional(difference):
    return difference.abs().amax(-1)


def test_the_counterexample_without_agreement_and_its_absence_with_it():
    x, z, region = torch.tensor([[0.4]]).double(), torch.tensor([[0.6]]).double(), LInf(0.5)
    assert region.contains(x, z).all()
    stages = [threshold(1.0), CONSTANT_ONE]  # at x the first is sure of 0; at z it is not, and the second is sure of 1
    loose, strict = Cascade(stages, agreement=False), Cascade(stages)
    assert loose.predict(x, region).tolist() == [0]
    assert loose.predict(z, region).tolist() == [1]
    assert strict.predict(x, region).tolist() == [0]
    assert strict.predict(z, region).tolist() == [ABSTAINED]
    assert contradictions(loose.predict(GRID, region), GRID, one_dimensional, 0.5) > 250
    assert contradictions(strict.predict(GRID, region), GRID, one_dimensional, 0.5) == 0


def test_the_check_is_needed_at_both_inputs():
    """Asked at one of two inputs alone, it does not keep them from different answers."""
    region, stages = LInf(0.5), [threshold(1.0), CONSTANT_ONE]
    asked, spared = (Cascade(stages, agreement=flag).predict(GRID, region) for flag in (True, False))
    close = one_dimensional(GRID[:, None] - GRID[None]) <= 0.5
    differ = (asked[:, None] != spared[None]) & (asked[:, None] >= 0) & (spared[None] >= 0)
    assert (close & differ).any()


def test_one_dimension_by_brute_force():
    """Random cascades never contradict themselves with the check; without it nearly all of them do."""
    broken = answering_two = 0
    for seed in range(4):
        stages = [random_stage(1, 10 * seed + i) for i in range(3)]
        strict, loose = (Cascade(stages, agreement=flag).predict(GRID, LInf(0.1)) for flag in (True, False))
        assert contradictions(strict, GRID, one_dimensional, 0.1) == 0
        broken += contradictions(loose, GRID, one_dimensional, 0.1) > 0
        answering_two += len(strict[strict >= 0].unique()) >= 2
    assert broken >= 2
    assert answering_two >= 2


NORMS = {
    LInf: lambda difference: difference.abs().amax(-1),
    L2: lambda difference: difference.norm(dim=-1),
    L1: lambda difference: difference.abs().sum(-1),
}


@pytest.mark.parametrize("domain", [None, (0.0, 1.0)])
@pytest.mark.parametrize("ball", NORMS)
def test_two_dimensions_by_brute_force(ball, domain):
    """Points on a grid of 31 x 31, with and without the edge of a domain."""
    line = torch.linspace(0, 1, 31, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    stages = [random_stage(2, 4 + i) for i in range(3)]
    region = ball(0.11, domain=domain)  # between the distances of the grid, so that rounding decides nothing
    strict, loose = (Cascade(stages, agreement=flag).predict(points, region) for flag in (True, False))
    assert contradictions(strict, points, NORMS[ball], 0.11) == 0
    assert contradictions(loose, points, NORMS[ball], 0.11) > 0
    assert torch.equal(strict[strict >= 0], loose[strict >= 0])
    assert (Cascade(stages).verify(points, strict.clamp(min=0), region).stage >= 1).any()  # later stages do answer


@pytest.mark.parametrize("methods", list(itertools.permutations(["interval", "dual", "auto"], 2)))
def test_methods_may_differ_from_input_to_input(methods):
    stages = [random_stage(1, 50 + i) for i in range(3)]
    one, other = (Cascade(stages).predict(GRID, LInf(0.1), method) for method in methods)
    close = one_dimensional(GRID[:, None] - GRID[None]) <= 0.1
    assert not (close & (one[:, None] != other[None]) & (one[:, None] >= 0) & (other[None] >= 0)).any()


def test_a_report_counts():
    x = torch.tensor([[-1.0], [-0.1], [0.2], [1.0], [1.0]]).double()
    cascade = Cascade([threshold(0.0), threshold(0.5)])
    report = cascade.verify(x, [0, 0, 0, 1, 0], LInf(0.3))
    assert report.predicted.tolist() == [0, 0, -1, 1, 1]
    assert report.stage.tolist() == [0, 1, -1, 0, 0]
    assert report.certified.tolist() == [True, True, False, True, False]
    kinds = (Verdict.CERTIFIED, Verdict.CERTIFIED, Verdict.UNKNOWN, Verdict.CERTIFIED, Verdict.FALSIFIED)
    assert report.verdict == kinds
    assert report.guarantee == REAL
    assert report.abstained.tolist() == [False, False, True, False, False]
    assert "certified       3 of 5  (60.00 %)" in str(report)
    assert "decided    3 by stage 0, 1 by stage 1" in str(report)
    assert torch.equal(pickle.loads(pickle.dumps(report)).predicted, report.predicted)


def test_without_agreement_nothing_is_certified():
    x = torch.tensor([[-1.0], [1.0]]).double()
    report = Cascade([threshold(0.0)], agreement=False).verify(x, [0, 0], LInf(0.3))
    assert report.guarantee == NONE
    assert report.correct.tolist() == [True, False]
    assert not report.certified.any()
    assert report.verdict == (Verdict.UNKNOWN, Verdict.FALSIFIED)
    assert "nothing can be certified: without the check of agreement" in report.summary()


def test_one_stage_is_its_network():
    model = random_stage(2, 7)
    x, region = torch.rand(50, 2, generator=torch.Generator().manual_seed(0)).double(), L2(0.05)
    y = torch.arange(50) % 3
    single = autodual.certify(model).verify(x, y, region)
    report = Cascade([model]).verify(x, y, region)
    assert torch.equal(report.certified, single.certified)
    assert report.certified.any()


def test_uncertified_is_what_a_further_stage_is_asked():
    stages, x, region = [random_stage(1, 20 + i) for i in range(2)], GRID[::50], LInf(0.1)
    nets = [autodual.certify(stage) for stage in stages]
    flags = torch.stack([net.flag(x, region) for net in nets])
    assert torch.equal(Cascade(stages[:1]).uncertified(x, region), flags[0])
    assert torch.equal(Cascade(stages).uncertified(x, region), flags.all(0))
    per_example = LInf(torch.linspace(0.0, 0.3, len(x)).double())  # to choose training examples any region will do
    assert not Cascade(stages).uncertified(x, per_example)[0]
    left = flags[0]
    assert torch.equal(flags.all(0)[left], Cascade(stages[1:]).uncertified(x[left], region))  # as Algorithm 4 has it
    assert 0 < int(flags.all(0).sum()) < int(left.sum()) < len(x)


class Custom(LInf):
    """A ball that somebody changed."""


REFUSED = [
    (Box(0.0, 1.0), "whenever x is in B"),
    (Custom(0.1), "whenever x is in B"),
    (LInf(torch.tensor([0.1, 0.2, 0.3]).double()), "one radius"),
    (LInf(torch.tensor([[0.1, 0.2]]).double()), "one radius"),
    (L2(torch.tensor([0.1, 0.2, 0.3]).double()), "one radius"),
    (LInf(0.1, domain=(torch.zeros(3, 2).double(), 1.0)), "one domain"),
    (LInf(0.3, domain=(0.6, 1.0)), "example 1 lies outside the domain"),
    (L1(0.1, domain=(0.0, 0.4)), "lies outside the domain"),
]


@pytest.mark.parametrize(("region", "message"), REFUSED)
def test_regions_without_the_guarantee_are_refused(region, message):
    x = torch.tensor([[0.6, 0.6], [0.5, 0.6], [0.9, 0.9]]).double()
    for call in (lambda c: c.predict(x, region), lambda c: c.verify(x, [0, 1, 2], region)):
        with pytest.raises(SpecificationError, match=message):
            call(Cascade([random_stage(2, 0)]))


class Upwards(Region):
    """The interval from x to x + 1."""

    def support(self, x, v):
        return (v * x).sum(-1) + v.clamp(min=0).sum(-1)


@pytest.mark.parametrize(
    ("around_x", "around_z"), [(Upwards(), Upwards()), (LInf(1.0), LInf(0.1))], ids=["not symmetric", "two radii"]
)
def test_why_regions_are_refused(monkeypatch, around_x, around_z):
    """At x the second stage is sure of 0 and the first agrees; the first is sure of 1 at z in B(x), as B(z) does not hold x."""
    monkeypatch.setattr(autodual.cascade, "_check_region", lambda region, x: None)
    cascade = Cascade([threshold(0.5), linear([0.0, 0.0], [1.0, 0.0])])
    x, z = torch.tensor([[0.0]]).double(), torch.tensor([[0.9]]).double()
    assert cascade.predict(x, around_x).tolist() == [0]
    assert cascade.predict(z, around_z).tolist() == [1]


@pytest.mark.parametrize(
    "method", [autodual.Projected(r=20), autodual.Projected(r=50, estimator="tightest", delta=0.1)], ids=["estimate", "random"]
)
def test_methods_without_the_guarantee_are_refused(method):
    with pytest.raises(SpecificationError, match=r"proves nothing|by itself"):
        Cascade([random_stage(2, 0)]).predict(torch.zeros(1, 2).double(), LInf(0.1), method)


def test_batch_statistics_never_answer():
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().train()
    report = Cascade([model]).verify(torch.rand(5, 2).double(), [0] * 5, LInf(1e-6))
    assert report.abstained.all()
    assert report.guarantee == NONE
    assert not report.certified.any()


def test_messages():
    with pytest.raises(SpecificationError, match="at least one stage"):
        Cascade([])
    with pytest.raises(SpecificationError, match="same classes"):
        Cascade([random_stage(1, 0, scale=30.0), random_stage(1, 1, classes=2)]).predict(GRID, LInf(0.1))
    with pytest.raises(SpecificationError, match="one input tensor"):
        Cascade([random_stage(1, 0)]).predict((GRID,), LInf(0.1))
    with pytest.raises(SpecificationError, match="label y"):
        Cascade([random_stage(1, 0)]).verify(GRID[:1], [3], LInf(0.1))
    with pytest.raises(SpecificationError, match="stage 0 must return"):
        Cascade([nn.Sequential(nn.Linear(1, 2), nn.Flatten(0)).double()]).predict(GRID, LInf(0.1))


def test_nothing_is_asked_of_an_empty_batch():
    report = Cascade([random_stage(2, 0)]).verify(torch.zeros(0, 2).double(), torch.zeros(0, dtype=torch.long), LInf(0.1))
    assert report.certified.shape == (0,)
    assert "0 of 0" in report.summary()


def test_inference_mode_and_gradients():
    stages, x = [random_stage(1, i) for i in range(2)], GRID[::100]
    with torch.inference_mode():
        inside = Cascade(stages).predict(x, LInf(0.1))
    assert torch.equal(inside, Cascade(stages).predict(x, LInf(0.1)))
    assert stages[0][0].weight.grad is None


def test_the_page_on_cascades_runs(capsys):
    page = (Path(__file__).parents[2] / "docs" / "cascades.md").read_text()
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S):
        exec(compile(block, "cascades.md", "exec"), names)
    printed = capsys.readouterr().out
    for claim in re.findall(r"# (tensor\(.*?\))", page):
        assert claim in printed
    assert len(names["stages"]) > 1
    assert "by stage 1" in printed
