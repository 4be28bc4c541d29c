"""Rules broken on purpose, made from any rule, to test the checker: a mutant must be caught, or be no mutant at all.

Run ``benchmarks/mutants.py`` for the table over all registered rules.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dual_layers._probes import Boxes, Case, Tensors, prepare
from dual_layers.contract import Call, DualLayer, Interval, RuleSample, Slopes
from dual_layers.families import Affine, Composite, Relaxed
from dual_layers.testing import RuleError, check_rule

Verdict = Literal["caught", "equivalent", "survived"]
Change = Callable[[Any], Any]


@dataclass(frozen=True)
class Mutant:
    """A rule with one method broken.

    Attributes:
        kind: the slip that is imitated; one line of the table.
        method: which method was broken.
        rule: the broken class. It is registered nowhere.
        concerns: whether it can differ from its rule on a call.
    """

    kind: str
    method: str
    rule: type[DualLayer]
    concerns: Callable[[Call], bool] = lambda call: True


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        rule: name of the rule.
        mutant: what was broken.
        verdict: ``equivalent`` if it behaves like its rule on every sample.
        check: which check caught it.
        crashed: no check saw a wrong value; on each sample that showed a difference the mutant raised an exception.
    """

    rule: str
    mutant: Mutant
    verdict: Verdict
    check: str = ""
    crashed: bool = False


def mutants(rule: type[DualLayer]) -> Iterator[Mutant]:
    """Yield every mutant that makes sense for a rule's family."""
    yield _after(rule, "forward times 1.05", "forward", lambda out: 1.05 * out)
    if issubclass(rule, Composite):
        yield _after(rule, "composition times 1.05", "composed", lambda out: 1.05 * out)
        if rule.interval is Composite.interval:
            return
    yield _after(rule, "sides swapped", "interval", lambda box: replace(box, lower=box.upper, upper=box.lower))
    yield _after(rule, "interval 5 % too narrow", "interval", _narrow)
    if issubclass(rule, Affine):
        yield from _affine_mutants(rule)
    if issubclass(rule, Relaxed):
        yield from _relaxed_mutants(rule)
    methods = _methods(rule)
    for method in methods:
        axis = 1 if method in ("transpose", "pull") else 0  # rows come first in nu
        yield _after(rule, "examples mixed", method, lambda value, axis=axis: _each(lambda t: _rolled(t, axis), value))
        yield _after(rule, "gradient detached", method, lambda value: _each(torch.detach, value))
        if method != "slopes":  # any slope is sound
            yield _after(rule, "wrong sign", method, lambda value: _each(torch.neg, value))
    for name in sorted(set(_settings(rule))):
        for method in ("forward", *methods):
            if method != "slopes":
                yield _ignoring(rule, name, method)


def _methods(rule: type[DualLayer]) -> tuple[str, ...]:
    if issubclass(rule, Affine):
        own = [method for method in ("magnitude", "euclidean") if getattr(rule, method) is not getattr(Affine, method)]
        return ("interval", "linear", "transpose", *own)
    return ("interval", "slopes", "conjugate", "pull") if issubclass(rule, Relaxed) else ("interval",)


def _affine_mutants(rule: type[Affine]) -> Iterator[Mutant]:
    for method in _methods(rule)[1:]:
        yield _after(rule, "slope times 1.05", method, lambda value: _each(lambda t: 1.05 * t, value))

    def linear(self: Affine, *tangents: Tensor) -> Tensor:
        return self.call(*tangents)

    def interval(self: Affine, *boxes: Interval) -> Interval:
        constant = self.call(*(torch.zeros_like(box.lower) for box in boxes))
        return rule.interval(self, *boxes).map(lambda end: end - constant)

    yield _broken(rule, "dropped bias", "linear", linear)
    yield _broken(rule, "dropped bias", "interval", interval)


