"""Sums and differences of values, and products and quotients with constants."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from dual_layers.contract import INPUT, Call, Facts, RuleSample, Slot
from dual_layers.families import Affine
from dual_layers.linear import Homogeneous
from dual_layers.refusals import named_arguments, unless_one_factor
from dual_layers.registry import register
from dual_layers.sample_values import wave

_ATEN = torch.ops.aten


def reduce_to(nu: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Transpose broadcasting: sum rows ``[rows, *broadcast shape]`` to ``[rows, *shape]``; axes of size 1 stay as they are."""
    extra = nu.dim() - 1 - len(shape)
    if extra:
        nu = nu.sum(dim=tuple(range(1, 1 + extra)))
    stretched = tuple(axis for axis, n in enumerate(shape, start=1) if n == 1 and nu.shape[axis] != 1)
    return nu.sum(dim=stretched, keepdim=True) if stretched else nu


def absolute(value: Any) -> Any:
    """Return the absolute value of a number or a tensor; a mask of booleans is its own."""
    return value if isinstance(value, Tensor) and value.dtype == torch.bool else abs(value)


class Combination(Affine, ABC):
    """``a * input + b * other`` with numbers ``a`` and ``b``; either or both operands may depend on the input."""

    facts: ClassVar[Facts] = Facts(affine=True, elementwise=True)
    source: ClassVar[str] = "design, section 1: a node's nu is the sum over its consumers"

    @staticmethod
    def parameters(input: Any, other: Any, *, alpha: Any = 1) -> dict[str, Any]:
        """Name the arguments of ``torch.add``; a positional ``alpha`` is another, deprecated, signature."""
        return {"input": input, "other": other, "alpha": alpha}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse arguments that are not known by name."""
        arguments = named_arguments(cls, call)
        return arguments if isinstance(arguments, str) else None

    @staticmethod
    @abstractmethod
    def weights(alpha: float) -> tuple[float, float]:
        """Return ``a`` and ``b``."""

    def coefficients(self) -> dict[int, float]:
        """Return the coefficient of each perturbed input; one that occurs twice has their sum."""
        arguments = self.arguments
        result: dict[int, float] = {}
        for value, weight in zip((arguments.input, arguments.other), self.weights(arguments.alpha), strict=True):
            if isinstance(value, Slot):
                result[value.index] = result.get(value.index, 0) + weight
        return result

    def _combine(self, coefficients: dict[int, float], values: tuple[Tensor, ...]) -> Tensor:
        total = sum(coefficient * values[index] for index, coefficient in coefficients.items())
        constants = [v.shape for v in (self.arguments.input, self.arguments.other) if isinstance(v, Tensor)]
        return total.expand(torch.broadcast_shapes(total.shape, *constants))

    def linear(self, *tangents: Tensor) -> Tensor:
        """Combine the tangents."""
        return self._combine(self.coefficients(), tangents)

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Hand every operand its share of ``nu``, summed where it was broadcast."""
        shares = [(c, inputs[index]) for index, c in sorted(self.coefficients().items())]
        return tuple(reduce_to(nu if c == 1 else c * nu, z.shape).to(z.dtype) for c, z in shares)

    def magnitude(self, *radii: Tensor) -> Tensor:
        """Combine with absolute coefficients."""
        return self._combine({index: abs(c) for index, c in self.coefficients().items()}, radii)


def _combination_samples(function: Any, method: Any, symbol: Any) -> Iterator[RuleSample]:
    """Yield what addition and subtraction have in common."""
    both = (INPUT, Slot(1))
    yield RuleSample("constant, numbers", Call(symbol, (INPUT, 2)), ((2, 3),))
    yield RuleSample("constant widens the input", Call(function, (wave(4, 3), INPUT), {"alpha": 3}), ((2, 1, 3),))
    yield RuleSample("constant is widened", Call(method, (INPUT, wave(3, 1)), {"alpha": -2}), ((2, 3, 4),))
    yield RuleSample("two inputs", Call(function, both, {"alpha": -0.5}), ((2, 3), (2, 3)))
    yield RuleSample("two inputs that broadcast", Call(symbol, both), ((2, 1, 4), (2, 3, 1)))
    yield RuleSample("an input without the leading axes", Call(symbol, both), ((2, 3, 4), (4,)))
    yield RuleSample("the same input twice", Call(function, (INPUT, INPUT), {"alpha": 2}), ((2, 3),))
    wrong = Call(symbol, both)
    yield RuleSample("shapes differ", wrong, ((2, 3), (2, 4)), error=RuntimeError, message="must match the size")


