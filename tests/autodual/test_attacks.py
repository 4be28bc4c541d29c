"""Attacks stay inside their region, find what can be found, and leave the model as it was."""

import pytest
import torch
from torch import nn

from autodual.attacks import fgsm, minimize, msd, pgd, smallest_margin
from autodual.errors import SpecificationError
from autodual.regions import L1, L2, Box, LInf, Region

REGIONS = [
    LInf(0.3),
    LInf(0.3, domain=(0.0, 1.0)),
    L2(0.7),
    L2(0.7, domain=(0.0, 1.0)),
    L1(1.1),
    L1(1.1, domain=(0.0, 1.0)),
    Box(0.1, torch.linspace(0.2, 0.9, 6)),
]


class Ellipsoid(Region):
    """A region with nothing but a support function."""

    def __init__(self, axes):
        self.axes = axes

    def support(self, x, v):
        return (v * x).sum(-1) + (v * self.axes).norm(dim=-1)


def uniform(*shape, seed=0, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4)).double()


@pytest.mark.parametrize("region", [*REGIONS, Ellipsoid(torch.linspace(0.1, 1.0, 6, dtype=torch.float64))], ids=repr)
def test_one_step_is_exact_for_an_affine_model(region):
    model, x = nn.Linear(6, 4).double(), uniform(3, 6)
    rows = 2 * uniform(3, 5, 4, seed=1) - 1
    values, points = minimize(model, x, region, rows, steps=1)
    with torch.no_grad():
        pulled = (rows @ model.weight).movedim(1, 0)
        exact = rows @ model.bias - region.support(x, -pulled).T
    torch.testing.assert_close(values, exact, atol=1e-7, rtol=1e-7)
    assert points.shape == (3, 5, 6)
    at_points = torch.einsum("nsk,nsk->ns", model(points), rows)
    torch.testing.assert_close(values, at_points, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("region", REGIONS, ids=repr)
def test_points_are_inside_and_better_than_samples(network, region):
    x, y = uniform(5, 6), torch.tensor([0, 1, 2, 3, 0])
    generator = torch.Generator().manual_seed(3)
    z = pgd(network, x, y, region, steps=20, restarts=10, generator=generator)
    assert region.contains(x, z, 1e-9).all()
    network.eval()
    found = smallest_margin(network(z), y)
    samples = torch.stack([smallest_margin(network(region.sample(x, generator)), y) for _ in range(100)])
    assert found.mean() <= samples.amin(0).mean()
    assert (found <= smallest_margin(network(fgsm(network, x, y, region)), y) + 1e-9).all()


def test_the_seed_decides(network):
    x, y = uniform(5, 6), torch.zeros(5, dtype=torch.long)
    runs = [pgd(network, x, y, L2(1.0), restarts=2, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_alone(network, training):
    network.train(training)
    network[1].eval()
    modes = [module.training for module in network.modules()]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    network[0].weight.grad = torch.full_like(network[0].weight, 2.0)
    x = uniform(5, 6).requires_grad_()
    pgd(network, x, torch.zeros(5, dtype=torch.long), LInf(0.1))
    minimize(network, x, LInf(0.1), torch.eye(4))
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert (network[0].weight.grad == 2.0).all()
    assert x.grad is None
    assert network[4].weight.grad is None


def test_modes_come_back_after_an_error(network):
    network.train()
    with pytest.raises(RuntimeError):
        pgd(network, uniform(5, 7), torch.zeros(5, dtype=torch.long), LInf(0.1))
    assert all(module.training for module in network.modules())


def test_an_example_does_not_depend_on_its_batch(network):
    x, y, eps = uniform(4, 6), torch.tensor([3, 2, 1, 0]), torch.tensor([0.1, 0.2, 0.3, 0.0], dtype=torch.float64)
    together = pgd(network, x, y, LInf(eps))
    alone = torch.cat([pgd(network, x[i : i + 1], y[i : i + 1], LInf(eps[i : i + 1])) for i in range(4)])
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=0)
    torch.testing.assert_close(together[3], x[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_dtype(network, dtype):
    model, x = network.to(dtype), uniform(2, 6).to(dtype)
    for region in (LInf(0.1), L2(0.5), L1(0.5)):
        z = pgd(model, x, torch.tensor([0, 1]), region, steps=3)
        assert z.dtype == dtype
        assert z.isfinite().all()


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(4, 2)

    def forward(self, image, state, index=None):
        return self.left(image) - self.right(state)


def test_several_inputs():
    torch.manual_seed(0)
    model, image, state, index = TwoInputs(), uniform(2, 3).float(), uniform(2, 4).float(), torch.tensor([0, 1])
    y = torch.tensor([0, 1])
    as_tuple = pgd(model, (image, state, index), y, LInf(0.1))
    assert isinstance(as_tuple, tuple)
    assert as_tuple[2] is index
    assert not torch.equal(as_tuple[1], state)
    as_dict = pgd(model, {"state": state, "image": image}, y, {"state": L2(0.5)})
    assert as_dict["image"] is image
    assert L2(0.5).contains(state, as_dict["state"], 1e-6).all()
    named = pgd(model, (image, state), y, {"state": L2(0.5)})
    torch.testing.assert_close(named[1], as_dict["state"])
    with pytest.raises(SpecificationError, match="unknown"):
        pgd(model, (image, state), y, {"unknown": L2(0.5)})
    values, points = minimize(model, (image, state), LInf(0.1), torch.eye(2))
    assert values.shape == (2, 2)
    assert points[0].shape == (2, 2, 3)


def test_a_support_function_is_enough(network):
    region = Ellipsoid(torch.linspace(0.1, 1.0, 6, dtype=torch.float64))
    x, y = uniform(5, 6), torch.zeros(5, dtype=torch.long)
    z = pgd(network, x, y, region, restarts=3, generator=torch.Generator().manual_seed(0))
    assert (((z - x) / region.axes).norm(dim=1) <= 1 + 1e-9).all()
    network.eval()
    assert (smallest_margin(network(z), y) < smallest_margin(network(x), y)).all()


def test_awkward_models():
    y = torch.zeros(2, dtype=torch.long)
    constant = pgd(lambda x: torch.ones(len(x), 3), uniform(2, 6), y, LInf(0.1))
    assert constant.shape == (2, 6)
    flat = pgd(lambda x: torch.relu(x - 5) @ torch.ones(6, 3, dtype=x.dtype), uniform(2, 6), y, L2(0.1))
    assert flat.isfinite().all()
    assert pgd(nn.Linear(6, 3).double(), uniform(0, 6), y[:0], L2(0.1)).shape == (0, 6)
    assert pgd(lambda x: torch.stack([x, -x], 1), uniform(3), torch.ones(3, dtype=torch.long), LInf(0.1)).shape == (3,)
    one_number, x = nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)).double(), uniform(2, 6)
    values, points = minimize(one_number, x, LInf(0.1), torch.ones(1, 1))
    assert points.shape == (2, 1, 6)
    torch.testing.assert_close(values[:, 0], one_number(x) - 0.1 * one_number[0].weight.abs().sum())


def test_margins():
    outputs = torch.tensor([[3.0, 1.0, 2.5], [0.0, 1.0, 4.0]])
    assert smallest_margin(outputs, torch.tensor([0, 1])).tolist() == [0.5, -3.0]
    with pytest.raises(SpecificationError, match="at least one"):
        minimize(nn.Linear(2, 2), torch.zeros(1, 2), LInf(0.1), torch.zeros(0, 2))
    with pytest.raises(SpecificationError, match="restarts"):
        pgd(nn.Linear(2, 2), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), LInf(0.1), restarts=0)


class WritesIntoItsInputs(nn.Module):
    """What users do to save memory."""

    def forward(self, x, shift=None):
        x -= 0.5
        torch.relu_(x)
        if shift is not None:
            shift *= 2.0
            x = x + shift
        return torch.stack([x.sum(1), -x.sum(1)], 1)


def test_a_model_may_write_into_its_inputs():
    x, y = uniform(3, 6), torch.tensor([0, 1, 0])
    given = x.clone()
    for model in (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 3).double()), WritesIntoItsInputs()):
        for z in (pgd(model, x, y, LInf(0.1), steps=3, restarts=2), fgsm(model, x, y, LInf(0.1))):
            assert LInf(0.1).contains(given, z, 1e-9).all()
        minimize(model, x, LInf(0.1), torch.eye(2 if isinstance(model, WritesIntoItsInputs) else 3), steps=3)
        assert torch.equal(x, given)
    shift = uniform(3, 6, seed=1)
    kept = shift.clone()
    for inputs in ((x, shift), {"x": x, "shift": shift}):
        pgd(WritesIntoItsInputs(), inputs, y, {"x": LInf(0.1)}, steps=2)
        assert torch.equal(shift, kept)