def _relaxed_mutants(rule: type[Relaxed]) -> Iterator[Mutant]:
    def steep(
        self: Relaxed, nu: Tensor, slopes: Slopes, inputs: Tensors
    ) -> Tensors:  # after the offsets: before, it would be sound
        upper = tuple(1.05 * slope for slope in slopes.upper)
        wrong = Slopes(upper, upper) if slopes.parallel else Slopes(tuple(1.05 * s for s in slopes.lower), upper)
        return rule.pull(self, nu, wrong, inputs)

    def swapped(self: Relaxed, nu: Tensor, slopes: Slopes, inputs: Tensors) -> Tensors:
        return rule.pull(self, nu, Slopes(slopes.upper, slopes.lower), inputs)

    def settled(self: Relaxed, bounds: Boxes) -> Tensor:
        return torch.zeros_like(rule.undecided(self, bounds))

    yield _broken(rule, "slope times 1.05", "pull", steep)
    yield _broken(rule, "sides swapped", "pull", swapped)
    yield _after(rule, "sides swapped", "conjugate", lambda pair: replace(pair, lower=pair.upper, upper=pair.lower))
    yield _after(rule, "offset times 0.95", "conjugate", lambda pair: _each(lambda t: 0.95 * t, pair))
    if rule.facts.exact_when_stable:
        yield _broken(rule, "never undecided", "undecided", settled)
        yield _after(rule, "always undecided", "undecided", torch.ones_like)


def _ignoring(rule: type[DualLayer], name: str, method: str) -> Mutant:
    """Break one method by running it on a call in which one argument was left at its default."""
    original = getattr(rule, method)

    def broken(self: DualLayer, *args: Any) -> Any:
        other = without(rule, self.call, name)
        if other is None:
            return original(self, *args)
        return _fitted(original(rule(other), *args), original(self, *args))  # of the right shape, or it would be too easy

    mutant = _broken(rule, f"{name} ignored", method, broken)
    return replace(mutant, concerns=lambda call: name in _set_arguments(rule, call))


def _settings(rule: type[DualLayer]) -> Iterator[str]:
    """Name the arguments that some good sample sets to something else than the default."""
    for sample in rule.samples():
        if sample.error is None:
            yield from _set_arguments(rule, sample.call)


def _set_arguments(rule: type[DualLayer], call: Call) -> dict[str, Any]:
    """Map each argument that differs from its default to that default. Tensors and perturbed inputs are left alone."""
    if isinstance(call.operator, nn.Module):
        held = {key: value for key, value in vars(call.operator).items() if not key.startswith("_")}
        defaults = inspect.signature(type(call.operator).__init__).parameters
    else:
        defaults = inspect.signature(rule.parameters).parameters
        try:
            held = dict(inspect.signature(rule.parameters).bind(*call.args, **call.kwargs).arguments)
        except TypeError:
            held = dict(call.kwargs)
    found = {}
    for key, value in held.items():
        default = defaults[key].default if key in defaults else inspect.Parameter.empty
        if isinstance(value, tuple) and isinstance(default, (int, float)):
            default = (default,) * len(value)
        droppable = default is not inspect.Parameter.empty or key in call.kwargs
        if droppable and key != "inplace" and _is_plain(value) and value != default:
            found[key] = default
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def without(rule: type[DualLayer], call: Call, name: str) -> Call | None:
    """Return the call with one argument at its default, or None where it already is."""
    changed = _set_arguments(rule, call)
    if name not in changed:
        return None
    if isinstance(call.operator, nn.Module):
        module = copy.copy(call.operator)
        setattr(module, name, changed[name])
        return replace(call, operator=module)
    if name in call.kwargs:
        return replace(call, kwargs={key: value for key, value in call.kwargs.items() if key != name})
    place = list(inspect.signature(rule.parameters).parameters).index(name)
    return replace(call, args=(*call.args[:place], changed[name], *call.args[place + 1 :]))


def survey(rules: Iterable[type[DualLayer]], seed: int = 0, kinds: Collection[str] | None = None) -> Iterator[Outcome]:
    """Run the checker on every mutant of every rule, or on those of some kinds."""
    for rule in rules:
        samples = [sample for sample in rule.samples() if sample.error is None]
        originals = [_Original(rule, sample, seed) for sample in samples]
        for mutant in mutants(rule):
            if kinds is None or mutant.kind in kinds:
                yield _judge(mutant, originals, seed)


def _judge(mutant: Mutant, originals: list[_Original], seed: int) -> Outcome:
    """Only a sample on which the mutant behaves differently can tell it from its rule; one of them must."""
    outcome = Outcome(mutant.rule.__name__, mutant, "equivalent")
    for original in originals:
        if mutant.concerns(original.sample.call) and original.differs(mutant):
            try:
                check_rule(mutant.rule, seed=seed, samples=[original.sample])
            except RuleError as error:
                crashed = error.__cause__ is not None
                outcome = replace(outcome, verdict="caught", check=error.check, crashed=crashed)
                if not crashed:
                    return outcome
            else:
                outcome = outcome if outcome.crashed else replace(outcome, verdict="survived")
    return outcome


