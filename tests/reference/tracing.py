"""An evaluator of graphs that shares no code with the library, and what the tests of the front end have in common."""

import copy
from pathlib import Path

import torch
from torch import nn

from autodual.graph import Graph, ModuleRef, substitute
from autodual.trace import trace


def run_graph(graph: Graph, model: nn.Module, inputs: dict):
    values = {}
    for node in graph.nodes:
        if node.kind == "input":
            values[node.name] = inputs[node.operator]
        elif node.kind == "attribute":
            owner, _, name = node.operator.rpartition(".")
            constant = node.operator in graph.constants
            values[node.name] = graph.constants[node.operator] if constant else getattr(model.get_submodule(owner), name)
        else:
            args, kwargs = substitute((node.args, dict(node.kwargs)), lambda ref: values[ref.name])
            if isinstance(node.operator, ModuleRef):
                result = model.get_submodule(node.operator.path)(*args, **kwargs)
            elif isinstance(node.operator, str):
                result = getattr(args[0], node.operator)(*args[1:], **kwargs)
            else:
                result = node.operator(*args, **kwargs)
            values[node.name] = result if node.item is None else result[node.item]
    return values[graph.output]


@torch.no_grad()  # autograd forbids some mutations of views that are well defined
def check(model: nn.Module, *shapes: tuple[int, ...], example=None, batches=(1, 2, 3), names=None, given=None) -> Graph:
    """Trace, and compare graph and model on several batch sizes; the model's buffers and a copy of it are checked too."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    graph = trace(model, given, example)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    names = names or [node.operator for node in graph.inputs]
    for batch in batches:
        inputs = {name: torch.randn(batch, *shape) for name, shape in zip(names, shapes, strict=True)}
        expected = copy.deepcopy(model)(**{name: value.clone() for name, value in inputs.items()})
        kept = {name: value.clone() for name, value in inputs.items()}
        actual = run_graph(graph, model, inputs)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected)
        assert all(torch.equal(kept[name], inputs[name]) for name in inputs), "the graph changes its own input"
        torch.testing.assert_close(run_graph(graph, copy.deepcopy(model), inputs), expected)
    return graph


def line(text: str, file: str) -> str:
    """Return ``file.py:12`` for the one line of a file that ends with a mark."""
    found = [number for number, row in enumerate(Path(file).read_text().splitlines(), 1) if row.endswith(f"# {text}")]
    assert len(found) == 1, found
    return f"{Path(file).name}:{found[0]}"


def ends_at(origin: str, text: str, file: str) -> bool:
    return origin.endswith(line(text, file))
