"""The checker itself: every rule broken on purpose is caught, and a sound rule of anyone's own passes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dual_layers import (
    INPUT,
    Affine,
    Call,
    DualLayer,
    Facts,
    Interval,
    Offsets,
    PiecewiseLinear,
    RuleSample,
    Slopes,
    lookup,
    registered_rules,
)
from dual_layers._mutants import survey
from dual_layers.testing import RuleError, RuleRefusal, check_rule

pytestmark = pytest.mark.filterwarnings("ignore")


# Rules whose mutants are tried each time: of each module those that take little time and differ from one another. The
# others are slow, as are all of modules whose rules have many samples; benchmarks/mutants.py has them all too.
REPRESENTATIVES = {
    "DualLinear", "DualPerturbedLinear", "DualAddProduct", "DualCross", "DualAdd", "DualReversedSubtract",
    "DualProduct", "DualTimesItself", "DualSquares", "DualQuotient", "DualAddQuotient", "DualReshape", "DualRepeat",
    "DualAssign", "DualMaskedAssign", "DualChoice", "DualMaskedChoice", "DualAttention",
    "DualContraction", "DualGreater", "DualEqual", "DualNot", "DualXor", "DualAll",
    "DualSplit", "DualLargest", "DualIdentity", "DualInterpolate", "DualJointProduct",
    "DualBySize", "DualLayerNorm", "DualGroupNorm", "DualLocalResponseNorm", "DualMaxPool",
    "DualMaximum", "DualMaxAlong", "DualLargerOfTwo", "DualClampBetween", "DualBatchNormNative",
    "DualNormalize", "DualMatrixNorm", "DualDistances", "DualAdaptiveAveragePool", "DualShuffle",
    "DualCumulativeSum", "DualLeakyReLU", "DualLogSoftmax", "DualLogAddExp", "DualGLU",
    "DualSquaredError", "DualVariance", "DualProductOver",
}  # fmt: skip
CURVED = ("exponential", "gated", "sshaped", "steps", "trigonometric", "logsumexp")  # many samples
SLIPPING = ("conv",)  # only the slips named below


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(rule, marks=() if rule.__name__ in REPRESENTATIVES else pytest.mark.slow, id=rule.__name__)
        for rule in registered_rules()
    ],
)
def test_every_mutant_is_caught_or_equivalent(rule: type[DualLayer]) -> None:
    outcomes = list(survey([rule]))
    survivors = [f"{outcome.mutant.kind} in {outcome.mutant.method}" for outcome in outcomes if outcome.verdict == "survived"]
    assert not survivors
    assert any(outcome.verdict == "caught" for outcome in outcomes)


def test_every_module_has_a_representative() -> None:
    ours = [rule for rule in registered_rules() if rule.__module__.startswith("dual_layers.")]  # other tests add their own
    modules = {rule.__name__: rule.__module__.removeprefix("dual_layers.") for rule in ours}
    assert modules.keys() >= REPRESENTATIVES
    assert set(modules.values()) == {modules[name] for name in REPRESENTATIVES}.union(CURVED, SLIPPING)


NAMED_SLIPS = {
    nn.ReLU(): ("slope times 1.05", "offset times 0.95", "sides swapped", "wrong sign", "examples mixed", "gradient detached"),
    nn.Linear(2, 2): ("dropped bias", "wrong sign", "examples mixed", "gradient detached"),
    nn.Conv2d(2, 2, 1): ("dropped bias", "groups ignored", "dilation ignored", "stride ignored", "padding_mode ignored"),
    nn.ConvTranspose2d(2, 2, 1): ("dropped bias", "groups ignored", "dilation ignored", "output_padding ignored"),
}


@pytest.mark.parametrize("operator", NAMED_SLIPS, ids=lambda operator: type(operator).__name__)
def test_a_named_slip_is_caught_not_merely_equivalent(operator: nn.Module) -> None:
    outcomes = list(survey([lookup(operator)], kinds=NAMED_SLIPS[operator]))
    for kind in NAMED_SLIPS[operator]:
        found = [outcome for outcome in outcomes if outcome.mutant.kind == kind]
        assert any(outcome.verdict == "caught" and not outcome.crashed for outcome in found), (
            f"{kind}: by a wrong value, not by a wrong shape"
        )
        assert not any(outcome.verdict == "survived" for outcome in found), kind


class Shrink(PiecewiseLinear):
    """A user's own rule, registered nowhere: soft shrinkage by one half."""

    facts: ClassVar[Facts] = Facts(monotone=True, positionwise=True, exact_when_stable=True)

    def breakpoints(self) -> tuple[float, ...]:
        return (-0.5, 0.5)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        return "only lambda = 0.5" if call.args[1:] not in ((), (0.5,)) else None

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        yield RuleSample("shrink", Call(F.softshrink), ((3, 4),))
        yield RuleSample("other lambda", Call(F.softshrink, (INPUT, 2.0)), ((3, 4),), error=RuleRefusal, message="only lambda")


