"""Several processes do what one does, and a run that loses some of them can be resumed."""

from __future__ import annotations

import csv
import os
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from autodual.training import processes
from autodual.training.batches import Batches
from autodual.training.config import Data

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("tiny.py")
TINY = runpy.run_path(str(SCRIPT))

# No random numbers of single processes and no batch statistics, whose shares of a batch have their own.
PLAIN = ['model="plain"', 'loss.method="dual"', "batch=13", "data.held_out=11", "checkpoint=5"]


def launch(size: int, folder: Path, *words: str) -> list[subprocess.Popen]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    command = [sys.executable, str(SCRIPT), str(folder), *words]
    return [
        subprocess.Popen(command, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]


def finish(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors


def log(folder: Path) -> list[dict[str, float]]:
    with (folder / "log.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    TINY["main"](str(folder), *PLAIN)
    return folder


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_average_over_processes_is_the_gradient_of_the_batch(monkeypatch, size):
    """With parts of unlike size and varied images."""

    def gradient(rank: int, size: int) -> torch.Tensor:
        monkeypatch.setattr(processes, "rank", lambda: rank)
        monkeypatch.setattr(processes, "size", lambda: size)
        data, model = Data(shift=1, flip=True), TINY["model"](normalized=False)
        x, y, weight = Batches(TINY["images"](), torch.arange(60), 13, 0, data, torch.device("cpu")).at(5)
        (weight * F.cross_entropy(model(x), y)).backward()
        return model[0].weight.grad

    average = sum(gradient(rank, size) for rank in range(size)) / size
    torch.testing.assert_close(average, gradient(0, 1))


def check_close(folder: Path, alone: Path) -> None:
    ours, theirs = log(folder), log(alone)
    counts = ("clean", "attacked", "certified", "train_certified")
    assert [[row[name] for name in counts] for row in ours] == [[row[name] for name in counts] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    weights = [torch.load(path / "last.pt", weights_only=True)["model"] for path in (folder, alone)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_two_processes_agree_with_one(alone, tmp_path):
    """Also with an odd batch, whose halves differ in size."""
    finish(launch(2, tmp_path / "run", *PLAIN))
    check_close(tmp_path / "run", alone)


@pytest.mark.slow
def test_a_process_dies_and_another_number_goes_on(alone, tmp_path):
    folder = tmp_path / "run"
    first, second = launch(2, folder, *PLAIN)
    while not (folder / "last.pt").exists() or (folder / "log.csv").read_text().count("\n") < 2:
        assert first.poll() is None
        time.sleep(0.01)
    second.kill()
    first.communicate(timeout=120)
    assert first.returncode not in (0, None)
    TINY["main"](str(folder), *PLAIN)
    check_close(folder, alone)
