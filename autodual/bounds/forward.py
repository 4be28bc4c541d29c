"""Forward walks: vectors pushed from the inputs on, through the lines of every relaxed node (thesis, Algorithms 2 and 3).

With parallel slopes each node is ``z0 + shift + sum of symbols``: linear in the inputs' deviation and in one symbol per
relaxed element. What is pushed decides what is known at the other end: every symbol on its own, or random mixtures of all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from autodual.bounds.run import Run, identity_rows

SHIFT = ":shift"
"""Key of the vector that carries the midpoints of the lines, ``[1, *node]``; no node's name has a colon."""

Entry = dict[str, Tensor]


class ForwardWalk(ABC):
    """Rows of vectors pushed from the sources on.

    A node's entry maps a key to rows ``[rows, *node]``; a batch of one in the batch's axis stands for every example. An entry
    is forgotten as soon as every node that reads it was visited, and it was released if it was to be asked for.

    Args:
        run: the run.
        asked: nodes that will be asked for after nodes behind them may have been visited.
    """

    def __init__(self, run: Run, asked: Collection[str] = ()) -> None:
        self.run = run
        self.entries: dict[str, Entry] = {}
        self._visited: set[str] = set()
        self._readers = Counter(parent for parents in run.program.parents.values() for parent in parents)
        self._asked = set(asked)
        self._readers.update(self._asked)

    @abstractmethod
    def start(self, source: str) -> Entry:
        """Return what sets out from a source."""

    @abstractmethod
    def fresh(self, name: str) -> Entry:
        """Return what a relaxed node adds of its own."""

    def reach(self, name: str) -> Entry:
        """Push everything up to a node whose relaxed ancestors have their lines, and return its entry."""
        ancestors = self.run.needed(name)
        for each in self.run.order:
            if each in ancestors and each not in self._visited:
                self.entries[each] = self._arrive(each)
                self._visited.add(each)
                self._forget_before(each)
        return self.entries[name]

    def _arrive(self, name: str) -> Entry:
        if name in self.run.program.sources:
            return self.start(name)
        if self.run.layers[name].facts.affine:
            return {key: self._through_affine(name, rows) for key, rows in self._arriving(name)}
        return self._through_and_fresh(name)

    def _through_and_fresh(self, name: str) -> Entry:
        """Push what arrives at a relaxed node through its lines, and add what the node has of its own."""
        entry, own = {key: self._through_lines(name, rows) for key, rows in self._arriving(name)}, self.fresh(name)
        return entry | {key: entry[key] + rows if key in entry else rows for key, rows in own.items()}

    def _forget_before(self, name: str) -> None:
        for parent in self.run.program.parents.get(name, ()):
            self._serve(parent)

    def release(self, name: str) -> None:
        """Let go of a node that was to be asked for, and will not be any more."""
        if name in self._asked:
            self._asked.remove(name)
            self._serve(name)

    def _serve(self, name: str) -> None:
        """Count one reader of a node as served, and forget its entry with the last."""
        self._readers[name] -= 1
        if not self._readers[name]:
            del self.entries[name]

    def _through_affine(self, name: str, rows: tuple[Tensor, ...]) -> Tensor:
        run, parents = self.run, self.run.program.parents[name]
        shared = all(run.is_shared(parent, part) for parent, part in zip(parents, rows, strict=True))
        if shared and run.is_shareable(name):
            layer = run.template.layers[name]
        else:
            layer, rows = run.layers[name], self._expanded(name, rows)
        if len(rows[0]) == 1:
            return layer.linear(*(part[0] for part in rows))[None]
        return torch.func.vmap(layer.linear)(*(part.contiguous() for part in rows))

    def _through_lines(self, name: str, rows: tuple[Tensor, ...]) -> Tensor:
        lines, layer = self.run.lines[name], self.run.layers[name]
        if self._is_plain(name):
            moved = rows[0] * lines.slopes.lower[0]
        else:
            moved = layer.push(lines.slopes.lower, self._expanded(name, rows))
        return moved if lines.sloping is None else torch.where(lines.sloping, moved, 0.0)

    def _is_plain(self, name: str) -> bool:
        """Whether a node takes rows times slopes, element by element, and shared rows too."""
        return self.run.layers[name].facts.positionwise and self.run.layouts[name].factor == 1

    def _expanded(self, name: str, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(self.run.expand(parent, part) for parent, part in zip(self.run.program.parents[name], rows, strict=True))

    def _arriving(self, name: str) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """Yield the rows that reach a node under each key: one tensor per parent, zero where they do not reach it."""
        parents = self.run.program.parents[name]
        for key in dict.fromkeys(key for parent in parents for key in self.entries[parent]):
            known = [self.entries[parent].get(key) for parent in parents]
            count = next(len(rows) for rows in known if rows is not None)
            points = self.run.parents(name)
            yield (
                key,
                tuple(
                    point.new_zeros(count, *point.shape) if rows is None else rows
                    for rows, point in zip(known, points, strict=True)
                ),
            )


class Shifts(ForwardWalk):
    """How far the midpoints of the lines move a node's centre."""

    def start(self, source: str) -> Entry:
        """Nothing sets out from a source."""
        return {}

    def fresh(self, name: str) -> Entry:
        """Return the lines' midpoints."""
        return {SHIFT: self.run.lines[name].shift[None]}

    def shift(self, name: str) -> Tensor:
        """Return the shift of a node, shaped like it."""
        entry = self.reach(name)
        return entry[SHIFT][0] if SHIFT in entry else torch.zeros_like(self.run.values[name])


class NoiseSymbols(Shifts):
    """Every symbol on its own: the bounds are those of the backward walk, computed the other way round.

    Source: thesis, Algorithm 2 with errata 1 and 2. A symbol's key is its owner: a source, or a relaxed node.
    """

    def __init__(self, run: Run, asked: Collection[str] = ()) -> None:
        super().__init__(run, asked)
        self.counts: dict[str, int] = {}

    @property
    def count(self) -> int:
        """Number of symbols so far."""
        return sum(self.counts.values())

    def start(self, source: str) -> Entry:
        """Return one symbol per coordinate."""
        run, value = self.run, self.run.values[source]
        self.counts[source] = width = run.features(source)
        rows = identity_rows(width, torch.arange(width, device=value.device), value).expand(-1, run.batch, -1)
        return {source: run.node(source, rows, lead=1)}

    def fresh(self, name: str) -> Entry:
        """Return one symbol for each element that is relaxed in some example."""
        run = self.run
        spread = run.examples(name, run.lines[name].spread)
        loose = (spread > 0).any(0).nonzero()[:, 0]
        self.counts[name] = len(loose)
        own = {name: run.node(name, torch.diag_embed(spread).movedim(1, 0)[loose], lead=1)} if len(loose) else {}
        return super().fresh(name) | own

    def bounds(self, name: str) -> tuple[Tensor, Tensor]:
        """Bound a node whose relaxed ancestors have their lines: lower and upper, each ``[batch, features]``."""
        run = self.run
        shift = self.shift(name)
        middle = run.examples(name, run.values[name] + shift)
        below, above = torch.zeros_like(middle), torch.zeros_like(middle)
        for owner, rows in self.entries[name].items():
            if owner == SHIFT:
                continue
            columns = run.examples(name, rows, lead=1)
            if owner in run.program.sources:
                nu = run.node(owner, columns.permute(2, 1, 0), lead=1)
                region, x = run.regions[owner], run.given[owner]
                below, above = below + region.excess(x, -nu).T, above + region.excess(x, nu).T
            else:
                spread = columns.abs().sum(0)
                below, above = below + spread, above + spread
        self.release(name)
        return middle - below, middle + above
