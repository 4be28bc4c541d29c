"""Every test that takes ``dtype`` and ``device`` runs for each precision on each device of this machine."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch

from tests.reference import shape_checks

shape_checks.install("autodual.bounds", "autodual.specification", "autodual.report")


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test's cases that are much alike, leave one in k in the quick suite: ``@pytest.mark.thinned(k)``.

    They are drawn, the same each time: every k-th would always meet the same value of a parameter that has k.
    """
    alike: dict[tuple[str, int], list[pytest.Item]] = {}
    for item in items:
        for mark in item.iter_markers("thinned"):
            alike.setdefault((item.nodeid.partition("[")[0], mark.args[0]), []).append(item)
    for (name, k), cases in alike.items():
        for item in Random(name).sample(cases, len(cases) - math.ceil(len(cases) / k)):
            item.add_marker(pytest.mark.slow)


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
