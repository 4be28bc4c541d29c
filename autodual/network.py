"""``certify`` and the module it returns: the model's dual network, ready to bound."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autodual.bounds.bound import bound_rows
from autodual.bounds.run import Run
from autodual.compile import Program, compile_graph
from autodual.errors import SpecificationError, TraceError, UnsupportedOperatorError
from autodual.explain import Explanation, explain
from autodual.graph import Graph
from autodual.layout import Layout
from autodual.methods import Method, resolve
from autodual.radius import largest_certified
from autodual.regions import LInf, Region
from autodual.report import Report, Verdict
from autodual.specification import check_inputs, check_labels, check_rows, margin_rows
from autodual.trace import ExampleNeededError, trace
from autodual.validate import agree, buffers_kept, validate
from dual_layers import NONE, REAL, Interval

Inputs = Tensor | tuple | Mapping[str, Any]
Regions = Region | Mapping[str, Region]

MEMORY_BUDGET = 2**25


def certify(model: nn.Module, example_input: Inputs | None = None, *, memory_budget: int = MEMORY_BUDGET) -> BoundModule:
    """Turn a model into its dual network.

    Args:
        model: any module whose forward takes batch-first tensors and returns one tensor; parameters are shared, not copied.
        example_input: the arguments of one call (a tensor, a tuple or a dict by argument name). Needed only for code that
            symbolic tracing cannot follow, such as loops over a tensor's shape; it is then traced with ``torch.export``.
        memory_budget: bytes that the rows of one backward walk may take; the default is small enough to stay in fast memory.

    Returns:
        A module whose ``bounds``, ``margins``, ``verify`` and ``robust_loss`` are sound over whole regions of inputs.

    Raises:
        TraceError: the model cannot be traced to a graph that computes the same function.
        UnsupportedOperatorError: lists every operator without a dual layer.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"certify expects a torch.nn.Module, got {type(model).__name__}")
    network = BoundModule(model, example_input, memory_budget)
    network.prepare()
    return network


def _tensors(arguments: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in arguments.values() if isinstance(value, Tensor)]


def _fits(graph: Graph, arguments: Mapping[str, Any]) -> bool:
    """Whether the sizes that a graph was unrolled for, if any, are those of the arguments; None stands for the batch."""
    for name, sizes in graph.shapes.items():
        value = arguments.get(name)
        if isinstance(value, Tensor) and any(n not in (None, m) for n, m in zip(sizes, value.shape, strict=False)):
            return False
    return True


