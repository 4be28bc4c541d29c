"""One batch and its regions, checked against the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from autodual.bounds.run import Run
from autodual.compile import Program
from autodual.domains import check_centre, first_failure
from autodual.errors import SpecificationError, TraceError
from autodual.primal import evaluate
from autodual.regions import Region
from autodual.validate import Placement, agree, buffers_kept, check_separate
from dual_layers import NONE, REAL, Guarantee


@dataclass
class Record:
    """What was found out about a program while it was used.

    Attributes:
        separated: sizes of batch and states of buffers for which examples were seen to stay apart.
        output: sizes of the output's axes behind the batch, once they are known.
        trained: whether a loss has been computed, and the graph compared with the model on that occasion.
    """

    separated: set[Any] = field(default_factory=set)
    output: tuple[int, ...] | None = None
    trained: bool = False


class Problem:
    """What is asked: a compiled model, its arguments and a region for each perturbed one.

    Args:
        model: the model.
        program: its compiled graph.
        placement: where each node keeps its examples.
        arguments: the model's arguments by name.
        regions: the region of each perturbed argument, by name.
        record: what is known about the program from earlier uses; added to.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        placement: Placement,
        arguments: Mapping[str, Any],
        regions: Mapping[str, Region],
        record: Record,
    ) -> None:
        self.model, self.program, self.placement = model, program, placement
        self.arguments, self.regions, self.record = arguments, regions, record
        self.like: Tensor = arguments[next(iter(regions))]
        self.batch = len(self.like)

    @property
    def guarantee(self) -> Guarantee:
        """What bounds of this model are worth."""
        return NONE if self.program.has_batch_statistics else REAL

    @cached_property
    def scores(self) -> Tensor:
        """The model's own output at x; for an empty batch that of one made-up example."""
        return self._model_at({name: filled(value) for name, value in self.arguments.items()})

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output for this batch."""
        if self.record.output is None:
            self.record.output = tuple(self.scores.shape[1:])
        return (self.batch, *self.record.output)

    @property
    def outputs(self) -> int:
        """Number of outputs per example."""
        return math.prod(self.output_shape[1:])

    def empty(self, rows: int) -> Tensor:
        """Return an answer for an empty batch."""
        return self.like.new_zeros(0, rows)

    def outputs_at_x(self) -> Tensor:
        """Return the model's outputs at x, ``(batch, outputs)``.

        Raises:
            SpecificationError: an output is NaN or infinite; names the parameters or the operator to blame, if any.
        """
        scores = self.flat(self.scores)
        bad = (~scores.isfinite()).any(1).nonzero()
        if len(bad):
            culprits = [name for name, value in self.model.state_dict().items() if _has_nan(value)]
            cause = f"these parameters contain NaN or infinity: {culprits}" if culprits else self._first_failure(int(bad[0]))
            raise SpecificationError(f"the model's output for example {int(bad[0])} is not finite{cause and '; '}{cause}")
        return scores

    def _first_failure(self, example: int) -> str:
        with torch.no_grad(), buffers_kept(self.model):
            return first_failure(self.program, self.model, self.placement.layouts, self.arguments, example)

    @cached_property
    def points(self) -> dict[str, Any]:
        """The arguments, perturbed ones moved to the centre of their region."""
        return {
            name: self.regions[name].center(value) if name in self.regions else value for name, value in self.arguments.items()
        }

    def outputs_at_centre(self) -> Tensor:
        """Return the model's outputs at the regions' centres, ``(batch, outputs)``."""
        centred = all(self.points[name] is value for name, value in self.arguments.items())
        return self.flat(self.scores if centred or not self.batch else self._model_at(self.points))

    def centre_is_inside(self) -> Tensor:
        """Tell for each example whether its regions' centres are known to belong to them, ``(batch,)`` bool."""
        inside = torch.ones(self.batch, dtype=torch.bool, device=self.like.device)
        for name, region in self.regions.items():
            try:
                inside = inside & region.contains(self.arguments[name], self.points[name])
            except NotImplementedError:
                return torch.zeros_like(inside)
        return inside

    def flat(self, output: Tensor) -> Tensor:
        """Bring the model's output to ``(batch, outputs)``; one that is the same for every example may have one row."""
        return output.reshape(len(output), -1)[: self.batch].expand(self.batch, -1)

    def run(self, memory_budget: int, *, claim: bool = True) -> Run:
        """Start a computation of bounds.

        Args:
            memory_budget: bytes that the rows of one backward walk may take.
            claim: check all that a claim rests on; a loss will do with less, and with its first time.

        Raises:
            SpecificationError: the model's output is not finite, an operator has no value at the centre of a region, or the
                model takes a batch of one for something else.
            TraceError: the model was changed since it was traced, or mixes the examples of this batch.
        """
        if self.batch == 1 and self.placement.alone is not None:
            raise SpecificationError(f"give two examples or more: {self.placement.alone}")
        sources = {name: self.program.graph.by_name[name].operator for name in self.program.sources}
        regions = {name: self.regions[argument] for name, argument in sources.items()}
        given = {name: self.arguments[argument] for name, argument in sources.items()}
        placement = self.placement
        run = Run(
            self.program,
            self.model,
            placement.layouts,
            self.points,
            regions,
            given,
            memory_budget,
            placement.alone is None,
            claim,
        )
        if claim or not self.record.trained:
            self._check(run, claim)
        return run

    def _check(self, run: Run, claim: bool) -> None:
        self.outputs_at_x()
        check_centre(run)
        self._check_unchanged(self.outputs_at_centre(), run.values[self.program.graph.output].detach())
        if claim:
            for corner in self._corners():
                traced = evaluate(self.program.graph, self.model, corner)[self.program.graph.output]
                self._check_unchanged(self.flat(self._model_at(corner)), traced.detach())
            self._check_separate()
        self.record.trained = True

    def _check_separate(self) -> None:
        """Check that this batch's examples do not meet, once for each size of batch and state of the buffers."""
        if self.program.has_batch_statistics or self.batch < 2:
            return
        buffers = tuple((id(buffer), buffer._version) for buffer in self.model.buffers())
        key = (self.batch, buffers)
        if self.program.tied or key not in self.record.separated:
            check_separate(self.program, self.model, self.placement.layouts, self.points)
            self.record.separated.add(key)

    def _corners(self) -> Iterator[dict[str, Any]]:
        """Yield the arguments with every perturbed one at an end of its region's box, where that is at hand."""
        if all(type(region).hull is not Region.hull for region in self.regions.values()):
            hulls = {name: region.hull(self.arguments[name]) for name, region in self.regions.items()}
            yield {**self.arguments, **{name: hull.lower for name, hull in hulls.items()}}
            yield {**self.arguments, **{name: hull.upper for name, hull in hulls.items()}}

    def _check_unchanged(self, expected: Tensor, traced: Tensor) -> None:
        if not agree(expected, self.flat(traced)):
            raise TraceError(
                "the model no longer computes what was traced: it was changed after certify (call certify again), or its "
                "region reaches inputs so large that rounding makes the difference (use double precision, or a smaller region)"
            )

    def _model_at(self, arguments: Mapping[str, Any]) -> Tensor:
        with torch.no_grad(), buffers_kept(self.model):
            return run_model(self.model, arguments)


def run_model(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """Run a model on named arguments.

    Raises:
        SpecificationError: the model rejects its input.
        TraceError: the model does not return one tensor.
    """
    copies = {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    try:
        result = model(**copies)  # a model may write into its inputs; the caller's own must not move
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{name} {_shape(value)}" for name, value in arguments.items() if isinstance(value, Tensor))
        advice = "axis 0 is the batch; for a single example use x[None]"
        raise SpecificationError(f"the model does not accept inputs of shape {shapes} ({advice}): {error}") from error
    if isinstance(result, (tuple, list)) and len(result) == 1:
        result = result[0]
    if not isinstance(result, Tensor):
        raise TraceError(f"the model must return one tensor, got {type(result).__name__}: wrap it in a module that picks one")
    return result


def filled(value: Any) -> Any:
    """Return the value, or one made-up example where an empty batch was given."""
    empty = isinstance(value, Tensor) and value.ndim > 0 and len(value) == 0
    return value.new_zeros(1, *value.shape[1:]) if empty else value


def _shape(value: Tensor) -> str:
    sizes = ["batch", *map(str, value.shape[1:])] if value.ndim else []
    return f"({', '.join(sizes)})"


def _has_nan(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all())
