"""Control and dynamics: policies, values, Lyapunov functions, integrators, piecewise laws."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import zoo


@zoo("dueling q-network", (4,))
class Dueling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 16), nn.ReLU())
        self.value, self.advantage = nn.Linear(16, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x)
        advantage = self.advantage(h)
        return self.value(h) + advantage - advantage.mean(dim=1, keepdim=True)


@zoo("actor, squashed", (4,))
class Actor(nn.Module):
    """Mean action and clamped log-deviation, as in soft actor-critic."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.mean, self.log_std = nn.Linear(16, 2), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x)
        log_std = torch.clamp(self.log_std(h), -5, 2)
        return torch.cat([2.0 * torch.tanh(self.mean(h)), log_std.exp()], dim=-1)


@zoo("critic of state and action", {"state": (4,), "action": (2,)})
class Critic(nn.Module):
    """The smaller of two critics."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 1))
        self.two = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 1))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([state, action], dim=1)
        return torch.min(self.one(x), self.two(x))


@zoo("distributional q-network", (4,))
class Distributional(nn.Module):
    """Expectation over fixed atoms of a softmax per action."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2 * 5))
        self.register_buffer("atoms", torch.linspace(-2, 2, 5))

    def forward(self, x: Tensor) -> Tensor:
        probabilities = self.net(x).view(-1, 2, 5).softmax(dim=-1)
        return (probabilities * self.atoms).sum(-1)


@zoo("quadratic form", (4,))
class Quadratic(nn.Module):
    """A Lyapunov function x^T P x, P positive definite."""

    def __init__(self) -> None:
        super().__init__()
        self.root = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        p = self.root @ self.root.T + 0.1 * torch.eye(4, dtype=x.dtype)
        return ((x @ p) * x).sum(dim=-1, keepdim=True)


@zoo("quadratic form by einsum", (4,))
class QuadraticEinsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,ij,bj->b", x, self.p, x)


@zoo("neural lyapunov function", (2,))
class NeuralLyapunov(nn.Module):
    """|phi(x) - phi(0)| plus a small norm, and its value one step on."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))
        self.register_buffer("dynamics", torch.tensor([[0.9, 0.2], [-0.2, 0.8]]))

    def value(self, x: Tensor) -> Tensor:
        return (self.phi(x) - self.phi(torch.zeros_like(x))).abs().sum(1) + 0.1 * x.abs().sum(1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.value(x), self.value(x @ self.dynamics.T) - self.value(x)], dim=1)


@zoo("neural ode, euler steps", (3,))
class NeuralOde(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(3, 10), nn.Tanh(), nn.Linear(10, 3))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + 0.25 * self.field(x)
        return x


@zoo("neural ode, runge-kutta step", (2,))
class RungeKutta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(2, 8), nn.Softplus(), nn.Linear(8, 2))

    def forward(self, x: Tensor, h: float = 0.2) -> Tensor:
        k1 = self.field(x)
        k2 = self.field(x + h / 2 * k1)
        k3 = self.field(x + h / 2 * k2)
        k4 = self.field(x + h * k3)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@zoo("pendulum", (2,))
class Pendulum(nn.Module):
    """Angle and speed, pushed by a saturated network for two steps; energy at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        theta, omega = x[:, 0:1], x[:, 1:2]
        for _ in range(2):
            torque = self.policy(torch.cat([theta.cos(), theta.sin(), omega], 1)).clamp(-2.0, 2.0)
            omega = (omega + 0.05 * (15.0 * torch.sin(theta) + 3.0 * torque)).clip(-8, 8)
            theta = theta + 0.05 * omega
        energy = 0.5 * omega**2 + 9.81 * (1 + torch.cos(theta))
        return torch.cat([theta, omega, energy], dim=1)


