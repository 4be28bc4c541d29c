"""``autodual train`` and ``autodual evaluate``: what they write and print, and one line for everything that can be wrong."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import autodual
from autodual.cli import main
from autodual.digits import load_model, load_test_set
from autodual.training import Config, Judgement, judge

ROOT = Path(__file__).parents[3]
MODEL = """
from torch import nn

def build():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
"""
CONFIG = """
epochs = 2
batch = 10
[data]
held_out = 10
[evaluation]
train = 10
attack = 2
"""
DIGITS = ["--model", "autodual.digits:load_model", "--data", "digits", "--domain", "0", "1"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).integers(0, 256, (60, 2, 2), dtype=np.uint8)
    np.savez("data.npz", x=x, y=(x.reshape(60, 4).mean(1) > 127).astype(np.int64))
    Path("model.py").write_text(MODEL)
    Path("config.toml").write_text(CONFIG)
    return tmp_path


WORDS = ["--model", "model.py:build", "--train", "data.npz", "--scale", "255", "--shape", "4"]


def test_train_from_file_flags_and_settings(files, capsys):
    words = [*WORDS, "--test", "data.npz", "--eps", "4/255", "--ramp", "1", "--set", "optimizer.clip=5", "--set", "norm=l2"]
    assert main(["train", "config.toml", *words]) == 0
    printed = capsys.readouterr()
    assert "stopped by epochs" in printed.out
    assert "test, 60 examples: clean" in printed.out
    assert "epoch 2/2  loss" in printed.err
    folder = files / "runs" / "config"
    config = Config.read(folder / "config.toml")
    assert (config.norm, config.optimizer.clip, config.data.shape, config.epochs) == ("l2", 5, (4,), 2)
    assert config.schedules["eps"](1) == 4 / 255
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["settings"] == tomllib.loads((folder / "config.toml").read_text())
    assert len(list(csv.DictReader((folder / "log.csv").open()))) == 2
    assert main(["train", "--out", str(folder), "--resume"]) == 0
    assert "stopped by epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "model is not set"),
        (["train", "none.toml"], "cannot read none.toml"),
        (["train", "config.toml", "--set", "epoch=3"], "config.toml: unknown setting 'epoch'"),
        (["train", *WORDS, "--ramp", "3"], "--ramp needs --eps"),
        (["train", *WORDS[:-2], "--shape", "5"], "--shape 5"),
        (["train", *WORDS, "--batch", "100"], "batch is 100"),
        (["evaluate", *DIGITS, "--eps", "0.1", "--methods", "projected"], "--methods projected proves nothing"),
        (["evaluate", *DIGITS, "--eps", "0.1", "--csv", "nowhere/a.csv"], "no folder nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(files, capsys, words, message):
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_words_that_are_no_settings(files, capsys):
    with pytest.raises(SystemExit):
        main(["train", "--set", "epochs"])
    assert "write NAME=VALUE" in capsys.readouterr().err


def test_evaluate_is_the_union_of_its_methods(tmp_path, capsys):
    words = ["--limit", "60", "--eps", "0.02", "0.1", "--methods", "optimized", "interval", "dual", "--attack", "5"]
    assert main(["evaluate", *DIGITS, *words, "--json", f"{tmp_path}/a.json", "--csv", f"{tmp_path}/a.csv"]) == 0
    assert "60 examples" in capsys.readouterr().out
    report = json.loads((tmp_path / "a.json").read_text())
    net, (x, y) = autodual.certify(load_model()), (part[:60] for part in load_test_set())
    for totals in report["totals"]:
        region = autodual.LInf(totals["eps"], domain=(0.0, 1.0))
        alone = {name: net.verify(x, y, region, name).certified for name in ("interval", "dual", "optimized")}
        union = alone["interval"] | alone["dual"] | alone["optimized"]
        assert totals["certified"] == union.sum()
        assert totals["certified_by_interval"] == alone["interval"].sum()
        assert totals["certified_by_dual"] == (alone["dual"] & ~alone["interval"]).sum()
        assert totals["clean"] == (net(x).argmax(1) == y).sum()
        assert totals["certified"] <= totals["attacked"] <= totals["clean"]
        assert totals["contradictions"] == 0
        verdicts = [row["verdict"] for row in report["examples"] if row["eps"] == totals["eps"]]
        assert [verdict == "certified" for verdict in verdicts] == union.tolist()
        assert verdicts.count("falsified") == 60 - totals["attacked"]
    with (tmp_path / "a.csv").open(newline="") as file:
        assert [int(row["index"]) for row in csv.DictReader(file)] == 2 * list(range(60))


def test_a_broken_certificate_is_reported(monkeypatch, capsys):
    def lying(*arguments, **options):
        found = judge(*arguments, **options)
        changed = {**vars(found), "by": torch.zeros_like(found.by)}  # everything certified, also what the attack breaks
        return Judgement(**changed)

    monkeypatch.setattr("autodual.cli.evaluate.judge", lying)
    words = ["--limit", "20", "--eps", "0.3", "--methods", "interval", "--attack", "5"]
    assert main(["evaluate", *DIGITS, *words]) == 3


@pytest.mark.slow
def test_two_processes_split_the_data(tmp_path):
    words = ["evaluate", *DIGITS, "--limit", "31", "--eps", "0.1", "--methods", "dual", "--attack", "5", "--csv"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "autodual"]
    subprocess.run([*launcher, *words, f"{tmp_path}/two.csv"], check=True, env=environment)
    assert main([*words, f"{tmp_path}/one.csv"]) == 0
    one, two = (list(csv.DictReader((tmp_path / f"{name}.csv").open())) for name in ("one", "two"))
    margins = [[float(row.pop("margin")) for row in rows] for rows in (one, two)]
    assert two == one
    assert margins[1] == pytest.approx(margins[0], rel=1e-4, abs=1e-5)
