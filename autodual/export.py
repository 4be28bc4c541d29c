"""Route two of the front end: torch.export on one example batch, for models whose Python code needs concrete sizes.

Only axis 0 of the inputs stays symbolic; every other size is fixed to the example's, which ``Graph.shapes`` records.
"""

from __future__ import annotations

import importlib
import operator
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, OutputKind

import dual_layers
from autodual import operators, origins
from autodual.errors import TraceError
from autodual.graph import Graph, Node, Ref, plain_arguments
from autodual.isolation import STATE, restored_model, same_random_state

_ATEN = torch.ops.aten
_Program = torch.export.ExportedProgram
_BATCH_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_RECURRENT = ("gru", "lstm", "rnn_tanh", "rnn_relu")
_VIEWS = (_ATEN.view.default, _ATEN._unsafe_view.default)
_ROUNDS = 4  # a decomposition may need another one
_END = torch.iinfo(torch.int64).max


class NotExportableError(TraceError):
    """PyTorch's own exporter gives up, for a reason of its own."""


def export(model: nn.Module, example: Mapping[str, Tensor], positional: tuple[str, ...], keywords: tuple[str, ...]) -> Graph:
    """Trace a model by running it on one example batch with a symbolic batch size.

    Args:
        model: the model; it is left as it was.
        example: a tensor for every argument that is passed.
        positional: names of the arguments that are passed by position.
        keywords: names of the arguments that are passed by keyword.

    Returns:
        The graph in ATen operators, without mutations.

    Raises:
        TraceError: the Python code depends on values, fixes the batch size, or changes the model's state; a
            ``NotExportableError`` for any other reason.
    """
    names = (*positional, *keywords)
    batch, example = _at_least_two({name: example[name] for name in names})
    axis = torch.export.Dim("batch")
    batched = {name: value.dim() > 0 and len(value) == batch for name, value in example.items()}
    sizes = {name: {0: axis} if batched[name] else {} for name in names}
    try:
        with restored_model(model), same_random_state(type(model).__name__), _attention_in_parts(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = _run(model, example, positional, keywords, sizes)
    except TraceError:
        raise
    except Exception as problem:
        raise _explained(problem) from problem
    shapes = {name: tuple(None if i == 0 and batched[name] else n for i, n in enumerate(example[name].shape)) for name in names}
    return _to_graph(program, model, shapes)


@contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Let PyTorch's transformer layers run operator by operator, with the mask they are given.

    In evaluation mode they are one operator without a rule, and a mask's values would be asked whether it is causal, so
    that a faster operator may take its place.
    """
    layers, fused = importlib.import_module("torch.nn.modules.transformer"), torch.backends.mha.get_fastpath_enabled()
    original = layers._detect_is_causal_mask
    torch.backends.mha.set_fastpath_enabled(False)
    layers._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        layers._detect_is_causal_mask = original


def _at_least_two(example: Mapping[str, Tensor]) -> tuple[int, dict[str, Tensor]]:
    """Repeat a batch of one: torch.export takes a size of one for a constant."""
    batch = next((len(value) for value in example.values() if value.dim() > 0), 0)
    if batch == 0:
        raise TraceError("the example needs at least one tensor with a batch axis, and at least one example in it")
    if batch > 1:
        return batch, dict(example)
    return 2, {
        name: torch.cat([value, value]) if value.dim() > 0 and len(value) == 1 else value for name, value in example.items()
    }


def _run(
    model: nn.Module,
    example: Mapping[str, Tensor],
    positional: tuple[str, ...],
    keywords: tuple[str, ...],
    sizes: dict[str, Any],
) -> _Program:
    """Export, functionalise, and decompose what has no rule but is made of operators that may have one."""
    args = tuple(example[name].detach() for name in positional)
    kwargs = {name: example[name].detach() for name in keywords}
    program = torch.export.export(model, args, kwargs, dynamic_shapes=sizes, strict=False)
    known = torch.export.default_decompositions()
    finer, table = program, {target: known[target] for target in _without_rule(program) if target in known}
    recurrent = {target: part for target, part in table.items() if operators.short_name(target) in _RECURRENT}
    for _ in range(_ROUNDS):
        finer = finer.run_decompositions(table)  # which functionalises too, and takes seconds
        table = {target: known[target] for target in _without_rule(finer) if target in known}
        if not table:
            break
    # An operator that stays without a rule is reported under the name its author knows, not in pieces.
    return program.run_decompositions(recurrent) if _without_rule(finer) else finer


def _without_rule(program: _Program) -> set[Any]:
    """List the operators that depend on the inputs' values and have no rule."""
    inputs, result = set(program.graph_signature.user_inputs), set()
    depends: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.name in inputs or not depends.isdisjoint(node.all_input_nodes):
            if node.op == "call_function" and operators.ignores_values(node.target, node.args):
                continue
            depends.add(node)
            if node.op == "call_function" and _spelling(node.target) is None and not _is_batch_norm(node.target):
                result.add(node.target)
    return result


def _explained(problem: Exception) -> TraceError:
    line = origins.failure_origin(problem.__traceback__, _run.__code__) or origins.recorded_origin(str(problem))
    where, text = f"{line}: " if line else "", str(problem)
    if "data-dependent" in text.lower() or "unbacked" in text.lower():
        return TraceError(
            f"{where}Python control flow depends on values, so the model is not one function of its input; "
            "write it with torch.where, torch.clamp or another operator"
        )
    if "batch" in text and ("specialized" in text or "Constraints violated" in text):
        return TraceError(
            f"{where}forward works for some batch sizes only ({_batch_sizes(text)}): its code fixes the size of axis 0, as "
            "a loop over the batch, a branch on its size or a number in view() does; write -1 or x.size(0) for that axis"
        )
    if _meets_packed(problem):
        return TraceError(f"{where}the lengths of packed sequences are values; give the recurrent layer the padded batch")
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    if "fake tensor" in text:
        first = "it cannot see where a value comes from; NumPy, for one, hides that"
    return NotExportableError(f"{where}torch.export cannot follow the model: {type(problem).__name__}: {first}")


def _meets_packed(problem: Exception) -> bool:
    """Whether a packed sequence was at hand where the exporter gave up."""
    frames = [frame.f_locals.values() for frame, _ in traceback.walk_tb(problem.__traceback__)]
    return any(isinstance(value, nn.utils.rnn.PackedSequence) for values in frames for value in values)


def _batch_sizes(text: str) -> str:
    """Say which batch sizes torch.export found to work, from its own account."""
    constant = re.search(r"specialized it to be a constant \((\d+)\)", text)
    if constant:
        return f"here {constant[1]}"
    suggested = re.search(r"^ *batch = (.+)$", text, flags=re.M)
    return f"here {suggested[1].replace('_batch', 'n')} with a whole number n" if suggested else "not every one"


def _to_graph(program: _Program, model: nn.Module, shapes: dict[str, tuple[int | None, ...]]) -> Graph:
    _refuse_state_changes(program.graph_signature, model)
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    names = iter(shapes)
    nodes, constants, by_name = [], {}, {}
    refs: dict[fx.Node, Ref] = {}
    for step in program.graph.nodes:
        same = _same_value(step)
        refs[step] = Ref(step.name) if same is None else refs[same]
        if step.op == "placeholder":
            node, constant = _source(step, specs[step.name], program, model, names)
            constants.update(constant)
            if node.kind == "input":
                by_name[node.name] = shapes[node.operator]
            nodes.append(node)
        elif step.op == "call_function":
            nodes.append(_call(step, refs))
        elif step.op == "get_attr":
            raise TraceError(f"{_origin(step)}: torch.cond, torch.while_loop and their kind have no dual network")
    output = _output(program, {step.name: ref.name for step, ref in refs.items()})
    return Graph(tuple(nodes), output, constants, by_name)


def _source(
    step: fx.Node, spec: InputSpec, program: _Program, model: nn.Module, names: Iterator[str]
) -> tuple[Node, dict[str, Tensor]]:
    """Translate an input of the exported program: an argument, or one of the model's tensors lifted to one."""
    if spec.kind is InputKind.USER_INPUT:
        return Node(step.name, "input", next(names)), {}
    path = spec.target or step.name
    if _resolve(model, path) is not None:
        return Node(step.name, "attribute", path), {}
    return Node(step.name, "attribute", f"<{path}>"), {f"<{path}>": program.constants[path].detach()}


def _resolve(model: nn.Module, path: str) -> Tensor | None:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else None


def _call(step: fx.Node, refs: Mapping[fx.Node, Ref]) -> Node:
    args, kwargs = fx.node.map_arg((step.args, dict(step.kwargs)), refs.__getitem__)
    args, kwargs = plain_arguments(args), plain_arguments(kwargs)
    target = step.target
    if _is_batch_norm(target):
        target, args, kwargs = _spell_batch_norm(target, args)
    elif target is _ATEN.copy.default:  # the functional form of copy_ has no derivative in PyTorch
        target, args, kwargs = operators.assign(), (args[0], ..., args[1]), {}
    elif target in _VIEWS:  # the parts of a composition may lie in memory in another order than the operator's own result
        target = torch.reshape
    elif isinstance(target, torch._ops.OpOverload):
        target = _spelling(target) or target
    return Node(step.name, "call", target, args, kwargs, origin=_origin(step))


def _spelling(target: Any) -> Any:
    """Return the spelling of an ATen operator that has a rule: its own, or the one users write; None without a rule."""
    if dual_layers.lookup(target) is not None or dual_layers.is_shape_query(target):
        return target
    if not isinstance(target, torch._ops.OpOverload):
        return None if target is not operator.getitem else target
    name = operators.short_name(target)
    candidates = [getattr(place, name, None) for place in (torch, F)] + [name]
    return next((each for each in candidates if each is not None and dual_layers.lookup(each) is not None), None)


def _is_batch_norm(target: Any) -> bool:
    return operators.short_name(target) in ("_native_batch_norm_legit_functional", "_native_batch_norm_legit")


def _same_value(step: fx.Node) -> fx.Node | None:
    """Return the step whose value this one merely repeats, if it does."""
    if step.op != "call_function":
        return None
    if step.target is operator.getitem and step.args[1] == 0 and _is_batch_norm(step.args[0].target):
        return step.args[0]  # the spelling of users returns the first item only
    if step.target is _ATEN.slice.Tensor and step.args[2:] == (0, _END):
        return step.args[0]
    if step.target is _ATEN.slice_scatter.default and step.args[3:] == (0, _END):
        return step.args[1]
    return None


def _spell_batch_norm(target: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Spell batch norm on the batch's statistics the way users do."""
    named = dict(zip((argument.name for argument in target._schema.arguments), args, strict=False))
    statistics = (named.get("running_mean"), named.get("running_var"))
    rest = {"training": named["training"], "momentum": named["momentum"], "eps": named["eps"]}
    return F.batch_norm, (named["input"], *statistics), {"weight": named["weight"], "bias": named["bias"], **rest}


def _origin(step: fx.Node) -> str:
    """Return the user's line, or the module's path where the model has no code of its own."""
    line = origins.recorded_origin(step.meta.get("stack_trace"))
    stack = [path for path, _ in (step.meta.get("nn_module_stack") or {}).values() if not path.startswith("_empty")]
    return line or (stack[-1] if stack else "")


def _refuse_state_changes(signature: ExportGraphSignature, model: nn.Module) -> None:
    for spec in signature.output_specs:
        if spec.kind is OutputKind.BUFFER_MUTATION and not _is_running_statistic(model, spec.target):
            raise TraceError(STATE.format(spec.target))


def _is_running_statistic(model: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return name in _BATCH_NORM_BUFFERS and isinstance(model.get_submodule(owner), nn.modules.batchnorm._BatchNorm)


def _output(program: _Program, names: Mapping[str, str]) -> str:
    outputs = [spec.arg for spec in program.graph_signature.output_specs if spec.kind is OutputKind.USER_OUTPUT]
    if len(outputs) != 1 or getattr(outputs[0], "name", None) not in names:
        raise TraceError(
            f"forward returns {len(outputs)} values, not one tensor; wrap the model in a module that returns the tensor"
        )
    return names[outputs[0].name]
