"""The factor of the kernel: the live Jacobian, held as a matrix or only applied to vectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ticketlab.derivatives import pullback
from ticketlab.errors import Refused
from ticketlab.ntk import generic
from ticketlab.ntk.blocks import n_fitting
from ticketlab.ntk.features import features
from ticketlab.ntk.gather import columns_of_jacobian
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


@dataclass(frozen=True)
class KernelOperator:
    """Theta_m of one network as a product with vectors: neither the kernel nor J is ever held."""

    problem: Problem
    x: Tensor
    n_outputs: int
    block_size: int

    __repr__, _repr_html_ = as_line, as_table

    @property
    def size(self) -> int:
        """n * out, the side of the kernel."""
        return len(self.x) * self.n_outputs

    def product(self, vector: Float[Tensor, " n_out"]) -> Float[Tensor, " n_out"]:
        """Theta_m v = J (J' v), block by block of examples.

        J times a vector is the derivative of u -> J' u, which is linear in u: it needs no forward-mode rule,
        and those are missing for more operations (fused attention among them) than second derivatives are.
        Where those are missing too, or wrong, J is made explicitly, a block at a time.

        Raises:
            Refused: A vector of another shape, or a product that is not finite.
        """
        if vector.shape != (self.size,):
            raise Refused(f"vector must have shape ({self.size},), [n * out]: got {tuple(vector.shape)}.")
        parts = vector.detach().view(len(self.x), self.n_outputs).split(self.block_size)
        with self.problem.net.lent() as weights, torch.enable_grad():
            found = _twice(self.problem, weights, list(zip(self.x.split(self.block_size), parts, strict=True)))
        if found is None:
            pulled = [torch.einsum("nok,no->k", j, part) for j, part in zip(self._blocks(), parts, strict=True)]
            step = torch.stack(pulled).sum(0)
            found = torch.cat([(j @ step).flatten() for j in self._blocks()])
        check_finite("the product with the kernel", found)
        return found

    def trace(self) -> Float[Tensor, ""]:
        """The sum of the squared live gradients, a block of J at a time."""
        found = torch.stack([j.double().square().sum() for j in self._blocks()]).sum()
        check_finite("the trace", found)
        return found

    def _blocks(self) -> Iterator[Float[Tensor, "n out k"]]:
        return (_rows(self.problem, x) for x in self.x.split(self.block_size))


def _twice(problem: Problem, weights: Mapping[str, Tensor], blocks: list[tuple[Tensor, Tensor]]) -> Tensor | None:
    """J (J' v) by two derivatives; None where autograd lacks the second, or it is not the adjoint of the first."""
    inner, live = list(weights.values()), [problem.live.get(name) for name in weights]

    def pull(x: Tensor, part: Tensor, twice: bool = False) -> tuple[Tensor, ...]:
        return pullback(problem.forward(x), inner, part, create_graph=twice)

    def push(x: Tensor, part: Tensor) -> Tensor:
        u = torch.zeros_like(part, requires_grad=True)
        pairs = [(g, step) for g, step in zip(pull(x, u, True), steps, strict=True) if g.requires_grad]
        along = [(g * step).sum() for g, step in pairs]
        return pullback(torch.stack(along).sum(), [u])[0] if along else torch.zeros_like(part)

    try:
        steps = [torch.zeros_like(weight) for weight in inner]
        for x, part in blocks:
            for step, mask, gradient in zip(steps, live, pull(x, part), strict=True):
                step.add_(0 if mask is None else gradient * mask)
        found = torch.cat([push(x, part) for x, part in blocks])
    except (RuntimeError, Refused):
        return None
    vector = torch.cat([part for _, part in blocks])
    gap = (found * vector).sum() - torch.stack([step.square().sum() for step in steps]).sum()
    rounding = torch.finfo(found.dtype).eps ** (1 / 3) * found.norm() * vector.norm()
    return found.flatten() if gap.abs() <= rounding else None


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
    rows = [torch.cat([_rows(p, block) for block in x.split(_block_size(p, x)[1])]) for p in found]
    values = torch.stack(rows) if stacked else rows[0]
    check_finite("the Jacobian", values)
    return LiveJacobian(values)


def operator(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
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
    found, stacked = problems(model, state, x, masks=masks, coordinates=coordinates, buffers=buffers)
    if stacked:
        raise Refused(f"an operator is one network: got a stack of {len(found)}. Select one replica of each dict.")
    return KernelOperator(found[0], x, *_block_size(found[0], x))


def _block_size(problem: Problem, x: Tensor) -> tuple[int, int]:
    """The number of outputs, and of examples whose Jacobian is made at once."""
    with problem.net.lent():
        layers, n_outputs = find_layers(problem, x)
    k = sum(int(live.count_nonzero()) for live in problem.live.values())
    return n_outputs, largest_block(layers, ["gather"] * len(layers), n_outputs, k, problem.dtype)


def _rows(problem: Problem, x: Tensor) -> Float[Tensor, "n out k"]:
    def from_layers(layers: list[Layer]) -> Tensor:
        parts: dict[str, Tensor] = {}
        for layer, one in zip(layers, features(problem, layers, x), strict=True):
            parts |= _by_name(layer, one)
        rest = [name for name in problem.live if name not in parts]
        if rest:
            sizes = [int(problem.live[name].count_nonzero()) for name in rest]
            parts |= dict(zip(rest, generic.jacobian(problem, rest, x).split(sizes), strict=True))
        return torch.cat([parts[name] for name in problem.live]).permute(2, 1, 0)

    with problem.net.lent():
        return retried(from_layers, find_layers(problem, x)[0])


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
