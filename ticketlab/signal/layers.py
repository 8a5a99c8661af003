"""How a signal travels through the layers of a real network: activations forward, gradients backward."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ticketlab.derivatives import pullback
from ticketlab.errors import Refused
from ticketlab.losses import CROSS_ENTROPY, Loss
from ticketlab.masks import prunable
from ticketlab.network import Network, network, output_shape
from ticketlab.signal.section import check_names, check_outputs, hooked
from ticketlab.state import State


def layer_statistics(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    y: Tensor | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    layers: Sequence[str] | None = None,
    loss: Loss = CROSS_ENTROPY,
) -> pd.DataFrame:
    r"""Activation mean, variance and correlation, and gradient norm, at the output of every layer.

    For the outputs h of a layer (pre-activations, if it is linear or a convolution), over units and inputs:

    - ``mean`` and ``variance`` of h;
    - ``second_moment``, the mean of h^2: what mean-field theory calls q;
    - ``correlation``, the mean over pairs of inputs of h_a . h_b / (|h_a| |h_b|), uncentred: the theory's c. With
      two inputs it is theirs; NaN with one, or where an input's h is all zero;
    - ``gradient_norm``, with targets: the root mean square over inputs of |d loss_a / d h_a|, the loss of each
      input its own, in nats for the cross-entropy.

    Args:
        model: Lends its forward pass; not changed.
        state: One network or a stack, as for :func:`ticketlab.network.network`.
        x: Inputs, floating or tokens, shared by all replicas.
        y: Targets of the loss, for ``gradient_norm``.
        masks: True = kept; stacked or not.
        buffers: In place of those in ``state``; stacked or not.
        layers: Names of modules. When None, those that hold prunable weights, tied ones included, and return one
            tensor: attention, which returns a tuple, has no row, nor have parts of it that do not run as modules.
        loss: Of the task.

    Returns:
        One row per replica (column ``replica``, for a stack alone) and layer, in order (``depth`` from 1); a model
        that is itself a layer has the name "".

    Raises:
        Refused: Arguments that do not fit the model, an unknown layer, one that does not run exactly once or does not
            return a tensor [n, ...], targets that do not go with the inputs or the outputs.
    """
    net = network(model, state, x, masks=masks, buffers=buffers)
    check_names(model, layers or (), "layer")
    if y is not None:
        loss.check(y, len(x), output_shape(net, x))
    rows = []
    for replica, one in enumerate(net.each()):
        with one.lent():
            names = _named(one, x, layers)
            found = _of_network(one, x, y, names, loss)
        for depth, (name, row) in enumerate(found.items(), start=1):
            rows.append(({} if net.replicas is None else {"replica": replica}) | {"layer": name, "depth": depth} | row)
    return pd.DataFrame(rows)


@torch.no_grad()
def _named(net: Network, x: Tensor, layers: Sequence[str] | None) -> list[str]:
    """The layers to report, each seen to return one entry per input whatever the number of inputs."""
    for some in (x[[0, -1]], x[[0, -1, 0]]):
        seen: dict[str, list[object]] = {name: [] for name in (_weighted(net.model) if layers is None else layers)}
        with hooked(net.model, seen, lambda name, output: seen[name].append(output)):  # noqa: B023
            net.forward(some)
        if layers is None:
            seen = {name: found for name, found in seen.items() if found and isinstance(found[0], Tensor)}
            if not seen:
                raise Refused("no module with prunable weights returns one tensor: pass the names of others as layers.")
        check_outputs("layer", seen, len(some))
    return list(seen)


def _of_network(net: Network, x: Tensor, y: Tensor | None, names: Sequence[str], loss: Loss) -> dict[str, dict]:
    outputs: dict[str, Tensor] = {}

    def note(name: str, output: Tensor) -> Tensor:
        if y is not None and not output.requires_grad:  # nothing with a gradient comes before it
            output = output.detach().requires_grad_()
        outputs[name] = output
        return output.clone()  # an in-place activation that follows must not write into it

    with torch.set_grad_enabled(y is not None), hooked(net.model, names, note):
        values = net.forward(x)
    rows = {name: _statistics(outputs[name].detach()) for name in names}
    if y is not None:
        slopes = pullback(loss.each(values, y).loss.sum(), [outputs[name] for name in names])
        for name, slope in zip(names, slopes, strict=True):
            rows[name]["gradient_norm"] = float(slope.reshape(len(x), -1).double().square().sum(1).mean().sqrt())
    return rows


def _weighted(model: nn.Module) -> list[str]:
    """The modules that hold a prunable weight, of their own, tied to another's or behind a parametrization."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # how much of a model is prunable is no matter here
        weights = {id(model.get_parameter(name)) for name in prunable(model)}
    holders = [name for name, m in model.named_modules() if weights & {id(p) for p in m.parameters(recurse=False)}]
    return [*dict.fromkeys(re.split(r"(?:^|\.)parametrizations\.", name)[0] for name in holders)]


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
