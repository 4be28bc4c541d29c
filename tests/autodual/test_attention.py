"""Attention in every usual spelling, PyTorch's own modules and by hand: no point leaves its finite bounds."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autodual
from autodual.attacks import minimize
from dual_layers import UNKNOWN, Call, Slot
from dual_layers.attention import DualAttention

METHODS = ("interval", "dual", "adaptive")
TOKENS, WIDTH = 3, 4


class Fused(nn.Module):
    """Two heads of ``F.scaled_dot_product_attention``; ``options`` are those of the call."""

    def __init__(self, mask: Tensor | None = None, **options) -> None:
        super().__init__()
        self.qkv, self.out, self.options = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2), options
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, self.mask, **self.options)
        return self.out(y.transpose(1, 2).flatten(2)).flatten(1)


class Written(nn.Module):
    """The same written out as a vision transformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * (width // 2) ** -0.5).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width)).flatten(1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(WIDTH // 2)).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """A class token, positions, one block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.norm, self.head = (
            nn.Linear(WIDTH, WIDTH),
            Block(),
            nn.LayerNorm(WIDTH),
            nn.Linear(WIDTH, 3),
        )
        self.token, self.position = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(1, TOKENS + 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1) + self.position
        return self.head(self.norm(self.block(x))[:, 0])


class Minus(nn.Module):
    """A mask of minus infinity, filled in or added, as people write it."""

    def __init__(self, added: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.added = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2), added
        self.register_buffer("mask", torch.triu(torch.ones(TOKENS, TOKENS), 1).bool())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.mT / 2
        if self.added:
            scores = scores + torch.zeros(TOKENS, TOKENS).masked_fill(self.mask, -torch.inf)
        else:
            scores = scores.masked_fill(self.mask, float("-inf"))
        return self.out(torch.softmax(scores, -1) @ v).flatten(1)


class Multihead(nn.Module):
    """``nn.MultiheadAttention``, to itself or to something fixed."""

    def __init__(self, *, batch_first: bool = True, weights: bool = False, cross: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first, add_bias_kv=cross)
        self.head = nn.Linear(TOKENS if weights else WIDTH, 2)
        self.batch_first, self.weights = batch_first, weights
        self.memory = nn.Parameter(torch.randn(1, 5, WIDTH)) if cross else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        memory = x if self.memory is None else self.memory.expand(x.shape[0], -1, -1)
        y, weights = self.attention(x, memory, memory, need_weights=self.weights)
        if self.weights:
            return self.head(weights).flatten(1)
        return self.head(y if self.batch_first else y.transpose(0, 1)).flatten(1)


def encoder(layers: int = 1, **options) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, batch_first=True, **options)
    body = layer if layers == 1 else nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return nn.Sequential(body, nn.Flatten(), nn.Linear(TOKENS * WIDTH, 2))


class Decoder(nn.Module):
    """A decoder that attends to its own past and to an encoder's output, under masks that PyTorch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 8, batch_first=True), 1)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        past = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.head(self.layer(x, 0.5 * x, tgt_mask=past)).flatten(1)


LOWER = torch.ones(TOKENS, TOKENS).tril()
NETWORKS = {
    "fused": Fused,
    "fused, causal": lambda: Fused(is_causal=True),
    "fused, mask": lambda: Fused(LOWER.bool()),
    "fused, added mask, scale": lambda: Fused(torch.randn(TOKENS, TOKENS).masked_fill(LOWER == 0, -torch.inf), scale=1.5),
    "written out": Written,
    "vision transformer": VisionTransformer,
    "minus infinity filled": lambda: Minus(False),
    "minus infinity added": lambda: Minus(True),
    "multihead": Multihead,
    "multihead, time first, weights": lambda: Multihead(batch_first=False, weights=True),
    "multihead, cross": lambda: Multihead(cross=True),
    "encoder layer": encoder,
    "encoder layer, norm first, gelu": lambda: encoder(norm_first=True, activation="gelu"),
    "encoder": lambda: encoder(2),
    "decoder": Decoder,
}
WIDTHS = {
    "vision transformer": 3.0,
    "encoder layer": 2.0,
    "encoder layer, norm first, gelu": 2.0,
    "encoder": 7.0,
    "decoder": 3.0,
}
"""Largest median width over the range that was reached, at eps 0.05, by the dual method; 1.6 for all others."""


def built(name: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return NETWORKS[name]().double().eval(), torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)


@torch.no_grad()
def reached(model: nn.Module, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The extremes of the outputs over 2,000 points and an attack on every output from both sides."""
    rng = torch.Generator().manual_seed(0)
    moves = 2 * torch.rand(2_000, *x.shape, generator=rng, dtype=x.dtype) - 1
    moves[1_000:] = moves[1_000:].sign()
    values = model((x + eps * moves).flatten(0, 1)).unflatten(0, (2_000, len(x)))
    outputs = values.shape[-1]
    rows = torch.cat([torch.eye(outputs), -torch.eye(outputs)]).to(x.dtype)
    attacked, _ = minimize(model, x, autodual.LInf(eps), rows, steps=15, restarts=1, generator=rng)
    return torch.minimum(values.amin(0), attacked[:, :outputs]), torch.maximum(values.amax(0), -attacked[:, outputs:])


