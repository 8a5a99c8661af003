"""How large the first gradient is, and whether it points where the dense one does and where training goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ticketlab.errors import Refused
from ticketlab.gradients.point import checked, flat, over_replicas, slope
from ticketlab.losses import CROSS_ENTROPY, Loss
from ticketlab.network import Network, network
from ticketlab.shown import as_line, as_table
from ticketlab.state import State


@dataclass(frozen=True)
class Alignment:
    """Size and direction of the ticket's gradient; float64, one per replica."""

    norm: Float[Tensor, "*replica"]
    """||g|| over live coordinates; its square is the gradient flow of Evci et al. 2022 (arXiv:2010.03533)."""
    n_live: Int[Tensor, "*replica"]
    """k: kept weights, and parameters without a mask."""
    norm_per_live_weight: Float[Tensor, "*replica"]
    """||g|| / sqrt(k), the root mean square over live coordinates."""
    cosine_with_dense: Float[Tensor, "*replica"]
    """Of g with the live coordinates of the gradient at theta; NaN where no dense parameters are given."""
    cosine_with_displacement: Float[Tensor, "*replica"]
    """Of -g with theta_T - m * theta on live coordinates; NaN where no end is given."""

    __repr__, _repr_html_ = as_line, as_table


def alignment(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    y: Tensor,
    *,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    loss: Loss = CROSS_ENTROPY,
    dense_params: State | Mapping[str, Tensor] | None = None,
    dense_buffers: Mapping[str, Tensor] | None = None,
    params_end: State | Mapping[str, Tensor] | None = None,
    batch_size: int = 500,
) -> Alignment:
    r"""Norm of the ticket's gradient and its cosines with the dense gradient and with the displacement.

    .. math:: \cos(g, m \odot \nabla L(\theta)), \qquad \cos(-g, m \odot (\theta_T - \theta)),
              \qquad g = m \odot \nabla L(m \odot \theta)

    A random direction has a cosine of 0 with standard deviation 1 / sqrt(k). Where a gradient or the displacement
    is zero the cosine is NaN.

    Args:
        dense_params: theta without the mask; what the parameters stored with a ticket are not, for pruned
            weights are zero there. With the replica axis of ``params_end``.
        dense_buffers: As ``buffers``, at ``dense_params``; those of a `State` or else of the ticket when None.
        params_end: theta_T, with the replica axis of ``state``, or of the masks where they alone have one.
            The others as in :func:`ticketlab.gradients.gradient`.

    Raises:
        Refused: As for the gradient, or parameters of other shapes.
    """
    net = checked(model, state, x, y, masks=masks, buffers=buffers, loss=loss, batch_size=batch_size)
    dense, end = net, net
    if dense_params is not None:
        ticket, theta = (s.buffers if isinstance(s, State) else None for s in (state, dense_params))
        held = next((b for b in (dense_buffers, theta, buffers, ticket) if b is not None), None)
        dense = _beside(net, "dense_params", network(model, dense_params, x, buffers=held))
    if params_end is not None:
        end = _beside(net, "params_end", network(model, params_end))
    found = []
    for one, whole, last in zip(net.each(), dense.each(), end.each(), strict=True):
        g = flat(one, slope(one, x, y, loss, batch_size))
        norm, n_live = g.norm(), torch.stack([live.sum() for live in one.live.values()]).sum()
        with_dense = with_displacement = torch.full_like(norm, torch.nan)
        if dense_params is not None:
            with_dense = _cosine(g, flat(one, slope(whole, x, y, loss, batch_size)))
        if params_end is not None:
            with_displacement = _cosine(-g, flat(one, last.params) - flat(one, one.params))
        found.append(Alignment(norm, n_live, norm / n_live.double().sqrt(), with_dense, with_displacement))
    return over_replicas(net, found)


def _beside(net: Network, name: str, other: Network) -> Network:
    """Other parameters of the same replicas, without a mask."""
    if other.replicas != net.replicas:
        raise Refused(f"{name} must have the replica axis of params and masks, {net.replicas}: got {other.replicas}.")
    return other


def _cosine(a: Float[Tensor, " d"], b: Float[Tensor, " d"]) -> Float[Tensor, ""]:
    return (a * b).sum() / (a.norm() * b.norm())
