"""The factor of the kernel: the live Jacobian, held as a matrix or only applied to vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vjp

from ticketlab.errors import Refused
from ticketlab.functional import evaluating, transformable
from ticketlab.ntk import generic
from ticketlab.ntk.axes import check_finite
from ticketlab.ntk.blocks import n_fitting
from ticketlab.ntk.gather import columns_of_jacobian
from ticketlab.ntk.layers import Features, Layer, features, find_layers
from ticketlab.ntk.plan import block_size
from ticketlab.ntk.problem import Coordinates, Problem, check_inputs, problems


@dataclass(frozen=True)
class LiveJacobian:
    """J, with Theta_m = J J'. Columns: parameters in the model's order, live entries in the order of their index."""

    values: Float[Tensor, "*replica n out k"]


@dataclass(frozen=True)
class KernelOperator:
    """Theta_m of one network as a product with vectors: neither the kernel nor J is ever held."""

    problem: Problem
    x: Tensor
    n_outputs: int
    block_size: int

    @property
    def size(self) -> int:
        """n * out, the side of the kernel."""
        return len(self.x) * self.n_outputs

    def product(self, vector: Float[Tensor, " n_out"]) -> Float[Tensor, " n_out"]:
        """Theta_m v = J (J' v), block by block of examples.

        J times a vector is the derivative of u -> J' u, which is linear in u: it needs no forward-mode rule,
        and those are missing for more operations (fused attention among them) than second derivatives are.

        Raises:
            Refused: A vector of another shape, or a product that is not finite.
        """
        if vector.shape != (self.size,):
            raise Refused(f"vector must have shape ({self.size},), [n * out]: got {tuple(vector.shape)}.")
        names = list(self.problem.live)
        point = generic.live_vector(self.problem, names)
        parts = vector.view(len(self.x), self.n_outputs).split(self.block_size)

        def pull(x: Tensor, part: Tensor) -> Tensor:
            outputs = vjp(lambda v: self.problem.forward(generic.scattered(self.problem, names, v), x), point)[1]
            return outputs(part)[0]

        with evaluating(self.problem.model), transformable():
            blocks = list(zip(self.x.split(self.block_size), parts, strict=True))
            step = torch.zeros_like(point)
            for x, part in blocks:
                step += pull(x, part)
            pushed = [vjp(lambda part, x=x: pull(x, part), part)[1](step)[0] for x, part in blocks]
        found = torch.cat(pushed).flatten()
        check_finite("product with the kernel", found)
        return found

    def trace(self) -> Float[Tensor, ""]:
        """The sum of the squared live gradients, a block of J at a time."""
        with evaluating(self.problem.model):
            blocks = (_rows(self.problem, x) for x in self.x.split(self.block_size))
            found = torch.stack([rows.double().square().sum() for rows in blocks]).sum()
        check_finite("trace", found)
        return found


def jacobian(
    model: nn.Module,
    params: Mapping[str, Tensor],
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
    found, stacked = problems(model, params, masks, coordinates, buffers, "full")
    check_inputs(found[0], x, None)
    counts = [sum(int(live.sum()) for live in problem.live.values()) for problem in found]
    if len(set(counts)) > 1:
        raise Refused(
            f"stacked replicas must have equal numbers of live coordinates to share one array: got {counts}. "
            "Call jacobian for one replica at a time."
        )
    with evaluating(model):
        rows = [torch.cat([_rows(p, block) for block in x.split(_block_size(p, x))]) for p in found]
    values = torch.stack(rows) if stacked else rows[0]
    check_finite("Jacobian", values)
    return LiveJacobian(values)


def operator(
    model: nn.Module,
    params: Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    *,
    masks: Mapping[str, Tensor] | None = None,
    coordinates: Coordinates = "live",
    buffers: Mapping[str, Tensor] | None = None,
) -> KernelOperator:
    """The kernel as a linear operator, for :func:`ticketlab.ntk.spectrum` where even J is too large to hold.

    Raises:
        Refused: As for the kernel, or a stack of replicas.
    """
    found, stacked = problems(model, params, masks, coordinates, buffers, "full")
    if stacked:
        raise Refused(f"an operator is one network: got a stack of {len(found)}. Select one replica of each dict.")
    check_inputs(found[0], x, None)
    with evaluating(model):
        n_outputs = find_layers(found[0], x)[1]
        return KernelOperator(found[0], x, n_outputs, _block_size(found[0], x))


def _block_size(problem: Problem, x: Tensor) -> int:
    layers, n_outputs = find_layers(problem, x)
    k = sum(int(live.sum()) for live in problem.live.values())
    return block_size(layers, ["gather"] * len(layers), n_outputs, k, problem.dtype)


def _rows(problem: Problem, x: Tensor) -> Float[Tensor, "n out k"]:
    layers, n_outputs = find_layers(problem, x)
    parts: dict[str, Tensor] = {}
    for layer, one in zip(layers, features(problem, layers, x) if layers else [], strict=True):
        parts |= _by_name(layer, one)
    rest = [name for name in problem.live if name not in parts]
    if rest:
        sizes = [int(problem.live[name].sum()) for name in rest]
        parts |= dict(zip(rest, generic.jacobian(problem, rest, n_outputs, x).split(sizes), strict=True))
    return torch.cat([parts[name] for name in problem.live]).permute(2, 1, 0)


def _by_name(layer: Layer, features: Features) -> dict[str, Tensor]:
    """The live columns [k, out, n] of a layer's weight, and of its bias."""
    device, width = layer.live.device, layer.inputs
    group = torch.arange(layer.units, device=device) // (layer.units // layer.groups)
    columns = group[:, None] * width + torch.arange(layer.live.shape[1], device=device)
    columns[:, width:] = layer.groups * width  # the ones
    size = n_fitting(layer.live.shape[1] * features.deltas[0].numel(), features.deltas.dtype)
    weights, biases = [], []
    for units in torch.arange(layer.units, device=device).split(size):
        whole = columns_of_jacobian(features, units, columns[units]).unflatten(0, (len(units), -1))
        live = layer.live[units]
        weights.append(whole[:, :width][live[:, :width]])
        biases.append(whole[:, width:][live[:, width:]])
    found = {layer.weight: torch.cat(weights)}
    return found if layer.bias is None else {**found, layer.bias: torch.cat(biases)}
