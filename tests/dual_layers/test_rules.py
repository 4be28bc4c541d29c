"""Every registered rule, on every sample it brings: a new rule is tested before its author writes a test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dual_layers import Call, DualLayer, RuleSample, keys_of, registered_rules, spelling
from dual_layers.families import Relaxed
from dual_layers.logsumexp import DualLogSumExp
from dual_layers.testing import check_rule

pytestmark = pytest.mark.filterwarnings("ignore")

LINED = (Relaxed, DualLogSumExp)


def good_samples(rule: type[DualLayer]) -> list[RuleSample]:
    return [sample for sample in rule.samples() if sample.error is None]


def other_spellings(rule: type[DualLayer]) -> Iterator[RuleSample]:
    """Move a sample to each function or method that no sample calls, where that gives the very same values."""
    samples = [sample for sample in good_samples(rule) if not isinstance(sample.call.operator, nn.Module)]
    called = [sample.call.operator for sample in samples]
    for key in keys_of(rule):
        if key in called or isinstance(key, type):
            continue
        for sample in samples:
            moved = replace(sample, call=replace(sample.call, operator=key), label=f"{sample.label} as {spelling(key)}")
            if same_values(sample.call, moved.call, sample.shapes):
                yield moved
                break


def same_values(known: Call, other: Call, shapes: tuple[tuple[int, ...], ...]) -> bool:
    inputs = [torch.linspace(-2, 3, torch.Size(shape).numel()).reshape(shape) for shape in shapes]
    expected = known(*(z.clone() for z in inputs))
    try:
        found = other(*(z.clone() for z in inputs))
    except Exception:  # another signature; only its own sample can call it
        return False
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.equal(found, expected)


def cases(samples_of) -> list:
    return [
        pytest.param(rule, sample, id=f"{rule.__name__}-{sample.label}")
        for rule in registered_rules()
        for sample in samples_of(rule)
    ]


def precise_cases() -> Iterator:
    """Every sample in float64, in float32 the first of every third rule; others and what an earlier one computes, are slow.

    Calls that compute the same differ in spelling only, which tests/test_coverage.py is for. Of relaxed operators, whose lines
    take long to check, every third sample is quick.
    """
    for dtype in (torch.float64, torch.float32):
        for index, rule in enumerate(registered_rules()):
            seen: list[RuleSample] = []
            for number, sample in enumerate(rule.samples()):
                again = sample.error is None and any(computes_the_same(sample, other) for other in seen)
                seen += [sample] if sample.error is None else []
                if dtype == torch.float64:
                    quick = not again and (number % 3 == 0 or sample.error is not None or not issubclass(rule, LINED))
                else:
                    quick = number == 0 and index % 3 == 0 and issubclass(rule, Relaxed)
                marks = () if quick else pytest.mark.slow
                yield pytest.param(rule, sample, dtype, id=f"{rule.__name__}-{sample.label}-{str(dtype)[6:]}", marks=marks)


def computes_the_same(sample: RuleSample, other: RuleSample) -> bool:
    if (sample.shapes, sample.batch_axis, sample.low, sample.high) != (other.shapes, other.batch_axis, other.low, other.high):
        return False
    try:
        return same_values(other.call, sample.call, sample.shapes)
    except Exception:  # an operator that rejects these very values
        return False


@pytest.mark.parametrize(("rule", "sample", "dtype"), precise_cases())
def test_rule_keeps_its_promises(rule: type[DualLayer], sample: RuleSample, dtype: torch.dtype, device: str) -> None:
    check_rule(rule, dtype=dtype, device=device, samples=[sample])


@pytest.mark.slow  # tests/test_coverage.py bounds a model for every spelling
@pytest.mark.parametrize(("rule", "sample"), cases(other_spellings))
def test_rule_keeps_its_promises_under_other_spellings(rule: type[DualLayer], sample: RuleSample) -> None:
    check_rule(rule, samples=[sample])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("rule", registered_rules(), ids=lambda rule: rule.__name__)
def test_rule_keeps_its_promises_on_other_seeds(rule: type[DualLayer], seed: int) -> None:
    check_rule(rule, seed=seed, points=24)
