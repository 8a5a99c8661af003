"""The gradient of the mean cross-entropy at m * theta, and the curvature along a direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ticketlab.errors import Refused, nearest
from ticketlab.gradients.point import Point, check_data, point
from ticketlab.state import Params

Coordinates = Literal["live", "all"]


def gradient(
    model: nn.Module,
    params: Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, " n"],
    *,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    coordinates: Coordinates = "live",
    batch_size: int = 500,
) -> Params:
    r"""Gradient of the mean cross-entropy of a masked network at the point m * theta, in evaluation mode.

    .. math:: g = m \odot \nabla_\theta \frac1N \sum_n \ell(f(x_n; \theta), y_n) \Big|_{m \odot \theta}

    Args:
        model: Any module that maps inputs [n, ...] to logits [n, classes]; not changed. Parameters with
            ``requires_grad=False`` are frozen and no coordinates.
        params: The model's parameters, or a stack of replicas.
        x: Inputs, in the dtype of ``params`` or integer tokens; shared by all replicas.
        y: Labels in 0..classes - 1.
        masks: True = kept, one for each prunable parameter; stacked or not, also over the parameters of one
            network, as its levels. Nothing is pruned when None.
        buffers: The model's own when None; otherwise with the replica axis of ``params``.
        coordinates: ``live``: zero where a weight is pruned, which is the ticket's gradient. ``all``: the
            derivatives in pruned weights too, at the same point.
        batch_size: Examples whose graph is held at once; changes the result by rounding alone.

    Returns:
        One tensor for each trainable parameter, in its shape and dtype, behind the replica axis of ``params`` or masks.

    Raises:
        Refused: Labels that do not go with the inputs or the outputs, no examples, masks that do not fit, weights
            that are not finite, outputs that depend on the rest of the batch: through batch norm in training mode, say.
    """
    if coordinates not in get_args(Coordinates):
        raise Refused(nearest("coordinates", coordinates, get_args(Coordinates)))
    at = point(model, params, masks, buffers)
    check_data(at, x, y, batch_size)
    found = gradient_at(at, x, y, batch_size)
    return found if coordinates == "all" else live_part(at, found)


def live_part(at: Point, tensors: Mapping[str, Tensor]) -> Params:
    """Zero at pruned weights, whatever stands there."""
    return {name: torch.where(live, tensors[name], 0) for name, live in at.live.items()}


def gradient_at(at: Point, x: Tensor, y: Tensor, batch_size: int) -> Params:
    """In all trainable coordinates. The loss is summed over replicas, so their gradients do not mix."""
    total = {name: torch.zeros_like(at.weights[name]) for name in at.live}
    for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
        leaves = at.leaves()
        with torch.enable_grad():
            loss = at.loss_sum(leaves, xs, ys).sum() / len(y)
        parts = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        total = {name: total[name] + part for name, part in zip(leaves, parts, strict=True)}
    return total


def curvature_along(
    at: Point, direction: Mapping[str, Tensor], x: Tensor, y: Tensor, batch_size: int
) -> Float[Tensor, "*replica"]:
    """v' H v of the mean cross-entropy, by a Hessian-vector product (Pearlmutter 1994); v zero at pruned weights."""
    total = torch.zeros((), dtype=torch.float64, device=y.device)
    for xs, ys in zip(x.split(batch_size), y.split(batch_size), strict=True):
        leaves = at.leaves()
        points = list(leaves.values())
        with torch.enable_grad():
            loss = at.loss_sum(leaves, xs, ys).sum() / len(y)
            first = torch.autograd.grad(loss, points, create_graph=True, materialize_grads=True)
            slope = torch.stack([(g * direction[n]).sum() for n, g in zip(leaves, first, strict=True)]).sum()
        product = torch.autograd.grad(slope, points, materialize_grads=True)
        total = total + (at.flat(dict(zip(leaves, product, strict=True))) * at.flat(direction)).sum(-1)
    return total
