"""Operators that people write out are recognised, their lookalikes are not, and the function stays the same."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autodual
import dual_layers
from autodual.primal import evaluate
from autodual.trace import trace
from dual_layers import registry
from dual_layers.attention import average
from dual_layers.layer_norms import divided_by_size


class Body(nn.Module):
    def __init__(self, body) -> None:
        super().__init__()
        self.body, self.drop, self.soft = body, nn.Dropout(0.2), nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def exponentials(z: Tensor, axis: int) -> Tensor:
    e = torch.exp(z)
    return e / e.sum(axis, keepdim=True)


def own_shares(z: Tensor) -> Tensor:
    e = (z - z.max(dim=-1, keepdim=True).values).exp()
    return torch.div(e, torch.sum(e, dim=-1, keepdim=True))


def size(x: Tensor) -> Tensor:
    return x.pow(2).mean(-1, keepdim=True)


RECOGNISED = {
    "llama": (lambda m, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), divided_by_size),
    "root, quotient": (lambda m, x: x / torch.sqrt(torch.mean(x * x, dim=2, keepdim=True) + 0.1), divided_by_size),
    "powers": (lambda m, x: (1e-3 + (x**2).mean((1, 2), keepdim=True)) ** -0.5 * x, divided_by_size),
    "half power, channels": (lambda m, x: torch.div(x, (x.square().mean(1, True) + 1e-3).pow(0.5)), divided_by_size),
    "layer norm": (
        lambda m, x: (lambda d: d / (d.square().mean(-1, keepdim=True) + 0.1).sqrt())(x - x.mean(-1, True)),
        divided_by_size,
    ),
    "average": (lambda m, x: torch.softmax(x @ x.mT, -1) @ x, average),
    "average behind dropout": (lambda m, x: torch.matmul(m.drop(m.soft(x @ x.mT)), x), average),
    "average, bmm": (lambda m, x: torch.bmm(F.softmax(x @ x.mT, dim=-1), x), average),
}
LOOKALIKES = {
    "another tensor's size": (lambda m, x: x * torch.rsqrt(size(x + 1) + 1e-6), divided_by_size),
    "a sum of squares": (lambda m, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6), divided_by_size),
    "cubes": (lambda m, x: x * torch.rsqrt((x.abs() ** 3).mean(-1, keepdim=True) + 1e-6), divided_by_size),
    "a perturbed eps": (lambda m, x: x * torch.rsqrt(size(x) + x.square()), divided_by_size),
    "a scaled eps": (lambda m, x: x * torch.rsqrt(torch.add(size(x), 1.0, alpha=2)), divided_by_size),
    "the other way up": (lambda m, x: torch.sqrt(size(x) + 0.1) / (x + 9), divided_by_size),
    "not inverted": (lambda m, x: x * torch.sqrt(size(x) + 0.1), divided_by_size),
    "no root": (lambda m, x: x / (size(x) + 0.1), divided_by_size),
    "shares, which overflow": (lambda m, x: exponentials(x, 1), torch.softmax),
    "shares less the largest": (lambda m, x: own_shares(x), torch.softmax),
    "two axes of shares": (lambda m, x: (lambda e: e / e.sum((1, 2), keepdim=True))(x.exp()), torch.softmax),
    "others' exponentials": (lambda m, x: x.exp() / (x + 1).exp().sum(-1, keepdim=True), torch.softmax),
    "average over queries": (lambda m, x: torch.softmax(x @ x.mT, 1) @ x, average),
    "weights last": (lambda m, x: x.mT @ torch.softmax(x @ x.mT, -1), average),
}


def example() -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def check(model: nn.Module) -> set:
    """Compare the graph with the model; return the operators that may have been put in."""
    graph, x = trace(model, example=example()), example()
    torch.testing.assert_close(evaluate(graph, model, {"x": x})[graph.output], model(x))
    names = {"softmax": torch.softmax}
    return {names.get(node.operator, node.operator) for node in graph.nodes if node.kind == "call"}


@pytest.mark.parametrize("name", RECOGNISED)
def test_what_is_written_out_is_recognised(name: str) -> None:
    body, expected = RECOGNISED[name]
    model = Body(body).double().eval()
    found = check(model)
    assert expected in found
    region = autodual.LInf(0.3)
    bounds, rng = autodual.certify(model).bounds(example(), region), torch.Generator().manual_seed(1)
    for _ in range(200):
        value = model(region.sample(example(), rng)).flatten(1)
        assert ((bounds.lower <= value + 1e-9) & (value - 1e-9 <= bounds.upper)).all()


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_are_left_alone(name: str) -> None:
    body, unexpected = LOOKALIKES[name]
    assert unexpected not in check(Body(body).double().eval())


@pytest.mark.parametrize("walk", ["symbolic", "export"])
def test_bounds_are_those_of_the_operator(walk: str) -> None:
    def by_hand(m: nn.Module, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (2, -1)).flatten(-2) if walk == "symbolic" or x.shape[1] else x
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    plain = Body(lambda m, x: F.rms_norm(x, (4,), eps=1e-6)).double()
    nets = [autodual.certify(model) for model in (Body(by_hand).double(), plain)]
    for method in ("interval", "dual", "adaptive"):
        ours, theirs = (net.bounds(example(), autodual.LInf(0.5), method=method) for net in nets)
        torch.testing.assert_close(ours.lower, theirs.lower)
        torch.testing.assert_close(ours.upper, theirs.upper)


def test_the_parts_may_serve_others_too() -> None:
    def body(m: nn.Module, x: Tensor) -> Tensor:
        inverse = torch.rsqrt(size(x) + 1e-6)
        return torch.cat([x * inverse, inverse], -1)

    found = check(Body(body).double())
    assert divided_by_size in found
    assert torch.rsqrt in found
    assert operator.add in found


@pytest.mark.parametrize("name", ["rsqrt", "square"])
def test_a_function_of_the_same_name_is_another_operator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators of the user's own that share the names of torch's; a trace records them whole."""
    monkeypatch.setattr(registry, "_RULES", {key: list(rules) for key, rules in registry._RULES.items()})

    def rsqrt(z: Tensor) -> Tensor:
        return 2 * torch.rsqrt(z)

    def square(z: Tensor) -> Tensor:
        return z * z + 1

    own = dual_layers.elementwise({"rsqrt": rsqrt, "square": square}[name])
    bodies = {
        "rsqrt": lambda m, x: x * own(size(x) + 0.1),
        "square": lambda m, x: x * torch.rsqrt(own(x).mean(-1, keepdim=True) + 0.1),
    }
    assert divided_by_size not in check(Body(bodies[name]).double().eval())


def test_arguments_of_dropout_may_be_named() -> None:
    body = lambda m, x: torch.matmul(m.drop(input=m.soft(x @ x.mT)), x)  # noqa: E731
    assert average in check(Body(body).double().eval())