class _Original:
    """A rule on one sample, with everything it says, for comparison with its mutants."""

    def __init__(self, rule: type[DualLayer], sample: RuleSample, seed: int) -> None:
        self.sample = sample
        self.case = Case(rule, sample, torch.float64, torch.device("cpu"), seed, 2)
        self.nu, self.tangents = self.case.rows(signed=True), tuple(map(self.case.normal, sample.shapes))
        self.boxes = [probe.boxes for probe in self.case.probes]
        self.said = [self.ask(self.case.layer, boxes) for boxes in self.boxes]

    def ask(self, layer: DualLayer, boxes: Boxes) -> list[tuple[Tensor, bool]]:
        """List everything a layer says, each answer with whether it moves with what was handed in, away from kinks."""
        leaves: list[Tensor] = []
        ordinary = boxes is self.boxes[0]

        def grow(tensor: Tensor) -> Tensor:
            leaves.append(tensor.detach().clone().requires_grad_(True))
            return leaves[-1]

        boxes = tuple(Interval(grow(box.lower), grow(box.upper)) for box in boxes)
        said = self.case.outputs(layer, boxes, grow(self.nu), tuple(map(grow, self.tangents)))
        values = [value for outputs in said.values() for value in outputs]
        values.append(layer.forward(*(box.center for box in boxes)))
        values += [layer.undecided(boxes)] if isinstance(layer, Relaxed) else []
        return [(value, ordinary and _moves(value, leaves)) for value in values]

    def differs(self, mutant: Mutant) -> bool:
        layer = mutant.rule(prepare(self.sample.call, self.case.dtype, self.case.device))
        for boxes, said in zip(self.boxes, self.said, strict=True):
            try:
                answers = self.ask(layer, boxes)
            except Exception:
                return True
            if any(not _alike(left, right) for left, right in zip(answers, said, strict=True)):
                return True
        return False


def _moves(value: Tensor, leaves: list[Tensor]) -> bool:
    """Whether some derivative of a tensor is not zero, beyond rounding."""
    if not value.requires_grad:
        return False
    weights = torch.linspace(1.0, 2.0, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
    grads = torch.autograd.grad((weights * value).sum(), leaves, allow_unused=True, retain_graph=True)
    return any(grad is not None and bool((grad.abs() > 1e-9).any()) for grad in grads)


def _alike(left: tuple[Tensor, bool], right: tuple[Tensor, bool]) -> bool:
    (one, moves), (other, other_moves) = left, right
    return moves == other_moves and one.shape == other.shape and bool(((one == other) | one.isnan()).all())


def _after(rule: type[DualLayer], kind: str, method: str, change: Change) -> Mutant:
    original = getattr(rule, method)
    return _broken(rule, kind, method, lambda self, *args: change(original(self, *args)))


def _broken(rule: type[DualLayer], kind: str, method: str, replacement: Callable[..., Any]) -> Mutant:
    return Mutant(kind, method, type(rule.__name__, (rule,), {method: replacement, "__module__": __name__}))


def _each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Apply a function to the tensors of an answer, whichever kind of answer it is; parallel slopes stay one tuple."""
    if isinstance(value, Tensor):
        return function(value)
    if value is None:
        return None
    if isinstance(value, Slopes) and value.parallel:
        lower = _each(function, value.lower)
        return Slopes(lower, lower)
    if is_dataclass(value):
        changed = {f.name: _each(function, getattr(value, f.name)) for f in fields(value) if f.name in ("lower", "upper")}
        return replace(value, **changed)
    return tuple(_each(function, item) for item in value)


def _fitted(value: Any, like: Any) -> Any:
    """Crop or pad the tensors of an answer to the shapes of the right answer."""
    if isinstance(value, Tensor):
        if value.ndim != like.ndim or value.shape == like.shape:
            return value
        for axis, size in enumerate(like.shape):
            value = value.narrow(axis, 0, min(size, value.shape[axis]))
        return nn.functional.pad(
            value, [n for axis in reversed(range(like.ndim)) for n in (0, like.shape[axis] - value.shape[axis])]
        )
    if is_dataclass(value):
        return replace(value, lower=_fitted(value.lower, like.lower), upper=_fitted(value.upper, like.upper))
    return tuple(_fitted(*pair) for pair in zip(value, like, strict=True))


def _rolled(value: Tensor, axis: int) -> Tensor:
    return value.roll(1, axis) if value.ndim > axis else value


def _narrow(box: Interval) -> Interval:
    return replace(box, lower=box.lower + 0.05 * box.radius, upper=box.upper - 0.05 * box.radius)
