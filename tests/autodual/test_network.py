"""The public interface: what ``certify`` returns, how it behaves and what it refuses."""

import copy
import types
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autodual
from autodual import (
    IBP,
    L1,
    L2,
    NONE,
    Adaptive,
    Box,
    Dual,
    LInf,
    SpecificationError,
    TraceError,
    UnsupportedOperatorError,
    Verdict,
)

METHODS = ["interval", "dual", "adaptive", Dual(strict=True), Dual(walk="forward"), Adaptive(strict=True)]


def mlp(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.conv2(F.relu(self.conv1(x))))
        return self.head(x.view(x.size(0), -1))


class Dense(nn.Module):
    """DenseNet style in plain functional PyTorch."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Parameter(0.5 * torch.randn(3, 2, 3, 3)), nn.Parameter(0.5 * torch.randn(3, 5, 3, 3))
        self.head = nn.Parameter(torch.randn(3, 8))

    def forward(self, x):
        features = [x]
        for weight in (self.w1, self.w2):
            features.append(F.relu(F.conv2d(torch.cat(features, 1), weight, padding=1)))
        return F.adaptive_avg_pool2d(torch.cat(features, dim=1), 1).flatten(1) @ self.head.t()


def residual(seed=0):
    torch.manual_seed(seed)
    model = Residual().double()
    model.train()
    model(torch.randn(16, 1, 4, 4, dtype=torch.float64))
    return model.eval()


def dense(seed=0):
    torch.manual_seed(seed)
    return Dense().double()


CASES = {"mlp": (mlp, (4,)), "residual": (residual, (1, 4, 4)), "dense": (dense, (2, 5, 5))}


def inputs(shape, batch=3, seed=1):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("region", [LInf(0.1), L2(0.3), L1(0.5), LInf(0.3, domain=(-1.0, 1.0))], ids=repr)
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_bounds_hold_at_sampled_points(name, method, region):
    make, shape = CASES[name]
    model, x = make(), inputs(shape).clamp(-1, 1)
    found = autodual.certify(model).bounds(x, region, method=method)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        many = x.repeat(300, *[1] * len(shape))
        values = model(region.sample(many, generator=generator)).unflatten(0, (300, len(x)))
        assert found.contains(values, 1e-9).all()
        assert found.contains(model(region.center(x)), 1e-9).all()


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_walks_agree(name):
    make, shape = CASES[name]
    net, x = autodual.certify(make()), inputs(shape)
    for strict in (False, True):
        for region in (LInf(0.1), L2(0.3), Box(x - 0.1, x + 0.3)):
            backward, forward = (
                net.bounds(x, region, method=Dual(strict=strict, walk=walk)) for walk in ("backward", "forward")
            )
            torch.testing.assert_close(backward.lower, forward.lower, rtol=0, atol=1e-10)
            torch.testing.assert_close(backward.upper, forward.upper, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_an_example_does_not_depend_on_its_batch(name, method):
    make, shape = CASES[name]
    net, x, eps = autodual.certify(make()), inputs(shape, 5), torch.tensor([0.01, 0.3, 0.1, 0.0, 0.2], dtype=torch.float64)
    together = net.bounds(x, LInf(eps), method=method)
    for i in range(5):
        alone = net.bounds(x[i : i + 1], LInf(eps[i : i + 1]), method=method)
        torch.testing.assert_close(alone.lower[0], together.lower[i], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.upper[0], together.upper[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_chunks_change_nothing(name):
    make, shape = CASES[name]
    model, x = make(), inputs(shape)
    whole = autodual.certify(model).bounds(x, LInf(0.2))
    net = autodual.certify(model, memory_budget=4000)
    chunked = net.bounds(x, LInf(0.2))
    torch.testing.assert_close(whole.lower, chunked.lower, rtol=0, atol=1e-12)
    loss = [autodual.certify(model, memory_budget=b).robust_loss(x, [0, 1, 2], LInf(0.2)) for b in (10**9, 4000)]
    grads = [torch.autograd.grad(value, list(model.parameters())) for value in loss]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("method", ["interval", "dual", "adaptive", Dual(strict=True, walk="forward")], ids=str)
@pytest.mark.parametrize("region", [LInf(0.1), L2(0.2), L1(0.3), L2(0.4, domain=(-0.9, 0.9))], ids=repr)
@pytest.mark.parametrize("name", CASES)
def test_robust_loss_has_the_gradient_of_finite_differences(name, region, method):
    make, shape = CASES[name]
    model, x, y = make(), (0.3 * inputs(shape)).clamp(-0.8, 0.8), [0, 1, 2]
    net = autodual.certify(model)
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(net.robust_loss(x, y, region, method), parameters)
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    step = 1e-6
    ends = []
    with torch.no_grad():
        for sign in (1, -2, 1):  # to +step, to -step, and back
            for p, d in zip(parameters, directions, strict=True):
                p.add_(sign * step * d)
            ends.append(net.robust_loss(x, y, region, method).item())
    numeric = (ends[0] - ends[1]) / (2 * step)
    analytic = sum((g * d).sum().item() for g, d in zip(gradient, directions, strict=True))
    assert abs(numeric - analytic) <= 1e-5 * max(1.0, abs(numeric))


@pytest.mark.parametrize("region", [LInf(0.1), L2(0.2)], ids=repr)
def test_ten_adam_steps_lower_the_robust_loss(region):
    model, x = mlp(), inputs((4,), 64)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    net = autodual.certify(model)
    loss = autodual.RobustLoss(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    values = []
    for _ in range(11):
        optimizer.zero_grad()
        value = loss(x, y, region)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.9 * values[0]
    assert all(later < earlier for earlier, later in pairwise(values))


def test_margins_agree_with_bounds_of_the_same_rows():
    net, x, y = autodual.certify(mlp()), inputs((4,)), torch.tensor([2, 0, 1])
    margins = net.margins(x, y, LInf(0.1))
    for i, label in enumerate(y.tolist()):
        rows = torch.eye(3, dtype=x.dtype)[label] - torch.eye(3, dtype=x.dtype)
        torch.testing.assert_close(margins[i], net.bounds(x[i : i + 1], LInf(0.1), rows).lower[0])
        assert margins[i, label] == 0


def test_the_last_affine_segment_is_merged_with_the_rows():
    """Interval bounds of a difference are tighter than the difference of interval bounds."""
    net, x, y = autodual.certify(mlp()), inputs((4,)), torch.tensor([0, 0, 0])
    separate = net.bounds(x, LInf(0.1), method="interval")
    merged = net.margins(x, y, LInf(0.1), method="interval")
    gain = merged[:, 1:] - (separate.lower[:, :1] - separate.upper[:, 1:])
    assert (gain > -1e-12).all()
    assert (gain > 1e-3).any()


def test_the_dual_bound_is_exact_on_a_linear_model():
    model, x = nn.Linear(4, 3).double(), inputs((4,))
    found = autodual.certify(model).bounds(x, LInf(0.1))
    radius = 0.1 * model.weight.abs().sum(1)
    torch.testing.assert_close(found.lower, model(x) - radius)
    torch.testing.assert_close(found.upper, model(x) + radius)


def test_verify_reports_each_example():
    model, x = mlp(), inputs((4,), 20)
    net = autodual.certify(model)
    y = model(x).argmax(1)
    y[:5] = (y[:5] + 1) % 3
    report = net.verify(x, y, LInf(1e-4))
    assert report.verdict[:5] == (Verdict.FALSIFIED,) * 5
    assert report.certified[5:].float().mean() > 0.8
    assert not report.certified[:5].any()
    loose = net.verify(x, y, LInf(5.0))
    assert Verdict.UNKNOWN in loose.verdict
    assert not loose.certified.any()
    assert "certified" in report.summary()
    assert "LInf" in report.summary()
    assert (net.flag(x, LInf(1e-4)) == ~net.verify(x, model(x).argmax(1), LInf(1e-4)).certified).all()


def test_a_tie_is_not_certified():
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    report = autodual.certify(model).verify(torch.zeros(1, 2), [0], LInf(0.0))
    assert not report.certified.any()


def test_the_float_allowance_covers_rounding():
    """A margin of a few roundings is not a proof."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1e6, 1.0], [1e6, 0.0]]))
        model.bias.copy_(torch.tensor([0.125, 0.0]))
    report = autodual.certify(model).verify(torch.tensor([[1.0, 0.0]]), [0], LInf(0.0))
    assert report.margins[0, 1] > 0
    assert not report.certified.any()


