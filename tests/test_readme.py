"""The README's code runs as printed and says what it claims."""

from __future__ import annotations

import re
from pathlib import Path

import autodual
from autodual import digits
from autodual.cli.main import build_parser

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


def test_the_commands_of_the_readme_parse():
    commands = re.findall(r"^autodual (.*)$", README, flags=re.M)
    assert commands
    for command in commands:
        build_parser().parse_args(command.split())


def test_the_public_names_of_the_readme_exist():
    for name in set(re.findall(r"autodual\.([A-Z]\w+|certify)", README)):
        assert hasattr(autodual, name), name
