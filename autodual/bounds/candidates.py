"""Lines that a relaxed node may have in a linear program, and the one line on either side that its multipliers make of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from autodual.bounds.run import Lines, Run
from dual_layers import Interval, Slopes

NEGLIGIBLE = 1e-9
"""A share of a node's largest ``nu`` below which an element's own is taken for rounding."""

MOST_CANCELLED = 4.0
"""How many times their sum multipliers may amount to, for offsets to be mixed by them."""


@dataclass(frozen=True)
class Candidates:
    """The lines that a relaxed node may have in the program.

    Attributes:
        slopes: of each candidate, one tensor per perturbed input.
        lower: offsets from the reference point, ``[candidates, batch, features]``.
        upper: likewise.
        below: which lower lines are worth a constraint, shaped like these.
        above: which upper lines are.
        exact: whether the rule's offset of mixed slopes is never worse than the same mixture of offsets: it is where the offset
            is a minimum over the box, hence concave in the slopes, but not where it is the better of several bounds.
    """

    slopes: list[tuple[Tensor, ...]]
    lower: Tensor
    upper: Tensor
    below: Bool[Tensor, "candidates batch features"]
    above: Bool[Tensor, "candidates batch features"]
    exact: bool


def candidates(run: Run, name: str, cells: int) -> Candidates:
    """Collect the slopes that a node's rule knows of and find the offsets of each; adaptive ones come first.

    The last part of a composite operator has level lines too, at the ends of the whole operator's interval.
    """
    box, positionwise, slopes = _boxes(run, name), is_positionwise(run, name), _slopes(run, name, cells)
    level = name in run.program.enclosures and not run.strict and len(slopes) > 1
    exact = positionwise and not level
    with torch.set_grad_enabled(torch.is_grad_enabled() and not exact):  # offsets that are not mixed only serve the solver
        lines = [run.relate(name, Slopes(each, each), box, _everywhere(run, name)) for each in slopes]
    if level:
        hull, value = run.hull(name), run.values[name]
        slopes.append(tuple(torch.zeros_like(each) for each in slopes[0]))
        lines.append(Lines(None, (hull.lower - value).clamp(max=0), (hull.upper - value).clamp(min=0)))
    lower = torch.stack([run.examples(name, each.lower) for each in lines])
    upper = torch.stack([run.examples(name, each.upper) for each in lines])
    below, above = lower.isfinite(), upper.isfinite()
    if positionwise:
        (parent,) = run.program.parents[name]
        slope = torch.stack([run.examples(name, each.expand_as(run.values[name])) for (each,) in slopes])
        reach = [run.examples(parent, end - run.values[parent]) for end in (box[0].lower, box[0].upper)]
        below = below & ~_dominated([-(slope * end + lower) for end in reach])
        above = above & ~_dominated([slope * end + upper for end in reach])
    return Candidates(slopes, lower, upper, below, above, exact)


@torch.no_grad()
def _slopes(run: Run, name: str, cells: int) -> list[tuple[Tensor, ...]]:
    layer, box = run.layers[name], _boxes(run, name)
    adaptive, parallel = layer.slopes(box, "adaptive"), layer.slopes(box, "parallel")
    found = [adaptive.lower, adaptive.upper, parallel.lower, *layer.alternatives(box, cells)]
    slopes = [tuple(slope.nan_to_num(0.0, 0.0, 0.0) for slope in each) for each in found]
    return slopes if all(_can_mix(run, name, each) for each in slopes) else slopes[2:3]


def _everywhere(run: Run, name: str) -> Tensor:
    """Say that all lines are sloping: level ones are candidates of their own."""
    return run.values[name].new_ones((), dtype=torch.bool)


def _boxes(run: Run, name: str) -> tuple[Interval, ...]:
    """Return the boxes of a relaxed node's inputs."""
    return tuple(run.boxes[parent] for parent in run.program.parents[name])


def is_positionwise(run: Run, name: str) -> bool:
    """Whether a node has one input of its own shape and works element by element."""
    (parent, *others) = run.program.parents[name]
    return run.layers[name].facts.positionwise and not others and run.values[parent].shape == run.values[name].shape


