"""The schedule: bound the inputs of nonlinear nodes in topological order, then fix their lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from autodual.bounds.backward import Deviation, backward
from autodual.bounds.forward import NoiseSymbols
from autodual.bounds.pairs import PairWalk, choose_walk
from autodual.bounds.projected import Projections
from autodual.bounds.run import ROUNDINGS, Lines, Run, identity_rows, meet
from autodual.errors import AutoDualError, SpecificationError
from autodual.methods import IBP, Adaptive, Dual, Method, Projected
from dual_layers import NONE, Interval

STORED = 16
"""How many memory budgets a loss may take: what is kept for derivatives need not stay in fast memory."""

Forward = NoiseSymbols | Projections


def relax(run: Run, method: Method, target: str) -> Projections | None:
    """Fix the lines of every nonlinear ancestor of a node.

    Args:
        run: filled in: boxes of the nodes that needed them, lines of the nonlinear ones.
        method: how to bound.
        target: the node that is to be bounded afterwards.

    Returns:
        The random projections, if the method has any.
    """
    run.bind_template()
    ancestors = run.needed(target)
    run.strict = not isinstance(method, IBP) and method.strict
    run.layout = method.rows if isinstance(method, (Dual, Adaptive)) else "auto"
    forward = _forward_walk(run, method, target)
    for name in run.program.relaxed:
        if name not in ancestors:
            continue
        if isinstance(method, IBP):
            _relax_constant(run, name)
            continue
        box = tuple(_bound_input(run, parent, method, forward) for parent in run.program.parents[name])
        slopes = run.layers[name].slopes(box, "adaptive" if isinstance(method, Adaptive) else "parallel")
        if forward is not None and not slopes.parallel:
            rule = type(run.layers[name]).__name__
            raise AutoDualError(f'{rule}.slopes gave two slopes where "parallel" was asked for: this method needs one')
        run.lines[name] = run.relate(name, slopes, box)
    return forward if isinstance(forward, Projections) else None


def _forward_walk(run: Run, method: Method, target: str) -> Forward | None:
    if isinstance(method, Projected):
        if run.batch > method.examples > 1:
            raise SpecificationError(
                f"delta is to cover {method.examples} examples together, but there are {run.batch} of them"
            )
        projections = Projections(run, method, _asked(run, method, target))
        run.sampling = projections.sampling
        return projections
    if isinstance(method, Dual) and method.walk == "forward":
        return NoiseSymbols(run, _asked(run, method, target))
    return None


def _asked(run: Run, method: Dual | Projected, target: str) -> tuple[str, ...]:
    """Name the nodes that a forward walk will be asked to bound on the way to a target, itself left out."""
    ancestors, found = run.needed(target), {}
    inputs = [parent for name in run.program.relaxed if name in ancestors for parent in run.program.parents[name]]
    for name in inputs:
        while not _taken_exactly(run, name, method) and _repeats(run, name):
            (name,) = run.program.parents[name]
        if not _taken_exactly(run, name, method):
            found[name] = None
    return tuple(found)


def _relax_constant(run: Run, name: str) -> None:
    for parent in run.program.parents[name]:
        run.boxes.setdefault(parent, run.hull(parent))
        run.how.setdefault(parent, "interval")
    _back_into_the_domain(run, name)
    box, value = run.hull(name), run.values[name]
    run.lines[name] = Lines(None, (box.lower - value).clamp(max=0), (box.upper - value).clamp(min=0))


def _back_into_the_domain(run: Run, name: str) -> None:
    """Where intervals leave an operator's domain, bound its inputs by the dual network: for those examples alone."""
    parents = run.program.parents[name]
    outside = run.layers[name].outside(*(run.boxes[parent] for parent in parents)).expand_as(run.values[name])
    if not outside.any():
        return
    lost, anew = run.examples(name, outside).any(1), replace(run, boxes={}, hulls={}, lines={}, how={})
    for parent in parents:
        relax(anew, Dual(), parent)
        tight, loose = meet(_bound_input(anew, parent, Dual(), None), run.boxes[parent]), run.boxes[parent]
        pairs = ((run.examples(parent, getattr(box, end)) for box in (tight, loose)) for end in ("lower", "upper"))
        ends = (run.node(parent, torch.where(lost[:, None], *pair)) for pair in pairs)
        run.boxes[parent], run.how[parent] = Interval(*ends), "interval, or dual where that leaves a domain"
        run.forget_behind(parent)


