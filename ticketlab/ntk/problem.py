"""What a kernel is taken of: one network at the point m * theta, and the coordinates it is differentiated in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ticketlab.errors import Refused
from ticketlab.network import Network, network
from ticketlab.probing import attempt
from ticketlab.shown import as_line, as_table
from ticketlab.state import State

Coordinates = Literal["live", "all"] | Mapping[str, Tensor]
Outputs = Literal["full", "trace", "sum_logits"]


@dataclass(frozen=True)
class Problem:
    """One network without a replica axis, and its coordinates."""

    net: Network
    live: dict[str, Tensor]
    """The coordinates: a bool tensor in the shape of each parameter that has any."""
    sum_logits: bool
    """Differentiate the sum of the outputs, as if it were the one output."""

    __repr__, _repr_html_ = as_line, as_table

    @property
    def dtype(self) -> torch.dtype:
        """The widest of the coordinates' dtypes: that of the kernel."""
        return reduce(torch.promote_types, (self.net.params[name].dtype for name in self.live))

    @property
    def device(self) -> torch.device:
        return self.net.device

    def forward(self, x: Tensor) -> Float[Tensor, "n out"]:
        """f(x) while the network is lent: axes after the first are flattened into one."""
        y = attempt(self.net.model, x, writes=not self.net.writes_input).reshape(len(x), -1)
        return y.sum(1, keepdim=True) if self.sum_logits else y


def problems(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    coordinates: Coordinates = "live",
    buffers: Mapping[str, Tensor] | None = None,
    sum_logits: bool = False,
) -> tuple[list[Problem], bool]:
    """One problem per replica, and whether there is a replica axis at all.

    The axis may be that of the parameters, of the masks (the levels of one network), of coordinates or buffers, or
    of several of them.

    Raises:
        Refused: As `network` on all inputs; coordinates that do not fit, or axes of different lengths; no parameter to
            differentiate in, or complex numbers.
    """
    net = network(model, state, _all_inputs(x1, x2), masks=masks, buffers=buffers)
    own = {name: net.params[name].shape[net.replicas is not None :] for name in net.trainable}
    if not own:
        raise Refused(
            "the kernel needs a parameter to differentiate in: every one has requires_grad=False, and frozen "
            "parameters are not coordinates. Call model.requires_grad_(True)."
        )
    if isinstance(coordinates, Mapping):
        _check_coordinates(own, coordinates)
    elif coordinates not in ("live", "all"):
        raise Refused(f"coordinates must be 'live', 'all' or a dict of bool tensors: got {coordinates!r}.")
    wanted = coordinates if isinstance(coordinates, Mapping) else {}
    axes = {len(mask) for name, mask in wanted.items() if mask.ndim > len(own[name])}
    axes |= set() if net.replicas is None else {net.replicas}
    if len(axes) > 1:
        raise Refused(
            f"params, masks, coordinates and buffers must share one replica axis: got lengths {sorted(axes)}."
        )
    nets = list(net.each()) if net.replicas is not None else [net] * max(axes, default=1)
    found = [Problem(one, _coordinates(one, coordinates, r), sum_logits) for r, one in enumerate(nets)]
    unreal = [name for name in found[0].live if net.params[name].is_complex()]
    if unreal:
        raise Refused(
            f"coordinates must be real: {unreal} are complex. Hold each as a real tensor of two parts "
            "(torch.view_as_real), or freeze it with requires_grad_(False)."
        )
    return found, bool(axes)


def _coordinates(net: Network, coordinates: Coordinates, r: int) -> dict[str, Tensor]:
    if coordinates == "live":
        return net.live
    if coordinates == "all":
        return {name: torch.ones_like(mask) for name, mask in net.live.items()}
    shapes = {name: net.params[name].ndim for name in coordinates}
    chosen = {name: mask[r] if mask.ndim > shapes[name] else mask for name, mask in coordinates.items()}
    return {name: mask.to(net.device) for name, mask in chosen.items()}


def _all_inputs(x1: Tensor, x2: Tensor | None) -> Tensor:
    """Both sides one after another, so that the second is checked as the first is."""
    for x in (x1,) if x2 is None else (x1, x2):
        if not isinstance(x, Tensor) or x.ndim == 0 or len(x) == 0:
            return x  # `network` says what is wrong
        if x.is_inference():
            raise Refused("inputs must be made outside of torch.inference_mode, for derivatives: pass x.clone().")
    if x2 is None:
        return x1
    if x1.shape[1:] != x2.shape[1:] or x1.dtype != x2.dtype or x1.device != x2.device:
        raise Refused(
            "x1 and x2 must hold inputs of one shape and dtype on one device: got "
            f"{tuple(x1.shape)} {x1.dtype} {x1.device} and {tuple(x2.shape)} {x2.dtype} {x2.device}. "
            "Only the first axis may differ."
        )
    return torch.cat([x1, x2])


def _check_coordinates(own: Mapping[str, torch.Size], coordinates: Mapping[str, Tensor]) -> None:
    if not coordinates:
        raise Refused(f"coordinates must name at least one trainable parameter, among {sorted(own)}: got none.")
    for name, mask in coordinates.items():
        if name not in own:
            raise Refused(f"coordinates must name trainable parameters: {name!r} is not one of {sorted(own)}.")
        shape = tuple(own[name])
        if mask.dtype != torch.bool or shape not in (tuple(mask.shape), tuple(mask.shape[1:])):
            raise Refused(
                f"coordinates[{name!r}] must be bool of shape {shape} or [replica, *{shape}]: "
                f"got {mask.dtype} {tuple(mask.shape)}."
            )
