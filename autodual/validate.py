"""Prove on random inputs that a graph computes what the model computes, and find where each node keeps its batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autodual.compile import Program
from autodual.errors import AutoDualError, TraceError
from autodual.graph import Node
from autodual.layout import Layout
from autodual.primal import evaluate

Arguments = Mapping[str, Any]
ROUNDS = 2  # how often each example is moved: a change may hide behind a nonlinearity once


@dataclass(frozen=True)
class Placement:
    """Where the examples are.

    Attributes:
        layouts: the layout of every perturbed node, and of every input that has a batch.
        alone: why a batch of one is something else to this model (a ``squeeze()`` took its axis), or None if it is not.
    """

    layouts: Mapping[str, Layout]
    alone: str | None = None


def validate(program: Program, model: nn.Module, arguments: Arguments, call: Callable[[Arguments], Tensor]) -> Placement:
    """Compare the primal walk with the model on random inputs and locate the batch in every perturbed node.

    Args:
        program: the compiled graph.
        model: the model it was traced from.
        arguments: values for the model's arguments by name, at least one example; axis 0 of every perturbed one is the batch.
        call: runs the model on a dict of arguments.

    Returns:
        Where every perturbed node keeps its examples.

    Raises:
        TraceError: the graph computes another function, draws random numbers, or mixes examples.
    """
    try:
        return _validate(program, model, Probes(program, arguments), call)
    except AutoDualError:
        tables = Probes(program, arguments, tables=True)  # a fixed input may have as many rows as the batch by chance
        if not any(Probes(program, arguments).is_batched(node) != tables.is_batched(node) for node in program.graph.inputs):
            raise
        try:
            return _validate(program, model, tables, call)
        except AutoDualError:
            pass
        raise


def _validate(program: Program, model: nn.Module, probes: Probes, call: Callable[[Arguments], Tensor]) -> Placement:
    arguments = probes.arguments
    with torch.no_grad(), buffers_kept(model):
        for batch in (2, 3):
            _compare(program, model, call, probes.draw(batch))
        two, three = (evaluate(program.graph, model, probes.draw(batch)) for batch in (2, 3))
        layouts = {name: _locate(program, name, two[name], three[name]) for name in [*program.sources, *program.rules]}
        for node in program.graph.inputs:
            if node.name not in layouts and probes.is_batched(node):
                layouts[node.name] = Layout()
        if layouts.get(program.graph.output, Layout()) != Layout():
            shape = tuple(two[program.graph.output].shape)
            raise TraceError(f"the output has shape {shape} for a batch of 2: axis 0 must be the batch, one entry per example")
        alone = None
        if not program.has_batch_statistics:
            for batch in (5, 7):
                layouts = _separate(program, model, probes, layouts, batch)
            alone = _alone(program, model, call, probes, layouts)
        if probes.batch > 1 or alone is None:
            _compare(program, model, call, arguments)
    return Placement(layouts, alone)


class Probes:
    """Random inputs that look like the user's, in any batch size.

    Args:
        program: the compiled graph.
        arguments: the user's.
        tables: take fixed inputs for the same in every batch, even where their first size is the batch's.
    """

    def __init__(self, program: Program, arguments: Arguments, *, tables: bool = False) -> None:
        self.program, self.arguments, self.tables = program, arguments, tables
        source = program.graph.by_name[program.sources[0]]
        self.batch = len(arguments[source.operator])
        self.generator = torch.Generator().manual_seed(0)

    def is_batched(self, node: Node) -> bool:
        """Whether an argument has one entry per example."""
        value = self.arguments[node.operator]
        if self.tables and node.name not in self.program.sources:
            return False
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == self.batch

    def draw(self, batch: int) -> dict[str, Any]:
        """Repeat the user's examples in turn, and move what is perturbed somewhere else."""
        result = dict(self.arguments)
        rows = torch.arange(batch) % self.batch
        for node in self.program.graph.inputs:
            value = self.arguments[node.operator]
            if self.is_batched(node):
                value = value.detach()[rows.to(value.device)]
                result[node.operator] = self.moved(value) if node.name in self.program.sources else value
        return result

    def moved(self, value: Tensor) -> Tensor:
        """Add noise of the size of the values."""
        noise = torch.randn(value.shape, generator=self.generator, dtype=torch.float64).to(value)
        scale = value.abs().mean() if value.numel() else value.new_ones(())
        return value + noise * torch.where(scale > 0, scale, 1.0)

    def with_examples_moved(self, arguments: Arguments, chosen: Tensor) -> dict[str, Any]:
        """Move the perturbed inputs of some examples only, ``chosen`` being ``(batch,)`` bool."""
        result = dict(arguments)
        for source in self.program.sources:
            key = self.program.graph.by_name[source].operator
            value = arguments[key].detach()
            mask = chosen.to(value.device).view(-1, *[1] * (value.ndim - 1))
            result[key] = torch.where(mask, self.moved(value), value)
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