def _bound_input(run: Run, name: str, method: Dual | Adaptive | Projected, forward: Forward | None) -> Interval:
    """Bound a nonlinear node's input, element by element, as far as its consumers have use for."""
    if name not in run.boxes:
        if isinstance(method, (Dual, Adaptive)) and method.intermediate == "interval":
            run.boxes[name], run.how[name] = run.hull(name), "interval"
        elif _taken_exactly(run, name, method):
            run.boxes[name], run.how[name] = run.hull(name), "interval, exact"
        elif _repeats(run, name):
            parent = run.program.parents[name][0]
            box = _bound_input(run, parent, method, forward)
            run.boxes[name], run.how[name] = run.rounded(name, run.layers[name].interval(box)), f"as {parent}"
        elif isinstance(forward, Projections):
            run.boxes[name], run.how[name] = _from_projections(run, name, method, forward)
        elif forward is not None:
            run.boxes[name], run.how[name] = _from_symbols(run, name, method, forward)
        else:
            run.boxes[name], run.how[name] = _from_rows(run, name, method)
        if name not in run.program.sources and method.guarantee != NONE and _feeds_a_jump(run, name):
            run.boxes[name] = _with_allowance(run, name, run.boxes[name])
        if run.boxes[name] is not run.hulls.get(name):
            run.forget_behind(name)
    return run.boxes[name]


def _is_exact(run: Run, name: str) -> bool:
    """Whether interval arithmetic bounds a node exactly."""
    separable = all(run.regions[source].separable for source in run.program.sources if source in run.needed(name))
    return name in run.program.sources or (separable and name in run.exact_intervals)


def _taken_exactly(run: Run, name: str, method: Method) -> bool:
    """Whether a node is left to interval arithmetic, which is exact there, unless the method estimates all the same."""
    wants_all = isinstance(method, Projected) and not method.first_exact
    return name in run.program.sources or (not wants_all and _is_exact(run, name))


def _repeats(run: Run, name: str) -> bool:
    """Whether every element of a node is an element of its parent, and some may be so more than once: windows, broadcasting."""
    facts, parents = run.layers[name].facts, run.program.parents[name]
    grows = len(parents) == 1 and run.features(name) > run.features(parents[0])
    return (facts.selection and len(parents) == 1) or (facts.elementwise and grows)


def wanted_rows(run: Run, name: str) -> Tensor | None:
    """Tell which elements of a bounded node may profit from rows that climb, ``[batch, features]``; None where none is walked.

    Boxes of repeated elements follow their parent's, and those that feed a jump carry an allowance of their own.
    """
    if _taken_exactly(run, name, Adaptive()) or _repeats(run, name) or _feeds_a_jump(run, name):
        return None
    return _wanted(run, name, Adaptive())


def _wanted(run: Run, name: str, method: Dual | Adaptive | Projected) -> Tensor:
    """Tell which elements need more than their interval bounds: ``[batch, features]``."""
    if method.strict:
        return torch.ones(run.batch, run.features(name), dtype=torch.bool, device=run.values[name].device)
    wanted = torch.zeros_like(run.values[name], dtype=torch.bool)
    for consumer, rule in run.program.rules.items():
        parents = run.program.parents[consumer]
        if name in parents and not rule.facts.affine:
            undecided = run.layers[consumer].undecided(tuple(run.hull(parent) for parent in parents))
            wanted = wanted | (undecided if undecided.shape == wanted.shape else True)
        elif name in parents and _repeats(run, consumer):
            wanted = wanted | _origins(run, consumer, run.node(consumer, _wanted(run, consumer, method)))
    return run.examples(name, wanted & _improvable(run, name))


def _origins(run: Run, name: str, chosen: Tensor) -> Tensor:
    """Tell which elements of its parent the chosen elements of a node repeat."""
    value = run.values[name].detach()
    weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device)  # so that no two cancel
    with torch.no_grad():
        rows = run.layers[name].transpose((weights.reshape(value.shape) * chosen)[None], run.parents(name))
    return rows[0][0] != 0


def _improvable(run: Run, name: str) -> Tensor:
    """Tell which elements a row may bound more tightly than intervals do.

    Not where they have no width; nor behind a function of one element whose own input is known by a row, for such a row
    goes through that function's lines, which lie outside its range.
    """
    hull = run.hull(name)
    result = ~(hull.lower >= hull.upper)
    layer = run.layers.get(name)
    if layer is not None and layer.facts.positionwise and not layer.facts.affine:
        (parent,) = run.program.parents[name]
        if _is_exact(run, parent):
            return torch.zeros_like(result)
        if parent in run.boxes:
            return result & ~layer.undecided((run.boxes[parent],))
    return result