class Counting(nn.Module):
    """A classifier that counts how often it is run, and how often a gradient comes back through it."""

    def __init__(self, model):
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, x):
        self.forwards += 1
        outputs = self.model(x)
        if outputs.requires_grad:
            outputs.register_hook(self.count)
        return outputs

    def count(self, gradient):
        self.backwards += 1


def test_the_last_point_costs_exactly_the_steps(network):
    x, y = uniform(5, 6), torch.tensor([0, 1, 2, 3, 0])
    for steps, region, random_start in ((1, LInf(0.1), True), (4, L2(0.5), False), (7, L1(0.5, domain=(0.0, 1.0)), True)):
        model = Counting(network)
        z = pgd(model, x, y, region, steps=steps, keep="last", random_start=random_start)
        assert (model.forwards, model.backwards) == (steps, steps)
        assert region.contains(x, z, 1e-9).all()
    model = Counting(network)
    pgd(model, x, y, LInf(0.1), steps=4)
    assert (model.forwards, model.backwards) == (5, 4)
    with pytest.raises(SpecificationError, match="restarts must be 1"):
        pgd(network, x, y, LInf(0.1), keep="last", restarts=2)
    with pytest.raises(SpecificationError, match='"best" or "last"'):
        pgd(network, x, y, LInf(0.1), keep="worst")