def agree(expected: Tensor, actual: Tensor) -> bool:
    """Whether two computations of the same outputs agree up to float rounding, element by element.

    The typical magnitude counts, never the largest: one huge output, such as a masked score, must not excuse the others.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if not expected.numel():
        return True
    size = torch.nan_to_num(expected.abs().double(), posinf=0.0)
    tolerance = 1e3 * torch.finfo(expected.dtype).eps * (1 + size + size.median())
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    return bool((same | ((expected.double() - actual.double()).abs() <= tolerance)).all())


def check_separate(program: Program, model: nn.Module, layouts: Mapping[str, Layout], arguments: Arguments) -> None:
    """Check on the very batch that is to be bounded that no example moves another.

    Needed where fixed inputs take part, since their values may decide which examples meet (sorting by lengths). Every
    ordered pair of examples is told apart by one bit of its indices, so moving the examples with a bit set, and those
    without, covers all pairs.

    Raises:
        TraceError: examples are mixed.
    """
    probes = Probes(program, arguments)
    index = torch.arange(probes.batch)
    with torch.no_grad(), buffers_kept(model):
        before = evaluate(program.graph, model, arguments)
        for bit in range((probes.batch - 1).bit_length()):
            for chosen in ((index >> bit) % 2 == 1, (index >> bit) % 2 == 0):
                after = evaluate(program.graph, model, probes.with_examples_moved(arguments, chosen))
                for name in program.rules:
                    if not _is_still(layouts[name], before[name], after[name], ~chosen):
                        raise _mixed(program, name)


def _random_state() -> list[Tensor]:
    """Return the state of every generator a model may draw from."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _compare(program: Program, model: nn.Module, call: Callable[[Arguments], Tensor], arguments: Arguments) -> None:
    state = _random_state()
    expected = call(arguments)
    if not all(map(torch.equal, state, _random_state())):
        torch.set_rng_state(state[0])
        raise TraceError("the model draws random numbers in its forward: it is not one function to be bounded; call .eval()")
    actual = evaluate(program.graph, model, arguments)[program.graph.output]
    if agree(expected, actual):
        return
    if not expected.is_floating_point():
        raise TraceError(f"the model returns {expected.dtype}: only floating-point numbers can be bounded; convert them")
    found = f"{(actual - expected).abs().max():.3g}" if actual.shape == expected.shape else f"shape {tuple(actual.shape)}"
    raise TraceError(
        f"the traced graph does not compute the model's function (difference {found}, output {tuple(expected.shape)}). "
        "Likely causes: a branch on the type of x, random numbers, state changed in forward, a batch size baked in, or "
        "rounding where inputs are very large. Pass example_input= to trace with torch.export, rewrite that code, or use "
        "double precision."
    )


def _where(program: Program, name: str) -> str:
    return f'node "{name}" at {program.graph.by_name[name].origin}'


