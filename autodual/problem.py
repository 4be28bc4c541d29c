"""One batch and its regions, checked against the model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from autodual.bounds.run import Run
from autodual.compile import Program
from autodual.errors import SpecificationError, TraceError
from autodual.layout import Layout
from autodual.regions import Region
from autodual.validate import agree, buffers_kept
from dual_layers import NONE, REAL, Guarantee


class Problem:
    """What is asked: a compiled model, its arguments and a region for each perturbed one.

    Args:
        model: the model.
        program: its compiled graph.
        layouts: where each node keeps its batch.
        arguments: the model's arguments by name.
        regions: the region of each perturbed argument, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        layouts: Mapping[str, Layout],
        arguments: Mapping[str, Any],
        regions: Mapping[str, Region],
    ) -> None:
        self.model, self.program, self.layouts = model, program, layouts
        self.arguments, self.regions = arguments, regions
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
        return (self.batch, *self.scores.shape[1:])

    @property
    def outputs(self) -> int:
        """Number of outputs per example."""
        return self.scores[:1].numel()

    def empty(self, rows: int) -> Tensor:
        """Return an answer for an empty batch."""
        return self.like.new_zeros(0, rows)

    def outputs_at_x(self) -> Tensor:
        """Return the model's outputs at x, ``(batch, outputs)``.

        Raises:
            SpecificationError: an output is NaN or infinite; names the parameters that are to blame, if any.
        """
        scores = self.scores.reshape(len(self.scores), -1)[: self.batch]
        bad = (~scores.isfinite()).any(1).nonzero()
        if len(bad):
            culprits = [name for name, value in self.model.state_dict().items() if _has_nan(value)]
            cause = f"; these parameters contain NaN or infinity: {culprits}" if culprits else ""
            raise SpecificationError(f"the model's output for example {int(bad[0])} is not finite{cause}")
        return scores

    @cached_property
    def points(self) -> dict[str, Any]:
        """The arguments, perturbed ones moved to the centre of their region."""
        return {
            name: self.regions[name].center(value) if name in self.regions else value for name, value in self.arguments.items()
        }

    def outputs_at_centre(self) -> Tensor:
        """Return the model's outputs at the regions' centres, ``(batch, outputs)``."""
        centred = all(self.points[name] is value for name, value in self.arguments.items())
        scores = self.scores if centred or not self.batch else self._model_at(self.points)
        return scores.reshape(len(scores), -1)[: self.batch]

    def run(self, memory_budget: int) -> Run:
        """Start a computation of bounds.

        Raises:
            SpecificationError: the model's output is not finite.
            TraceError: the model was changed since it was traced.
        """
        self.outputs_at_x()
        sources = {name: self.program.graph.by_name[name].operator for name in self.program.sources}
        regions = {name: self.regions[argument] for name, argument in sources.items()}
        given = {name: self.arguments[argument] for name, argument in sources.items()}
        run = Run(self.program, self.model, self.layouts, self.points, regions, given, memory_budget)
        traced = run.values[self.program.graph.output].detach()
        if not agree(self.outputs_at_centre(), traced.reshape(len(traced), -1)):
            raise TraceError("the model no longer computes what was traced: it was changed after certify; call certify again")
        return run

    def _model_at(self, arguments: Mapping[str, Any]) -> Tensor:
        with torch.no_grad(), buffers_kept(self.model):
            return run_model(self.model, arguments)


def run_model(model: nn.Module, arguments: Mapping[str, Any]) -> Tensor:
    """Run a model on named arguments.

    Raises:
        SpecificationError: the model rejects its input.
        TraceError: the model does not return one tensor.
    """
    try:
        result = model(**arguments)
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = {name: tuple(value.shape) for name, value in arguments.items() if isinstance(value, Tensor)}
        raise SpecificationError(f"the model does not accept inputs of shape {shapes}: {error}") from error
    if isinstance(result, (tuple, list)) and len(result) == 1:
        result = result[0]
    if not isinstance(result, Tensor):
        raise TraceError(f"the model must return one tensor, got {type(result).__name__}: wrap it in a module that picks one")
    return result


def filled(value: Any) -> Any:
    """Return the value, or one made-up example where an empty batch was given."""
    empty = isinstance(value, Tensor) and value.ndim > 0 and len(value) == 0
    return value.new_zeros(1, *value.shape[1:]) if empty else value


def _has_nan(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all())