def test_radius_is_certified_and_nearly_the_largest():
    net, x = autodual.certify(mlp()), inputs((4,), 10)
    y = net(x).argmax(1)
    radius = net.radius(x, max_radius=0.5)
    assert net.verify(x, y, LInf(radius)).certified[radius > 0].all()
    grid = torch.linspace(0, 0.5, 201, dtype=x.dtype)[1:]
    certified = torch.stack([net.verify(x, y, LInf(float(eps))).certified for eps in grid])
    best = torch.where(certified, grid[:, None], 0.0).amax(0)
    assert (radius >= best - 0.5 / 200).all()


def test_training_mode_uses_the_clean_batch_statistics_and_certifies_nothing():
    torch.manual_seed(0)
    model, x = Residual().double().train(), inputs((1, 4, 4), 6)
    net = autodual.certify(model)
    before = copy.deepcopy(model.state_dict())
    found = net.bounds(x, LInf(1e-9))
    assert found.guarantee == NONE
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "looking must not move running statistics"
    torch.testing.assert_close(found.lower, copy.deepcopy(model)(x), rtol=0, atol=1e-5)
    assert not net.verify(x, net(x).argmax(1), LInf(1e-9)).certified.any()
    moved = copy.deepcopy(model)
    moved(x)
    net.robust_loss(x, [0, 1, 2, 0, 1, 2], LInf(0.01)).backward()
    torch.testing.assert_close(model.norm.running_mean, moved.norm.running_mean)
    assert model.norm.num_batches_tracked == moved.norm.num_batches_tracked
    net.eval()
    assert net.bounds(x, LInf(0.01)).guarantee == autodual.REAL


