"""The public rule checker: ``check_rule`` tries to break everything that a dual layer promises.

The reference is always the torch operator itself, run apart from the rule on copies of the same constants. A check
allows a stated multiple of machine epsilon times the magnitude of the numbers that enter (``checks.tolerance_of``).

Example:
    >>> from dual_layers import lookup
    >>> from dual_layers.testing import check_rule
    >>> check_rule(lookup(torch.relu))  # says nothing: everything held
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dual_layers._claims import check_duality, check_facts, check_gradient, check_tightness
from dual_layers._probes import Boxes, Broken, Case, Tensors, at_most, holds, judged, prepare, require, same
from dual_layers.checks import RuleRefusal, check_interval, check_like
from dual_layers.contract import DualLayer, Interval, RuleSample, Slopes
from dual_layers.families import Affine, Composite, Relaxed

__all__ = ["RuleError", "RuleRefusal", "check_rule"]


class RuleError(AssertionError):
    """A rule broke its promise.

    Attributes:
        rule: name of the rule.
        sample: label of the sample.
        seed: seed with which the same failure comes back.
        check: which check failed.
    """

    def __init__(self, rule: str, sample: str, seed: int, check: str, text: str) -> None:
        self.rule, self.sample, self.seed, self.check = rule, sample, seed, check
        super().__init__(f"{rule}, sample '{sample}', seed {seed}, {check}: {text}")


def check_rule(
    rule: type[DualLayer],
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    samples: Iterable[RuleSample] | None = None,
    points: int = 6,
) -> None:
    """Try to break a rule on its samples: forward, soundness, duality, tightness and facts, gradient, shapes, errors.

    The rule may be anyone's own; it need not be registered.

    Args:
        rule: the class to check.
        dtype: of inputs and constants. Finite differences are taken in float64 only; other dtypes are compared with it.
        device: where to run.
        seed: of every random choice.
        samples: instead of the rule's own.
        points: random points per box, beside corners, centre and kinks.

    Raises:
        RuleError: names rule, sample, seed, check and the worst point.
        TypeError: ``rule`` is not a class of rules, or has no samples to be checked on.
    """
    if not (isinstance(rule, type) and issubclass(rule, DualLayer)):
        raise TypeError(f"check_rule takes the class of a rule, derived from DualLayer, got {rule!r}")
    if samples is None and "samples" in rule.__abstractmethods__:
        raise TypeError(f"{rule.__name__} defines no samples(), a classmethod that yields the calls to check it on")
    chosen = list(rule.samples() if samples is None else samples)
    if not chosen:
        raise TypeError(f"{rule.__name__} has no samples of its own; pass samples=, a list of RuleSample")
    for sample in chosen:
        where = f"{sample.label} ({str(dtype).removeprefix('torch.')}, {device})"
        if sample.error is not None:
            _run(rule, where, seed, "errors", lambda sample=sample: _bad_sample(rule, sample, dtype, torch.device(device)))
            continue
        case: list[Case] = []
        _run(
            rule,
            where,
            seed,
            "construction",
            lambda sample=sample, case=case: case.append(_case(rule, sample, dtype, device, seed, points)),
        )
        for name, check in COMPOSITE_CHECKS if issubclass(rule, Composite) else CHECKS:
            _run(rule, where, seed, name, lambda check=check, case=case: check(case[0]))


def _run(rule: type[DualLayer], sample: str, seed: int, name: str, check: Callable[[], None]) -> None:
    try:
        with torch.no_grad():
            check()
    except Broken as broken:
        raise RuleError(rule.__name__, sample, seed, name, str(broken)) from None
    except Exception as error:
        raise RuleError(rule.__name__, sample, seed, name, f"{type(error).__name__}: {error}") from error


def _case(
    rule: type[DualLayer], sample: RuleSample, dtype: torch.dtype, device: torch.device | str, seed: int, points: int
) -> Case:
    for call in (sample.call, judged(sample.call)):
        refusal = rule.refuse(call)
        require(refusal is None, f"a good sample is refused: {refusal}")
    return Case(rule, sample, dtype, torch.device(device), seed, points)


def check_forward(case: Case) -> None:
    """The rule's ``forward`` is the operator."""
    for probe in case.probes:
        values = torch.stack([case.layer.forward(*z) for z in zip(*probe.points, strict=True)])
        values = values.to(probe.values.dtype) if values.dtype == torch.bool else values
        holds(check_like, values, probe.values, "forward")
        same(values, probe.values, probe.allowance, "forward against the operator", probe.locate)