class Half(Affine):
    """A user's own affine rule."""

    facts: ClassVar[Facts] = Facts(affine=True, monotone=True)

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        yield RuleSample("half", Call(torch.mul, (INPUT, 0.5)), ((3, 4),))


def test_a_rule_of_ones_own_passes(dtype: torch.dtype, device: str) -> None:
    check_rule(Shrink, dtype=dtype, device=device)
    check_rule(Half, dtype=dtype, device=device, seed=7, points=20)


def on(call: Call, **options) -> classmethod:
    return classmethod(lambda cls: iter([RuleSample("sample", call, ((3, 4),), **options)]))


def broken(base: type[DualLayer], **members) -> type[DualLayer]:
    return type("Broken", (base,), members)


class Remembers(Shrink):
    def slopes(self, bounds: tuple[Interval, ...], choice: str) -> Slopes:
        self.last = bounds
        return super().slopes(bounds, choice)


class WritesInto(Shrink):
    def interval(self, *boxes: Interval) -> Interval:
        result = super().interval(*boxes)
        boxes[0].lower.mul_(1)
        return result


class MixesBatch(Shrink):
    facts: ClassVar[Facts] = Facts(monotone=True, positionwise=True)

    def slopes(self, bounds: tuple[Interval, ...], choice: str) -> Slopes:
        mean = super().slopes(bounds, choice).lower[0].mean(0, keepdim=True).expand_as(bounds[0].lower)
        both = (mean,)
        return Slopes(both, both)


class BreaksAtKinks(Shrink):
    def interval(self, *boxes: Interval) -> Interval:
        box = boxes[0]
        nothing = box.width.clamp(max=1).sqrt() * 0  # has an infinite derivative where the box has no width
        return super().interval(box).map(lambda end: end + nothing)


class Single(Shrink):
    def conjugate(self, slopes: Slopes, bounds: tuple[Interval, ...]) -> Offsets:
        offsets = super().conjugate(slopes, bounds)
        return Offsets(offsets.lower.float(), offsets.upper.float())


class Loose(Shrink):
    def conjugate(self, slopes: Slopes, bounds: tuple[Interval, ...]) -> Offsets:
        offsets = super().conjugate(slopes, bounds)
        return Offsets(offsets.lower - 1, offsets.upper + 1)


SCALING = Facts(affine=True, monotone=True, injective=True)
LOCAL = Facts(affine=True, monotone=True, positionwise=True)


