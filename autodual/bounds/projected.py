"""Random projections in one stream (thesis, section 3.4.5): radii of all nodes at the cost of some forward passes.

A node is ``z0 + shift + sum of symbols`` (``forward.py``), so its radius is a norm of the symbols' directions: the l_1 norm
over every relaxed element before it and over the inputs of a box, the l_2 norm over the inputs of a Euclidean ball. Stable
variables turn norms into scales, so *one* set of r vectors carries them all: it sets out as noise of the region's size, goes
through every affine map and every slope, and at each relaxed node fresh Cauchy noise of that node's spread is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from functools import partial
from hashlib import blake2b

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from autodual.bounds.backward import Deviation, backward
from autodual.bounds.forward import Entry, ForwardWalk, Shifts
from autodual.bounds.relaxed_rows import NoisyRows
from autodual.bounds.run import Run
from autodual.estimators import AbsoluteSum, Reduction, Sampling, cauchy_reading, normal_reading
from autodual.methods import Projected
from autodual.regions.base import CAUCHY, NORMAL

_BLOCK = 16
"""Rows that share one generator."""

HEAVY = ":heavy"
"""Key of the symbols that are walked as they are; no node's name has a colon."""

_SIGNS = 8
"""Rows of random signs by which symbols are weighed."""

_CHUNK = 2**21
"""Bytes of one node's rows that are walked together: what stays in a core's own cache, and in the heap without page faults."""


class NoiseSource:
    """Independent stable variables for every node, which depend on seed, stage, node and row only: no batch changes them.

    Args:
        run: gives nodes their numbers, shapes and dtypes.
        r: how many rows there are.
        seed: of all random numbers.
        stage: draws of different stages are independent.
        precise: draw in double precision, whatever the network computes in, so that no magnitude is 0.
    """

    def __init__(self, run: Run, r: int, seed: int, stage: int, *, precise: bool) -> None:
        self.run, self.r, self.seed, self.stage, self.precise = run, r, seed, stage, precise
        self.number = {name: index for index, name in enumerate(run.order)}
        self._last: dict[str, tuple[int, Tensor]] = {}

    def rows(self, name: str, kind: str, start: int, stop: int) -> Float[Tensor, "rows 1 features"]:
        """Draw rows ``start`` to ``stop`` of a node's noise."""
        first = start - start % _BLOCK
        blocks = [self._block(name, kind, block) for block in range(first, stop, _BLOCK)]
        drawn = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return drawn[start - first : stop - first, None]

    def _block(self, name: str, kind: str, block: int) -> Tensor:
        """Return a block, drawn at most once while its rows are asked for one after the other."""
        if self._last.get(name, (None,))[0] != block:
            self._last[name] = block, self._draw(name, kind, block)
        return self._last[name][1]

    def _draw(self, name: str, kind: str, block: int) -> Tensor:
        like = self.run.values[name]
        key, shape = (self.seed, self.stage, self.number[name], block), (min(_BLOCK, self.r - block), self.run.features(name))
        dtype = torch.float64 if self.precise or like.dtype == torch.float64 else torch.float32
        if like.device.type == "cpu":
            numbers = np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))
            if kind == NORMAL:
                return torch.from_numpy(numbers.standard_normal(shape, dtype=_NUMPY[dtype])).to(like.dtype)
            uniform = torch.from_numpy(numbers.random(shape, dtype=_NUMPY[dtype]))
        else:
            digest = blake2b(repr(key).encode(), digest_size=7).digest()
            generator = torch.Generator(like.device).manual_seed(int.from_bytes(digest, "big"))
            draw = torch.randn if kind == NORMAL else torch.rand
            uniform = draw(shape, generator=generator, dtype=dtype, device=like.device)
            if kind == NORMAL:
                return uniform.to(like.dtype)
        return uniform.sub_(0.5).mul_(math.pi).tan_().to(like.dtype)


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}


