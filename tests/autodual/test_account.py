"""An account of a margin: its parts add up to the bound, and its derivatives are those of the bound."""

from __future__ import annotations

import copy
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autodual
from autodual import L1, L2, Box, LInf, Projected, Region, SpecificationError


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3 * 16, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.conv(x)).flatten(1))


class Curved(nn.Module):
    """Two curves, their product and a maximum: not even its last layer is affine."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x):
        product = torch.tanh(self.a(x)) * torch.sigmoid(self.b(x))
        return product.view(-1, 3, 2).amax(2)


class Pair(nn.Module):
    """Two inputs that move and one that is fixed."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 5), nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, image, state, scale):
        return self.head(torch.relu(self.left(image)) * self.right(state) * scale)


class TimeFirst(nn.Module):
    """Its hidden values have the batch inside another axis."""

    def __init__(self):
        super().__init__()
        self.step, self.head = nn.Linear(3, 4), nn.Linear(8, 3)

    def forward(self, x):
        hidden = torch.relu(self.step(x.transpose(0, 1).reshape(-1, 3)))
        return self.head(hidden.view(2, -1, 4).transpose(0, 1).flatten(1))


class Rotated(Region):
    """An ellipse along a diagonal: neither a box nor symmetric in its coordinates."""

    def __init__(self, size):
        self.size = size

    def support(self, x, v):
        turned = torch.stack([v[..., 0] + v[..., 1], 0.2 * (v[..., 0] - v[..., 1])])
        return (v * x).sum(-1) + self.size * turned.norm(dim=0) + 0.01 * v[..., 2:].abs().sum(-1)


def mlp():
    return nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))


SHAPES = {mlp: (4,), Residual: (1, 4, 4), Curved: (4,), TimeFirst: (2, 3)}
REGIONS = {
    "LInf": LInf(0.1),
    "clipped": LInf(0.1, domain=(0.0, 0.9)),
    "per example": LInf(torch.tensor([0.05, 0.1, 0.15])),
    "L2": L2(0.2),
    "L2 clipped": L2(0.2, domain=(0.0, 1.0)),
    "L1 clipped": L1(0.2, domain=(0.0, 1.0)),
}


def problem(kind=mlp, dtype=torch.float64):
    torch.manual_seed(1)
    model = kind().to(dtype)
    x = torch.rand(3, *SHAPES[kind], dtype=dtype)
    return autodual.certify(model), x, model(x).argmax(1)


def assert_adds_up(account, report):
    margin = float(report.margins[account.example, account.target])
    assert account.margin == margin
    assert account.reference - account.lost == pytest.approx(margin, rel=1e-9, abs=1e-9)
    for entry in account.entries:
        assert entry.amount >= 0
        assert (entry.amounts >= -1e-12).all()
        assert float(entry.amounts.sum()) == pytest.approx(entry.amount, rel=1e-9, abs=1e-12)
        assert (entry.box.lower <= entry.box.upper).all()


@pytest.mark.parametrize("method", ["dual", "adaptive", "interval"])
@pytest.mark.parametrize("kind", SHAPES)
def test_parts_add_up_to_the_margin(kind, method):
    net, x, y = problem(kind)
    report = net.verify(x, y, LInf(0.05), method)
    for target in {0, 1, 2} - {int(y[1])}:
        assert_adds_up(report.explain(1, target), report)


@pytest.mark.parametrize("region", REGIONS)
def test_parts_add_up_over_every_region(region):
    net, x, y = problem()
    report = net.verify(x.clamp(max=0.9), y, REGIONS[region], "dual")
    account = report.explain(2)
    assert_adds_up(account, report)
    assert account.sensitivity.total < 0


@pytest.mark.parametrize("regions", [LInf(0.05), {"image": LInf(0.05), "state": Box(0.2, 0.4)}, {"state": L2(0.1)}])
def test_several_inputs(regions):
    torch.manual_seed(0)
    net = autodual.certify(Pair().double())
    x = (torch.rand(3, 2).double(), torch.full((3, 4), 0.3).double(), torch.rand(3, 1).double())
    regions = regions if isinstance(regions, dict) else dict.fromkeys(("image", "state"), regions)
    report = net.verify(x, net(*x).argmax(1), regions)
    account = report.explain(1)
    assert_adds_up(account, report)
    assert [entry.node for entry in account.entries if entry.is_input] == list(regions)


def test_what_is_projected_adds_up_where_the_last_rows_are_walked_back():
    net, x, y = problem()
    for method in (Projected(r=10), Projected(r=10, estimator="order", heavy=0)):
        report = net.verify(x, y, LInf(0.1), method)
        assert_adds_up(report.explain(2), report)
    assert "estimate  " in str(net.verify(x, y, LInf(0.1), Projected(r=20)).explain(2))
    with pytest.raises(SpecificationError, match="does not walk its row back: take last_exact=True and r >= 3"):
        net.verify(x, y, LInf(0.1), Projected(r=20, last_exact=False)).explain(0)


