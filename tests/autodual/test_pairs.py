"""Hidden rows in pairs and windows: the very numbers of the dense walk, whatever lies on the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import autodual
import dual_layers
from autodual.bounds import pairs
from autodual.errors import SpecificationError

LAYOUTS = ("whole", "windows", "auto")


class Residual(nn.Module):
    """Blocks with a skip, whose two ways back have windows of different sizes; the second skip changes nothing."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.first, self.second = nn.Conv2d(4, 6, 3, stride=stride, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.skip, self.norm = nn.Conv2d(4, 6, 1, stride=stride), nn.BatchNorm2d(6)
        self.third, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.LazyLinear(5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norm(self.second(torch.relu(self.first(x)))) + self.skip(x))
        return self.head(torch.tanh(self.third(x) - x).flatten(1))


class Strides(nn.Module):
    """Two ways of different stride to nodes of one size: their windows do not fit each other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.narrow, self.wide = nn.Conv1d(2, 3, 1), nn.Conv1d(3, 3, 3), nn.Conv1d(3, 3, 1, stride=2)
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.narrow(x) + self.wide(x)).flatten(1))


def chain(*layers: nn.Module) -> nn.Sequential:
    """Put a classifier behind layers."""
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "remainders": (
        lambda: chain(
            nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
            nn.Conv2d(6, 4, (3, 2), padding=(0, 1)),
        ),
        (2, 8, 11),
    ),
    "dilation and groups": (
        lambda: chain(
            nn.Conv2d(2, 4, 3, dilation=2, groups=2, padding=2), nn.ReLU(),
            nn.Conv2d(4, 8, (2, 3), stride=(2, 3), groups=4, padding=(1, 0)), nn.Sigmoid(), nn.Conv2d(8, 4, 2),
        ),
        (2, 8, 10),
    ),
    "circular padding": (
        lambda: chain(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1),
        ),
        (2, 5, 6),
    ),
    "padding on one side, pooling": (
        lambda: chain(
            nn.Conv2d(2, 4, (2, 4), padding="same"), nn.ReLU(), nn.Conv2d(4, 4, (4, 2), padding="same", dilation=(1, 2)),
            nn.LeakyReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 2),
        ),
        (2, 7, 8),
    ),
    "convolutions in a row": (
        lambda: chain(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=2, stride=2), nn.BatchNorm2d(4),
            nn.Conv2d(4, 3, 2, padding=1),
        ),
        (2, 7, 8),
    ),
    "one axis": (
        lambda: chain(
            nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 4, 5, stride=3, padding=4), nn.ReLU(), nn.Conv1d(4, 4, 3)
        ),
        (2, 17),
    ),
    "three axes": (
        lambda: chain(nn.Conv3d(2, 3, 2, padding=1), nn.ReLU(), nn.Conv3d(3, 3, (2, 1, 3), stride=(1, 2, 1))),
        (2, 3, 5, 4),
    ),
    "skips, stride 2": (lambda: Residual(2), (2, 7, 8)),
    "skips, stride 1": (lambda: Residual(1), (2, 5, 6)),
    "two strides": (Strides, (2, 4)),
    "convolution transposed": (
        lambda: chain(
            nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3, stride=2), nn.ReLU(),
            nn.Conv2d(3, 2, 3),
        ),
        (2, 5, 5),
    ),
    "max pooling": (lambda: chain(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2)), (2, 8, 8)),
    "no axis but the batch's": (
        lambda: chain(
            nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0), nn.ReLU(), nn.Unflatten(0, (-1, 1)), nn.Linear(1, 3)
        ),
        (5,),
    ),
    "tokens": (lambda: chain(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4)), (3, 5)),
}  # fmt: skip


def built(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    """Make one of the models and some inputs, in double precision."""
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make().double().eval(), 2 * torch.rand(batch, *shape, dtype=torch.float64) - 1
    model(x)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2.0)
    return model, x


def ends_and_gradients(net: autodual.BoundModule, x: Tensor, region: autodual.LInf, method: object) -> list[Tensor]:
    """Return both ends, and the derivatives of a function of them by every parameter."""
    bounds = net.bounds(x, region, method=method)
    ends = torch.cat([bounds.lower, bounds.upper])
    gradients = torch.autograd.grad(ends.square().sum(), list(net.model.parameters()), allow_unused=True)
    return [ends.detach(), torch.cat([part.flatten() for part in gradients if part is not None])]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("strict", "kind"), [(False, autodual.Dual), (True, autodual.Adaptive)])
@pytest.mark.parametrize("name", MODELS)
def test_every_layout_gives_the_dense_numbers(name: str, strict: bool, kind: type) -> None:
    batch, domain = (1, None) if strict else (3, (-1.0, 1.0))
    model, x = built(name, batch)
    net, region = autodual.certify(model), autodual.LInf(0.15, domain=domain)
    expected = ends_and_gradients(net, x, region, kind(strict=strict, rows="dense"))
    for rows in LAYOUTS:
        found = ends_and_gradients(net, x, region, kind(strict=strict, rows=rows))
        for ours, theirs, tolerance in zip(found, expected, (1e-11, 1e-8), strict=True):
            scale = theirs.abs().max()
            assert (ours - theirs).abs().max() <= tolerance * scale, f"{rows} differs"


@pytest.mark.parametrize("name", ["remainders"])
def test_small_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = built(name, 2)
    net, region = autodual.certify(model), autodual.LInf(0.1)
    expected = ends_and_gradients(net, x, region, autodual.Adaptive(rows="dense"))
    for piece in (2**12, 2**15):
        monkeypatch.setattr("autodual.bounds.pairs.PIECE", piece)
        for rows in ("whole", "windows"):
            found = ends_and_gradients(net, x, region, autodual.Adaptive(rows=rows))
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_windows_are_as_large_as_the_field() -> None:
    model, x = built("remainders", 2)
    shown = str(autodual.certify(model).explain(x, autodual.LInf(0.3), autodual.Dual(strict=True, rows="windows")))
    assert "windows up to 7x7" in shown  # 3x3 through a convolution of stride 2 and extent 3


def test_only_undecided_elements_have_a_row() -> None:
    torch.manual_seed(0)
    model = chain(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)).double()
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    model(x)
    net, region = autodual.certify(model), autodual.LInf(0.02)
    boxes = net.intermediate(x, region, method="interval")
    (node,) = [name for name, box in boxes.items() if box.lower[0].shape == (2, 2, 2)]
    undecided = ((boxes[node].lower < 0) & (boxes[node].upper > 0)).sum() / 2
    assert 0 < undecided < 8
    assert f"{undecided:.4g} of 8 rows per example" in str(net.explain(x, region, autodual.Dual(rows="windows")))


class OwnBox(autodual.Region):
    """A user's region, known by its support alone."""

    def support(self, x: Tensor, v: Tensor) -> Tensor:
        return (v * x).flatten(2).sum(-1) + 0.1 * v.abs().flatten(2).sum(-1)


