"""Random programs of views and mutations: the trace computes the same function or is refused."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autodual.passes.functionalize import SharedMemoryError
from autodual.trace import ExampleNeededError, trace
from tests.reference.tracing import run_graph

# Every step keeps the batch first and at least one column. Each takes (random, values) and gives a new value or None.
VIEWS = [
    lambda t, r: t[:, : r.randint(1, 3)],
    lambda t, r: t[:, -1:],
    lambda t, r: t[..., ::2],
    lambda t, r: t[:, [0]],
    lambda t, r: t[None][0],
    lambda t, r: t.t().t(),
    lambda t, r: t.view(t.size(0), -1),
    lambda t, r: t.reshape(t.size(0), t.size(1)),
    lambda t, r: t.contiguous(),
    lambda t, r: t.unsqueeze(1).squeeze(1),
    lambda t, r: t.narrow(1, 0, 1),
    lambda t, r: t.split(1, 1)[0],
    lambda t, r: t.expand(t.size(0), t.size(1)),
    lambda t, r: t.select(1, 0)[:, None],
    lambda t, r: nn.functional.dropout(t, 0.5, training=False),
    lambda t, r: t.detach(),
    lambda t, r: t,
]
PURE = [lambda t, r: t * 2, lambda t, r: F.relu(t), lambda t, r: t.clone(), lambda t, r: torch.cat([t, t], 1), lambda t, r: -t]


def _add(t, r):
    t += r.randint(1, 5)
    return t


def _item(t, r):
    t[:, r.choice([0, -1])] = r.randint(1, 9)


def _part(t, r):
    t[:, :1] *= 3


def _column(t, r):
    t[:, 0].sub_(7)


MUTATIONS = [
    _add, _item, _part, _column,
    lambda t, r: t.mul_(r.randint(2, 4)),
    lambda t, r: F.relu(t, inplace=True),
    lambda t, r: torch.relu_(t),
    lambda t, r: t.fill_(r.randint(1, 3)),
    lambda t, r: t.clamp_(min=r.choice([-1, 0.5])),
    lambda t, r: t.copy_(t.flip(1)),
    lambda t, r: t[:, -1:].add_(t[:, :1]),
]  # fmt: skip


class Program(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.seed = seed

    def forward(self, x):
        r = random.Random(self.seed)
        values = [x]
        for _ in range(r.randint(3, 9)):
            t = r.choice(values)
            step = r.choice(r.choice([VIEWS, VIEWS, PURE, MUTATIONS, MUTATIONS]))
            result = step(t, r)
            if result is not None:
                values.append(result)
        return torch.stack([(k + 1) * value.sum(1) + value[:, 0] for k, value in enumerate(values)], 1)


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_random_programs(first):
    followed = 0
    for seed in range(first, first + 100):
        model = Program(seed)
        try:
            graph = trace(model)
        except ExampleNeededError as problem:
            if not isinstance(problem.__cause__, SharedMemoryError):
                raise
            continue
        followed += 1
        for batch in (2, 3):
            x = torch.randn(batch, 4, generator=torch.Generator().manual_seed(seed))
            expected = model(x.clone())
            assert torch.equal(run_graph(graph, model, {"x": x}), expected), seed
    assert followed > 30