def test_dropout_in_training_mode_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    with pytest.raises((UnsupportedOperatorError, TraceError), match="eval"):
        autodual.certify(model.train())
    autodual.certify(model.eval())


def test_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, left, right, bias=None):
            z = F.relu(self.a(left) + self.b(right))
            return z if bias is None else z + bias

    torch.manual_seed(0)
    model = Two().double()
    net, left, right = autodual.certify(model), inputs((3,)), inputs((2,), seed=5)
    both = net.bounds((left, right), LInf(0.1))
    only = net.bounds((left, right), {"left": LInf(0.1)})
    assert (both.width >= only.width - 1e-12).all()
    assert (both.width > only.width + 1e-6).any()
    named = net.bounds({"left": left, "right": right}, {"right": L2(0.1), "left": LInf(0.1)})
    assert (named.width <= both.width + 1e-12).all()
    shifted = net.bounds({"left": left, "right": right, "bias": torch.ones(4, dtype=left.dtype)}, {"left": LInf(0.1)})
    torch.testing.assert_close(shifted.lower, only.lower + 1)
    with pytest.raises(SpecificationError, match="middle"):
        net.bounds((left, right), {"middle": LInf(0.1)})


def test_the_batch_may_live_elsewhere():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, x):
            batch, steps, width = x.shape
            z = F.relu(self.a(x.reshape(batch * steps, width)))
            z = z.view(batch, steps, 5).transpose(0, 1)
            return F.relu(self.b(z)).sum(0)

    torch.manual_seed(0)
    model, x = Sequence().double(), inputs((4, 3), 3)
    net = autodual.certify(model)
    for method in METHODS:
        found = net.bounds(x, LInf(0.2), method=method)
        for seed in range(50):
            noise = 0.2 * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype) - 1)
            assert found.contains(model(x + noise), 1e-9).all()
        alone = net.bounds(x[1:2], LInf(0.2), method=method)
        torch.testing.assert_close(alone.lower[0], found.lower[1])


