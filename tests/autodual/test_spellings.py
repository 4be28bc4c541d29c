"""Every element-wise function under the names that PyTorch gives it, bounded in a small network along both tracing routes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autodual

aten = torch.ops.aten
METHODS = ("interval", "adaptive")
HALF = torch.tensor(0.5, dtype=torch.float64)


def everywhere(name: str, *, aliases: tuple[str, ...] = (), place: str = "torch method aten inplace") -> dict[str, Callable]:
    """Collect a function's spellings of one argument: ``torch``, ``F``, ``special``, tensor method, ATen and in place."""
    found: dict[str, Callable] = {}
    for each in (name, *aliases):
        places = {"torch": torch, "F": F, "special": torch.special}
        for key in place.split():
            if key in places:
                found[f"{key}.{each}"] = getattr(places[key], each)
        if "method" in place:
            found[f"Tensor.{each}"] = lambda z, each=each: getattr(z, each)()
        if "inplace" in place:
            found[f"Tensor.{each}_"] = lambda z, each=each: getattr(1.0 * z, f"{each}_")()
    if "aten" in place:
        found[f"aten.{name}"] = getattr(aten, name).default
    return found


SPELLINGS: dict[str, Callable[[Tensor], Tensor] | nn.Module] = {
    **everywhere("tanh", place="torch F method aten inplace"),
    **everywhere("sigmoid", place="torch F method aten inplace"),
    "nn.Tanh": nn.Tanh(), "nn.Sigmoid": nn.Sigmoid(), "special.expit": torch.special.expit,
    "F.softplus": F.softplus, "F.softplus, beta": lambda z: F.softplus(z, beta=2.5, threshold=3.0),
    "nn.Softplus": nn.Softplus(0.7, 5), "aten.softplus": aten.softplus.default,
    "F.elu": F.elu, "F.elu, alpha": lambda z: F.elu(z, 0.6), "F.elu, inplace": lambda z: F.elu(1.0 * z, inplace=True),
    "F.elu_": lambda z: F.elu_(1.0 * z), "nn.ELU": nn.ELU(1.7), "nn.ELU, inplace": nn.ELU(inplace=True),
    "aten.elu": aten.elu.default,
    "F.selu": F.selu, "torch.selu": torch.selu, "nn.SELU": nn.SELU(), "aten.selu": aten.selu.default,
    "F.celu": F.celu, "torch.celu": lambda z: torch.celu(z, alpha=0.5), "nn.CELU": nn.CELU(2.0), "aten.celu": aten.celu.default,
    "F.gelu": F.gelu, "F.gelu, tanh": lambda z: F.gelu(z, approximate="tanh"), "nn.GELU": nn.GELU(),
    "nn.GELU, tanh": nn.GELU("tanh"), "aten.gelu": aten.gelu.default,
    "F.silu": F.silu, "F.silu, inplace": lambda z: F.silu(1.0 * z, inplace=True), "nn.SiLU": nn.SiLU(),
    "aten.silu": aten.silu.default,
    "F.mish": F.mish, "nn.Mish": nn.Mish(inplace=True), "aten.mish": aten.mish.default,
    "F.hardswish": F.hardswish, "nn.Hardswish": nn.Hardswish(), "aten.hardswish": aten.hardswish.default,
    "F.softsign": F.softsign, "nn.Softsign": nn.Softsign(),
    "F.logsigmoid": F.logsigmoid, "nn.LogSigmoid": nn.LogSigmoid(), "aten.log_sigmoid": aten.log_sigmoid.default,
    **everywhere("exp"), **everywhere("sin"), **everywhere("cos"), **everywhere("square"),
    **everywhere("atan", aliases=("arctan",)), **everywhere("erf", place="torch special method aten inplace"),
    **everywhere("erfc", place="torch special method aten inplace"), **everywhere("expm1", place="torch special method aten"),
    **everywhere("exp2", place="torch special method aten"), **everywhere("sinh"), **everywhere("cosh"),
    **everywhere("asinh", aliases=("arcsinh",)),
    "F.tanhshrink": F.tanhshrink, "nn.Tanhshrink": nn.Tanhshrink(),
    "F.softshrink": F.softshrink, "nn.Softshrink": nn.Softshrink(0.3), "aten.softshrink": aten.softshrink.default,
    "F.hardshrink": F.hardshrink, "torch.hardshrink": torch.hardshrink, "nn.Hardshrink": nn.Hardshrink(0.3),
    "aten.hardshrink": aten.hardshrink.default,
    "F.rrelu": F.rrelu, "nn.RReLU": nn.RReLU().eval(),
    **everywhere("sign"), **everywhere("sgn"), **everywhere("floor"), **everywhere("ceil"), **everywhere("frac"),
    **everywhere("trunc", aliases=("fix",)), **everywhere("round"), "special.round": torch.special.round,
    "torch.round, decimals": lambda z: torch.round(z, decimals=1), "Tensor.round, decimals": lambda z: z.round(decimals=1),
    "torch.heaviside": lambda z: torch.heaviside(z, HALF), "Tensor.heaviside": lambda z: z.heaviside(HALF),
    "aten.heaviside": lambda z: aten.heaviside.default(z, HALF),
    "//": lambda z: z // 0.5, "torch.floor_divide": lambda z: torch.floor_divide(z, 0.5),
    "Tensor.floor_divide": lambda z: z.floor_divide(-0.5),
    "torch.div, floor": lambda z: torch.div(z, 0.5, rounding_mode="floor"),
    "Tensor.div, trunc": lambda z: z.div(HALF, rounding_mode="trunc"),
    "%": lambda z: z % 0.75, "torch.remainder": lambda z: torch.remainder(z, -0.75), "Tensor.fmod": lambda z: z.fmod(0.75),
    "torch.fmod": lambda z: torch.fmod(z, HALF),
    "** 2": lambda z: z**2, "** 3": lambda z: z**3, "pow": lambda z: pow(z, 2), "torch.pow": lambda z: torch.pow(z, 4),
    "Tensor.pow": lambda z: z.pow(3), "Tensor.pow_": lambda z: (1.0 * z).pow_(3), "**=": lambda z: _augmented(1.0 * z),
    "torch.float_power": lambda z: torch.float_power(z, 3), "aten.pow": lambda z: aten.pow.Tensor_Scalar(z, 2),
    "** tensor": lambda z: z ** torch.tensor([2, 3, 4]),
    "2 **": lambda z: 2**z, "torch.pow(0.7, z)": lambda z: torch.pow(0.7, z),
    "aten.pow.Scalar": lambda z: aten.pow.Scalar(1.5, z),
    "tensor **": lambda z: (HALF + torch.arange(3.0).double()) ** z,
}  # fmt: skip
POSITIVE: dict[str, Callable[[Tensor], Tensor]] = {  # on [0.2, 0.9]
    **everywhere("tan"), **everywhere("log"), **everywhere("log2"), **everywhere("log10"), **everywhere("log1p"),
    **everywhere("sqrt"), **everywhere("rsqrt"), **everywhere("reciprocal"), **everywhere("asin", aliases=("arcsin",)),
    **everywhere("acos", aliases=("arccos",)), **everywhere("atanh", aliases=("arctanh",)),
    "torch.acosh": lambda z: torch.acosh(z + 1), "Tensor.arccosh": lambda z: (z + 1).arccosh(),
    "torch.logit": torch.logit, "Tensor.logit": lambda z: z.logit(), "special.logit": lambda z: torch.special.logit(z, eps=0.3),
    "special.log1p": torch.special.log1p,
    "** 0.5": lambda z: z**0.5, "** -1": lambda z: z**-1, "** -2": lambda z: z**-2, "** -0.5": lambda z: z ** (-0.5),
    "torch.pow(z, 1.5)": lambda z: torch.pow(z, 1.5), "** a parameter's value": lambda z: z ** (HALF + 2.2),
    "torch.float_power(z, -0.5)": lambda z: torch.float_power(z, -0.5),
    "torch.xlogy(c, z)": lambda z: torch.xlogy(HALF, z), "torch.xlogy": lambda z: torch.xlogy(z, z),
}  # fmt: skip
TAKEN_APART = ("softsign", "Softsign", "tanhshrink", "Tanhshrink", "softshrink", "Softshrink")
"""What torch.export hands over in parts: bounds are looser."""