def check_composition(case: Case) -> None:
    """The composition is the operator, and its enclosure, if it states one, holds the operator's values."""
    layer = case.layer
    for probe in case.probes:
        values = torch.stack([layer.composed(*z) for z in zip(*probe.points, strict=True)])
        holds(check_like, values.to(probe.values.dtype), probe.values, "composition")
        same(
            values.to(probe.values.dtype), probe.values, 16 * probe.allowance, "composition against the operator", probe.locate
        )
    if layer.interval(*case.probes[0].boxes) is not None:
        check_soundness(case)


def check_purity(case: Case) -> None:
    """Nothing is kept between calls, and no tensor that is handed in is changed."""
    layer, boxes = case.layer, case.probes[0].boxes
    nu, tangents = case.rows(signed=True)[-6:], tuple(case.normal(shape) for shape in case.sample.shapes)
    given = [end for box in boxes for end in (box.lower, box.upper)] + [nu, *tangents]
    before, state = [(tensor._version, tensor.clone()) for tensor in given], dict(vars(layer))
    case.outputs(layer, boxes, nu, tangents)
    untouched = all(t._version == version and torch.equal(t, old) for t, (version, old) in zip(given, before, strict=True))
    require(untouched, "the rule changed a tensor it was given")
    kept = vars(layer).keys() == state.keys() and all(vars(layer)[key] is state[key] for key in state)
    require(kept, "the rule keeps state between calls")


def check_soundness(case: Case) -> None:
    """The interval holds the operator's value at every point of every box."""
    for probe in case.probes:
        ends = case.layer.interval(*probe.boxes)
        holds(check_interval, ends, f"interval of box '{probe.name}'")
        at_most(ends.lower, probe.values, probe.allowance, "interval: lower end above f(z)", probe.locate)
        at_most(probe.values, ends.upper, probe.allowance, "interval: f(z) above the upper end", probe.locate)


def check_shapes(case: Case) -> None:
    """Shapes, dtypes, devices; rows, batches of one and of none, strides; another dtype."""
    layer, boxes = case.layer, case.probes[0].boxes
    nu, tangents = case.rows(signed=True)[-6:], tuple(case.normal(shape) for shape in case.sample.shapes)
    said = case.outputs(layer, boxes, nu, tangents)
    _described(case, said, nu, boxes)
    for count in (1, 0):
        _described(case, case.outputs(layer, boxes, nu[:count], tangents), nu[:count], boxes)
    _strides(case, said, boxes, nu, tangents)
    if case.sample.batch_axis is not None and case.sample.shapes:
        _one_by_one(case, said, boxes, nu, tangents)
        _no_examples(case, boxes, nu, tangents)
    if case.dtype != torch.float64 and case.device.type != "mps":
        _other_dtype(case)


def _described(case: Case, said: dict[str, Tensors], nu: Tensor, boxes: Boxes) -> None:
    """Compare shape, dtype and device of everything said with what the contract prescribes."""
    rows = tuple(box.lower.new_empty((len(nu), *box.lower.shape)) for box in boxes)
    for name, outputs in said.items():
        if name.endswith("slopes"):
            continue
        expected = (
            rows
            if name in ("transpose",) or name.endswith("nu_in")
            else (case.zero,) * (1 if name in ("linear", "magnitude") else 2)
        )
        require(len(outputs) == len(expected), f"{name} gives {len(outputs)} tensors, expected {len(expected)}")
        for output, like in zip(outputs, expected, strict=True):
            holds(check_like, output, like, name)


