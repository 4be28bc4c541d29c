"""Assertions that a property holds on whole regions; a failure shows the worst margin and looks for a counterexample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autodual.errors import SpecificationError
from autodual.methods import IBP, Dual, Method, resolve
from autodual.network import BoundModule, certify
from autodual.regions import Region
from autodual.report import Report, why_none
from autodual.testing.counterexamples import Counterexample, misclassified, out_of_limits
from dual_layers import NONE, Guarantee, Interval

Regions = Region | Mapping[str, Region]


class NotCertifiedError(AssertionError):
    """A property could not be certified.

    Attributes:
        counterexample: a point of the region at which it is false, or None if the attack found none.
    """

    def __init__(self, message: str, counterexample: Counterexample | None = None) -> None:
        super().__init__(message)
        self.counterexample = counterexample


def assert_certified(model: nn.Module, x: Any, y: Any, region: Regions, method: str | Method = "dual") -> Report:
    """Assert that every input of the region gets label ``y``.

    Args:
        model: a classifier, or what ``autodual.certify`` made of it.
        x: its input, or a tuple or dict of its arguments.
        y: labels, ``(batch,)`` integers.
        region: the inputs to cover.
        method: how to bound.

    Returns:
        The report; all examples are certified.

    Raises:
        NotCertifiedError: an ``AssertionError`` that names the worst margin and, where an attack finds one, a counterexample.

    Example:
        >>> import autodual, torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> assert_certified(model, torch.tensor([[1.0, 0.0]]), [0], autodual.LInf(0.4)).certified
        tensor([True])
    """
    net = model if isinstance(model, BoundModule) else certify(model)
    report = net.verify(x, y, region, method=method)
    if bool(report.certified.all()):
        return report
    failed = (~report.certified).nonzero().squeeze(1)
    own = nn.functional.one_hot(report.y, report.margins.shape[1]).bool()
    surplus = _proof(report.margins - report.allowance).masked_fill(own, torch.inf)[failed]
    place, rival = divmod(int(surplus.argmin()), surplus.shape[1])
    worst = int(failed[place])
    found = misclassified(net, x, report.y, region, failed)
    margin, allowance = report.margins[worst, rival], report.allowance[worst, rival]
    raise NotCertifiedError(
        f"{len(failed)} of {len(report.certified)} examples are not certified over {region!r} by {report.method}\n"
        f"  worst margin    {margin:.6g}: example {worst}, label {int(report.y[worst])} against class {rival}"
        f" (a certificate needs more than {allowance:.1g})\n{_ending(found, report.guarantee, report.method)}",
        found,
    )


def assert_output(
    model: nn.Module,
    x: Any,
    region: Regions,
    spec: Tensor | None = None,
    lower: float | Tensor | None = None,
    upper: float | Tensor | None = None,
    method: str | Method = "dual",
) -> Interval:
    """Assert that linear functions of the outputs stay within limits on the whole region.

    Args:
        model: any model, or what ``autodual.certify`` made of it.
        x: its input, or a tuple or dict of its arguments.
        region: the inputs to cover.
        spec: ``(rows, outputs)`` or ``(batch, rows, outputs)``; default: each output.
        lower: what no value may fall below; broadcasts to ``(batch, rows)``.
        upper: what no value may exceed, likewise.
        method: how to bound.

    Returns:
        The bounds, widened by the allowance for float rounding; they lie within the limits.

    Raises:
        NotCertifiedError: an ``AssertionError`` that names the worst margin and, where an attack finds one, a counterexample.
        SpecificationError: neither limit is given, or one does not fit.

    Example:
        >>> import autodual, torch
        >>> bounds = assert_output(torch.nn.ReLU(), torch.zeros(1, 2), autodual.Box(0.0, 1.0), lower=-0.01, upper=1.01)
        >>> bounds.upper.round(decimals=3)
        tensor([[1., 1.]])
    """
    net = model if isinstance(model, BoundModule) else certify(model)
    with torch.no_grad():
        bounds = net.bounds(x, region, spec, method, allow_rounding=True)
    rows = torch.eye(bounds.lower.shape[-1]).to(bounds.lower) if spec is None else spec.to(bounds.lower)
    limits = (_limit(lower, bounds, -torch.inf, "lower"), _limit(upper, bounds, torch.inf, "upper"))
    if lower is None and upper is None:
        raise SpecificationError("assert_output needs a lower or an upper limit")
    surplus = _proof(torch.stack([bounds.lower - limits[0], limits[1] - bounds.upper]))
    if bool((surplus >= 0).all()) and (bounds.guarantee != NONE or surplus.numel() == 0):
        return bounds
    failed = surplus < 0 if bounds.guarantee != NONE else surplus.isfinite()
    side, worst, row = (int(index) for index in torch.unravel_index(surplus.argmin(), surplus.shape))
    found = out_of_limits(net, x, region, rows, limits, failed)
    word, bound, limit = (("lower", bounds.lower, limits[0]), ("upper", bounds.upper, limits[1]))[side]
    method, count = resolve(method), int((surplus < torch.inf).sum())
    raise NotCertifiedError(
        f"{int(failed.sum())} of {count} limits are not certified over {region!r} by {method}\n"
        f"  worst margin    {surplus[side, worst, row]:.6g}: example {worst}, row {row}: "
        f"{word} bound {bound[worst, row]:.6g}, {word} limit {limit[worst, row]:.6g}\n"
        f"{_ending(found, bounds.guarantee, method)}",
        found,
    )


def _limit(limit: float | Tensor | None, bounds: Interval, otherwise: float, name: str) -> Tensor:
    """Bring a limit to ``(batch, rows)``."""
    value = torch.as_tensor(otherwise if limit is None else limit).to(bounds.lower)
    try:
        value = value.expand_as(bounds.lower)
    except RuntimeError:
        shape = tuple(bounds.lower.shape)
        raise SpecificationError(
            f"{name} has shape {tuple(value.shape)}, which does not broadcast to {shape}, (batch, rows)"
        ) from None
    if value.isnan().any():
        raise SpecificationError(f"{name} contains NaN")
    return value


def _proof(surplus: Tensor) -> Tensor:
    """Let NaN prove nothing."""
    return torch.where(surplus.isnan(), -torch.inf, surplus)


def _ending(found: Counterexample | None, guarantee: Guarantee, method: Method) -> str:
    """Describe the counterexample, or what to try where there is none."""
    lines = []
    if guarantee == NONE:
        lines.append(f"  guarantee NONE, which proves nothing: {why_none(method)}")
    if found is None:
        tighter = {IBP: 'method="dual"', Dual: 'method="adaptive"'}.get(type(method), "a smaller region")
        lines.append(
            f"  no counterexample found: the property may hold, the bound is too loose; try a tighter method: {tighter}"
        )
    else:
        lines.append(str(found))
    return "\n".join(lines)
