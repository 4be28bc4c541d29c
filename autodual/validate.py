"""Prove on random inputs that a graph computes what the model computes, and find where each node keeps its batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autodual.compile import Program
from autodual.errors import TraceError
from autodual.graph import Node
from autodual.layout import Layout
from autodual.primal import evaluate


def validate(program: Program, model: nn.Module, arguments: Mapping[str, Any], call: Any) -> dict[str, Layout]:
    """Compare the primal walk with the model on random inputs and locate the batch in every perturbed node.

    Args:
        program: the compiled graph.
        model: the model it was traced from.
        arguments: values for the model's arguments by name, at least one example; axis 0 of every perturbed one is the batch.
        call: runs the model on a dict of arguments.

    Returns:
        The layout of every perturbed node, sources included.

    Raises:
        TraceError: the graph computes another function, draws random numbers, or mixes examples.
    """
    probes = Probes(program, arguments)
    with torch.no_grad(), buffers_kept(model):
        for batch in (2, 3) if program.has_batch_statistics else (1, 2, 3):
            _compare(program, model, call, probes.draw(batch))
        _compare(program, model, call, dict(arguments))
        two = evaluate(program.graph, model, probes.draw(2))
        three = evaluate(program.graph, model, probes.draw(3))
        layouts = {name: _locate(program, name, two[name], three[name]) for name in [*program.sources, *program.rules]}
        for node in program.graph.inputs:
            if node.name not in layouts and probes.is_batched(node):
                layouts[node.name] = Layout()
        if layouts.get(program.graph.output, Layout()) != Layout():
            shape = tuple(two[program.graph.output].shape)
            raise TraceError(f"the output has shape {shape} for a batch of 2: axis 0 must be the batch, one entry per example")
        if program.has_batch_statistics:
            return layouts
        return _separate(program, model, probes, layouts)


class Probes:
    """Random inputs that look like the user's, in any batch size."""

    def __init__(self, program: Program, arguments: Mapping[str, Any]) -> None:
        self.program, self.arguments = program, arguments
        source = program.graph.by_name[program.sources[0]]
        self.batch = len(arguments[source.operator])
        self.generator = torch.Generator().manual_seed(0)

    def is_batched(self, node: Node) -> bool:
        """Whether an argument has one entry per example."""
        value = self.arguments[node.operator]
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == self.batch

    def draw(self, batch: int) -> dict[str, Any]:
        """Repeat the first example and move each copy somewhere else."""
        result = dict(self.arguments)
        for node in self.program.graph.inputs:
            value = self.arguments[node.operator]
            if not self.is_batched(node):
                continue
            value = value[:1].detach().expand(batch, *value.shape[1:]).clone()
            if node.name in self.program.sources:
                noise = torch.randn(value.shape, generator=self.generator, dtype=torch.float64).to(value)
                scale = value.abs().mean() if value.numel() else value.new_ones(())
                value = value + noise * torch.where(scale > 0, scale, 1.0)
            result[node.operator] = value
        return result


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore every buffer afterwards: running statistics must not move because we looked at the model."""
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)  # .data: graphs that hold the buffer see its old value again, so they stay valid


def _random_state() -> list[Tensor]:
    """Return the state of every generator a model may draw from."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _compare(program: Program, model: nn.Module, call: Any, arguments: dict[str, Any]) -> None:
    state = _random_state()
    expected = call({name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()})
    if not all(map(torch.equal, state, _random_state())):
        torch.set_rng_state(state[0])
        raise TraceError(
            "the model draws random numbers in its forward: it is not one function that could be bounded; call .eval()"
        )
    actual = evaluate(program.graph, model, arguments)[program.graph.output]
    if agree(expected, actual):
        return
    found = f"{(actual - expected).abs().max():.3g}" if actual.shape == expected.shape else f"shape {tuple(actual.shape)}"
    raise TraceError(
        f"the traced graph does not compute the model's function (difference {found}, output {tuple(expected.shape)}). "
        "Likely causes: a branch on the type of x, random numbers, state changed in forward, a batch size baked in. "
        "Pass example_input= to trace with torch.export, or rewrite that code."
    )


def agree(expected: Tensor, actual: Tensor) -> bool:
    """Whether two computations of the same outputs agree up to float rounding."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    scale = torch.nan_to_num(expected.abs(), posinf=0.0).amax() if expected.numel() else expected.new_zeros(())
    tolerance = 1e3 * torch.finfo(expected.dtype).eps * (1 + scale.item())
    return torch.allclose(actual, expected, rtol=0, atol=tolerance, equal_nan=True)


def _locate(program: Program, name: str, two: Any, three: Any) -> Layout:
    """Find the axis that grows with the batch."""
    node = program.graph.by_name[name]
    where = f'node "{name}" at {node.origin}'
    if not isinstance(two, Tensor):
        raise TraceError(f"{where} yields a {type(two).__name__} of perturbed values: only tensors can be bounded")
    grown = [axis for axis, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
    if len(grown) != 1 or 3 * two.shape[grown[0]] != 2 * three.shape[grown[0]]:
        raise TraceError(
            f"{where} has shape {tuple(two.shape)} for a batch of 2 and {tuple(three.shape)} for a batch of 3: the examples of "
            "a batch are mixed or the batch size is baked in; every perturbed value must keep one entry per example"
        )
    return Layout(grown[0], two.shape[grown[0]] // 2)


def _separate(program: Program, model: nn.Module, probes: Probes, layouts: dict[str, Layout]) -> dict[str, Layout]:
    """Change one example only: nothing that belongs to another may move. Settles merged axes too."""
    result = dict(layouts)
    for _ in range(2):
        before, other = probes.draw(3), probes.draw(3)
        after = dict(before)
        for source in program.sources:
            key = program.graph.by_name[source].operator
            after[key] = before[key].clone()
            after[key][1] = other[key][1]
        old, new = evaluate(program.graph, model, before), evaluate(program.graph, model, after)
        for name in program.rules:
            changed = (old[name] != new[name]) & ~(old[name].isnan() & new[name].isnan())
            candidates = [result[name]] if result[name].factor == 1 else _orders(result[name], layouts[name])
            fitting = [layout for layout in candidates if not layout.examples(changed, 3)[[0, 2]].any()]
            if not fitting:
                node = program.graph.by_name[name]
                raise TraceError(
                    f'node "{name}" at {node.origin} mixes the examples of a batch: changing one example changes another. '
                    "Bounds hold example by example; move the mixing out of the model"
                )
            result[name] = fitting[0]
    return result


def _orders(current: Layout, original: Layout) -> list[Layout]:
    return [Layout(original.axis, original.factor, outer) for outer in (current.outer, not current.outer)]