def _mixed(program: Program, name: str) -> TraceError:
    return TraceError(
        f"{_where(program, name)} mixes the examples of a batch: changing one example changes another. "
        "Bounds hold example by example; move the mixing out of the model"
    )


def _locate(program: Program, name: str, two: Any, three: Any) -> Layout:
    """Find the axis that grows with the batch."""
    where = _where(program, name)
    if not isinstance(two, Tensor):
        raise TraceError(f"{where} yields a {type(two).__name__} of perturbed values: only tensors can be bounded")
    if not two.is_floating_point():
        raise TraceError(f"{where} converts perturbed values to {two.dtype}: rounding to whole numbers cannot be bounded")
    grown = [axis for axis, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
    if len(grown) != 1 or 3 * two.shape[grown[0]] != 2 * three.shape[grown[0]]:
        raise TraceError(
            f"{where} has shape {tuple(two.shape)} for a batch of 2 and {tuple(three.shape)} for a batch of 3: the examples of "
            "a batch are mixed or the batch size is baked in; every perturbed value must keep one entry per example"
        )
    return Layout(grown[0], two.shape[grown[0]] // 2)


def _separate(
    program: Program, model: nn.Module, probes: Probes, layouts: Mapping[str, Layout], batch: int
) -> dict[str, Layout]:
    """Move one example at a time: nothing that belongs to another may move. Settles the order of merged axes too."""
    result = dict(layouts)
    candidates = {name: _orders(result[name]) for name in program.rules}
    for _ in range(ROUNDS):
        arguments = probes.draw(batch)
        before = evaluate(program.graph, model, arguments)
        for i in range(batch):
            chosen = torch.arange(batch) == i
            after = evaluate(program.graph, model, probes.with_examples_moved(arguments, chosen))
            for name, layouts_left in candidates.items():
                fitting = [layout for layout in layouts_left if _is_still(layout, before[name], after[name], ~chosen)]
                if not fitting:
                    raise _mixed(program, name)
                candidates[name] = fitting
    for name, fitting in candidates.items():
        if len(fitting) > 1:
            raise TraceError(f"{_where(program, name)} merges the batch with another axis, and in which order cannot be seen")
        result[name] = fitting[0]
    return result


def _orders(layout: Layout) -> list[Layout]:
    """List the ways to merge a batch with other axes, before and behind it; only one where it is not merged."""
    divisors = [before for before in range(1, layout.factor + 1) if layout.factor % before == 0]
    return [Layout(layout.axis, layout.factor, before) for before in divisors]


def _is_still(layout: Layout, before: Tensor, after: Tensor, chosen: Tensor) -> bool:
    """Whether the entries of the chosen examples are the same in two evaluations, of the shape the layout says."""
    batch = len(chosen)
    if before.shape != after.shape or before.shape[layout.axis] != batch * layout.factor:
        return False
    chosen = chosen.to(before.device)
    kept, found = (layout.examples(value, batch)[chosen] for value in (before, after))
    return torch.equal(kept, found) or not bool(((kept != found) & ~(kept.isnan() & found.isnan())).any())


def _alone(
    program: Program, model: nn.Module, call: Callable[[Arguments], Tensor], probes: Probes, layouts: Mapping[str, Layout]
) -> str | None:
    """Say why a batch of one is another matter for this model, or None if the layouts hold for it too."""
    arguments = probes.draw(1)
    try:
        _compare(program, model, call, arguments)
    except AutoDualError as error:
        return str(error)
    values = evaluate(program.graph, model, arguments)
    shapes = {
        name: tuple(value.shape) for name, value in evaluate(program.graph, model, probes.draw(2)).items() if name in layouts
    }
    for name, shape in shapes.items():
        layout, own = layouts[name], tuple(values[name].shape)
        expected = tuple(layout.factor if axis == layout.axis else size for axis, size in enumerate(shape))
        if own != expected:
            return f"{_where(program, name)} has shape {own} for a batch of one, where {expected} keeps the batch's axis"
    return None
