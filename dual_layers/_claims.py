"""What a rule claims and the checker tries to break: duality, tightness, facts and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dual_layers._probes import (
    CHOICES,
    Boxes,
    Case,
    Probe,
    Tensors,
    at_most,
    clamp,
    constants_of,
    flat,
    join,
    map_tensors,
    require,
    same,
    slack,
)
from dual_layers.contract import Interval, Slopes
from dual_layers.families import Affine, PiecewiseLinear, Relaxed

STEP = 1e-6  # of finite differences in float64


def check_duality(case: Case) -> None:
    """The promise under which dual layers compose: ``nu_out.f(z) >= nu_in.z - h`` for all z, with equality for affine rules."""
    require(case.layer.facts.affine == isinstance(case.layer, Affine), "facts.affine and the family Affine must go together")
    if isinstance(case.layer, Affine):
        _affine_duality(case, case.layer)
    if isinstance(case.layer, Relaxed):
        _relaxed_duality(case, case.layer)
    if isinstance(case.layer, PiecewiseLinear):
        _infinite_boxes(case, case.layer)


def _affine_duality(case: Case, layer: Affine) -> None:
    matrix, zero, tolerance = case.matrix, case.zero, case.tolerance
    for probe in case.probes:
        moved = (flat(probe.points).to(matrix.dtype) @ matrix.T).reshape(probe.values.shape)
        same(probe.values - zero, moved, probe.allowance, "f(z) - f(0) is not A z with A = f(e_i) - f(0)", probe.locate)
    tangents = tuple(case.normal(shape) for shape in case.sample.shapes)
    moved = layer.linear(*tangents)
    size = case.apply(matrix.abs(), tuple(t.abs() for t in tangents)) + zero.abs() + 1
    same(moved, case.apply(matrix, tangents), tolerance * size, "linear(t) against f(t) - f(0)")
    lengths = tuple(t.abs() for t in tangents)
    norms = layer.euclidean(*lengths)
    if norms is not None:
        expected = (case.matrix * join(lengths).to(matrix.dtype)).norm(dim=1).reshape(norms.shape)
        same(norms.to(matrix.dtype), expected, tolerance * size, "euclidean(t) against the norms of the rows of A diag(t)")
    nu = case.rows(signed=False)
    expected, allowance = flat((nu,)) @ matrix, tolerance * (flat((nu,)).abs() @ matrix.abs() + 1)
    for inputs in (case.inputs(), tuple(torch.zeros_like(t) for t in tangents)):  # only the inputs' shape may matter
        pulled = tuple(layer.transpose(nu, inputs))
        for part, z in zip(pulled, inputs, strict=True):
            require(part.shape == (len(nu), *z.shape), f"transpose gives {tuple(part.shape)}, expected {(len(nu), *z.shape)}")
        same(flat(pulled).to(matrix.dtype), expected, allowance, "transpose(nu) against the operator's finite differences")
    _windows_agree(layer, nu, pulled, allowance)
    size = flat((nu,)).abs() @ size.flatten() + 1
    pairs = flat((nu,)) @ moved.flatten(), flat(pulled).to(matrix.dtype) @ join(tangents).to(matrix.dtype)
    same(*pairs, tolerance * size, "<A t, nu> = <t, A^T nu>")


def _windows_agree(layer: Affine, nu: Tensor, pulled: tuple[Tensor, ...], allowance: Tensor) -> None:
    """Windows that are put where the field says are the transpose; phases that are woven together are the windows."""
    field = layer.field()
    if field is None:
        return
    axes = len(field.stride)
    rows = nu.reshape(-1, *nu.shape[-axes - 1 :])
    windows = layer.pull_windows(rows)
    expected = pulled[0].reshape(-1, *pulled[0].shape[-axes - 1 :])
    sides = zip(field.padding, windows.shape[2:], expected.shape[2:], strict=True)
    placed = F.pad(windows, [side for p, w, n in reversed(list(sides)) for side in (-p, n + p - w)])
    same(placed, expected, allowance.reshape(expected.shape), "pull_windows(nu), cut out by the field, against the transpose")
    if not layer.has_phases():
        return
    phases = layer.pull_in_phases(rows)
    order = (0, 1, *(axis for i in range(axes) for axis in (2 + axes + i, 2 + i)))
    sizes = [s * n for s, n in zip(field.stride, phases.shape[2 + axes :], strict=True)]
    woven = phases.permute(order).reshape(*phases.shape[:2], *sizes)
    beyond = [side for w, n in reversed(list(zip(windows.shape[2:], sizes, strict=True))) for side in (0, n - w)]
    same(
        woven,
        F.pad(windows, beyond),
        allowance.max().expand(woven.shape),
        "pull_in_phases(nu), woven, against pull_windows(nu)",
    )


def _relaxed_duality(case: Case, layer: Relaxed) -> None:
    nu = case.rows(signed=True)
    for probe in case.probes:
        for name, slopes in _all_slopes(case, layer, probe.boxes):
            difference, allowance = slack(case, layer, probe, nu, slopes)

            def where(index: tuple[int, ...], name: str = name, probe: Probe = probe) -> str:
                output = tuple(nu[index[0]].nonzero()[0].tolist()) if nu[index[0]].any() else ()
                return f"{name} slopes, row {index[0]} of nu, {probe.locate((index[1], *output))}"

            at_most(-difference, torch.zeros_like(difference), allowance, "nu_in.z - h exceeds nu_out.f(z)", where)


def _all_slopes(case: Case, layer: Relaxed, boxes: Boxes) -> Iterator[tuple[str, Slopes]]:
    """Yield the rule's own choices and random slopes: every slope is dual feasible, so every slope must be sound."""
    for choice in CHOICES:
        slopes = layer.slopes(boxes, choice)
        require(choice != "parallel" or slopes.parallel, 'slopes for "parallel" must use one tuple for both lines')
        yield choice, slopes
    lower = tuple(case.normal(tuple(slope.shape)) for slope in slopes.lower)
    yield "random", Slopes(lower, tuple(case.normal(tuple(slope.shape)) for slope in slopes.upper))
    yield "random parallel", Slopes(lower, lower)