def _outside_inference(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a method outside ``torch.inference_mode``, which knows no derivatives; transposes are derivatives."""

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return wrapped


@dataclass(frozen=True)
class Compiled:
    """A program and where its nodes keep their batch."""

    program: Program
    layouts: Mapping[str, Layout]


class BoundModule(nn.Module):
    """A model together with its dual network. Made by ``certify``.

    Training and evaluation mode, and each set of perturbed arguments, have their own graph, traced when first used and
    compared with the model on random inputs before the first bound.
    """

    def __init__(self, model: nn.Module, example_input: Inputs | None, memory_budget: int) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.memory_budget = memory_budget
        self._example = example_input
        self._graphs: dict[Any, Graph] = {}
        self._compiled: dict[Any, Compiled] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model itself."""
        return self.model(*args, **kwargs)

    # -- what users call -------------------------------------------------------------------------------------------

    @_outside_inference
    def bounds(self, x: Inputs, region: Regions, spec: Tensor | None = None, method: str | Method = "dual") -> Interval:
        """Bound linear functions of the outputs over a region of inputs.

        Args:
            x: the model's input, ``(batch, ...)``; a tuple or dict for several arguments.
            region: the inputs to cover: one region (for every floating input), or a dict by argument name.
            spec: rows ``(rows, outputs)`` or ``(batch, rows, outputs)`` over the flattened outputs; default: each output.
            method: ``"interval"``, ``"dual"``, ``"adaptive"`` or an options dataclass such as ``Dual(strict=True)``.

        Returns:
            ``Bounds`` with ``lower`` and ``upper``, each ``(batch, rows)``. Where nothing is known they are infinite.

        Raises:
            SpecificationError: input, region or specification do not fit the model.
        """
        problem = self._problem(x, region)
        if problem.batch == 0:
            rows = problem.outputs if spec is None else spec.shape[-2]
            empty = problem.empty(rows)
            return Interval(empty, empty, problem.guarantee)
        if spec is not None:
            spec = check_rows(spec, problem.batch, problem.outputs, problem.like)
        lower, upper, _ = bound_rows(problem.run(), resolve(method), spec)
        return Interval(lower, upper, problem.guarantee)

    @_outside_inference
    def margins(self, x: Inputs, y: Any, region: Regions, method: str | Method = "dual") -> Tensor:
        """Bound ``f_y - f_j`` from below for every class j.

        Args:
            x: the model's input.
            y: labels, ``(batch,)`` integers.
            region: the inputs to cover.
            method: how to bound.

        Returns:
            ``(batch, classes)``; 0 at ``j = y``. All others positive means: every input of the region gets label y.
        """
        return self._margins(x, y, region, method)[0]

    @_outside_inference
    def verify(self, x: Inputs, y: Any, region: Regions, method: str | Method = "dual") -> Report:
        """Certify that every input of the region gets label y.

        Args:
            x: the model's input.
            y: labels, ``(batch,)`` integers.
            region: the inputs to cover.
            method: how to bound.

        Returns:
            A ``Report``. An example is certified when each margin is finite and exceeds the float allowance; NaN never is.
        """
        with torch.no_grad():
            problem = self._problem(x, region)
            margins, allowance, y = self._margins(x, y, region, method, problem)
            scores, centre = problem.outputs_at_x(), problem.outputs_at_centre()
            predicted = scores.argmax(1)
            certified = certified_by(margins, allowance, y)
            if problem.guarantee == NONE:
                certified = torch.zeros_like(certified)
            wrong = centre.argmax(1) != y
        verdict = tuple(
            Verdict.CERTIFIED if good else Verdict.FALSIFIED if bad else Verdict.UNKNOWN
            for good, bad in zip(certified.tolist(), wrong.tolist(), strict=True)
        )
        return Report(certified, verdict, predicted, y, margins, allowance, problem.guarantee, resolve(method), repr(region))

    @_outside_inference
    def robust_loss(
        self, x: Inputs, y: Any, region: Regions, method: str | Method = "dual", *, reduction: str = "mean"
    ) -> Tensor:
        """Cross-entropy of minus the margins: an upper bound of the worst cross-entropy over the region.

        Differentiable in the model's parameters. Source: thesis, Theorem 2 (eq. 3.23) and (3.26).

        Args:
            x: the model's input.
            y: labels, ``(batch,)`` integers.
            region: the inputs to cover.
            method: how to bound.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in ``cross_entropy``.
        """
        margins, _, labels = self._margins(x, y, region, method)
        if self.training:
            self._move_running_statistics(x)
        return F.cross_entropy(-margins, labels, reduction=reduction)

    @_outside_inference
    def flag(self, x: Inputs, region: Regions, method: str | Method = "dual") -> Tensor:
        """Flag inputs that could be adversarial: no certificate that the region has one prediction.

        Source: thesis, Corollary 2 (eq. 3.28).

        Returns:
            ``(batch,)`` bool: False proves that no input of the region is classified differently; True proves nothing.
        """
        with torch.no_grad():
            predicted = self._problem(x, region).outputs_at_x().argmax(1)
        return ~self.verify(x, predicted, region, method).certified

    @_outside_inference
    def radius(
        self,
        x: Tensor,
        y: Any = None,
        region: Callable[..., Region] = LInf,
        method: str | Method = "dual",
        *,
        max_radius: float = 1.0,
        domain: Any = None,
    ) -> Tensor:
        """Find, example by example, the largest radius for which a certificate was seen.

        Source: thesis (3.29); the bound is not monotone in the radius, so every value returned was certified itself (errata 17).

        Args:
            x: the model's input.
            y: labels; default: the model's predictions.
            region: a ball, called as ``region(eps, domain=domain)`` with eps of shape ``(batch,)``.
            method: how to bound.
            max_radius: upper end of the search.
            domain: valid inputs, as for the ball.

        Returns:
            ``(batch,)``: 0 where not even a tiny ball could be certified.
        """
        if not max_radius > 0:
            raise SpecificationError(f"max_radius must be positive, got {max_radius}")
        if y is None:
            y = self._problem(x, region(0.0, domain=domain)).outputs_at_x().argmax(1)

        def certified(eps: Tensor) -> Tensor:
            return self.verify(x, y, region(eps, domain=domain), method).certified

        return largest_certified(certified, x.new_full((len(x),), float(max_radius)))

    @_outside_inference
    def intermediate(self, x: Inputs, region: Regions, method: str | Method = "dual") -> dict[str, Interval]:
        """Return the bounds of every node that needed them (the inputs of nonlinear operators), by node name."""
        problem = self._problem(x, region)
        run = problem.run()
        bound_rows(run, resolve(method), None)
        return {name: Interval(box.lower, box.upper, problem.guarantee) for name, box in run.boxes.items()}

    @_outside_inference
    def explain(self, x: Inputs | None = None, region: Regions | None = None, method: str | Method = "dual") -> Explanation:
        """Tabulate the dual network: every node, its operator, rule, shape, source line and how it is bounded.

        Args:
            x: with ``region``: bound this input and say how each node was bounded; alone: fill in the shapes.
            region: see ``x``.
            method: how to bound.

        Returns:
            An ``Explanation``; print it, or ``.draw(path)`` a picture.
        """
        x = self._example if x is None else x
        if x is None:
            return explain(self._graph(None), self.model)
        if region is None:
            problem, run = self._problem(x, LInf(0.0)), None
        else:
            problem = self._problem(x, region)
            run = problem.run()
            bound_rows(run, resolve(method), None)
        return explain(problem.program.graph, self.model, run or problem.run())

    # -- tracing and compiling -------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Trace and compile as far as is possible before the first input is seen."""
        if self._example is not None:
            self._problem(self._example, LInf(0.0))
            return
        try:
            graph = self._graph(None)
        except ExampleNeededError:
            return  # the first input is the example
        try:
            compile_graph(graph, self.model, tuple(node.name for node in graph.inputs))
        except UnsupportedOperatorError:
            if len(graph.inputs) == 1:  # with several inputs some may turn out to be fixed, and need no rules
                raise

    def _graph(self, given: tuple[str, ...] | None, arguments: Mapping[str, Any] | None = None) -> Graph:
        """Find or trace the graph for the arguments that are given, in the model's present mode."""
        parameter = next(self.model.parameters(), None)
        placement = None if parameter is None else (parameter.dtype, parameter.device)
        key = (self._mode(), placement, given)
        graph = self._graphs.get(key)
        if graph is None or not _fits(graph, arguments or {}):
            graph = self._graphs[key] = trace(self.model, given, arguments)
        return graph

    def _mode(self) -> tuple[bool, ...]:
        return tuple(module.training for module in self.model.modules())

    def _arguments(self, x: Inputs) -> dict[str, Any]:
        """Name the model's arguments."""
        if isinstance(x, Mapping):
            return {name: _ordinary(value) for name, value in x.items()}
        parameters = list(inspect.signature(self.model.forward).parameters)
        values = x if isinstance(x, tuple) else (x,)
        if len(values) > len(parameters):
            raise SpecificationError(f"the model takes {len(parameters)} arguments {tuple(parameters)}, got {len(values)}")
        return dict(zip(parameters, map(_ordinary, values), strict=False))

    def _problem(self, x: Inputs, region: Regions) -> Problem:
        """Check input and regions and find or make the compiled graph."""
        arguments = self._arguments(x)
        if isinstance(region, Mapping):
            regions = dict(region)
            unknown = [name for name in regions if name not in arguments]
            if unknown:
                raise SpecificationError(f"region names {unknown}, but the arguments given are {list(arguments)}")
        elif isinstance(region, Region):
            floating = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.is_floating_point()]
            regions = dict.fromkeys(floating or list(arguments), region)
        else:
            raise SpecificationError(f"region must be a Region such as autodual.LInf(0.1), got {type(region).__name__}")
        check_inputs(arguments, tuple(regions), next(self.model.parameters(), None))
        for name, part in regions.items():
            part.validate(arguments[name], name)
        return Problem(self, self._compile(arguments, tuple(regions)), arguments, regions)

    def _compile(self, arguments: Mapping[str, Any], perturbed: tuple[str, ...]) -> Compiled:
        shapes = tuple(tuple(value.shape[1:]) if isinstance(value, Tensor) else None for value in arguments.values())
        given = tuple(arguments)
        key = (self._mode(), given, perturbed, shapes, *{(value.dtype, value.device) for value in _tensors(arguments)})
        if key not in self._compiled:
            graph = self._graph(given, arguments)
            sources = tuple(node.name for node in graph.inputs if node.operator in perturbed)
            program = compile_graph(graph, self.model, sources)
            some = {name: _some(value, perturbed, name) for name, value in arguments.items()}
            self._compiled[key] = Compiled(program, validate(program, self.model, some, lambda values: self.run_model(values)))
        return self._compiled[key]

    def run_model(self, arguments: Mapping[str, Any]) -> Tensor:
        """Run the model on named arguments; what it rejects is an error about the input."""
        try:
            result = self.model(**arguments)
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = {name: tuple(value.shape) for name, value in arguments.items() if isinstance(value, Tensor)}
            raise SpecificationError(f"the model does not accept inputs of shape {shapes}: {error}") from error
        if isinstance(result, (tuple, list)) and len(result) == 1:
            result = result[0]
        if not isinstance(result, Tensor):
            raise TraceError(
                f"the model must return one tensor, got {type(result).__name__}: wrap it in a module that picks one"
            )
        return result

    def _margins(
        self, x: Inputs, y: Any, region: Regions, method: str | Method, problem: Problem | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        problem = problem or self._problem(x, region)
        if len(problem.output_shape) != 2 or problem.outputs < 2:
            raise SpecificationError(
                f"margins need scores of shape (batch, classes) with two classes or more, the model returns {problem.output_shape}; "
                "use bounds() with a spec"
            )
        y = check_labels(y, problem.batch, problem.outputs, problem.like.device)
        if problem.batch == 0:
            return problem.empty(problem.outputs), problem.empty(problem.outputs), y
        spec = margin_rows(y, problem.outputs, problem.like)
        margins, _, allowance = bound_rows(problem.run(), resolve(method), spec, lower_only=True)
        own = F.one_hot(y, problem.outputs).bool()
        return margins.masked_fill(own, 0.0), allowance.masked_fill(own, 0.0), y

    def _move_running_statistics(self, x: Inputs) -> None:
        """Let batch norm see the clean batch once, as in an ordinary training step."""
        if any(node.batch_statistics for node in self._graph(tuple(self._arguments(x))).nodes):
            with torch.no_grad():
                self.run_model(self._arguments(x))


def certified_by(margins: Tensor, allowance: Tensor, y: Tensor) -> Tensor:
    """Return which examples have every other margin finite and above its allowance; NaN and infinity fail."""
    positive = margins.isfinite() & allowance.isfinite() & (margins > allowance)
    own = F.one_hot(y, margins.shape[1]).bool()
    return (positive | own).all(1)


@dataclass
class Problem:
    """One batch and its regions, checked against the model."""

    network: BoundModule
    compiled: Compiled
    arguments: Mapping[str, Any]
    regions: Mapping[str, Region]

    def __post_init__(self) -> None:
        graph = self.program.graph
        self.sources = {name: graph.by_name[name].operator for name in self.program.sources}
        first = next(iter(self.regions))
        self.like = self.arguments[first]
        self.batch = len(self.like)
        heuristic = any(node.batch_statistics for node in graph.nodes)
        self.guarantee = NONE if heuristic else REAL
        with torch.no_grad(), buffers_kept(self.network.model):
            some = self.arguments if self.batch else {n: _some(v, tuple(self.regions), n) for n, v in self.arguments.items()}
            scores = self.network.run_model(some)
        self.output_shape = (self.batch, *scores.shape[1:])
        self.outputs = scores[:1].numel()
        self.scores = scores

    @property
    def program(self) -> Program:
        """The compiled graph."""
        return self.compiled.program

    def empty(self, rows: int) -> Tensor:
        """An answer for an empty batch."""
        return self.like.new_zeros(0, rows)

    def outputs_at_x(self) -> Tensor:
        """The model's outputs at x, flattened per example; checked for NaN."""
        scores = self.scores.reshape(len(self.scores), -1)[: self.batch]
        bad = (~scores.isfinite()).any(1).nonzero()
        if len(bad):
            culprits = [name for name, value in self.network.model.state_dict().items() if _has_nan(value)]
            cause = f"; these parameters contain NaN or infinity: {culprits}" if culprits else ""
            raise SpecificationError(f"the model's output for example {int(bad[0])} is not finite{cause}")
        return scores

    def outputs_at_centre(self) -> Tensor:
        """The model's outputs at the regions' centres."""
        with torch.no_grad():
            return self.network.run_model(self.points()) if self.batch else self.outputs_at_x()

    def points(self) -> dict[str, Any]:
        """The arguments, perturbed ones moved to the centre of their region."""
        return {
            name: self.regions[name].center(value) if name in self.regions else value for name, value in self.arguments.items()
        }

    def run(self) -> Run:
        """Start a computation of bounds on the whole batch."""
        self.outputs_at_x()
        regions = {name: self.regions[argument] for name, argument in self.sources.items()}
        given = {name: self.arguments[argument] for name, argument in self.sources.items()}
        network = self.network
        run = Run(self.program, network.model, self.compiled.layouts, self.points(), regions, given, network.memory_budget)
        centred = all(run.points[name] is value for name, value in self.arguments.items())
        if centred and not agree(self.scores, run.values[self.program.graph.output].detach()):
            raise TraceError("the model no longer computes what was traced: it was changed after certify; call certify again")
        return run


def _ordinary(value: Any) -> Any:
    """Copy a tensor made in inference mode into an ordinary one."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def _has_nan(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all())


def _some(value: Any, perturbed: tuple[str, ...], name: str) -> Any:
    """Return the value, or one made-up example where an empty batch was given."""
    if isinstance(value, Tensor) and value.ndim and len(value) == 0:
        return value.new_zeros(1, *value.shape[1:])
    return value
