"""The operations of one forward pass, run on axes instead of numbers.

An operation with a rule follows it, an elementwise one ties the axes of its operands together, one that is made of
others is taken apart, and what is left pins all that it touches.
"""

from __future__ import annotations

import contextlib
import io
import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import decomposition_table
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from ticketlab.errors import Refused
from ticketlab.lending import attention_as_products, lent
from ticketlab.permutation.axes import Axes, Axis
from ticketlab.permutation.rules import JOINING, RULES, Result, Rule, Shape, fits, opaque, pointwise, tensors_in, tie
from ticketlab.probing import check_examples, check_output
from ticketlab.seeds import kept_generators

_REGIONS = ("wrap", "wrap_with_set_grad_enabled", "wrap_with_autocast", "tag_activation_checkpoint")
"""Higher-order operators that do nothing but call a submodule on the operands that follow it."""
_ABOUT_SHAPES = ("_assert_tensor_metadata", "sym_size", "sym_numel", "sym_stride", "sym_storage_offset")


@dataclass(frozen=True)
class Trace:
    """What ties the axes of parameters and buffers together in one forward pass."""

    axes: Axes
    tensors: dict[str, list[Axis]]
    """The axes of each parameter and buffer; one that several modules share has one set, whatever it is called."""
    read: list[str]
    """The same names in the order in which the forward pass first reads them, those that it does not read last."""
    ordered: list[str]
    """The operations that have pinned something because order matters to them, or because they have no rule."""


