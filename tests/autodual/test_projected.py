"""Random projections: the norms they stand for, what they certify and what they do not, reproducibility, memory, training."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing
from scipy import stats
from torch import nn

import autodual
from autodual.bounds.bound import bound_rows
from autodual.bounds.forward import NoiseSymbols
from autodual.bounds.projected import HEAVY, Heavy, HeavyColumns, NoiseSource, Projections, first_segment
from autodual.errors import SpecificationError
from autodual.methods import Dual, Projected
from autodual.regions import Noise
from autodual.report import Verdict
from benchmarks.projections_proofs import Often, gated_failures
from benchmarks.zoo import Effort, examine
from dual_layers import NONE
from dual_layers.relu import DualReLU
from tests.reference.networks import NETWORKS, random_network
from tests.zoo.collection import ZOO

SURE = Projected(r=100, estimator="tightest", delta=1e-3, seed=0, heavy=3)


class Halfspace(autodual.Region):
    """A ball of one's own, known by its support only: a cross-polytope stretched along the first coordinate."""

    def support(self, x, v):
        return (v * x).flatten(2).sum(-1) + 0.2 * v.abs().flatten(2).amax(-1)


REGIONS = {
    "linf": autodual.LInf(0.2),
    "linf, per example": autodual.LInf(torch.tensor([0.1, 0.2, 0.3])),
    "linf in 0..1": autodual.LInf(0.2, domain=(0.0, 1.0)),
    "box": autodual.Box(-0.1, 0.6),
    "l2": autodual.L2(0.4),
}
ENCLOSED = {
    "l2 in 0..1": autodual.L2(0.4, domain=(0.0, 1.0)),
    "l1": autodual.L1(0.4),
    "l1 in 0..1": autodual.L1(0.4, domain=(0.0, 1.0)),
    "own": Halfspace(),
}


class Product(nn.Module):
    """A product of two linear maps, then a ReLU: a relaxed node is another one's input."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(torch.relu(self.left(x) * self.right(x)))


class Pooled(nn.Module):
    """Maxima of ReLUs, then a ReLU again."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv1d(1, 4, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(torch.relu(nn.functional.max_pool1d(torch.relu(self.first(x[:, None])), 2) - 0.1).flatten(1))


OTHERS = {"product": Product, "pooled": Pooled}