def _strides(case: Case, said: dict[str, Tensors], boxes: Boxes, nu: Tensor, tangents: Tensors) -> None:
    spread = lambda tensor: torch.stack([tensor, tensor], -1)[..., 0]  # noqa: E731
    _agree(case, case.outputs(case.layer, boxes, spread(nu), tangents), said, "non-contiguous nu")
    try:
        case.call(*(spread(tangent) for tangent in tangents))
    except RuntimeError:
        return  # the operator itself wants contiguous memory, as view does
    loose = tuple(Interval(spread(box.lower), spread(box.upper)) for box in boxes)
    _agree(case, case.outputs(case.layer, loose, nu, tuple(map(spread, tangents))), said, "non-contiguous input")


def _agree(case: Case, actual: dict[str, Tensors], expected: dict[str, Tensors], what: str, factor: float = 1.0) -> None:
    for name, outputs in expected.items():
        for left, right in zip(actual[name], outputs, strict=True):
            largest = right.abs().max().item() if right.numel() else 0.0
            same(left.to(right.dtype), right, factor * case.tolerance * (1 + largest), f"{name}, {what}")


def _one_by_one(case: Case, said: dict[str, Tensors], boxes: Boxes, nu: Tensor, tangents: Tensors) -> None:
    """A batch of N equals N batches of one."""
    count = case.sample.shapes[0][case.sample.batch_axis]
    axis = _output_axis(case, count, tangents) if count > 1 else None
    if axis is None:
        return
    parts = []
    for index in range(count):
        one = tuple(Interval(_example(case, box.lower, index, 1), _example(case, box.upper, index, 1)) for box in boxes)
        length = nu.shape[axis + 1] // count
        rows, moves = nu.narrow(axis + 1, index * length, length), tuple(_example(case, t, index, 1) for t in tangents)
        parts.append(case.outputs(case.layer, one, rows, moves))
    for name, outputs in said.items():
        for number, whole in enumerate(outputs):
            singles = [part[name][number] for part in parts]
            differ = [a for a in range(whole.ndim) if whole.shape[a] != singles[0].shape[a]]
            shared = sum(singles) if name == "transpose" or name.endswith("nu_in") else singles[0]
            joined = torch.cat(singles, differ[0]) if differ else shared
            size = case.tolerance * (1 + whole.abs().max().item())
            same(joined, whole, size, f"{name}: {count} batches of one against a batch of {count}")


def _example(case: Case, tensor: Tensor, start: int, length: int) -> Tensor:
    first, axis = case.sample.shapes[0], case.sample.batch_axis
    batched = tensor.ndim >= len(first) and tensor.shape[axis] == first[axis]  # a broadcast input belongs to every example
    return tensor.narrow(axis, start, length) if batched else tensor


def _output_axis(case: Case, count: int, tangents: Tensors) -> int:
    single = case.call(*(_example(case, tangent, 0, 1) for tangent in tangents))
    whole = case.zero.shape
    axes = [a for a in range(single.ndim) if whole[a] != single.shape[a]] if single.ndim == len(whole) else []
    clear = len(axes) == 1 and whole[axes[0]] == count * single.shape[axes[0]]
    shapes = f"one example gives {tuple(single.shape)}, {count} give {tuple(whole)}"
    require(clear, f"{shapes}: a sample that mixes the batch says batch_axis=None")
    return axes[0]


def _no_examples(case: Case, boxes: Boxes, nu: Tensor, tangents: Tensors) -> None:
    """An empty batch, where the operator itself takes one."""
    moves = tuple(_example(case, tangent, 0, 0) for tangent in tangents)
    try:
        empty = case.call(*moves)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return
    if empty.numel() == 0 and empty.ndim == case.zero.ndim:
        none = tuple(Interval(_example(case, box.lower, 0, 0), _example(case, box.upper, 0, 0)) for box in boxes)
        said = case.outputs(case.layer, none, empty.new_ones((2, *empty.shape)), moves)
        holds(check_like, said["interval"][0], empty, "interval of an empty batch")