def test_a_region_of_ones_own_has_no_radius():
    net, x, y = problem()
    report = net.verify(x, y, Rotated(0.1))
    account = report.explain(1)
    assert account.sensitivity is None
    assert "the region has no eps" in str(account)
    assert account.reference - account.lost == pytest.approx(account.margin, abs=1e-9)
    assert float(account.entries[0].amounts.sum()) == pytest.approx(account.entries[0].amount)


def test_a_support_that_has_no_derivative_is_not_told_apart():
    class Opaque(Rotated):
        def support(self, x, v):
            return super().support(x, v.detach())

    net, x, y = problem()
    account = net.verify(x, y, Opaque(0.1)).explain(1)
    assert account.entries[0].amounts is None
    assert account.entries[0].largest() == ()
    assert account.reference - account.lost == pytest.approx(account.margin, abs=1e-9)
    assert "? of 4" in str(account)


def test_parts_are_those_of_a_network_done_by_hand():
    """One ReLU of z in [-1, 3], wanted small: the upper line 0.75 (z + 1), 0.75 above 0.75 z at the centre less relu(1)."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    for parameter, value in zip(model.parameters(), ([[1.0]], [0.0], [[0.0], [1.0]], [5.0, 0.0]), strict=True):
        parameter.data = torch.tensor(value).double()
    account = autodual.certify(model).verify(torch.ones(1, 1).double(), [0], LInf(2.0)).explain(0)
    inputs, relu = account.entries
    assert account.reference == pytest.approx(4.0)
    assert (inputs.amount, relu.amount) == (pytest.approx(1.5), pytest.approx(0.5))
    (element,) = relu.largest()
    assert element.index == (0,)
    assert (element.lower, element.upper, element.nu, element.amount) == pytest.approx((-1.0, 3.0, -1.0, 0.5))
    assert account.margin == pytest.approx(2.0)  # 5 - 0.75 (3 + 1)
    # At radius e the upper line ends at u = 1 + e, so the margin is 4 - e; at fixed lines it falls by the slope 0.75 alone.
    assert account.sensitivity.total == pytest.approx(-1.0)
    assert account.sensitivity.fixed == pytest.approx(-0.75)
    assert account.sensitivity.crossing == pytest.approx(4.0)


def margin_at(net, x, y, region, account, method):
    return float(net.verify(x, y, region, method).margins[account.example, account.target])


@pytest.mark.parametrize(
    ("kind", "region", "method"),
    [
        (mlp, LInf(0.07), "dual"),
        (mlp, LInf(0.07), "adaptive"),
        (mlp, LInf(0.07, domain=(0.0, 1.0)), "interval"),
        (mlp, LInf(0.07, domain=(0.0, 1.0)), "dual"),
        (mlp, L2(0.13, domain=(0.0, 1.0)), "dual"),
        (Curved, LInf(0.07, domain=(0.0, 1.0)), "adaptive"),
    ],
)
def test_the_derivative_agrees_with_finite_differences(kind, region, method):
    net, x, y = problem(kind)
    account = net.verify(x, y, region, method).explain(1)
    step = 1e-6
    low, high = (margin_at(net, x, y, region.with_eps(region.eps + turn * step), account, method) for turn in (-1, 1))
    assert account.sensitivity.total == pytest.approx((high - low) / (2 * step), rel=1e-4)


def test_without_a_relaxation_nothing_is_lost_to_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).double()
    net, x = autodual.certify(model), torch.rand(2, 4).double()
    for region in (LInf(0.2), LInf(0.2, domain=(0.0, 1.0)), L2(0.2)):
        account = net.verify(x, model(x).argmax(1), region).explain(0)
        (entry,) = account.entries
        assert account.reference - entry.amount == pytest.approx(account.margin)
        assert account.sensitivity.total == pytest.approx(account.sensitivity.fixed)
    found = account.sensitivity  # without a domain the margin is a line in eps: the estimate is exact
    at_zero = net.verify(x, model(x).argmax(1), L2(found.crossing)).margins[0, account.target]
    assert float(at_zero) == pytest.approx(0.0, abs=1e-9)


def test_a_radius_per_element_has_a_derivative_but_no_crossing():
    net, x, y = problem()
    account = net.verify(x, y, LInf(torch.tensor([0.1, 0.05, 0.1, 0.05]).double())).explain(0)
    assert account.sensitivity.total < 0
    assert account.sensitivity.crossing is None


def test_a_region_of_one_point_takes_nothing():
    net = autodual.certify(nn.Sequential(nn.Linear(4, 3)).double())
    account = net.verify(torch.rand(2, 4).double(), [0, 1], LInf(0.0)).explain(1)
    assert account.lost == 0
    assert account.share(0.0) == 0.0
    assert account.margin == pytest.approx(account.reference)


def test_inference_mode_changes_nothing():
    net, x, y = problem()
    plain = net.verify(x, y, LInf(0.1)).explain(1)
    with torch.inference_mode():
        account = net.verify(x, y, LInf(0.1)).explain(1)
    assert str(account) == str(plain)


def test_batch_statistics_are_those_of_the_whole_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    net, x = autodual.certify(model), torch.rand(5, 4).double()
    report = net.verify(x, [0, 1, 2, 0, 1], LInf(0.05))
    account = report.explain(3)
    assert_adds_up(account, report)
    assert account.outcome == "estimate"


def test_the_whole_batch_explains_an_example_where_it_cannot_be_taken_alone():
    net, x, y = problem()
    report = net.verify(x, y, LInf(0.1))
    alone = report.explain(2)

    class Own(LInf):
        """Not one of the library's, so nobody knows how it is cut."""

    whole = net.verify(x, y, Own(torch.tensor([0.1, 0.1, 0.1]).double())).explain(2)
    assert whole.margin == pytest.approx(alone.margin)
    assert [entry.amount for entry in whole.entries] == pytest.approx([entry.amount for entry in alone.entries])
    assert whole.sensitivity.crossing == pytest.approx(alone.sensitivity.crossing)