def problem(kind: str, batch: int = 3, seed: int = 0):
    if kind in OTHERS:
        torch.manual_seed(seed)
        model, shape = OTHERS[kind]().double(), (6,)
    else:
        model, shape = random_network(kind, seed)
    x = torch.rand(batch, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return autodual.certify(model), x


def relaxed(net, x, region):
    """Return a run whose lines are those of the exact dual bound: the slopes are fixed."""
    run = net._run(net._problem(x, region))
    bound_rows(run, Dual(strict=True), None)
    return run


def exact_radius(run, name):
    lower, upper = NoiseSymbols(run).bounds(name)
    return 0.5 * (upper - lower)


def estimate(run, name, method, **options):
    return Projections(run, method, (name,), **options).radius(name, lambda rows: rows)


# ------------------------------------------------------------------------------------- what is estimated


@pytest.mark.parametrize("label", REGIONS)
@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_estimates_approach_the_exact_radius_at_fixed_slopes(kind, label):
    net, x = problem(kind)
    run = relaxed(net, x, REGIONS[label])
    names = [name for name in [*run.boxes, run.program.graph.output] if name not in run.program.sources]
    walks = [Projections(run, Projected(r=2_000, estimator=each, seed=1), ()) for each in ("median", "log-mean")]
    symbols = NoiseSymbols(run)
    for name in sorted(names, key=run.order.index):
        lower, upper = symbols.bounds(name)
        exact = 0.5 * (upper - lower)
        for walk in walks:
            found = walk.radius(name, lambda rows: rows)
            assert bool(((found - exact).abs() <= 5 * math.pi / 2 / math.sqrt(2_000) * exact + 1e-12).all())


@torch.no_grad()
def test_the_median_is_unbiased_within_two_percent_at_fixed_slopes():
    net, x = problem("residual", batch=1)
    run = relaxed(net, x, autodual.LInf(0.2))
    name = run.program.graph.output
    exact = exact_radius(run, name)
    ratios = torch.stack([estimate(run, name, Projected(r=200, seed=s)) / exact for s in range(150)])
    assert abs(ratios.mean() - 1) < 0.02
    assert abs(ratios.std() / (math.pi / 2 / math.sqrt(200)) - 1) < 0.1  # and as widely spread as the theory has it


@pytest.mark.parametrize("label", ["linf", "l2"])
@torch.no_grad()
def test_separate_streams_have_the_same_mean(label):
    """Algorithm 3 is the reference: a stream for the input and for each relaxed layer."""
    net, x = problem("dense-concat")
    run = relaxed(net, x, REGIONS[label])
    name, method = run.program.graph.output, Projected(r=4_000, seed=3)
    exact = exact_radius(run, name)
    separate = estimate(run, name, method, separate=True)
    assert len(Projections(run, method, (name,), separate=True).keys(name)) == 1 + len(run.program.relaxed)
    assert (separate / exact - 1).abs().max() < 0.12
    assert not torch.equal(separate, estimate(run, name, method))


@torch.no_grad()
def test_rows_of_a_specification_are_estimated_too():
    net, x = problem("mlp")
    region, spec = autodual.LInf(0.2), torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = net.bounds(x, region, spec)
    found = net.bounds(x, region, spec, method=Projected(r=4_000, seed=0, last_exact=False))
    torch.testing.assert_close(found.center, exact.center, rtol=0, atol=0.05 * float(exact.width.max()))
    assert (found.width / exact.width - 1).abs().max() < 0.15


@torch.no_grad()
def test_the_first_segment_of_a_euclidean_ball_is_exact():
    net, x = problem("convolutional")
    region = autodual.L2(0.4)
    exact, found = (net.intermediate(x, region, method) for method in (Dual(), Projected(r=3, seed=0)))
    name = next(name for name, box in exact.items() if name in found and box.lower.dim() == 4)
    torch.testing.assert_close(found[name].lower, exact[name].lower)
    torch.testing.assert_close(found[name].upper, exact[name].upper)


@pytest.mark.parametrize("label", ["linf", "linf, per example", "box"])
@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_with_every_symbol_walked_exactly_nothing_is_left_to_chance(kind, label):
    net, x = problem(kind)
    run = relaxed(net, x, REGIONS[label])
    name = run.program.graph.output
    exact = exact_radius(run, name)
    found = estimate(run, name, Projected(r=3, estimator="order", heavy=10_000, seed=0))
    torch.testing.assert_close(found, exact)


@torch.no_grad()
def test_the_heaviest_symbols_are_walked_exactly_and_the_others_projected():
    """What is walked exactly is at most the radius, more of it leaves less to chance, and it is well chosen."""
    net, x = problem("residual")
    run = relaxed(net, x, autodual.LInf(0.2))
    name, gaps = run.program.graph.output, []
    exact = exact_radius(run, name)
    for heavy in (0, 4, 12):
        method = Projected(r=300, estimator="geometric", heavy=heavy, seed=0)
        projections = Projections(run, method, (name,))
        walked = projections.radius(name, lambda rows: rows)
        gaps.append(float((walked / exact - 1).mean()))
        chosen = Heavy(run, name, heavy, (0,)) if heavy else None
        if chosen is not None:
            columns = HeavyColumns(run, chosen, 0, heavy).reach(name)[HEAVY].abs().sum(0)
            assert bool((columns <= exact + 1e-12).all())
            assert float((columns / exact).mean()) > heavy / chosen.total
    assert gaps[0] > gaps[1] > gaps[2] > 0


@torch.no_grad()
def test_one_hidden_layer_needs_no_estimate():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    net, x = autodual.certify(model), torch.rand(2, 4, dtype=torch.float64)
    for region in (autodual.LInf(0.3), autodual.L2(0.3)):
        exact, found = net.bounds(x, region), net.bounds(x, region, method="projected")
        torch.testing.assert_close(found.lower, exact.lower)
        assert net.verify(x, [0, 0], region, SURE).sampling.estimates == 0


class Pair(nn.Module):
    """Two inputs."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.mid, self.last = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x, y):
        return self.last(torch.relu(self.mid(torch.relu(self.one(x) + self.two(y)))))


@pytest.mark.parametrize(
    "second", [autodual.L2(0.5), autodual.L1(0.5), autodual.LInf(0.3), autodual.L2(torch.tensor([0.0, 0.5]))]
)
@torch.no_grad()
def test_regions_of_several_inputs_add_up(second):
    """Norms of two balls add; the noise of both in one stream would give the root of the sum of their squares."""
    torch.manual_seed(0)
    net, inputs = autodual.certify(Pair().double()), (torch.rand(2, 4).double(), torch.rand(2, 5).double())
    regions = {"x": autodual.L2(0.4), "y": second}
    run = relaxed(net, inputs, regions)
    symbols, projections = NoiseSymbols(run), Projections(run, Projected(r=4_000, seed=0), ())
    for name in sorted({parent for each in run.program.relaxed for parent in run.program.parents[each]}, key=run.order.index):
        lower, upper = symbols.bounds(name)
        exact, found = 0.5 * (upper - lower), projections.radius(name, lambda rows: rows)
        if isinstance(second, autodual.L1):
            assert bool((found >= 0.9 * exact).all())
        else:
            assert bool(((found - exact).abs() <= 0.12 * exact + 1e-12).all())


@torch.no_grad()
def test_the_first_segment_is_exact_in_single_precision_too():
    """Neither a large constant on the way nor squares of small numbers may make it narrower."""
    for scale, mean in ((1.0, 1e5), (1e-24, 0.0)):
        torch.manual_seed(0)
        linear = nn.Linear(8, 16)
        model = nn.Sequential(Shift(mean), linear, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        linear.weight.data *= scale
        linear.bias.data.zero_()
        net, x = autodual.certify(model), torch.full((1, 8), mean)
        run = relaxed(net, x, autodual.L2(0.5))
        name = run.program.parents[run.program.relaxed[0]][0]
        exact = 0.5 * linear.weight.detach().double().norm(dim=1)
        torch.testing.assert_close(first_segment(run, name)[0].double(), exact, rtol=1e-5, atol=0.0)
        assert bool((exact_radius(run, name)[0].double() >= 0.99 * exact).all())


class Shift(nn.Module):
    """Subtract a constant."""

    def __init__(self, mean):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))

    def forward(self, x):
        return x - self.mean


class Repeated(nn.Module):
    """A node that is repeated, read by a layer and bounded for another one afterwards."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(12, 6), nn.Linear(18, 2)

    def forward(self, x):
        both = torch.cat([torch.relu(self.first(x)).unsqueeze(1) - 0.2], 1).expand(-1, 2, -1)
        return self.last(torch.cat([torch.relu(self.second(both.flatten(1))), torch.relu(both).flatten(1)], 1))


@pytest.mark.parametrize("method", [Dual(walk="forward"), Projected(r=400, seed=0), SURE], ids=str)
@torch.no_grad()
def test_a_node_may_be_bounded_after_what_lies_behind_it(method):
    torch.manual_seed(0)
    net, x = autodual.certify(Repeated().double()), torch.rand(2, 4).double()
    exact, found = net.bounds(x, autodual.LInf(0.2)), net.bounds(x, autodual.LInf(0.2), method=method)
    assert bool(((found.width / exact.width - 1).abs() < 0.2).all())


# ------------------------------------------------------------------------------------- what is guaranteed


@pytest.mark.parametrize("estimator", ["median", "log-mean"])
def test_estimates_are_typed_as_such_and_certify_nothing(estimator):
    net, x = problem("mlp")
    method, region = Projected(estimator=estimator), autodual.LInf(1e-6)
    assert net.bounds(x, region, method=method).guarantee == NONE
    assert all(box.guarantee == NONE for box in net.intermediate(x, region, method).values())
    y = net(x).argmax(1)
    report = net.verify(x, y, region, method)
    assert bool((report.margins > 0).any())
    assert not report.certified.any()
    assert set(report.verdict) == {Verdict.UNKNOWN}
    assert "is an estimate" in report.summary()
    with pytest.raises(SpecificationError, match=r"proves nothing: the .* of random projections is an estimate"):
        net.flag(x, region, method)
    with pytest.raises(SpecificationError, match="proves nothing"):
        net.radius(x, method=method)


def test_a_wrong_prediction_is_still_falsified():
    net, x = problem("mlp")
    wrong = (net(x).argmax(1) + 1) % 3
    assert set(net.verify(x, wrong, autodual.LInf(0.01), "projected").verdict) == {Verdict.FALSIFIED}


def test_certificates_say_with_what_probability_they_hold():
    net, x = problem("mlp")
    region, y = autodual.LInf(1e-3), net(x).argmax(1)
    report = net.verify(x, y, region, replace(SURE, examples=3))
    assert report.certified.all()
    assert str(report.guarantee) == "PROBABILISTIC(0.000333333)"
    sampling = report.sampling
    assert (sampling.r, sampling.seed, sampling.delta, sampling.examples) == (100, 0, 1e-3, 3)
    assert "with probability 0.999 all 3 hold" in report.summary()
    assert not net.flag(x, region, SURE).any()
    assert net.bounds(x, region, method=SURE).guarantee == autodual.probabilistic(1e-3)


@pytest.mark.parametrize(
    ("kind", "label", "options", "count"),
    [
        ("mlp", "linf", {}, 12),  # the second hidden layer: the first is exact
        ("mlp", "linf", {"first_exact": False}, 24),
        ("mlp", "l2", {}, 24),  # two norms for each: of the ball and of the first layer's units
        ("mlp", "l2", {"first_exact": False}, 36),
        ("residual", "linf", {}, 10 + 10 + 8),
        ("mlp", "linf, per example", {}, 12),
        ("product", "l2", {}, 2 * 4),  # the product itself is bounded: its own noise is read there too
        ("product", "linf", {}, 4),
    ],
)
def test_every_estimate_is_counted(kind, label, options, count):
    net, x = problem(kind)
    report = net.verify(x, [0, 0, 0], REGIONS[label], replace(SURE, **options))
    assert report.sampling.estimates == count


@pytest.mark.thinned(2)
@pytest.mark.parametrize("label", [*REGIONS, *ENCLOSED])
@torch.no_grad()
def test_what_is_counted_is_what_is_read(monkeypatch, label):
    """Delta is divided by a number that the graph decides: it must cover all that is read off samples in the end."""
    readings, widths = [], []
    reading, radius = Projections._reading, Projections.radius

    def counted_reading(self, key):
        readings.append(key)
        return reading(self, key)

    def measured_radius(self, name, select):
        before = len(readings)
        found = radius(self, name, select)
        widths.append(self.run.features(name) * (len(readings) - before))
        return found

    monkeypatch.setattr(Projections, "_reading", counted_reading)
    monkeypatch.setattr(Projections, "radius", measured_radius)
    region, total = (REGIONS | ENCLOSED)[label], 0
    for kind in [*NETWORKS, *OTHERS]:
        for first_exact in (True, False):
            net, x = problem(kind)
            widths.clear()
            report = net.verify(x, [0, 0, 0], region, replace(SURE, heavy=0, first_exact=first_exact))
            assert sum(widths) <= report.sampling.estimates, kind
            total += sum(widths)
    assert total > 100


@pytest.mark.parametrize("label", [*REGIONS, *ENCLOSED])
@pytest.mark.parametrize("kind", ["convolutional", "residual"])
@torch.no_grad()
def test_no_sampled_point_leaves_bounds_with_a_probability(kind, label):
    net, x = problem(kind)
    region = (REGIONS | ENCLOSED)[label]
    bounds, exact = net.bounds(x, region, method=SURE, allow_rounding=True), net.bounds(x, region)
    assert bool((bounds.width < (3 if label in REGIONS else 40) * exact.width).all())
    if label == "own":
        return  # it cannot be sampled
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        assert bounds.contains(net(region.sample(x, generator))).all()


ZOO_CUT = [
    "lenet", "resnet, basic blocks", "mlp tanh", "softmax probabilities", "single-head attention", "layer norm", "group norm",
    "lstm cell, by hand", "swiglu", "bilinear fusion", "maxout", "pointnet-like", "squeeze and excitation",
    "convolution in 1-D", "cart-pole step",
]  # fmt: skip


@pytest.mark.thinned(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in ZOO_CUT else pytest.mark.slow) for name in ZOO])
def test_models_of_every_kind(name):
    """No point leaves bounds that may fail in one of a million runs; estimates are finite and have gradients."""
    entry = ZOO[name]
    net = autodual.certify(entry.model())
    method = Projected(r=200, estimator="tightest", delta=1e-6, seed=0)
    findings = examine(entry, 0.05, Effort(boxes=1, points=200, steps=5, restarts=1, node_points=2), (method,), net)
    assert findings.faults() == []


