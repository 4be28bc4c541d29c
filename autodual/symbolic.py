"""Route one of the front end: symbolic tracing with torch.fx, which keeps the batch and every size symbolic."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import dual_layers
from autodual import operators, origins
from autodual.errors import TraceError
from autodual.graph import Graph, ModuleRef, Node, Ref, plain_arguments
from autodual.interception import inside_assert, intercepted
from autodual.isolation import RANDOM, restored_model, same_random_state
from autodual.leaves import is_from_torch, is_leaf
from autodual.proxies import TracedProxy, Unfollowable

_VIEW_ATTRIBUTES = ("T", "mT", "H", "mH", "data", "real", "imag")


class SymbolicTracer(fx.Tracer):
    """Records a model's forward with its registered modules as leaves; the model is left as it was.

    Args:
        model: the model to record.
        positional: names of the arguments that are passed by position.
        keywords: names of the arguments that are passed by keyword.
    """

    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, positional: tuple[str, ...], keywords: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.positional, self.keywords = model, positional, keywords
        self.halted: Exception | None = None
        self.opaque: list[tuple[str, str]] = []
        self.constants: dict[str, torch.Tensor] = {}
        self._captured: dict[tuple[int, int], tuple[str, torch.Tensor]] = {}
        self._mutated: dict[int, int] = {}
        self.paths = _tensor_paths(model)
        self.modules = {id(module): name for name, module in model.named_modules()}
        self.tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))

    def run(self) -> Graph:
        """Trace the model.

        Returns:
            The graph as written, mutations included.

        Raises:
            TraceError: the outcome of the model's Python code depends on values, on random numbers or on its state.
            Unfollowable: a line needs concrete sizes.
        """
        try:
            with restored_model(self.model), same_random_state(type(self.model).__name__), intercepted(self):
                traced = self.trace(self.model)
        except (TraceError, Unfollowable) as problem:
            raise (self.halted or problem) from None
        except Exception as problem:
            origin = origins.failure_origin(problem.__traceback__, start_of_forward.__code__)
            raise self.halted or Unfollowable(f"{type(problem).__name__}: {problem}", origin) from problem
        if self.halted is not None:  # the user's own code may have swallowed the exception
            raise self.halted
        return _to_graph(traced, self.constants)

    # What fx calls while it traces.

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Create the inputs, and call the model as a user does, so that its own hooks are seen too."""
        inputs = {name: self.create_proxy("placeholder", name, (), {}) for name in (*self.positional, *self.keywords)}
        return functools.partial(start_of_forward, self.model, self.positional, self.keywords, inputs), []

    def proxy(self, node: fx.Node) -> TracedProxy:
        """Wrap a node."""
        return TracedProxy(node, self)

    def create_node(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        """Record a node with its source line and what its value depends on."""
        if kind in ("call_function", "call_method"):
            target = operators.canonical(target)
            kind = "call_method" if isinstance(target, str) else "call_function"
            self._note_mutation(target, args, kwargs)
            if (
                kind == "call_method"
                and not args[0].meta["tensor"]
                and not (hasattr(torch.Size, target) or hasattr(int, target))
            ):
                self.halt(f"a size has no method .{target}()")
        node = super().create_node(kind, target, args, kwargs, name, None)
        parents = [parent.meta for parent in node.all_input_nodes]
        is_call = kind in ("call_function", "call_method")
        from_tensor = any(parent["tensor"] for parent in parents)
        node.meta["origin"] = "" if kind == "placeholder" else self.here()
        node.meta["tensor"] = not is_call or operators.returns_tensor(target, args, from_tensor)
        node.meta["tuple"] = is_call and operators.returns_tuple(target, args, kwargs)
        node.meta["values"] = not is_call or (not operators.ignores_values(target, args) and any(p["values"] for p in parents))
        return node

    def create_arg(self, a: Any) -> Any:
        """Turn tensors into nodes and number-like objects into numbers; leave the rest to fx."""
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, torch.Tensor):
            return self._lift(a)
        if isinstance(a, nn.Module):
            self.halt("a module is passed to an operator")
        if isinstance(a, numbers.Number) and not isinstance(a, (bool, int, float, complex)):
            return int(a) if isinstance(a, numbers.Integral) else float(a)
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Give the model's parameters and buffers as symbolic values, so that they stay differentiable."""
        if isinstance(attr_val, torch.Tensor) and not isinstance(attr_val, fx.Proxy) and id(attr_val) in self.paths:
            return self.create_proxy("get_attr", self.paths[id(attr_val)], (), {})
        return attr_val

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record registered modules as leaves, trace through all others."""
        path = self.modules.get(id(m))
        if path is None:  # a module that the model does not own
            return forward(*args, **kwargs)
        scope = self.scope
        self.scope = fx.proxy.Scope(path, type(m))
        try:
            if is_leaf(m):
                return self.create_proxy(
                    "call_module", path, args, kwargs, name=path.replace(".", "_") or type(m).__name__.lower()
                )
            if dual_layers.lookup(m) is not None or not is_from_torch(m):
                return forward(*args, **kwargs)
            return self._trace_library_module(m, path, forward, args, kwargs)
        finally:
            self.scope = scope

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuse a Python branch; an ``assert`` about shapes is taken as true, since it changes no value."""
        if not obj.node.meta["values"] and inside_assert():
            return True
        return self.concretize(obj, "a Python branch asks for a shape")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Refuse to iterate: how often depends on a shape."""
        return self.halt("Python iterates over a tensor or a shape")

    def here(self) -> str:
        """Return the user's line that is running, or the module's path where no user code is."""
        return origins.current_origin(start_of_forward.__code__) or self.scope.module_path or type(self.model).__name__

    # Refusals.

    def concretize(self, obj: fx.Proxy, reason: str) -> Any:
        """Refuse to turn a symbolic value into a concrete one."""
        if not obj.node.meta["values"]:
            return self.halt(reason)
        return self.refuse(
            "Python control flow depends on values, so the model is not one function of its input; "
            "write it with torch.where, torch.clamp or another operator"
        )

    def halt(self, reason: str) -> Any:
        """Give up on this route."""
        self.halted = self.halted or Unfollowable(reason, self.here())
        raise self.halted

    def refuse(self, reason: str) -> Any:
        """Give up on the model."""
        self.halted = TraceError(f"{self.here()}: {reason}")
        raise self.halted

    # Tensors that are not symbolic yet.

    def _lift(self, tensor: torch.Tensor) -> fx.Node:
        if id(tensor) in self.paths:
            return self.create_node("get_attr", self.paths[id(tensor)], (), {})
        storage = _storage(tensor)
        if storage in self._mutated and self._mutated[storage] != id(tensor):
            self.halt("a tensor made in forward is used through a view after a value was written into it")
        key = (id(tensor), tensor._version)
        if key not in self._captured:
            name = f"<constant {len(self.constants)}>"
            # A copy, since forward may go on to change the tensor; one that wants a gradient has to stay itself.
            self.constants[name] = tensor if tensor.requires_grad and tensor.is_leaf else tensor.detach().clone()
            self._captured[key] = (name, tensor)
        return self.create_node("get_attr", self._captured[key][0], (), {})

    def _note_mutation(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args or not isinstance(args[0], fx.Node) or args[0].target not in self.constants:
            return
        try:
            mutates = operators.out_of_place(target, args, kwargs) is not None
        except NotImplementedError:
            mutates = True
        if mutates:
            tensor = next(tensor for name, tensor in self._captured.values() if name == args[0].target)
            self._mutated[_storage(tensor)] = id(tensor)

    def eager_call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call of concrete tensors, or record it where it reads the model's own tensors."""
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, fx.Proxy) for leaf in leaves):
            return function(*args, **kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if any(_storage(tensor) in self._mutated for tensor in tensors):
            self.halt("a tensor made in forward is used after a value was written into it")
        attribute = getattr(getattr(function, "__self__", None), "__name__", "") if _is_getter(function) else None
        if not any(id(tensor) in self.paths for tensor in tensors) or (attribute and attribute not in _VIEW_ATTRIBUTES):
            if operators.draws_random_numbers(operators.canonical(function), args, kwargs):
                self.refuse(RANDOM)
            return function(*args, **kwargs)
        args, kwargs = pytree.tree_map(self._symbolic, (args, kwargs))
        return getattr(args[0], attribute) if attribute else TracedProxy.__torch_function__(function, (), args, kwargs)

    def _symbolic(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and id(value) in self.paths:
            return self.create_proxy("get_attr", self.paths[id(value)], (), {})
        return value

    def _trace_library_module(
        self, module: nn.Module, path: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace into one of PyTorch's own modules; where that fails keep it whole, to be reported as unsupported."""
        last, halted = self.graph._root.prev, self.halted
        try:
            return forward(*args, **kwargs)
        except Exception:
            while self.graph._root.prev is not last:
                self.graph.erase_node(self.graph._root.prev)
            self.halted = halted
            result = self.create_proxy("call_module", path, args, kwargs)
            self.opaque.append((path, result.node.meta["origin"]))
            return result


def start_of_forward(model: nn.Module, positional: tuple[str, ...], keywords: tuple[str, ...], inputs: dict[str, Any]) -> Any:
    """Call the model; the frame of this function marks where the user's own code begins."""
    return model(*(inputs[name] for name in positional), **{name: inputs[name] for name in keywords})


def _is_getter(function: Any) -> bool:
    return getattr(function, "__name__", "") == "__get__"


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensor_paths(model: nn.Module) -> dict[int, str]:
    """Map the model's parameters, buffers and plain tensor attributes to their dotted paths."""
    paths: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for values in (module._parameters, module._buffers, vars(module)):
            for name, value in values.items():
                if isinstance(value, torch.Tensor):
                    paths.setdefault(id(value), f"{prefix}.{name}" if prefix else name)
    return paths


def _to_graph(traced: fx.Graph, constants: dict[str, torch.Tensor]) -> Graph:
    """Translate fx nodes; an attribute that is read twice becomes one node."""
    names: dict[fx.Node, str] = {}
    attributes: dict[str, str] = {}
    nodes: list[Node] = []
    kinds = {"placeholder": "input", "get_attr": "attribute"}
    for step in traced.nodes:
        if step.op == "output":
            return Graph(tuple(nodes), _only_output(step, names), constants)
        names[step] = attributes.get(step.target, step.name) if step.op == "get_attr" else step.name
        if step.op == "get_attr":
            if step.target in attributes:
                continue
            attributes[step.target] = step.name
        convert = functools.partial(fx.node.map_arg, fn=lambda node: Ref(names[node]))
        operator_ = ModuleRef(step.target) if step.op == "call_module" else step.target
        args, kwargs = convert(step.args), convert(step.kwargs)
        if step.op == "placeholder":
            args = ()
        nodes.append(
            Node(
                step.name,
                kinds.get(step.op, "call"),
                operator_,
                plain_arguments(args),
                plain_arguments(kwargs),
                origin=step.meta["origin"],
            )
        )
    raise AssertionError("fx graphs end with an output")


def _only_output(step: fx.Node, names: dict[fx.Node, str]) -> str:
    result = step.args[0]
    if isinstance(result, (tuple, list)) and len(result) == 1:
        result = result[0]
    if isinstance(result, fx.Node):
        return names[result]
    what = f"a {type(result).__name__.removeprefix('immutable_')}"
    if isinstance(result, (tuple, list, dict)):
        what += f" of {len(result)}"
    raise TraceError(f"forward returns {what}, not one tensor; wrap the model in a module that returns the tensor to bound")