class Stream(ForwardWalk):
    """Rows ``start`` to ``stop`` of the random vectors, under one key for all Cauchy noise and one for each normal source.

    Norms over Cauchy noise add up: those of two boxes, and of every relaxed node. The l_2 norms of two balls do not.

    Args:
        run: the run.
        noise: where random numbers come from.
        start: first row.
        stop: one past the last.
        heavy: symbols that are left out, because they are walked as they are.
        asked: as for ``ForwardWalk``.
        separate: give every source and every relaxed node a stream of its own, as Algorithm 3 does, under its own key.
    """

    def __init__(
        self,
        run: Run,
        noise: NoiseSource,
        start: int,
        stop: int,
        heavy: Heavy | None = None,
        *,
        asked: Collection[str] = (),
        separate: bool = False,
    ) -> None:
        super().__init__(run, asked)
        self.noise, self.span, self.heavy, self.separate = noise, (start, stop), heavy, separate

    def start(self, source: str) -> Entry:
        """Return noise of the region's size: one for all examples where their regions have one size."""
        run = self.run
        noise, value = run.regions[source].noise(run.given[source]), run.values[source]
        drawn = self.noise.rows(source, noise.kind, *self.span)
        scale, heavy = noise.scale.to(value), self.heavy is not None and noise.kind == CAUCHY
        if scale.numel() == 1 and not heavy:
            return {self._key(noise.kind, source): run.node(source, drawn * scale.reshape(()), lead=1)}
        scale = run.examples(source, scale.expand_as(value))
        scale = self.heavy.light(source, scale) if heavy else scale
        return {self._key(noise.kind, source): run.node(source, drawn * scale, lead=1)}

    def fresh(self, name: str) -> Entry:
        """Return Cauchy noise as wide as half the gap between the lines."""
        drawn = self.noise.rows(name, CAUCHY, *self.span) * self._spread(name)
        return {self._key(CAUCHY, name): self.run.node(name, drawn, lead=1)}

    def _through_and_fresh(self, name: str) -> Entry:
        run, lines, key = self.run, self.run.lines[name], self._key(CAUCHY, name)
        arriving = dict(self._arriving(name))
        if arriving.keys() != {key} or lines.sloping is not None or not self._is_plain(name):
            return super()._through_and_fresh(name)
        rows, slope = run.examples(name, arriving[key][0], lead=1), run.examples(name, lines.slopes.lower[0])
        noise = self.noise.rows(name, CAUCHY, *self.span)
        return {key: run.node(name, NoisyRows.apply(rows, slope, noise, self._spread(name)), lead=1)}

    def _spread(self, name: str) -> Float[Tensor, "batch features"]:
        spread = self.run.examples(name, self.run.lines[name].spread)
        return spread if self.heavy is None else self.heavy.light(name, spread)

    def _key(self, kind: str, owner: str) -> str:
        return stream_key(kind, owner, separate=self.separate)


def stream_key(kind: str, owner: str, *, separate: bool) -> str:
    """Name the stream that an owner's noise goes into."""
    return kind if kind == CAUCHY and not separate else f"{kind}:{owner}"


