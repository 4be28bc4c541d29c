"""The README's code runs as printed and says what it claims."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

import autodual
from autodual import digits
from autodual.cli.main import build_parser
from autodual.testing import assert_output


class Pair(nn.Module):
    """A model of two inputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 3), nn.Linear(4, 3)

    def forward(self, image, state):
        return torch.relu(self.left(image)) * self.right(state)


README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_python_of_the_readme_runs(monkeypatch, capsys):
    x, y = digits.load_test_set()
    monkeypatch.setattr(digits, "load_test_set", lambda: (x[:40], y[:40]))  # the whole set takes seconds
    first, second = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)
    assert len([line for line in first.splitlines() if line]) <= 12
    names: dict = {}
    exec(compile(first, "README.md", "exec"), names)
    assert names["report"].certified.double().mean() > 0.5
    assert "certified" in capsys.readouterr().out
    assert (names["radii"] > 0).any()
    assert names["loss"].requires_grad
    exec(compile(second, "README.md", "exec"), names)
    names |= {"x": x[:3], "y": y[:3], "spec": torch.eye(10), "pair": autodual.certify(Pair()), "assert_output": assert_output}
    names |= {"image": torch.rand(3, 2), "state": torch.rand(3, 4), "region": autodual.LInf(0.01)}
    calls = re.findall(r"`((?:net|pair)\.\w+\(.+?\)|assert_output\(.+?\))`(?: \| | does)", README)
    assert len(calls) == 6
    for call in calls:
        result = eval(call, names)
        assert len(getattr(result, "lower", result)) == 3, call


def test_the_commands_of_the_readme_parse():
    commands = re.findall(r"^autodual (.*)$", README, flags=re.M)
    assert commands
    for command in commands:
        build_parser().parse_args(command.split())


def test_the_public_names_of_the_readme_exist():
    for name in set(re.findall(r"autodual\.([A-Z]\w+|certify)", README)):
        assert hasattr(autodual, name), name