def _infinite_boxes(case: Case, layer: PiecewiseLinear) -> None:
    """Unbounded boxes must give sound lines, never NaN; a line's offset may itself be infinite."""
    inner = case.probes[0]
    box, share = inner.boxes[0], case.rand(tuple(inner.boxes[0].lower.shape))
    open_box = Interval(torch.where(share < 0.6, -torch.inf, box.lower), torch.where(share > 0.4, torch.inf, box.upper))
    if layer.forward(open_box.lower).isnan().any() or layer.forward(open_box.upper).isnan().any():
        return  # the operator itself has no value at infinity
    probe = replace(inner, name="unbounded", boxes=(open_box,))
    for choice in CHOICES:
        slopes = layer.slopes((open_box,), choice)
        offsets = layer.conjugate(slopes, (open_box,))
        lower, upper = slopes.lower[0] * probe.points[0] + offsets.lower, slopes.upper[0] * probe.points[0] + offsets.upper
        at_most(lower, probe.values, probe.allowance, f"{choice} lower line above the operator", probe.locate)
        at_most(probe.values, upper, probe.allowance, f"{choice} upper line below the operator", probe.locate)
    ends = layer.interval(open_box)
    at_most(ends.lower, probe.values, probe.allowance, "interval above the operator", probe.locate)
    at_most(probe.values, ends.upper, probe.allowance, "interval below the operator", probe.locate)


def check_tightness(case: Case) -> None:
    """Exact where declared, attained where sampling is dense enough to tell, and exact in the limit of a shrinking box."""
    layer = case.layer
    for probe in case.probes:
        box = layer.interval(*probe.boxes)
        if isinstance(layer, Affine):
            radii = tuple(b.radius for b in probe.boxes)
            smallest, largest = case.apply(case.matrix.abs(), radii), case.coarse(radii)
            at_most(smallest, box.radius, probe.allowance, f"|A| r exceeds the interval's radius, box '{probe.name}'")
            at_most(box.radius, largest, probe.allowance, f"the interval's radius exceeds |A| r, box '{probe.name}'")
        if layer.facts.monotone:
            same(box.lower, probe.values[0], probe.allowance, f"interval of a monotone operator, lower end, box '{probe.name}'")
            same(box.upper, probe.values[1], probe.allowance, f"interval of a monotone operator, upper end, box '{probe.name}'")
    if isinstance(layer, Affine) and type(layer).magnitude is not Affine.magnitude:
        radii = tuple(case.rand(shape) for shape in case.sample.shapes)
        smallest, moved = case.apply(case.matrix.abs(), radii), layer.magnitude(*radii)
        at_most(smallest, moved, case.tolerance * (smallest + 1), "|A| r exceeds magnitude(r)")
        at_most(moved, case.coarse(radii), case.tolerance * (smallest + 1), "magnitude(r) exceeds |A| r")
    if isinstance(layer, Relaxed):
        if layer.facts.positionwise and layer.looseness is not None:
            _attained(case, layer, layer.looseness)
        if layer.facts.exact_when_stable:
            _exact_when_stable(case, layer)
        _shrinking(case, layer)


