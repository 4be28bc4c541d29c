"""Hygiene of the registry: what would otherwise be forgotten in silence when an operator is added."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import dual_layers
from dual_layers import (
    DualLayer,
    cases,
    choose,
    is_shape_query,
    keys_of,
    lookup,
    register,
    registered_rules,
    registry,
    spelling,
)  # fmt: skip

RULES = pytest.mark.parametrize("rule", registered_rules(), ids=lambda rule: rule.__name__)


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations made by a test are forgotten after it."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


def test_every_file_that_registers_a_rule_is_imported() -> None:
    for file in Path(dual_layers.__file__).parent.glob("*.py"):
        decorated = [
            node.name
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.ClassDef) and any("register" in ast.unparse(item) for item in node.decorator_list)
        ]
        module = sys.modules.get(f"dual_layers.{file.stem}")
        assert module is not None or not decorated, file.name
        for name in decorated:
            assert getattr(module, name) in registered_rules(), name


def test_every_concrete_rule_is_registered() -> None:
    for found in pkgutil.iter_modules(dual_layers.__path__):
        module = importlib.import_module(f"dual_layers.{found.name}")
        for _, value in inspect.getmembers(module, inspect.isclass):
            if issubclass(value, DualLayer) and value.__module__ == module.__name__ and "samples" in vars(value):
                assert inspect.isabstract(value) or value in registered_rules(), value.__name__


@RULES
def test_a_rule_is_final(rule: type[DualLayer]) -> None:
    heirs = [
        other.__name__
        for other in rule.__subclasses__()
        if other.__module__.startswith("dual_layers.") and other in registered_rules()
    ]
    assert not heirs
    assert not inspect.isabstract(rule)


@RULES
def test_a_rule_documents_itself(rule: type[DualLayer]) -> None:
    assert rule.__doc__, "a docstring with one line on what it covers"
    assert "Source:" in rule.__doc__, "where the formula comes from"
    assert rule.source
    assert keys_of(rule), "registered under at least one operator"


@RULES
def test_a_rule_brings_samples(rule: type[DualLayer]) -> None:
    samples = list(rule.samples())
    labels = [sample.label for sample in samples]
    assert len(set(labels)) == len(labels), "labels tell samples apart"
    assert any(sample.error is None for sample in samples), "good samples"
    assert rule.parameters is DualLayer.parameters or any(sample.error is not None for sample in samples), (
        "a bad sample: arguments can be wrong"
    )


@RULES
def test_samples_are_drawn_anew_and_alike(rule: type[DualLayer]) -> None:
    state = torch.get_rng_state()
    first, second = list(rule.samples()), list(rule.samples())
    assert [(sample.label, sample.shapes) for sample in first] == [(sample.label, sample.shapes) for sample in second]
    assert torch.equal(state, torch.get_rng_state()), "samples must not move the global random numbers"


@RULES
def test_samples_are_calls_of_the_operators_registered(rule: type[DualLayer]) -> None:
    for sample in rule.samples():
        assert rule in cases(sample.call.operator), f"{sample.label}: {spelling(sample.call.operator)}"
        if sample.error is None:
            assert choose(sample.call)[0] is rule, f"{sample.label}: another case of the operator comes first"


def test_every_key_has_a_spelling() -> None:
    for key in {key for rule in registered_rules() for key in keys_of(rule)}:
        assert spelling(key)
        assert not is_shape_query(key), f"{spelling(key)} cannot be both a rule and a shape query"
        assert isinstance(key, str) or callable(key), "registered under the object, never under a class' name"


def test_a_second_registration_raises_and_names_both(scratch: None) -> None:
    first = lookup(nn.ReLU())
    with pytest.raises(ValueError, match=rf"nn\.ReLU is already covered by {first.__name__}; pass override=True"):
        register(nn.ReLU)(lookup(nn.Linear(1, 1)))
    assert lookup(nn.ReLU()) is first


def test_an_explicit_override_replaces(scratch: None) -> None:
    other = lookup(nn.Linear(1, 1))
    assert register(nn.ReLU, override=True)(other) is other
    assert lookup(nn.ReLU()) is other
    assert lookup(F.relu) is not other


def test_registering_the_same_rule_again_changes_nothing(scratch: None) -> None:
    rule = lookup(nn.ReLU())
    register(nn.ReLU)(rule)
    assert registered_rules().count(rule) == 1


def test_lookup_follows_the_class_hierarchy() -> None:
    rule = lookup(nn.Linear(2, 2))

    class Renamed(nn.Linear):
        """Still the same function."""

    assert lookup(Renamed(2, 2)) is rule
    assert lookup(parametrizations.weight_norm(nn.Linear(2, 2))) is rule
    assert lookup(parametrizations.spectral_norm(nn.Linear(2, 2))) is rule


def test_a_subclass_with_its_own_forward_is_another_operator() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    class Below(Doubled):
        """Inherits the other forward."""

    assert lookup(Doubled(2, 2)) is None
    assert lookup(Below(2, 2)) is None


def test_unknown_operators_have_no_rule() -> None:
    assert lookup(torch.special.airy_ai) is None
    assert lookup("no_such_method") is None
    assert lookup([]) is None
    assert lookup(nn.Module()) is None


def test_all_spellings_of_relu_share_a_rule() -> None:
    assert {lookup(key) for key in (nn.ReLU(), F.relu, torch.relu, "relu", torch.ops.aten.relu.default)} == {lookup(F.relu)}


@pytest.mark.usefixtures("scratch")
def test_a_name_that_is_no_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method or attribute of torch\.Tensor, and it has no 'nn\.ReLU'"):
        register("relu", "nn.ReLU", override=True)


def test_functions_made_of_two_others_have_their_public_name() -> None:
    assert spelling(F.max_pool1d) == "F.max_pool1d"
    assert spelling(F.adaptive_max_pool2d) == "F.adaptive_max_pool2d"
    assert spelling(F.relu) == "F.relu"
