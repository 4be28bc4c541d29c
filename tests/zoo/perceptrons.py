"""Fully connected networks: one per activation, feature maps of every kind, and classification heads."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import zoo

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "prelu": nn.PReLU, "relu6": nn.ReLU6, "hardtanh": nn.Hardtanh,
    "hardsigmoid": nn.Hardsigmoid, "hardswish": nn.Hardswish, "softshrink": lambda: nn.Softshrink(0.1),
    "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU, "mish": nn.Mish, "elu": nn.ELU, "selu": nn.SELU, "celu": lambda: nn.CELU(0.5),
    "softplus": nn.Softplus, "logsigmoid": nn.LogSigmoid, "softsign": nn.Softsign, "tanhshrink": nn.Tanhshrink,
}  # fmt: skip
REPORTED = {"sigmoid": "1.02", "tanh": "1.09", "gelu": "1.27", "silu": "1.31"}


def mlp(activation: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), activation(), nn.Linear(16, 16), activation(), nn.Linear(16, 3))


for _name, _activation in ACTIVATIONS.items():
    zoo(f"mlp {_name}", (6,), scale=1.5, peer=REPORTED.get(_name, ""))(lambda activation=_activation: mlp(activation))


@zoo("deep tanh", (4,), scale=2.0)
def deep_tanh() -> nn.Module:
    hidden = [layer for _ in range(5) for layer in (nn.Linear(10, 10), nn.Tanh())]
    return nn.Sequential(nn.Linear(4, 10), *hidden, nn.Linear(10, 2))


@zoo("sine representation", (2,))
class Siren(nn.Module):
    """An implicit function of coordinates, with the initialisation its authors give."""

    def __init__(self, frequency: float = 5.0) -> None:
        super().__init__()
        self.frequency = frequency
        self.layers = nn.ModuleList([nn.Linear(2, 16), nn.Linear(16, 16)])
        self.head = nn.Linear(16, 1)
        nn.init.uniform_(self.layers[0].weight, -1 / 2, 1 / 2)
        bound = math.sqrt(6 / 16) / frequency
        nn.init.uniform_(self.layers[1].weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.sin(self.frequency * layer(x))
        return self.head(x)


@zoo("fourier features", (3,))
class FourierFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("directions", torch.randn(3, 8))
        self.head = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2))

    def forward(self, x: Tensor) -> Tensor:
        phase = 2 * math.pi * x @ self.directions / 4
        return self.head(torch.cat([phase.sin(), phase.cos()], dim=-1))


@zoo("radial basis", (3,))
class RadialBasis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(10, 3))
        self.log_width = nn.Parameter(torch.zeros(10))
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        distance = (x.unsqueeze(1) - self.centres).pow(2).sum(-1)
        return self.head(torch.exp(-distance * self.log_width.exp()))


@zoo("normalised radial basis", (3,))
class NormalisedRadialBasis(RadialBasis):
    """Bumps that add up to one."""

    def forward(self, x: Tensor) -> Tensor:
        bumps = torch.exp(-0.5 * ((x[:, None, :] - self.centres) ** 2).sum(dim=2))
        return self.head(bumps / bumps.sum(dim=1, keepdim=True))


@zoo("rational quadratic kernel", (3,))
class RationalKernel(nn.Module):
    """Squared distances multiplied out: that none is negative is lost on interval arithmetic, not on the dual network."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(8, 3))
        self.weights = nn.Parameter(torch.randn(8, 2) / 3)

    def forward(self, x: Tensor) -> Tensor:
        square = (x * x).sum(-1, keepdim=True) - 2 * x @ self.points.T + (self.points**2).sum(-1)
        return (1 / (1 + square)) @ self.weights


@zoo("polynomial features", (3,))
class Polynomial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.stack([x[:, 0] * x[:, 1], x[:, 1] * x[:, 2], x[:, 0] * x[:, 2]], dim=1)
        return self.head(torch.cat([x, x**2, x**3, pairs], dim=1))


@zoo("log and root features", (4,))
class LogFeatures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 12), nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(torch.cat([torch.log1p(h.abs()), torch.log(1 + h**2), torch.sqrt(1e-2 + h * h)], dim=1))