def _attained(case: Case, layer: Relaxed, part: float) -> None:
    """Element by element a grid shows the true range: nothing may be looser than that by more than the part declared."""
    for probe in case.probes:
        if probe.name not in ("random", "straddling", "mixed"):
            continue
        box = probe.boxes[0]
        shares = torch.linspace(0, 1, 65, dtype=case.dtype, device=case.device)
        grid = torch.stack([clamp(box.lower + share * box.width, box) for share in shares])
        if isinstance(layer, PiecewiseLinear) and layer.jumps():  # a jump within rounding of an end counts as inside
            beside = torch.nextafter(box.lower, box.lower - 1), torch.nextafter(box.upper, box.upper + 1)
            grid = torch.cat([grid, torch.stack(beside)])
        points = torch.cat([probe.points[0], grid])
        values = torch.cat([probe.values, torch.stack([case.call(z) for z in grid])])
        dense = replace(probe, points=(points,), values=values)
        ends = layer.interval(box)
        _touches(dense, values - ends.lower, part, "interval's lower end")
        _touches(dense, ends.upper - values, part, "interval's upper end")
        for name, slopes in _all_slopes(case, layer, probe.boxes):
            offsets = layer.conjugate(slopes, probe.boxes)
            allowed = replace(
                dense, allowance=probe.allowance + case.tolerance * (slopes.lower[0].abs() + slopes.upper[0].abs()) * 10
            )
            _touches(
                allowed, values - slopes.lower[0] * points - offsets.lower, part, f"offset of the lower line, {name} slopes"
            )
            _touches(
                allowed, offsets.upper + slopes.upper[0] * points - values, part, f"offset of the upper line, {name} slopes"
            )


def _touches(probe: Probe, distance: Tensor, part: float, what: str) -> None:
    nearest, spread = distance.amin(0), distance.amax(0) - distance.amin(0)
    at_most(
        nearest, part * spread, probe.allowance, f"{what} is not attained: distance", lambda index: probe.locate((0, *index))
    )


def _exact_when_stable(case: Case, layer: Relaxed) -> None:
    settled_somewhere = False
    nu = torch.eye(case.zero.numel(), device=case.device, dtype=case.dtype).reshape(-1, *case.zero.shape)
    for probe in case.probes:
        undecided = layer.undecided(probe.boxes)
        require(
            undecided.shape == case.zero.shape,
            f"undecided has shape {tuple(undecided.shape)}, expected {tuple(case.zero.shape)}",
        )
        settled = ~undecided.flatten()
        settled_somewhere |= bool(settled.any())
        for choice in CHOICES if settled.any() else ():
            for sign in (1, -1):
                rows = sign * nu[settled]
                gap, allowance = slack(case, layer, probe, rows, layer.slopes(probe.boxes, choice))
                what = f"{choice} lines leave a gap where undecided is false, box '{probe.name}'"
                at_most(gap, torch.zeros_like(gap), allowance, what)
    require(settled_somewhere, "exact_when_stable is declared, but undecided is true on every box")