@pytest.mark.parametrize(
    ("estimator", "heavy"), [("geometric", 0), *(pytest.param("order", count, marks=pytest.mark.slow) for count in (0, 4))]
)
@torch.no_grad()
def test_radii_fail_no_more_often_than_stated(estimator, heavy):
    """Below the exact radius at the slopes that were realised: slopes, too, are estimated before."""
    net, x = problem("residual", batch=1)
    failures = trials = 0
    for seed in range(60):
        run = net._run(net._problem(x, autodual.LInf(0.2)))
        method = Projected(r=20, estimator=estimator, seed=seed, delta=0.5, heavy=heavy)
        projections = Watched(run, method, ())
        bound_with(run, method, projections)
        failures, trials = failures + projections.failures, trials + projections.trials
    assert trials >= 60
    assert failures <= stats.binom.ppf(0.999, trials, Watched.share)
    assert failures > 0 or estimator == "geometric"


class Watched(Projections):
    """Projections that compare one element's radius of each node with the exact one; every estimate may fail with 0.05."""

    share = 0.05
    failures = trials = 0

    def radius(self, name, select):
        found, exact = super().radius(name, select), select(exact_radius(self.run, name)[None])[0]
        self.trials += 1
        self.failures += int(found[0, 0] < exact[0, 0])
        return found