def _from_rows(run: Run, name: str, method: Dual | Adaptive) -> tuple[Interval, str]:
    wanted = _wanted(run, name, method)
    rows = wanted.any(0).nonzero()[:, 0]
    width, value = run.features(name), run.values[name]
    if not len(rows):
        return run.hull(name), "interval, stable"
    walk = choose_walk(run, name, wanted)
    if walk is not None:
        return _from_pairs(run, name, walk)

    def seeds(part: Tensor) -> Tensor:
        return run.layouts[name].node(identity_rows(width, part, value), _shared_shape(run, name), lead=1)

    deviation = in_chunks(run, name, rows, seeds)
    reference = run.examples(name, value)[:, rows]
    lower, upper = ((reference + end.T).to(value.dtype) for end in (deviation.lower, deviation.upper))
    how = f"{len(rows)} of {width} rows"
    if method.strict:
        return _interval(run, name, lower, upper), how
    return _merge(run, name, wanted, rows, lower, upper), how


def _from_pairs(run: Run, name: str, walk: PairWalk) -> tuple[Interval, str]:
    pairs, *deviations = walk.bounds()
    hull, reference = run.hull(name), run.examples(name, run.values[name])[pairs]
    ends = []
    for end, deviation in zip((hull.lower, hull.upper), deviations, strict=True):
        end = run.examples(name, end).expand(run.batch, -1)
        ends.append(end.index_put(pairs, (reference + deviation).to(end.dtype)))
    share = f"{len(pairs[0]) / max(run.batch, 1):.4g} of {run.features(name)} rows per example, {walk.largest}"
    return _interval(run, name, *ends), share


def _from_symbols(run: Run, name: str, method: Dual | Adaptive, symbols: NoiseSymbols) -> tuple[Interval, str]:
    lower, upper = (end.to(run.values[name].dtype) for end in symbols.bounds(name))
    how = f"{symbols.count} noise symbols"
    if method.strict:
        return _interval(run, name, lower, upper), how
    wanted = _wanted(run, name, method)
    every = torch.arange(run.features(name), device=wanted.device)
    return _merge(run, name, wanted, every, lower, upper), how


def _from_projections(run: Run, name: str, method: Projected, projections: Projections) -> tuple[Interval, str]:
    wanted = _wanted(run, name, method)
    columns = wanted.any(0).nonzero()[:, 0]
    if not len(columns):
        return run.hull(name), "interval, stable"
    width, reference = run.features(name), run.examples(name, run.values[name])
    if 2 * len(columns) > width:  # picking columns costs as much as reading them
        columns, every = torch.arange(width, device=columns.device), True
    else:
        every = False
    lower, upper = (end.to(reference.dtype) for end in projections.bounds(name, None if every else columns))
    how = f"{len(columns)} of {width} by {method.r} projections"
    how = "first affine segment, exact" if projections.knows(name) else how
    if method.strict:
        return _interval(run, name, lower, upper), how
    # The reference is a point of the region: an estimate that leaves it out is too narrow.
    reference = reference if every else reference[:, columns]
    box = _merge(run, name, wanted, columns, torch.minimum(lower, reference), torch.maximum(upper, reference))
    return meet(box, run.hull(name)), how


def _merge(run: Run, name: str, wanted: Tensor, rows: Tensor, lower: Tensor, upper: Tensor) -> Interval:
    """Take the rows where they were wanted, example by example, and the interval bounds elsewhere."""
    hull = run.hull(name)
    ends = []
    for end, row in ((hull.lower, lower), (hull.upper, upper)):
        end = run.examples(name, end).expand(run.batch, -1)
        if len(rows) < end.shape[1]:
            row = torch.where(wanted[:, rows], row, end[:, rows])
            ends.append(end.clone().index_copy_(1, rows, row))
        else:
            ends.append(torch.where(wanted, row, end))
    return _interval(run, name, *ends)


def _interval(run: Run, name: str, lower: Tensor, upper: Tensor) -> Interval:
    box = run.rounded(name, Interval(run.node(name, lower), run.node(name, upper)))
    return meet(box, run.hull(name)) if run.program.enclosures or _feeds_a_curve(run, name) else box