@zoo("x / (1 + |x|)", (5,))
class HandwrittenSoftsign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 14), nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(h / (1 + h.abs()))


@zoo("handwritten swish and softplus", (5,))
class Handwritten(nn.Module):
    """Activations spelled out, as in papers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h * torch.sigmoid(1.5 * h)
        h = self.second(h)
        h = torch.log(1 + torch.exp(h))
        return self.third(0.5 * h * (1 + torch.erf(h / math.sqrt(2))))


@zoo("squared relu", (5,))
class SquaredRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


@zoo("residual mlp", (6,))
class ResidualMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 12), nn.Linear(12, 3)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        for block in self.blocks:
            z = z + block(z)
        return self.head(z)


# Heads.


class Trunk(nn.Module):
    """What the heads below stand on."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, classes))


@zoo("softmax probabilities", (5,), scale=2.0)
class Probabilities(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.trunk(x), dim=-1)


@zoo("softmax module behind a sequential", (5,), scale=2.0)
def softmax_sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4), nn.Softmax(dim=1))


@zoo("log-probabilities", (5,), scale=2.0)
class LogProbabilities(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.trunk(x), dim=1)


@zoo("handwritten stable softmax", (5,))
class StableSoftmax(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.trunk(x)
        scores = scores - scores.max(dim=1, keepdim=True).values
        weights = scores.exp()
        return weights / weights.sum(1, keepdim=True)


@zoo("learned temperature", (5,))
class Temperature(Trunk):
    """A temperature for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Sequential(nn.Linear(5, 1), nn.Softplus())

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.trunk(x) / (0.5 + self.temperature(x)), dim=1)


@zoo("label smoothing loss", (5,))
class LabelSmoothing(Trunk):
    """The loss of every class, smoothed: one output per label it may turn out to be."""

    def forward(self, x: Tensor) -> Tensor:
        logs = F.log_softmax(self.trunk(x), dim=-1)
        return -0.9 * logs - 0.1 * logs.mean(dim=-1, keepdim=True)


@zoo("energy score", (5,), scale=2.0)
class Energy(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        return -torch.logsumexp(self.trunk(x), dim=1)


@zoo("top-1 margin", (5,))
class TopMargin(Trunk):
    """The first class' score less the best of the others."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.trunk(x)
        return scores[:, 0] - scores[:, 1:].max(dim=1)[0]


@zoo("best score and probability", (5,))
class Confidence(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.trunk(x)
        return torch.stack([scores.amax(1), scores.softmax(1).amax(1), scores.amin(-1)], dim=1)


@zoo("entropy", (5,))
class Entropy(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        scores = self.trunk(x)
        return -(scores.softmax(-1) * scores.log_softmax(-1)).sum(-1, keepdim=True)


@zoo("cosine classifier", (5,))
class CosineClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.classes = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return 10 * F.linear(F.normalize(torch.tanh(self.embed(x)) + 0.5, dim=1), F.normalize(self.classes, dim=1))


@zoo("prototypes", (5,))
class Prototypes(nn.Module):
    """Minus the distance to every class' mean, as scores."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 6))
        self.prototypes = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return -torch.norm(self.embed(x)[:, None] - self.prototypes, dim=-1)


@zoo("sigmoid heads", (5,))
class Multilabel(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        return self.trunk(x).sigmoid()


@zoo("ordinal regression", (5,))
class Ordinal(nn.Module):
    """Probabilities of ordered grades: differences of neighbouring sigmoids."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(5, 16), nn.ELU(), nn.Linear(16, 1))
        self.register_buffer("cuts", torch.tensor([-1.0, 0.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        below = torch.sigmoid(self.cuts - self.score(x))
        return torch.cat([below[:, :1], below[:, 1:] - below[:, :-1], 1 - below[:, -1:]], dim=1)


@zoo("ensemble", (5,))
class Ensemble(nn.Module):
    """The mean of what three members say."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList([nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x).softmax(dim=-1) for member in self.members]).mean(dim=0)
