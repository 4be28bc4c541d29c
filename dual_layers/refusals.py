"""Why a call has no dual: checks that several rules share. They only read the call; nothing is run."""

from __future__ import annotations

from types import SimpleNamespace

from dual_layers.contract import Call, DualLayer, slots


def named_arguments(rule: type[DualLayer], call: Call) -> SimpleNamespace | str:
    """Return the call's arguments under the rule's names, or say which of them the rule does not know.

    An argument that a rule has no name for (``out=``, a deprecated positional form) must never be ignored.
    """
    try:
        return rule(call).arguments
    except TypeError as error:
        return f"this spelling's arguments are not supported: it {str(error).rpartition('() ')[2]}"


def unless_only(rule: type[DualLayer], call: Call, *names: str) -> str | None:
    """Refuse a call in which any argument but the named ones depends on the input."""
    arguments = named_arguments(rule, call)
    if isinstance(arguments, str):
        return arguments
    perturbed = [name for name, value in vars(arguments).items() if slots(value) and name not in names]
    return f"{' and '.join(perturbed)} must not depend on the input" if perturbed else None


def unless_one_factor(call: Call) -> str | None:
    """Refuse a product in which two factors, or one tensor twice, depend on the input."""
    if len(slots(call.args) + slots(call.kwargs)) == 1:
        return None
    return "a product of two values that both depend on the input is not affine"