@pytest.mark.parametrize(
    ("rule", "check", "text"),
    [
        (Remembers, "1 purity", "keeps state"),
        (WritesInto, "1 purity", "changed a tensor"),
        (MixesBatch, "6 shapes", "batches of one"),
        (BreaksAtKinks, "5 gradient", "not finite"),
        (Single, "", "dtype|Double|not attained|Float"),
        (Loose, "4 tightness", "not attained"),
        (broken(Shrink, breakpoints=lambda self: (-0.5,)), "3 duality", "exceeds nu_out"),
        (broken(Shrink, facts=Facts(convex=True, monotone=True, positionwise=True)), "3 duality|4", "convex|exceeds|attained"),
        (broken(Half, forward=lambda self, z: self.call(z).detach()), "1 purity|3 duality", "does not require grad|transpose"),
        (broken(Half, facts=Facts(affine=True)), "1 purity", "must define magnitude"),
        (broken(Half, facts=Facts(monotone=True)), "3 duality", "go together"),
        (broken(Half, samples=on(Call(torch.neg))), "2 soundness", "crossed"),
        (broken(Half, samples=on(Call("view_as", (INPUT, torch.zeros(3, 4))))), "4 facts", "aliases"),
        (broken(Half, samples=on(Call(torch.square))), "2 soundness|3 duality", "A z|crossed"),
        (broken(Half, facts=SCALING, samples=on(Call(torch.cumsum, (INPUT, 1)))), "4 facts", "injective"),
        (broken(Half, facts=LOCAL, samples=on(Call(torch.roll, (INPUT, 1)))), "4 facts", "positionwise"),
        (broken(Half, samples=on(Call("chunk", (INPUT, 2), item=0))), "4 facts", "tuple"),
        (broken(Half, samples=on(Call(torch.flip, (INPUT, (0,))))), "6 shapes", "batches of one"),
        (broken(Half, samples=on(Call(torch.sum, (INPUT, 0)))), "6 shapes", "batch_axis=None"),
        (broken(Half, samples=on(Call(torch.neg), error=ValueError, message="no")), "errors", "without an error"),
        (broken(Half, samples=on(Call(torch.mm, (INPUT, torch.ones(3, 4))), error=ValueError)), "errors", "RuntimeError"),
        (broken(Shrink, samples=on(Call(F.softshrink, (INPUT, 2.0)), error=ValueError, message="else")), "errors", "refused"),
        (broken(Shrink, samples=on(Call(F.softshrink, (INPUT, 2.0)))), "construction", "refused"),
    ],
)
def test_a_broken_promise_is_named(rule: type[DualLayer], check: str, text: str) -> None:
    with pytest.raises(RuleError, match=text) as caught:
        check_rule(rule, seed=3)
    error = caught.value
    assert error.rule == rule.__name__
    assert error.seed == 3
    assert error.sample in str(error)
    assert any(error.check.startswith(part) for part in check.split("|"))


@pytest.mark.parametrize(
    ("promise", "axis", "text"),
    [("pull_windows", -1, "pull_windows(nu), cut out by the field"), ("pull_in_phases", 2, "pull_in_phases(nu), woven")],
)
def test_windows_and_phases_in_the_wrong_place_are_noticed(
    promise: str, axis: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = lookup(nn.Conv2d)
    honest = getattr(rule, promise)
    monkeypatch.setattr(rule, promise, lambda self, nu: honest(self, nu).roll(1, axis))
    with pytest.raises(RuleError, match=re.escape(text)):
        check_rule(rule)


def test_a_message_names_the_worst_point() -> None:
    class Low(Shrink):
        def interval(self, *boxes: Interval) -> Interval:
            return super().interval(*boxes).map(lambda end: end - 0.25)

    with pytest.raises(
        RuleError,
        match=r"Low, sample 'shrink \(float64, cpu\)', seed 0, 2 soundness: .* output element \(\d, \d\), box '\w+', z =",
    ):
        check_rule(Low)


def test_the_reference_shares_nothing_with_the_rule() -> None:
    class Overwrites(Affine):
        facts: ClassVar[Facts] = Facts(affine=True)

        def forward(self, *inputs: Tensor) -> Tensor:
            self.call.operator.weight.data.zero_()
            return self.call(*inputs)

        def magnitude(self, *radii: Tensor) -> Tensor:
            return radii[0] @ self.call.operator.weight.abs().T

        @classmethod
        def samples(cls) -> Iterator[RuleSample]:
            yield RuleSample("linear", Call(nn.Linear(4, 2)), ((3, 4),))

    with pytest.raises(RuleError, match="1 forward"):
        check_rule(Overwrites)


def test_a_rule_without_samples_is_told_so() -> None:
    class Unsampled(PiecewiseLinear):
        def breakpoints(self) -> tuple[float, ...]:
            return ()

    with pytest.raises(TypeError, match=r"Unsampled defines no samples\(\), a classmethod"):
        check_rule(Unsampled)
    with pytest.raises(TypeError, match="takes the class of a rule"):
        check_rule(nn.ReLU)
    with pytest.raises(RuleError):  # samples of one's own are enough to find what else is missing
        check_rule(PiecewiseLinear, samples=Shrink.samples())
