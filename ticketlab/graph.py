"""What one forward pass tells of a network's wiring: its output layer, its live paths, and how often a weight is used.

Nothing is read off the order of registration or the types of modules: the autograd graph and the calls to matrix
products say it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ticketlab import masks as mask_ops
from ticketlab.errors import Refused
from ticketlab.lending import attention_as_products, lent
from ticketlab.probing import attempt, backward, check_examples, probe
from ticketlab.seeds import kept_generators, stream
from ticketlab.state import Masks, Params, state


def output_layers(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Names of the matrices that make the outputs: those with no other matrix between them and an output.

    Usually one, the last linear layer; several where a network has parallel heads. A matrix that is tied to an
    embedding counts as any other.

    Args:
        model: Any module.
        x: Inputs [n, ...]; a few of them are used.

    Raises:
        Refused: A forward pass that records no derivative of a matrix.
    """
    with lent(model, None, None), attention_as_products(), torch.enable_grad(), kept_generators():
        leaf = probe(x)
        y = attempt(model, leaf.requires_grad_(leaf.is_floating_point()))
        names = {id(p): n for n, p in model.named_parameters()}
        matrices = {n for n, p in model.named_parameters() if p.ndim > 1}
        found = _nearest_matrices(y.grad_fn, names, matrices) if y.grad_fn else ()
    if not found:
        raise Refused("the output must depend on a matrix of the model, differentiably: no graph leads to one.")
    order = [n for n in names.values() if n in found]
    return tuple(order)


def _nearest_matrices(root: Any, names: Mapping[int, str], matrices: set[str]) -> set[str]:
    """Matrices used by a node that is reached from the root without passing another matrix's use."""
    below = leaves_below(root)
    found, stack, seen = set[str](), [root], {root}
    while stack:
        node = stack.pop()
        children = [child for child, _ in node.next_functions if child is not None]
        used = set[str]().union(*(_matrices_alone(below[child], names, matrices) for child in children))
        alone = _matrices_alone(below[node], names, matrices) and len(children) == len(node.next_functions)
        if used and not alone:
            found |= used
            continue
        _refuse_hidden(node)
        for child in children:
            if child not in seen:
                seen.add(child)
                stack.append(child)
    return found


def _refuse_hidden(node: Any) -> None:
    if node.name() == "CheckpointFunctionBackward":
        raise Refused(
            "layers are told apart by the autograd graph, of which a checkpoint with use_reentrant=True hides a part: "
            "use checkpoint(..., use_reentrant=False)."
        )


def _matrices_alone(leaves: frozenset[int], names: Mapping[int, str], matrices: set[str]) -> set[str]:
    """The matrices of a branch of the graph that is computed from the parameters of one module alone."""
    known = [names[leaf] for leaf in leaves if leaf in names]
    of_one_module = len(known) == len(leaves) and len({owner(name) for name in known}) == 1
    return matrices.intersection(known) if of_one_module else set()


def owner(name: str) -> str:
    """The module that a parameter belongs to, also where a parametrization holds it."""
    module, parametrized, _ = f".{name}".partition(".parametrizations.")
    return module[1:] if parametrized else name.rpartition(".")[0]


def input_layers(model: nn.Module, x: Tensor, names: Sequence[str]) -> tuple[str, ...]:
    """Those of the named matrices that meet inputs which no other of them has touched; usually one.

    Args:
        model: Any module.
        x: Inputs [n, ...]; a few of them are used.
        names: Matrices, such as the prunable ones. What comes before them (an embedding, a norm) does not count.
    """
    with lent(model, None, None), attention_as_products(), torch.enable_grad(), kept_generators():
        leaf = probe(x)
        y = attempt(model, leaf.requires_grad_(leaf.is_floating_point()))
        own = {id(p): n for n, p in model.named_parameters()}
        below = leaves_below(y.grad_fn) if y.grad_fn else {}
    found = set[str]()
    for node in below:
        _refuse_hidden(node)
        children = [below[child] for child, _ in node.next_functions if child is not None]
        used = set[str]().union(*(_matrices_alone(leaves, own, set(names)) for leaves in children))
        # What the matrices meet here: leaves of other modules, and the inputs.
        met = {own.get(leaf, "") for leaves in children for leaf in leaves}
        met = {name for name in met if not name or owner(name) not in {owner(n) for n in used}}
        if met and not met.intersection(names):
            found |= used
    return tuple(n for n in own.values() if n in found)