def _shrinking(case: Case, layer: Relaxed) -> None:
    """From a box of width 0.1 to one of 1e-5 every width must fall at least twentyfold, unless it is zero to rounding."""
    low, high = case.domain
    centers = tuple(z.clamp(low + 0.05, high - 0.05) if high - low > 0.2 else z for z in case.inputs())
    found: list[Tensors] = []
    for half in (5e-2, 5e-6):
        boxes = tuple(Interval((z - half).clamp(min=low), (z + half).clamp(max=high)) for z in centers)
        offsets = layer.conjugate(layer.slopes(boxes, "parallel"), boxes)
        found.append((layer.interval(*boxes).width, offsets.upper - offsets.lower))
    size = case.tolerance * (1 + max(abs(low), abs(high)) + layer.forward(*centers).abs())
    for what, wide, narrow in zip(("interval", "gap of parallel lines"), found[0], found[1], strict=True):
        at_most(narrow, 0.05 * wide, 8 * size, f"{what} does not shrink with the box")


def check_facts(case: Case) -> None:
    """Every declared fact, and the undeclared ones whose absence would be unsafe."""
    facts, first = case.layer.facts, case.probes[0]
    for probe in case.probes if facts.monotone else ():
        at_most(probe.values[0], probe.values, probe.allowance, "monotone is declared, but f(lower) > f(z)", probe.locate)
        at_most(probe.values, probe.values[1], probe.allowance, "monotone is declared, but f(z) > f(upper)", probe.locate)
    if facts.convex:
        for probe in case.probes:
            for share in (0.25, 0.5):
                mixed = tuple(
                    clamp(share * z[0] + (1 - share) * z[1], box) for z, box in zip(probe.points, probe.boxes, strict=True)
                )
                chord = share * probe.values[0] + (1 - share) * probe.values[1]
                at_most(
                    case.call(*mixed),
                    chord,
                    probe.allowance,
                    f"convex is declared, but f lies above its chord, box '{probe.name}'",
                )
    if facts.positionwise:
        require(
            case.zero.shape == tuple(case.sample.shapes[0]), "positionwise is declared, but input and output differ in shape"
        )
        for _ in range(3):
            kept = case.rand(case.sample.shapes[0]) < 0.5
            moved = case.call(torch.where(kept, first.points[0][0], first.points[0][1]), *(z[1] for z in first.points[1:]))
            what = "positionwise is declared, but another position or another input matters"
            same(moved[kept], first.values[0][kept], first.allowance[kept], what)
    if facts.selection:
        require(bool(((case.matrix != 0).sum(1) <= 1).all()), "selection is declared, but A has two entries in a row")
    if facts.injective:
        hits = case.matrix != 0
        require(
            bool((hits.sum(0) <= 1).all() and (hits.sum(1) <= 1).all()),
            "injective is declared, but A has two entries in a row or column",
        )
    if facts.elementwise and len(case.sample.shapes) == 1 and case.zero.shape == tuple(case.sample.shapes[0]):
        diagonal = torch.diag(case.matrix.diagonal())
        require(bool((case.matrix == diagonal).all()), "elementwise is declared, but A is not diagonal")
    _memory(case)


def _memory(case: Case) -> None:
    inputs = case.inputs()
    before = [z.clone() for z in inputs]
    whole = replace(case.call, item=None)(*inputs)
    tuples = isinstance(whole, (tuple, list))
    require(
        tuples == case.layer.facts.outputs_tuple,
        f"the operator {'returns' if tuples else 'does not return'} a tuple; outputs_tuple says otherwise",
    )
    outputs: list[Tensor] = []
    map_tensors(outputs.append, whole)
    owned = {z.untyped_storage().data_ptr() for z in inputs if z.numel()}
    shared = any(out.untyped_storage().data_ptr() in owned for out in outputs if out.numel())
    require(case.layer.facts.aliases or not shared, "the result shares memory with an input, but aliases is not declared")
    require(all(torch.equal(z, old) for z, old in zip(inputs, before, strict=True)), "the operator changed its input")


def check_gradient(case: Case) -> None:
    """Derivatives in bounds, rows, tangents and constants agree with finite differences, and are finite at kinks."""
    with torch.enable_grad():
        constants = _trainable(case)
        if case.dtype == case.zero.dtype == torch.float64:  # coarser numbers are too noisy to divide by a small step
            _against_differences(case, constants)
        awkward = ("mixed",) if isinstance(case.layer, Affine) else ("kinks", "point", "tiny", "mixed")
        for probe in case.probes:
            if probe.name in awkward:
                _finite(case, probe, constants)


