"""Linear programs: against programs written by hand from (3.6), other methods, attacks and finite differences."""

import builtins
import logging

import numpy as np
import pytest
import torch
from scipy import optimize
from scipy.optimize import OptimizeResult, linprog
from torch import nn

import autodual
from autodual.attacks import minimize
from autodual.bounds import sparse_program
from autodual.bounds.bound import bound_rows
from autodual.bounds.candidates import candidates
from autodual.errors import SpecificationError
from tests.reference.lp import Ball, Relu, minimum
from tests.reference.networks import NETWORKS, random_network

DOUBLE = torch.float64
BOX = autodual.LInf(0.3)


class Product(nn.Module):
    """Two factors of different shapes, one curved."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(4, 1), nn.Linear(5, 2)

    def forward(self, x):
        return self.c(torch.tanh(self.a(x)) * torch.relu(self.b(x)))


class Pooled(nn.Module):
    """The largest element of windows, behind a convolution."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.b(torch.max_pool2d(self.a(x.view(-1, 1, 3, 3)), 2).flatten(1))


class Attention(nn.Module):
    """Products of matrices, and a composite operator with an interval of its own."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(2, 2)

    def forward(self, x):
        z = x.view(-1, 2, 2)
        return (torch.softmax(self.q(z) @ z.transpose(1, 2), -1) @ z).flatten(1)


class Two(nn.Module):
    """Two inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(2, 5), nn.Linear(5, 2)

    def forward(self, x, y):
        return self.c(torch.relu(self.a(x) + self.b(y)))


def layers(activation, inputs=4, hidden=6):
    parts = [nn.Linear(inputs, hidden), activation, nn.Linear(hidden, hidden), activation, nn.Linear(hidden, 2)]
    return nn.Sequential(*parts)


MODELS = {
    "hardtanh": (lambda: layers(nn.Hardtanh()), 4),
    "leaky": (lambda: layers(nn.LeakyReLU(0.1)), 4),
    "tanh": (lambda: layers(nn.Tanh()), 4),
    "product": (Product, 4),
    "max-pool": (Pooled, 9),
    "attention": (Attention, 4),
    "norm": (lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 2)), 4),
}


def made(build, seed=0, dtype=DOUBLE):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().to(dtype).eval()


def points(*shape, seed=0, dtype=DOUBLE):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(model, x, region, c, box):
    """Solve (3.6) for one hidden layer, one example, as printed: variables x, z^ and z."""
    w, b = (parameter.detach().numpy() for parameter in (model[0].weight, model[0].bias))
    n, m = w.shape
    low, high = box.lower[0].detach().numpy(), box.upper[0].detach().numpy()
    equal = [(np.hstack([w, -np.eye(n), np.zeros((n, n))]), -b)]
    below = []
    for i in range(n):
        pre, post = (np.eye(m + 2 * n)[m + k * n + i] for k in (0, 1))
        if low[i] >= 0:
            equal.append(((post - pre)[None], [0.0]))
        elif high[i] <= 0:
            equal.append((post[None], [0.0]))
        else:
            below += [(-post, 0.0), (pre - post, 0.0)]
            below.append(((high[i] - low[i]) * post - high[i] * pre, -high[i] * low[i]))
    hull = region.hull(x)
    ends = [*zip(hull.lower[0].tolist(), hull.upper[0].tolist(), strict=True), *[(None, None)] * (2 * n)]
    objective = np.concatenate([np.zeros(m + n), c @ model[2].weight.detach().numpy()])
    rows = {"A_ub": np.stack([row for row, _ in below]), "b_ub": [right for _, right in below]} if below else {}
    found = linprog(
        objective, **rows, A_eq=np.vstack([a for a, _ in equal]), b_eq=np.concatenate([b for _, b in equal]), bounds=ends
    )
    return found.fun + c @ model[2].bias.detach().numpy()


@pytest.mark.parametrize("seed", range(3))
def test_one_hidden_layer_against_a_program_written_by_hand(seed):
    model, x = made(lambda: nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2)), seed), points(1, 3, seed=seed)
    net, rows = autodual.certify(model), torch.tensor([[1.0, -1.0], [0.0, 1.0]], dtype=DOUBLE)
    found = net.linear_program(x, BOX, rows)
    (box,) = net.intermediate(x, BOX, "adaptive").values()
    for number, row in enumerate(rows.numpy()):
        assert abs(found.optimum[0, number].item() - by_hand(model, x, BOX, row, box)) < 1e-7
    torch.testing.assert_close(found.bound, found.optimum, rtol=0, atol=1e-8)


