"""Normalisations of each kind, in evaluation mode, and parametrised weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo.entry import zoo


@zoo("batch norm, vectors", (5,))
def batch_norm1d() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


@zoo("batch norm, images", (2, 5, 5), unit=True)
def batch_norm2d() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(36, 3))


@zoo("layer norm", (5,), peer="2.2 (layer norm)")
def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.ReLU(), nn.Linear(12, 3))


@zoo("layer norm first", (3, 4))
class LayerNormFirst(nn.Module):
    """On the raw tokens, over both of their axes, without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.layer_norm(x, x.shape[1:]).flatten(1))


@zoo("layer norm, by hand", (5,))
class LayerNormByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.a, self.b = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        mean, std = h.mean(-1, keepdim=True), h.std(-1, keepdim=True)
        return self.head(self.a * (h - mean) / (std + 1e-6) + self.b)


@zoo("layer norm without variance", (5,))
class Centred(nn.Module):
    """The mean taken off, nothing divided: affine."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(F.relu(h - h.mean(dim=1, keepdim=True)))


@zoo("group norm", (2, 4, 4), unit=True)
def group_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


@zoo("instance norm", (2, 5, 5), unit=True)
def instance_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.InstanceNorm2d(3, affine=True), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))


@zoo("instance norm, running statistics", (2, 5, 5), unit=True)
def instance_norm_running() -> nn.Module:
    norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
    return nn.Sequential(nn.Conv2d(2, 3, 2), norm, nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))


class RmsNorm(nn.Module):
    """Root-mean-square norm, by hand."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


@zoo("rms norm, by hand", (5,))
def rms_norm_by_hand() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), RmsNorm(8), nn.GELU(), nn.Linear(8, 3))


@zoo("nn.RMSNorm", (5,))
def rms_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.RMSNorm(8), nn.GELU(), nn.Linear(8, 3))


@zoo("unit sphere", (4,))
class UnitSphere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 4))

    def forward(self, x: Tensor) -> Tensor:
        z = self.embed(x)
        return z / z.norm(dim=-1, keepdim=True).clamp(min=0.1)


@zoo("weight norm", (5,))
def weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 12)), nn.ReLU(), nn.Linear(12, 3))


@zoo("spectral norm", (5,))
def spectral_norm() -> nn.Module:
    layers = [parametrizations.spectral_norm(nn.Linear(size, 10)) for size in (5, 10)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), nn.Linear(10, 3))


@zoo("orthogonal weights", (6,))
def orthogonal() -> nn.Module:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6)), nn.Softplus(), nn.Linear(6, 3))


@zoo("old-style weight norm", (5,))
class HookedWeightNorm(nn.Module):
    """Weight norm spelled out in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.g, self.head = nn.Parameter(torch.randn(12, 5)), nn.Parameter(torch.ones(12, 1)), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.g * self.v / self.v.norm(dim=1, keepdim=True)
        return self.head(F.relu(F.linear(x, weight)))


@zoo("standardised weights", (2, 5, 5), unit=True)
class StandardisedConv(nn.Conv2d):
    """Weight standardisation, as a subclass of the convolution."""

    def __init__(self) -> None:
        super().__init__(2, 4, 3)
        self.norm, self.head = nn.GroupNorm(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        weight = weight / (weight.std(dim=(1, 2, 3), keepdim=True) + 1e-5)
        x = F.conv2d(x, weight, self.bias, self.stride, self.padding)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


@zoo("adaptive instance norm", {"x": (2, 4, 4), "style": (3,)}, unit=True)
class AdaptiveInstanceNorm(nn.Module):
    """A style gives scale and shift after instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.style = nn.Conv2d(2, 3, 3), nn.InstanceNorm2d(3), nn.Linear(3, 6)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale, shift = self.style(style)[:, :, None, None].chunk(2, 1)
        return (self.norm(self.conv(x)) * (1 + scale) + shift).mean(dim=(-2, -1))
