"""The gradient of the mean loss at m * theta."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

from ticketlab.errors import Refused, nearest
from ticketlab.gradients.point import checked, live_part, slope
from ticketlab.losses import CROSS_ENTROPY, Loss
from ticketlab.state import Params, State, stack

Coordinates = Literal["live", "all"]


def gradient(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    y: Tensor,
    *,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    loss: Loss = CROSS_ENTROPY,
    coordinates: Coordinates = "live",
    batch_size: int = 500,
) -> Params:
    r"""Gradient of the mean loss of a masked network at the point m * theta, in evaluation mode.

    .. math:: g = m \odot \nabla_\theta \frac1N \sum_n \ell(f(x_n; \theta), y_n) \Big|_{m \odot \theta}

    Args:
        model: Any module that maps inputs [n, ...] to outputs [n, ...]; not changed. Parameters with
            ``requires_grad=False`` are frozen and no coordinates.
        state: One network or a stack, as for :func:`ticketlab.network.network`.
        x: Inputs, floating or tokens; shared by all replicas.
        y: Targets of the loss, such as labels in 0..classes - 1.
        masks: True = kept; stacked or not, also over the parameters of one network, as its levels. Nothing is pruned
            when None.
        buffers: In place of those in ``state``; stacked or not.
        loss: Of the task.
        coordinates: ``live``: zero where a weight is pruned, which is the ticket's gradient. ``all``: the
            derivatives in pruned weights too, at the same point.
        batch_size: Examples whose graph is held at once; changes the result by rounding alone.

    Returns:
        One tensor for each trainable parameter, in its shape and dtype, behind the replica axis of ``state`` or masks.

    Raises:
        Refused: Arguments that do not fit the model or one another, weights, inputs or derivatives that are not
            finite, outputs that depend on the rest of the batch.
    """
    if coordinates not in get_args(Coordinates):
        raise Refused(nearest("coordinates", coordinates, get_args(Coordinates)))
    net = checked(model, state, x, y, masks=masks, buffers=buffers, loss=loss, batch_size=batch_size)
    found = []
    for one in net.each():
        whole = slope(one, x, y, loss, batch_size)
        found.append(whole if coordinates == "all" else live_part(one, whole))
    return found[0] if net.replicas is None else stack(found)