def _feeds_a_curve(run: Run, name: str) -> bool:
    """Whether a consumer profits from every narrowing, or has no value outside some interval, as a logarithm."""
    consumers = (layer for consumer, layer in run.layers.items() if name in run.program.parents[consumer])
    return any(not layer.facts.affine and not layer.facts.exact_when_stable for layer in consumers)


def _feeds_a_jump(run: Run, name: str) -> bool:
    """Whether a consumer jumps somewhere."""
    consumers = (layer for consumer, layer in run.layers.items() if name in run.program.parents[consumer])
    return any(not layer.facts.affine and not layer.continuous() for layer in consumers)


def _with_allowance(run: Run, name: str, box: Interval) -> Interval:
    """Move a box outwards, strict or not, by all that rounding may have cost on the way from the inputs.

    Elsewhere an end that is slightly off moves a bound slightly. On the wrong side of a jump it costs the jump's whole height,
    which no allowance for the output covers.
    """
    width, value = run.features(name), run.values[name]

    def seeds(part: Tensor) -> Tensor:
        return run.layouts[name].node(identity_rows(width, part, value), _shared_shape(run, name), lead=1)

    with torch.no_grad():
        deviation = in_chunks(run, name, torch.arange(width, device=value.device), seeds, magnitude=True)
        slack = run.node(name, allowance(run, run.examples(name, value).abs(), deviation)).to(value.dtype)
        slack = torch.where(slack.isnan(), torch.inf, slack)
    return Interval(box.lower - slack, box.upper + slack)


def allowance(run: Run, size: Tensor, deviation: Deviation) -> Tensor:
    """Return what float rounding may have cost rows, ``(batch, rows)``.

    Args:
        run: the run.
        size: sum of the magnitudes of the terms of each row's reference value, ``(batch, rows)``.
        deviation: of the rows, with its magnitude.
    """
    penalties = (len(run.lines) + 2) * deviation.lower.abs()
    return ROUNDINGS * run.coarsest * (size + (deviation.magnitude + penalties).T).detach()


def _shared_shape(run: Run, name: str) -> tuple[int, ...]:
    """Return the node's shape with a batch of one."""
    layout, shape = run.layouts[name], list(run.values[name].shape)
    shape[layout.axis] = layout.factor
    return tuple(shape)


def in_chunks(
    run: Run, name: str, rows: Tensor, seeds: Callable[[Tensor], Tensor], *, magnitude: bool = False, lower_only: bool = False
) -> Deviation:
    """Walk rows in chunks under the memory budget and glue the results.

    With gradients on, a chunk is recomputed in the backward pass instead of stored, unless one chunk holds all rows.

    Args:
        run: the run.
        name: the node the rows start at.
        rows: indices, split into chunks.
        seeds: turns a chunk of indices into ``nu``, ``[rows, *node]``.
        magnitude: as for ``backward``.
        lower_only: the upper ends may be missing (infinite) where they would cost a walk of their own.
    """

    def walk(part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Walk rows, and their negatives too where the lines are not parallel."""
        nu = seeds(part)
        found = backward(run, name, nu, magnitude=magnitude)
        upper, size = found.upper, found.lower if found.magnitude is None else found.magnitude
        if upper is None and lower_only:
            upper = torch.full_like(found.lower, torch.inf)
        elif upper is None:
            other = backward(run, name, -nu, magnitude=magnitude)
            upper = -other.lower
            size = size if other.magnitude is None else torch.maximum(size, other.magnitude)
        return found.lower, upper, size

    size = run.rows_per_chunk(name) * (STORED if torch.is_grad_enabled() else 1)
    if len(rows) <= size:
        return Deviation(*walk(rows))
    if torch.is_grad_enabled():
        run.settle()  # a recomputed chunk must find the same cached values as the first time
        parts = [checkpoint(walk, part, use_reentrant=False) for part in rows.split(size)]
        return Deviation(*(torch.cat(ends) for ends in zip(*parts, strict=True)))
    # Filled in place: small results kept between large temporaries would fragment the heap, chunk after chunk.
    found = [torch.empty(len(rows), run.batch, dtype=run.values[name].dtype, device=rows.device) for _ in range(3)]
    for start in range(0, len(rows), size):
        for whole, part in zip(found, walk(rows[start : start + size]), strict=True):
            whole[start : start + size] = part
    return Deviation(*found)
