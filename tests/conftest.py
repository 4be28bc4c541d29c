"""Every test that takes ``dtype`` and ``device`` runs for each precision on each device of this machine."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from jaxtyping import install_import_hook

# Shapes in annotations are checked while the tests run, before the modules that carry them are imported.
_CHECKED = ["autodual.bounds", "autodual.specification", "autodual.report"]
install_import_hook(_CHECKED, "beartype.beartype")


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test's cases that are much alike, leave every k-th in the quick suite: ``@pytest.mark.thinned(k)``."""
    seen: Counter[str] = Counter()
    for item in items:
        for mark in item.iter_markers("thinned"):
            name = item.nodeid.partition("[")[0]
            if seen[name] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1


DEVICES = ["cpu"] + [
    name for name in ("cuda", "mps") if getattr(torch.backends, name, None) and getattr(torch, name).is_available()
]


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.gpu] if name == "cuda" else []) for name in DEVICES])
def device(request: pytest.FixtureRequest, dtype: torch.dtype) -> str:
    if request.param == "mps" and dtype == torch.float64:
        pytest.skip("mps has no float64")
    return request.param
