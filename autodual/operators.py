"""What the front end must know of an operator before any rule is bound: its spelling, mutations, views and randomness."""

from __future__ import annotations

import importlib
import inspect
import operator as python_operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils import _pytree as pytree

import dual_layers
from autodual.graph import ModuleRef, Ref, plain_arguments

# Results that are Python values, not tensors, whatever the registry says about them.
_PLAIN_METHODS = frozenset(
    {
        "size",
        "dim",
        "numel",
        "nelement",
        "ndimension",
        "stride",
        "element_size",
        "get_device",
        "item",
        "tolist",
        "is_contiguous",
    }
    | {"is_floating_point", "is_complex", "type", "storage_offset", "data_ptr"}
)
_PLAIN_FUNCTIONS = frozenset({torch.numel, torch.is_floating_point, torch.is_complex, torch.is_tensor, torch.broadcast_shapes})
_SHAPE_ATTRIBUTES = frozenset(
    {
        "shape",
        "dtype",
        "device",
        "ndim",
        "layout",
        "is_cuda",
        "is_cpu",
        "is_sparse",
        "is_quantized",
        "requires_grad",
        "itemsize",
    }
    | {"is_leaf", "is_meta", "is_mps", "is_nested", "nbytes", "names", "grad_fn"}
)
# Views for certain: each result shares its input's memory, so it can be replayed on a new value of its input.
_VIEWS = frozenset(
    {
        "view",
        "view_as",
        "transpose",
        "swapaxes",
        "swapdims",
        "permute",
        "movedim",
        "moveaxis",
        "t",
        "squeeze",
        "unsqueeze",
        "select",
    }
    | {"narrow", "expand", "expand_as", "detach", "unflatten", "split", "chunk", "unbind", "tensor_split", "diagonal", "alias"}
    | {"split_with_sizes", "hsplit", "vsplit", "unfold", "broadcast_to", "numpy_T", "mT", "matrix_H", "mH", "adjoint"}
)
# Views whose elements may share memory with each other: writing one element writes several.
_OVERLAPPING = frozenset({"expand", "expand_as", "broadcast_to", "broadcast_tensors", "as_strided", "unfold", "meshgrid"})
_AUGMENTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_OUT_OF_PLACE_OPERATOR = {
    getattr(python_operator, f"i{name}"): getattr(python_operator, f"{name}_" if name in ("and", "or") else name)
    for name in _AUGMENTED
}
_DUNDER_OPERATOR = {f"__i{name}__": getattr(python_operator, f"i{name}") for name in _AUGMENTED} | {
    "__setitem__": python_operator.setitem
}
_CHANGES_SHAPE = frozenset({"unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_", "detach_", "as_strided_"})
_NO_PURE_FORM = frozenset({"requires_grad_", "resize_", "resize_as_", "set_", "share_memory_", "swap_", "retain_grad_"})
_OVERWRITES = {"copy_", "fill_", "zero_"}


