"""Ways to write a model: parameters by hand, changes in place, layers used twice, several inputs, odd shapes."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import zoo


@zoo("parameters in a list", (5,))
class ParameterLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = (5, 12, 12, 3)
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(b, a) / a**0.5) for a, b in pairwise(sizes)])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(b)) for b in sizes[1:]])

    def forward(self, x: Tensor) -> Tensor:
        last = len(self.weights) - 1
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.addmm(bias, x, weight.t())
            if index < last:
                x = torch.relu(x)
        return x


@zoo("changes in place", (6,))
class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        h *= 1.1
        h.sub_(0.1).relu_()
        y = self.two(h)
        y += h
        y.add_(h, alpha=0.5).tanh_()
        return self.head(y)


@zoo("slices assigned", (6,))
class SliceAssignment(nn.Module):
    """Half of a buffer is filled by one branch, half by another."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], 8)
        out[:, :4] = torch.relu(self.one(x))
        out[:, 4:] = self.two(x).sigmoid()
        out[:, 0] += x[:, 0]
        return self.head(out)


@zoo("products in place", (5,))
class InPlaceGate(nn.Module):
    """A quick GELU that spares memory."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        gate = h.clone().mul_(1.702).sigmoid_()
        h *= gate
        return self.two(h)


@zoo("one layer, used three times", (6,))
class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act, self.head = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.act(self.layer(x))
        return self.head(x)


@zoo("tied encoder and decoder", (6,))
class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 4)
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.sigmoid(self.encode(x)), self.encode.weight.t(), self.bias)


@zoo("one input fixed", {"x": (4,)}, fixed={"context": (3,)})
class OneFixed(nn.Module):
    """What the fixed input says multiplies what the other one says."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gate, self.head = nn.Linear(4, 8), nn.Linear(3, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)) * torch.sigmoid(self.gate(context)))


@zoo("keyword-only arguments", {"left": (3,), "right": (3,)})
class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(OrderedDict(first=nn.Linear(6, 10), act=nn.ReLU6(), second=nn.Linear(10, 2)))

    def forward(self, *, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.net(torch.hstack([left, right]))


@zoo("scalar per example", (5,))
class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 12), nn.Mish(), nn.Linear(12, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze(-1)


@zoo("output of rank three", (3, 4))
class RankThree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.CELU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) - self.net(x.flip(1))


@zoo("masked features", {"x": (6,)}, tables={"mask": torch.tensor([True, False, True, True, False, True])})
class Masked(nn.Module):
    """A mask for all examples, without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 12), nn.Softsign(), nn.Linear(12, 2))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.net(x.masked_fill(~mask, 0.0) + torch.where(mask, x, 0.1 * x))


@zoo("embedding of a token, added", {"x": (5,)}, tables={"token": torch.tensor(2)})
class TokenEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lift, self.head = nn.Embedding(4, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        return self.head(F.gelu(self.lift(x) + self.embedding(token)))


@zoo("positions embedded, normalised inside", (3, 4), unit=True)
class Positions(nn.Module):
    """Standardises its input and adds a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((4,), 0.5))
        self.register_buffer("std", torch.full((4,), 0.25))
        self.position, self.net = nn.Embedding(3, 4), nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std + self.position(torch.arange(3))
        return self.net(x.flatten(1))


@zoo("module dict and partials", (5,))
class ModuleDicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"down": nn.Linear(5, 8), "up": nn.Linear(8, 5)})
        self.act = partial(F.leaky_relu, negative_slope=0.05)

    def forward(self, x: Tensor) -> Tensor:
        for name, part in self.parts.items():
            x = part(x) if name == "up" else self.act(part(x))
        return x


@zoo("sequential of lambdas", (6,))
class Lambdas(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [lambda x: x.view(-1, 2, 3), lambda x: x.transpose(1, 2), lambda x: x.reshape(-1, 6), torch.sigmoid]
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return self.head(x)


@zoo("clipped and rescaled output", (4,))
class Clipped(nn.Module):
    """Ends in a clamp by tensors and an affine map to physical units."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 12), nn.Hardswish(inplace=True), nn.Linear(12, 2))
        self.register_buffer("low", torch.tensor([-0.2, -0.1]))
        self.register_buffer("high", torch.tensor([0.2, 0.3]))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.clamp(self.net(x), self.low, self.high)
        return (y - self.low) / (self.high - self.low) * 100


@zoo("wrapped in a data class of layers", (5,))
class Subclassed(nn.Sequential):
    """A Sequential with a shortcut of its own."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@zoo("gathered channels", (6,))
class Gathered(nn.Module):
    """Fixed permutations and repeats of features."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([5, 0, 3, 3, 1]))
        self.net = nn.Sequential(nn.Linear(11, 10), nn.Tanh(), nn.Linear(10, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.cat([x[:, self.order], x.index_select(1, self.order), x[:, [0]]], dim=1))


@zoo("complex numbers by hand", (4,))
class ComplexByHand(nn.Module):
    """Multiplies numbers given as pairs, returns squared magnitudes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        (r1, i1), (r2, i2) = self.a(x).chunk(2, 1), self.b(x).chunk(2, 1)
        real, imaginary = r1 * r2 - i1 * i2, r1 * i2 + i1 * r2
        return real**2 + imaginary**2