@register(operator.add, torch.add, "add", "__add__", "__radd__", _ATEN.add.Tensor, _ATEN.add.Scalar)
class DualAdd(Combination):
    """Sum ``input + alpha * other``. Source: design, section 1."""

    @staticmethod
    def weights(alpha: float) -> tuple[float, float]:
        """Return ``(1, alpha)``."""
        return 1, alpha

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield constants and inputs on either side, broadcasting, alpha, and an input added to itself."""
        yield from _combination_samples(torch.add, "add", operator.add)
        yield RuleSample("number first", Call(operator.add, (1.5, INPUT)), ((2, 3),))
        yield RuleSample("reflected", Call("__radd__", (INPUT, 2)), ((2, 3),))
        yield RuleSample("aten", Call(_ATEN.add.Tensor, (INPUT, wave(3)), {"alpha": 2}), ((2, 3),))
        deprecated = Call(torch.add, (INPUT, 2, wave(3)))
        yield RuleSample("positional alpha", deprecated, ((2, 3),), error=ValueError, message="takes 2 positional arguments")


@register(
    operator.sub, torch.sub, torch.subtract, "sub", "subtract", "__sub__",
    _ATEN.sub.Tensor, _ATEN.sub.Scalar, _ATEN.subtract.Tensor, _ATEN.subtract.Scalar,
)  # fmt: skip
class DualSubtract(Combination):
    """Difference ``input - alpha * other``. Source: design, section 1."""

    @staticmethod
    def weights(alpha: float) -> tuple[float, float]:
        """Return ``(1, -alpha)``."""
        return 1, -alpha

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield constants and inputs on either side, broadcasting, alpha, and an input minus itself."""
        yield from _combination_samples(torch.sub, "sub", operator.sub)
        yield RuleSample("number first", Call(operator.sub, (1.5, INPUT)), ((2, 3),))
        yield RuleSample("an input minus itself", Call(operator.sub, (INPUT, INPUT)), ((2, 3),))
        yield RuleSample("aten", Call(_ATEN.sub.Tensor, (wave(3), INPUT), {"alpha": 2}), ((2, 3),))


@register(torch.rsub, "__rsub__", _ATEN.rsub.Tensor, _ATEN.rsub.Scalar)
class DualReversedSubtract(Combination):
    """Difference the other way round, ``other - alpha * input``. Source: design, section 1."""

    @staticmethod
    def weights(alpha: float) -> tuple[float, float]:
        """Return ``(-alpha, 1)``."""
        return -alpha, 1

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield constants and inputs on either side, broadcasting, alpha, and an input minus itself."""
        yield from _combination_samples(torch.rsub, torch.rsub, "__rsub__")
        yield RuleSample("aten", Call(_ATEN.rsub.Scalar, (INPUT, 2)), ((2, 3),))


@register(operator.neg, torch.neg, torch.negative, "neg", "negative", "__neg__", _ATEN.neg.default)
class DualNegate(Homogeneous):
    """Minus the input. Source: design, section 1."""

    facts: ClassVar[Facts] = Facts(affine=True, positionwise=True, injective=True)
    source: ClassVar[str] = "design, section 1"

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Negate."""
        return (-nu,)

    def magnitude(self, *radii: Tensor) -> Tensor:
        """Keep the radius."""
        return radii[0]

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield the spellings."""
        yield RuleSample("operator", Call(operator.neg), ((2, 3),))
        yield RuleSample("method", Call("neg"), ((2, 3, 2),))


class Scaling(Homogeneous, ABC):
    """Product or quotient of the input with a constant number or tensor."""

    facts: ClassVar[Facts] = Facts(affine=True, elementwise=True)
    source: ClassVar[str] = "design, section 1"

    @abstractmethod
    def scale(self, z: Tensor, factor: Any) -> Tensor:
        """Scale ``z``, broadcasting."""

    @property
    def factor(self) -> Any:
        """The constant operand."""
        return self.arguments.other if isinstance(self.arguments.input, Slot) else self.arguments.input

    def transpose(self, nu: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Scale ``nu`` and sum it where the input was broadcast."""
        return (reduce_to(self.scale(nu, self.factor), inputs[0].shape).to(inputs[0].dtype),)

    def magnitude(self, *radii: Tensor) -> Tensor:
        """Scale by the absolute constant."""
        return self.scale(radii[0], absolute(self.factor))


