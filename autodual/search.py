"""Descent inside regions: what every attack is made of.

The derivative of a support function is the point that attains it, so for every region

    d excess(x, v) / dv  =  argmax_{z in B(x)} v . z  -  center(x),     at v = -gradient,

is the way from the centre to its most promising point: half-widths times the gradient's sign for l_inf and boxes, the
normalised gradient for l2, the top coordinate for l1. A single step goes that way. Repeated steps keep its length, but
follow the gradient itself where the region is no box: on an l1 ball, jumping between vertices hardly descends. A region
of your own that has a support function only is searched by Frank-Wolfe steps, which need no projection.
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
        moved = {}
        for key, gradient in gradients.items():
            region, x = self.regions[key], self.at(key)
            way = _best(region, x, -gradient) - region.center(x)
            if not _has(region, "project"):
                way = region.center(x) + way - points[key]
            elif not region.separable:
                way = -gradient * (_length(way) / _length(gradient).clamp(min=torch.finfo(way.dtype).tiny))
            moved[key] = points[key] + min(size, 1.0) * way.nan_to_num(0.0, 0.0, 0.0)
        return self.project(moved)


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
    """Descent that keeps the point of lowest ``score(outputs)`` for every example.

    Attributes:
        problem: the model, its arguments and their regions.
        score: ``outputs -> (batch,)``, what is to be small.
        guide: ``(outputs, restart) -> (batch,)``, what to descend on; by default the score.
    """

    problem: Problem
    score: Callable[[Tensor], Tensor]
    guide: Callable[[Tensor, int], Tensor] | None = None

    def run(
        self, steps: int, restarts: int, step_size: float | None, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[Key, Tensor]]:
        """Return the best scores, ``(batch,)``, and points."""
        if restarts < 1:
            raise SpecificationError(f"restarts must be at least 1, got {restarts}")
        best: tuple[Tensor, dict[Key, Tensor]] | None = None
        first = 0.5 if step_size is None else step_size
        for restart in range(restarts):
            points = self.problem.start(generator, random=restart > 0)
            for step in range(steps):
                value, gradients = self.evaluate(points, restart)
                best = _better(best, value, points)
                if step == restart == 0:
                    points = self.problem.jump(gradients)
                else:
                    points = self.problem.move(points, gradients, first * (1 - step / steps))
            best = _better(best, self.score(self.problem.outputs(points)), points)
        return best

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
