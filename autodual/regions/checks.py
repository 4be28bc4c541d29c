"""Checks of what users hand to a region, each with a message that says what was found, where, and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from autodual.errors import SpecificationError

ROUNDING = 1e-6  # a value outside its limits by this much, relative to its size, is taken for rounding and clamped


def describe(value: object) -> str:
    """Return a short text for a setting of a region: tensors by shape and range, anything else as Python shows it."""
    if not isinstance(value, Tensor):
        return f"({', '.join(map(describe, value))})" if isinstance(value, tuple) else repr(value)
    if value.dim() == 0 and not value.is_complex() and not value.is_meta:
        return f"{value.item():g}"
    ordered = value.numel() and not value.is_complex() and not value.is_meta
    span = f", {value.min().item():g} to {value.max().item():g}" if ordered else ""
    return f"tensor of shape {tuple(value.shape)}{span}"


def element(name: str, index: Tensor) -> str:
    """Return ``name[i, j]`` for one row of ``nonzero()``; a scalar has no index."""
    return f"{name}[{', '.join(str(i) for i in index.tolist())}]" if len(index) else name


def first(mask: Tensor) -> Tensor:
    """Return the index of the first true element of a mask."""
    return mask.nonzero()[0]


def check_input(x: object, name: str) -> None:
    """Check that ``x`` is a batch of finite floating numbers."""
    if not isinstance(x, Tensor):
        raise SpecificationError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        kind = "integer" if not (x.is_complex() or x.dtype == torch.bool) else str(x.dtype).removeprefix("torch.")
        raise SpecificationError(f"{name}: {kind} input ({x.dtype}): convert to float, for example with .float()")
    if x.dim() == 0:
        raise SpecificationError(f"{name}: a scalar has no batch axis; axis 0 must be the batch: use {name}[None]")
    if x[:1].numel() == 0 < len(x):
        raise SpecificationError(f"{name}: examples of shape {tuple(x.shape[1:])} have no elements")
    wrong = ~x.isfinite()
    if wrong.any():
        where = first(wrong)
        raise SpecificationError(f"{name}: not finite: {element(name, where)} = {x[tuple(where)].item()}")


def check_epsilon(eps: object, x: Tensor, name: str, *, per_coordinate: bool) -> None:
    """Check that a radius is a finite non-negative number, one per example or, if allowed, one per coordinate."""
    label = f"{name}: eps"
    if isinstance(eps, Tensor):
        _check_tensor(eps, x, label)
        if not (eps.dim() == 0 or eps.shape == x.shape[:1] or (per_coordinate and broadcasts(eps, x))):
            allowed = f"a number or one value per example, shape ({x.shape[0]},)"
            allowed += f", or anything that broadcasts to {tuple(x.shape)}" if per_coordinate else ""
            raise SpecificationError(f"{label} has shape {tuple(eps.shape)}; allowed is {allowed}")
    elif not isinstance(eps, Real) or isinstance(eps, bool):
        raise SpecificationError(f"{label} must be a number or a tensor, got {type(eps).__name__}")
    values = eps.detach() if isinstance(eps, Tensor) else torch.tensor(float(eps), dtype=torch.float64)
    wrong = ~((values >= 0) & (values < math.inf))
    if wrong.any():
        where = first(wrong)
        value = values[tuple(where)].item()
        fault = "NaN" if math.isnan(value) else "negative" if value < 0 else "infinite"
        raise SpecificationError(f"{element(label, where)} = {value:g} is {fault}; a radius is finite and at least 0")


def check_limits(lower: object, upper: object, x: Tensor, names: tuple[str, str], *, finite: bool) -> None:
    """Check that ``lower <= upper`` element by element, up to rounding, and that both broadcast to ``x``."""
    for limit, label in ((lower, names[0]), (upper, names[1])):
        _check_limit(limit, x, label, finite=finite)
    crossing = _crossing(lower, upper, x)
    if crossing is not None:
        where, values = crossing
        raise SpecificationError(f"{names[0]} is greater than {names[1]} at {where or 'every element'}: {values}")


def check_domain(domain: object, x: Tensor, name: str) -> None:
    """Check that a domain is None or a pair of limits, in order, that broadcast to ``x``."""
    if domain is None:
        return
    if not isinstance(domain, (tuple, list)) or len(domain) != 2:
        raise SpecificationError(f"{name}: domain must be None or a pair (lower, upper), got {describe(domain)}")
    for limit, end in zip(domain, ("lower", "upper"), strict=True):
        _check_limit(limit, x, f"{name}: {end} end of the domain", finite=False)
    crossing = _crossing(*domain, x)
    if crossing is not None:
        where, values = crossing
        raise SpecificationError(f"{name}: domain is reversed{f' at {where}' if where else ''}: {values}")


def check_support(region: object, support: Callable[[Tensor, Tensor], object], x: Tensor, name: str) -> None:
    """Check what must hold for every support function, on plus and minus a coordinate and a random row.

    Args:
        region: whose support it is, for the message.
        support: ``(x, v) -> (rows, batch)``.
        x: the examples.
        name: what the user calls ``x``.
    """
    if x.numel() == 0:
        return
    label = f"{name}: {type(region).__name__}.support"
    rows = torch.zeros(2, x[:1].numel(), dtype=torch.float64)
    rows[0, 0] = 1
    rows[1] = torch.randn(rows.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = torch.cat([rows, -rows]).to(x).reshape(4, 1, *x.shape[1:]).expand(4, *x.shape)
    with torch.no_grad():
        values = support(x, v)
    expected = f"(rows, batch), here {(4, len(x))}"
    if not isinstance(values, Tensor):
        raise SpecificationError(f"{label} must return a tensor {expected}, got {type(values).__name__}")
    if values.shape != (4, len(x)):
        raise SpecificationError(f"{label} must have shape {expected}, got {tuple(values.shape)}")
    if not values.isfinite().all():
        where = first(~values.isfinite())
        raise SpecificationError(f"{label} is {values[tuple(where)].item()} for example {where[1].item()}; it must be finite")
    width = values[:2] + values[2:]
    tiny = torch.finfo(x.dtype).eps ** 0.5 * (values.abs().amax(0) + (v * x).abs().reshape(4, len(x), -1).sum(-1).amax(0))
    if (width < -tiny).any():
        where = first(width < -tiny)
        raise SpecificationError(
            f"{label}(x, v) + support(x, -v) = {width[tuple(where)].item():g} for example {where[1].item()}; "
            "it is the width of the region along v, never negative: the support is too small, or the region empty"
        )


def check_noise(region: object, x: Tensor, name: str) -> None:
    """Check on a few rows that a region's own noise is as wide as the region.

    Args:
        region: with ``noise`` and ``excess``.
        x: the examples.
        name: what the user calls ``x``.
    """
    if x.numel() == 0:
        return
    rows = torch.randn(4, x[:1].numel(), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = torch.cat([rows, torch.eye(rows.shape[1], dtype=torch.float64)[:4]]).to(x)
    v = v.reshape(len(v), 1, *x.shape[1:]).expand(-1, *x.shape)
    with torch.no_grad():
        noise = region.noise(x)
        order = 1 if noise.kind == "cauchy" else 2
        size = torch.linalg.vector_norm((v * noise.scale).reshape(*v.shape[:2], -1), order, dim=-1)
        excess = torch.maximum(region.excess(x, v), region.excess(x, -v))
    wrong = ~(excess <= size * (1 + 1e-3))
    if wrong.any():
        where = first(wrong)
        raise SpecificationError(
            f"{name}: {type(region).__name__}.noise is too small for example {where[1].item()}: along a random row the region "
            f"reaches {excess[tuple(where)].item():g} from its centre, the noise only {size[tuple(where)].item():g}"
        )


def check_inside(x: Tensor, domain: tuple[object, object] | None, name: str, *, reach: Tensor | float, advice: str) -> None:
    """Check that ``x`` is at most ``reach`` outside its domain, up to rounding; ``advice`` ends the message."""
    if domain is None:
        return
    low, high = (as_limit(limit, x).detach().expand_as(x) for limit in domain)
    values = x.detach()
    wrong = (values + reach < low - slack(low)) | (values - reach > high + slack(high))
    if wrong.any():
        where = first(wrong)
        value, *ends = (item[tuple(where)].item() for item in (values, low, high))
        found = f"{element(name, where)} = {value:g} is not in [{ends[0]:g}, {ends[1]:g}]"
        raise SpecificationError(f"{name}: example {where[0].item()} lies outside the domain: {found}; {advice}")


def slack(limit: Tensor) -> Tensor:
    """Return how far past a limit still counts as rounding; infinite limits need none."""
    return torch.where(limit.isfinite(), ROUNDING * limit.abs().clamp(min=1), 0)


def as_limit(limit: object, x: Tensor) -> Tensor:
    """Return one end of a box as a tensor of the dtype of ``x``, not yet broadcast."""
    return torch.as_tensor(limit, dtype=x.dtype, device=x.device)


def take_limit(limit: float | Tensor, index: Tensor, x: Tensor) -> float | Tensor:
    """Choose examples of a setting that broadcasts to ``x``; it then broadcasts to ``x[index]`` the same way."""
    if not isinstance(limit, Tensor) or limit.dim() == 0:
        return limit
    whole = limit.reshape(*(1,) * (x.dim() - limit.dim()), *limit.shape)
    return whole[index] if len(whole) == len(x) else whole


def broadcasts(value: Tensor, x: Tensor) -> bool:
    """Tell whether a tensor broadcasts to the shape of ``x``."""
    pairs = zip(reversed(value.shape), reversed(x.shape), strict=False)
    return value.dim() <= x.dim() and all(size in (1, wanted) for size, wanted in pairs)


def _check_limit(limit: object, x: Tensor, label: str, *, finite: bool) -> None:
    """Check that one end of a box is a number or a tensor that broadcasts to ``x``, and no NaN."""
    if isinstance(limit, Tensor):
        _check_tensor(limit, x, label)
        if not broadcasts(limit, x):
            raise SpecificationError(f"{label} has shape {tuple(limit.shape)}: it does not broadcast to {tuple(x.shape)}")
    elif not isinstance(limit, Real) or isinstance(limit, bool):
        raise SpecificationError(f"{label} must be a number or a tensor, got {type(limit).__name__}")
    values = as_limit(limit, x).detach()
    wrong = ~values.isfinite() if finite else values.isnan()
    if wrong.any():
        where = first(wrong)
        hint = "; unbounded regions are not supported" if finite and not values.isnan().any() else ""
        raise SpecificationError(f"{element(label, where)} = {values[tuple(where)].item():g} is not allowed{hint}")


def _crossing(lower: object, upper: object, x: Tensor) -> tuple[str, str] | None:
    """Return where the lower end of a box lies above the upper one by more than rounding, and both values, if it does."""
    low, high = torch.broadcast_tensors(as_limit(lower, x).detach(), as_limit(upper, x).detach())
    wrong = low > high + slack(high)
    if not wrong.any():
        return None
    where = first(wrong)
    return element("", where), f"{low[tuple(where)].item():g} > {high[tuple(where)].item():g}"


def _check_tensor(value: Tensor, x: Tensor, label: str) -> None:
    """Check dtype and device of a tensor that belongs to ``x``; plain scalars may live anywhere."""
    if not value.is_floating_point():
        raise SpecificationError(f"{label} has dtype {value.dtype}: convert to float, for example with .to({x.dtype})")
    if value.device != x.device and value.dim() > 0:
        raise SpecificationError(f"{label} is on {value.device} but the input is on {x.device}: move it with .to(x.device)")
