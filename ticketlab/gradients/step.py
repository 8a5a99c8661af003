"""What one step of gradient descent is predicted to gain, and what it gains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from ticketlab.errors import Refused
from ticketlab.gradients.gradient import curvature_along, gradient_at, live_part
from ticketlab.gradients.point import check_data, point


@dataclass(frozen=True)
class Step:
    """Decrease of the mean cross-entropy by one step, in nats; float64, one a replica."""

    loss_nats: Float[Tensor, "*replica"]
    """Before the step."""
    first_order_nats: Float[Tensor, "*replica"]
    """Predicted by the gradient: eta ||g||^2."""
    second_order_nats: Float[Tensor, "*replica"]
    """Predicted with curvature: eta ||g||^2 - eta^2 g'Hg / 2."""
    realised_nats: Float[Tensor, "*replica"]
    """Loss before less loss after; negative where the step overshoots."""


def one_step(
    model: nn.Module,
    params: Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, " n"],
    *,
    learning_rate: float,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
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
    at = point(model, params, masks, buffers)
    check_data(at, x, y, batch_size)
    g = live_part(at, gradient_at(at, x, y, batch_size))
    first = learning_rate * at.flat(g).square().sum(-1)
    second = first - learning_rate**2 / 2 * curvature_along(at, g, x, y, batch_size)
    after = {name: at.weights[name] - learning_rate * g[name] if name in g else w for name, w in at.weights.items()}
    before, behind = (at.mean_loss(weights, x, y, batch_size) for weights in (at.weights, after))
    return Step(before, first, second, before - behind)
