"""A run that is killed and resumed ends with the weights of one that is not, bit for bit."""

from __future__ import annotations

import csv
import os
import random
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autodual.errors import TrainingError
from autodual.training import Config, Result, train
from autodual.training.folder import Folder, write_whole

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("tiny.py")
TINY = runpy.run_path(str(SCRIPT))


def run(out: Path | None = None, *, resume: bool = False, watch=lambda _: None, **changes) -> tuple[Result, dict[str, Tensor]]:
    network = TINY["model"]()
    result = train(network, TINY["images"](), TINY["config"](**changes), out=out, resume=resume, watch=watch)
    return result, network.state_dict()


def start(*words: str, environment: dict[str, str] | None = None) -> subprocess.Popen:
    whole = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen([sys.executable, str(SCRIPT), *words], stdout=subprocess.PIPE, text=True, env=whole)


def log(folder: Path) -> list[dict[str, str]]:
    """The log without its times, which no two runs share."""
    with (folder / "log.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture(autouse=True, scope="module")
def no_pictures():
    """They take longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("autodual.training.trainer.draw_if_possible", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory, no_pictures):
    """A run that nothing interrupts: its folder and its seconds."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(folder)[0].seconds


def killed_and_resumed(folder: Path, wait: float) -> int:
    """Train in another process, kill it some seconds after its first checkpoint, go on here; return how that process ended."""
    process = start(str(folder))
    while not (folder / "last.pt").exists():
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.01)
    time.sleep(wait)
    process.kill()
    code = process.wait()
    run(folder, resume=True)
    return code


def check_equal(folder: Path, reference: Path) -> None:
    assert same(read(folder / "last.pt")["model"], read(reference / "last.pt")["model"])
    assert same(read(folder / "best.pt"), read(reference / "best.pt"))
    assert log(folder) == log(reference)


def test_killed_at_a_random_moment(whole, tmp_path):
    reference, seconds = whole
    code = killed_and_resumed(tmp_path / "run", random.Random().uniform(0.0, 0.6) * seconds)
    assert code == -9, "it was to be killed on the way"
    check_equal(tmp_path / "run", reference)


@pytest.mark.slow
def test_killed_ten_times(whole, tmp_path):
    reference, seconds = whole
    draw, codes = random.Random(0), []
    for number in range(10):
        folder = tmp_path / str(number)
        codes.append(killed_and_resumed(folder, draw.uniform(0.0, 0.8) * seconds))
        check_equal(folder, reference)
    assert codes.count(-9) >= 5


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def test_stopped_inside_an_epoch_and_between_checkpoints(whole, tmp_path):
    """The steps and lines since the last checkpoint are taken again, also after several interruptions."""

    def stop(at):
        def watch(progress):
            if progress.step == at:
                raise Interrupted

        return watch

    for number, at in enumerate((2, 7, 10)):
        with pytest.raises(Interrupted):
            run(tmp_path / "run", resume=number > 0, watch=stop(at), checkpoint=3)
    run(tmp_path / "run", resume=True, checkpoint=3)
    reference = run(tmp_path / "other", checkpoint=3)[0]
    check_equal(tmp_path / "run", tmp_path / "other")
    assert reference.rows[-1]["step"] == 12
    assert same(read(tmp_path / "run" / "last.pt")["model"], read(whole[0] / "last.pt")["model"])


def test_lines_behind_the_checkpoint_are_taken_back(whole, tmp_path):
    def watch(progress):
        if progress.step == 9:
            raise Interrupted

    with pytest.raises(Interrupted):
        run(tmp_path / "run", watch=watch)
    with (tmp_path / "run" / "log.csv").open("a") as file:
        file.write("3.0,12,1.0,half a li")  # as a crash after the checkpoint leaves it
    run(tmp_path / "run", resume=True)
    check_equal(tmp_path / "run", whole[0])


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(Interrupted))
    with pytest.raises(Interrupted):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_finished_run_stays_as_it_is(whole):
    reference = read(whole[0] / "last.pt")
    result, weights = run(whole[0], resume=True)
    assert result.stopped == "epochs"
    assert [row["epoch"] for row in result.rows] == [1, 2, 3]
    assert same(weights, read(whole[0] / "best.pt"))
    assert same(reference["model"], read(whole[0] / "last.pt")["model"])


def test_other_settings_are_refused_by_name(whole):
    with pytest.raises(TrainingError, match=r"schedules\.lr was 0\.01, is 0\.02; batch was 12, is 10"):
        run(whole[0], resume=True, batch=10, schedules__lr=0.02)
    network = TINY["model"]()
    with pytest.raises(TrainingError, match="begun with 60 training examples, now there are 48"):
        train(network, TINY["images"](48), TINY["config"](), out=whole[0], resume=True)


def test_a_folder_with_a_run_is_not_overwritten(whole):
    with pytest.raises(TrainingError, match="holds a run"):
        run(whole[0])


def test_unreadable_and_foreign_checkpoints_are_refused(whole, tmp_path):
    folder = Folder(tmp_path, ("epoch",))
    folder.last.write_bytes((whole[0] / "last.pt").read_bytes()[:1000])
    with pytest.raises(TrainingError, match="cannot read"):
        folder.load()
    torch.save({"version": 0}, folder.last)
    with pytest.raises(TrainingError, match="format 0"):
        folder.load()


def test_a_log_that_lost_lines_is_refused(tmp_path):
    folder = Folder(tmp_path, ("epoch",))
    folder.begin(Config())
    with pytest.raises(TrainingError, match="restore it"):
        folder.cut(1000)


def test_more_minutes_go_on(whole, tmp_path):
    result, _ = run(tmp_path / "run", minutes=0)
    assert (result.stopped, result.rows[-1]["step"]) == ("minutes", 1)
    result, _ = run(tmp_path / "run", resume=True, minutes=60)
    assert result.stopped == "epochs"
    assert same(read(tmp_path / "run" / "last.pt")["model"], read(whole[0] / "last.pt")["model"])
