"""Hypothesis strategies for inputs, regions and small networks; hypothesis itself is imported on first use."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autodual.regions import L1, L2, Box, LInf, Region

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

KINDS = ("mlp", "convolutional", "residual", "dense")
NORMS = ("linf", "l2", "l1", "box")
WRITTEN_OUT = 32


def inputs(
    shape: tuple[int, ...], low: float = 0.0, high: float = 1.0, *, dtype: torch.dtype = torch.float32
) -> SearchStrategy[Tensor]:
    """Draw tensors of one shape with values in ``[low, high]``, the ends included; small ones shrink element by element.

    Args:
        shape: the whole shape, batch included.
        low: smallest value.
        high: largest value.
        dtype: of the tensors.
    """
    st = _hypothesis()
    size = math.prod(shape)
    seeded = st.builds(
        _seeded, st.just(shape), st.just(low), st.just(high), st.integers(0, 2**32 - 1), st.floats(0.0, 0.5), st.just(dtype)
    )
    if size > WRITTEN_OUT:
        return seeded
    values = st.lists(st.floats(low, high, allow_nan=False), min_size=size, max_size=size)
    return st.one_of(
        values.map(lambda drawn: torch.tensor(drawn, dtype=torch.float64).reshape(shape).clamp(low, high).to(dtype)), seeded
    )


def regions(
    low: float = 0.0, high: float = 1.0, *, norms: tuple[str, ...] = NORMS, max_radius: float = 0.5, domains: bool = True
) -> SearchStrategy[Region]:
    """Draw regions for inputs in ``[low, high]``: balls, with and without that domain, and boxes inside it.

    Args:
        low: lower end of the domain.
        high: upper end of the domain.
        norms: which of ``linf``, ``l2``, ``l1`` and ``box`` to draw.
        max_radius: largest radius of a ball, in the units of the input.
        domains: whether balls may be cut by the domain.
    """
    st = _hypothesis()
    domain = st.sampled_from([None, (low, high)]) if domains else st.none()
    radius = st.one_of(st.just(0.0), st.floats(1e-3 * max_radius, max_radius))
    balls = {"linf": LInf, "l2": L2, "l1": L1}
    kinds = [st.builds(balls[norm], radius, domain) for norm in norms if norm in balls]
    if "box" in norms:
        ends = st.tuples(st.floats(low, high), st.floats(low, high)).map(sorted)
        kinds.append(ends.map(lambda pair: Box(*pair)))
    return st.one_of(kinds)


def networks(
    *, kinds: tuple[str, ...] = KINDS, outputs: int = 3, dtype: torch.dtype = torch.float32
) -> SearchStrategy[SmallNetwork]:
    """Draw small random networks in evaluation mode; ``network.input_shape`` is the shape of one example.

    Args:
        kinds: which of ``mlp``, ``convolutional`` (with batch norm), ``residual`` (with batch norm) and ``dense`` to draw.
        outputs: number of outputs.
        dtype: of the parameters.
    """
    st = _hypothesis()
    return st.builds(
        SmallNetwork,
        kind=st.sampled_from(kinds),
        activation=st.sampled_from(ACTIVATIONS),
        width=st.integers(2, 6),
        outputs=st.just(outputs),
        seed=st.integers(0, 2**32 - 1),
        dtype=st.just(dtype),
    )


class SmallNetwork(nn.Module):
    """A small random network, made anew from its arguments: its repr is all that is needed to repeat a failure.

    Args:
        kind: one of ``mlp``, ``convolutional``, ``residual`` and ``dense``.
        activation: name of a class in ``torch.nn``.
        width: of the hidden layers, or number of channels.
        outputs: number of outputs.
        seed: of the parameters.
        dtype: of the parameters.
    """

    def __init__(self, *, kind: str, activation: str, width: int, outputs: int, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.description = (
            f"kind={kind!r}, activation={activation!r}, width={width}, outputs={outputs}, seed={seed}, dtype={dtype}"
        )
        self.input_shape = (1, 5, 5) if kind == "convolutional" else (4,)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = BUILDERS[kind](getattr(nn, activation), width, outputs)
            _unsettle(self.body)
        self.to(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate."""
        return self.body(x)

    def __repr__(self) -> str:
        """Return the call that makes this network."""
        return f"SmallNetwork({self.description})"


ACTIVATIONS = ("ReLU", "LeakyReLU", "Hardtanh", "ReLU6")


class Residual(nn.Module):
    """``head(act(norm(second(act(first(z)))) + z))`` with ``z = act(stem(x))``."""

    def __init__(self, activation: type[nn.Module], width: int, outputs: int) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.norm, self.head, self.activation = nn.BatchNorm1d(width), nn.Linear(width, outputs), activation()

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate."""
        z = self.activation(self.stem(x))
        return self.head(self.activation(self.norm(self.second(self.activation(self.first(z)))) + z))


class Dense(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self, activation: type[nn.Module], width: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(4 + width, width)
        self.head, self.activation = nn.Linear(4 + 2 * width, outputs), activation()

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate."""
        x = torch.cat([x, self.activation(self.first(x))], 1)
        x = torch.cat([x, self.activation(self.second(x))], 1)
        return self.head(x)


def _mlp(activation: type[nn.Module], width: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), activation(), nn.Linear(width, width), activation(), nn.Linear(width, outputs))


def _convolutional(activation: type[nn.Module], width: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        nn.BatchNorm2d(width),
        activation(),
        nn.Conv2d(width, width, 2, dilation=2, padding=1),
        activation(),
        nn.AvgPool2d(2, stride=1),
        nn.Flatten(),
        nn.Linear(4 * width, outputs),
    )


BUILDERS: dict[str, Any] = {"mlp": _mlp, "convolutional": _convolutional, "residual": Residual, "dense": Dense}


@torch.no_grad()
def _unsettle(model: nn.Module) -> None:
    """Enlarge the weights, so that activations leave their linear range, and give batch norm statistics of its own."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.mul_(2.0)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.2, 2.0)
            module.weight.uniform_(-1.5, 1.5)
            module.bias.uniform_(-0.5, 0.5)


def _seeded(shape: tuple[int, ...], low: float, high: float, seed: int, margin: float, dtype: torch.dtype) -> Tensor:
    """Draw uniform values, the share ``2 * margin`` of them at the ends."""
    place = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    place = ((place - margin) / max(1 - 2 * margin, 1e-9)).clamp(0, 1)
    return (low + (high - low) * place).clamp(low, high).to(dtype)


def _hypothesis() -> Any:
    """Import hypothesis' strategies."""
    try:
        from hypothesis import strategies
    except ImportError as error:
        raise ImportError("the strategies of autodual.testing need hypothesis: pip install 'autodual[testing]'") from error
    return strategies
