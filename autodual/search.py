"""Descent inside regions: what every attack is made of.

The derivative of a support function is the point that attains it, so for every region

    d excess(x, v) / dv  =  argmax_{z in B(x)} v . z  -  center(x),     at v = -gradient,

is the way from the centre to its most promising point: half-widths times the gradient's sign for l_inf and boxes, the
normalised gradient for l2, the top coordinate for l1. A single step goes that way. Repeated steps keep its length, but
follow the gradient itself where the region is no box, or take steps of the region's own: on an l1 ball, jumping between
vertices hardly descends. A region that has a support function only is searched by Frank-Wolfe steps, which need no projection.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autodual.errors import SpecificationError
from autodual.regions import Region

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
Regions = Region | Mapping[str, Region]
Key = int | str


@dataclass(frozen=True)
class Problem:
    """The model's arguments, and the regions of those that move, by position or name."""

    model: Callable[..., Tensor]
    x: Inputs
    regions: dict[Key, Region]

    @staticmethod
    def build(model: Callable[..., Tensor], x: Inputs, region: Regions) -> Problem:
        """Find out which arguments a region belongs to: all floating ones unless it is a dict by name."""
        keys = _names(model, x)
        if isinstance(region, Mapping):
            unknown = [name for name in region if name not in keys]
            if unknown:
                raise SpecificationError(f"region names {unknown}, but the model's arguments are {list(keys)}")
            return Problem(model, x, {keys[name]: part for name, part in region.items()})
        values = {key: _pick(x, key) for key in keys.values()}
        floating = [key for key, value in values.items() if isinstance(value, Tensor) and value.is_floating_point()]
        return Problem(model, x, dict.fromkeys(floating, region))

    @property
    def device(self) -> torch.device | None:
        """Where the moving arguments are."""
        return next((self.at(key).device for key in self.regions), None)

    def at(self, key: Key) -> Tensor:
        """Return the argument that the region with this key belongs to."""
        return _pick(self.x, key)

    def form(self, points: Mapping[Key, Tensor]) -> Any:
        """Put moved arguments beside the fixed ones, in the form of ``x``."""
        if isinstance(self.x, Tensor):
            return points[0]
        if isinstance(self.x, Mapping):
            return {key: points.get(key, value) for key, value in self.x.items()}
        return tuple(points.get(position, value) for position, value in enumerate(self.x))

    def outputs(self, points: Mapping[Key, Tensor]) -> Tensor:
        """Run the model."""
        return run_on_copies(self.model, self.form(points))

    def start(self, generator: torch.Generator | None, *, random: bool) -> dict[Key, Tensor]:
        """Return the centre, or a random point, of every region."""
        draw = _sample if random else (lambda region, x, _: region.center(x))
        return self.project({key: draw(region, self.at(key), generator) for key, region in self.regions.items()})

    def project(self, points: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Bring every argument back into its region."""
        return {
            key: (self.regions[key].project(self.at(key), point) if _has(self.regions[key], "project") else point).detach()
            for key, point in points.items()
        }

    def jump(self, gradients: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Go from the centre to the region's most promising point."""
        return self.project({key: _best(self.regions[key], self.at(key), -gradient) for key, gradient in gradients.items()})

    def move(self, points: Mapping[Key, Tensor], gradients: Mapping[Key, Tensor], size: float) -> dict[Key, Tensor]:
        """Take a step of descent, ``size`` times as long as the way from centre to boundary."""
        steps = {
            key: _step(self.regions[key], self.at(key), points[key], -gradient, size) for key, gradient in gradients.items()
        }
        return self.project({key: points[key] + step.nan_to_num(0.0, 0.0, 0.0) for key, step in steps.items()})


def _step(region: Region, x: Tensor, z: Tensor, v: Tensor, size: float) -> Tensor:
    """Return a step from ``z`` along which ``v . z`` rises."""
    if _has(region, "climb"):
        return region.climb(x, z, v, size)
    best = _best(region, x, v)
    if not _has(region, "project"):
        return min(size, 1.0) * (best - z)  # beyond 1 lies the outside
    way = size * (best - region.center(x))
    if region.separable:
        return way
    return v * (_length(way) / _length(v).clamp(min=torch.finfo(v.dtype).tiny))


def _names(model: Callable[..., Tensor], x: Inputs) -> dict[str, Key]:
    """Map the names of the model's arguments to their place in ``x``."""
    if isinstance(x, Mapping):
        return dict(zip(x, x, strict=True))
    forward = model.forward if isinstance(model, nn.Module) else model
    names = list(inspect.signature(forward).parameters)
    count = 1 if isinstance(x, Tensor) else len(x)
    names += [f"argument {position}" for position in range(len(names), count)]  # behind *args
    return {names[position]: position for position in range(count)}


def _pick(x: Inputs, key: Key) -> Any:
    return x if isinstance(x, Tensor) else x[key]


def _has(region: Region, name: str) -> bool:
    """Whether a region has a method that is optional."""
    return getattr(type(region), name) is not getattr(Region, name)


def _best(region: Region, x: Tensor, v: Tensor) -> Tensor:
    """Return the point of the region where ``v . z`` is largest, its centre where that cannot be told."""
    if region.separable:
        box = region.hull(x)
        return torch.where(v > 0, box.upper, torch.where(v < 0, box.lower, box.center))
    scale = _per_example(flat(v.abs()).amax(1), v)
    with torch.enable_grad():
        row = (v / torch.where(scale > 0, scale, 1.0))[None].detach().requires_grad_()
        (way,) = torch.autograd.grad(region.excess(x, row).sum(), row)
    return region.center(x) + way[0].nan_to_num(0.0, 0.0, 0.0)


def _sample(region: Region, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw a point; without ``region.sample`` one between the centre and the farthest point in a random direction."""
    if _has(region, "sample"):
        return region.sample(x, generator)
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    reach = _per_example(torch.rand(len(x), generator=generator, dtype=x.dtype, device=x.device), x)
    return torch.lerp(region.center(x), _best(region, x, direction), reach)


def _per_example(values: Tensor, like: Tensor) -> Tensor:
    """Give ``(batch,)`` values the trailing axes they need to broadcast against a tensor with the batch first."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def flat(value: Tensor) -> Tensor:
    """Bring a tensor to ``(batch, elements)``."""
    return value.flatten(1) if value.ndim > 1 else value.unsqueeze(1)


def _length(value: Tensor) -> Tensor:
    return _per_example(torch.linalg.vector_norm(flat(value), dim=1), value)


@dataclass(frozen=True)
class Search:
    """Descent inside one region, or inside a union of regions, step by step into the one that lowers the outcome most.

    Attributes:
        problem: the model, its arguments and their regions.
        score: ``outputs -> (batch,)``, what is to be small.
        guide: ``(outputs, restart) -> (batch,)``, what to descend on; by default the score.
        others: further regions of the same arguments; each costs one more run of the model per step.
    """

    problem: Problem
    score: Callable[[Tensor], Tensor]
    guide: Callable[[Tensor, int], Tensor] | None = None
    others: tuple[Problem, ...] = ()

    def run(
        self,
        steps: int,
        restarts: int,
        step_size: float | None,
        generator: torch.Generator | None,
        *,
        random_start: bool = False,
    ) -> tuple[Tensor, dict[Key, Tensor]]:
        """Return the best scores, ``(batch,)``, and points, every example's of all runs."""
        if restarts < 1:
            raise SpecificationError(f"restarts must be at least 1, got {restarts}")
        best: tuple[Tensor, dict[Key, Tensor]] | None = None
        for restart in range(restarts):
            for value, points in self.walk(steps, step_size, generator, restart=restart, random=random_start or restart > 0):
                best = _better(best, self.score(self.problem.outputs(points)) if value is None else value, points)
        return best

    def last(
        self, steps: int, step_size: float | None, generator: torch.Generator | None, *, random_start: bool = False
    ) -> dict[Key, Tensor]:
        """Return where one run ends, after exactly one pass forwards and backwards per step: for training."""
        *_, (_, points) = self.walk(steps, step_size, generator, restart=0, random=random_start)
        return points

    def walk(
        self, steps: int, step_size: float | None, generator: torch.Generator | None, *, restart: int, random: bool
    ) -> Iterator[tuple[Tensor | None, dict[Key, Tensor]]]:
        """Yield the points of one run with their scores; the last, which needs no gradient, without."""
        problems, first = (self.problem, *self.others), 0.5 if step_size is None else step_size
        points = problems[restart % len(problems)].start(generator, random=random)
        for step in range(steps):
            value, gradients = self.evaluate(points, restart)
            yield value, points
            size = None if step == 0 and not random else first * (1 - step / steps)
            points = self.step(points, gradients, size, restart)
        yield None, points

    def step(
        self, points: Mapping[Key, Tensor], gradients: Mapping[Key, Tensor], size: float | None, restart: int
    ) -> dict[Key, Tensor]:
        """Step into every region, by default as far as it goes, and keep the point that the guide likes best."""
        problems = (self.problem, *self.others)
        moved = [each.jump(gradients) if size is None else each.move(points, gradients, size) for each in problems]
        if len(moved) == 1:
            return moved[0]
        best: tuple[Tensor, dict[Key, Tensor]] | None = None
        for candidate in moved:
            outputs = self.problem.outputs(candidate)
            best = _better(best, self.score(outputs) if self.guide is None else self.guide(outputs, restart), candidate)
        return best[1]

    def evaluate(self, points: Mapping[Key, Tensor], restart: int) -> tuple[Tensor, dict[Key, Tensor]]:
        """Return every example's score, and the gradient of what guides the descent."""
        with torch.enable_grad():
            leaves = {key: point.detach().requires_grad_() for key, point in points.items()}
            outputs = self.problem.outputs(leaves)
            loss = self.score(outputs) if self.guide is None else self.guide(outputs, restart)
            if loss.requires_grad:
                gradients = torch.autograd.grad(loss.sum(), list(leaves.values()), materialize_grads=True)
            else:
                gradients = [torch.zeros_like(point) for point in points.values()]
        return self.score(outputs.detach()), dict(zip(leaves, gradients, strict=True))


def _better(
    best: tuple[Tensor, dict[Key, Tensor]] | None, value: Tensor, points: dict[Key, Tensor]
) -> tuple[Tensor, dict[Key, Tensor]]:
    """Keep, example by example, the point of smaller value; NaN never wins."""
    if best is None:
        return value.nan_to_num(torch.inf, posinf=torch.inf, neginf=-torch.inf), points
    wins = value < best[0]
    kept = {key: torch.where(_per_example(wins, point), point, best[1][key]) for key, point in points.items()}
    return torch.where(wins, value, best[0]), kept


def run_on_copies(model: Callable[..., Tensor], inputs: Inputs) -> Tensor:
    """Run a model on copies of its arguments, which it may write into; gradients still reach the originals."""

    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    if isinstance(inputs, Mapping):
        return model(**{key: copy(value) for key, value in inputs.items()})
    return model(*map(copy, inputs)) if isinstance(inputs, tuple) else model(copy(inputs))


@contextmanager
def evaluation(model: Callable[..., Tensor]) -> Iterator[None]:
    """Run in evaluation mode and put every module's own mode back."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