def test_parameters_are_shared_and_a_copy_is_independent():
    model, x = mlp(), inputs((4,))
    net = autodual.certify(model)
    other = copy.deepcopy(net)
    before = net.bounds(x, LInf(0.1)).lower
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert not torch.equal(net.bounds(x, LInf(0.1)).lower, before)
    torch.testing.assert_close(other.bounds(x, LInf(0.1)).lower, before)


class Leaky(nn.Module):
    slope = 0.0

    def __init__(self):
        super().__init__()
        self.linear, self.activation = nn.Linear(4, 3), nn.ReLU()

    def forward(self, x):
        return self.activation(F.leaky_relu(self.linear(x), self.slope) + 1.0)


CHANGES = {
    "module replaced": lambda m: setattr(m, "activation", nn.Hardtanh()),
    "attribute": lambda m: setattr(m, "slope", 5.0),
    "attribute of a leaf": lambda m: setattr(m, "activation", nn.LeakyReLU(0.5)),
    "hook": lambda m: m.linear.register_forward_hook(lambda module, inputs, output: 3 * output),
    "pre-hook": lambda m: m.linear.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)),
    "forward": lambda m: setattr(m.linear, "forward", lambda x: x[:, :3] * 4),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_changed_after_certify_is_traced_anew(change):
    torch.manual_seed(0)
    model, x = Leaky().double(), inputs((4,))
    net = autodual.certify(model)
    net.bounds(x, LInf(2.0))
    CHANGES[change](model)
    found = net.bounds(x, LInf(2.0))
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        assert found.contains(model(LInf(2.0).sample(x, generator=generator)), 1e-9).all()


GLOBAL = {"slope": 0.0}


def test_a_change_that_no_attribute_shows_is_noticed_at_the_corners():
    state = {"slope": 0.0}

    class Closure(nn.Module):
        def forward(self, x):
            return F.leaky_relu(x, state["slope"])

    class Global(nn.Module):
        def forward(self, x):
            return F.leaky_relu(x, GLOBAL["slope"])

    x = torch.ones(2, 3)
    nets = [autodual.certify(model) for model in (Closure(), Global())]
    for net in nets:
        net.bounds(x, LInf(3.0))
    state["slope"] = GLOBAL["slope"] = 5.0
    try:
        assert nets[0].bounds(x, LInf(3.0)).lower.max() <= -10, "what a function encloses is seen, and traced anew"
        with pytest.raises(TraceError, match="certify again"):
            nets[1].bounds(x, LInf(3.0))
    finally:
        GLOBAL["slope"] = 0.0


def test_a_model_that_writes_into_its_input_leaves_the_callers_alone():
    model = nn.Sequential(nn.Threshold(0.5, -10.0, inplace=True), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(2))
        model[1].bias.copy_(torch.tensor([0.0, 1.0]))
    x = torch.tensor([[0.4, 0.3]])
    report = autodual.certify(model).verify(x, [1], LInf(0.3))
    assert x.tolist() == torch.tensor([[0.4, 0.3]]).tolist()
    assert not report.certified.any()


class Small(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 6), nn.Linear(6, 3), function

    def forward(self, x):
        return self.function(self, x)


BATCH_SIZES = {
    "a number": lambda m, x: m.b(m.a(x).relu()) * x.shape[0],
    "a range": lambda m, x: m.b(m.a(x).relu()) * (torch.arange(x.shape[0]) + 1)[:, None],
    "before a nonlinearity": lambda m, x: m.b((m.a(x) * (torch.arange(x.shape[0]) + 1)[:, None]).relu()),
    "elements": lambda m, x: m.b(m.a(x).relu()) / x.numel(),
    "squeeze": lambda m, x: m.b(m.a(x).squeeze().relu()).reshape(-1, 3),
}


@pytest.mark.parametrize("case", BATCH_SIZES)
def test_rows_are_shared_only_where_examples_are_alike(case):
    torch.manual_seed(0)
    model, x = Small(BATCH_SIZES[case]).double(), inputs((4,), 5)
    found = autodual.certify(model).bounds(x, LInf(0.3))
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        assert found.contains(model(LInf(0.3).sample(x, generator=generator)), 1e-9).all()


