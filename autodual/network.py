"""``certify`` and the module it returns: the model's dual network, ready to bound."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

from autodual.accounting import Accountant
from autodual.bounds.bound import bound_rows, solve_relaxation
from autodual.bounds.linear_program import Relaxation
from autodual.bounds.once import once
from autodual.bounds.run import Run
from autodual.domains import violations
from autodual.errors import SpecificationError, TraceError
from autodual.explain import Explanation, explain
from autodual.loss_bounds import LossBounds
from autodual.methods import LP, Auto, Method, at_once, resolve
from autodual.preparation import Inputs, Preparation, Regions
from autodual.problem import Problem, run_model
from autodual.radius import MOST_STEPS, largest_certified
from autodual.regions import Box, LInf, Region
from autodual.report import Report, Verdict, certified_by, why_none
from autodual.specification import check_labels, check_rows, rival_rows, spread_rivals
from dual_layers import NONE, Interval

MEMORY_BUDGET = 2**25


def certify(model: nn.Module, example_input: Inputs | None = None, *, memory_budget: int = MEMORY_BUDGET) -> BoundModule:
    """Turn a model into its dual network.

    Args:
        model: any module whose forward takes batch-first tensors and returns one tensor; parameters are shared, not copied.
        example_input: the arguments of one call (a tensor, a tuple or a dict by argument name). Needed only for code that
            symbolic tracing cannot follow, such as loops over a tensor's shape; it is then traced with ``torch.export``.
        memory_budget: bytes that the rows of one backward walk may take; the default is small enough to stay in fast memory.
            Where gradients are recorded, sixteen times as many.

    Returns:
        A module whose ``bounds``, ``margins``, ``verify`` and ``robust_loss`` are sound over whole regions of inputs.

    Raises:
        TraceError: the model cannot be traced to a graph that computes the same function.
        UnsupportedOperatorError: lists every operator without a dual layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> _ = nn.init.eye_(model[0].weight), nn.init.zeros_(model[0].bias)
        >>> net = certify(model)
        >>> net.bounds(torch.tensor([[1.0, -1.0]]), LInf(0.5)).upper
        tensor([[1.5000, 0.0000]], grad_fn=...)
        >>> net.verify(torch.tensor([[1.0, -1.0]]), [0], LInf(0.25)).certified
        tensor([True])
        >>> net.radius(torch.tensor([[1.0, -1.0]])).round(decimals=2)
        tensor([1.])
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"certify expects a torch.nn.Module, got {type(model).__name__}")
    return BoundModule(model, example_input, memory_budget)


def proving(method: str | Method) -> Method:
    """Check that a method's bounds can prove something."""
    options = resolve(method)
    if options.guarantee == NONE:
        raise SpecificationError(f"{options} proves nothing: {why_none(options)}")
    return options