def test_single_precision_adds_up_to_its_rounding():
    net, x, y = problem(dtype=torch.float32)
    report = net.verify(x, y, LInf(0.1))
    account = report.explain(0)
    assert account.reference - account.lost == pytest.approx(account.margin, rel=1e-5, abs=1e-5)


def test_changed_weights_are_noticed():
    net, x, y = problem()
    report = net.verify(x, y, LInf(0.1))
    report.explain(0)
    with torch.no_grad():
        net.model[0].weight += 0.01
    with pytest.raises(SpecificationError, match=r"now, the report has .* was changed since; call verify again"):
        report.explain(0)


def test_what_cannot_be_explained_says_so():
    net, x, y = problem()
    report = net.verify(x, y, LInf(0.1))
    own = int(y[0])
    for example in (3, -1):
        with pytest.raises(SpecificationError, match=f"there is no example {example}: the report has 3, numbered from 0"):
            report.explain(example)
    for target in (3, -1, own):
        with pytest.raises(SpecificationError, match=f"class from 0 to 2 other than example 0's own, {own}; got {target}"):
            report.explain(0, target)
    for other in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert torch.equal(other.margins, report.margins)
        with pytest.raises(SpecificationError, match="copied or stored"):
            other.explain(0)


def test_a_margin_of_which_nothing_is_known_names_the_violation():
    class Logarithm(nn.Module):
        def forward(self, x):
            return torch.log(x)

    x = torch.tensor([[1.0, 0.2], [1.0, 0.8]])
    report = autodual.certify(Logarithm()).verify(x, [0, 0], LInf(0.5))
    with pytest.raises(SpecificationError, match="nothing is known of example 0's margin to class 1; example 0: the input of"):
        report.explain(0)
    assert report.explain(1).lost > 0


def test_the_table():
    net, x, y = problem(Residual)
    account = net.verify(x, y, LInf(0.05)).explain(0)
    text = str(account)
    for expected in (
        "at the centre",
        "lower bound",
        "F.relu",
        "test_account.py:",
        "16 of 16",
        "largest elements",
        "d margin / d eps",
    ):
        assert expected in text, expected
    first = max((entry.largest(1)[0] for entry in account.entries), key=lambda element: element.amount)
    assert f"{first.amount:.4g}" in text
    assert re.search(r"^lower bound +(\S+)", text, flags=re.M)[1] == f"{account.margin:.5f}"  # of four digits or more
    assert 0.1 <= max(abs(account.margin), account.reference) < 1


@pytest.mark.parametrize(("kind", "method"), [(Residual, "dual"), (mlp, "interval")])
def test_a_picture_is_written(kind, method, tmp_path):
    net, x, y = problem(kind)
    path = net.verify(x, y, LInf(0.05), method).explain(0).draw(tmp_path / "account.png")
    assert path.stat().st_size > 10_000


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    net, x, y = problem()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install 'autodual\\[plot\\]'"):
        net.verify(x, y, LInf(0.05)).explain(0).draw("never.png")


def test_the_page_shows_what_its_code_prints(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "explaining.md").read_text()
    code, shown = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", page, flags=re.S).groups()
    exec(compile(code, "explaining.md", "exec"), {})
    words = [re.sub(r"-?\d+\.\d+%?", "#", text).split() for text in (capsys.readouterr().out, shown)]
    assert words[0] == words[1]  # but for the numbers, whose last digits may differ
    assert (tmp_path / "account.png").exists()