def test_training_modes_do_not_reach_the_attack(network):
    """Batch norm uses its running statistics during the attack, which leaves them as they were."""
    x, y = uniform(5, 6), torch.tensor([0, 1, 2, 3, 0])
    network.train()
    before = network[1].running_mean.clone()
    z = pgd(network, x, y, LInf(0.3), steps=5, keep="last")
    assert torch.equal(network[1].running_mean, before)
    assert torch.equal(z, pgd(network.eval(), x, y, LInf(0.3), steps=5, keep="last"))


@pytest.mark.parametrize("region", REGIONS, ids=repr)
def test_a_targeted_attack_reaches_the_label(network, region):
    """For an affine classifier one step reaches as far as the region does; for others it comes at least nearer."""
    x, target = uniform(5, 6), torch.tensor([3, 2, 1, 0, 1])
    z = pgd(network, x, target, region, targeted=True, restarts=3, generator=torch.Generator().manual_seed(0))
    assert region.contains(x, z, 1e-9).all()
    network.eval()
    with torch.no_grad():
        start, samples = region.center(x), [region.sample(x, torch.Generator().manual_seed(i)) for i in range(50)]
        reached = smallest_margin(network(z), target)
        assert (reached > smallest_margin(network(start), target)).all()
        assert (reached >= torch.stack([smallest_margin(network(each), target) for each in samples]).amax(0) - 1e-9).all()
    affine = nn.Linear(6, 2).double()
    z = fgsm(affine, x, torch.ones(5, dtype=torch.long), region, targeted=True)
    row = (affine.weight[1] - affine.weight[0]).expand(1, 5, 6)
    best = region.support(x, row)[0] + affine.bias[1] - affine.bias[0]
    torch.testing.assert_close(smallest_margin(affine(z), torch.ones(5, dtype=torch.long)), best, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("region", REGIONS, ids=repr)
def test_a_single_step_from_a_random_point(network, region):
    x, y = uniform(5, 6), torch.tensor([0, 1, 2, 3, 0])
    runs = [
        fgsm(network, x, y, region, random_start=True, keep="last", generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert all(region.contains(x, z, 1e-9).all() for z in runs)
    assert not torch.equal(runs[0], fgsm(network, x, y, region, keep="last"))


def test_a_random_start_without_a_step_is_a_sample_of_the_region(network):
    x, y = uniform(5, 6), torch.zeros(5, dtype=torch.long)
    z = pgd(network, x, y, LInf(0.3), steps=0, random_start=True, generator=torch.Generator().manual_seed(0))
    assert torch.equal(z, LInf(0.3).sample(x, torch.Generator().manual_seed(0)))


UNION = (LInf(0.1, domain=(0.0, 1.0)), L2(0.3, domain=(0.0, 1.0)), L1(0.5, domain=(0.0, 1.0)))


def test_multi_steepest_descent_stays_in_the_union_and_beats_most_single_attacks(network):
    x, y = uniform(40, 6), torch.arange(40) % 4
    z = msd(network, x, y, UNION, steps=40)
    assert torch.stack([region.contains(x, z, 1e-9) for region in UNION]).any(0).all()
    network.eval()
    with torch.no_grad():
        margin = smallest_margin(network(z), y)
        single = torch.stack([smallest_margin(network(pgd(network, x, y, region, steps=40)), y) for region in UNION])
    assert (margin.mean() <= single.mean(1) + 1e-3).all()
    assert (margin <= single.amin(0) + 0.02).double().mean() > 0.9


def test_multi_steepest_descent_of_one_region_is_pgd(network):
    x, y = uniform(5, 6), torch.tensor([0, 1, 2, 3, 0])
    for options in ({"steps": 5}, {"steps": 5, "restarts": 3}, {"steps": 5, "targeted": True, "keep": "last"}):
        runs = [{"generator": torch.Generator().manual_seed(0), **options} for _ in range(2)]
        assert torch.equal(msd(network, x, y, [L2(0.5)], **runs[0]), pgd(network, x, y, L2(0.5), **runs[1]))


def test_multi_steepest_descent_takes_in_every_region():
    """Of an affine model the best point of the union is the best of each region's best."""
    model, x, y = nn.Linear(6, 2).double(), uniform(4, 6), torch.tensor([0, 1, 0, 1])
    row = (model.weight[1 - y] - model.weight[y])[None]
    for reversed_order in (False, True):
        for regions in ((LInf(0.01), L1(1.0)), (LInf(0.5), L1(0.02)), (L2(0.1), Box(0.2, 0.8))):
            order = regions[::-1] if reversed_order else regions
            z = msd(model, x, y, order, steps=1)
            best = torch.stack([region.support(x, row)[0] for region in regions]).amax(0) + model.bias[1 - y] - model.bias[y]
            torch.testing.assert_close(-smallest_margin(model(z), y), best, atol=1e-7, rtol=1e-7)


def test_messages_of_unions():
    model, x, y = TwoInputs(), (uniform(2, 3).float(), uniform(2, 4).float()), torch.tensor([0, 1])
    with pytest.raises(SpecificationError, match="at least one region"):
        msd(model, x, y, [])
    with pytest.raises(SpecificationError, match="same arguments"):
        msd(model, x, y, [{"image": LInf(0.1)}, {"state": LInf(0.1)}])
    points = msd(model, x, y, [{"image": LInf(0.1)}, {"image": L2(0.1)}], steps=2)
    assert points[1] is x[1]


@pytest.mark.parametrize("ball", [L1, L2])
def test_whole_balls_project_as_balls_with_a_wide_domain_do(ball):
    """Sorting and scaling against bisection, points inside and outside, radius zero among them."""
    x, generator = uniform(30, 6), torch.Generator().manual_seed(1)
    z = x + torch.randn(30, 6, generator=generator, dtype=x.dtype) * torch.logspace(-2, 2, 30, dtype=x.dtype)[:, None]
    for eps in (0.7, 0.0, torch.linspace(0.0, 3.0, 30, dtype=x.dtype)):
        projected = ball(eps).project(x, z)
        torch.testing.assert_close(projected, ball(eps, domain=(-1e4, 1e4)).project(x, z), atol=1e-9, rtol=1e-9)
        inside = ball(eps).contains(x, z)
        torch.testing.assert_close(projected[inside], z[inside], atol=1e-12, rtol=0)
        assert ball(eps).contains(x, projected, 1e-12).all()


def test_steps_of_the_l1_ball_move_a_few_coordinates_that_may_move():
    x = torch.tensor([[0.0, 1.0, 0.5, 0.5]], dtype=torch.float64).repeat(1, 5)
    v = torch.tensor([[-9.0, 9.0, -3.0, 2.0]], dtype=torch.float64).repeat(1, 5)
    step = L1(1.0, domain=(0.0, 1.0)).climb(x, x, v, 0.5)
    assert [index % 4 for index in step[0].nonzero().flatten().tolist()] == [2]
    assert step.sum() == -0.5
    step = L1(1.0, domain=(0.0, 1.0)).climb(x, x, v, 1.0)
    assert sorted(step[step != 0].tolist()) == [-0.5, -0.5]