REGIONS = {
    "linf": (BOX, Ball(float("inf"), 0.3)),
    "wide": (autodual.LInf(0.7, domain=(0.0, 1.0)), Ball(float("inf"), 0.7, 0.0, 1.0)),
    "l1": (autodual.L1(0.8), Ball(1, 0.8)),
    "l1 in 0..1": (autodual.L1(0.8, domain=(0.0, 1.0)), Ball(1, 0.8, 0.0, 1.0)),
}


@pytest.mark.parametrize(("kind", "label"), [*zip(NETWORKS, REGIONS, strict=True), ("mlp", "l1"), ("residual", "linf")])
@torch.no_grad()
def test_relu_networks_against_the_reference(kind, label):
    """Deep, convolutional, residual and dense networks: the optimum, and the walk that proves it."""
    (region, ball), (model, shape) = REGIONS[label], random_network(kind, 1)
    net, x = autodual.certify(model), points(2, *shape)
    found, boxes = net.linear_program(x, region), list(net.intermediate(x, region, "adaptive").values())
    read = [step.parent for step in model.steps() if isinstance(step, Relu)]
    for example in range(2):
        own = slice(example, example + 1)
        bounds = {name: (box.lower[own], box.upper[own]) for name, box in zip(read, boxes, strict=True)}
        optima = minimum(model.steps(), x[own], ball, bounds, torch.eye(3, dtype=DOUBLE))
        expected = torch.tensor([value for value, _ in optima], dtype=DOUBLE)
        torch.testing.assert_close(found.optimum[example], expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.bound, found.optimum, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "intermediate"), [*((kind, "adaptive") for kind in MODELS), ("max-pool", "dual"), ("hardtanh", "interval")]
)
def test_between_the_other_methods_and_attacks(kind, intermediate):
    build, inputs = MODELS[kind]
    net, x = autodual.certify(made(build)), points(2, inputs)
    found = net.bounds(x, BOX, method=autodual.LP(intermediate, cells=4))
    base = net.bounds(x, BOX, method=intermediate)
    assert found.guarantee == autodual.REAL
    assert (found.lower >= base.lower).all()
    assert (found.upper <= base.upper).all()
    assert (found.upper - found.lower < base.upper - base.lower).any() or kind == "attention"
    seed = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(300):
            assert found.contains(net(BOX.sample(x, seed)), 1e-9).all()
    rows = torch.eye(found.lower.shape[1], dtype=DOUBLE)
    assert (minimize(net.model, x, BOX, rows, steps=10)[0] >= found.lower - 1e-9).all()


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "norm"])
def test_the_walk_reaches_the_optimum(kind):
    """Or exceeds it: a rule's own offset may be better than what the lines of the program leave.

    A layer norm's boxes are met with intervals that are narrower than what lines imply. Lines that meet at the end of such a
    box say so to the program, but a walk has no multiplier for that.
    """
    build, inputs = MODELS[kind]
    net, x = autodual.certify(made(build)), points(2, inputs)
    found = net.linear_program(x, BOX, method=autodual.LP(cells=4))
    assert (found.bound >= found.optimum - 1e-8).all()
    if kind in ("hardtanh", "leaky"):
        torch.testing.assert_close(found.bound, found.optimum, rtol=0, atol=1e-8)


def test_points_and_multipliers_solve_the_program():
    """Feasible, of the value found, and complementary: what has a price is not slack."""
    model, x = made(lambda: layers(nn.ReLU())), points(2, 4)
    net, row = autodual.certify(model), torch.tensor([[1.0, -1.0]], dtype=DOUBLE)
    found, boxes = net.linear_program(x, BOX, row), net.intermediate(x, BOX, "adaptive")
    z, nu = found.points, found.duals
    first, relu, second, relu_1, last = list(z)[1:]
    source = next(iter(z))
    assert BOX.contains(x, z[source][0], 1e-7).all()
    for before, after, module in ((source, first, model[0]), (relu, second, model[2]), (relu_1, last, model[4])):
        torch.testing.assert_close(z[after][0], module(z[before][0]))
        torch.testing.assert_close(nu[before][0], nu[after][0] @ module.weight, rtol=0, atol=1e-7)
    torch.testing.assert_close(nu[last][0], row.expand(2, -1))
    torch.testing.assert_close((z[last][0] * row).sum(1, keepdim=True), found.optimum)
    for before, after in ((first, relu), (second, relu_1)):
        low, high = boxes[before].lower, boxes[before].upper
        above = torch.where(low >= 0, z[before], high.clamp(min=0) * (z[before] - low) / (high - low.clamp(max=0)))
        above, below = torch.where(high <= 0, 0.0, above), z[before].clamp(min=0)
        assert (z[after] >= below - 1e-7).all()
        assert (z[after] <= above + 1e-7).all()
        assert ((nu[after] < 1e-9) | (z[after] <= below + 1e-7)).all()
        assert ((nu[after] > -1e-9) | (z[after] >= above - 1e-7)).all()
    centre, radius = BOX.center(x), 0.3
    corner = centre - radius * nu[source][0].sign()
    assert ((nu[source][0].abs() < 1e-9) | ((z[source][0] - corner).abs() < 1e-7)).all()


