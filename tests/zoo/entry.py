"""One model of the zoo: how it is built, and what it is fed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
Builder = Callable[[], nn.Module]
ZOO: dict[str, Entry] = {}
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Entry:
    """A model and its inputs, all drawn from the entry's own seed.

    Attributes:
        name: unique.
        build: makes the model, with torch's usual initialisation.
        inputs: shapes of one example of every argument that moves, by name.
        fixed: likewise of those that do not.
        tables: arguments that do not move and have no batch axis.
        unit: inputs are uniform in 0..1, as pixels are; otherwise standard normal.
        scale: weights of two and more axes are multiplied by it, so that nonlinearities matter.
        peer: a figure reported for a comparable model by another library, for the benchmark's notes.
    """

    name: str
    build: Builder
    inputs: Mapping[str, Shape]
    fixed: Mapping[str, Shape] = field(default_factory=dict)
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    unit: bool = False
    scale: float = 1.0
    peer: str = ""

    @property
    def seed(self) -> int:
        """A number that belongs to the name."""
        return zlib.crc32(self.name.encode()) % 2**31

    def model(self) -> nn.Module:
        """Build the model in float64 and evaluation mode, its normalisations as after some training."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.seed)
            model = self.build().double()
            for parameter in model.parameters() if self.scale != 1.0 else ():
                if parameter.ndim > 1:
                    parameter.mul_(self.scale)
            for module in model.modules():
                if isinstance(module, _NORMS):
                    _train(module)
        return model.eval().requires_grad_(False)

    def example(self, batch: int, seed: int = 0) -> dict[str, Tensor]:
        """Draw the arguments of one call."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        draw = torch.rand if self.unit else torch.randn
        shapes = {**self.inputs, **self.fixed}
        values = {name: draw(batch, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        return values | {name: table.double() if table.is_floating_point() else table for name, table in self.tables.items()}

    def form(self, values: Mapping[str, Any]) -> Any:
        """Hand arguments, or their regions, over as users do: as they are where the model takes one, else by name."""
        return values["x"] if self.inputs.keys() == {"x"} and not self.fixed and not self.tables else dict(values)


def _train(norm: nn.Module) -> None:
    """Move a normalisation's parameters and statistics away from one and zero."""
    for name, value in [*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)]:
        if name == "running_var":
            value.copy_(torch.empty_like(value).uniform_(0.3, 1.5))
        elif value.is_floating_point():
            value.add_(0.2 * torch.randn_like(value))


def zoo(name: str, inputs: Shape | Mapping[str, Shape], **options: Any) -> Callable[[Builder], Builder]:
    """Enter a model class, or a function that makes a model, into the zoo."""

    def enter(build: Builder) -> Builder:
        if name in ZOO:
            raise ValueError(f"there is a {name!r} already")
        shapes = {"x": inputs} if isinstance(inputs, tuple) else inputs
        ZOO[name] = Entry(name, build, shapes, **options)
        return build

    return enter
