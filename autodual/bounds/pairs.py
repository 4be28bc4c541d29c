"""The backward walk in pairs: rows that belong to one example each, and keep to their receptive fields.

The dense walk carries a row in every example of the batch, as large as the node it has reached. Here a row is a *pair* of an
example and an element, so that only undecided elements have one; and behind convolutions it is a *window*, the part of a
node that its element depends on. Up to the first relaxed nodes, rows depend on neither example nor position: they are
walked once, as *templates*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from autodual.bounds.picked_rows import Reach, weighted
from autodual.bounds.relaxed_rows import RelaxedRows
from autodual.bounds.run import Run, identity_rows
from autodual.regions import Region
from autodual.threads import evenly, in_threads, workers
from dual_layers import Field

PIECE = 2**23
"""Bytes of the largest tensor of a chunk of pairs: small enough for a cache, and work enough for the calls it takes."""
DENSER = 8
"""A convolution of windows is one matrix product where that takes at most so many times as many multiplications."""
LARGEST_MAP = 2**22
"""Elements that the matrix of such a product may have."""
PARTS = 4
"""With so many groups of examples for each thread, groups need not be split evenly for threads to end at one time."""
GATHERING = 1.5
"""What an element costs whose lines must be gathered for every pair, or whose rows leave the cache, beside any other."""


@dataclass(frozen=True)
class Place:
    """Where windows lie in a node: that of a target's position ``p`` begins at ``stride * p + offset``, per spatial axis."""

    stride: tuple[int, ...]
    offset: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Rows at a node.

    Attributes:
        nu: ``[rows, *node without its batch]``, or ``[rows, channels, *window]``.
        place: of windows; None for rows that hold the whole node.
        owned: whether each row is a pair; otherwise rows are templates, which a pair names one of.
        clean: whether windows are zero where they reach beyond the node.
    """

    nu: Tensor
    place: Place | None
    owned: bool = False
    clean: bool = True


Frontier = dict[str, list[Rows]]


@dataclass(frozen=True)
class Chunk:
    """Some pairs, in the order of their examples and positions.

    Attributes:
        examples: index of each pair's example, ``[pairs]``.
        templates: index of each pair's template.
        positions: index of each pair's position in the target.
        start: the first example, and for windows of one example the first position along the first axis.
        stop: one beyond the last ones.
    """

    examples: Tensor
    templates: Tensor
    positions: Tensor
    start: tuple[int, int]
    stop: tuple[int, int]


def walks_in_pairs(run: Run, name: str) -> bool:
    """Whether a node's rows can be walked in pairs: what lies before it treats elements and examples one by one."""
    needed = run.needed(name)
    return all(_fits(run, each) for each in run.order if each in needed)


def _fits(run: Run, name: str) -> bool:
    if name in run.program.sources:
        return _is_box(run.regions[name]) or type(run.regions[name]).take is not Region.take
    layer = run.layers[name]
    if layer.facts.affine:
        return run.batch == 1 or run.is_shareable(name)
    return layer.facts.positionwise and run.layouts[name].factor == 1