@zoo("cart-pole step", (4,))
class CartPole(nn.Module):
    """A quotient whose divisor moves."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5, 1.0, 8.0, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        position, speed, angle, rate = x.unbind(dim=1)
        force = (x * self.gain).sum(1).clamp(-10, 10)
        sine, cosine = torch.sin(angle), torch.cos(angle)
        common = (force + 0.05 * rate**2 * sine) / 1.1
        turn = (9.8 * sine - cosine * common) / (0.5 * (4.0 / 3.0 - 0.1 * cosine**2 / 1.1))
        push = common - 0.05 * turn * cosine / 1.1
        return torch.stack([position + 0.02 * speed, speed + 0.02 * push, angle + 0.02 * rate, rate + 0.02 * turn], dim=1)


@zoo("van der pol", (2,))
class VanDerPol(nn.Module):
    """A polynomial vector field with a linear controller."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u = torch.tanh(self.k(x))[:, 0]
        for _ in range(3):
            position, speed = x[:, 0], x[:, 1]
            x = torch.stack([position + 0.1 * speed, speed + 0.1 * ((1 - position**2) * speed - position + u)], dim=1)
        return x


@zoo("lotka-volterra", (2,), unit=True)
class LotkaVolterra(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        prey, predator = x[..., 0], x[..., 1]
        for _ in range(2):
            meetings = prey * predator
            prey, predator = prey + 0.1 * (1.1 * prey - 0.4 * meetings), predator + 0.1 * (0.1 * meetings - 0.4 * predator)
        return torch.stack((prey, predator), dim=-1)


@zoo("piecewise controller", (3,))
class Piecewise(nn.Module):
    """Gains scheduled by a threshold, a dead zone, saturation."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        u = torch.where(x[:, :1] > 0.2, self.high(x), self.low(x))
        u = torch.sign(u) * torch.clamp(u.abs() - 0.1, min=0)
        return torch.minimum(torch.maximum(u, torch.tensor(-1.0, dtype=x.dtype)), torch.tensor(1.0, dtype=x.dtype))


@zoo("min-max law", (3,))
class MinMax(nn.Module):
    """The largest of the smallest of affine pieces: any piecewise linear function."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = nn.Linear(3, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.pieces(x).reshape(-1, 2, 3, 2).amin(dim=3).amax(dim=2)


@zoo("interpolated table", (3,), unit=True)
class LookupTable(nn.Module):
    """Piecewise linear interpolation as a sum of hats."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("knots", torch.linspace(0, 1, 5))
        self.values = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        hats = F.relu(1 - 4 * (x.unsqueeze(-1) - self.knots).abs())
        return (hats * self.values).sum(dim=(1, 2)).unsqueeze(1)


@zoo("reward with a barrier", (4,))
class Barrier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        distance = torch.sqrt((x[:, :2] ** 2).sum(dim=1) + 1e-2)
        barrier = -torch.log(torch.clamp(distance, min=0.05))
        return torch.stack([distance, barrier, torch.exp(-(x[:, 2:] ** 2).sum(1))], dim=1)


@zoo("kinematic arm", (3,))
class Arm(nn.Module):
    """Where the hand is, by sums of sines and cosines of sums of angles."""

    def forward(self, x: Tensor) -> Tensor:
        angles = x.cumsum(dim=1)
        lengths = torch.tensor([1.0, 0.8, 0.5], dtype=x.dtype)
        return torch.stack([(lengths * angles.cos()).sum(1), (lengths * angles.sin()).sum(1)], dim=1)


@zoo("rotation matrix", {"point": (2,), "angle": (1,)})
class Rotation(nn.Module):
    def forward(self, point: Tensor, angle: Tensor) -> Tensor:
        cosine, sine = torch.cos(angle), torch.sin(angle)
        matrix = torch.stack([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)], dim=1)
        return (matrix @ point[..., None])[..., 0]


@zoo("attitude from quaternion", (4,))
class Quaternion(nn.Module):
    """A quaternion, normalised, turns a fixed vector."""

    def forward(self, x: Tensor) -> Tensor:
        w, i, j, k = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-3)).unbind(-1)
        return torch.stack([1 - 2 * (j * j + k * k), 2 * (i * j + w * k), 2 * (i * k - w * j)], dim=-1)


@zoo("black-scholes-like", (2,), unit=True)
class OptionPrice(nn.Module):
    """Log of a quotient, and the normal distribution function."""

    def forward(self, x: Tensor) -> Tensor:
        spot, strike = x[:, 0] + 1.0, x[:, 1] + 1.0
        d1 = (torch.log(spot / strike) + 0.06) / 0.3
        normal = lambda z: 0.5 * (1 + torch.erf(z / math.sqrt(2)))  # noqa: E731
        return (spot * normal(d1) - 0.97 * strike * normal(d1 - 0.3)).unsqueeze(-1)
