"""The loop: what it minimises, what it refuses, when it stops, what it leaves behind."""

from __future__ import annotations

import json
import math
import random
import runpy
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import autodual
from autodual import losses
from autodual.errors import SpecificationError, TrainingError
from autodual.training import Config, Steps, judge, make_loss, train
from autodual.training.batches import Batches, cropped, split
from autodual.training.config import Data
from autodual.training.initialization import keep_width
from autodual.training.trainer import overfitted

TINY = runpy.run_path(str(Path(__file__).with_name("tiny.py")))
POINTS = {"epochs": 2, "batch": 20, "schedules": {"eps": 0.01, "lr": 0.05}, "evaluation": {"train": 0}}


def points(count: int = 80) -> TensorDataset:
    x = torch.rand(count, 2, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x.sum(1) > 1).long())


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))


class Weighted(nn.Module):
    """A loss with numbers of its own; keeps what it was given."""

    numbers: ClassVar[tuple[str, ...]] = ("kappa", "beta")
    seen: ClassVar[list[dict[str, float]]] = []

    def __init__(self, network, *, reduction="mean", **numbers):
        super().__init__()
        self.network, self.own = network, numbers

    def forward(self, x, y, region, **numbers):
        self.seen.append({"eps": region.eps, **self.own, **numbers})
        return F.cross_entropy(self.network(x), y) * (self.own | numbers)["beta"]


@pytest.fixture
def weighted(monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "weighted", Weighted)
    Weighted.seen.clear()
    return Weighted


def test_schedules_move_radius_rate_and_numbers(weighted):
    kappa = {"kind": "linear", "start": 1.0, "end": 0.0, "length": 2}
    settings = POINTS | {"loss": {"name": "weighted", "numbers": {"beta": 2.0}}}
    config = Config.build(settings, [("schedules.kappa", kappa), ("schedules.eps", {**kappa, "start": 0.0, "end": 0.08})])
    result = train(small(), points(), config)
    assert [seen["kappa"] for seen in weighted.seen] == [1 - step / 8 for step in range(8)]
    assert [seen["eps"] for seen in weighted.seen] == pytest.approx([0.01 * step for step in range(8)])
    assert {seen["beta"] for seen in weighted.seen} == {2.0}
    assert [row["kappa"] for row in result.rows] == [0.5, 0.0]