def test_several_inputs_each_with_its_region():
    net, x, y = autodual.certify(made(Two)), points(2, 3), points(2, 2, seed=1)
    regions = {"x": autodual.L1(0.4), "y": autodual.Box(0.2, 0.8)}
    found, base = net.linear_program((x, y), regions), net.bounds((x, y), regions, method="adaptive")
    torch.testing.assert_close(found.bound, found.optimum, rtol=0, atol=1e-8)
    assert (found.bound >= base.lower - 1e-9).all()
    assert regions["x"].contains(x, found.points["x"][0], 1e-6).all()
    assert regions["y"].contains(y, found.points["y"][0], 1e-6).all()


def test_products_of_matrices_share_their_slopes():
    """Each of a product's elements would have slopes of its own if shapes were all that counted: here all are 2x2."""
    net, x = autodual.certify(made(Attention)), points(2, 4)
    run = net._run(net._problem(x, BOX))
    bound_rows(run, autodual.Adaptive(), None)
    counts = {type(run.layers[name]).__name__: len(candidates(run, name, 4).slopes) for name in run.program.relaxed}
    assert counts["DualMatrixProduct"] == 1
    assert counts["DualExp"] > 4


def test_where_a_region_leaves_a_domain_nothing_is_known():
    net = autodual.certify(Logarithm().double())
    found = net.bounds(torch.tensor([[0.5], [0.3]], dtype=DOUBLE), autodual.LInf(0.15), method="lp")
    assert found.lower.isfinite().tolist() == [[True], [False]]
    assert found.lower[0] <= torch.log(torch.tensor(0.15)) + 0.35 <= found.upper[0]


def test_what_needs_no_program():
    """Affine models, and no rows at all."""
    net, x = autodual.certify(made(lambda: nn.Linear(3, 2))), points(2, 3)
    torch.testing.assert_close(net.linear_program(x, BOX).optimum, net.bounds(x, BOX).lower, rtol=0, atol=1e-9)
    assert net.bounds(x, BOX, torch.zeros(0, 2), method="lp").lower.shape == (2, 0)


def test_a_batch_is_its_examples():
    net, x = autodual.certify(made(lambda: layers(nn.ReLU()))), points(3, 4)
    spec = points(3, 2, 2, seed=2) - 0.5
    together = net.linear_program(x, BOX, spec).bound
    alone = [net.linear_program(x[i : i + 1], BOX, spec[i]).bound for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-7)


def test_everything_that_bounds_takes_it():
    net, x = autodual.certify(made(lambda: layers(nn.ReLU()), dtype=torch.float32)), points(3, 4, dtype=torch.float32)
    region, y = autodual.LInf(0.2), torch.tensor([0, 1, 0])
    assert (net.margins(x, y, region, "lp") >= net.margins(x, y, region, "adaptive")).all()
    report = net.verify(x, y, region, autodual.LP(time_limit=60.0))
    assert (report.certified >= net.verify(x, y, region, "adaptive").certified).all()
    assert (report.allowance.sum(1) > 0).all()
    assert (net.flag(x, region, "lp") <= net.flag(x, region, "adaptive")).all()
    assert (net.radius(x[:1], method="lp") >= 0.9 * net.radius(x[:1], method="adaptive")).all()
    assert "12 of 12 linear programs" in str(net.explain(x, region, autodual.LP()))


def test_the_loss_has_the_optimum_s_derivative():
    """The multipliers stay where they are to first order: finite differences of the solver's own optimum agree."""
    model, x, y = made(lambda: layers(nn.ReLU(), 3, 4), seed=4), points(1, 3), torch.tensor([0])
    net, region = autodual.certify(model), autodual.LInf(0.1)
    weight, options = model[2].weight, autodual.LP("dual")
    (gradient,) = torch.autograd.grad(net.robust_loss(x, y, region, options), weight)
    direction, step = points(*weight.shape, seed=3) - 0.5, 1e-5
    values = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            weight += sign * step * direction
        values.append(net.robust_loss(x, y, region, options).item())
        with torch.no_grad():
            weight -= sign * step * direction
    assert abs((values[0] - values[1]) / (2 * step) - (gradient * direction).sum().item()) < 1e-5


