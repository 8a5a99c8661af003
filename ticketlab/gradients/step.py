"""What one step of gradient descent is predicted to gain, and what it gains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor, nn

from ticketlab.derivatives import hessian_product
from ticketlab.errors import Refused
from ticketlab.gradients.point import checked, flat, live_part, over_replicas, slope
from ticketlab.losses import CROSS_ENTROPY, Loss
from ticketlab.network import Network
from ticketlab.shown import as_line, as_table
from ticketlab.state import State


@dataclass(frozen=True)
class Step:
    """Decrease of the mean loss by one step, in nats for the cross-entropy; float64, one per replica."""

    loss_nats: Float[Tensor, "*replica"]
    """Before the step."""
    first_order_nats: Float[Tensor, "*replica"]
    """Predicted by the gradient: eta ||g||^2."""
    second_order_nats: Float[Tensor, "*replica"]
    """Predicted with curvature: eta ||g||^2 - eta^2 g'Hg / 2."""
    realised_nats: Float[Tensor, "*replica"]
    """Loss before less loss after; negative where the step overshoots."""

    __repr__, _repr_html_ = as_line, as_table


def one_step(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    y: Tensor,
    *,
    learning_rate: float,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    loss: Loss = CROSS_ENTROPY,
    batch_size: int = 500,
) -> Step:
    r"""Predicted and realised decrease of the loss by one step of gradient descent in live coordinates.

    .. math:: L(\theta) - L(\theta - \eta g) = \eta \|g\|^2 - \frac{\eta^2}{2} g^T H g + O(\eta^3)

    The step is taken on, and its loss measured on, the same examples; H is the Hessian in live coordinates.
    A ReLU network may start *on* a kink, where the expansion fails at every eta: with biases at zero, a unit whose
    live inputs are all zero for an example has a pre-activation of exactly zero.

    Args:
        learning_rate: eta, positive. The others as in :func:`ticketlab.gradients.gradient`.

    Raises:
        Refused: As for the gradient, or a learning rate that is not positive and finite.
    """
    if not 0 < learning_rate < math.inf:
        raise Refused(f"learning_rate must be positive and finite: got {learning_rate}.")
    net = checked(model, state, x, y, masks=masks, buffers=buffers, loss=loss, batch_size=batch_size)
    return over_replicas(net, [_of_network(one, x, y, loss, learning_rate, batch_size) for one in net.each()])


def _of_network(net: Network, x: Tensor, y: Tensor, loss: Loss, learning_rate: float, batch_size: int) -> Step:
    g = live_part(net, slope(net, x, y, loss, batch_size))
    first = learning_rate * flat(net, g).square().sum()
    curvature = (flat(net, hessian_product(net, x, y, loss, g, batch_size)) * flat(net, g)).sum()
    second = first - learning_rate**2 / 2 * curvature
    after = replace(net, params=net.params | {name: net.params[name] - learning_rate * g[name] for name in g})
    before, behind = (at.evaluate(x, y, loss, batch_size)[0] for at in (net, after))
    return Step(before, first, second, before - behind)
