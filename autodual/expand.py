"""Replace a call of a composite operator by the calls it is made of."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from autodual.errors import TraceError
from autodual.graph import Graph, Node, Ref, plain_arguments, substitute
from autodual.passes.dead_code import drop_dead_code
from autodual.passes.items import fuse_items
from dual_layers import Call, Composite

_PLAIN = ("shape", "ndim", "dtype", "device")


class Expansion:
    """Parts of composite operators, with the tensors and values that come with them.

    Args:
        model: where parameters are looked up, so that parts refer to them and never hold them.
        values: a value for every node that exists already, by name; sizes are read from them.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Any]) -> None:
        self.values = dict(values)
        self.constants: dict[str, Tensor] = {}
        self._paths = {id(tensor): path for path, tensor in model.named_parameters(remove_duplicate=False)}
        self._paths |= {id(tensor): path for path, tensor in model.named_buffers(remove_duplicate=False)}
        self._attributes: dict[int, str] = {}

    def parts(self, node: Node, rule: type[Composite], target: Any) -> list[Node]:
        """Write a node in its parts.

        Args:
            node: a call of a composite operator.
            rule: its rule.
            target: the operator that the node calls: a function, a method's name or a module.

        Returns:
            Nodes in topological order. The last one has the node's own name; the others are named after it.
        """
        tracer = _Tracer(self, node.name)
        call = Call(target, substitute(node.args, tracer.proxy_of), substitute(node.kwargs, tracer.proxy_of), node.item)
        with torch.no_grad():
            arguments = vars(rule(call).arguments)
            result = rule.compose(**{name: tracer.symbolic(value, node) for name, value in arguments.items()})
        result = result if node.item is None else result[node.item]
        if result.node.op == "placeholder":  # the composition hands an argument on: give it the node's name
            result = tracer.create_proxy("call_function", operator.pos, (result,), {})
        return self._nodes(tracer, result.node, node)

    def is_owned(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of the model's parameters or buffers."""
        return id(tensor) in self._paths

    def attribute(self, tensor: Tensor) -> tuple[str, str | None]:
        """Name a tensor that a composition met, and its path if no node stands for it yet."""
        known = self._attributes.get(id(tensor))
        if known is not None:
            return known, None
        path = self._paths.get(id(tensor))
        if path is None:
            path = f"<composed {len(self.constants)}>"
            self.constants[path] = tensor
        name = self._attributes[id(tensor)] = f"composed.{path}"
        self.values[name] = tensor
        return name, path

    def _nodes(self, tracer: _Tracer, last: fx.Node, origin: Node) -> list[Node]:
        names: dict[fx.Node, str] = {}
        nodes = []
        for step in tracer.graph.nodes:
            if step.op == "placeholder":
                names[step] = step.meta["name"]
                continue
            names[step] = step.meta.get("name") or (origin.name if step is last else f"{origin.name}.{step.name}")
            if step.op == "get_attr":
                if step.meta["path"] is not None:
                    nodes.append(Node(names[step], "attribute", step.meta["path"]))
                continue
            convert = lambda value: plain_arguments(fx.node.map_arg(value, lambda known: Ref(names[known])))  # noqa: E731
            args, kwargs = convert(step.args), convert(step.kwargs)
            nodes.append(Node(names[step], "call", step.target, args, kwargs, origin=origin.origin))
            self.values[names[step]] = step.meta["value"]
            if step is last:
                break
        return list(drop_dead_code(fuse_items(Graph(tuple(nodes), names[last]))).nodes)


class _Tracer(fx.Tracer):
    """Records a composition while running it on values, so that sizes are known."""

    def __init__(self, expansion: Expansion, prefix: str) -> None:
        super().__init__()
        self.expansion, self.prefix = expansion, prefix
        self.graph, self.root = fx.Graph(), nn.Module()
        self._known: dict[str, fx.Proxy] = {}

    def proxy(self, node: fx.Node) -> _Proxy:
        return _Proxy(node, self)

    def proxy_of(self, ref: Ref) -> Any:
        """Stand for another node's value; a size or a dtype is itself."""
        if _is_size(self.expansion.values[ref.name]):
            return self.expansion.values[ref.name]
        if ref.name not in self._known:
            node = self.graph.placeholder(f"input_{len(self._known)}")
            node.meta |= {"name": ref.name, "value": self.expansion.values[ref.name]}
            self._known[ref.name] = self.proxy(node)
        return self._known[ref.name]

    def symbolic(self, value: Any, origin: Node) -> Any:
        """Stand for a tensor that came with a module, such as its weight."""
        if not isinstance(value, Tensor):
            return value
        if not self.expansion.is_owned(value):
            raise TraceError(
                f'node "{origin.name}" at {origin.origin}: a tensor of this module is computed anew in each call, as '
                "parametrizations do, and cannot be followed; remove the parametrization"
            )
        return self.proxy(self.create_arg(value))

    def create_arg(self, a: Any) -> Any:
        if not isinstance(a, Tensor):
            return super().create_arg(a)
        name, path = self.expansion.attribute(a)
        node = self.graph.create_node("get_attr", "tensor", (), {})
        node.meta |= {"name": name, "path": path, "value": a}
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        """Run the call and record it; what is no tensor is a number that the composition may use at once."""
        args, kwargs = self.create_arg(args), self.create_arg(kwargs)
        known_args, known_kwargs = fx.node.map_arg((args, kwargs), lambda node: node.meta["value"])
        known_args, known_kwargs = plain_arguments(known_args), plain_arguments(known_kwargs)
        value = Call(target, known_args, known_kwargs)()
        if not _holds_tensor(value):
            return value
        kind = "call_method" if isinstance(target, str) else "call_function"
        node = self.graph.create_node(kind, target, args, kwargs)
        node.meta["value"] = value
        return self.proxy(node)


class _Proxy(fx.Proxy):
    """A value inside a composition; its sizes are plain numbers."""

    def __getattr__(self, name: str) -> Any:
        if name in _PLAIN:
            return getattr(self.node.meta["value"], name)
        return super().__getattr__(name)

    def __iter__(self) -> Any:
        value = self.node.meta["value"]
        return (self[i] for i in range(len(value)))

    def __len__(self) -> int:
        return len(self.node.meta["value"])


def _is_size(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_size, value))
    return isinstance(value, (int, torch.dtype, torch.device))


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, Tensor)
