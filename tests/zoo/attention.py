"""Transformers and mixers: attention by hand and by PyTorch's own modules."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.entry import zoo


class SelfAttention(nn.Module):
    """Several heads, written out."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(self.size)).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@zoo("single-head attention", (3, 4), scale=1.5, peer="1.06 (attention)")
class SingleHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        scores = torch.bmm(q, k.transpose(1, 2)) / math.sqrt(q.size(-1))
        return self.head(torch.bmm(F.softmax(scores, dim=-1), v).flatten(1))


@zoo("multi-head attention, by hand", (3, 6))
def multi_head() -> nn.Module:
    return nn.Sequential(SelfAttention(6, 2), nn.Flatten(), nn.Linear(18, 3))


@zoo("attention by einsum", (3, 4))
class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(4, 2, 3) / 2) for _ in range(3))
        self.wo = nn.Parameter(torch.randn(2, 3, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,dhk->bhtk", x, w) for w in (self.wq, self.wk, self.wv))
        weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / 3**0.5, -1)
        return torch.einsum("bhqk,bhkd,hdo->bqo", weights, v, self.wo)


@zoo("scaled_dot_product_attention", (3, 6))
class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (2, 3)).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


@zoo("causal attention", (4, 4))
class Causal(nn.Module):
    """A lower-triangular mask, filled with minus infinity; the next token's scores at every place."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12, bias=False), nn.Linear(4, 3)
        self.register_buffer("mask", torch.tril(torch.ones(4, 4)).view(1, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split(4, dim=2)
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.mask == 0, float("-inf"))
        return self.out(scores.softmax(dim=-1) @ v)


@zoo("attention with a padding mask", {"x": (3, 4)}, fixed={"keep": (3,)})
class Padded(nn.Module):
    """Which tokens count comes with the batch and does not move."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.value, self.out = nn.Linear(4, 8), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, dim=-1)
        scores = (q @ k.mT / 2).masked_fill((keep < -0.5).unsqueeze(1), -1e4)
        return self.out((torch.softmax(scores, dim=-1) @ self.value(x)).mean(1))


@zoo("nn.MultiheadAttention", (3, 6))
class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.head(y.mean(dim=1))


@zoo("nn.MultiheadAttention, time first", (3, 6))
class TimeFirst(nn.Module):
    """The module's own layout, tokens before examples, and its averaged weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 2), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        y, weights = self.attention(x, x, x)
        return self.head(torch.cat([y.mean(0), weights.mean(1)], dim=1))


@zoo("cross-attention to a memory", (2, 4))
class CrossAttention(nn.Module):
    """Queries from the input; keys and values are learned constants."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.query, self.head = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.query(x) @ self.memory.t(), dim=-1)
        return self.head((weights @ self.memory).flatten(1))


@zoo("hopfield retrieval", (5,))
class Hopfield(nn.Module):
    """Two updates towards stored patterns."""

    def __init__(self) -> None:
        super().__init__()
        self.patterns = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = F.softmax(2.0 * x @ self.patterns.T, dim=1) @ self.patterns
        return x


@zoo("attention, then layer norm", (3, 6), peer="2.2 (layer norm)")
class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm, self.head = SelfAttention(6, 2), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.attention(x)).mean(dim=1))


@zoo("nn.TransformerEncoderLayer", (3, 6))
def encoder_layer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, dim_feedforward=12, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(18, 3))


@zoo("nn.TransformerEncoder, norm first", (3, 6))
class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 12, activation="gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.position, self.head = nn.Parameter(0.1 * torch.randn(1, 3, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x + self.position)[:, 0])


@zoo("vit-tiny", (1, 6, 6), unit=True)
class VisionTransformer(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, dim, kernel_size=3, stride=3)
        self.token = nn.Parameter(0.1 * torch.randn(1, 1, dim))
        self.position = nn.Parameter(0.1 * torch.randn(1, 5, dim))
        self.blocks = nn.Sequential(Block(dim, 2), Block(dim, 2))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


@zoo("rotary positions", (3, 4))
class Rotary(nn.Module):
    """Queries and keys rotated by an angle that grows with the place."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 2)
        angle = torch.arange(3)[:, None] * torch.tensor([1.0, 0.1])
        self.register_buffer("cos", torch.cat([angle.cos(), angle.cos()], dim=-1))
        self.register_buffer("sin", torch.cat([angle.sin(), angle.sin()], dim=-1))

    def rotate(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((-second, first), dim=-1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        weights = torch.softmax(self.rotate(q) @ self.rotate(k).transpose(-2, -1) / 2, dim=-1)
        return self.head(weights @ v)


@zoo("linear attention", (3, 4))
class LinearAttention(nn.Module):
    """Positive features in place of the softmax, and a quotient."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        context = k.transpose(1, 2) @ v
        scale = (q * k.sum(dim=1, keepdim=True)).sum(-1, keepdim=True)
        return self.head((q @ context) / scale)


class MixerBlock(nn.Module):
    """Mixes tokens, then channels."""

    def __init__(self, tokens: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.tokens = nn.Sequential(nn.Linear(tokens, 8), nn.GELU(), nn.Linear(8, tokens))
        self.channels = nn.Sequential(nn.Linear(dim, 8), nn.GELU(), nn.Linear(8, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


@zoo("mlp-mixer", (1, 4, 4), unit=True)
class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(1, 6, 2, stride=2), MixerBlock(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x).flatten(2).mT).mean(dim=1))


@zoo("gmlp", (3, 6))
class GatedMlp(nn.Module):
    """Half of the channels gates the other half across tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(6, 6)
        self.gate_norm, self.spatial, self.head = nn.LayerNorm(6), nn.Conv1d(3, 3, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.up(self.norm(x))).chunk(2, dim=-1)
        y = x + self.down(u * self.spatial(self.gate_norm(v)))
        return self.head(y.mean(1))


@zoo("llama-like block", (3, 4))
class Llama(nn.Module):
    """Root-mean-square norm by hand, causal attention, SwiGLU."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.scale1, self.scale2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate, self.up, self.down = nn.Linear(dim, 6, False), nn.Linear(dim, 6, False), nn.Linear(6, dim, False)

    @staticmethod
    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x, self.scale1)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        h = self.norm(x, self.scale2)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@zoo("attention pooling", (4, 3))
class AttentionPooling(nn.Module):
    """One score per element of a bag, as in multiple-instance learning."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.u, self.w, self.head = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.w(torch.tanh(self.v(x)) * torch.sigmoid(self.u(x)))
        weights = torch.softmax(scores, dim=1)
        return self.head(torch.sum(weights * x, dim=1))