def test_a_batch_of_one_that_loses_its_axis_is_refused():
    model = Small(lambda m, x: m.b(m.a(x).squeeze(0).relu()).reshape(-1, 3)).double()
    net = autodual.certify(model)
    with pytest.raises(SpecificationError, match="two examples or more"):
        net.bounds(inputs((4,), 1), LInf(0.3))
    net.bounds(inputs((4,), 2), LInf(0.3))


def test_the_allowance_follows_the_coarsest_precision_and_the_largest_terms():
    class Cast(nn.Module):
        def forward(self, x):
            return x.float().double()

    close = torch.tensor([[1 + 4e-8, 1 + 7e-8]], dtype=torch.float64)
    assert not autodual.certify(Cast()).verify(close, [1], LInf(4e-8)).certified.any()

    class Cancel(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("c", torch.tensor([1e8, 0.0]))

        def forward(self, x):
            return (x + self.c) - self.c

    assert not autodual.certify(Cancel()).verify(torch.tensor([[4.1, 5.0]]), [0], LInf(0.5)).certified.any()


def test_float32_margins_stay_within_their_allowance():
    generator = torch.Generator().manual_seed(0)
    for seed in range(6):
        torch.manual_seed(seed)
        sizes = [10, *[40] * (1 + seed), 4]
        layers = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.ReLU())][:-1]
        model = nn.Sequential(*layers)
        x = torch.randn(8, 10, generator=generator) + 5 * (seed % 2)
        y = model(x).argmax(1)
        for method in ("interval", "dual", "adaptive"):
            report = autodual.certify(model).verify(x, y, LInf(0.01), method)
            exact = autodual.certify(copy.deepcopy(model).double()).margins(x.double(), y, LInf(0.01), method)
            assert (report.margins.double() - exact <= 0.5 * report.allowance).all(), "above the exact bound"


def test_only_a_centre_known_to_be_inside_falsifies():
    class Beside(autodual.Region):
        """A single point, one to the right of x."""

        def support(self, x, v):
            return (v * (x + 1)).flatten(2).sum(-1)

    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0], [1.0]])), model.bias.copy_(torch.tensor([0.5, 0.0]))
    report = autodual.certify(model).verify(torch.zeros(1, 1), [1], Beside())
    assert report.verdict == (Verdict.UNKNOWN,), "x is misclassified, but it is no point of the region"
    assert autodual.certify(model).verify(torch.full((1, 1), -1.0), [1], Beside()).verdict == (Verdict.UNKNOWN,)


def test_an_output_without_batch_is_the_same_for_every_example():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("row", torch.arange(6.0)[None])

        def forward(self, x):
            return self.row + 0 * self.row

    assert autodual.certify(Fixed()).bounds(torch.zeros(3, 2), LInf(0.1)).lower.tolist() == [list(range(6))] * 3


def test_constant_outputs_and_no_grad_modes():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)[:, :2] + 1.0

    assert autodual.certify(Constant()).bounds(torch.zeros(2, 3), LInf(1.0)).upper.tolist() == [[1.0, 1.0]] * 2
    net = autodual.certify(mlp())
    reference = net.bounds(inputs((4,)), LInf(0.1)).lower
    with torch.inference_mode():
        torch.testing.assert_close(net.bounds(inputs((4,)), LInf(0.1)).lower, reference)


def test_an_empty_batch_gets_an_empty_answer():
    net, x = autodual.certify(mlp()), inputs((4,))[:0]
    assert net.bounds(x, LInf(0.1)).lower.shape == (0, 3)
    assert net.margins(x, torch.zeros(0, dtype=torch.long), LInf(0.1)).shape == (0, 3)
    report = net.verify(x, torch.zeros(0, dtype=torch.long), LInf(0.1))
    assert report.verdict == ()
    assert report.certified.shape == (0,)
    assert net.radius(x).shape == (0,)


class Unsupported(nn.Module):
    def forward(self, x):
        return torch.special.entr(torch.fft.rfft(x).real) + torch.erfinv(x)