LONG = (
    "fused, mask",
    "minus infinity filled",
    "vision transformer",
    "encoder layer",
    "encoder layer, norm first, gelu",
    "encoder",
    "decoder",
)  # the zoo has such too


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in NETWORKS])
def test_no_point_leaves_its_bounds(name: str) -> None:
    model, x = built(name)
    net = autodual.certify(model)
    for eps in (1e-3, 0.05, 0.5):
        lowest, highest = reached(model, x, eps)
        moving = (highest - lowest) > 1e-12
        for method in METHODS if eps == 0.05 else ("interval", "dual"):
            bounds = net.bounds(x, autodual.LInf(eps), method=method)
            assert bounds.lower.isfinite().all()
            assert bounds.upper.isfinite().all()
            assert (bounds.lower <= lowest + 1e-9).all(), (method, eps)
            assert (bounds.upper >= highest - 1e-9).all(), (method, eps)
            width = (bounds.width / (highest - lowest))[moving].median()
            assert method == "interval" or eps > 0.01 or width < 1.1
            assert method == "interval" or eps != 0.05 or width < WIDTHS.get(name, 1.6)
    assert net.verify(x, [0, 1], autodual.LInf(1e-4)).margins.isfinite().all()


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", ["fused, causal", "vision transformer", "minus infinity filled"])
def test_the_forward_walk_agrees(name: str) -> None:
    model, x = built(name)
    net = autodual.certify(model)
    for eps in (0.02, 0.5):
        methods = autodual.Dual(walk="backward"), autodual.Dual(walk="forward")
        backward, forward = (net.bounds(x, autodual.LInf(eps), method=method) for method in methods)
        torch.testing.assert_close(forward.lower, backward.lower, atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(forward.upper, backward.upper, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("name", ["fused, mask", pytest.param("vision transformer", marks=pytest.mark.slow)])
def test_bounds_are_differentiable_in_the_parameters(name: str) -> None:
    model, x = built(name)
    net, weights = autodual.certify(model), list(model.parameters())
    rng = torch.Generator().manual_seed(6)
    towards = [torch.randn(weight.shape, generator=rng, dtype=weight.dtype) for weight in weights]

    def total() -> Tensor:
        return net.bounds(x, autodual.LInf(0.02)).lower.sum()

    grads = torch.autograd.grad(total(), weights)

    @torch.no_grad()
    def moved(step: float) -> float:
        for weight, direction in zip(weights, towards, strict=True):
            weight += step * direction
        value = total().item()
        for weight, direction in zip(weights, towards, strict=True):
            weight -= step * direction
        return value

    expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
    assert sum((grad * to).sum().item() for grad, to in zip(grads, towards, strict=True)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", [pytest.param("encoder layer", marks=pytest.mark.slow), "multihead"])
def test_frozen_layers_are_taken_apart_too(name: str) -> None:
    """In evaluation mode, without gradients, PyTorch runs these as one operator; here they are bounded as ever."""
    model, x = built(name)
    expected = autodual.certify(model).bounds(x, autodual.LInf(0.05))
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        found = autodual.certify(model.requires_grad_(False)).bounds(x, autodual.LInf(0.05))
    assert torch.backends.mha.get_fastpath_enabled() == fast
    torch.testing.assert_close(found.lower, expected.lower)
    torch.testing.assert_close(found.upper, expected.upper)


@pytest.mark.parametrize("name", ["written out", "multihead, time first, weights"])
def test_examples_are_bounded_apart(name: str) -> None:
    """The batch may sit beside the heads in one axis; its size is nowhere in the graph."""
    model, x = built(name)
    net = autodual.certify(model)
    whole = net.bounds(torch.cat([x, -x, x]), autodual.LInf(0.1))
    for index in range(2):
        single = net.bounds(x[index : index + 1], autodual.LInf(0.1))
        torch.testing.assert_close(whole.lower[index], single.lower[0])
        torch.testing.assert_close(whole.upper[index + 4], single.upper[0])


class Blind(nn.Module):
    """A query that sees nothing answers zero."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Linear(WIDTH, 2 * WIDTH)
        self.register_buffer("seen", torch.tensor([[True, False, True], [False, False, False], [True, True, True]]))

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        return F.scaled_dot_product_attention(q, k, x, attn_mask=self.seen).flatten(1)


def test_queries_that_see_nothing() -> None:
    model = Blind().double()
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for method in METHODS:
        bounds = autodual.certify(model).bounds(x, autodual.LInf(0.1), method=method)
        assert bounds.lower[:, WIDTH : 2 * WIDTH].abs().max() < 1e-12
        assert bounds.upper[:, WIDTH : 2 * WIDTH].abs().max() < 1e-12
        assert bounds.width[:, :WIDTH].min() > 0


class Padded(nn.Module):
    """Which tokens count comes with every example."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(WIDTH, 1, batch_first=True)

    def forward(self, x: Tensor, missing: Tensor) -> Tensor:
        return self.layer(x, x, x, key_padding_mask=missing > 0, need_weights=False)[0].flatten(1)


def test_a_padding_mask_that_comes_with_the_batch() -> None:
    model, rng = Padded().double().eval(), torch.Generator().manual_seed(0)
    x = torch.randn(2, TOKENS, WIDTH, generator=rng, dtype=torch.float64)
    missing = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    net, region = autodual.certify(model), autodual.LInf(0.1)
    bounds = net.bounds({"x": x, "missing": missing}, {"x": region})
    for _ in range(200):
        value = model(region.sample(x, rng), missing)
        assert (bounds.lower <= value + 1e-9).all()
        assert (bounds.upper >= value - 1e-9).all()
    moved = x.clone()
    moved[0, 2], moved[1, 1] = 9.0, -9.0  # what is masked changes nothing but its own query
    other = net.bounds({"x": moved, "missing": missing}, {"x": region})
    torch.testing.assert_close(other.lower[0, : 2 * WIDTH], bounds.lower[0, : 2 * WIDTH])
    torch.testing.assert_close(other.upper[1, :WIDTH], bounds.upper[1, :WIDTH])


def test_dropout_in_attention_is_refused() -> None:
    call = Call(F.scaled_dot_product_attention, (Slot(0), Slot(1), UNKNOWN), {"dropout_p": 0.1})
    assert "random numbers" in DualAttention.refuse(call)
    with pytest.raises((autodual.UnsupportedOperatorError, autodual.TraceError), match=r"training|eval|random"):
        autodual.certify(encoder(dropout=0.1).train()).bounds(torch.randn(2, TOKENS, WIDTH), autodual.LInf(0.1))


def test_single_precision_holds_the_points_of_double() -> None:
    model, x = built("vision transformer")
    lowest, highest = reached(model, x, 0.05)
    bounds = autodual.certify(model.float()).bounds(x.float(), autodual.LInf(0.05))
    assert (bounds.lower <= lowest + 1e-5).all()
    assert (bounds.upper >= highest - 1e-5).all()