def _scaling_samples(function: Any, method: Any, symbol: Any) -> Iterator[RuleSample]:
    """Yield what products and quotients have in common."""
    yield RuleSample("number", Call(symbol, (INPUT, -2)), ((2, 3),))
    yield RuleSample("tensor", Call(function, (INPUT, wave(3))), ((2, 3),))
    yield RuleSample("constant widens the input", Call(method, (INPUT, wave(4, 3))), ((2, 1, 3),))
    yield RuleSample("constant is widened", Call(symbol, (INPUT, wave(3, 1))), ((2, 3, 4),))
    yield RuleSample("integer tensor", Call(function, (INPUT, torch.tensor([-1, 2, 3]))), ((2, 3),))
    wrong = Call(symbol, (INPUT, wave(4)))
    yield RuleSample("shapes differ", wrong, ((2, 3),), error=RuntimeError, message="must match the size")


@register(
    operator.mul, torch.mul, torch.multiply, "mul", "multiply", "__mul__", "__rmul__",
    _ATEN.mul.Tensor, _ATEN.mul.Scalar, _ATEN.multiply.Tensor, _ATEN.multiply.Scalar,
)  # fmt: skip
class DualScale(Scaling):
    """Product with a constant, which may stand on either side. Source: design, section 1."""

    @staticmethod
    def parameters(input: Any, other: Any) -> dict[str, Any]:
        """Name the arguments of ``torch.mul``."""
        return {"input": input, "other": other}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a product of perturbed values."""
        arguments = named_arguments(cls, call)
        return arguments if isinstance(arguments, str) else unless_one_factor(call)

    def scale(self, z: Tensor, factor: Any) -> Tensor:
        """Multiply."""
        return z * factor

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield constants on either side, broadcasting, integers and a mask."""
        yield from _scaling_samples(torch.mul, "mul", operator.mul)
        yield RuleSample("number first", Call(operator.mul, (-1.5, INPUT)), ((2, 3),))
        yield RuleSample("tensor first", Call(torch.mul, (wave(4, 1, 3), INPUT)), ((2, 3),), batch_axis=None)
        yield RuleSample("mask", Call(operator.mul, (INPUT, torch.tensor([True, False, True]))), ((2, 3),))
        yield RuleSample("aten", Call(_ATEN.mul.Tensor, (INPUT, 2.5)), ((2, 3),))
        square = Call(operator.mul, (INPUT, INPUT))
        yield RuleSample("square", square, ((2, 3),), error=ValueError, message="both depend on the input")


@register(
    operator.truediv, torch.div, torch.divide, torch.true_divide, "div", "divide", "true_divide", "__truediv__",
    _ATEN.div.Tensor, _ATEN.div.Scalar, _ATEN.div.Tensor_mode, _ATEN.div.Scalar_mode,
    _ATEN.true_divide.Tensor, _ATEN.true_divide.Scalar,
)  # fmt: skip
class DualDivide(Scaling):
    """Quotient by a constant. Source: design, section 1."""

    @staticmethod
    def parameters(input: Any, other: Any, *, rounding_mode: Any = None) -> dict[str, Any]:
        """Name the arguments of ``torch.div``."""
        return {"input": input, "other": other, "rounding_mode": rounding_mode}

    @classmethod
    def refuse(cls, call: Call) -> str | None:
        """Refuse a perturbed divisor, and rounding."""
        arguments = named_arguments(cls, call)
        if isinstance(arguments, str):
            return arguments
        if arguments.rounding_mode is not None:
            return f"rounding_mode={arguments.rounding_mode!r} makes the quotient piecewise constant"
        return "a quotient whose divisor depends on the input is not affine" if isinstance(arguments.other, Slot) else None

    def scale(self, z: Tensor, factor: Any) -> Tensor:
        """Divide."""
        return z / factor

    @classmethod
    def samples(cls) -> Iterator[RuleSample]:
        """Yield numbers, tensors and broadcasting."""
        yield from _scaling_samples(torch.div, "div", operator.truediv)
        yield RuleSample("aten", Call(_ATEN.div.Tensor, (INPUT, 2.5)), ((2, 3),))
        inverse, rounded = Call(operator.truediv, (1, INPUT)), Call(torch.div, (INPUT, 2), {"rounding_mode": "floor"})
        yield RuleSample("inverse", inverse, ((2, 3),), error=ValueError, message="divisor depends on the input")
        yield RuleSample("rounded", rounded, ((2, 3),), error=ValueError, message="piecewise constant")