def is_shape_attribute(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call reads an attribute, such as ``x.shape``, that does not depend on values."""
    return operator is getattr and len(args) > 1 and args[1] in (_SHAPE_ATTRIBUTES | _registered_attributes())


def _registered_attributes() -> frozenset[str]:
    try:
        return frozenset(importlib.import_module("dual_layers.shape").SHAPE_ATTRIBUTES)
    except (ImportError, AttributeError):
        return frozenset()


def ignores_values(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call's result is the same for every value of its tensors: sizes, dtypes, devices."""
    if operator in ("item", "tolist"):
        return False
    if is_shape_attribute(operator, args):
        return True
    plain = operator in (_PLAIN_METHODS if isinstance(operator, str) else _PLAIN_FUNCTIONS)
    return plain or (not isinstance(operator, ModuleRef) and dual_layers.is_shape_query(operator))


def returns_tensor(operator: Any, args: tuple[Any, ...], from_tensor: bool) -> bool:
    """Whether a call gives a tensor (or tensors) and not a Python value, given whether any of its arguments is one."""
    if isinstance(operator, ModuleRef):
        return True
    if isinstance(operator, str):
        return operator not in _PLAIN_METHODS and from_tensor
    if operator in _PLAIN_FUNCTIONS or is_shape_attribute(operator, args):
        return False
    if getattr(operator, "__module__", "") in ("_operator", "math", "builtins"):
        return from_tensor
    return True


def returns_tuple(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of an operator with rules returns a tuple of tensors, of which its rule stands for one.

    Tensors among the arguments are nodes of a trace; whether they depend on the input is not known yet.
    """
    rules = () if isinstance(operator, ModuleRef) else dual_layers.cases(operator)
    if len({rule.facts.outputs_tuple for rule in rules}) < 2:
        return bool(rules) and rules[0].facts.outputs_tuple
    found: list[dual_layers.Slot] = []

    def place(value: Any) -> Any:
        if isinstance(value, (fx.Node, Ref)):
            found.append(dual_layers.Slot(len(found)))
            return found[-1]
        return value

    call = dual_layers.Call(operator, pytree.tree_map(place, plain_arguments(args)), pytree.tree_map(place, dict(kwargs)))
    rule, _ = dual_layers.choose(call)
    return rule is not None and rule.facts.outputs_tuple


def canonical(operator: Any) -> Any:
    """Give an operator its usual spelling: ``operator.iadd`` for ``Tensor.__iadd__``, a name for a method descriptor."""
    if isinstance(operator, str):
        if operator == "__getitem__":
            return python_operator.getitem
        if operator in ("__floordiv__", "__and__", "__or__", "__xor__", "__mod__"):
            return getattr(python_operator, operator)
        return _DUNDER_OPERATOR.get(operator, operator)
    name = getattr(operator, "__name__", "")
    if inspect.ismethoddescriptor(operator) and getattr(torch.Tensor, name, None) is operator:
        return canonical(name)
    return operator


def short_name(operator: Any) -> str:
    """Return the bare name of a function, overload or method: ``relu_`` for ``torch.relu_``."""
    if isinstance(operator, str):
        return operator
    if isinstance(operator, torch._ops.OpOverload):
        return operator._schema.name.split("::")[-1]
    return getattr(operator, "__name__", "")


def out_of_place(
    operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Rewrite a mutating call, whose first argument is the mutated one, as the call that returns the new value.

    Returns:
        Operator, args and kwargs of the pure call, or None when the call mutates nothing.

    Raises:
        NotImplementedError: the call mutates its argument and has no pure twin.
    """
    if isinstance(operator, ModuleRef):
        return None
    if "out" in kwargs and kwargs["out"] is not None:
        raise NotImplementedError("out= writes into another tensor")
    if operator is python_operator.setitem:
        return assign(), args, kwargs
    if operator in _OUT_OF_PLACE_OPERATOR:
        return _OUT_OF_PLACE_OPERATOR[operator], args, kwargs
    bound = _inplace_flag(operator, args, kwargs)
    if bound is not None:
        return operator, *bound
    name = short_name(operator)
    if not name.endswith("_") or name.endswith("__") or not _is_torch(operator):
        return None
    if name in _OVERWRITES:
        # Broadcasts the value over the whole tensor and keeps its dtype, as the mutation does.
        value = {"zero_": 0}.get(name, args[1] if len(args) > 1 else next(iter(kwargs.values()), None))
        return assign(), (args[0], ..., value), {}
    twin = _twin(operator, name[:-1])
    if twin is None or name in _NO_PURE_FORM:
        raise NotImplementedError(f"{name} has no out-of-place form")
    return twin, args, kwargs


def assign() -> Callable[..., Any]:
    """Return the pure form of ``base[index] = value``."""
    return importlib.import_module("dual_layers.shape").assign


def _is_torch(operator: Any) -> bool:
    if isinstance(operator, str):
        return hasattr(torch.Tensor, operator)
    return (getattr(operator, "__module__", "") or "torch").split(".")[0] == "torch"


def _twin(operator: Any, name: str) -> Any:
    if isinstance(operator, str):
        return name if hasattr(torch.Tensor, name) else None
    for place in (F, torch):
        if hasattr(place, name):
            return getattr(place, name)
    return None


def _inplace_flag(
    operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments without ``inplace=True``, or None where it is not set."""
    if isinstance(operator, str) or not inspect.isfunction(operator):
        return None
    try:
        signature = inspect.signature(operator)
        if "inplace" not in signature.parameters:
            return None
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError):
        return None
    if not bound.arguments.get("inplace", False):
        return None
    del bound.arguments["inplace"]
    return bound.args, bound.kwargs


def changes_shape(operator: Any) -> bool:
    """Whether a mutation changes how a tensor lies over its memory, and not the memory."""
    return short_name(operator) in _CHANGES_SHAPE


def is_view(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether the result certainly shares its first argument's memory."""
    return is_basic_index(operator, args) or _view_name(operator) in _VIEWS


def is_overlapping_view(operator: Any) -> bool:
    """Whether several elements of the result may be one element in memory."""
    return _view_name(operator) in _OVERLAPPING


def _view_name(operator: Any) -> str:
    # F.unfold copies, Tensor.unfold does not.
    return "" if getattr(operator, "__module__", "") == "torch.nn.functional" else short_name(operator)


def is_basic_index(operator: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call is ``x[index]`` with integers, slices, None and ``...`` only: a view, not a copy."""
    if operator is not python_operator.getitem:
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return all(type(part) in (int, slice, type(None), type(...)) for part in index)


def draws_random_numbers(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call reads the random number generator, judged by PyTorch's own operator tags."""
    if isinstance(operator, ModuleRef):
        return False
    name = short_name(operator)
    if isinstance(operator, torch._ops.OpOverload):
        packet = operator.overloadpacket
    elif _is_torch(operator) and name.isidentifier():
        packet = getattr(torch.ops.aten, name, None)
    else:
        return False
    overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    if not any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads):
        return False
    return not _is_switched_off(operator, args, kwargs)


def _is_switched_off(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether arguments such as ``training=False`` or ``dropout_p=0.0`` make a random operator deterministic."""
    names: list[str] = []
    if isinstance(operator, torch._ops.OpOverload):
        names = [argument.name for argument in operator._schema.arguments]
        defaults = {argument.name: argument.default_value for argument in operator._schema.arguments}
    elif inspect.isfunction(operator):
        parameters = inspect.signature(operator).parameters
        names, defaults = list(parameters), {name: parameter.default for name, parameter in parameters.items()}
    else:  # builtins of torch: dropout(input, p, train), scaled_dot_product_attention(..., dropout_p=0.0)
        order = {
            "dropout": ["input", "p", "train"],
            "rrelu": ["input", "lower", "upper", "training"],
            "scaled_dot_product_attention": ["query", "key", "value", "attn_mask", "dropout_p"],
        }
        key = short_name(operator).removesuffix("_")
        names = order.get("dropout" if key.endswith("dropout") else key, [])
        defaults = {"train": True, "training": False, "dropout_p": 0.0}
    given = {name: defaults.get(name) for name in names} | dict(zip(names, args, strict=False)) | kwargs
    switches = [given[name] for name in ("training", "train", "dropout_p") if name in given]
    return bool(switches) and not any(value not in (False, 0, 0.0) for value in switches)