def test_where_the_solver_fails_the_other_bound_remains(monkeypatch, caplog):
    net, x = autodual.certify(made(lambda: layers(nn.ReLU()))), points(2, 4)
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patched:
        patched.setattr(sparse_program, "solved", lambda *arguments: None)
        found, bounds = net.linear_program(x, BOX), net.bounds(x, BOX, method="lp")
    base = net.bounds(x, BOX, method="adaptive")
    assert found.optimum.isnan().all()
    assert torch.equal(found.bound, base.lower)
    assert torch.equal(bounds.lower, base.lower)
    assert torch.equal(bounds.upper, base.upper)
    assert "4 of 4 linear programs were not solved: there the bound is that of Adaptive" in caplog.text


def test_wrong_multipliers_give_a_looser_bound_never_a_wrong_one(monkeypatch):
    model, x = made(lambda: layers(nn.ReLU())), points(2, 4)
    net, exact = autodual.certify(model), autodual.certify(model).linear_program(x, BOX)
    seed, solved = np.random.default_rng(0), sparse_program.solved

    def spoiled(*arguments):
        result = solved(*arguments)
        result.ineqlin.marginals = result.ineqlin.marginals * seed.uniform(0, 3, len(result.ineqlin.marginals))
        return result

    monkeypatch.setattr(sparse_program, "solved", spoiled)
    assert (net.linear_program(x, BOX).bound <= exact.optimum + 1e-7).all()


def test_a_solver_that_errs_is_asked_again(monkeypatch):
    """HiGHS' presolve calls some programs with tiny boxes infeasible; one that runs out of time is not asked again."""
    net, x, asked = autodual.certify(made(lambda: layers(nn.ReLU()))), points(1, 4), []

    def failing(*arguments, options, status=2, **others):
        asked.append(options["presolve"])
        if options["presolve"]:
            return OptimizeResult(status=status, message="no")
        return linprog(*arguments, options=options, **others)

    exact = net.linear_program(x, BOX).optimum
    monkeypatch.setattr(optimize, "linprog", failing)
    torch.testing.assert_close(net.linear_program(x, BOX).optimum, exact, rtol=0, atol=1e-7)
    assert asked == 2 * [True, False]
    asked.clear()
    monkeypatch.setattr(optimize, "linprog", lambda *arguments, **others: failing(*arguments, status=1, **others))
    assert net.linear_program(x, BOX).optimum.isnan().all()
    assert asked == 2 * [True]


def test_a_limit_on_time_is_passed_on(monkeypatch):
    net, x, seen, solved = autodual.certify(made(lambda: layers(nn.ReLU()))), points(1, 4), [], sparse_program.solved
    monkeypatch.setattr(sparse_program, "solved", lambda *arguments: seen.append(arguments[-1]) or solved(*arguments))
    net.bounds(x, BOX, method=autodual.LP(time_limit=7.0))
    assert seen == [7.0] * 4


def test_refusals():
    net, x = autodual.certify(made(lambda: layers(nn.ReLU()))), points(1, 4)
    with pytest.raises(SpecificationError, match=r"needs a region bounded by planes.*got L2\(0.1\)"):
        net.bounds(x, autodual.L2(0.1), method="lp")
    with pytest.raises(SpecificationError, match="linear_program takes options LP"):
        net.linear_program(x, BOX, method=autodual.Dual())
    with pytest.raises(SpecificationError, match="an empty batch has no linear program"):
        net.linear_program(x[:0], BOX)
    with pytest.raises(SpecificationError, match="does not depend on the input"):
        autodual.certify(Constant()).linear_program(x, BOX)
    for wrong in (autodual.LP(), "projected"):
        with pytest.raises(SpecificationError, match="intermediate must prove its boxes by walks"):
            autodual.LP(wrong)
    with pytest.raises(SpecificationError, match="cells must be a positive integer"):
        autodual.LP(cells=0)
    with pytest.raises(SpecificationError, match="time_limit must be None or a positive number"):
        autodual.LP(time_limit=0.0)


class Logarithm(nn.Module):
    """Has values above 0.2 only."""

    def forward(self, x):
        return torch.log(x - 0.2) + torch.relu(x)


class Constant(nn.Module):
    """Ignores its input's values."""

    def forward(self, x):
        return torch.zeros_like(x)


def test_without_scipy(monkeypatch):
    net, x, imported = autodual.certify(made(lambda: layers(nn.ReLU()))), points(1, 4), builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == "scipy":
            raise ImportError(name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"method \"lp\" needs scipy: pip install 'autodual\[lp\]'"):
        net.bounds(x, BOX, method="lp")