def _other_dtype(case: Case) -> None:
    """Interval, linear, transpose and the offsets of the same slopes agree with float64 up to this dtype's rounding."""
    exact = Case(case.rule, case.sample, torch.float64, case.device, 0, 0)
    up = lambda box: Interval(box.lower.double(), box.upper.double())  # noqa: E731
    for probe in case.probes:
        if probe.name not in ("random", "straddling"):
            continue
        wide = tuple(map(up, probe.boxes))
        here, there = case.layer.interval(*probe.boxes), exact.layer.interval(*wide)
        same(here.lower.double(), there.lower.double(), 4 * probe.allowance.double(), "interval's lower end against float64")
        same(here.upper.double(), there.upper.double(), 4 * probe.allowance.double(), "interval's upper end against float64")
        if isinstance(case.layer, Relaxed) and isinstance(exact.layer, Relaxed):
            slopes = case.layer.slopes(probe.boxes, "adaptive")
            lower, upper = (tuple(slope.double() for slope in side) for side in (slopes.lower, slopes.upper))
            offsets = case.layer.conjugate(slopes, probe.boxes)
            expected = exact.layer.conjugate(Slopes(lower, upper), wide)
            size = 4 * probe.allowance.double() + 4 * case.tolerance * max(abs(end) for end in case.domain)
            same(offsets.lower.double(), expected.lower, size, "lower offset against float64")
            same(offsets.upper.double(), expected.upper, size, "upper offset against float64")
    if isinstance(case.layer, Affine) and isinstance(exact.layer, Affine):
        tangents = tuple(case.normal(shape) for shape in case.sample.shapes)
        larger = tuple(tangent.double() for tangent in tangents)
        nu = case.rows(signed=False)
        _agree(
            case, {"linear": (case.layer.linear(*tangents),)}, {"linear": (exact.layer.linear(*larger),)}, "against float64", 4
        )
        pulled, expected = case.layer.transpose(nu, tangents), exact.layer.transpose(nu.to(exact.zero.dtype), larger)
        _agree(case, {"transpose": tuple(pulled)}, {"transpose": tuple(expected)}, "against float64", 4)


def _bad_sample(rule: type[DualLayer], sample: RuleSample, dtype: torch.dtype, device: torch.device) -> None:
    expected = f"{sample.error.__name__} matching {sample.message!r}"
    try:
        _use(rule, sample, dtype, device)
    except RuleRefusal as refusal:  # a refusal becomes the library's own error, so a sample is free to name any Exception type
        require(_mentions(str(refusal), sample.message), f"refused with {str(refusal)!r}; expected {expected}")
        require(issubclass(RuleRefusal, sample.error), f"refused, which raises RuleRefusal (a ValueError); expected {expected}")
    except Exception as error:
        require(isinstance(error, sample.error), f"raised {type(error).__name__}: {error}; expected {expected}")
        require(_mentions(str(error), sample.message), f"raised {type(error).__name__}: {error}; expected {expected}")
    else:
        raise Broken(f"a bad sample ran without an error; expected {expected}")


def _mentions(text: str, message: str) -> bool:
    """Look for a part of a message, given literally or as a regular expression."""
    try:
        return message in text or re.search(message, text) is not None
    except re.error:
        return False


def _use(rule: type[DualLayer], sample: RuleSample, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse, construct, run: what happens to a call before anyone relies on its bounds."""
    call = prepare(sample.call, dtype, device)
    text = rule.refuse(judged(call)) or rule.refuse(call)
    if text is not None:
        raise RuleRefusal(text)
    layer = rule(call)
    inputs = tuple(torch.ones(shape, dtype=dtype, device=device) for shape in sample.shapes)
    boxes, nu = tuple(Interval(z, z + 1) for z in inputs), layer.forward(*inputs)[None]
    layer.interval(*boxes)
    if isinstance(layer, Composite):
        layer.composed(*inputs)
    if isinstance(layer, Affine):
        layer.transpose(nu, inputs)
    if isinstance(layer, Relaxed):
        layer.pull(nu, layer.slopes(boxes, "parallel"), inputs)


CHECKS: tuple[tuple[str, Callable[[Case], None]], ...] = (
    ("1 forward", check_forward),
    ("1 purity", check_purity),
    ("2 soundness", check_soundness),
    ("3 duality", check_duality),
    ("4 tightness", check_tightness),
    ("4 facts", check_facts),
    ("5 gradient", check_gradient),
    ("6 shapes", check_shapes),
)

COMPOSITE_CHECKS = (
    ("1 forward", check_forward),
    ("2 composition", check_composition),
    ("4 facts", check_facts),
    ("5 gradient", check_gradient),
)
