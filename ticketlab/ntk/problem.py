"""What a kernel is taken of: one network at the point m * theta, and the coordinates it is differentiated in.

Every question about the arguments is settled here, so that the methods may trust what they are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ticketlab import masks as masks_
from ticketlab.errors import Refused
from ticketlab.functional import evaluating, masked, n_replicas, refuse_batch_statistics
from ticketlab.state import Buffers, Params

Coordinates = Literal["live", "all"] | Mapping[str, Tensor]
Outputs = Literal["full", "trace", "sum_logits"]


@dataclass(frozen=True)
class Problem:
    """One network: no replica axis left, nothing attached to a graph."""

    model: nn.Module
    weights: Params
    """m * theta, detached."""
    buffers: Buffers
    """Floating ones in the dtype of the weights."""
    live: dict[str, Tensor]
    """The coordinates: a bool tensor in the shape of each parameter that has any."""
    sum_logits: bool
    """Differentiate the sum of the outputs, as if it were the one output."""

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.weights.values())).dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    def forward(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """f(x) as [n, out]: whatever axes follow the first are flattened into one."""
        y = functional_call(self.model, {**weights, **self.buffers}, (x,))
        if not isinstance(y, Tensor) or y.ndim == 0 or len(y) != len(x):
            given = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise Refused(
                f"the model must return one tensor whose first axis is the {len(x)} inputs: got {given}. "
                "Wrap it in a module that returns the logits alone."
            )
        y = y.reshape(len(x), -1)
        return y.sum(1, keepdim=True) if self.sum_logits else y


def problems(
    model: nn.Module,
    params: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None,
    coordinates: Coordinates,
    buffers: Mapping[str, Tensor] | None,
    outputs: Outputs,
) -> tuple[list[Problem], bool]:
    """One problem a replica, and whether there is a replica axis at all.

    The axis may be that of the parameters, of the masks (the levels of one network), of coordinates or buffers,
    or of several of them.

    Raises:
        Refused: Batch norm that depends on the batch, masks, coordinates or buffers that do not fit, axes of
            different lengths, no parameter to differentiate in.
    """
    refuse_batch_statistics(model, "the kernel needs")
    replicas = n_replicas(model, params)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not own:
        raise Refused(
            "the kernel needs a parameter to differentiate in: every one has requires_grad=False, and frozen "
            "parameters are not coordinates. Call model.requires_grad_(True)."
        )
    if masks is not None:
        masks_.validate(model, masks)
    if isinstance(coordinates, Mapping):
        _check_coordinates(own, coordinates)
    elif coordinates not in ("live", "all"):
        raise Refused(f"coordinates must be 'live', 'all' or a dict of bool tensors: got {coordinates!r}.")
    _check_buffers(model, buffers or {})
    wanted = coordinates if isinstance(coordinates, Mapping) else (masks or {}) if coordinates == "live" else {}
    axes = {replicas} if replicas is not None else set()
    axes |= _axes(model, masks or {}) | _axes(model, wanted) | _axes(model, buffers or {})
    if len(axes) > 1:
        raise Refused(
            f"params, masks, coordinates and buffers must share one replica axis: got lengths {sorted(axes)}."
        )

    found = []
    for r in range(max(axes, default=1)):
        point = {name: t.detach() for name, t in _replica(model, params, r).items()}
        point = masked(point, None if masks is None else _replica(model, masks, r))
        live = _replica(model, wanted, r)
        if not isinstance(coordinates, Mapping):  # what has no mask is live
            live = {n: live.get(n, torch.ones_like(point[n], dtype=torch.bool)) for n in own}
        live = {name: mask.to(point[name].device) for name, mask in live.items()}
        dtype = next(iter(point.values())).dtype
        statistics = _replica(model, {**dict(model.named_buffers()), **(buffers or {})}, r)
        # Statistics kept in float32 must not pull a float64 kernel down with them.
        statistics = {n: b.detach().to(dtype if b.is_floating_point() else b.dtype) for n, b in statistics.items()}
        found.append(Problem(model, point, statistics, live, outputs == "sum_logits"))
    return found, bool(axes)


def check_inputs(problem: Problem, x1: Tensor, x2: Tensor | None) -> None:
    """Raise a ValueError unless both sets of inputs are non-empty, alike, where the weights are, and kept apart."""
    weight = next(iter(problem.weights.values()))
    for name, x in (("x1", x1), ("x2", x2)):
        if x is None:
            continue
        if x.ndim == 0 or len(x) == 0:
            raise Refused(f"{name} must hold at least one input on its first axis: got shape {tuple(x.shape)}.")
        if x.shape[1:] != x1.shape[1:] or x.dtype != x1.dtype:
            raise Refused(
                "x1 and x2 must hold inputs of one shape and dtype: got "
                f"{tuple(x1.shape)} {x1.dtype} and {tuple(x.shape)} {x.dtype}. Only the first axis may differ."
            )
        if x.is_floating_point() and x.dtype != weight.dtype:
            raise Refused(
                f"{name} must have the dtype of params, {weight.dtype}: got {x.dtype}. "
                f"Cast the inputs with {name}.to({weight.dtype}) or the parameters."
            )
        if x.device != weight.device:
            raise Refused(f"{name} must be on the device of params, {weight.device}: it is on {x.device}.")
    with evaluating(problem.model), torch.no_grad():
        _check_apart(problem, torch.cat([x1[:1], (x1 if x2 is None else x2)[-1:]]))


def _check_apart(problem: Problem, pair: Tensor) -> None:
    """Two inputs, and then the same two in another order and one of them twice: no output may change."""
    logits = replace(problem, sum_logits=False)  # sums of some outputs are zero, and then rounding alone
    y, other = logits.forward(problem.weights, pair), logits.forward(problem.weights, pair[[1, 1, 0]])[[2, 0]]
    # Batches of two sizes may be computed by two algorithms, on some devices with less than the dtype's precision.
    rounding = torch.finfo(y.dtype).eps ** (1 / 3) * y.abs().amax()
    if ((y - other).abs() > rounding).any():
        raise Refused(
            "each input must pass through the network by itself, the same each time: an output depends on the rest "
            "of the batch, or on chance. Replace what couples a batch, or put such modules in evaluation mode."
        )


def _check_coordinates(own: Mapping[str, Tensor], coordinates: Mapping[str, Tensor]) -> None:
    if not coordinates:
        raise Refused(f"coordinates must name at least one trainable parameter, among {sorted(own)}: got none.")
    for name, mask in coordinates.items():
        if name not in own:
            raise Refused(f"coordinates must name trainable parameters: {name!r} is not one of {sorted(own)}.")
        shape = tuple(own[name].shape)
        if mask.dtype != torch.bool or not _fits(mask, own[name]):
            raise Refused(
                f"coordinates[{name!r}] must be bool of shape {shape} or [replica, *{shape}]: "
                f"got {mask.dtype} {tuple(mask.shape)}."
            )


def _check_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    own = dict(model.named_buffers())
    for name, buffer in buffers.items():
        if name not in own or not _fits(buffer, own[name]):
            expected = f"shape {tuple(own[name].shape)}" if name in own else f"a name among {sorted(own)}"
            raise Refused(
                f"buffers[{name!r}] must have {expected}, or that shape behind a replica axis: "
                f"got {tuple(buffer.shape)}."
            )


def _fits(tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor has a shape of the model's, with or without a replica axis."""
    return tensor.shape == own.shape or tensor.shape[1:] == own.shape


def _axes(model: nn.Module, tensors: Mapping[str, Tensor]) -> set[int]:
    """The lengths of the replica axes among named tensors: empty where none is stacked."""
    own = dict((*model.named_parameters(), *model.named_buffers()))
    return {len(t) for name, t in tensors.items() if t.ndim > own[name].ndim}


def _replica(model: nn.Module, tensors: Mapping[str, Tensor], r: int) -> dict[str, Tensor]:
    own = dict((*model.named_parameters(), *model.named_buffers()))
    return {name: t[r] if t.ndim > own[name].ndim else t for name, t in tensors.items()}