def test_one_step_is_that_of_plain_pytorch():
    """No augmentation, one batch of everything: Adam on the robust loss, nothing else."""
    data, config = points(20), Config.build(POINTS, [("epochs", 1), ("optimizer.clip", 0.01), ("optimizer.weight_decay", 0.1)])
    trained, expected = small(), small()
    result = train(trained, data, config)
    net = autodual.certify(expected)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.05, weight_decay=0.1)
    order = Batches(data, torch.arange(20), 20, 0, Data(), torch.device("cpu")).at(0)
    loss = net.robust_loss(*order[:2], autodual.LInf(0.01))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.01)
    optimizer.step()
    assert result.rows[0]["loss"] == pytest.approx(loss.item())
    assert result.rows[0]["gradient"] == pytest.approx(norm.item())
    for mine, theirs in zip(trained.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, weighted):
    settings = POINTS | {"checkpoint": 1, "loss": {"name": "weighted"}}
    explode = {"kind": "steps", "start": 1.0, "factor": 1e300, "at": [0.75, 1.0]}
    config = Config.build(settings, [("schedules.beta", explode), ("schedules.kappa", 0.0)])
    with pytest.raises(TrainingError, match=r"step 3 \(epoch 0\.75\), eps 0\.01, lr 0\.05.*smaller lr.*last good checkpoint"):
        train(small(), points(), config, out=tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["state"]["step"] == 3
    assert all(value.isfinite().all() for value in saved["model"].values())


def test_stops_early_once_the_radius_has_settled():
    """With a learning rate of 0 nothing gets better; the patience counts from the end of the ramp."""
    ramp = {"kind": "linear", "start": 0.0, "end": 0.01, "length": 3}
    changes = [("epochs", 50), ("schedules.lr", 0.0), ("schedules.eps", ramp), ("data.held_out", 20)]
    result = train(small(), points(), Config.build(POINTS, [*changes, ("evaluation.patience", 2)]))
    assert result.stopped == "patience"
    assert [row["epoch"] for row in result.rows] == [1, 2, 3, 4, 5]
    assert result.best["epoch"] == 1


def test_the_best_weights_are_those_of_the_best_line(tmp_path):
    """The learning rate explodes half-way: what came before is better and is kept."""
    changes = [("epochs", 6), ("data.held_out", 20), ("schedules.lr", Steps(0.05, 1e4, at=(3.0,)))]
    model, data = small(), points()
    result = train(model, data, Config.build(POINTS, changes), test=points(30), out=tmp_path / "run")
    certified = [row["certified"] for row in result.rows]
    assert certified[-1] < max(certified) == result.best["certified"]
    fresh = small()
    fresh.load_state_dict(torch.load(tmp_path / "run" / "best.pt", weights_only=True))
    index = split(len(data), 20, 0)[1]
    found = judge(autodual.certify(fresh), data, autodual.LInf(0.01), ["dual"], index=index)
    assert found.totals()["certified"] == pytest.approx(result.best["certified"])
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test"]["examples"] == 30
    assert summary["test"]["certified"] == result.test.totals()["certified"]
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", sorted(set(losses.LOSSES) - {"weighted"}))
def test_every_loss_can_be_trained_on(name):
    """Each number that a loss has can be scheduled; each takes a step that changes the weights."""
    moved = [(f"schedules.{number}", float(value)) for number, value in losses.LOSSES[name].numbers.items()]
    model = small()
    before = model[0].weight.detach().clone()
    train(model, points(), Config.build(POINTS, [("epochs", 1), ("loss.name", name), *moved]))
    assert not model[0].weight.equal(before)


def test_a_loss_keeps_its_own_method_unless_told():
    net = autodual.certify(small())
    default = make_loss(net, Config.build({"loss": {"name": "crown-ibp"}}))
    told = make_loss(net, Config.build({"loss": {"name": "crown-ibp", "method": "dual"}}))
    assert isinstance(default.method, autodual.Adaptive)
    assert told.method == autodual.Dual()
    assert make_loss(net, Config.build({"loss": {"name": "sabr", "options": {"steps": 3}}})).steps == 3


def test_settings_that_do_not_fit_are_named(weighted):
    for changes, message in [
        ({"loss.name": "none"}, "there is no loss 'none'; known are clean"),
        ({"schedules.gamma": 1.0, "loss.name": "weighted"}, "has no number 'gamma'; it has: kappa, beta"),
        ({"loss.name": "weighted", "loss.method": "adaptive"}, "its own way to bound"),
        ({"loss.name": "weighted", "loss.options": {"steps": 3}}, "has no option 'steps'; it has: none"),
        ({"batch": 1000}, "batch is 1000, but there are only 80"),
        ({"data.held_out": 80}, "data.held_out is 80"),
        ({"evaluation.patience": 1}, "needs held-out"),
        ({"data.shift": 1}, "for images"),
    ]:
        with pytest.raises(SpecificationError, match=message):
            train(small(), points(), Config.build(POINTS, changes.items()))
    with pytest.raises(SpecificationError, match="resume needs out"):
        train(small(), points(), Config.build(POINTS), resume=True)


class Noisy(Dataset):
    """Examples that are drawn anew each time, from the generators that people use."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        noise = torch.rand(()) + np.random.rand() + random.random()  # noqa: NPY002
        return torch.tensor([float(noise), i / 40]), int(i > 20)


def test_random_data_sets_repeat_and_leave_the_callers_generators_alone():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first, second = (train(model := small(), Noisy(), Config.build(POINTS)) and model.state_dict() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    torch.manual_seed(0)
    small()
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002


def test_every_example_once_an_epoch_and_another_order_each():
    data = TensorDataset(torch.arange(10.0)[:, None], torch.zeros(10))
    batches = Batches(data, torch.arange(10), 5, 0, Data(), torch.device("cpu"))
    epochs = [torch.cat([batches.at(2 * epoch + place)[0].flatten() for place in range(2)]) for epoch in range(2)]
    assert all(epoch.sort().values.equal(torch.arange(10.0)) for epoch in epochs)
    assert not epochs[0].equal(epochs[1])


def test_crops_are_windows_of_the_padded_image():
    x = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    padded = F.pad(x, [1] * 4)
    places = torch.tensor([[0, 2], [1, 1]])
    found = cropped(padded, places, x.shape[2:])
    assert found[0].equal(padded[0, :, 0:4, 2:6])
    assert found[1].equal(x[1])


def test_shifts_and_mirrors_occur():
    batches = Batches(TINY["images"](), torch.arange(60), 60, 0, Data(shift=1, flip=True), torch.device("cpu"))
    plain = Batches(TINY["images"](), torch.arange(60), 60, 0, Data(), torch.device("cpu"))
    varied, original = batches.at(0)[0], plain.at(0)[0]
    options = {
        (int(down), int(right), turned)
        for down in range(3)
        for right in range(3)
        for turned in (False, True)
        for image, seen in zip(original, varied, strict=True)
        if torch.equal(F.pad(image.flip(2) if turned else image, [1] * 4)[:, down : down + 6, right : right + 6], seen)
    }
    assert len(options) == 18


def test_interval_initialization_keeps_widths():
    """A usual initialisation widens intervals by an order of magnitude and more at each of these layers."""
    torch.manual_seed(0)
    layers = [module for _ in range(6) for module in (nn.Linear(200, 200), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    x, region = torch.randn(4, 200), autodual.LInf(0.1)

    def width():
        bounds = autodual.certify(model).bounds(x, region, method="interval")
        return (bounds.upper - bounds.lower).mean().item() / 0.2

    before = width()
    keep_width(model)
    assert 0.3 < width() < 5 < 1000 < before


def test_training_lowers_the_robust_loss():
    changes = [("epochs", 8), ("evaluation.train", 60), ("schedules.lr", 0.03), ("loss.method", "dual"), ("data.shift", 0)]
    config = Config.build(TINY["SETTINGS"], [*changes, ("data.flip", False)])
    result = train(TINY["model"](), TINY["images"](), config)
    assert result.rows[-1]["train_robust_loss"] < 0.5 * math.log(3)
    assert result.best["certified"] > 0.8


def test_overfitting_to_the_own_attack_is_told_from_its_likes():
    fine, lost = {"epoch": 1, "eps": 0.1, "loss": 0.9, "attacked": 0.6}, {"epoch": 2, "eps": 0.1, "loss": 0.5, "attacked": 0.1}
    assert "fell from 60.0% to 10.0%" in overfitted([fine, lost])
    assert "at epoch 2" in overfitted([fine, {"epoch": 1.5, "eps": 0.1, "loss": 0.7}, lost])
    assert overfitted([fine]) is None
    assert overfitted([fine, lost | {"attacked": 0.5}]) is None  # noise
    assert overfitted([fine, lost | {"eps": 0.2}]) is None  # a larger radius
    assert overfitted([fine, lost | {"loss": 2.0}]) is None  # it diverges, which is another matter
    assert overfitted([fine, lost, {"epoch": 3, "eps": 0.1, "loss": 0.4}]) is None  # nothing new


def test_overfitting_is_reported(monkeypatch, caplog):
    monkeypatch.setattr("autodual.training.trainer.overfitted", lambda rows: f"lost at {rows[-1]['epoch']}")
    with caplog.at_level("WARNING", logger="autodual.training"):
        train(small(), points(), Config.build(POINTS))
    assert [record.getMessage() for record in caplog.records] == ["lost at 1.0", "lost at 2.0"]
