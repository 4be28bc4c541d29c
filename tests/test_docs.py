"""The documentation is true: its code runs, its links lead somewhere, its generated page is up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from autodual.support import support_table, to_markdown
from dual_layers import registered_rules, registry
from dual_layers.testing import check_rule

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S)


def test_the_operator_of_the_guide_passes_the_checker_and_certifies(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    rule, use, *sketches = blocks(ROOT / "docs" / "adding_an_operator.md")
    assert len([line for line in rule.splitlines() if line.strip()]) < 40
    names: dict = {"__name__": "guide"}
    exec(compile(rule, "adding_an_operator.md", "exec"), names)
    exec(compile(use, "adding_an_operator.md", "exec"), names)
    bounds, model = names["bounds"], names["model"]
    values = model(0.1 * (2 * torch.rand(1000, 4) - 1))
    assert (bounds.lower <= values).all()
    assert (values <= bounds.upper).all()
    for sketch in sketches:
        exec(compile(sketch, "adding_an_operator.md", "exec"), names)
    for name in ("DualDifference", "DualSquare"):
        check_rule(names[name])


def test_the_table_of_operators_is_up_to_date():
    page = (ROOT / "docs" / "operators.md").read_text()
    assert page == to_markdown(support_table(builtin=True)), "run `make docs`"


@pytest.mark.parametrize("rule", registered_rules(), ids=lambda rule: rule.__name__)
def test_every_rule_has_a_row(rule):
    assert any(row.rule == rule.__name__ for row in support_table())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), flags=re.M)
    assert set(named) <= targets


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or page.name in index, page.name