def _outside_inference(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run a method outside ``torch.inference_mode``, which knows no derivatives; transposes are derivatives."""

    @wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return method(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return wrapped


class BoundModule(nn.Module):
    """A model together with its dual network. Made by ``certify``.

    Training and evaluation mode, and each set of perturbed arguments, have their own graph, traced when first used and
    compared with the model on random inputs before the first bound.

    Args:
        model: the model.
        example_input: as for ``certify``.
        memory_budget: as for ``certify``.
    """

    def __init__(self, model: nn.Module, example_input: Inputs | None, memory_budget: int) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.memory_budget = memory_budget
        self._example = example_input
        self._preparation = Preparation(model)
        if example_input is None:
            self._preparation.look_ahead()
        else:
            self._preparation.try_out(example_input)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model itself."""
        return self.model(*args, **kwargs)

    def arguments(self, x: Inputs) -> dict[str, Any]:
        """Name the arguments that ``x`` gives to the model's forward."""
        return self._preparation.arguments(x)

    @_outside_inference
    def bounds(
        self,
        x: Inputs,
        region: Regions,
        spec: Tensor | None = None,
        method: str | Method = "dual",
        *,
        allow_rounding: bool = False,
    ) -> Interval:
        """Bound linear functions of the outputs over a region of inputs.

        Args:
            x: the model's input, ``(batch, ...)``; a tuple or dict for several arguments.
            region: the inputs to cover: one region (for every floating input), or a dict by argument name.
            spec: rows ``(rows, outputs)`` or ``(batch, rows, outputs)`` over the flattened outputs; default: each output.
            method: ``"interval"``, ``"dual"``, ``"adaptive"``, ``"projected"`` (an estimate, says its guarantee) or an options
                dataclass such as ``Dual(strict=True)``.
            allow_rounding: move both ends outwards by what float rounding may cost, as ``verify`` does.

        Returns:
            ``Bounds`` with ``lower`` and ``upper``, each ``(batch, rows)``. Where nothing is known they are infinite. They can
            be differentiated once: a second derivative raises RuntimeError.

        Raises:
            SpecificationError: input, region or specification do not fit the model.
        """
        options, problem = resolve(method), self._problem(x, region)
        if spec is not None:
            spec = check_rows(spec, problem.batch, problem.outputs, problem.like)
        if problem.batch == 0:
            empty = problem.empty(problem.outputs if spec is None else spec.shape[-2])
            return Interval(empty, empty, problem.guarantee & options.guarantee)
        lower, upper, allowance = bound_rows(self._run(problem), options, spec)
        slack = allowance if allow_rounding else 0.0
        return Interval(lower - slack, upper + slack, problem.guarantee & options.guarantee)

    @_outside_inference
    def margins(self, x: Inputs, y: Any, region: Regions, method: str | Method = "dual") -> Tensor:
        """Bound ``f_y - f_j`` from below for every class j.

        Args:
            x: the model's input.
            y: labels, ``(batch,)`` integers.
            region: the inputs to cover.
            method: how to bound.

        Returns:
            ``(batch, classes)``; 0 at ``j = y``. All others positive means: every input of the region gets label y, with
            the method's guarantee (``method.guarantee``), which a plain tensor cannot carry; ``verify`` reports it.
        """
        options = resolve(method)
        return self._margins(self._problem(x, region), y, options, until_positive=isinstance(options, Auto))[0]

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
            options, problem = resolve(method), self._problem(x, region)
            margins, allowance, y, run = self._margins(problem, y, options, until_positive=True)
            predicted = problem.outputs_at_x().argmax(1)
            wrong = (problem.outputs_at_centre().argmax(1) != y) & problem.centre_is_inside()
            certified, unbounded = certified_by(margins, allowance, y), () if run is None else violations(run)
            settled = () if run is None else run.settled
            guarantee = problem.guarantee & options.guarantee
            if guarantee == NONE:
                certified = torch.zeros_like(certified)
            if problem.guarantee == NONE:  # batch statistics: another function than evaluation mode's, so nothing is known
                wrong = torch.zeros_like(wrong)
        verdict = tuple(
            Verdict.CERTIFIED if good else Verdict.FALSIFIED if bad else Verdict.UNKNOWN
            for good, bad in zip(certified.tolist(), wrong.tolist(), strict=True)
        )
        sampling = None if run is None else run.sampling
        accountant, text = Accountant(problem, self._problem, partial(self._margins, until_positive=True)), repr(region)
        return Report(
            certified,
            verdict,
            predicted,
            y,
            margins,
            allowance,
            guarantee,
            options,
            text,
            unbounded,
            sampling,
            settled,
            accountant,
        )

    @_outside_inference
    def robust_loss(
        self, x: Inputs, y: Any, region: Regions, method: str | Method = "dual", *, reduction: str = "mean"
    ) -> Tensor:
        """Cross-entropy of minus the margins: an upper bound of the worst cross-entropy over the region, or an estimate of one.

        Differentiable in the model's parameters. It is infinite, and has no derivative, where a region leaves the domain of an
        operator: ``verify`` names such examples. Source: thesis, Theorem 2 (eq. 3.23) and (3.26).

        Args:
            x: the model's input.
            y: labels, ``(batch,)`` integers.
            region: the inputs to cover.
            method: how to bound.
            reduction: ``"mean"``, ``"sum"`` or ``"none"``, as in ``cross_entropy``.

        Raises:
            SpecificationError: there is no such reduction, or input, labels or region do not fit the model.
        """
        from autodual.losses import RobustLoss  # losses are made of networks

        return RobustLoss(self, method, reduction)(x, y, region)

    @_outside_inference
    def loss_bounds(self, x: Inputs, y: Any, region: Regions) -> LossBounds:
        """Start the bounds that a loss is made of: ``.margins(method)`` by as many methods as it takes.

        In training mode the model is also run once on x, so that batch statistics move as in an ordinary training step.

        Args:
            x: the model's input.
            y: labels, ``(batch,)`` integers.
            region: the inputs to cover.

        Raises:
            SpecificationError: input, labels or region do not fit the model.
        """
        problem = self._problem(x, region)
        y = self._labels(problem, y)
        if problem.program.has_batch_statistics and problem.batch:
            with torch.no_grad():
                run_model(self.model, problem.arguments)
        return LossBounds(problem, y, self.memory_budget)

    @_outside_inference
    def flag(self, x: Inputs, region: Regions, method: str | Method = "dual") -> Tensor:
        """Flag inputs that could be adversarial: no certificate that the region has one prediction.

        Source: thesis, Corollary 2 (eq. 3.28).

        Returns:
            ``(batch,)`` bool: False proves that no input of the region is classified differently; True proves nothing.

        Raises:
            SpecificationError: the method only estimates.
        """
        options = proving(method)
        with torch.no_grad():
            predicted = self._problem(x, region).outputs_at_x().argmax(1)
        return ~self.verify(x, predicted, region, options).certified

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

        Source: thesis (3.29). The bound is not monotone in the radius, so every value returned was itself certified.

        Args:
            x: the model's input.
            y: labels; default: the model's predictions.
            region: the ball's class, ``LInf``, ``L2`` or ``L1``; called as ``region(eps, domain=domain)``, eps ``(batch,)``.
            method: how to bound.
            max_radius: upper end of the search: a result equal to it may go further.
            domain: valid inputs, as for the ball.

        Returns:
            ``(batch,)``: 0 where not even a tiny ball could be certified. A method with a probability of failure spends it on
            all steps of the search together.

        Raises:
            SpecificationError: x is not one tensor, region is not a ball's class, or the method only estimates.
        """
        if not isinstance(max_radius, (int, float)) or not 0 < max_radius < float("inf"):
            raise SpecificationError(f"max_radius must be a positive number, got {max_radius!r}")
        if not isinstance(x, Tensor):
            raise SpecificationError(f"radius takes one input tensor, got {type(x).__name__}")
        if isinstance(region, Region) or region is Box or not callable(region):
            raise SpecificationError(
                f"region takes a ball's class such as autodual.L2, whose eps is searched for; got {region!r}"
            )
        if y is None:
            y = self._problem(x, region(0.0, domain=domain)).outputs_at_x().argmax(1)

        options, steps = proving(method), iter(range(MOST_STEPS))

        def certified(eps: Tensor) -> Tensor:
            step = options.part(next(steps), MOST_STEPS)
            return self.verify(x, y, region(eps, domain=domain), step).certified

        return largest_certified(certified, x.new_full((len(x),), float(max_radius)))

    @_outside_inference
    def intermediate(self, x: Inputs, region: Regions, method: str | Method = "dual") -> dict[str, Interval]:
        """Return the bounds of every node that needed them (the inputs of nonlinear operators), by node name."""
        options, problem = at_once(resolve(method)), self._problem(x, region)
        if problem.batch == 0:
            raise SpecificationError("an empty batch has no intermediate bounds")
        run = self._run(problem)
        bound_rows(run, options, None)
        guarantee = problem.guarantee & options.guarantee
        return {name: Interval(once(box.lower), once(box.upper), guarantee) for name, box in run.boxes.items()}

    @_outside_inference
    def linear_program(self, x: Inputs, region: Regions, spec: Tensor | None = None, method: LP | None = None) -> Relaxation:
        """Solve the linear relaxation of rows of the outputs (thesis, eq. 3.6), and return its points and multipliers too.

        Args:
            x: the model's input.
            region: the inputs to cover: boxes, l1 balls and others that planes bound.
            spec: as for ``bounds``.
            method: options, ``LP()`` by default.

        Returns:
            A ``Relaxation``: of each row the solver's optimum, ``(batch, rows)``, the lower bound that was proved from it, and
            for every node that depends on the input the point and the multipliers, ``[rows, *node]``.

        Raises:
            SpecificationError: input, region or specification do not fit the model, or the region is round.
        """
        options, problem = method or LP(), self._problem(x, region)
        if not isinstance(options, LP):
            raise SpecificationError(f"linear_program takes options LP(...), got {options!r}")
        if problem.batch == 0:
            raise SpecificationError("an empty batch has no linear program")
        spec = torch.eye(problem.outputs).to(problem.like) if spec is None else spec
        spec = check_rows(spec, problem.batch, problem.outputs, problem.like)
        with torch.no_grad():
            run = self._run(problem)
            if run.program.graph.output not in run.order:
                raise SpecificationError("the output does not depend on the input: there is nothing to optimise")
            return solve_relaxation(run, options, spec)

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
        if x is None and region is not None:
            raise SpecificationError("explain needs an input x to bound over the region")
        if x is None:
            return explain(self._preparation.graph(None), self.model)
        if region is None:
            problem, run = self._problem(x, LInf(0.0)), None
        else:
            problem = self._problem(x, region)
            run = self._run(problem)
            bound_rows(run, at_once(resolve(method)), None)
        return explain(problem.program.graph, self.model, run or self._run(problem))

    def _margins(
        self,
        problem: Problem,
        y: Any,
        method: Method,
        *,
        until_positive: bool = False,
        walks: list[tuple[Run, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Run | None]:
        """Return margins, their float allowance, the labels as a tensor and, unless the batch is empty, the run."""
        y = self._labels(problem, y)
        if problem.batch == 0:
            return problem.empty(problem.outputs), problem.empty(problem.outputs), y, None
        run = problem.run(self.memory_budget)
        run.walks = walks
        rows, rivals = rival_rows(y, problem.outputs, problem.like)
        margins, _, allowance = bound_rows(run, method, rows, lower_only=True, until_positive=until_positive)
        margins, allowance = (spread_rivals(values, rivals, problem.outputs) for values in (margins, allowance))
        return margins, allowance, y, run

    def _labels(self, problem: Problem, y: Any) -> Tensor:
        """Check that the model is a classifier and labels are its classes."""
        if len(problem.output_shape) != 2 or problem.outputs < 2:
            raise SpecificationError(
                "margins need scores of shape (batch, classes) with two classes or more, but the model returns "
                f"{problem.output_shape}; use bounds() with a spec"
            )
        return check_labels(y, problem.batch, problem.outputs, problem.like.device)

    def _problem(self, x: Inputs, region: Regions) -> Problem:
        return self._preparation.problem(x, region)

    def _run(self, problem: Problem) -> Run:
        return problem.run(self.memory_budget)