def _trainable(case: Case) -> list[Tensor]:
    """Let the constants ask for gradients; keep those that the operator itself passes one to."""
    inputs, kept = case.inputs(), []
    constants = constants_of(case.layer.call)
    for constant in constants:
        constant.requires_grad_(False)
    for constant in constants:
        constant.requires_grad_(True)
        try:
            value = case.layer.forward(*inputs)
            grads = torch.autograd.grad(value.sum(), [constant], allow_unused=True) if value.requires_grad else (None,)
        except RuntimeError:  # running statistics have no derivative in torch
            grads = (None,)
        constant.requires_grad_(False)
        kept += [constant] if grads[0] is not None else []
    for constant in kept:
        constant.requires_grad_(True)
    return kept


def _leaves(case: Case, boxes: Boxes) -> tuple[Boxes, Tensor, Tensors, list[Tensor]]:
    grow = lambda tensor: tensor.detach().clone().requires_grad_(True)  # noqa: E731
    boxes = tuple(Interval(grow(box.lower), grow(box.upper)) for box in boxes)
    nu, tangents = grow(case.rows(signed=False)[-3:]), tuple(grow(case.normal(shape)) for shape in case.sample.shapes)
    return boxes, nu, tangents, [*(end for box in boxes for end in (box.lower, box.upper)), nu, *tangents]


def _against_differences(case: Case, constants: list[Tensor]) -> None:
    """One random direction, every output. Elements whose one-sided differences disagree sit at a kink and are left out."""
    boxes, nu, tangents, variables = _leaves(case, case.probes[0].boxes)
    variables = [variable for variable in variables + constants if variable.numel()]
    direction = [case.normal(tuple(variable.shape)) for variable in variables]
    start = [variable.detach().clone() for variable in variables]

    @torch.no_grad()
    def outputs_at(step: float) -> dict[str, Tensors]:
        for variable, origin, towards in zip(variables, start, direction, strict=True):
            variable.copy_(origin + step * towards)
        return map_tensors(torch.clone, case.outputs(case.layer, boxes, nu, tangents))  # a view would move along

    after, before, _ = outputs_at(STEP), outputs_at(-STEP), outputs_at(0.0)
    now = case.outputs(case.layer, boxes, nu, tangents)
    for name, outputs in now.items():
        total, expected, size, smooth = 0.0, 0.0, 1.0, 0
        for here, ahead, behind in zip(outputs, after[name], before[name], strict=True):
            right, left = (ahead - here.detach()) / STEP, (here.detach() - behind) / STEP
            keep = (right - left).abs() <= 1e-4 * (1 + right.abs() + left.abs())
            here, right, left = (torch.where(keep, part, 0.0) for part in (here, right, left))  # infinite ends have none
            weight = torch.where(keep, case.normal(tuple(here.shape)).to(here.dtype), 0.0)
            total = total + (weight * here).sum()
            expected += (weight * (right + left) / 2).sum().item()
            size += (weight * right).abs().sum().item()
            smooth += int(keep.sum())
        require(smooth > 0 or not any(here.numel() for here in outputs), f"{name}: nowhere differentiable in the bounds")
        grads = torch.autograd.grad(total, variables, allow_unused=True, retain_graph=True) if total.requires_grad else ()
        moved = sum((grad * towards).sum().item() for grad, towards in zip(grads, direction, strict=False) if grad is not None)
        require(abs(moved - expected) <= 1e-4 * size, f"{name}: derivative {moved:.9g}, finite differences say {expected:.9g}")


def _finite(case: Case, probe: Probe, constants: list[Tensor]) -> None:
    boxes, nu, tangents, variables = _leaves(case, probe.boxes)
    variables = variables + constants
    totals = {name: sum(part.sum() for part in said) for name, said in case.outputs(case.layer, boxes, nu, tangents).items()}
    totals = {name: total for name, total in totals.items() if total.requires_grad}
    if totals and not _has_finite_gradient(sum(totals.values()), variables):  # one pass for all, then one for each
        for name, total in totals.items():
            finite = _has_finite_gradient(total, variables)
            require(finite, f"{name}: gradient in bounds, rows or constants is not finite, box '{probe.name}'")


def _has_finite_gradient(total: Tensor, variables: list[Tensor]) -> bool:
    grads = torch.autograd.grad(total, variables, allow_unused=True, retain_graph=True)
    return all(grad is None or bool(grad.isfinite().all()) for grad in grads)
