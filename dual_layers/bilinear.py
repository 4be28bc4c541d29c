"""Products of two values that both depend on the input: element by element, of matrices, of tensors."""

from __future__ import annotations

import operator
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor

from dual_layers.arithmetic import DualScale
from dual_layers.contract import INPUT, UNKNOWN, Call, Choice, Interval, Offsets, RuleSample, Slopes, Slot, slots
from dual_layers.families import Affine, Composite, Relaxed
from dual_layers.matmul import DualContraction, DualMatmul
from dual_layers.registry import keys_of, register
from dual_layers.sample_values import wave

_ATEN = torch.ops.aten
_PLANES = "McCormick's planes; thesis, Theorem 3 (eq. 3.42), over the box"
_BOTH = (INPUT, Slot(1))
_ROUNDINGS = 16
"""Roundoffs that each term of a sum of products may cost."""


class Bilinear(Relaxed):
    """An operator that is linear in either of two perturbed values while the other one is held. Abstract.

        f(x - B, y - A)  =  f(x, y) - f(x, A) - f(B, y) + f(B, A)

    Its lines are the maps ``x -> f(x, A)`` and ``y -> f(B, y)``. So the slopes of a side are the tensors ``(A, B)``, shaped
    like ``y`` and ``x`` or broadcast: what the other factor is held at. What the lines leave is ``f`` over boxes moved by
    ``B`` and ``A``. With the boxes' centres these are symmetric about zero, and parallel lines cannot be closer.
    """

    affine: ClassVar[type[Affine]]
    """The rule of the same operator with one factor constant."""

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse all but two perturbed factors, in a call that would be affine in either of them."""
        count = len(slots(call.args) + slots(call.kwargs))
        if count != 2:
            return (
                "a product with constants is affine"
                if count < 2
                else f"a product of {count} perturbed values: take two at a time"
            )
        return cls.affine.refuse(_with_factors(call, INPUT, UNKNOWN)) or cls.affine.refuse(_with_factors(call, UNKNOWN, INPUT))

    @abstractmethod
    def enclose(self, x: Interval, y: Interval) -> Interval:
        """Enclose ``f(x, y)`` over two boxes, most tightly where both are symmetric about zero."""

    def slopes(self, bounds: tuple[Interval, ...], choice: Choice) -> Slopes:
        """Hold either factor at the centre of its box."""
        centers = self.centers(bounds)
        return Slopes(centers, centers)

    def conjugate(self, slopes: Slopes, bounds: tuple[Interval, ...]) -> Offsets:
        """Enclose what the lines leave."""
        below = self._rest(slopes.lower, bounds)
        above = below if slopes.parallel else self._rest(slopes.upper, bounds)
        return Offsets(below.lower, above.upper)

    def _rest(self, slopes: tuple[Tensor, ...], bounds: tuple[Interval, ...]) -> Interval:
        (x, y), (y_held, x_held) = self.factors(bounds), slopes
        rest, constant = self.enclose(_moved(x, x_held), _moved(y, y_held)), self.product(x_held, y_held)
        return ordered(rest.lower - constant, rest.upper - constant)

    def pull(self, nu: Tensor, slopes: Slopes, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Transpose the held maps; a tensor that is both factors gets the sum."""
        if slopes.parallel:
            return self._pulled(nu, slopes.lower, inputs)
        below, above = self._pulled(nu.clamp(min=0), slopes.lower, inputs), self._pulled(nu.clamp(max=0), slopes.upper, inputs)
        return tuple(map(torch.add, below, above))

    def _pulled(self, nu: Tensor, slopes: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        result: dict[int, Tensor] = {}
        for index, layer, value in zip(self.places, self._maps(slopes), self.factors(inputs), strict=True):
            (part,) = layer.transpose(nu, (value,))
            result[index] = result[index] + part if index in result else part
        return tuple(result[index] for index in sorted(result))

    def push(self, slopes: tuple[Tensor, ...], points: tuple[Tensor, ...]) -> Tensor:
        """Apply the held maps; the points may have a leading axis of rows."""
        first, second = self._maps(slopes)

        def apply(*values: Tensor) -> Tensor:
            x, y = self.factors(values)
            return first.linear(x) + second.linear(y)

        rows = max(point.ndim for point in points) > max(slope.ndim for slope in slopes)
        return torch.func.vmap(apply)(*points) if rows else apply(*points)

    @property
    def places(self) -> list[int]:
        """Which perturbed inputs the two factors are; it may be the same one twice."""
        return slots(self.call.args) + slots(self.call.kwargs)

    def factors(self, values: tuple[Any, ...]) -> tuple[Any, Any]:
        """Pick the two factors out of one value per perturbed input."""
        first, second = self.places
        return values[first], values[second]

    def centers(self, bounds: tuple[Interval, ...]) -> tuple[Tensor, Tensor]:
        """Return slopes: the centres of the boxes of ``y`` and ``x``, zero where a box has none."""
        x, y = self.factors(bounds)
        return known(y.center), known(x.center)

    def product(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute ``f(x, y)``."""
        return _with_factors(self.call, x, y)()

    def magnitude(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute ``|f|(x, y)``, the operator with absolute coefficients, for factors that are not negative."""
        return self.affine(_with_factors(self.call, INPUT, y)).magnitude(x)

    def _maps(self, slopes: tuple[Tensor, ...]) -> tuple[Affine, Affine]:
        """Return the layers of ``x -> f(x, A)`` and ``y -> f(B, y)``."""
        y_held, x_held = slopes
        return self.affine(_with_factors(self.call, INPUT, y_held)), self.affine(_with_factors(self.call, x_held, INPUT))


@register(*keys_of(DualScale), case=True)
class DualProduct(Bilinear):
    """Product, element by element, of two perturbed values. Source: McCormick's planes; thesis, Theorem 3 (eq. 3.42).

    Parallel lines hold both factors at the centres of their boxes and are ``2 r_x r_y`` apart. Two planes touch the
    product from below (or above) in opposite corners, at the same mean distance. Each line alone takes the one whose own
    minimum over the box is highest (maximum lowest): where a factor's sign is known, that is the product's own.

    Example:
        >>> x, y = (Interval(torch.tensor(low), torch.tensor(high)) for low, high in ((1.0, 3.0), (-1.0, 2.0)))
        >>> layer = DualProduct(Call(torch.mul, (INPUT, Slot(1))))
        >>> slopes = layer.slopes((x, y), "adaptive")  # below, both factors are held at their lower ends
        >>> [slope.item() for slope in slopes.lower], layer.conjugate(slopes, (x, y)).lower.item()
        ([-1.0, 1.0], 1.0)
    """

    source: ClassVar[str] = _PLANES
    affine: ClassVar[type[Affine]] = DualScale

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a square as well: it has tighter lines of its own."""
        return super().refuse(call) or ("a tensor times itself is a square" if _is_one_tensor(call) else None)

    def interval(self, *boxes: Interval) -> Interval:
        """Take the extremes over the corners: exact."""
        return self.enclose(*self.factors(boxes))

    def enclose(self, x: Interval, y: Interval) -> Interval:
        """Take the extremes over the corners: exact for any boxes."""
        corners = [times(a, b) for a in (x.lower, x.upper) for b in (y.lower, y.upper)]
        return ordered(reduce(torch.minimum, corners), reduce(torch.maximum, corners))

    def undecided(self, bounds: tuple[Interval, ...]) -> Tensor:
        """Tell where neither factor is a single number."""
        first, second = bounds
        return (first.lower != first.upper) & (second.lower != second.upper)

    def slopes(self, bounds: tuple[Interval, ...], choice: Choice) -> Slopes:
        """Hold the factors at the centres of their boxes; for each line alone at the better pair of corners."""
        (x, y), centers = self.factors(bounds), self.centers(bounds)
        if choice == "parallel":
            return Slopes(centers, centers)
        lower = _better((y.lower, x.lower), (y.upper, x.upper), centers, x, y, 1.0)
        upper = _better((y.lower, x.upper), (y.upper, x.lower), centers, x, y, -1.0)
        return Slopes(lower, upper)

    def alternatives(self, bounds: tuple[Interval, ...], cells: int) -> list[tuple[Tensor, ...]]:
        """Hold the factors at each pair of corners: McCormick's four planes, the product's convex hull."""
        x, y = self.factors(bounds)
        return [(known(y_held), known(x_held)) for y_held in (y.lower, y.upper) for x_held in (x.lower, x.upper)]

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings, broadcasting either way and both at once, factors in either order, and what is another case."""
        yield RuleSample("operator", Call(operator.mul, _BOTH), ((2, 3), (2, 3)))
        yield RuleSample("method", Call("mul", _BOTH), ((2, 3, 4), (2, 3, 4)), low=-1.0, high=3.0)
        yield RuleSample("broadcast both ways", Call(torch.mul, _BOTH), ((2, 1, 4), (2, 3, 1)))
        yield RuleSample("a factor without the leading axes", Call(torch.mul, (Slot(1), INPUT)), ((2, 3, 4), (4,)))
        yield RuleSample("a factor with more axes", Call(torch.multiply, _BOTH), ((3, 1), (2, 3, 4)), batch_axis=None)
        yield RuleSample("keywords", Call(torch.mul, (), {"input": Slot(1), "other": INPUT}), ((2, 3), (2, 3)))
        yield RuleSample("reflected", Call("__rmul__", _BOTH), ((2, 3), (2, 3)), low=0.5, high=2.0)
        yield RuleSample("aten", Call(_ATEN.mul.Tensor, _BOTH), ((2, 3), (2, 1)), low=-3.0, high=-1.0)
        wrong = Call(torch.mul, _BOTH)
        yield RuleSample("shapes differ", wrong, ((2, 3), (2, 4)), error=RuntimeError, message="must match the size")
        square = Call(torch.mul, (INPUT, INPUT))
        yield RuleSample("square", square, ((2, 3),), error=ValueError, message="itself is a square")
        constant = Call(torch.mul, (INPUT, wave(3)))
        yield RuleSample("constant factor", constant, ((2, 3),), error=ValueError, message="with constants is affine")
        written = Call(torch.mul, _BOTH, {"out": None})
        yield RuleSample("out", written, ((2, 3), (2, 3)), error=ValueError, message="arguments are not supported")


class Contraction(Bilinear):
    """A sum of products of elements of two perturbed values. Abstract.

    Lines hold both factors at the centres of their boxes, for either choice. Beyond them ``f`` lies within
    ``|f|(r_x, r_y)`` of zero, and reaches that where no two products share an element.
    """

    def interval(self, *boxes: Interval) -> Interval:
        """Pair the factors' elements by their signs.

        Where one of two elements has a known sign, the extremes of their product are products of ends that can be chosen
        for either element alone, so ``f`` adds them up: exact where no two products share an element. Pairs of unknown
        signs are enclosed by centre and radius, at worst half as wide again as they are. An operator with constants has
        coefficients with signs of their own: there everything is enclosed so.
        """
        x, y = self.factors(boxes)
        box = self.enclose(x, y) if _has_tensor((self.call.args, self.call.kwargs)) else self._paired(x, y)
        with torch.no_grad():  # the operator may add up in another order
            sizes = (torch.maximum(end.lower.abs(), end.upper.abs()) for end in (x, y))
            slack = _ROUNDINGS * torch.finfo(box.lower.dtype).eps * known(self.magnitude(*sizes))
        return ordered(box.lower - slack, box.upper + slack)

    def _paired(self, x: Interval, y: Interval) -> Interval:
        free = self._unbounded(x, y)
        x, y = _bounded(x), _bounded(y)
        mixed = self.enclose(_signs(x)[2], _signs(y)[2])
        lower, upper = mixed.lower - self._largest(Interval(-x.upper, -x.lower), y), mixed.upper + self._largest(x, y)
        return Interval(torch.where(free, -torch.inf, lower), torch.where(free, torch.inf, upper))

    def _largest(self, x: Interval, y: Interval) -> Tensor:
        """Add up the largest products of all pairs in which at least one sign is known."""
        (above, below, mixed), (high, low, _) = _signs(x), _signs(y)
        pairs = (
            (above.upper, y.upper.clamp(min=0)),
            (above.lower, y.upper.clamp(max=0)),
            (below.upper, y.lower.clamp(min=0)),
            (below.lower, y.lower.clamp(max=0)),
            (mixed.upper, high.upper),
            (mixed.lower, low.lower),
        )
        return reduce(torch.add, (self.product(*pair) for pair in pairs))

    def enclose(self, x: Interval, y: Interval) -> Interval:
        """Enclose by centre and radius: ``|f|(|c_x| + r_x, |c_y| + r_y) - |f|(|c_x|, |c_y|)`` about ``f(c_x, c_y)``."""
        free = self._unbounded(x, y)
        x, y = _bounded(x), _bounded(y)
        center, sizes = self.product(x.center, y.center), (x.center.abs(), y.center.abs())
        radius = self.magnitude(sizes[0] + x.radius, sizes[1] + y.radius) - self.magnitude(*sizes)
        return ordered(torch.where(free, -torch.inf, center - radius), torch.where(free, torch.inf, center + radius))

    def _unbounded(self, x: Interval, y: Interval) -> Tensor:
        """Tell which outputs add up a product of an infinite end and of something that may differ from zero."""
        free = tuple(~(box.lower.isfinite() & box.upper.isfinite()) for box in (x, y))
        if not any(bool(part.any()) for part in free):
            return torch.zeros((), dtype=torch.bool, device=x.lower.device)
        moving = tuple((box.lower != 0) | (box.upper != 0) for box in (x, y))
        pairs = (free[0], moving[1]), (moving[0], free[1])
        reached = [self.magnitude(first.to(x.lower.dtype), second.to(y.lower.dtype)) for first, second in pairs]
        return (reached[0] != 0) | (reached[1] != 0)


@register(*keys_of(DualMatmul), case=True)
class DualMatrixProduct(Contraction):
    """Matrix product of two perturbed values, such as queries and keys. Source: as the product, over sums of them."""

    source: ClassVar[str] = _PLANES
    affine: ClassVar[type[Affine]] = DualMatmul

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield vectors and matrices on either side, batches that broadcast, factors in either order, one as both factors."""
        yield RuleSample("operator", Call(operator.matmul, _BOTH), ((2, 2, 3), (2, 3, 2)))
        yield RuleSample("bmm", Call(torch.bmm, _BOTH), ((2, 2, 3), (2, 3, 2)), low=-1.0, high=3.0)
        yield RuleSample("factors swapped", Call("bmm", (Slot(1), INPUT)), ((2, 3, 2), (2, 2, 3)))
        yield RuleSample("batches broadcast", Call(torch.matmul, _BOTH), ((2, 1, 2, 3), (2, 2, 3, 1)))
        yield RuleSample("a factor without batch", Call("matmul", _BOTH), ((2, 2, 3), (3, 2)), low=-3.0, high=0.5)
        yield RuleSample("vector last", Call(torch.matmul, _BOTH), ((2, 2, 3), (3,)))
        yield RuleSample("vector first", Call(torch.matmul, _BOTH), ((3,), (2, 3, 2)), batch_axis=None)
        yield RuleSample("mm", Call(torch.mm, _BOTH), ((2, 3), (3, 2)))
        yield RuleSample("mv", Call("mv", _BOTH), ((2, 3), (3,)))
        yield RuleSample("dot", Call(torch.dot, _BOTH), ((3,), (3,)), batch_axis=None)
        yield RuleSample("aten", Call(_ATEN.matmul.default, _BOTH), ((2, 2, 3), (2, 3, 2)), low=0.5, high=2.0)
        yield RuleSample("a matrix times itself", Call(torch.matmul, (INPUT, INPUT)), ((2, 2, 2),), low=-2.0, high=3.0)
        wrong = Call(torch.mm, _BOTH)
        yield RuleSample("shapes differ", wrong, ((2, 3), (2, 4)), error=RuntimeError, message="cannot be multiplied")
        constant = Call(torch.mm, (INPUT, wave(3, 4)))
        yield RuleSample("constant factor", constant, ((2, 3),), error=ValueError, message="with constants is affine")


@register(torch.einsum, case=True)
class DualSquares(Composite):
    """Sum of squares written as ``einsum("bi,bi->b", x, x)``: the square, which is never negative, then a sum.

    Source: its definition.
    """

    @staticmethod
    def compose(equation: Any, first: Any, second: Any) -> Any:
        """Square, then sum."""
        term, output = equation.split("->")
        return torch.einsum(f"{term.split(',')[0]}->{output}", first.square())

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse all but one tensor, twice, under the same indices."""
        reason = super().refuse(call)
        if reason is not None:
            return reason
        equation = cls(call).arguments.equation
        terms = equation.replace(" ", "").split("->")[0].split(",") if isinstance(equation, str) and "->" in equation else ()
        squares = _is_one_tensor(call) and len(terms) == 2 and terms[0] == terms[1]
        return None if squares else "not one tensor twice under the same indices"

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield sums over some indices, and what is no square."""
        yield RuleSample("rows", Call(torch.einsum, ("bi,bi->b", INPUT, INPUT)), ((2, 3),))
        yield RuleSample("spaces, leading axes", Call(torch.einsum, ("...ij, ...ij -> ...j", INPUT, INPUT)), ((2, 3, 2),))
        cross = Call(torch.einsum, ("bi,bj->bij", INPUT, INPUT))
        yield RuleSample("other indices", cross, ((2, 3),), error=ValueError, message="not one tensor twice")


@register(*keys_of(DualContraction), case=True)
class DualTensorProduct(Contraction):
    """Contraction of two perturbed values, and of constants with them. Source: as the product, over sums of them."""

    source: ClassVar[str] = _PLANES
    affine: ClassVar[type[Affine]] = DualContraction

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield einsum in each of its forms, with a constant between the factors, and its relatives."""
        yield RuleSample("einsum", Call(torch.einsum, ("bid,bjd->bij", INPUT, Slot(1))), ((2, 3, 2), (2, 2, 2)))
        yield RuleSample("einsum, list", Call(torch.einsum, ("bij,bj->bi", [Slot(1), INPUT])), ((2, 2), (2, 3, 2)))
        yield RuleSample("einsum, indices", Call(torch.einsum, (INPUT, [0, 1], Slot(1), [0, 2], [0, 2, 1])), ((2, 3), (2, 2)))
        middle = Call(torch.einsum, ("bi,ij,bj->b", INPUT, wave(3, 2), Slot(1)))
        yield RuleSample("einsum, a constant between", middle, ((2, 3), (2, 2)))
        yield RuleSample("einsum, one tensor twice", Call(torch.einsum, ("bi,bj->bij", INPUT, INPUT)), ((2, 3),))
        yield RuleSample("aten einsum", Call(_ATEN.einsum.default, ("bi,bi->b", [INPUT, Slot(1)])), ((2, 3), (2, 3)), low=-1.0)
        contracted = Call(torch.tensordot, (INPUT, Slot(1), ([1, 2], [1, 0])))
        yield RuleSample("tensordot", contracted, ((2, 3, 2), (2, 3, 4)), batch_axis=None)
        yield RuleSample("inner", Call(torch.inner, _BOTH), ((2, 3), (4, 3)))
        yield RuleSample("outer", Call("outer", _BOTH), ((2,), (3,)))
        yield RuleSample("vecdot", Call(torch.linalg.vecdot, _BOTH, {"dim": 1}), ((2, 3, 2), (2, 3, 2)))
        three = Call(torch.einsum, ("bi,bi,bi->b", INPUT, Slot(1), INPUT))
        yield RuleSample("three factors", three, ((2, 3), (2, 3)), error=ValueError, message="two at a time")


@register(*keys_of(DualScale), case=True)
class DualTimesItself(Composite):
    """A tensor times itself: its square. Source: its definition."""

    @staticmethod
    def compose(input: Any, other: Any) -> Any:
        """Square."""
        return torch.square(input)

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse two different factors."""
        return super().refuse(call) or (None if _is_one_tensor(call) else "not a tensor times itself")

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield two spellings, and two tensors."""
        yield RuleSample("operator", Call(operator.mul, (INPUT, INPUT)), ((2, 3),))
        yield RuleSample("method", Call("mul", (INPUT,), {"other": INPUT}), ((2, 3, 2),))
        yield RuleSample(
            "two tensors", Call(torch.mul, _BOTH), ((2, 3), (2, 3)), error=ValueError, message="not a tensor times"
        )


def _with_factors(call: Call, first: Any, second: Any) -> Call:
    """Put two values in the places of a call's two perturbed arguments, in order of appearance."""
    remaining = iter((first, second))

    def place(value: Any) -> Any:
        if isinstance(value, Slot):
            return next(remaining)
        if isinstance(value, Mapping):
            return {key: place(item) for key, item in value.items()}
        return type(value)(place(item) for item in value) if type(value) in (tuple, list) else value

    return replace(call, args=place(call.args), kwargs=place(call.kwargs))


def _is_one_tensor(call: Call) -> bool:
    """Whether both perturbed arguments are the same one."""
    found = slots(call.args) + slots(call.kwargs)
    return len(found) == 2 and found[0] == found[1]


def _has_tensor(value: Any) -> bool:
    """Whether nested arguments hold a constant tensor."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return any(map(_has_tensor, value)) if isinstance(value, (tuple, list)) else isinstance(value, Tensor)


def times(a: Tensor, b: Tensor) -> Tensor:
    """Multiply, with ``0 * inf = 0``: what is exactly zero ignores an unbounded end."""
    return torch.where((b == 0) & a.isinf(), 0.0, a) * torch.where((a == 0) & b.isinf(), 0.0, b)


def known(value: Tensor) -> Tensor:
    """Put zero for what is no number."""
    return value.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def box_of(value: Any, boxes: tuple[Interval, ...]) -> Interval:
    """Return the box of an argument; of a constant, that constant."""
    if isinstance(value, Slot):
        return boxes[value.index]
    constant = torch.as_tensor(value, dtype=boxes[0].lower.dtype, device=boxes[0].lower.device)
    return Interval(constant, constant)


def _moved(box: Interval, by: Tensor) -> Interval:
    return Interval(box.lower - by, box.upper - by)


def _bounded(box: Interval) -> Interval:
    """Put zero for boxes without an end."""
    bounded = box.lower.isfinite() & box.upper.isfinite()
    return Interval(torch.where(bounded, box.lower, 0.0), torch.where(bounded, box.upper, 0.0))


def ordered(lower: Tensor, upper: Tensor) -> Interval:
    """Make two ends a box: NaN says nothing, and a lower end beyond all numbers is only known to exceed the largest."""
    largest = torch.finfo(lower.dtype).max
    lower = lower.nan_to_num(nan=-torch.inf, posinf=largest, neginf=-torch.inf)
    return Interval(lower, upper.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-largest))


def _signs(box: Interval) -> tuple[Interval, Interval, Interval]:
    """Split a box in the elements that are never negative, the others that are never positive, and the rest; zero elsewhere."""
    above, below = box.lower >= 0, (box.upper <= 0) & (box.lower < 0)
    parts = (above, below, ~(above | below))
    above_, below_, rest = (Interval(torch.where(part, box.lower, 0.0), torch.where(part, box.upper, 0.0)) for part in parts)
    return above_, below_, rest


def _better(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    tied: tuple[Tensor, Tensor],
    x: Interval,
    y: Interval,
    side: float,
) -> tuple[Tensor, Tensor]:
    """Choose between two planes, each given by what it holds ``y`` and ``x`` at; the choice itself has no derivative.

    The plane ``A x + B y - A B`` is to have the highest minimum over the box (``side`` 1) or the lowest maximum (-1).
    """

    @torch.no_grad()
    def height(plane: tuple[Tensor, Tensor]) -> Tensor:
        (y_held, x_held), total = plane, -side * times(*plane)
        for held, box in ((y_held, x), (x_held, y)):
            total = total + torch.minimum(times(side * held, box.lower), times(side * held, box.upper))
        return total.nan_to_num(nan=-torch.inf)

    one, two = height(first), height(second)
    chosen = (torch.where(one > two, a, torch.where(two > one, b, c)) for a, b, c in zip(first, second, tied, strict=True))
    y_held, x_held = map(known, chosen)
    return y_held, x_held