EVERY = [*((name, False) for name in SPELLINGS), *((name, True) for name in POSITIVE)]


def _augmented(z: Tensor) -> Tensor:
    z **= 3
    return z


class Around(nn.Module):
    """A function between two linear layers, its input kept where it is defined."""

    def __init__(self, function: Callable[[Tensor], Tensor], positive: bool) -> None:
        super().__init__()
        self.first, self.last, self.positive = nn.Linear(2, 3), nn.Linear(3, 2), positive
        self.function = function
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(self.function(torch.sigmoid(h) * 0.7 + 0.2 if self.positive else h))


def built(name: str, positive: bool) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Around((POSITIVE if positive else SPELLINGS)[name], positive).eval(), torch.randn(3, 2).double()


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("name", "positive"), EVERY)
def test_every_spelling_is_bounded(name: str, positive: bool) -> None:
    model, x = built(name, positive)
    region, generator = autodual.LInf(0.15), torch.Generator().manual_seed(0)
    with torch.no_grad():
        samples = model(region.sample(x.repeat(60, 1), generator)).unflatten(0, (60, len(x)))
    symbolic = autodual.certify(model)
    for method in METHODS:
        bounds = symbolic.bounds(x, region, method=method)
        assert bounds.lower.isfinite().all()
        assert bounds.upper.isfinite().all()
        assert (bounds.lower <= samples.amin(0) + 1e-9).all()
        assert (bounds.upper >= samples.amax(0) - 1e-9).all()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "positive"), EVERY)
def test_every_spelling_is_bounded_along_the_export_route(name: str, positive: bool) -> None:
    model, x = built(name, positive)

    class Sized(nn.Module):
        """Asks for a size as a number, which symbolic tracing does not know."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x) + 0.0 * sum(range(x.shape[1]))

    region, generator = autodual.LInf(0.15), torch.Generator().manual_seed(0)
    with torch.no_grad():
        samples = torch.stack([model(region.sample(x, generator)) for _ in range(60)])
    own, exported = autodual.certify(model).bounds(x, region), autodual.certify(Sized(), x).bounds(x, region)
    assert (exported.lower <= samples.amin(0) + 1e-9).all()
    assert (exported.upper >= samples.amax(0) - 1e-9).all()
    if not any(part in name for part in TAKEN_APART):
        torch.testing.assert_close(exported.lower, own.lower, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(exported.upper, own.upper, atol=1e-9, rtol=1e-9)