@pytest.mark.parametrize(
    "region", [autodual.L2(0.4), autodual.L1(1.0), autodual.L2(0.4, domain=(-1.0, 1.0)), OwnBox()], ids=repr
)
@pytest.mark.parametrize("name", ["remainders", "tokens"])
def test_regions_that_are_no_boxes(name: str, region: autodual.Region) -> None:
    model, x = built(name, 3)
    net = autodual.certify(model)
    for kind in (autodual.Dual, autodual.Adaptive):  # the one takes both ends from a walk, the other walks twice
        expected = net.bounds(x, region, method=kind(rows="dense"))
        for rows in LAYOUTS:
            found = net.bounds(x, region, method=kind(rows=rows))
            torch.testing.assert_close((found.lower, found.upper), (expected.lower, expected.upper), rtol=1e-10, atol=1e-12)
    rows = str(net.explain(x, region, autodual.Dual(rows="windows")))
    assert ("rows per example" in rows) == (not isinstance(region, OwnBox))


@pytest.mark.parametrize("kind", [autodual.Dual, autodual.Adaptive])
def test_an_unknown_layout_is_refused(kind: type) -> None:
    with pytest.raises(SpecificationError, match="rows must be one of auto, dense, whole, windows, got 'sparse'"):
        kind(rows="sparse")


class Scaled(nn.Module):
    """Factors that are trained, for each channel or each element; they start at numbers that look like constants."""

    def __init__(self, shape: tuple[int, ...], start: float) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head, self.factor = nn.Linear(256, 3), nn.Parameter(torch.full(shape, start))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)) * self.factor)).flatten(1))


