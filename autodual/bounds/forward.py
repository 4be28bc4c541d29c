"""The forward walk: every noise symbol pushed from the input on (thesis, Algorithm 2 with errata 1 and 2).

With parallel slopes each node is ``z0 + shift + sum of symbols``: linear in the inputs' deviation and in one symbol per
relaxed element. The bounds are those of the backward walk, computed the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from autodual.bounds.run import Run, identity_rows


class NoiseSymbols:
    """Symbols of the nodes reached so far.

    A node's entry maps a symbol's owner (a source, or a relaxed node) to its directions ``[symbols, *node]``.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.directions: dict[str, dict[str, Tensor]] = {}
        self.shifts: dict[str, Tensor] = {}

    @property
    def count(self) -> int:
        """Number of symbols so far."""
        owners = {owner: len(rows) for entry in self.directions.values() for owner, rows in entry.items()}
        return sum(owners.values())

    def bounds(self, name: str) -> tuple[Tensor, Tensor]:
        """Bound a node whose relaxed ancestors have their lines: lower and upper, each ``[batch, features]``."""
        run = self.run
        self._reach(name)
        middle = run.examples(name, run.values[name] + self.shifts[name])
        below, above = torch.zeros_like(middle), torch.zeros_like(middle)
        for owner, rows in self.directions[name].items():
            columns = run.examples(name, rows, lead=1)
            if owner in run.program.sources:
                nu = run.node(owner, columns.permute(2, 1, 0), lead=1)
                region, x = run.regions[owner], run.given[owner]
                below, above = below + region.excess(x, -nu).T, above + region.excess(x, nu).T
            else:
                spread = columns.abs().sum(0)
                below, above = below + spread, above + spread
        return middle - below, middle + above

    def _reach(self, name: str) -> None:
        if name in self.directions:
            return
        if name in self.run.program.sources:
            self._start(name)
            return
        for parent in self.run.program.parents[name]:
            self._reach(parent)
        if self.run.layers[name].facts.affine:
            self._affine(name)
        else:
            self._relaxed(name)

    def _start(self, name: str) -> None:
        run, value = self.run, self.run.values[name]
        every = torch.arange(run.features(name), device=value.device)
        rows = identity_rows(run.features(name), every, value).expand(-1, run.batch, -1)
        self.directions[name], self.shifts[name] = {name: run.node(name, rows, lead=1)}, torch.zeros_like(value)

    def _affine(self, name: str) -> None:
        layer, parents = self.run.layers[name], self.run.program.parents[name]
        self.shifts[name] = layer.linear(*(self.shifts[parent] for parent in parents))
        self.directions[name] = {
            owner: torch.func.vmap(layer.linear)(*(part.contiguous() for part in rows)) for owner, rows in self._arriving(name)
        }

    def _relaxed(self, name: str) -> None:
        run, lines, layer = self.run, self.run.lines[name], self.run.layers[name]

        def push(points: tuple[Tensor, ...]) -> Tensor:
            moved = layer.push(lines.slopes.lower, points)
            return moved if lines.sloping is None else torch.where(lines.sloping, moved, 0.0)

        entry = {owner: push(rows) for owner, rows in self._arriving(name)}
        spread = run.examples(name, lines.spread)
        loose = (spread > 0).any(0).nonzero()[:, 0]
        if len(loose):
            entry[name] = run.node(name, torch.diag_embed(spread).movedim(1, 0)[loose], lead=1)
        self.directions[name] = entry
        self.shifts[name] = lines.shift + push(tuple(self.shifts[parent] for parent in run.program.parents[name]))

    def _arriving(self, name: str) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
        """Yield the symbols that reach a node: their owner and their directions at each parent, zero where they do not."""
        parents = self.run.program.parents[name]
        for owner in dict.fromkeys(owner for parent in parents for owner in self.directions[parent]):
            known = [self.directions[parent].get(owner) for parent in parents]
            count = next(len(rows) for rows in known if rows is not None)
            points = self.run.parents(name)
            yield (
                owner,
                tuple(
                    point.new_zeros(count, *point.shape) if rows is None else rows
                    for rows, point in zip(known, points, strict=True)
                ),
            )