BAD = {
    "wrong input shape": (lambda n, x: n.bounds(x[:, :2], LInf(0.1)), r"does not accept.*\(batch, 2\)"),
    "no batch axis": (lambda n, x: n.bounds(x[0], LInf(0.1)), r"axis 0 is the batch.*x\[None\]"),
    "negative eps": (lambda n, x: n.bounds(x, LInf(-0.1)), "eps"),
    "NaN eps": (lambda n, x: n.bounds(x, LInf(float("nan"))), "eps"),
    "NaN in x": (lambda n, x: n.bounds(x * float("nan"), LInf(0.1)), "NaN.*example 0"),
    "lower above upper": (lambda n, x: n.bounds(x, Box(x + 1, x)), "lower"),
    "y out of range": (lambda n, x: n.verify(x, [0, 1, 3], LInf(0.1)), r"y\[2\] = 3.*3 outputs"),
    "negative y": (lambda n, x: n.verify(x, [0, -1, 0], LInf(0.1)), r"y\[1\] = -1"),
    "float y": (lambda n, x: n.verify(x, [0.0, 1.0, 2.0], LInf(0.1)), "integer class labels"),
    "too few labels": (lambda n, x: n.verify(x, [0, 1], LInf(0.1)), r"\(3,\)"),
    "specification too wide": (lambda n, x: n.bounds(x, LInf(0.1), torch.ones(2, 4)), r"\(rows, 3\)"),
    "NaN specification": (lambda n, x: n.bounds(x, LInf(0.1), torch.full((2, 3), float("nan"))), "NaN"),
    "integer input": (lambda n, x: n.bounds(x.long(), LInf(0.1)), r"int64.*float\(\)"),
    "other dtype": (lambda n, x: n.bounds(x.float(), LInf(0.1)), "float32.*float64"),
    "model on another device": (lambda n, x: n.bounds(x.to("meta"), LInf(0.1)), "meta.*cpu"),
    "no such method": (lambda n, x: n.bounds(x, LInf(0.1), method="crown"), "interval"),
    "not a region": (lambda n, x: n.bounds(x, 0.1), "LInf"),
    "too many inputs": (lambda n, x: n.bounds((x, x), LInf(0.1)), "1 argument"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    use, message = BAD[case]
    with pytest.raises(SpecificationError, match=message):
        use(autodual.certify(mlp()), inputs((4,)))


def test_nan_weights_are_named_and_never_certify():
    model = mlp()
    net = autodual.certify(model)
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(SpecificationError, match=r"2\.weight"):
        net.verify(inputs((4,)), [0, 1, 2], LInf(0.1))


def test_all_unsupported_operators_are_listed_at_once():
    with pytest.raises(UnsupportedOperatorError) as caught:
        autodual.certify(Unsupported())
    text = str(caught.value)
    assert "3 operators" in text or "4 operators" in text
    assert "entr" in text
    assert "erfinv" in text
    assert "test_network.py:" in text
    assert "adding_an_operator" in text


def test_overflowing_bounds_are_unknown_not_certified():
    model = mlp(dtype=torch.float32)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e12)
    x = inputs((4,)).float()
    for method in METHODS:
        report = autodual.certify(model).verify(x, model(x).argmax(1), LInf(1e20), method)
        assert not report.certified.any()
        assert not report.margins.isnan().any()


def test_explain_names_every_node(tmp_path):
    pytest.importorskip("matplotlib")
    net = autodual.certify(residual())
    bare, text = str(net.explain()), str(net.explain(inputs((1, 4, 4)), LInf(0.01)))
    for word in ("nn.Conv2d", "DualConv", "DualReLU", "test_network.py:", "nn.BatchNorm2d"):
        assert word in bare
        assert word in text
    assert "(N, 4, 4, 4)" in text
    assert "rows" in text
    assert net.explain(inputs((1, 4, 4)), LInf(0.01)).draw(tmp_path / "net.png").stat().st_size > 5000


def test_method_dataclasses_and_names_agree():
    net, x = autodual.certify(mlp()), inputs((4,))
    for name, options in (("interval", IBP()), ("dual", Dual()), ("adaptive", Adaptive())):
        assert torch.equal(net.bounds(x, LInf(0.1), method=name).lower, net.bounds(x, LInf(0.1), method=options).lower)


def test_normalisation_keeps_the_first_bounds_exact():
    """Shifting, scaling and moving single elements around one convolution leaves interval arithmetic exact."""
    torch.manual_seed(0)
    model = nn.Sequential(
        autodual.Normalize([0.4, 0.5], [0.2, 0.3]),
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.Flatten(),
        nn.ReLU(),
        nn.Linear(48, 2),
    )
    net, x = autodual.certify(model.double().eval()), inputs((2, 4, 4))
    assert "interval, exact" in str(net.explain(x, LInf(0.1), Dual(strict=True)))
    rows = net.intermediate(x, L2(0.1), Dual(strict=True))  # no box: one row per element
    exact = net.intermediate(x, LInf(0.1), Dual(strict=True))
    node = next(iter(exact))
    jacobian = torch.func.jacrev(lambda z: model[:4](z[None])[0])(x[0]).flatten(1)
    torch.testing.assert_close(exact[node].width[0] / 2, 0.1 * jacobian.abs().sum(1))
    torch.testing.assert_close(rows[node].width[0] / 2, 0.1 * jacobian.norm(dim=1))


def test_loops_over_shapes_use_the_input_as_example_and_retrace_for_other_shapes():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(5, 3)

        def forward(self, x):
            state = x.new_zeros(x.size(0), 3)
            for t in range(x.size(1)):
                state = F.relu(self.cell(torch.cat([x[:, t], state], 1)))
            return state

    torch.manual_seed(0)
    model = Loop().double()
    for net in (autodual.certify(model), autodual.certify(model, example_input=inputs((3, 2), 1))):
        for steps in (3, 5, 3):
            x = inputs((steps, 2), 1)
            found = net.bounds(x, LInf(0.1))
            for seed in range(30):
                noise = 0.1 * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype) - 1)
                assert found.contains(model(x + noise), 1e-9).all()
            torch.testing.assert_close(net.bounds(x, LInf(0.0)).lower, model(x), rtol=0, atol=1e-9)


