"""The command line: what it prints and writes, its exit codes, and one line for everything that can be wrong."""

from __future__ import annotations

import csv
import importlib
import json
import re
import runpy

import numpy as np
import pytest
import torch
from torch import nn

import autodual
from autodual.cli import common, evaluation, main
from autodual.digits import load_model, load_test_set
from autodual.methods import METHODS

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def broken():
    raise ValueError("no such layer")

def number():
    return 3

module = build()
VALUE = 7
"""


@pytest.fixture
def files(tmp_path):
    """A model file and data whose labels are what the model says."""
    (tmp_path / "model.py").write_text(MODEL)
    names: dict = {}
    exec(MODEL, names)
    x = np.random.default_rng(0).random((12, 4), dtype=np.float32)
    y = names["build"]()(torch.from_numpy(x)).argmax(1).numpy()
    np.savez(tmp_path / "data.npz", x=x, y=y)
    torch.save(names["build"]().state_dict(), tmp_path / "weights.pt")
    return tmp_path


def certify(files, *words: str, model: str = "model.py:build", data: str = "data.npz") -> int:
    place = ["--model", str(files / model) if ".py" in model else model, "--data", str(files / data)]
    return main(["certify", *place, *([] if "--eps" in words else ["--eps", "0.01"]), *words])


def test_certify_writes_what_verify_says(files, capsys):
    code = certify(
        files,
        "--eps",
        "0.01",
        "2/100",
        "--domain",
        "0",
        "1",
        "--attack",
        "5",
        "--json",
        f"{files}/a.json",
        "--csv",
        f"{files}/a.csv",
    )
    assert code == 0
    printed = capsys.readouterr().out
    assert "0.02" in printed
    assert "REAL" in printed
    assert "12 examples" in printed
    report = json.loads((files / "a.json").read_text())
    names: dict = {}
    exec(MODEL, names)
    net, data = autodual.certify(names["build"]()), np.load(files / "data.npz")
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"])
    for eps, totals in zip((0.01, 0.02), report["totals"], strict=True):
        expected = net.verify(x, y, autodual.LInf(eps, domain=(0.0, 1.0)))
        assert totals["certified"] == pytest.approx(expected.certified.double().mean().item())
        assert totals["clean"] == 1.0
        assert totals["contradictions"] == 0
        verdicts = [row["verdict"] for row in report["examples"] if row["eps"] == eps]
        assert [verdict == "certified" for verdict in verdicts] == expected.certified.tolist()
    rows = list(csv.DictReader((files / "a.csv").open()))
    assert [row["verdict"] for row in rows] == [row["verdict"] for row in report["examples"]]
    assert report["settings"]["norm"] == "linf"


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("method", METHODS)
def test_every_norm_and_method(files, norm, method):
    options = ["--estimator", "tightest"] if method == "projected" else []
    refused = method == "lp" and norm == "l2"  # a round region has no linear program
    status = certify(files, "--norm", norm, "--method", method, *options, "--limit", "3", "--batch", "2", "--dtype", "float64")
    assert status == (2 if refused else 0)


def test_options_of_linear_programs(files):
    assert certify(files, "--method", "lp", "--intermediate", "dual", "--time-limit", "30", "--limit", "1") == 0
    assert certify(files, "--method", "dual", "--time-limit", "30", "--limit", "1") == 2
    assert certify(files, "--method", "lp", "--intermediate", "projected", "--limit", "1") == 2


def test_what_was_drawn_is_written_down(files):
    """One delta covers every line of the table, and the seed allows to repeat it."""
    options = ("--method", "projected", "--estimator", "tightest", "--delta", "0.001", "--eps", "0.1", "0.2")
    assert certify(files, *options, "--batch", "2", "--json", f"{files}/a.json") == 0
    content = json.loads((files / "a.json").read_text())
    drawn = content["totals"][0]["sampling"]
    assert (drawn["r"], drawn["delta"], drawn["examples"]) == (50, 0.001, len(content["examples"]))
    assert certify(files, *options, "--batch", "3", "--seed", str(drawn["seed"]), "--json", f"{files}/b.json") == 0
    again = json.loads((files / "b.json").read_text())
    assert [e["margin"] for e in again["examples"]] == pytest.approx(
        [e["margin"] for e in content["examples"]], rel=1e-4, abs=1e-5
    )


@pytest.mark.parametrize("options", [[], ["--method", "projected", "--estimator", "order"]])
def test_a_margin_is_explained(files, capsys, options):
    assert certify(files, *options, "--eps", "0.01", "0.02", "--explain", "3", "--json", f"{files}/a.json") == 0
    found = re.findall(r"of example 3\n.*?^lower bound +(\S+)", capsys.readouterr().out, flags=re.M | re.S)
    examples = json.loads((files / "a.json").read_text())["examples"]
    expected = [example["margin"] for example in examples if example["index"] == 3]
    assert [float(number) for number in found] == pytest.approx(expected, abs=1e-4)


def test_method_options_reach_the_method(files):
    assert certify(files, "--strict", "--walk", "forward", "--json", f"{files}/a.json") == 0
    assert json.loads((files / "a.json").read_text())["settings"]["walk"] == "forward"


def test_weights_as_pt_and_npz(files):
    state = torch.load(files / "weights.pt", weights_only=True)
    np.savez(files / "weights.npz", **{key: value.numpy() for key, value in state.items()})
    torch.save({"state_dict": state, "epoch": 3}, files / "checkpoint.pt")
    for name in ("weights.pt", "weights.npz", "checkpoint.pt"):
        assert certify(files, "--weights", str(files / name)) == 0


def test_a_module_in_the_file_will_do(files):
    assert certify(files, model="model.py:module") == 0


def test_bytes_are_scaled_and_reshaped(files):
    np.savez(files / "bytes.npz", images=np.full((5, 2, 2), 255, np.uint8), labels=np.zeros(5, np.uint8))
    assert certify(files, "--scale", "255", "--shape", "4", "--keys", "images", "labels", data="bytes.npz") == 0


def test_require_sets_the_exit_code(files):
    assert certify(files, "--eps", "0", "--require", "0.9") == 0
    assert certify(files, "--eps", "5", "--require", "0.9") == 1


def test_a_certified_example_that_breaks_is_an_alarm(files, monkeypatch):
    monkeypatch.setattr("autodual.cli.certify.survives", lambda net, x, y, **_: torch.zeros(len(x), dtype=torch.bool))
    assert certify(files, "--eps", "0", "--attack", "1") == 3


def broken_files(files) -> None:
    (files / "syntax.py").write_text("def build(:")
    (files / "noise.pt").write_bytes(b"noise")
    (files / "noise.npz").write_bytes(b"noise")
    torch.save([1, 2], files / "list.pt")
    torch.save(nn.Linear(4, 3), files / "model.pt")
    torch.save({"epoch": 3, "model": {"0.weight": torch.zeros(8, 4)}}, files / "nested.pt")
    np.save(files / "single.npy", np.zeros((3, 4), np.float32))
    torch.save({"0.weight": torch.zeros(8, 4)}, files / "partial.pt")
    np.savez(files / "short.npz", x=np.zeros((3, 4), np.float32), y=np.zeros(2, np.int64))
    np.savez(files / "flat.npz", x=np.zeros(3, np.float32), y=np.zeros(3, np.int64))
    np.savez(files / "float_labels.npz", x=np.zeros((3, 4), np.float32), y=np.zeros(3))
    np.savez(files / "wide.npz", x=np.zeros((3, 5), np.float32), y=np.zeros(3, np.int64))
    np.savez(files / "bytes.npz", x=np.zeros((3, 4), np.uint8), y=np.zeros(3, np.int64))
    np.savez(files / "labels.npz", x=np.zeros((3, 4), np.float32), y=np.full(3, 9))
    np.savez(files / "nan.npz", x=np.full((3, 4), np.nan, np.float32), y=np.zeros(3, np.int64))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"model": "missing.py:build"}, "no such file"),
        ({"model": "model.py:missing"}, "has no 'missing'; it has build"),
        ({"model": "model.py:broken"}, "raised ValueError: no such layer"),
        ({"model": "model.py:number"}, "expected an nn.Module, got int"),
        ({"model": "model.py:VALUE"}, "expected a function or an nn.Module, got int"),
        ({"model": "syntax.py:build"}, "SyntaxError"),
        ({"model": "model.py"}, "write FILE.py:NAME"),
        ({"model": "no.such.module:build"}, "ModuleNotFoundError"),
        ({"weights": "missing.pt"}, "no such file"),
        ({"weights": "noise.pt"}, "cannot read"),
        ({"weights": "list.pt"}, "holds no state_dict"),
        ({"weights": "list.pt"}, "but a list; save model.state_dict()"),
        (
            {"weights": "model.pt"},
            "it holds Python objects, perhaps a whole model, which are not loaded; save model.state_dict()",
        ),
        ({"weights": "nested.pt"}, "it holds the keys epoch, model; save model.state_dict()"),
        ({"weights": "partial.pt"}, "does not fit"),
        ({"data": "single.npy"}, "holds one array; put inputs and labels together: np.savez"),
        ({"data": "missing.npz"}, "no such file"),
        ({"data": "noise.npz"}, "cannot read"),
        ({"data": "short.npz"}, "3 inputs but 2 labels"),
        ({"data": "flat.npz"}, "must be numbers of shape (N, ...)"),
        ({"data": "float_labels.npz"}, "labels must be integers"),
        ({"data": "wide.npz"}, "does not accept inputs of shape"),
        ({"data": "bytes.npz"}, "--scale 255"),
        ({"data": "labels.npz"}, "out of range"),
        ({"data": "nan.npz"}, "NaN"),
        ({"keys": ["a", "b"]}, "has no 'a'; it has x, y"),
        ({"shape": ["3"]}, "--shape 3: the stored inputs have shape (4,)"),
        ({"scale": ["0"]}, "--scale must be a positive number"),
        ({"method": ["interval"], "walk": ["forward"]}, "--walk is not an option of --method interval"),
        ({"method": ["projected"]}, "proves nothing: the median of random projections is an estimate"),
        ({"method": ["projected"], "r": ["1"]}, "must be an integer of at least 3"),
        ({"domain": ["1", "0"]}, "domain"),
        ({"json": ["no/such/folder/a.json"]}, "--json: cannot write no/such/folder/a.json: there is no folder no/such/folder"),
        ({"explain": ["12"]}, "--explain 12: there are 12 examples, numbered from 0"),
        ({"csv": ["."]}, "--csv: cannot write .: it is a folder"),
        ({"json": ["-"], "csv": ["-"]}, "cannot both go to stdout"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_takes_one_line(files, capsys, words, message):
    broken_files(files)
    flags = {"model": "model.py:build", "data": "data.npz"} | words
    place = {key: str(files / flags.pop(key)) for key in ("data", "weights") if key in flags}
    model = flags.pop("model")
    place["model"] = str(files / model) if ".py" in model else model
    line = [word for key, value in {**{k: [v] for k, v in place.items()}, **flags}.items() for word in (f"--{key}", *value)]
    assert main(["certify", "--eps", "0.01", *line]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("autodual certify: error: ")
    assert "Traceback" not in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--eps", "-1"],
        ["--eps", "nan"],
        ["--eps", "1/0"],
        ["--batch", "0"],
        ["--device", "nowhere"],
        ["--norm", "l3"],
        ["--require", "90"],
        ["--require", "nan"],
        ["--require", "most"],
    ],
)
def test_what_argparse_refuses(files, capsys, words):
    with pytest.raises(SystemExit) as stop:
        certify(files, *words)
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["certify"], ["demo"], ["explain"], ["operators"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    if command == ["certify"]:
        assert all(part in text for part in ("units of --eps", "examples:", "exit code", "8/255", *METHODS))


def test_explain_has_no_batch(capsys):
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    assert "--batch" not in capsys.readouterr().out


def test_results_that_cannot_be_written_are_seen_before_the_work(files, monkeypatch):
    monkeypatch.setattr("autodual.cli.certify.certify", lambda *_, **__: pytest.fail("worked for nothing"))
    (files / "locked.csv").touch()
    monkeypatch.setattr("os.access", lambda path, _: "locked" not in str(path))
    assert certify(files, "--json", str(files / "new" / "a.json")) == 2
    assert certify(files, "--csv", str(files / "locked.csv")) == 2


def test_a_dash_is_stdout(files, capsys):
    assert certify(files, "--json", "-") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["totals"][0]["eps"] == 0.01
    assert "12 examples" in printed.err
    assert certify(files, "--csv", "-") == 0
    assert len(list(csv.DictReader(capsys.readouterr().out.splitlines()))) == 12


@pytest.mark.parametrize("module", ["autodual", "autodual.cli"])
def test_python_runs_the_package(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["autodual", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__")
    assert stop.value.code == 0
    assert "autodual" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert torch.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "extra", "command"), [("rich", "cli", ["operators"]), ("matplotlib", "plot", ["demo", "--output", "a.png"])]
)
def test_a_missing_extra_is_named(monkeypatch, capsys, module, extra, command):
    def without(name):
        if name.split(".")[0] == module:
            raise ImportError(name)
        return importlib.__import__(name, fromlist=["_"])

    monkeypatch.setattr(common.importlib, "import_module", without)
    assert main(command) == 2
    assert f"pip install 'autodual[{extra}]'" in capsys.readouterr().err


def test_operators(capsys):
    assert main(["operators", "relu"]) == 0
    assert "DualReLU" in capsys.readouterr().out
    assert main(["operators", "--markdown", "hardtanh"]) == 0
    assert "| `DualHardtanh`:" in capsys.readouterr().out


def test_explain(files, capsys):
    assert main(["explain", "--model", f"{files}/model.py:build", "--shape", "4", "--draw", f"{files}/graph.png"]) == 0
    assert "DualReLU" in capsys.readouterr().out
    assert (files / "graph.png").stat().st_size > 1000


def test_demo(tmp_path, capsys):
    assert main(["demo", "--limit", "6"]) == 0
    printed = capsys.readouterr().out
    assert "Contradictions (certified, yet broken by the attack): 0" in printed
    assert "6 test images" in printed


@pytest.mark.slow
def test_demo_picture(tmp_path):
    assert main(["demo", "--limit", "12", "--output", str(tmp_path / "new" / "demo.png")]) == 0
    assert (tmp_path / "new" / "demo.png").stat().st_size > 10_000


def test_the_bundled_classifier_is_good():
    """What the README says about it, on fifty images."""
    net = autodual.certify(load_model())
    x, y = (part[:50] for part in load_test_set())
    result = evaluation.certify(net, x, y, region=autodual.LInf(0.05, domain=(0.0, 1.0)), method="dual", batch=20)
    assert result.certified.double().mean() > 0.75
    assert (result.predicted == y).double().mean() > 0.9
