"""The factor of the kernel: the live Jacobian, block by block of examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ticketlab.errors import Refused
from ticketlab.ntk import generic
from ticketlab.ntk.blocks import n_fitting
from ticketlab.ntk.features import features
from ticketlab.ntk.layers import Features, Layer, find_layers, retried
from ticketlab.ntk.plan import largest_block
from ticketlab.ntk.problem import Coordinates, Problem, problems
from ticketlab.shown import as_line, as_table
from ticketlab.state import State, check_finite


@dataclass(frozen=True)
class LiveJacobian:
    """J, with Theta_m = J J'. Columns: parameters in the model's order, live entries in the order of their index."""

    values: Float[Tensor, "*replica n out k"]

    __repr__, _repr_html_ = as_line, as_table


def jacobian(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    *,
    masks: Mapping[str, Tensor] | None = None,
    coordinates: Coordinates = "live",
    buffers: Mapping[str, Tensor] | None = None,
) -> LiveJacobian:
    """The live Jacobian at m * theta, whose singular values squared are the eigenvalues of the kernel.

    An eigenvalue of J J' below the rounding of the largest one is noise; its square root is not below that of
    the largest singular value. Arguments as in :func:`ticketlab.ntk.kernel`.

    Raises:
        Refused: As for the kernel, or replicas with different numbers of live coordinates.
    """
    found, stacked = problems(model, state, x, masks=masks, coordinates=coordinates, buffers=buffers)
    counts = [sum(int(live.count_nonzero()) for live in problem.live.values()) for problem in found]
    if len(set(counts)) > 1:
        raise Refused(
            f"stacked replicas must have equal numbers of live coordinates to share one array: got {counts}. "
            "Call jacobian for one replica at a time."
        )
    rows = [torch.cat([live_rows(p, block) for block in x.split(block_size(p, x)[1])]) for p in found]
    values = torch.stack(rows) if stacked else rows[0]
    check_finite("the Jacobian", values)
    return LiveJacobian(values)


def block_size(problem: Problem, x: Tensor) -> tuple[int, int]:
    """The number of outputs, and of examples whose rows are made at once."""
    with problem.net.lent():
        layers, n_outputs = find_layers(problem, x)
    k = sum(int(live.count_nonzero()) for live in problem.live.values())
    return n_outputs, largest_block(layers, ["gather"] * len(layers), n_outputs, k, problem.dtype)


def live_rows(problem: Problem, x: Tensor) -> Float[Tensor, "n out k"]:
    """J of one block of examples."""

    def from_layers(layers: list[Layer]) -> Tensor:
        parts: dict[str, Tensor] = {}
        for layer, one in zip(layers, features(problem, layers, x), strict=True):
            parts |= _by_name(layer, one)
        rest = [name for name in problem.live if name not in parts]
        if rest:
            sizes = [int(problem.live[name].count_nonzero()) for name in rest]
            columns = generic.jacobian(problem, rest, x).permute(2, 1, 0)
            parts |= dict(zip(rest, columns.split(sizes, 2), strict=True))
        return torch.cat([parts[name] for name in problem.live], 2)

    with problem.net.lent():
        return retried(from_layers, find_layers(problem, x)[0])


def _by_name(layer: Layer, features: Features) -> dict[str, Float[Tensor, "n out live"]]:
    """The live columns of a layer's weight, and of its bias."""
    weight = _outer if layer.positions == 1 else _summed
    found = {layer.weight: weight(layer, features)}
    if layer.bias is not None:
        bias = layer.live[:, layer.inputs].nonzero()[:, 0]
        found[layer.bias] = features.deltas[bias].sum(3).permute(2, 1, 0)
    return found


def _outer(layer: Layer, features: Features) -> Float[Tensor, "n out live"]:
    """Of a layer with one position, where the gradient of a weight is one product."""
    unit, column = layer.live[:, : layer.inputs].nonzero(as_tuple=True)
    column = column + unit // (layer.units // layer.groups) * layer.inputs
    inputs, deltas = features.inputs[..., 0].T, features.deltas[..., 0].permute(2, 1, 0)
    return deltas.index_select(2, unit) * inputs.index_select(1, column)[:, None]


def _summed(layer: Layer, features: Features) -> Float[Tensor, "n out live"]:
    """Of several positions: one product per example and group gives every weight's gradient, and few are picked."""
    groups, n_out = layer.groups, features.deltas.shape[1]
    live = layer.live[:, : layer.inputs].flatten().nonzero()[:, 0]
    inputs = features.inputs[: groups * layer.inputs].unflatten(0, (groups, -1)).permute(2, 0, 3, 1)
    deltas = features.deltas.unflatten(0, (groups, -1)).permute(3, 0, 2, 1, 4)  # [n, group, out, unit, position]
    size = n_fitting(n_out * layer.units * max(layer.inputs, layer.positions), features.deltas.dtype)
    found = []
    for x, delta in zip(inputs.split(size), deltas.split(size), strict=True):
        every = (delta.flatten(2, 3) @ x).unflatten(2, (n_out, -1))  # [n, group, out, unit, input]
        found.append(every.transpose(1, 2).flatten(2).index_select(2, live))
    return torch.cat(found)
