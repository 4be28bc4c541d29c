"""Slopes that climb for rows in pairs: hidden elements, each in the windows that it depends on.

A row behind convolutions sees few elements of the nodes before it. Its slopes there are found as ``optimize.py`` finds
those of whole rows, by the same search, at the cost of its windows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from autodual.bounds.optimize import Ascent, Sought, box_of, is_sought, search
from autodual.bounds.pairs import Chunk, Frontier, PairWalk, Rows, walks_in_pairs
from autodual.bounds.run import Run
from autodual.graph import Graph
from dual_layers import PiecewiseLinear


def climbs_cheaply(run: Run, target: str) -> bool:
    """Whether what lies before a node is affine, or piecewise linear element by element: then ascents are worth their time.

    What operators are decides, and whether a tensor made of the model's arguments is among their constants (it may differ from
    example to example, so that a batch cannot climb in pairs); never a batch or its boxes, since no example may change another.
    """
    needed = run.needed(target)
    return all(run.layouts[name].factor == 1 and _is_plain(run, name) for name in run.program.rules if name in needed)


def _is_plain(run: Run, name: str) -> bool:
    layer = run.layers[name]
    if layer.facts.affine:
        graph, perturbed = run.program.graph, run.program.parents[name]
        others = [each for each in graph.by_name[name].parents if each not in perturbed]
        return not any(isinstance(run.values[each], Tensor) and _reads_input(graph, each) for each in others)
    curved = not isinstance(layer, PiecewiseLinear) or not layer.facts.positionwise or not layer.continuous()
    return not curved and name not in run.program.enclosures


def _reads_input(graph: Graph, name: str) -> bool:
    """Whether a node's value comes from an argument of the model, not from parameters and constants alone."""
    stack, seen = [name], set()
    while stack:
        node = graph.by_name[stack.pop()]
        if node.kind == "input":
            return True
        stack += [each for each in node.parents if each not in seen]
        seen.update(node.parents)
    return False


def climbing_run(run: Run, target: str) -> Run | None:
    """Return a run with the lines that an ascent in pairs starts from, or None where a node on the way does not allow it."""
    if not walks_in_pairs(run, target):
        return None
    own, ancestors = run.fork(boxes=True), run.needed(target)
    for name in run.program.relaxed:
        if name in ancestors:
            box, layer = box_of(own, name), own.layers[name]
            own.lines[name] = own.relate(name, layer.slopes(box, "adaptive"), box)
            if not is_sought(own, name) or layer.vertices(box) is None:
                return None
    return own


class PairAscent(PairWalk):
    """Rows of some elements of a node, each for one example, with slopes of their own for either end.

    Args:
        run: as ``climbing_run`` returns it.
        target: the node whose rows these are.
        wanted: which elements of which examples, ``[batch, features]`` bool.
        steps: how many to take.
    """

    two_sided = False
    copies = 2

    def __init__(self, run: Run, target: str, wanted: Bool[Tensor, "batch features"], steps: int) -> None:
        super().__init__(run, target, wanted, windows=run.layout != "whole")
        self.steps, self.trials, self._slopes = steps, {}, 0

    def worth(self, rows: int) -> int:
        """Return how many rows of an example have as many slopes to seek as so many whole ones, whatever is trained."""
        if self.visits() is None:
            return rows
        whole = sum(self.run.features(name) for name in self.run.lines)
        return max(rows, rows * whole // max(self._slopes, 1))

    def _walk(self, chunk: Chunk, frontier: Frontier) -> tuple[Tensor, Tensor]:
        self._visited = 0
        return self._climbed(chunk, frontier), -self._climbed(chunk, self._turned(frontier))

    def _climbed(self, chunk: Chunk, frontier: Frontier) -> Float[Tensor, " pairs"]:
        """Climb, and return what the best slopes prove."""
        self.trials, self._slopes = {}, 0
        if not len(chunk.examples):
            return self._ends(chunk, frontier)[0]
        with torch.no_grad():
            constant = {name: [replace(each, nu=each.nu.detach()) for each in rows] for name, rows in frontier.items()}
            first = self._ends(chunk, constant)[0]
            trials = [trial for trial in self.trials.values() if len(trial.index)]
            best = search(trials, Ascent(self.steps), lambda: self._ends(chunk, constant)[0]) if trials else first
        if not torch.is_grad_enabled():
            return best
        self.trials = {
            name: WindowTrial(self, name, trial.rows, chunk, [trial.spread(slope) for slope in trial.best])
            for name, trial in self.trials.items()
        }
        return self._ends(chunk, frontier)[0]

    def _through_relaxed(self, name: str, rows: Rows, chunk: Chunk) -> tuple[Tensor, Tensor, Rows]:
        own = self._owned(rows, chunk)
        self._slopes += math.prod(own.nu.shape[1:])
        if name not in self.trials:
            self.trials[name] = WindowTrial(self, name, rows, chunk)
        pulled, penalty = self.trials[name].pull(self._flat(own.nu))
        result = replace(own, nu=self._shaped(pulled, own.nu.shape[1:]), clean=True)
        self._note(result)
        return penalty, torch.zeros_like(penalty), result


class WindowTrial(Sought):
    """The slopes of one relaxed node that the rows of a chunk see.

    Args:
        walk: says where the node's elements are in rows.
        name: of the node.
        rows: that have arrived there.
        chunk: the pairs.
        slopes: those that have been found; their lines then carry derivatives. By default they are to be sought.
    """

    def __init__(self, walk: PairAscent, name: str, rows: Rows, chunk: Chunk, slopes: list[Tensor] | None = None) -> None:
        self.walk, self.name, self.rows, self.chunk = walk, name, replace(rows, nu=rows.nu[:0].detach()), chunk
        self.attached = slopes is not None
        self._prepare(walk.run, name)
        if slopes is not None:
            self.now, self.sides = slopes, (True, True)

    def _table(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.walk._table(self.name, value, self.rows.nu.shape[1:], self.rows.place, self.chunk)