def bound_with(run, method, projections):
    """Relax a run by the given projections instead of the method's own."""
    from autodual.bounds import intermediate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intermediate, "_forward_walk", lambda *_: projections)
        return bound_rows(run, method, None)


@pytest.mark.parametrize("fresh", [True, False])
@torch.no_grad()
def test_only_fresh_projections_keep_the_stated_probability(fresh):
    """Where slopes follow estimates, what they let through of the draws behind these is small: shared draws fail too often."""
    failures, allowed = gated_failures(120, fresh=fresh), Often.share
    if fresh:
        assert failures <= stats.binom.ppf(0.999, 120, allowed)
    else:
        assert failures > stats.binom.ppf(1 - 1e-6, 120, allowed)


# ------------------------------------------------------------------------------------- reproducible


@pytest.mark.parametrize("method", [Projected(r=20, seed=5), Projected(r=20, seed=5, at_once=3), replace(SURE, r=400)], ids=str)
@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_a_seed_gives_the_same_alone_and_in_any_batch(kind, method):
    net, x = problem(kind, batch=5)
    region = autodual.LInf(0.2)
    together = net.bounds(x, region, method=method)
    for part in ([0], [3, 1], [4, 2, 0]):
        apart = net.bounds(x[part], region, method=method)
        torch.testing.assert_close(apart.lower, together.lower[part], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(apart.upper, together.upper[part], rtol=1e-9, atol=1e-9)
    tiny = torch.tensor([0.2, 1e-3, 0.2, 1e-3, 1e-3])  # where all is settled, layers are skipped
    apart = net.bounds(x[1:2], autodual.LInf(1e-3), method=method)
    torch.testing.assert_close(apart.lower, net.bounds(x, autodual.LInf(tiny), method=method).lower[1:2], rtol=1e-9, atol=1e-9)
    other = net.bounds(x, region, method=replace(method, seed=6))
    assert not torch.allclose(other.lower, together.lower, rtol=1e-6)


@torch.no_grad()
def test_how_many_rows_are_walked_at_once_changes_nothing():
    net, x = problem("convolutional")
    run = relaxed(net, x, autodual.LInf(0.2))
    name = run.program.graph.output
    whole = estimate(run, name, Projected(r=30, seed=2))
    for at_once in (1, 7, 8, 30, 99):
        torch.testing.assert_close(estimate(run, name, Projected(r=30, seed=2, at_once=at_once)), whole)
    run.sharing = False  # nor does pushing every example's noise on its own
    torch.testing.assert_close(estimate(run, name, Projected(r=30, seed=2)), whole)


def test_without_a_seed_torchs_own_generator_decides():
    net, x = problem("mlp")
    region, found = autodual.LInf(0.2), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(net.bounds(x, region, method=Projected(r=10)).lower)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@torch.no_grad()
def test_noise_is_cauchy_and_independent_between_stages_nodes_and_rows():
    net, x = problem("mlp")
    run = relaxed(net, x, autodual.LInf(0.2))
    first, second = run.program.relaxed[:2]
    sources = [NoiseSource(run, 4000, 0, stage, precise=precise) for stage in (0, 1) for precise in (False, True)]
    draws = [source.rows(name, "cauchy", 0, 2000).flatten() for source in sources for name in (first, second)]
    draws.append(sources[0].rows(first, "cauchy", 2000, 4000).flatten())
    for drawn in draws:
        assert stats.kstest(drawn.numpy(), "cauchy").pvalue > 1e-4
    signs = torch.stack([drawn.sign() for drawn in draws])
    agreement = (signs @ signs.T / signs.shape[1]).fill_diagonal_(0)
    assert agreement[[0, 0, 0, 2], [1, 4, 8, 6]].abs().max() < 5 / math.sqrt(signs.shape[1])
    normal = sources[0].rows(first, "normal", 0, 2000).flatten()
    assert stats.kstest(normal.numpy(), "norm").pvalue > 1e-4


def shard(rank: int, world: int, path: str) -> None:
    """Bound this process' half of a batch and gather both."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=world)
    net, x = problem("residual", batch=4)
    own = x.chunk(world)[rank]
    lower = net.bounds(own, autodual.LInf(0.2), method=Projected(r=20, seed=7)).lower.detach()
    gathered = [torch.empty_like(lower) for _ in range(world)]
    torch.distributed.all_gather(gathered, lower)
    if rank == 0:
        torch.save(torch.cat(gathered), f"{path}/lower.pt")
    torch.distributed.destroy_process_group()


def test_a_seed_gives_the_same_on_several_machines(tmp_path):
    torch.multiprocessing.spawn(shard, args=(2, str(tmp_path)), nprocs=2)
    net, x = problem("residual", batch=4)
    whole = net.bounds(x, autodual.LInf(0.2), method=Projected(r=20, seed=7)).lower.detach()
    torch.testing.assert_close(torch.load(tmp_path / "lower.pt"), whole, rtol=1e-9, atol=1e-9)


def test_a_search_for_radii_spends_delta_on_all_steps(monkeypatch):
    net, x = problem("mlp")
    used = []
    verify = autodual.BoundModule.verify

    def watched(self, x, y, region, method):
        used.append(method)
        return verify(self, x, y, region, method)

    monkeypatch.setattr(autodual.BoundModule, "verify", watched)
    radii = net.radius(x, method=SURE)
    assert (radii > 0).all()
    assert (radii <= 1.02 * net.radius(x)).all()
    own = [method for method in used if isinstance(method, Projected)]
    assert sum(method.delta for method in own) <= SURE.delta * (1 + 1e-9)
    assert len({method.seed for method in own}) == len(own)


# ------------------------------------------------------------------------------------- training and memory


@pytest.mark.parametrize("estimator", ["median", "log-mean"])
def test_the_loss_is_differentiable(estimator):
    """Against central differences: noise is fixed by the seed."""
    net, x = problem("convolutional")
    y, region, method = torch.tensor([0, 1, 2]), autodual.LInf(0.1), Projected(r=9, seed=4, estimator=estimator)
    net.robust_loss(x, y, region, method).backward()
    for name, parameter in net.model.named_parameters():
        gradient, direction = parameter.grad, torch.randn_like(parameter)
        with torch.no_grad():
            ends = []
            for step in (1e-6, -1e-6):
                parameter += step * direction
                ends.append(net.robust_loss(x, y, region, method))
                parameter -= step * direction
        difference = (ends[0] - ends[1]) / 2e-6
        assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("estimator", ["median", "log-mean"])
def test_recomputed_streams_have_the_same_gradient(estimator):
    net, x = problem("residual")
    gradients = []
    for at_once in (None, 4):
        net.zero_grad()
        method = Projected(r=10, seed=4, estimator=estimator, at_once=at_once)
        net.robust_loss(x, [0, 1, 2], autodual.LInf(0.1), method).backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right)


def test_memory_of_a_step_is_that_of_the_rows_walked_at_once():
    """Bytes that autograd keeps: with all streams at once about r activations, else a few."""
    net = autodual.certify(nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 3)))
    x, kept = torch.rand(8, 64), {}
    for at_once in (None, 8):
        held = {}

        def pack(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        method = Projected(r=64, estimator="log-mean", seed=0, at_once=at_once)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = net.robust_loss(x, [0] * 8, autodual.LInf(0.1), method)
        kept[at_once] = sum(held.values())
        loss.backward()
    assert kept[8] < 0.35 * kept[None]


@pytest.mark.parametrize("region", [autodual.L2(torch.tensor([0.0, 0.1, 0.2])), autodual.L2(0.1), autodual.LInf(0.0)])
@pytest.mark.parametrize("method", [Projected(r=5, seed=0), Projected(r=5, seed=0, first_exact=False), SURE], ids=str)
def test_gradients_are_finite_where_a_radius_is_zero(region, method):
    net, x = problem("mlp")
    net.model.first.weight.data[0] = 0.0
    net.robust_loss(x, [0, 1, 2], region, method).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in net.parameters())


def test_training_on_estimates_lowers_the_exact_loss():
    torch.manual_seed(0)
    x = torch.rand(64, 2)
    y = (x[:, 0] > x[:, 1]).long()
    model = nn.Sequential(nn.Linear(2, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2))
    net, region = autodual.certify(model), autodual.LInf(0.02)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = net.robust_loss(x, y, region).item()
    for _ in range(30):
        optimizer.zero_grad()
        net.robust_loss(x, y, region, Projected(r=8)).backward()
        optimizer.step()
    assert net.robust_loss(x, y, region).item() < 0.7 * before


def test_any_precision_and_device(dtype, device):
    net, x = problem("convolutional")
    net, x = net.to(device, dtype), x.to(device, dtype)
    for method in (Projected(r=20, seed=0), SURE):
        bounds = net.bounds(x, autodual.LInf(0.1), method=method)
        assert bounds.lower.dtype == dtype
        assert (bounds.lower <= net(x)).all()
        assert (net(x) <= bounds.upper).all()


def test_an_empty_batch_has_empty_bounds():
    net, x = problem("mlp")
    bounds = net.bounds(x[:0], autodual.LInf(0.1), method="projected")
    assert bounds.lower.shape == (0, 3)
    assert bounds.guarantee == NONE


# ------------------------------------------------------------------------------------- options


def test_one_delta_covers_no_more_examples_than_it_says():
    net, x = problem("mlp")
    with pytest.raises(SpecificationError, match="delta is to cover 2 examples together, but there are 3"):
        net.verify(x, [0, 0, 0], autodual.LInf(0.1), replace(SURE, examples=2))


class Misspelt(Halfspace):
    def noise(self, x):
        return Noise("gaussian", torch.ones(()))


class Narrow(Halfspace):
    def noise(self, x):
        return Noise("normal", torch.tensor(0.01))


@pytest.mark.parametrize(
    ("region", "message"), [(Misspelt(), "must be .cauchy. or .normal."), (Narrow(), "noise is too small")]
)
def test_a_regions_own_noise_is_checked(region, message):
    net, x = problem("mlp")
    with pytest.raises(SpecificationError, match=message):
        net.bounds(x, region, method="projected")


def test_lines_that_are_not_parallel_are_refused(monkeypatch):
    slopes = DualReLU.slopes
    monkeypatch.setattr(DualReLU, "slopes", lambda self, bounds, choice: slopes(self, bounds, "adaptive"))
    net, x = problem("mlp")
    for method in ("projected", Dual(walk="forward")):
        with pytest.raises(autodual.AutoDualError, match=r"DualReLU.slopes gave two slopes where .parallel. was asked for"):
            net.bounds(x, autodual.LInf(0.2), method=method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r, the number of projections"),
        ({"r": 2}, "at least 3"),
        ({"r": 10.0}, "r, the number of projections"),
        ({"estimator": "mean"}, "estimator must be one of median, log-mean, geometric, order, tightest, got 'mean'"),
        ({"seed": -1}, "seed must be"),
        ({"delta": 0.0}, "delta, the probability of failure"),
        ({"delta": 1.5}, "between 0 and 1"),
        ({"examples": 0}, "examples must be"),
        ({"seed": True}, "seed must be"),
        ({"delta": 5e-324}, "between 0 and 1"),
        ({"at_once": 0}, "at_once must be"),
        ({"heavy": 5}, 'for an estimate 0 or None, got 5 with estimator "median"'),
        ({"heavy": -1, "estimator": "order"}, "heavy must be None or an integer of at least 0"),
        ({"estimator": "order", "last_exact": False}, "needs last_exact and intersect"),
        ({"estimator": "geometric", "intersect": False}, "needs last_exact and intersect"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(SpecificationError, match=message):
        Projected(**options)


def test_every_switch_moves_towards_the_texts_own_estimator():
    """The text estimates everything and takes nothing from intervals: noise makes units look unsettled, radii drift upwards."""
    torch.manual_seed(0)
    net = autodual.certify(nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 3)))
    x, region = torch.rand(1, 64), autodual.LInf(0.1)
    exact = net.bounds(x, region).width.mean()
    own = Projected(r=10, first_exact=False, last_exact=False, intersect=False)
    with torch.no_grad():
        ratios = [
            torch.stack([net.bounds(x, region, method=replace(method, seed=s)).width.mean() for s in range(40)]).mean() / exact
            for method in (Projected(r=10), own)
        ]
    assert abs(ratios[0] - 1) < abs(ratios[1] - 1)
    assert ratios[1] > 1.05
