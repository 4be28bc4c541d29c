"""Settings: read, changed, written, and refused by name."""

from __future__ import annotations

import pytest

import autodual
from autodual.errors import SpecificationError
from autodual.training import Config, Periodic, Smooth
from autodual.training.config import differences

FULL = """
model = "model.py:build"
norm = "l2"
domain = [0, 1]
epochs = 7
minutes = 2.5
initialization = "interval"

[data]
train = "a \\"quoted\\" näme.npz"
scale = 255
shape = [1, 28, 28]
flip = true

[loss]
method = {name = "projected", r = 20, estimator = "log-mean"}

[schedules]
eps = {kind = "smooth", start = 0, end = 0.3, length = 10}
lr = {kind = "periodic", start = 0.01, end = 1e-5, resets = [0, 3.5, 7]}
"""


def test_read_and_written_alike(tmp_path):
    (tmp_path / "a.toml").write_text(FULL)
    config = Config.read(tmp_path / "a.toml", [("batch", 33), ("evaluation.methods", ["auto"])])
    assert config.method == autodual.Projected(r=20, estimator="log-mean")
    assert config.schedules == {"eps": Smooth(0, 0.3, length=10), "lr": Periodic(0.01, 1e-5, (0, 3.5, 7))}
    assert isinstance(config.region(0.1), autodual.L2)
    assert config.region(0.1).domain == (0, 1)
    assert (config.batch, config.evaluation.methods, config.data.shape) == (33, ("auto",), (1, 28, 28))
    assert config.judged_eps == config.schedules["eps"](7)
    (tmp_path / "b.toml").write_text(config.to_toml())
    again = Config.read(tmp_path / "b.toml")
    assert again.as_dict() == config.as_dict()
    assert again == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 1}, "unknown setting 'epoch'; known are model, data"),
        ({"data": {"trian": "x"}}, "unknown setting 'data.trian'; known are train, test"),
        ({"data": 3}, "data is a table of settings"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
        ({"minutes": "5"}, "minutes must be a finite number or left out, got '5'"),
        ({"norm": "l3"}, "norm must be 'linf' or 'l2' or 'l1', got 'l3'"),
        ({"domain": [1, 0]}, "the lower one first"),
        ({"data": {"flip": 1}}, "data.flip must be true or false"),
        ({"data": {"shape": [1, 2.5]}}, "data.shape must be a list, each a whole number or left out"),
        ({"loss": {"method": "dula"}}, "unknown method 'dula'; known are interval"),
        ({"loss": {"method": {"name": "dual", "r": 3}}}, "method dual has no option 'r'; it has strict"),
        ({"evaluation": {"methods": ["dula"]}}, "unknown method 'dula'"),
        ({"evaluation": {"methods": ["projected"]}}, "proves nothing"),
        ({"schedules": {"eps": {"kind": "liner"}}}, "schedule of eps"),
        ({"schedules": {"eps": -0.1}}, "eps must never be negative"),
        ({"loss": {"numbers": {"kappa": 1}}, "schedules": {"kappa": 1}}, "kappa is given twice"),
        ({"optimizer": {"clip": 0}}, "optimizer.clip must be positive"),
        ({"device": "gpu"}, "device 'gpu'"),
    ],
)
def test_what_is_wrong_is_named(content, message):
    with pytest.raises(SpecificationError, match=message):
        Config.build(content)


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(SpecificationError, match="cannot read"):
        Config.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("epochs = = 3")
    with pytest.raises(SpecificationError, match=r"bad\.toml is no TOML"):
        Config.read(tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text("epochs = -3")
    with pytest.raises(SpecificationError, match=r"bad\.toml: epochs must be at least 1"):
        Config.read(tmp_path / "bad.toml")


def test_a_change_cannot_go_below_a_value():
    with pytest.raises(SpecificationError, match="epochs is a value"):
        Config.build({"epochs": 3}, [("epochs.first", 1)])


def test_differences_are_named():
    old, new = (Config.build({"batch": batch, "data": {"held_out": 5 * batch}}).as_dict() for batch in (1, 2))
    assert differences(old, new) == ["data.held_out was 5, is 10", "batch was 1, is 2"]
    assert differences({"a": 1}, {}) == ["a was 1, is None"]
