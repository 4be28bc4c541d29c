"""Imports point one way, and the core needs few packages: read from the sources, so that nothing has to be run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parents[1]
CORE = {"torch", "networkx", "numpy", "jaxtyping"}
EXTRAS = {"autodual.cli": {"rich", "matplotlib"}, "autodual.testing": {"hypothesis", "pytest"}}

# Each line may import from itself and from the lines above it.
LEVELS = (
    "dual_layers",
    "threads",
    "errors rendering estimators graph layout methods regions isolation origins operators primal specification normalize",
    "search",
    "passes proxies leaves interception symbolic export expand trace",
    "compile validate",
    "bounds",
    "account accounting account_picture report domains explain radius problem preparation loss_bounds network losses attacks",
    "analysis cascade",
    "training verify certificates",
    "digits support testing",
    "cli",
    "__main__",
)
RANK = {name: rank for rank, names in enumerate(LEVELS) for name in names.split()}


def modules() -> dict[str, Path]:
    """Every module of both packages, by name."""
    files = [path for package in ("autodual", "dual_layers") for path in (ROOT / package).rglob("*.py")]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported(tree: ast.AST) -> Iterator[str]:
    """Names of the modules that a tree imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


def at_import_time(tree: ast.Module) -> Iterator[str]:
    """Names of the modules imported when a module is, functions and TYPE_CHECKING blocks left out."""
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Try)):
            yield from imported(node)


def own(names: Iterator[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in ("autodual", "dual_layers")}


def rank(module: str) -> int | None:
    """Level of a module; None for the package ``autodual`` itself, which gathers the public names."""
    first, _, rest = module.partition(".")
    if first == "dual_layers":
        return RANK[first]
    return RANK[rest.split(".")[0]] if rest else None


def test_every_module_has_a_level():
    for name in MODULES:
        package, _, part = name.partition(".")
        assert package == "dual_layers" or not part or part.split(".")[0] in RANK, f"{name} is new: give it a level in LEVELS"


def test_imports_point_one_way():
    for name, tree in TREES.items():
        for target in own(imported(tree)) if name != "autodual" else ():
            if target == "autodual":
                assert rank(name) >= RANK["digits"], f"{name} imports the package's front door; import the module it needs"
            else:
                assert rank(target) <= rank(name), f"{name} must not import {target}"


def test_dual_layers_never_import_autodual():
    for name, tree in TREES.items():
        if name.split(".")[0] == "dual_layers":
            assert not [target for target in imported(tree) if target.split(".")[0] == "autodual"], name


def test_no_module_imports_itself_through_others():
    graph = nx.DiGraph()
    for name, tree in TREES.items():
        targets = own(at_import_time(tree)) - {name, "autodual", "dual_layers"}
        graph.add_edges_from((name, target) for target in targets)
    assert not list(nx.simple_cycles(graph))


def test_the_core_imports_only_its_dependencies():
    for name, tree in TREES.items():
        extras = next((names for prefix, names in EXTRAS.items() if name.startswith(prefix)), set())
        for package in {target.split(".")[0] for target in at_import_time(tree)}:
            allowed = package in CORE | extras | {"autodual", "dual_layers"} or package in sys.stdlib_module_names
            assert allowed, f"{name} imports {package} when it is imported; only {sorted(CORE)} may be needed"


def test_the_command_line_imports_its_extras_late():
    """Without rich and matplotlib the command line still starts, to say what is missing."""
    for name, tree in TREES.items():
        if name.startswith("autodual.cli") and name != "autodual.cli.picture":
            assert not {target.split(".")[0] for target in at_import_time(tree)} & EXTRAS["autodual.cli"], name