def leaves_below(root: Any) -> dict[Any, frozenset[int]]:
    """For every node of a graph, the ids of the leaf tensors that it is computed from."""
    below: dict[Any, frozenset[int]] = {}
    stack = [(root, False)]
    while stack:
        node, ready = stack.pop()
        if node in below:
            continue
        children = [child for child, _ in node.next_functions if child is not None]
        if not ready:
            stack.append((node, True))
            stack += [(child, False) for child in children if child not in below]
        else:
            own = frozenset({id(node.variable)}) if hasattr(node, "variable") else frozenset()
            below[node] = own.union(*(below[child] for child in children))
    return below


def effective_masks(model: nn.Module, masks: Mapping[str, Tensor], x: Tensor) -> Masks:
    """The kept weights that lie on a path of kept weights from an input to an output (Vysogorets & Kempe 2023).

    A weight is on such a path where the derivative of the outputs in it is not zero for random positive weights
    without biases; the network's own values do not matter. An activation with f(0) != 0 feeds what follows it. A pool,
    or a ReLU behind a norm, shuts some paths at one draw: it is drawn again until several in a row open no new one.

    Args:
        model: Any module; its own weights are not looked at.
        masks: One network's, True = kept.
        x: Inputs, for their shape; tokens for their values too.

    Raises:
        Refused: Masks that do not fit the model, or are a stack's; inputs that it does not take; no derivative.
    """
    mask_ops.validate(model, masks, stacked=False)
    check_examples(x)
    found = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    known, quiet, limit, draw, dtype = 0, 0, 4, 0, torch.float64
    while known < int(mask_ops.kept(masks)) and quiet < limit:
        try:
            gradient = _flow(model, masks, x, draw, dtype)
        except Refused:  # a model that casts by itself
            dtype, failed = next(model.parameters()).dtype, dtype
            if dtype == failed:
                raise
            continue
        found = {name: found[name] | ((gradient[name] != 0) & mask) for name, mask in masks.items()}
        if draw % 2 == 0 and any(bool((g < 0).any()) for g in gradient.values()):
            limit = 24  # behind a norm either sign may be shut
        before, known, draw = known, int(mask_ops.kept(found)), draw + 1
        quiet = quiet + 1 if known == before else 0
    return found


def _flow(model: nn.Module, masks: Mapping[str, Tensor], x: Tensor, draw: int, dtype: torch.dtype) -> Params:
    """Derivatives of a random sum of outputs in the masked weights, at random positive ones.

    Scales of norms have either sign at odd draws.
    """
    generator = stream("live paths", draw)
    own = state(model).to(x.device, dtype)

    def positive(like: Tensor) -> Tensor:
        return (0.5 + torch.rand(like.shape, generator=generator, dtype=dtype)).to(like.device)

    def scale(like: Tensor) -> Tensor:
        negative = torch.rand(like.shape, generator=generator, dtype=dtype) < 0.5 * (draw % 2)
        return positive(like) * (1 - 2 * negative.to(like.device, dtype))

    params = {n: _flowing(n, p, positive if p.ndim > 1 else scale) for n, p in own.params.items()}
    for name, mask in masks.items():
        weight = positive(mask) * mask
        params[name] = weight / weight.flatten(1).sum(1).amax().clamp(min=1e-30)  # no flow grows from layer to layer
    buffers = {n: _flowing(n, b, torch.ones_like) for n, b in own.buffers.items()}
    inputs = positive(torch.stack([x[0]] * 4)) ** 4 if x.is_floating_point() else probe(x)
    with lent(model, params, buffers), attention_as_products(), torch.enable_grad(), kept_generators():
        weights = {n: p for n, p in model.named_parameters() if n in masks}
        for weight in weights.values():
            weight.requires_grad_()
        y = attempt(model, inputs.requires_grad_(inputs.is_floating_point()))
        if y.requires_grad:
            backward((y * positive(y)).sum(), model)  # autograd.grad would not go into a reentrant checkpoint
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in weights.items()}