def choose_walk(run: Run, name: str, wanted: Tensor) -> PairWalk | None:
    """Return the walk for some rows of a node that visits the fewest elements, or None where that is the dense one.

    Args:
        run: its ``layout`` may force the choice.
        name: the node.
        wanted: which elements of which examples need a row, ``[batch, features]`` bool.
    """
    if run.layout == "dense" or not walks_in_pairs(run, name):
        return None
    walk = PairWalk(run, name, wanted, windows=run.layout != "whole")
    if run.layout != "auto":
        return walk
    pairs, dense = int(wanted.sum()), int(wanted.any(0).sum()) * run.batch
    sizes, window = [run.features(each) for each in walk.behind_relaxed] or [1], walk.visits()
    # Convolutions gain most where rows stay in the cache; with derivatives, chunks of pairs are walked twice instead.
    convolves = not torch.is_grad_enabled() and any(_convolves(run, each) for each in run.needed(name))
    alone = _fills_chunks(pairs / run.batch, PIECE // (max(sizes) * run.values[name].element_size()))
    whole = (1.0 if alone and convolves else GATHERING) * pairs * sum(sizes)
    dense = (GATHERING if convolves else 1.0) * dense * sum(sizes)
    if window is not None and GATHERING * pairs * window < whole:
        return walk if GATHERING * pairs * window < dense else None
    return PairWalk(run, name, wanted, windows=False) if whole < dense else None


def _fills_chunks(rows: float, room: int) -> bool:
    """Whether so many rows of an example are worth chunks of their own, each with room for so many."""
    return 2 * rows > room


def _convolves(run: Run, name: str) -> bool:
    layer = run.layers.get(name)
    return layer is not None and layer.facts.affine and layer.field() is not None


def _is_box(region: Region) -> bool:
    """Whether an input's elements move on their own, equally far up and down."""
    return region.separable and region.symmetric


class PairWalk:
    """Rows of some elements of a node, each for one example.

    Args:
        run: every relaxed ancestor of the target has its lines.
        target: the node whose rows these are.
        wanted: which elements of which examples, ``[batch, features]`` bool.
        windows: whether rows may keep to their receptive fields.
    """

    copies = 1
    """How many tensors as large as a chunk's largest one are held at once."""

    def __init__(self, run: Run, target: str, wanted: Tensor, *, windows: bool = True) -> None:
        self.run, self.target, self.wanted = run, target, wanted
        run.settle()  # what is recomputed in a backward pass must find the same cached values as the first time
        self.one = run if run.batch == 1 else run.template
        self.grid = self._shape(target)[1:] if windows and self._has_axes(target) else None
        if self.grid is not None and not self._begins_with_a_window():
            self.grid = None
        self.largest = "whole rows"
        self.images = run.values[target].device.type == "cpu" and any(map(self._convolves, run.needed(target)))
        self._maps: dict[tuple[str, tuple[int, ...]], Tensor | None] = {}
        self._diagonals: dict[str, tuple[Tensor, ...] | None] = {}
        self._laid_out: dict[str, list[Tensor]] = {}
        self._last: dict[str, Tensor | None] = {}
        self._alike: dict[str, bool] = {}
        self._template_windows: Frontier | None = None
        self._negative: tuple[Frontier, Frontier] | None = None
        self._peak, self._visited = 1, 0

    def bounds(self) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Return the pairs, as examples and elements, and how far each may deviate from its reference, below and above."""
        examples, elements, parts = [], [], []
        for chosen, frontier in self._templates():
            pairs = self._pairs(chosen)
            examples.append(pairs[0])
            elements.append(self._elements(chosen, pairs))
            parts.extend(self._chunks(pairs, frontier))
        found = (torch.cat(examples), torch.cat(elements))
        lower, upper = (torch.cat(ends) for ends in zip(*parts, strict=True))
        return found, lower, upper

    # How rows lie in memory.

    def _convolves(self, name: str) -> bool:
        return _convolves(self.run, name) and len(self.run.layers[name].field().stride) == 2

    def _flat(self, nu: Tensor) -> Tensor:
        """Bring rows to ``[rows, features]``: those of images with their channels last, as they lie in memory."""
        if self.images and nu.dim() == 4:
            return nu.permute(0, 2, 3, 1).flatten(1)
        return nu.flatten(1) if nu.dim() > 1 else nu[:, None]  # a node may have no axis but the batch's

    def _shaped(self, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Bring rows from ``[rows, features]`` back to a shape."""
        if self.images and len(shape) == 3:
            channels, *size = shape
            return flat.view(len(flat), *size, channels).permute(0, 3, 1, 2)
        return flat.view(len(flat), *shape)

    def _in_order(self, rows: Rows) -> Rows:
        """Lay rows out in memory as they are read, once for all chunks."""
        return replace(rows, nu=self._shaped(self._flat(rows.nu), tuple(rows.nu.shape[1:])))

    # Which rows there are.

    def _has_axes(self, name: str) -> bool:
        layout = self.run.layouts[name]
        return self.run.values[name].dim() >= 3 and layout.axis == 0 and layout.factor == 1

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return the node's shape for one example, its batch left out."""
        shape, layout = list(self.one.values[name].shape), self.run.layouts[name]
        if layout.factor == 1:
            del shape[layout.axis]
        return tuple(shape)

    def _begins_with_a_window(self) -> bool:
        """Whether a convolution lies at the target, or behind nothing but functions of single elements."""
        name = self.target
        while name in self.run.program.rules:
            layer, parents = self.run.layers[name], self.run.program.parents[name]
            if layer.facts.affine and self._has_axes(name) and layer.field() is not None:
                return True
            if not self._is_diagonal(name):
                return False
            name = parents[0]
        return False

    def _templates(self) -> Iterator[tuple[Tensor, Frontier]]:
        """Yield elements (channels, for windows) and their rows at the first nodes that are no template's any more."""
        value = self.run.values[self.target]
        if self.grid is not None:
            channels = self._shape(self.target)[0]
            eye = torch.eye(channels, dtype=value.dtype, device=value.device).reshape(
                channels, channels, *(1 for _ in self.grid)
            )
            rows = Rows(eye, Place((1,) * len(self.grid), (0,) * len(self.grid)))
            if self._template_windows is None:
                self._template_windows = self._frontier(rows)
            yield torch.arange(channels, device=value.device), self._template_windows
            return
        chosen = self.wanted.any(0).nonzero()[:, 0]
        for part in chosen.split(self.run.rows_per_chunk(self.target) * max(self.run.batch, 1)):
            nu = identity_rows(self.run.features(self.target), part, value).reshape(len(part), *self._shape(self.target))
            yield part, self._frontier(Rows(nu, None))

    def _frontier(self, rows: Rows) -> Frontier:
        """Walk templates back to the nodes where rows begin to depend on the example, or on the position."""
        program, stops = self.run.program, self.behind_relaxed
        pending, found = {self.target: [rows]}, {}
        for name in reversed(self.run.order[: self.run.order.index(self.target) + 1]):
            arrived = pending.pop(name, [])
            if not arrived:
                continue
            affine = name in program.rules and self.run.layers[name].facts.affine
            rows = self._merged(name, arrived, None) if affine and name not in stops else None
            parts = None if rows is None else self._through_affine(name, rows, None)
            if parts is None:
                found[name] = [self._in_order(each) for each in arrived]
                continue
            for parent, part in zip(program.parents[name], parts, strict=True):
                pending.setdefault(parent, []).append(part)
        return found

    def visits(self) -> int | None:
        """Return how many elements one pair's windows visit on their way, or None where there are no windows."""
        if self.grid is None:
            return None
        (_, frontier), none = next(self._templates()), self.wanted.new_zeros(0, dtype=torch.long)
        self._walk(self._chunk((none, none, none)), frontier)
        return self._visited

    @cached_property
    def behind_relaxed(self) -> set[str]:
        """Nodes that rows reach as pairs: those that a relaxed node reads, directly or not."""
        needed, found = self.run.needed(self.target), set()
        for name in needed:
            if name in self.run.program.rules and not self.run.layers[name].facts.affine:
                for parent in self.run.program.parents[name]:
                    found |= self.run.needed(parent)
        return found

    def _pairs(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """List the pairs: example, template and position, in the order of examples and positions."""
        if self.grid is None:
            examples, templates = self.wanted[:, chosen].nonzero(as_tuple=True)
            return examples, templates, torch.zeros_like(examples)
        wanted = self.wanted.unflatten(1, (len(chosen), math.prod(self.grid))).transpose(1, 2)
        examples, positions, templates = wanted.nonzero(as_tuple=True)
        return examples, templates, positions

    def _elements(self, chosen: Tensor, pairs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        _, templates, positions = pairs
        return chosen[templates] if self.grid is None else templates * math.prod(self.grid) + positions

    # Chunks of pairs.

    def _chunks(self, pairs: tuple[Tensor, Tensor, Tensor], frontier: Frontier) -> list[tuple[Tensor, Tensor]]:
        self._walk(self._chunk(tuple(part[:0] for part in pairs)), frontier)  # no pairs: tells how large one gets
        chunks = [self._chunk(part) for part in self._split(pairs)]
        if torch.is_grad_enabled() and len(chunks) > 1:
            return [checkpoint(self._walk, chunk, frontier, use_reentrant=False) for chunk in chunks]
        if self._threads == 1:
            return [self._walk(chunk, frontier) for chunk in chunks]
        return in_threads(lambda chunk: copy(self)._walk(chunk, frontier), chunks, self.run.values[self.target])

    @property
    def _threads(self) -> int:
        """How many threads walk chunks: one without convolutions, since products of matrices are shared out well."""
        return workers(self.run.values[self.target]) if self.images else 1

    def _split(self, pairs: tuple[Tensor, Tensor, Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Split pairs so that neither their rows nor what is laid out for their examples takes much memory."""
        value, threads = self.run.values[self.target], self._threads
        room = min(PIECE, self.run.budget // (self.copies * threads))
        room = max(1, room // (self._peak * value.element_size()))
        most = 4 * room // math.prod(self.grid or (1,))
        if self.grid is None and _fills_chunks(len(pairs[0]) / self.run.batch, room):
            most = 1  # whole rows of a single example share its lines
        examples = max(1, most)
        counts = (pairs[0] // examples).unique_consecutive(return_counts=True)[1].tolist()
        for group in zip(*(index.split(counts) for index in pairs), strict=True):
            size = evenly(len(group[0]), room, threads if len(counts) < PARTS * threads else 1)
            yield from zip(*(index.split(size) for index in group), strict=True)

    def _chunk(self, pairs: tuple[Tensor, Tensor, Tensor]) -> Chunk:
        examples, templates, positions = pairs
        if not len(examples):
            return Chunk(examples, templates, positions, (0, 0), (0, 1))
        first, last = int(examples[0]), int(examples[-1]) + 1
        begin, end = 0, 1 if self.grid is None else self.grid[0]
        if last - first == 1 and self.grid is not None:
            across = math.prod(self.grid[1:])
            begin, end = int(positions[0]) // across, int(positions[-1]) // across + 1
        return Chunk(examples, templates, positions, (first, begin), (last, end))

    def _walk(self, chunk: Chunk, frontier: Frontier) -> tuple[Tensor, Tensor]:
        """Walk a chunk of pairs from the frontier to the inputs; lines that are not parallel need the negative rows too."""
        self._visited = 0
        if self.two_sided:
            return self._ends(chunk, frontier)
        lower, _ = self._ends(chunk, frontier)
        other, _ = self._ends(chunk, self._turned(frontier))
        return lower, -other

    def _turned(self, frontier: Frontier) -> Frontier:
        """Return the negative rows, computed once for all chunks."""
        if self._negative is None or self._negative[0] is not frontier:
            self._negative = frontier, {name: [replace(each, nu=-each.nu) for each in rows] for name, rows in frontier.items()}
        return self._negative[1]

    @cached_property
    def two_sided(self) -> bool:
        """Whether one walk yields both ends."""
        needed = self.run.needed(self.target)
        return all(lines.two_sided for name, lines in self.run.lines.items() if name in needed)

    def _ends(self, chunk: Chunk, frontier: Frontier) -> tuple[Tensor, Tensor]:
        run, pending = self.run, {name: list(rows) for name, rows in frontier.items()}
        value = run.values[self.target]
        lower = upper = torch.zeros(len(chunk.examples), dtype=value.dtype, device=value.device)
        for name in reversed(run.order[: run.order.index(self.target) + 1]):
            arrived = pending.pop(name, [])
            if not arrived:
                continue
            rows = self._merged(name, arrived, chunk)
            if name in run.program.sources:
                below, above = self._reach(name, rows, chunk)
                lower, upper = lower - below, upper + above
                continue
            if self._is_last(name, rows):
                reach = self._last_reach(name, rows, chunk)
                lower, upper = lower - reach, upper + reach
                continue
            if run.layers[name].facts.affine:
                parts = self._through_affine(name, rows, chunk)
            else:
                below, above, *parts = self._through_relaxed(name, rows, chunk)
                lower, upper = lower + below, upper + above
            for parent, part in zip(run.program.parents[name], parts, strict=True):
                pending.setdefault(parent, []).append(part)
        return lower, upper

    # What happens at a node.

    def _reach(self, name: str, rows: Rows, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Return how far an input may move the rows down and up; windows of a box need not be put into the whole input."""
        x, region = self.run.given[name], self.run.regions[name]
        if _is_box(region):
            radii = self._kept(name, lambda: [self._laid(name, region.noise(x).scale.expand_as(x))])
            (reach,) = self._contract(name, rows, radii, (Tensor.abs,), chunk)
            return reach, reach
        nu = self._whole(name, self._owned(rows, chunk), chunk).nu[None]
        taken, own = region.take(chunk.examples, x), x[chunk.examples]
        below = taken.excess(own, nu if region.symmetric else -nu)[0]
        return below, below if region.symmetric or not self.two_sided else taken.excess(own, nu)[0]

    def _is_last(self, name: str, rows: Rows) -> bool:
        """Whether nothing lies behind a convolution but a box, and its phases are quicker to walk than a matrix product."""
        if name not in self._last:
            layer = self.run.layers[name]
            phased = layer.facts.affine and self._has_axes(name) and layer.has_phases()
            self._last[name] = self._radii(self.run.program.parents[name][0]) if phased else None
        if self._last[name] is None:
            return False
        return rows.place is None or self._map(name, tuple(rows.nu.shape[1:]), self.run.layers[name].field()) is None

    def _moves_alike(self, name: str) -> bool:
        """Whether the box behind a convolution is as large for every example, so that one row of radii stands for all."""
        if name not in self._alike:
            radii = self.run.examples(self.run.program.parents[name][0], self._last[name])
            self._alike[name] = not radii.requires_grad and bool((radii == radii[:1]).all())
        return self._alike[name]

    def _radii(self, name: str) -> Tensor | None:
        """Return how far each element of a node moves, where it does so on its own and a single operator reads it."""
        program, needed = self.run.program, self.run.needed(self.target)
        readers = sum(parent == name for each in needed if each in program.rules for parent in program.parents[each])
        if readers != 1:
            return None
        if name in program.sources:
            region, x = self.run.regions[name], self.run.given[name]
            return region.noise(x).scale.expand_as(x) if _is_box(region) else None
        if not self._is_diagonal(name) or len(program.parents[name]) != 1:
            return None
        radii = self._radii(program.parents[name][0])
        return None if radii is None else self.run.layers[name].absolute(radii)

    def _last_reach(self, name: str, rows: Rows, chunk: Chunk) -> Tensor:
        """Return how far the box behind a convolution moves rows: phase by phase, which need not be put together for that."""
        rows, field, (parent,) = self._owned(rows, chunk), self.run.layers[name].field(), self.run.program.parents[name]
        if not rows.clean:
            rows = self._cleaned(name, rows, chunk)
        phases = self.one.layers[name].pull_in_phases(rows.nu)
        axes = len(field.stride)
        places = phases.shape[2 + axes :]
        window = tuple(n * s for n, s in zip(places, field.stride, strict=True))
        (laid,) = self._kept(name, lambda: [self._laid(parent, self._last[name])])
        if rows.place is None:
            whole, index = self._cut(parent, laid, window, None, chunk)
            whole = whole[:1] if self._moves_alike(name) else whole
            size = self._shape(parent)
            sides = [(p, w - n - p) for p, w, n in zip(field.padding, window, size[1:], strict=True)]
            table = F.pad(self._shaped(whole, size), [side for pair in reversed(sides) for side in pair])
        else:
            size = (phases.shape[1], *window)
            table, index = self._cut(parent, laid, size, _behind(rows.place, field), chunk)
            table = self._shaped(table, size)
        sizes = (size for pair in zip(places, field.stride, strict=True) for size in pair)
        split = table.reshape(len(table), phases.shape[1], *sizes)
        radii = split.permute(0, 1, *range(3, 3 + 2 * axes, 2), *range(2, 2 + 2 * axes, 2)).flatten(1, 1 + axes)
        radii, phases = self._flat(radii), self._flat(phases.flatten(1, 1 + axes))
        self._note(replace(rows, nu=phases, place=None))
        return Reach.apply(phases, radii if len(radii) == 1 else radii.index_select(0, index))

    def _through_relaxed(self, name: str, rows: Rows, chunk: Chunk) -> tuple[Tensor, Tensor, Rows]:
        """Return what a relaxed node's lines allow below and above, and the rows pulled through them."""
        lines = self.run.lines[name]
        *slopes, shift, spread = self._kept(name, lambda: self._laid_lines(name))
        offsets = shift, spread
        seen = [self._seen(name, slope, rows, chunk) for slope in slopes]
        own = self._owned(rows, chunk)
        if not rows.owned and len(rows.nu) <= len(chunk.examples):  # templates are charged alike for an example and a place
            shift, spread = self._contract(name, rows, offsets, (_itself, Tensor.abs), chunk)
            pulled = self._flat(own.nu)
            pulled = pulled * (seen[0] if lines.slopes.parallel else torch.where(pulled > 0, *seen))
        else:
            offsets = [self._seen(name, offset, rows, chunk) for offset in offsets]
            lead = 1 if len(seen[0]) == 1 else 0  # the pairs of one example share its lines
            upper = None if lines.slopes.parallel else seen[1]
            parts = RelaxedRows.apply(self._flat(own.nu).unsqueeze(lead), seen[0], upper, *offsets)
            pulled, shift, spread = (part.squeeze(lead) for part in parts)
        result = replace(own, nu=self._shaped(pulled, own.nu.shape[1:]), clean=True)
        self._note(result)
        return shift - spread, shift + spread if lines.two_sided else torch.zeros_like(shift), result

    def _kept(self, name: str, lay_out: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Return what is laid out for a node: once for all chunks, if no derivatives are wanted."""
        if torch.is_grad_enabled():
            return lay_out()
        if name not in self._laid_out:
            self._laid_out[name] = lay_out()
        return self._laid_out[name]

    def _laid_lines(self, name: str) -> list[Tensor]:
        """Lay out the slopes of a node's lines, one or two, and the shift and the spread of their offsets."""
        lines, value = self.run.lines[name], self.run.values[name]
        slopes = [lines.slopes.lower[0]] if lines.slopes.parallel else [lines.slopes.lower[0], lines.slopes.upper[0]]
        if lines.sloping is not None:
            slopes = [torch.where(lines.sloping, slope, 0.0) for slope in slopes]
        return [self._laid(name, each.expand_as(value)) for each in (*slopes, lines.shift, lines.spread)]

    def _contract(self, name: str, rows: Rows, weights: Sequence[Tensor], parts: tuple, chunk: Chunk) -> list[Tensor]:
        """Sum parts of rows times laid-out weights over the node, pair by pair; templates meet every example in one product."""
        shape, result = rows.nu.shape[1:], []
        for weight, part in zip(weights, parts, strict=True):
            table, index = self._cut(name, weight, shape, rows.place, chunk)
            if rows.owned:
                flat, own = self._flat(rows.nu), table if len(table) == 1 else table.index_select(0, index)
                result.append(Reach.apply(flat, own) if part is Tensor.abs else weighted(part(flat), own))
            else:
                result.append((table @ self._flat(part(rows.nu)).T)[index, chunk.templates])
        return result

    def _through_affine(self, name: str, rows: Rows, chunk: Chunk | None) -> tuple[Rows, ...] | None:
        """Pull rows through an affine node; without a chunk they are templates, and None says that they stay so no longer."""
        layer = self.run.layers[name]
        if rows.place is not None:
            diagonals = self._diagonal(name)
            if diagonals is not None:
                return self._scaled(rows, diagonals, name, chunk)
            field = layer.field()
            if field is not None and (rows.clean or chunk is not None):
                return (self._convolved(name, rows, field, chunk),)
            if chunk is None:
                return None
            rows = self._whole(name, self._owned(rows, chunk), chunk)
        shape = self.one.values[name].shape
        pulled = self.one.layers[name].transpose(rows.nu.reshape(len(rows.nu), *shape), self.one.parents(name))
        parents = self.run.program.parents[name]
        result = tuple(
            replace(rows, nu=part.reshape(len(part), *self._shape(parent)))
            for part, parent in zip(pulled, parents, strict=True)
        )
        self._note(*result)
        return result

    def _convolved(self, name: str, rows: Rows, field: Field, chunk: Chunk | None) -> Rows:
        """Pull windows through a convolution: transpose it without its padding."""
        if not rows.clean:
            rows = self._cleaned(name, self._owned(rows, chunk), chunk)
        place = _behind(rows.place, field)
        matrix, layer = self._map(name, tuple(rows.nu.shape[1:]), field), self.one.layers[name]
        if matrix is None:
            nu = layer.pull_windows(rows.nu)
        else:
            window = tuple((n - 1) * s + e for n, s, e in zip(rows.nu.shape[2:], field.stride, field.extent, strict=True))
            nu = self._shaped(self._flat(rows.nu) @ matrix, (self._shape(self.run.program.parents[name][0])[0], *window))
        (parent,) = self.run.program.parents[name]
        result = replace(rows, nu=nu, place=place, clean=False)
        self._note(result)
        if chunk is not None and math.prod(nu.shape[2:]) >= math.prod(self._shape(parent)[1:]):
            result = self._whole(parent, self._owned(result, chunk), chunk)
        return result

    def _map(self, name: str, shape: tuple[int, ...], field: Field) -> Tensor | None:
        """Return the matrix of a convolution's transpose on windows of a shape, where a matrix product is the faster way."""
        if (name, shape) not in self._maps:
            layer, width = self.one.layers[name], math.prod(shape)
            channels = self._shape(self.run.program.parents[name][0])[0]
            window = math.prod((n - 1) * s + e for n, s, e in zip(shape[1:], field.stride, field.extent, strict=True))
            dense = window <= DENSER * math.prod(field.extent) and width * channels * window <= LARGEST_MAP
            value = self.run.values[name]
            eye = torch.eye(width if dense else 0, dtype=value.dtype, device=value.device)
            self._maps[name, shape] = self._flat(layer.pull_windows(self._shaped(eye, shape))) if dense else None
        return self._maps[name, shape]

    def _is_diagonal(self, name: str) -> bool:
        """Whether an affine node treats every element on its own."""
        facts, shape = self.run.layers[name].facts, self.run.values[name].shape
        single = facts.affine and (facts.positionwise or facts.elementwise)
        return single and all(value.shape == shape for value in self.run.parents(name))

    def _diagonal(self, name: str) -> tuple[Tensor | None, ...] | None:
        """Return the factor of every element of each input of such a node, ``[1, *node]``, None standing for 1."""
        if name not in self._diagonals:
            self._diagonals[name] = None
            if self._is_diagonal(name) and self._has_axes(name):
                ones = torch.ones_like(self.one.values[name])[None]
                factors = (part[0] for part in self.one.layers[name].transpose(ones, self.one.parents(name)))
                self._diagonals[name] = tuple(
                    None if _fixed(factor) and bool((factor == 1).all()) else factor for factor in factors
                )
        return self._diagonals[name]

    def _scaled(
        self, rows: Rows, factors: tuple[Tensor | None, ...], name: str, chunk: Chunk | None
    ) -> tuple[Rows, ...] | None:
        result = []
        for factor in factors:
            if factor is None:
                result.append(rows)
                continue
            alike = factor.flatten(2)[0]
            if _fixed(factor) and bool((alike == alike[:, :1]).all()):
                result.append(replace(rows, nu=rows.nu * alike[:, 0].reshape(-1, *(1 for _ in rows.nu.shape[2:]))))
            elif chunk is None:
                return None
            else:
                own = self._owned(rows, chunk)
                result.append(self._times(name, own, factor, chunk))
        return tuple(result)

    def _times(self, name: str, rows: Rows, factor: Tensor, chunk: Chunk) -> Rows:
        """Multiply pairs by something that every example shares, ``[1, *node]``."""
        alone = replace(chunk, start=(0, chunk.start[1]), stop=(1, chunk.stop[1]), examples=torch.zeros_like(chunk.examples))
        table, index = self._table(name, factor, rows.nu.shape[1:], rows.place, alone)
        return replace(rows, nu=rows.nu * self._shaped(table.index_select(0, index), rows.nu.shape[1:]), clean=True)

    def _cleaned(self, name: str, rows: Rows, chunk: Chunk) -> Rows:
        """Set windows to zero where they reach beyond the node."""
        return self._times(name, rows, torch.ones_like(self.one.values[name]), chunk)

    def _seen(self, name: str, laid: Tensor, rows: Rows, chunk: Chunk) -> Tensor:
        """Cut out of a node's values what rows see of them, ``[pairs, features]``, or one row where all see the same."""
        table, index = self._cut(name, laid, rows.nu.shape[1:], rows.place, chunk)
        return table if len(table) == 1 else table.index_select(0, index)

    # Templates, windows and whole rows.

    def _owned(self, rows: Rows, chunk: Chunk) -> Rows:
        """Give every pair its own copy of its template."""
        if rows.owned:
            return rows
        own = self._flat(rows.nu).index_select(0, chunk.templates)
        return replace(rows, nu=self._shaped(own, rows.nu.shape[1:]), owned=True)

    def _merged(self, name: str, arrived: list[Rows], chunk: Chunk | None) -> Rows | None:
        """Add up what arrived at a node; without a chunk None says that it cannot be done yet."""
        result = arrived[0]
        for rows in arrived[1:]:
            if result.owned != rows.owned:
                result, rows = self._owned(result, chunk), self._owned(rows, chunk)
            if _stride(result) == _stride(rows):
                result = _union(result, rows)
            elif chunk is None:
                return None
            else:
                result, rows = (self._whole(name, self._owned(each, chunk), chunk) for each in (result, rows))
                result = replace(result, nu=result.nu + rows.nu)
        return result

    def _whole(self, name: str, rows: Rows, chunk: Chunk) -> Rows:
        """Put windows where they belong in the whole node."""
        if rows.place is None:
            return rows
        shape = self._shape(name)
        grid, window, place = shape[1:], rows.nu.shape[2:], rows.place
        where, beyond = torch.zeros_like(chunk.positions)[:, None], torch.zeros_like(chunk.positions, dtype=torch.bool)[:, None]
        at = torch.unravel_index(chunk.positions, self.grid)
        for axis, (n, w) in enumerate(zip(grid, window, strict=True)):
            reach = torch.arange(w, device=where.device)
            along = (place.stride[axis] * at[axis] + place.offset[axis])[:, None] + reach
            where = (where[:, :, None] * n + along[:, None]).flatten(1)
            beyond = (beyond[:, :, None] | ((along < 0) | (along >= n))[:, None]).flatten(1)
        size = math.prod(grid)
        where = torch.where(beyond, size, where)[:, None].expand(-1, shape[0], -1)
        flat = rows.nu.new_zeros(len(rows.nu), shape[0], size + 1).scatter(2, where, rows.nu.flatten(2))
        result = Rows(flat[..., :-1].reshape(-1, *shape), None, rows.owned)
        self._note(result)
        return result

    def _table(
        self, name: str, value: Tensor, shape: tuple[int, ...], place: Place | None, chunk: Chunk
    ) -> tuple[Tensor, Tensor]:
        """Lay out a node's values as rows see them: ``[some rows, features]``, and which of them is each pair's."""
        return self._cut(name, self._laid(name, value), shape, place, chunk)

    def _laid(self, name: str, value: Tensor) -> Tensor:
        """Lay out a node's values as its rows lie in memory, ``[examples or 1, features]``."""
        return self._flat(self.run.examples(name, value).reshape(-1, *self._shape(name)))

    def _cut(self, name: str, laid: Tensor, shape: tuple[int, ...], place: Place | None, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Do as ``_table`` does with values that are laid out already."""
        (first, begin), (last, end) = chunk.start, chunk.stop
        laid = laid.expand(last, -1)[first:last] if len(laid) == 1 else laid[first:last]
        own = chunk.examples - first
        if place is None:
            return laid, own
        grid = (end - begin, *self.grid[1:])
        image = self._shaped(laid, self._shape(name))
        for axis, (count, window) in enumerate(zip(grid, shape[1:], strict=True), start=2):
            stride, offset = place.stride[axis - 2], place.offset[axis - 2] + (begin * place.stride[0] if axis == 2 else 0)
            image = _windows(image, axis, count, stride, offset, window)
        axes = len(grid)
        window = range(2 + axes, 2 + 2 * axes)
        order = (0, *range(2, 2 + axes), *((*window, 1) if self.images and axes == 2 else (1, *window)))
        table = image.permute(order).reshape(-1, math.prod(shape))
        across = math.prod(grid)
        return table, own * across + (chunk.positions - begin * math.prod(self.grid[1:]))

    def _note(self, *rows: Rows) -> None:
        for each in rows:
            size = math.prod(each.nu.shape[1:])
            self._peak = max(self._peak, size)
            self._visited += size * each.owned
            if each.place is not None:
                self.largest = f"windows up to {'x'.join(map(str, each.nu.shape[2:]))}"


def _windows(image: Tensor, axis: int, count: int, stride: int, offset: int, window: int) -> Tensor:
    """Cut an axis into ``count`` windows, with zeros beyond its ends; their inner axis comes last."""
    size = image.shape[axis]
    before, after = max(0, -offset), max(0, stride * (count - 1) + offset + window - size)
    if before or after:
        image = F.pad(image, (0, 0) * (image.dim() - 1 - axis) + (before, after))
    return image.narrow(axis, offset + before, stride * (count - 1) + window).unfold(axis, window, stride)


def _behind(place: Place, field: Field) -> Place:
    """Return where windows lie once they are pulled through a field."""
    return Place(
        tuple(s * f for s, f in zip(place.stride, field.stride, strict=True)),
        tuple(o * f - p for o, f, p in zip(place.offset, field.stride, field.padding, strict=True)),
    )


def _stride(rows: Rows) -> tuple[int, ...] | None:
    return None if rows.place is None else rows.place.stride


def _union(left: Rows, right: Rows) -> Rows:
    """Add rows; windows of one stride are widened to the smallest window that holds both."""
    if left.place is None:
        return replace(left, nu=left.nu + right.nu)
    starts = [min(a, b) for a, b in zip(left.place.offset, right.place.offset, strict=True)]
    ends = [
        max(a + n, b + m)
        for a, n, b, m in zip(left.place.offset, left.nu.shape[2:], right.place.offset, right.nu.shape[2:], strict=True)
    ]
    widened = []
    for rows in (left, right):
        sides = [
            (offset - start, end - offset - n)
            for offset, n, start, end in zip(rows.place.offset, rows.nu.shape[2:], starts, ends, strict=True)
        ]
        widened.append(F.pad(rows.nu, [side for pair in reversed(sides) for side in pair]))
    return replace(
        left, nu=widened[0] + widened[1], place=Place(left.place.stride, tuple(starts)), clean=left.clean and right.clean
    )


def _fixed(factor: Tensor) -> bool:
    """Whether a factor may be judged by its numbers: one that is trained must keep its derivative, whatever they are."""
    return not factor.requires_grad


def _itself(nu: Tensor) -> Tensor:
    return nu
