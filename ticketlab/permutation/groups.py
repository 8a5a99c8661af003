"""The hidden-unit permutations that leave a network's function unchanged, found by tracing it.

``torch.export`` gives the operations of one forward pass; their rules say which axes of which parameters and buffers
must be permuted together. Residual streams come out as one group, the columns of a linear layer behind a flattening
as channels x positions, and the statistics of a batch norm go with its channels.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from ticketlab.errors import Refused
from ticketlab.functional import evaluating
from ticketlab.permutation.axes import Axes, Axis
from ticketlab.permutation.rules import RULES, opaque, pointwise

Factors = tuple[tuple[str | None, int], ...]
"""What one tensor axis is a row-major product of: (group, length), None where the order is fixed."""
Permutations = dict[str, Int[Tensor, "*replica units"]]
"""For each group, the old index of each new unit."""


@dataclass(frozen=True)
class Groups:
    """The permutable groups of hidden units of one architecture."""

    sizes: dict[str, int]
    """Units of each group, named after the first layer that computes them; in the order of the forward pass."""
    axes: dict[str, tuple[Factors, ...]]
    """For every parameter and buffer, the factors of each of its axes."""

    def of(self, name: str) -> set[str]:
        """The groups that a tensor takes part in."""
        return {group for axis in self.axes[name] for group, _ in axis if group is not None}


def groups(model: nn.Module, x: Tensor) -> Groups:
    """Trace a network and derive the permutations of hidden units that leave its function unchanged.

    Every operation ties axes together (a linear layer its input to its weight's columns, an addition its two
    summands, a grouped convolution both its ends); the axes of ``x`` and of the output, and all that an unknown
    operation touches, keep their order. What is found is always a symmetry; it can miss some: channels that are
    concatenated or zero-padded keep their order, grouped channels may trade places only as whole groups and, inside
    them, in the same way in every group.

    Args:
        model: Any module that ``torch.export`` can trace; not changed.
        x: An example input [n, ...]; its values do not matter.

    Raises:
        Refused: The module cannot be traced, or has no hidden units to permute.
    """
    with evaluating(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated internals of torch.export
        try:
            with torch.no_grad():
                model(x)  # an input that does not fit fails here, with a shorter story
            program = torch.export.export(model, (x,))
        except Exception as error:
            raise Refused(
                f"the model must be traceable by torch.export on an input of shape {tuple(x.shape)}: {error}. "
                "Check the input's shape and dtype; control flow that depends on values cannot be traced."
            ) from error
    axes, tensors, unknown = _trace(program)
    found = _named(axes, tensors)
    if not found.sizes:
        raise Refused(
            f"{type(model).__name__} must have hidden units that can be permuted: every axis is tied to the input, "
            f"the output or an operation without a rule (here: {', '.join(unknown) or 'none'}). Write such an "
            "operation as others, or give it a rule in ticketlab.permutation.rules."
        )
    return found


def _trace(program: ExportedProgram) -> tuple[Axes, dict[str, list[Axis]], list[str]]:
    """Run the graph on axes instead of numbers.

    Returns:
        The axes of every parameter and buffer that it uses, and the names of the operations that have no rule.
    """
    axes, tensors, unknown = Axes(), {}, list[str]()
    own = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    known: dict[Node, object] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            is_own = node.name in own and len(node.users) > 0
            known[node] = [axes.new(n, pinned=not is_own) for n in getattr(value, "shape", ())]
            if node.name in own:
                tensors[own[node.name]] = known[node]
        elif node.op == "output":
            for one in node.all_input_nodes:
                opaque(axes, {"output": known[one]}, ())
        elif node.op == "call_function":
            known[node] = _call(axes, node, known, unknown)
    return axes, tensors, unknown  # type: ignore[return-value]


def _call(axes: Axes, node: Node, known: Mapping[Node, object], unknown: list[str]) -> object:
    """The axes of one operation's result; a list of them where it has several results.

    The name of an operation without a rule is added to ``unknown``.
    """
    operation: object = node.target
    if not isinstance(operation, torch._ops.OpOverload):  # taking one of several results
        source, index = node.args
        return known[source][index]  # type: ignore[index]
    names = [argument.name for argument in operation._schema.arguments]
    arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    arguments = {name: arguments[name] for name in names if name in arguments}
    given = torch.fx.node.map_arg(arguments, known.__getitem__)  # type: ignore[arg-type]
    result, name = node.meta.get("val"), operation.overloadpacket.__name__
    if name == "_assert_tensor_metadata":  # torch.export's own, in front of a change of dtype
        return None
    is_pointwise = torch.Tag.pointwise in operation.tags
    rule = RULES.get(name, pointwise if is_pointwise else opaque) if isinstance(result, Tensor) else opaque
    if rule is opaque and node.all_input_nodes and name not in unknown:
        unknown.append(name)
    if not isinstance(result, Tensor):
        opaque(axes, given, ())
        return [opaque(axes, {}, tuple(getattr(r, "shape", ()))) for r in result or ()]
    return rule(axes, given, tuple(result.shape))


def _named(axes: Axes, tensors: Mapping[str, list[Axis]]) -> Groups:
    """Names for the free atoms: the layer whose first axis they are first."""
    names: dict[int, str] = {}
    for only_first in (True, False):
        for name, own in tensors.items():
            for axis in own[:1] if only_first else own:
                for atom in axes.atoms(axis):
                    if axes.is_free(atom) and atom not in names:
                        stem = name.rpartition(".")[0] or name
                        taken = sum(n.partition("#")[0] == stem for n in names.values())
                        names[atom] = f"{stem}#{taken + 1}" if taken else stem

    def factors(axis: Axis) -> Factors:
        atoms = axes.atoms(axis)
        return tuple((names.get(atom) if axes.is_free(atom) else None, axes.sizes[atom]) for atom in atoms)

    return Groups(
        {name: axes.sizes[atom] for atom, name in names.items()},
        {name: tuple(factors(axis) for axis in own) for name, own in tensors.items()},
    )
