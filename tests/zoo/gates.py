"""Products of two values that both depend on the input: gates, modulation, fusion, experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import zoo


@zoo("glu mlp", (5,))
def glu() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 24), nn.GLU(), nn.Linear(12, 3))


@zoo("swiglu", (5,))
class SwiGlu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(5, 12, bias=False), nn.Linear(12, 3, bias=False), nn.Linear(5, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


@zoo("highway", (6,))
class Highway(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.gates = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.head = nn.Linear(6, 3)
        for gate in self.gates:
            nn.init.constant_(gate.bias, -1.0)

    def forward(self, x: Tensor) -> Tensor:
        for plain, gate in zip(self.plain, self.gates, strict=True):
            t = torch.sigmoid(gate(x))
            x = t * F.relu(plain(x)) + (1 - t) * x
        return self.head(x)


@zoo("film conditioning", {"x": (5,), "condition": (3,)})
class Film(nn.Module):
    """A condition scales and shifts features; both move."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.film, self.head = nn.Linear(5, 8), nn.Linear(3, 16), nn.Linear(8, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = torch.split(self.film(condition), 8, dim=-1)
        return self.head(F.relu((1 + gamma) * self.features(x) + beta))


@zoo("film, fixed condition", {"x": (5,)}, fixed={"condition": (3,)})
class FilmFixed(Film):
    """The same where only the first input moves."""


@zoo("bilinear fusion", {"image": (4,), "text": (3,)})
class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fuse, self.head = nn.Bilinear(4, 3, 6), nn.Linear(6, 2)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.head(torch.tanh(self.fuse(image, text)))


@zoo("outer-product fusion", {"image": (4,), "text": (3,)})
class OuterProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(3, 4), nn.Linear(16, 2)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        outer = torch.einsum("bi,bj->bij", torch.relu(self.a(image)), torch.relu(self.b(text)))
        return self.head(outer.flatten(1))


@zoo("two towers, cosine", {"query": (4,), "document": (4,)})
class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))
        self.document = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, query: Tensor, document: Tensor) -> Tensor:
        return F.cosine_similarity(self.query(query), self.document(document), dim=-1)


@zoo("siamese distance", {"left": (5,), "right": (5,)})
class Siamese(nn.Module):
    """One network twice, and the distance of what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 4))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = self.embed(left), self.embed(right)
        return torch.stack([(a - b).pow(2).sum(1), torch.norm(a - b, p=2, dim=1), (a - b).abs().sum(1)], dim=1)


@zoo("inner product of two towers", {"user": (4,), "item": (4,)})
class MatrixFactorisation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return torch.sigmoid((self.user(user) * self.item(item)).sum(dim=1, keepdim=True))


@zoo("factorisation machine", (6,))
class FactorisationMachine(nn.Module):
    """All products of pairs, by the square of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.factors = nn.Linear(6, 1), nn.Parameter(torch.randn(6, 3) / 2)

    def forward(self, x: Tensor) -> Tensor:
        pairs = (x @ self.factors).pow(2) - x.pow(2) @ self.factors.pow(2)
        return self.linear(x).squeeze(-1) + 0.5 * pairs.sum(1)


@zoo("cross network", (5,))
class CrossNetwork(nn.Module):
    """Explicit feature crosses, as in DCN."""

    def __init__(self) -> None:
        super().__init__()
        self.crosses, self.head = nn.ModuleList([nn.Linear(5, 5) for _ in range(2)]), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x0 = x
        for cross in self.crosses:
            x = x0 * cross(x) + x
        return self.head(x)


@zoo("mixture of experts", (5,))
class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(3)])
        self.gate = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(self.gate(x), dim=1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return (weights.unsqueeze(-1) * outputs).sum(dim=1)


@zoo("softmin mixture", (4,))
class Softmin(nn.Module):
    """A smooth minimum of distances."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        distances = (x[:, None] - self.centres).abs().sum(-1)
        return (F.softmin(distances, dim=1) * distances).sum(1, keepdim=True)


@zoo("mixture density", (4,))
class MixtureDensity(nn.Module):
    """Mean and deviation of a mixture of normal distributions."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.pi = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 3)
        self.mu, self.sigma = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x)
        pi, mu, sigma = self.pi(h).softmax(-1), self.mu(h), F.softplus(self.sigma(h)) + 1e-3
        mean = (pi * mu).sum(-1)
        variance = (pi * (sigma**2 + mu**2)).sum(-1) - mean**2
        return torch.stack([mean, variance], dim=-1)


@zoo("hypernetwork", {"x": (3,), "task": (2,)})
class HyperNetwork(nn.Module):
    """One input makes the weights that the other is multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.bias = nn.Linear(2, 12), nn.Linear(2, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        weight = self.weights(task).view(-1, 4, 3)
        h = torch.bmm(weight, x.unsqueeze(2)).squeeze(2) + self.bias(task)
        return self.head(torch.relu(h))


@zoo("maxout", (5,))
class Maxout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8 * 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).view(-1, 8, 3).max(dim=-1)[0])


@zoo("max-min network", (5,))
class GroupSort(nn.Module):
    """Pairs sorted, for Lipschitz networks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 2)

    @staticmethod
    def sort(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.sort(self.second(self.sort(self.first(x)))))


@zoo("convex in the input", (4,))
class InputConvex(nn.Module):
    """Non-negative weights between layers, made by softplus."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.skip = nn.Linear(4, 10), nn.Linear(4, 1)
        self.raw = nn.Parameter(torch.randn(1, 10) - 1)

    def forward(self, x: Tensor) -> Tensor:
        z = F.softplus(self.start(x))
        return F.linear(z, F.softplus(self.raw)) + self.skip(x)


@zoo("gated tanh unit with tied weights", (6,))
class TiedGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        return self.head(h.tanh() * h.sigmoid())
