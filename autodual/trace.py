"""From a module to a graph that computes the same function, or an error that says which line stands in the way."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from autodual import origins
from autodual.errors import TraceError
from autodual.export import NotExportableError, export
from autodual.graph import Graph
from autodual.isolation import restored_model
from autodual.passes.attributes import spell_attributes
from autodual.passes.batch_statistics import use_batch_statistics
from autodual.passes.dead_code import drop_dead_code
from autodual.passes.functionalize import SharedMemoryError, functionalize
from autodual.passes.idioms import recognize
from autodual.passes.items import fuse_items
from autodual.passes.randomness import refuse_random_numbers
from autodual.passes.uninitialized import fill_uninitialized
from autodual.proxies import Unfollowable
from autodual.symbolic import SymbolicTracer, start_of_forward


class ExampleNeededError(TraceError):
    """Symbolic tracing cannot follow the model, but on an example batch torch.export may."""


def trace(
    model: nn.Module,
    given: Sequence[str] | None = None,
    example: torch.Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
) -> Graph:
    """Record what a model computes, in its current mode, as a graph without mutations.

    Args:
        model: the model; it is left as it was.
        given: names of the arguments of ``forward`` that will be passed; the others keep their defaults. By default
            those of the example, or those that have no default.
        example: the arguments for one batch, as a tensor, a sequence or a mapping by name. Only needed where
            symbolic tracing cannot follow the model.

    Returns:
        The graph; sizes stay symbolic.

    Raises:
        TraceError: no graph can be shown to compute the model's function; an ``ExampleNeededError`` where an example may
            help.
    """
    if isinstance(model, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise TraceError(f"{type(model).__name__} is compiled code; pass the nn.Module that it was made from")
    arguments = _example_arguments(model, example)
    positional, keywords = _passed(model, tuple(given) if given is not None else tuple(arguments) or None)
    problem: Unfollowable | SharedMemoryError | None = None
    try:
        graph, opaque = _trace_symbolically(model, positional, keywords)
        if not opaque or example is None:
            return graph
    except (Unfollowable, SharedMemoryError) as caught:
        if example is None:
            raise _needs_example(caught) from caught
        problem = caught
    try:
        return _trace_by_export(model, arguments, positional, keywords)
    except NotExportableError as second:
        raise (second if problem is None else TraceError(f"{_lost(problem)}. {second}")) from problem
    except TraceError as second:
        raise second from problem


def _trace_symbolically(model: nn.Module, positional: tuple[str, ...], keywords: tuple[str, ...]) -> tuple[Graph, bool]:
    """Follow the model with torch.fx; say also whether one of PyTorch's own modules was kept whole, having no rule."""
    tracer = SymbolicTracer(model, positional, keywords)
    graph = use_batch_statistics(fill_uninitialized(fuse_items(spell_attributes(tracer.run()))), model)
    refuse_random_numbers(graph, model)
    return drop_dead_code(recognize(functionalize(graph, model), model)), bool(tracer.opaque)


def _trace_by_export(
    model: nn.Module, arguments: dict[str, Any], positional: tuple[str, ...], keywords: tuple[str, ...]
) -> Graph:
    """Follow the model on its example."""
    missing = [name for name in (*positional, *keywords) if not isinstance(arguments.get(name), torch.Tensor)]
    if missing:
        raise TraceError(f"the example needs a tensor for {', '.join(map(repr, missing))}: sizes are read from it")
    _check_runs(model, arguments, positional, keywords)
    graph = fill_uninitialized(fuse_items(export(model, arguments, positional, keywords)))
    graph = drop_dead_code(recognize(use_batch_statistics(graph, model), model))
    refuse_random_numbers(graph, model)
    return graph


def _check_runs(model: nn.Module, arguments: dict[str, Any], positional: tuple[str, ...], keywords: tuple[str, ...]) -> None:
    """Run the model on its example as a user does: an error of its own is not one of tracing."""
    inputs = {name: arguments[name].detach().clone() for name in (*positional, *keywords)}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad(), restored_model(model), torch.random.fork_rng(devices=[]):
            start_of_forward(model, positional, keywords, inputs)
    except TraceError:
        raise
    except Exception as error:
        line = origins.failure_origin(error.__traceback__, start_of_forward.__code__)
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        raise TraceError(
            f"{line or type(model).__name__}: the model itself raises {type(error).__name__} on shapes {shapes}: {error}"
        ) from error
    finally:
        for buffer, value in buffers:
            buffer.data.copy_(value)


def _needs_example(problem: Unfollowable | SharedMemoryError) -> ExampleNeededError:
    return ExampleNeededError(
        f"{_lost(problem)}. Pass example_input= (one batch), so that sizes are known and torch.export can follow it"
    )


def _lost(problem: Unfollowable | SharedMemoryError) -> str:
    if isinstance(problem, SharedMemoryError):
        return str(problem)
    return f"{problem.origin}: symbolic tracing cannot follow this line: {problem.reason}"


def _example_arguments(model: nn.Module, example: Any) -> dict[str, Any]:
    if example is None:
        return {}
    if isinstance(example, Mapping):
        return dict(example)
    values = (example,) if isinstance(example, torch.Tensor) else tuple(example)
    names = [name for name, parameter in _parameters(model).items() if parameter.kind is not parameter.KEYWORD_ONLY]
    if len(values) > len(names):
        raise TraceError(f"the example has {len(values)} values, but forward takes {len(names)}: {', '.join(names)}")
    return dict(zip(names, values, strict=False))


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """Return the arguments of forward that have a name of their own."""
    parameters = inspect.signature(model.forward).parameters
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: parameter for name, parameter in parameters.items() if parameter.kind not in starred}


def _passed(model: nn.Module, given: tuple[str, ...] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split the arguments that will be passed into those by position and those by keyword."""
    parameters, owner = _parameters(model), type(model).__name__
    if not parameters:
        raise TraceError(
            f"{owner}.forward names no arguments ({inspect.signature(model.forward)}), so its inputs cannot be told apart; "
            "wrap it in a module whose forward names each input"
        )
    required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    given = tuple(required) or tuple(parameters)[:1] if given is None else given
    unknown = [name for name in given if name not in parameters]
    if unknown:
        raise TraceError(f"{owner}.forward has no argument {', '.join(map(repr, unknown))}; it takes {', '.join(parameters)}")
    missing = [name for name in required if name not in given]
    if missing:
        raise TraceError(f"{owner}.forward needs {', '.join(map(repr, missing))} too; pass every argument without a default")
    positional: list[str] = []
    for name, parameter in parameters.items():
        if name not in given or parameter.kind is parameter.KEYWORD_ONLY:
            break
        positional.append(name)
    return tuple(positional), tuple(name for name in parameters if name in given and name not in positional)