def test_values_that_may_overflow_are_not_certified():
    class Overflow(nn.Module):
        def forward(self, x):
            h = x[:, :1] * 1e30 * 1e30
            return torch.cat([h - h + 1, 0 * x[:, 1:]], 1)

    model = Overflow()
    assert model(torch.ones(1, 2)).isnan().any()
    report = autodual.certify(model).verify(torch.zeros(1, 2), [0], LInf(1.0))
    assert report.margins[0, 1] > 0
    assert not report.certified.any()


def test_a_large_shift_beside_a_small_margin_is_charged():
    class Exponential(nn.Module):
        def forward(self, x):
            e = x.exp()
            return torch.cat([e, e * 0 + 0.02], 1)

    centres = torch.linspace(0, 1, 60)[:, None]
    assert not autodual.certify(Exponential()).verify(centres, [0] * 60, LInf(15.0), "interval").certified.any()


class Configured(nn.Module):
    shared = 0.0

    def __init__(self):
        super().__init__()
        self.a, self.c, self.d = nn.Linear(2, 2), [0.0], {"k": {"deep": 0.0}}
        self.cfg, self.fn = types.SimpleNamespace(k=0.0), lambda h: 0.0 * h

    def forward(self, x):
        bump = (1 - 2 * (x[:, :1] - 1.5).abs()).relu()
        size = self.c[0] + self.d["k"]["deep"] + self.cfg.k + self.shared
        return self.a(x) + (size * bump + self.fn(bump)) * torch.tensor([0.0, 1.0])


LOCAL_CHANGES = {
    "list": lambda m: m.c.__setitem__(0, 50.0),
    "dict": lambda m: m.d["k"].update(deep=50.0),
    "namespace": lambda m: setattr(m.cfg, "k", 50.0),
    "class": lambda m: setattr(Configured, "shared", 50.0),
    "function": lambda m: setattr(m, "fn", lambda h: 50.0 * h),
}