class Heavy:
    """The symbols that weigh most at a node, example by example: to be walked exactly, while noise carries the rest.

    How much a symbol weighs is guessed by a backward walk of a few rows of random signs. The guess chooses, it proves nothing;
    since it has random numbers of its own, the noise that is drawn afterwards does not depend on it.

    Args:
        run: the run; relaxed ancestors of the node have their lines.
        name: the node.
        count: how many symbols per example.
        key: of the random signs.
    """

    def __init__(self, run: Run, name: str, count: int, key: tuple[int, ...]) -> None:
        self.run = run
        scores = self._scores(name, key)
        self.offsets, self.total = {}, 0
        for owner, score in scores.items():
            self.offsets[owner], self.total = self.total, self.total + score.shape[1]
        self.count = min(count, self.total)
        every = torch.cat(list(scores.values()), 1) if scores else run.given[run.program.sources[0]].new_zeros(run.batch, 0)
        self.chosen = every.topk(self.count, dim=1).indices

    def _scores(self, name: str, key: tuple[int, ...]) -> dict[str, Float[Tensor, "batch features"]]:
        run, arrived, value = self.run, {}, self.run.values[name]
        drawn = np.random.Generator(np.random.SFC64(np.random.SeedSequence(key))).integers(2, size=(_SIGNS, run.features(name)))
        signs = torch.from_numpy(2.0 * drawn - 1).to(value)[:, None].expand(-1, run.batch, -1)
        with torch.no_grad():
            backward(run, name, run.node(name, signs, lead=1), arrived=arrived)
            sizes = {owner: self._size(owner) for owner in arrived if owner != name}
            return {
                owner: (run.examples(owner, run.expand(owner, arrived[owner]), lead=1).abs().mean(0) * size).nan_to_num()
                for owner, size in sizes.items()
                if size is not None
            }

    def _size(self, owner: str) -> Float[Tensor, "batch features"] | None:
        """Return the size of an owner's symbols, None for normal noise, whose norm does not add up."""
        run = self.run
        if owner in run.lines:
            return run.examples(owner, run.lines[owner].spread)
        noise = run.regions[owner].noise(run.given[owner])
        return (
            run.examples(owner, noise.scale.to(run.values[owner]).expand_as(run.values[owner]))
            if noise.kind == CAUCHY
            else None
        )

    def light(self, owner: str, size: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        """Return the sizes of an owner's symbols with those that were chosen left out."""
        own = self._places(owner, size.shape[1])
        return (
            size if own is None else size.masked_fill(torch.zeros_like(size).scatter_add(1, own[0], own[1].to(size)) > 0, 0.0)
        )

    def rows(self, owner: str, start: int, stop: int) -> Float[Tensor, "rows batch features"] | None:
        """Return the chosen symbols ``start`` to ``stop`` of each example; zero where one is another owner's."""
        size = self._size(owner)
        own = None if size is None else self._places(owner, size.shape[1], start, stop)
        if own is None:
            return None
        places, is_own = own
        sizes = torch.where(is_own, size.gather(1, places), 0.0)
        rows = size.new_zeros(self.run.batch, places.shape[1], size.shape[1])
        return rows.scatter(2, places[..., None], sizes[..., None]).movedim(1, 0)

    def _places(self, owner: str, width: int, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor] | None:
        """Return the chosen symbols' places among an owner's, and which of them are its own."""
        if owner not in self.offsets:
            return None
        places = self.chosen[:, start:stop] - self.offsets[owner]
        is_own = (places >= 0) & (places < width)
        return places.clamp(0, width - 1), is_own


class HeavyColumns(ForwardWalk):
    """The chosen symbols, each on its own, from ``start`` to ``stop``."""

    def __init__(self, run: Run, heavy: Heavy, start: int, stop: int) -> None:
        super().__init__(run)
        self.heavy, self.span = heavy, (start, stop)

    def start(self, source: str) -> Entry:
        """Return the source's own symbols."""
        return self.fresh(source)

    def fresh(self, name: str) -> Entry:
        """Return the node's own symbols."""
        rows = self.heavy.rows(name, *self.span)
        return {} if rows is None else {HEAVY: self.run.node(name, rows, lead=1)}


class Projections:
    """Bounds of nodes from random projections.

    Args:
        run: the run.
        method: its options.
        target: the node that is to be bounded in the end.
        estimated: nodes that will be asked for: delta is divided among all their elements.
        fresh: draw anew for every node, so that the slopes before it do not depend on the draws; by default for certificates.
            Without, and unless ``at_once`` is set, one stream is carried on from node to node.
        separate: as for ``Stream``.
    """

    def __init__(
        self, run: Run, method: Projected, estimated: tuple[str, ...], *, fresh: bool | None = None, separate: bool = False
    ) -> None:
        self.run, self.method, self.estimated, self.separate = run, method, estimated, separate
        self.fresh = method.bounding if fresh is None else fresh
        self.seed = int(torch.randint(2**62, ())) if method.seed is None else method.seed
        self.estimates = sum(run.features(name) * len(self.keys(name)) for name in estimated if not self.knows(name))
        self.shifts = Shifts(run, estimated)
        self._kept: list[Stream] | None = None

    @property
    def sampling(self) -> Sampling:
        """What the random numbers are, for the report."""
        method = self.method
        delta = method.delta if method.bounding else None
        return Sampling(method.r, self.seed, method.estimator, self.estimates, delta, method.examples)

    @property
    def share(self) -> float:
        """The probability with which one estimate may fail."""
        return self.method.delta / (self.method.examples * max(self.estimates, 1))

    def knows(self, name: str) -> bool:
        """Whether a node lies in a Euclidean ball's first affine segment, where nothing need be estimated."""
        return self.method.first_exact and first_segment(self.run, name) is not None

    def walks_back(self, rows: int) -> bool:
        """Whether this many rows of the specification are walked back exactly; a certificate's always are."""
        return self.method.bounding or (self.method.last_exact and rows <= self.method.r)

    def bounds(self, name: str, columns: Int[Tensor, " columns"] | None = None) -> tuple[Tensor, Tensor]:
        """Bound a node's elements: lower and upper, each ``[batch, columns]``; all elements by default."""
        run = self.run
        middle = run.examples(name, run.values[name] + self.shifts.shift(name))
        self.shifts.release(name)
        middle = middle if columns is None else middle[:, columns]
        radius = self._euclidean(name, columns) if self.method.first_exact else None
        if radius is None:
            radius = self.radius(name, lambda rows: rows if columns is None else rows[..., columns])
        return middle - radius, middle + radius

    def row_bounds(self, name: str, rows: Float[Tensor, "batch rows features"]) -> Deviation:
        """Estimate how far linear functions of a node deviate from their reference value; rounding is the least error here."""
        batch = self.run.batch
        rows = rows.expand(batch, -1, -1)

        def contract(vectors: Tensor) -> Tensor:
            return torch.einsum("vbf,brf->vbr", vectors.expand(-1, batch, -1), rows)

        shift = contract(self.run.examples(name, self.shifts.shift(name))[None])[0]
        radius = self.radius(name, contract)
        return Deviation((shift - radius).T, (shift + radius).T, None)

    def radius(self, name: str, select: Callable[[Tensor], Tensor]) -> Tensor:
        """Read a node's radius off the samples that arrive there.

        Args:
            name: the node.
            select: what to read of them: from ``[rows, batch or 1, features]`` to ``[rows, batch or 1, ...]``.
        """
        readings: dict[str, tuple[Reduction, float]] = {}

        def read(sample: Entry) -> Entry:
            for key in sample.keys() - readings.keys():
                readings[key] = self._reading(key)
            return {key: readings[key][0].digest(select(self.run.examples(name, rows, lead=1))) for key, rows in sample.items()}

        for digested in self._samples(name, read):
            for key, part in digested.items():
                readings[key][0].add(part)
        return sum(factor * reduction.value() for reduction, factor in readings.values())

    def _samples(self, name: str, read: Callable[[Entry], Entry]) -> Iterator[Entry]:
        """Yield what is read of the vectors that arrive at a node, some rows at a time."""
        if not self.fresh and self.method.at_once is None:
            if self._kept is None:
                noise = self._noise(0)
                self._kept = [self._stream(noise, *span, asked=self.estimated) for span in self._spans()]
            for stream in self._kept:
                yield read(stream.reach(name))
                stream.release(name)
            return
        for walk in self._walks(name):
            if torch.is_grad_enabled():
                self.run.settle()  # what is recomputed must find the same cached values as the first time
                yield checkpoint(lambda walk=walk: read(walk().reach(name)), use_reentrant=False)
            else:
                yield read(walk().reach(name))

    def _walks(self, name: str) -> Iterator[Callable[[], ForwardWalk]]:
        """Yield the walks that a node's radius takes: the heaviest symbols themselves, and projections of the others."""
        stage = 1 + self.run.order.index(name) if self.fresh else 0  # the node decides, whatever was asked for before
        noise, heavy = self._noise(stage), None
        if self.fresh and self.method.columns:
            heavy = Heavy(self.run, name, self.method.columns, (self.seed, stage, len(self.run.order)))
            yield from (partial(HeavyColumns, self.run, heavy, *span) for span in self._spans(heavy.count))
        yield from (partial(self._stream, noise, *span, heavy) for span in self._spans())

    def _reading(self, key: str) -> tuple[Reduction, float]:
        if key == HEAVY:
            return AbsoluteSum(), 1.0
        reading = cauchy_reading if key.startswith(CAUCHY) else normal_reading
        return reading(self.method.estimator, self.method.r, self.share)

    def _noise(self, stage: int) -> NoiseSource:
        return NoiseSource(self.run, self.method.r, self.seed, stage, precise=self.method.bounding)

    def _stream(
        self, noise: NoiseSource, start: int, stop: int, heavy: Heavy | None = None, asked: Collection[str] = ()
    ) -> Stream:
        return Stream(self.run, noise, start, stop, heavy, asked=asked, separate=self.separate)

    def _spans(self, rows: int | None = None) -> Iterator[tuple[int, int]]:
        """Split rows, the projections by default: by what the user asked for, else by what fits the cache."""
        r, size = self.method.r if rows is None else rows, self.method.at_once
        if size is None and torch.is_grad_enabled():
            size = max(r, 1)
        if size is None:
            widest = max(self.run.values[name].numel() * self.run.values[name].element_size() for name in self.run.order)
            size = max(1, _CHUNK // widest)
        return ((start, min(start + size, r)) for start in range(0, r, size))

    def keys(self, name: str) -> set[str]:
        """Collect the streams that a node reads: a norm is estimated from each."""
        run, ancestors = self.run, self.run.needed(name)
        kinds = {each: run.regions[each].noise(run.given[each]).kind for each in run.program.sources if each in ancestors}
        kinds |= {each: CAUCHY for each in run.program.relaxed if each in ancestors}
        return {stream_key(kind, each, separate=self.separate) for each, kind in kinds.items()}

    def _euclidean(self, name: str, columns: Tensor | None) -> Tensor | None:
        """Return the exact radius of a node in the first affine segment behind a Euclidean ball, None where it is unknown."""
        lengths = first_segment(self.run, name)
        if lengths is None:
            return None
        lengths = self.run.examples(name, lengths)
        return lengths if columns is None else lengths[:, columns]


def first_segment(run: Run, name: str) -> Tensor | None:
    """Return the l_2 norm of each row of the map from a Euclidean ball to a node behind at most one affine map, times eps."""
    if name not in run.exact_intervals or any(
        run.regions[source].noise(run.given[source]).kind != NORMAL
        for source in run.program.sources
        if source in run.needed(name)
    ):
        return None
    if name in run.program.sources:
        return run.regions[name].noise(run.given[name]).scale.expand_as(run.values[name])
    (parent,) = run.program.parents[name]
    before, layer = first_segment(run, parent), run.layers[name]
    if before is None:
        return None
    if layer.facts.injective or layer.facts.elementwise or layer.facts.selection:
        return layer.absolute(before)
    return layer.euclidean(before)
