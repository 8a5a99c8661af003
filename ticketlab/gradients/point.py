"""What all measures of gradients share: the networks and data, checked, and flat vectors in live coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ticketlab.derivatives import gradient
from ticketlab.errors import Refused, check_count
from ticketlab.losses import Loss
from ticketlab.network import Network, network, output_shape
from ticketlab.state import Params, State, check_finite

T = TypeVar("T")


def checked(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Tensor,
    y: Tensor,
    *,
    masks: Mapping[str, Tensor] | None,
    buffers: Mapping[str, Tensor] | None,
    loss: Loss,
    batch_size: int = 1,
) -> Network:
    """The network at m * theta, or a stack of them, that takes these examples.

    Raises:
        Refused: As `network`; targets that do not fit; no trainable parameter; batches that hold nothing.
    """
    check_count("batch_size", batch_size, 1, 10**18)
    net = network(model, state, x, masks=masks, buffers=buffers)
    if not net.trainable:
        raise Refused("a gradient needs a trainable parameter: all have requires_grad=False. Set it to True.")
    loss.check(y, len(x), output_shape(net, x))
    return net


def slope(net: Network, x: Tensor, y: Tensor, loss: Loss, batch_size: int) -> Params:
    """The gradient of one network in all trainable coordinates, finite."""
    found = gradient(net, x, y, loss, batch_size=batch_size)
    check_finite("the gradient", found)
    return found


def live_part(net: Network, tensors: Mapping[str, Tensor]) -> Params:
    """Zero at pruned weights, whatever stands there."""
    return {name: torch.where(live, tensors[name], 0) for name, live in net.live.items()}


def flat(net: Network, tensors: Mapping[str, Tensor]) -> Float[Tensor, " d"]:
    """Trainable parameters of one network one after the other, pruned coordinates at 0, in float64."""
    return torch.cat([part.double().flatten() for part in live_part(net, tensors).values()])


def over_replicas(net: Network, results: Sequence[T]) -> T:
    """The only one of several equal dataclasses, or one whose tensors have the replica axis first."""
    if net.replicas is None:
        return results[0]
    columns = {f.name: [getattr(one, f.name) for one in results] for f in fields(results[0])}  # type: ignore[arg-type]
    values = {name: torch.stack(c) if isinstance(c[0], Tensor) else c[0] for name, c in columns.items()}
    return type(results[0])(**values)