def trace(model: nn.Module, x: Tensor) -> Trace:
    """Trace a network on example inputs.

    Buffers that are not saved with the weights, such as the frequencies of rotary embeddings, are part of the
    architecture and keep their order.

    Raises:
        Refused: The module cannot be traced on this input, or returns something other than one tensor [n, ...].
    """
    check_examples(x)
    named = {n: t for every in (model.named_parameters, model.named_buffers) for n, t in every(remove_duplicate=False)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated internals of torch.export
        program, owner = _exported(model, x, named)
        inputs = [node for node in program.graph.nodes if node.op == "placeholder"]
        read = [id(owner[node]) for user in program.graph.nodes for node in user.all_input_nodes if node in owner]
        order = {key: place for place, key in enumerate(dict.fromkeys(read))}
        axes, ordered, saved = Axes(), list[str](), model.state_dict(keep_vars=True)
        fixed = {id(t) for name, t in named.items() if name not in saved or id(t) not in order}
        own = {id(t): [axes.new(n, pinned=id(t) in fixed) for n in t.shape] for t in named.values()}
        bound = [own[id(owner[n])] if n in owner else opaque(axes, (), _shape(n.meta.get("val"))) for n in inputs]
        opaque(axes, _run(axes, program.graph_module, bound, ordered), None)
    by_use = sorted(named, key=lambda name: order.get(id(named[name]), len(order)))
    return Trace(axes, {name: own[id(t)] for name, t in named.items()}, by_use, ordered)


def _exported(
    model: nn.Module, x: Tensor, named: Mapping[str, Tensor]
) -> tuple[ExportedProgram, dict[fx.Node, Tensor]]:
    """The graph of one forward pass, and the parameters and buffers among its inputs."""
    with lent(model, None, None), kept_generators(x.device):
        try:
            with torch.no_grad():
                y = model(x.clone())  # an input that does not fit fails here, with a shorter story
            with contextlib.redirect_stderr(io.StringIO()):  # to which a graph that cannot be traced is printed
                program = torch.export.export(model, (x,))
        except Exception as error:
            story = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise Refused(
                f"the model must be traceable by torch.export on an input of shape {tuple(x.shape)}: {story[:300]}. "
                "Check the input's shape and dtype; control flow that depends on values cannot be traced."
            ) from error
        owners = {node: _owner(program, node, named) for node in program.graph.nodes if node.op == "placeholder"}
    check_output(y, len(x))
    return program, {node: tensor for node, tensor in owners.items() if tensor is not None}


def _owner(program: ExportedProgram, node: fx.Node, named: Mapping[str, Tensor]) -> Tensor | None:
    """The parameter or buffer behind an input of the graph, be it reached by name or held in a closure."""
    signature = program.graph_signature
    name = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.get(node.name)
    if name is not None:
        return named[name]
    constant = program.constants.get(signature.inputs_to_lifted_tensor_constants.get(node.name, ""))
    if not isinstance(constant, Tensor):
        return None
    place = (constant.data_ptr(), constant.shape, constant.stride())
    return next((t for t in named.values() if (t.data_ptr(), t.shape, t.stride()) == place), None)


def _run(axes: Axes, module: fx.GraphModule, inputs: list[Any], ordered: list[str]) -> Any:
    """What a graph returns, as axes. The names of operations that pin are added to ``ordered``."""
    known: dict[fx.Node, Any] = {}
    remaining = iter(inputs)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(remaining)
        elif node.op == "get_attr":
            held = operator.attrgetter(node.target)(module)
            known[node] = opaque(axes, (), _shape(held)) if isinstance(held, Tensor) else held
        elif node.op == "call_function":
            known[node] = _call(axes, node, known, ordered)
        else:
            return fx.node.map_arg(node.args[0], known.__getitem__)
    raise AssertionError("a graph ends with its output")


def _call(axes: Axes, node: fx.Node, known: dict[fx.Node, Any], ordered: list[str]) -> Any:
    """The axes of one operation's result; a list of them where it has several, None for a number."""
    operation: Any = node.target
    args: Any = fx.node.map_arg(tuple(node.args), known.__getitem__)
    kwargs: Any = fx.node.map_arg(dict(node.kwargs), known.__getitem__)
    if operation is operator.getitem:
        return args[0][args[1]] if isinstance(args[0], list | tuple) else None
    name = getattr(getattr(operation, "overloadpacket", operation), "__name__", str(operation))
    if name in _ABOUT_SHAPES:
        return None
    if isinstance(operation, HigherOrderOperator) and name in _REGIONS:
        place = next(i for i, arg in enumerate(args) if isinstance(arg, fx.GraphModule))
        return _run(axes, args[place], list(args[place + 1 :]), ordered)
    free = [atom for x in tensors_in((args, kwargs)) for axis in x for atom in axes.atoms(axis) if axes.is_free(atom)]
    found = _followed(axes, node, args, kwargs, known) if isinstance(operation, OpOverload) else None
    if found is None:
        found = opaque(axes, (args, kwargs), _shape(node.meta.get("val")))
    if _rule(operation) not in JOINING and name not in ordered and not all(map(axes.is_free, axes.atoms(free))):
        ordered.append(name)
    return found


def _followed(axes: Axes, node: fx.Node, args: Any, kwargs: Any, known: dict[fx.Node, Any]) -> Result | None:
    """The result by a rule, or by the operations that it is made of; None where there is neither."""
    operation: Any = node.target
    arguments, shape, rule = operation._schema.arguments, _shape(node.meta.get("val")), _rule(operation)
    given = {**dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}
    written: list[Any] = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    if written and (len(written) > 1 or not isinstance(shape, tuple)):
        return None
    found = None
    if rule is not None:
        with contextlib.suppress(Exception):  # arguments that it was not written for: what it has tied only restricts
            found = rule(axes, given, shape)
    if not fits(axes, found, shape):
        found = _taken_apart(axes, node, known)
    if found is None or not fits(axes, found, shape):
        return None
    if torch.Tag.inplace_view in operation.tags:
        known[node.args[0]] = found  # type: ignore[index]
    else:
        for tensor in written:  # in place: whoever reads it again sees the result
            tie(axes, tensor, found)
    return found


def _rule(operation: Any) -> Rule | None:
    if not isinstance(operation, OpOverload):
        return None
    by_tag = pointwise if torch.Tag.pointwise in operation.tags else None
    return RULES.get(operation.overloadpacket.__name__, by_tag) if operation.namespace == "aten" else by_tag


def _taken_apart(axes: Axes, node: fx.Node, known: Mapping[fx.Node, Any]) -> Result | None:
    """An operation without a rule as the operations that it is made of; None where it is made of nothing else."""
    leaves, spec = tree_flatten((node.args, node.kwargs))
    values = [leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]
    fakes: list[Any] = [values[place] for place in places]

    def call(*tensors: Tensor) -> Any:
        own = dict(zip(places, tensors, strict=True))
        args, kwargs = tree_unflatten([own.get(place, value) for place, value in enumerate(values)], spec)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    if not fakes:
        return None
    try:
        with fakes[0].fake_mode, attention_as_products(), torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
            module = make_fx(call, decomposition_table=_decompositions())(*fakes)
    except Exception:  # whatever an operation raises that does not run without values
        return None
    if any(inner.target is node.target for inner in module.graph.nodes):
        return None
    return _run(axes, module, [known[leaves[place]] for place in places], [])


@cache
def _decompositions() -> dict[OpOverload, Any]:
    return {
        operation: parts
        for operation, parts in decomposition_table.items()
        if isinstance(operation, OpOverload)
        and operation.overloadpacket.__name__ not in RULES
        and torch.Tag.pointwise not in operation.tags
    }


def _shape(value: Any) -> Shape:
    """Lengths of a tensor's axes, 0 for one that depends on values; a list for several tensors, None for a number."""
    if isinstance(value, Tensor):
        return tuple(n if isinstance(n, int) else 0 for n in value.shape)
    return [_shape(one) for one in value] if isinstance(value, list | tuple) else None