def _flowing(name: str, tensor: Tensor, positive: Any) -> Tensor:
    """What is no masked weight: nothing adds to the flow that does not come from an input."""
    own = name.rpartition(".")[2]
    if not tensor.is_floating_point():
        return tensor
    if "bias" in own or own == "running_mean":
        return torch.zeros_like(tensor)
    return positive(tensor) if own in ("running_var", "weight", "scale", "gamma") else tensor


def refuse_cut(model: nn.Module, masks: Mapping[str, Tensor], x: Tensor) -> Masks:
    """The effective masks, or a refusal where no live path is left from an input to an output.

    Raises:
        Refused: A network cut in two: its outputs are the same for every input.
    """
    live = effective_masks(model, masks, x)
    if not any(bool(mask.any()) for mask in live.values()):
        empty = [name for name, mask in masks.items() if not mask.any()]
        raise Refused(
            f"pruning must leave a live path from an input to an output: {int(mask_ops.kept(masks))} weights leave "
            f"none, and empty are {empty}. Prune fewer levels, a smaller fraction, or by layer."
        )
    return live


def uses(model: nn.Module, x: Tensor, names: Sequence[str]) -> dict[str, float]:
    """How often one example uses each weight: 1 in a linear layer, height * width in a convolution.

    Counted in the matrix products and convolutions of a forward pass of ``x[:1]``, whatever module or function makes
    them: a weight used twice, tied, sliced, scaled by a parametrization or multiplied by hand counts for what is
    computed with it. Products of a module's own parameters and buffers alone, such as for a norm, do not count.
    """
    with lent(model, None, None), kept_generators():
        named = dict(model.named_parameters())
        with torch.enable_grad(), attention_as_products(), _Products(model, names) as products:  # no fused inference
            attempt(model, x[:1])
    return {name: products.macs[name] / named[name].numel() for name in names}


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Products(TorchDispatchMode):
    """Multiply-adds of every product in which a weight takes part, itself or what is computed from it alone."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        tensors = (*model.named_parameters(), *model.named_buffers())
        self.sizes = {name: t.numel() for name, t in tensors if name in names}
        self.weights = {_place(t): name for name, t in tensors if name in names}
        self.owners = {_place(t): frozenset({owner(name)}) for name, t in tensors}  # of what no input has touched
        self.held: list[Tensor] = []  # so that no other tensor gets its place
        self.macs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv"):
            a, b = args[-2:] if name in ("mm", "bmm", "mv") else args[1:3]
            macs = math.prod(a.shape) * (b.shape[-1] if b.ndim > 1 else 1)
            self._note(a, b, macs)
            self._note(b, a, macs)
        elif "convolution" in name:
            x, weight = args[:2]
            transposed = bool(args[6]) if len(args) > 6 else False
            self._note(weight, x, (x if transposed else output).numel() * math.prod(weight.shape[1:]))
        elif name == "mkldnn_rnn_layer":
            for weight in args[1:3]:
                self._note(weight, args[0], math.prod(args[0].shape[:2]) * weight.numel())
        elif name == "_trilinear":
            self._note(args[1], args[0], output.numel() * math.prod(args[1].shape[1:]))
        self._follow([t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)], output)
        return output

    def _note(self, weight: Tensor, other: Tensor, macs: int) -> None:
        name = self.weights.get(_place(weight))
        if name is not None and self.owners.get(_place(other)) != {owner(name)}:
            self.macs[name] += macs

    def _follow(self, operands: list[Tensor], output: Any) -> None:
        """What is computed from parameters and buffers alone, and which of the weights it stands for."""
        places = [_place(t) for t in operands]
        if not places or not all(place in self.owners for place in places):
            return
        for tensor in (t for t in tree_leaves(output) if isinstance(t, Tensor)):
            self.held.append(tensor)
            self.owners.setdefault(_place(tensor), frozenset[str]().union(*(self.owners[p] for p in places)))
            for name in {self.weights[p] for p in places if p in self.weights}:
                if tensor.numel() == self.sizes[name]:
                    self.weights.setdefault(_place(tensor), name)
