"""How a signal travels through the layers of a real network: activations forward, gradients backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from ticketlab.errors import Refused, nearest
from ticketlab.functional import evaluating
from ticketlab.gradients.point import check_classes, check_labels
from ticketlab.masks import prunable
from ticketlab.signal.section import check_output, hooked, networks
from ticketlab.state import State


def layer_statistics(
    model: nn.Module,
    params: Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, " n"] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    *,
    layers: Sequence[str] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> pd.DataFrame:
    r"""Activation mean, variance and correlation, and gradient norm, at the output of every layer.

    For the outputs h of a layer (pre-activations, if it is linear or a convolution), over units and inputs:

    - ``mean`` and ``variance`` of h;
    - ``second_moment``, the mean of h^2: what mean-field theory calls q;
    - ``correlation``, the mean over pairs of inputs of h_a . h_b / (|h_a| |h_b|), uncentred: the theory's c. With
      two inputs it is theirs; NaN with one, or where an input's h is all zero;
    - ``gradient_norm``, with labels: the root mean square over inputs of |d loss_a / d h_a|, the loss of each
      input its own cross-entropy in nats.

    Args:
        model: Lends its forward pass; not changed.
        params: Its parameters, or a stack of them.
        x: Inputs, shared by all replicas.
        y: Labels in 0..classes - 1, for ``gradient_norm``.
        masks: True = kept; stacked or not.
        layers: Names of modules. When None, those that hold prunable weights, tied ones included, and return one
            tensor: attention, which returns a tuple, has no row, nor have parts of it that do not run as modules.
        buffers: The model's own when None; otherwise with the replica axis of ``params``.

    Returns:
        One row a replica (column ``replica``, for a stack alone) and layer, in order (``depth`` from 1); a model
        that is itself a layer has the name "".

    Raises:
        Refused: Arguments that do not fit the model, an unknown layer, one that does not run exactly once, batch
            norm in training mode, labels that do not go with the inputs or the outputs.
    """
    states, stacked = networks(model, params, x, masks, buffers)
    known = [name for name, _ in model.named_modules()]
    for name in layers or ():
        if name not in known:
            raise Refused(nearest("layer", name, [n for n in known if n] or ['""']))
    if y is not None:
        check_labels(x, y)
    rows = []
    for replica, state in enumerate(states):
        for depth, (name, row) in enumerate(_of_network(model, state, x, y, layers).items(), start=1):
            rows.append(({"replica": replica} if stacked else {}) | {"layer": name, "depth": depth} | row)
    return pd.DataFrame(rows)


def _of_network(
    model: nn.Module, state: State, x: Tensor, y: Tensor | None, layers: Sequence[str] | None
) -> dict[str, dict[str, float]]:
    outputs: dict[str, list[Tensor]] = {name: [] for name in (_weighted(model) if layers is None else layers)}

    def note(name: str, output: Tensor) -> Tensor | None:
        outputs[name].append(output)
        # An in-place activation that follows must not write into it.
        return output.clone() if isinstance(output, Tensor) else None

    with torch.set_grad_enabled(y is not None), evaluating(model), hooked(model, outputs, note):
        entering = x.detach().clone().requires_grad_(y is not None)
        logits = functional_call(model, {**state.params, **state.buffers}, (entering,))
    if layers is None:
        outputs = {name: found for name, found in outputs.items() if found and isinstance(found[0], Tensor)}
        if not outputs:
            raise Refused("no module with prunable weights returns one tensor: pass the names of others as layers.")
    for name, found in outputs.items():
        if len(found) != 1:
            raise Refused(f"layer {name!r} must run once in a forward pass: it runs {len(found)} times.")
        check_output("layer", name, found[0], len(x))
    rows = {name: _statistics(found[0].detach()) for name, found in outputs.items()}
    if y is not None:
        if logits.ndim != 2:
            raise Refused(f"gradient_norm needs a model that returns logits [n, classes]: got {logits.shape}.")
        check_classes(y, logits.shape[1])
        loss = F.cross_entropy(logits, y.long(), reduction="sum")
        grads = torch.autograd.grad(loss, [found[0] for found in outputs.values()])
        for name, grad in zip(outputs, grads, strict=True):
            rows[name]["gradient_norm"] = float(grad.reshape(len(x), -1).double().square().sum(1).mean().sqrt())
    return rows


def _weighted(model: nn.Module) -> list[str]:
    """The modules that hold a prunable weight, of their own or tied to another's."""
    weights = {id(model.get_parameter(name)) for name in prunable(model)}
    return [name for name, m in model.named_modules() if weights & {id(p) for p in m.parameters(recurse=False)}]


def _statistics(h: Tensor) -> dict[str, float]:
    h = h.reshape(len(h), -1).double()
    n = len(h)
    units = h / h.norm(dim=1, keepdim=True)
    pairs = (units.sum(0).square().sum() - n) / (n * (n - 1)) if n > 1 else torch.tensor(float("nan"))
    return {
        "mean": float(h.mean()),
        "variance": float(h.var(correction=0)),
        "second_moment": float(h.square().mean()),
        "correlation": float(pairs),
    }