def _dominated(ends: list[Tensor]) -> Bool[Tensor, "candidates batch features"]:
    """Mark upper lines, given by their values at both ends of a box, that another one lies below; of equals the first stays."""
    result = torch.zeros_like(ends[0], dtype=torch.bool)
    for number in range(len(result)):
        lower = torch.stack([end <= end[number] for end in ends]).all(0)
        equal = torch.stack([end == end[number] for end in ends]).all(0)
        equal[:number] = False
        result[number] = (lower & ~equal).any(0)
    return result


def _can_mix(run: Run, name: str, slopes: tuple[Tensor, ...]) -> bool:
    """Whether every element of the output may have lines of its own: not in a product of matrices, whose rows share slopes.

    Tried out, since offsets are mixed on the strength of it: is ``w * (slope . z) == (w * slope) . z`` for random ``w``, ``z``?
    """
    if is_positionwise(run, name):
        return True
    layer, seed = run.layers[name], torch.Generator().manual_seed(0)

    def draw(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=seed, dtype=torch.float64).to(slopes[0])

    weight, points = draw(run.values[name]), tuple(draw(z) for z in run.parents(name))
    try:
        mixed = layer.push(tuple(_weighed(run, name, weight, slope) for slope in slopes), points)
    except (RuntimeError, ValueError, IndexError):
        return False
    plain = weight * layer.push(slopes, points)
    return mixed.shape == plain.shape and torch.allclose(mixed, plain, rtol=1e-4, atol=1e-5 * float(1 + plain.abs().max()))


def _broadcasts(value: Tensor, like: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(value.shape, like.shape) == like.shape
    except RuntimeError:
        return False


def _weighed(run: Run, name: str, weight: Tensor, slope: Tensor) -> Tensor:
    """Multiply slopes by a weight for each element of the output, be it one of a reduction."""
    if _broadcasts(slope, weight):
        return weight * slope
    return run.layers[name].pull(weight[None], Slopes((slope,), (slope,)), run.parents(name))[0][0]


def _mixed(run: Run, name: str, slopes: list[tuple[Tensor, ...]], weights: Tensor) -> tuple[Tensor, ...]:
    """Combine slopes by weights ``[candidates, batch, features]`` that sum to one."""
    if len(slopes) == 1:
        return slopes[0]
    nodes = run.node(name, weights, 1)
    parts = [tuple(_weighed(run, name, weight, slope) for slope in each) for weight, each in zip(nodes, slopes, strict=True)]
    return tuple(sum(part) for part in zip(*parts, strict=True))


def mixture(run: Run, name: str, known: Candidates, below: Tensor, above: Tensor) -> Lines:
    """Turn multipliers of lines, ``[candidates, batch, features]``, into a node's two lines.

    Where ``nu > 0`` its lower line counts. Both of these lie below the function, and the second is never the worse of the two,
    but where a rule's offset is not concave in the slopes:

        nu z  >=  sum below (slope z_in + lower) - sum above (slope z_in + upper)     =  nu (mean slope) z_in + ...
        nu z  >=  nu (mean slope) z_in + nu (the rule's own offset for that slope)
    """
    nu = below.sum(0) - above.sum(0)
    least = NEGLIGIBLE * nu.abs().amax(-1, keepdim=True)
    safe = torch.where(nu == 0, 1.0, nu)
    shares, default = (below - above) / safe, torch.zeros_like(below)
    default[0] = 1.0
    other = default.roll(min(1, len(default) - 1), 0)
    lower = _mixed(run, name, known.slopes, torch.where(nu > least, shares, default))
    upper = _mixed(run, name, known.slopes, torch.where(nu < -least, shares, other))
    lines = run.relate(name, Slopes(lower, upper), _boxes(run, name), _everywhere(run, name))
    if known.exact:
        return lines
    offset = ((below * _finite(known.lower) - above * _finite(known.upper)) / safe).sum(0)
    # Shares that cancel would also multiply what rounding does to slopes.
    usable = ((below + above).sum(0) <= MOST_CANCELLED * nu.abs()) & (len(known.slopes) > 1)
    floor = torch.where(usable & (nu > least), offset, -torch.inf).clamp(max=0)
    ceiling = torch.where(usable & (nu < -least), offset, torch.inf).clamp(min=0)
    return replace(
        lines, lower=torch.fmax(lines.lower, run.node(name, floor)), upper=torch.fmin(lines.upper, run.node(name, ceiling))
    )


def _finite(offset: Tensor) -> Tensor:
    return torch.where(offset.isfinite(), offset, 0.0)
