"""Sets, graphs and codes: permutation-invariant models, message passing, autoencoders, losses inside the model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import zoo


@zoo("deep sets", (4, 3))
class DeepSets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 6), nn.ReLU())
        self.rho = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.rho(self.phi(x).sum(dim=1))


@zoo("pointnet-like", (3, 5))
class PointNet(nn.Module):
    """Convolutions of width one, then the maximum over points."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.bn = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 8, 1), nn.BatchNorm1d(6)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv1(x)))
        x = torch.max(self.conv2(x), 2, keepdim=True)[0]
        return self.head(x.view(-1, 8))


def ring(nodes: int) -> Tensor:
    """Adjacency of a ring with self-loops, symmetrically normalised."""
    adjacency = torch.eye(nodes) + torch.roll(torch.eye(nodes), 1, 0) + torch.roll(torch.eye(nodes), -1, 0)
    degree = adjacency.sum(1).rsqrt()
    return degree[:, None] * adjacency * degree


@zoo("graph convolution", (5, 3))
class GraphConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("adjacency", ring(5))
        self.lin1, self.lin2 = nn.Linear(3, 6, bias=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.adjacency @ self.lin1(x))
        return self.lin2(torch.matmul(self.adjacency, h)).mean(dim=1)


@zoo("graph attention", (4, 3))
class GraphAttention(nn.Module):
    """Scores of edges from both ends, leaky ReLU, softmax over neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", ring(4) > 0)
        self.w, self.left, self.right = nn.Linear(3, 4, bias=False), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.w(x)
        scores = F.leaky_relu(self.left(h) + self.right(h).transpose(1, 2), 0.2)
        weights = scores.masked_fill(~self.edges, float("-inf")).softmax(dim=-1)
        return F.elu(weights @ h)


@zoo("message passing", (3, 2))
class MessagePassing(nn.Module):
    """A network on every ordered pair of nodes, added up."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        left = x.unsqueeze(2).expand(-1, 3, 3, 2)
        right = x.unsqueeze(1).expand(-1, 3, 3, 2)
        messages = self.message(torch.cat([left, right], dim=-1)).sum(dim=2)
        return self.update(torch.cat([x, messages], dim=-1))


@zoo("learned adjacency", (4, 3))
class LearnedAdjacency(nn.Module):
    """Who talks to whom follows from the features: a product of three values that move."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x))
        adjacency = torch.softmax(F.relu(h @ h.mT), dim=-1)
        return self.head(adjacency @ x)


@zoo("autoencoder", (8,))
class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
        self.decoder = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


@zoo("reconstruction error", (8,))
class ReconstructionError(Autoencoder):
    """An anomaly score."""

    def forward(self, x: Tensor) -> Tensor:
        return F.mse_loss(super().forward(x), x, reduction="none").mean(dim=1)


@zoo("variational autoencoder, mean path", (1, 6, 6), unit=True)
class MeanPath(nn.Module):
    """Noise is drawn while training only."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())
        self.mu, self.logvar, self.expand = nn.Linear(36, 3), nn.Linear(36, 3), nn.Linear(3, 36)
        self.decode = nn.Sequential(nn.Unflatten(1, (4, 3, 3)), nn.ReLU(), nn.ConvTranspose2d(4, 1, 2, stride=2), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        h = self.encode(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu) if self.training else mu
        return self.decode(self.expand(z))


@zoo("divergence from the prior", (5,))
class Divergence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 6))

    def forward(self, x: Tensor) -> Tensor:
        mu, logvar = self.net(x).chunk(2, dim=1)
        return -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1)


@zoo("cross-entropy inside", {"x": (5,)}, tables={"labels": torch.tensor([0, 2, 1])})
class CrossEntropyInside(nn.Module):
    """The loss of every example against each of some labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 3))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return -F.log_softmax(self.net(x), dim=1)[:, labels]


@zoo("hinge loss inside", {"x": (5,)}, fixed={"target": (1,)})
class HingeInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.Linear(12, 1))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return torch.clamp(1 - target * self.net(x), min=0).squeeze(1)


@zoo("huber loss inside", {"x": (5,)}, fixed={"target": (2,)})
class HuberInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 12), nn.SELU(), nn.Linear(12, 2))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        error = (self.net(x) - target).abs()
        return torch.where(error < 1, 0.5 * error**2, error - 0.5).sum(1)


@zoo("contrastive scores", {"anchor": (4,), "positive": (4,)}, fixed={"negatives": (3, 4)})
class Contrastive(nn.Module):
    """Log-probability of the right partner among fixed others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 5)

    def forward(self, anchor: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
        a, p, n = self.embed(anchor), self.embed(positive), self.embed(negatives)
        scores = torch.cat([(a * p).sum(1, keepdim=True), torch.einsum("bd,bkd->bk", a, n)], dim=1)
        return F.log_softmax(scores / 0.7, dim=1)[:, 0]


@zoo("vector quantiser, soft", (4,))
class SoftQuantiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.codes = nn.Linear(4, 3), nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encode(x)
        distance = ((z.unsqueeze(1) - self.codes) ** 2).sum(dim=2)
        return torch.softmax(-distance, dim=1) @ self.codes


@zoo("affine coupling flow", (4,))
class CouplingFlow(nn.Module):
    """Half of the values scales and shifts the other half; log-determinant beside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x[:, :2], x[:, 2:]
        log_scale, shift = self.net(a).chunk(2, dim=1)
        log_scale = torch.tanh(log_scale)
        return torch.cat([a, b * log_scale.exp() + shift, log_scale.sum(1, keepdim=True)], dim=1)