class Computed(nn.Module):
    """Weights that are computed from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(4, 6), nn.Parameter(0.1 * torch.randn(6))
        self.direction, self.length = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.rand(6, 1))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x) * self.scale.exp())
        return self.head(torch.relu(nn.functional.linear(x, self.direction * self.length)))


def loss_of(net: autodual.BoundModule, x: Tensor, rows: str) -> Tensor:
    """Return the robust loss, every example labelled 0."""
    y = torch.zeros(len(x), dtype=torch.long)
    return net.robust_loss(x, y, autodual.LInf(0.1), method=autodual.Dual(rows=rows))


@pytest.mark.parametrize("rows", ["dense", "whole", "windows", "auto"])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Scaled((4, 1, 1), 1.0), "factor"), (lambda: Scaled((4, 8, 8), 0.5), "factor"),
        (Computed, "scale"), (Computed, "length"),
    ],
    ids=["channels", "elements", "exp", "product"],
)  # fmt: skip
def test_no_parameter_loses_its_derivative(make: Callable[[], nn.Module], name: str, rows: str) -> None:
    torch.manual_seed(0)
    model = make().double()
    x = torch.rand(3, *((1, 8, 8) if isinstance(model, Scaled) else (4,)), dtype=torch.float64)
    net, parameter = autodual.certify(model), model.get_parameter(name)
    (found,) = torch.autograd.grad(loss_of(net, x, rows), parameter)
    direction, values = torch.randn_like(parameter), []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            parameter += step * direction
            values.append(loss_of(net, x, rows))
            parameter -= step * direction
    assert ((values[0] - values[1]) / 2e-6).item() == pytest.approx((found * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize("method", [autodual.Dual(), autodual.Optimized(steps=2)], ids=lambda method: type(method).__name__)
def test_bounds_in_chunks_are_differentiable(method: object) -> None:
    torch.manual_seed(0)
    model = chain(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3)).double()
    x, gradients = torch.rand(2, 1, 8, 8, dtype=torch.float64), []
    model(x)
    for budget in (2**25, 2**12):
        bounds = autodual.certify(model, memory_budget=budget).bounds(x, autodual.LInf(0.1), method=method)
        gradients.append(torch.autograd.grad(bounds.lower.sum(), list(model.parameters())))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-8, atol=1e-10)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("method", [autodual.Dual, autodual.Adaptive])
@pytest.mark.parametrize("layout", ["whole", "windows"])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), ((5, 2), (2, 3), (0, 2)), (2, 3, 0), (8, 2, 1)])
def test_phases_behind_the_last_convolution_change_nothing(method, layout, kernel, stride, padding, monkeypatch):
    """The image is normalised, its box cut off by a domain; several examples share a chunk, or one has several."""
    torch.manual_seed(0)
    model = chain(
        autodual.Normalize((0.4, 0.5), (0.2, 0.3)), nn.Conv2d(2, 4, kernel, stride=stride, padding=padding), nn.ReLU(),
        nn.Conv2d(4, 3, 2, padding=1), nn.ReLU(), nn.Conv2d(3, 5, 1),
    )  # fmt: skip
    x = torch.rand(3, 2, 12, 13).double()
    model = model.double().eval()
    model(x)  # makes the classifier
    net = autodual.certify(model)
    region = autodual.LInf(0.3, domain=(0.0, 1.0))
    dense, walked = net.intermediate(x, region, method=method(rows="dense")), []
    convolution = dual_layers.lookup(nn.Conv2d)
    honest = convolution.pull_in_phases
    monkeypatch.setattr(convolution, "pull_in_phases", lambda self, nu: walked.append(len(nu)) or honest(self, nu))
    monkeypatch.setattr(pairs, "DENSER", 0)  # else a matrix product walks small windows
    for piece in (2**21, 2**13):
        monkeypatch.setattr(pairs, "PIECE", piece)
        found = net.intermediate(x, region, method=method(rows=layout))
        for name, box in dense.items():
            torch.testing.assert_close(found[name].lower, box.lower, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(found[name].upper, box.upper, rtol=1e-10, atol=1e-10)
    assert sum(walked) > 0


def test_a_radius_of_each_example_has_its_own_derivative_though_all_are_equal():
    torch.manual_seed(0)
    model = chain(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1), nn.ReLU()).double().eval()
    x = torch.rand(3, 2, 8, 8).double()
    model(x)  # makes the classifier
    net, found = autodual.certify(model), []
    for rows in ("dense", "whole"):
        eps = torch.full((3,), 0.05, dtype=torch.float64, requires_grad=True)
        net.robust_loss(x, torch.tensor([0, 1, 0]), autodual.LInf(eps), autodual.Dual(rows=rows)).backward()
        found.append(eps.grad)
    assert len(found[0].unique()) == 3
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-12)