@pytest.mark.parametrize("change", LOCAL_CHANGES)
def test_a_change_with_a_local_effect_is_traced_anew(change):
    model, x = Configured(), torch.zeros(1, 2)
    with torch.no_grad():
        model.a.weight.zero_(), model.a.bias.copy_(torch.tensor([1.0, 0.0]))
    net = autodual.certify(model)
    assert net.verify(x, [0], LInf(3.0)).certified.all()
    try:
        LOCAL_CHANGES[change](model)
        assert model(torch.tensor([[1.5, 0.0]])).argmax(1).item() == 1
        assert not net.verify(x, [0], LInf(3.0)).certified.any()
    finally:
        Configured.shared = 0.0


def test_small_constants_of_each_example_are_not_shared():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(4, 6), nn.Linear(3, 3), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            w = 1e-6 * torch.arange(1, x.shape[0] + 1).view(-1, 1)
            return self.b((self.d(self.c(self.a(x).relu()) * w) / 1e-6 - 0.3).relu())

    torch.manual_seed(0)
    model, x = Weighted(), inputs((4,), 8).float()
    found = autodual.certify(model).bounds(x, LInf(0.3), allow_rounding=True)
    for _ in range(300):
        assert found.contains(model(LInf(0.3).sample(x))).all()


def test_a_table_with_as_many_rows_as_the_batch():
    class Table(nn.Module):
        def forward(self, x, table):
            return F.relu(x[:, None, :] * table).sum(1)

    x, table = torch.randn(3, 2), torch.randn(3, 2)
    found = autodual.certify(Table()).bounds((x, table), {"x": LInf(0.1)})
    for _ in range(100):
        assert found.contains(Table()(LInf(0.1).sample(x), table), 1e-5).all()


@pytest.mark.parametrize("call", ["bounds", "verify", "robust_loss"])
def test_autocast_is_refused(call):
    net, x = autodual.certify(nn.Linear(2, 2)), torch.ones(1, 2)
    labels = () if call == "bounds" else ([0],)
    ask = lambda: getattr(net, call)(x, *labels, autodual.LInf(0.1))  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(autodual.SpecificationError, match=r"autocast, which rounds to torch\.bfloat16.*enabled=False"):
            ask()
        with torch.autocast("cpu", enabled=False):
            ask()


@pytest.mark.parametrize("method", [*METHODS, autodual.Optimized(2), "auto", autodual.Projected(r=5)], ids=str)
def test_a_second_derivative_is_refused_before_it_is_wrong(method):
    model = mlp()
    net, region, parameters = autodual.certify(model), LInf(0.1), list(model.parameters())
    x, y = torch.rand(2, 4).double(), torch.tensor([0, 2])
    boxes = net.intermediate(x, region, method)
    values = [
        net.bounds(x, region, method=method).lower,
        net.robust_loss(x, y, region, method),
        *(box.upper for box in boxes.values()),
    ]
    values += [net.loss_bounds(x, y, region).cross_entropy(method), net.loss_bounds(x, y, region).hidden()[0].lower]
    values += [net.loss_bounds(x, y, region).distances(Adaptive())]
    for value in values:
        with pytest.raises(RuntimeError, match="once, not twice"):
            torch.autograd.grad(value.sum(), parameters, create_graph=True, allow_unused=True)
        assert torch.autograd.grad(value.sum(), parameters[:1], retain_graph=True)[0].isfinite().all()
    assert (next(iter(boxes.values())).lower.clamp_(min=5.0) >= 5.0).all()  # they may be written into


def test_forward_derivatives_of_interval_bounds():
    net, x, radius, step = autodual.certify(mlp()), torch.rand(2, 4).double(), torch.tensor(0.1).double(), 1e-6

    def lower(eps):
        return net.bounds(x, LInf(eps), method="interval").lower.sum()

    _ = lower(radius)
    _, tangent = torch.func.jvp(lower, (radius,), (torch.ones_like(radius),))
    difference = (lower(radius + step) - lower(radius - step)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=0)
