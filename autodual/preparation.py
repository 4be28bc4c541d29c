"""From a model and the arguments of a call to a checked problem: tracing and compiling, once per kind of call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from types import CellType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autodual.compile import Program, compile_graph
from autodual.errors import AutoDualError, SpecificationError, UnsupportedOperatorError
from autodual.graph import Graph, ModuleRef, Node
from autodual.primal import evaluate
from autodual.problem import Problem, Record, filled, run_model
from autodual.regions import LInf, Region
from autodual.specification import check_inputs
from autodual.trace import ExampleNeededError, trace
from autodual.validate import Placement, Probes, buffers_kept, validate
from dual_layers import Composite, lookup

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
Regions = Region | Mapping[str, Region]


class Preparation:
    """Graphs and programs of one model, made when first needed.

    Each mode (training or evaluation, module by module), set of arguments, shape, dtype and device has its own; each is
    compared with the model on random inputs before its first use.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._graphs: dict[Any, Graph] = {}
        self._programs: dict[Any, tuple[Program, Placement, Record]] = {}

    def look_ahead(self) -> None:
        """Trace and compile as far as is possible before the first input is seen.

        Raises:
            TraceError: the model cannot be traced.
            UnsupportedOperatorError: lists every operator without a dual layer.
        """
        try:
            graph = self.graph(None)
        except ExampleNeededError:
            return  # the first input is the example
        try:
            compile_graph(graph, self.model, tuple(node.name for node in graph.inputs))
        except UnsupportedOperatorError as error:
            rest = [row for row in error.nodes if not self._is_whole(graph.by_name[row[1]])]
            if rest and len(graph.inputs) == 1:  # with several inputs some may turn out to be fixed, and need no rules
                raise UnsupportedOperatorError(rest) from None

    def try_out(self, example: Inputs) -> None:
        """Trace and compile on an example. Of several inputs some may turn out to be fixed: then only tracing has to succeed.

        Raises:
            AutoDualError: as for ``problem``.
        """
        try:
            self.problem(example, LInf(0.0))
        except (SpecificationError, UnsupportedOperatorError):
            arguments = self.arguments(example)
            if sum(isinstance(value, Tensor) and value.is_floating_point() for value in arguments.values()) < 2:
                raise
            self.graph(tuple(arguments), {name: filled(value) for name, value in arguments.items()})

    def _is_whole(self, node: Node) -> bool:
        """Whether a node is one of PyTorch's modules that are taken apart once the first input is there."""
        return isinstance(node.operator, ModuleRef) and lookup(self.model.get_submodule(node.operator.path)) is None

    def problem(self, x: Inputs, region: Regions) -> Problem:
        """Check inputs and regions, and find or make the program for them.

        Raises:
            SpecificationError: something does not fit the model, or autocast is on.
        """
        arguments = self.arguments(x)
        _refuse_autocast(arguments)
        regions = _by_argument(region, arguments)
        check_inputs(arguments, tuple(regions), next(self.model.parameters(), None))
        for name, part in regions.items():
            part.validate(arguments[name], name)
        program, placement, record = self._program(arguments, tuple(regions))
        return Problem(self.model, program, placement, arguments, regions, record)

    def arguments(self, x: Inputs) -> dict[str, Any]:
        """Name the model's arguments."""
        if isinstance(x, Mapping):
            return {name: _ordinary(value) for name, value in x.items()}
        parameters = list(inspect.signature(self.model.forward).parameters)
        values = x if isinstance(x, tuple) else (x,)
        if len(values) > len(parameters):
            count = f"{len(parameters)} argument{'s' * (len(parameters) != 1)}"
            raise SpecificationError(f"the model takes {count} {tuple(parameters)}, got {len(values)}")
        return dict(zip(parameters, map(_ordinary, values), strict=False))

    def graph(self, given: tuple[str, ...] | None, arguments: Mapping[str, Any] | None = None) -> Graph:
        """Find or trace the graph for the arguments that are given, in the model's present mode."""
        parameter = next(self.model.parameters(), None)
        placement = None if parameter is None else (parameter.dtype, parameter.device)
        key = (self._mode(), placement, given)
        graph = self._graphs.get(key)
        if graph is None or not _fits(graph, arguments or {}):
            graph = self._graphs[key] = trace(self.model, given, arguments)
            _drop_oldest(self._graphs)
        return graph

    def _program(self, arguments: Mapping[str, Any], perturbed: tuple[str, ...]) -> tuple[Program, Placement, Record]:
        batch = len(arguments[perturbed[0]])
        kinds = tuple(_kind(value, batch) for value in arguments.values())
        key = (self._mode(), tuple(arguments), perturbed, kinds)
        if key not in self._programs:
            some = {name: filled(value) for name, value in arguments.items()}
            graph = self.graph(tuple(arguments), some)
            sources = tuple(node.name for node in graph.inputs if node.operator in perturbed)
            program = self._compiled(graph, sources, some)
            _drop_oldest(self._programs)
            placement = validate(program, self.model, some, lambda values: run_model(self.model, values))
            self._programs[key] = program, placement, Record()
        return self._programs[key]

    def _compiled(self, graph: Graph, sources: tuple[str, ...], arguments: Mapping[str, Any]) -> Program:
        """Compile a graph; composite operators are replaced by their parts for the sizes at hand."""
        program = compile_graph(graph, self.model, sources)
        if not any(issubclass(rule, Composite) for rule in program.rules.values()):
            return program
        return compile_graph(graph, self.model, sources, self._values(program, arguments))

    def _values(self, program: Program, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Evaluate every node on two examples, so that an axis of size one is no batch."""
        with torch.no_grad(), buffers_kept(self.model):
            try:
                return evaluate(program.graph, self.model, Probes(program, arguments).draw(2))
            except AutoDualError:  # a fixed input may have as many rows as the batch by chance
                return evaluate(program.graph, self.model, Probes(program, arguments, tables=True).draw(2))

    def _mode(self) -> tuple[Any, ...]:
        """Describe the model as far as a graph may depend on it: what each module is, and its settings."""
        return tuple(_description(module) for module in self.model.modules())


def _refuse_autocast(arguments: Mapping[str, Any]) -> None:
    """Refuse ``torch.autocast``: some operators then round to half precision, which no allowance covers."""
    for kind in {value.device.type for value in arguments.values() if isinstance(value, Tensor)}:
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            raise SpecificationError(
                f"bounds cannot be computed under torch.autocast, which rounds to {torch.get_autocast_dtype(kind)}: compute "
                f'them outside, or inside `with torch.autocast("{kind}", enabled=False):`'
            )


def _drop_oldest(cache: dict[Any, Any], most: int = 32) -> None:
    """Keep a cache small: a model that counts its calls is another one each time."""
    while len(cache) > most:
        del cache[next(iter(cache))]


_TENSORS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_DEPTH = 5


def _description(module: nn.Module) -> tuple[Any, ...]:
    """Describe a module by its class, hooks and attributes (mode included); tensors are read anew in every run."""
    own = {name: value for name, value in vars(module).items() if name not in _TENSORS}
    classes = [cls for cls in type(module).__mro__ if not cls.__module__.startswith(("torch.", "builtins"))]
    shared = [{name: value for name, value in vars(cls).items() if not name.startswith("__")} for cls in classes]
    return (type(module), _plain(own), _plain(shared))


def _plain(value: Any, depth: int = 0) -> Any:
    """Rebuild a setting from hashable parts, so that a change inside it shows; functions count with what they enclose."""
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device)):
        return (type(value), value)
    if isinstance(value, (Tensor, nn.Module)) or depth > _DEPTH:
        return type(value)
    if isinstance(value, (list, tuple)):
        return (type(value), *(_plain(item, depth + 1) for item in value))
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(_plain(item, depth + 1) for item in value))
    if isinstance(value, Mapping):
        return (type(value), *((_plain(key, depth + 1), _plain(item, depth + 1)) for key, item in value.items()))
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        return (value.__code__, _plain((cells, value.__defaults__, value.__kwdefaults__), depth + 1))
    if isinstance(value, partial):
        return (partial, _plain((value.func, value.args, value.keywords), depth + 1))
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype.str, value.tobytes())
    return (type(value), id(value), _plain(getattr(value, "__dict__", None), depth + 1))


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _by_argument(region: Regions, arguments: Mapping[str, Any]) -> dict[str, Region]:
    """Give every perturbed argument its region."""
    if isinstance(region, Region):
        floating = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()]
        return dict.fromkeys(floating or list(arguments), region)
    if not isinstance(region, Mapping):
        raise SpecificationError(f"region must be a Region such as autodual.LInf(0.1), got {type(region).__name__}")
    unknown = [name for name in region if name not in arguments]
    if unknown or not region:
        raise SpecificationError(f"region names {unknown or 'nothing'}; the arguments given are {list(arguments)}")
    wrong = {name: type(part).__name__ for name, part in region.items() if not isinstance(part, Region)}
    if wrong:
        raise SpecificationError(f"each region must be a Region such as autodual.LInf(0.1), got {wrong}")
    return dict(region)


def _kind(value: Any, batch: int) -> Any:
    """Describe an argument as far as a program may depend on it: a Python value counts in full."""
    if not isinstance(value, Tensor):
        return (type(value), repr(value))
    batched = value.ndim > 0 and len(value) == batch
    return (value.shape[1:] if batched else value.shape, batched, value.dtype, value.device)


def _fits(graph: Graph, arguments: Mapping[str, Any]) -> bool:
    """Whether the sizes that a graph was unrolled for, if any, are those of the arguments; None stands for the batch."""
    for name, sizes in graph.shapes.items():
        value = arguments.get(name)
        if isinstance(value, Tensor) and any(n not in (None, m) for n, m in zip(sizes, value.shape, strict=False)):
            return False
    return True


def _ordinary(value: Any) -> Any:
    """Copy a tensor made in inference mode into an ordinary one."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value
