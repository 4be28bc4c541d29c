"""Random networks and, written by hand beside each, the list of steps that describes it to the linear program."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.reference.lp import Affine, Relu, Step


class Mlp(nn.Module):
    """Three fully connected layers."""

    def __init__(self, inputs: int = 6, hidden: int = 12, outputs: int = 3) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate."""
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))

    def steps(self) -> list[Step]:
        """Describe."""
        return [
            Affine("first", self.first, ("x",)),
            Relu("a", "first"),
            Affine("second", self.second, ("a",)),
            Relu("b", "second"),
            Affine("third", self.third, ("b",)),
        ]


class Convolutional(nn.Module):
    """Strided and dilated convolutions with batch norm, then average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 2, dilation=2, padding=1, groups=2)
        self.third = nn.Linear(4, 3)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-0.2, 0.2)
            self.norm.running_var.uniform_(0.3, 1.0)
            self.norm.weight.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate."""
        z = F.relu(self.norm(self.first(x)))
        return self.third(F.avg_pool2d(F.relu(self.second(z)), 3).flatten(1))

    def steps(self) -> list[Step]:
        """Describe."""
        return [
            Affine("norm", lambda x: self.norm(self.first(x)), ("x",)),
            Relu("a", "norm"),
            Affine("second", self.second, ("a",)),
            Relu("b", "second"),
            Affine("third", lambda b: self.third(F.avg_pool2d(b, 3).flatten(1)), ("b",)),
        ]


class Residual(nn.Module):
    """Two residual blocks, one with a projected shortcut."""

    def __init__(self, inputs: int = 6, hidden: int = 10) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, hidden)
        self.one, self.two = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.three, self.short = nn.Linear(hidden, 8), nn.Linear(hidden, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate."""
        z = self.stem(x).relu()
        total = self.two(self.one(z).relu()) + z
        y = total.relu()
        merged = self.three(y) - self.short(y)
        return self.head(merged.relu())

    def steps(self) -> list[Step]:
        """Describe."""
        return [
            Affine("stem", self.stem, ("x",)),
            Relu("z", "stem"),
            Affine("one", self.one, ("z",)),
            Relu("a", "one"),
            Affine("add", lambda a, z: self.two(a) + z, ("a", "z")),
            Relu("y", "add"),
            Affine("sub", lambda y: self.three(y) - self.short(y), ("y",)),
            Relu("b", "sub"),
            Affine("head", self.head, ("b",)),
        ]


class Dense(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self, inputs: int = 6, growth: int = 5) -> None:
        super().__init__()
        self.one = nn.Linear(inputs, growth)
        self.two = nn.Linear(inputs + growth, growth)
        self.three = nn.Linear(inputs + 2 * growth, growth)
        self.head = nn.Linear(inputs + 3 * growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate."""
        a = F.relu(self.one(x))
        b = F.relu(self.two(torch.cat([x, a], 1)))
        c = F.relu(self.three(torch.cat([x, a, b], 1)))
        return self.head(torch.cat([x, a, b, c], 1))

    def steps(self) -> list[Step]:
        """Describe."""
        return [
            Affine("one", self.one, ("x",)),
            Relu("a", "one"),
            Affine("two", lambda x, a: self.two(torch.cat([x, a], 1)), ("x", "a")),
            Relu("b", "two"),
            Affine("three", lambda x, a, b: self.three(torch.cat([x, a, b], 1)), ("x", "a", "b")),
            Relu("c", "three"),
            Affine("head", lambda x, a, b, c: self.head(torch.cat([x, a, b, c], 1)), ("x", "a", "b", "c")),
        ]


Network = Mlp | Convolutional | Residual | Dense
NETWORKS: dict[str, tuple[Callable[[], Network], tuple[int, ...]]] = {
    "mlp": (Mlp, (6,)),
    "convolutional": (Convolutional, (1, 5, 5)),
    "residual": (Residual, (6,)),
    "dense-concat": (Dense, (6,)),
}


def random_network(kind: str, seed: int) -> tuple[Network, tuple[int, ...]]:
    """Draw one network in float64 and evaluation mode; returns it with the shape of its input."""
    build, shape = NETWORKS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double().eval(), shape
