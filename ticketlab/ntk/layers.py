"""Which weights have a fast path, and what that path starts from: a layer's inputs and its output deltas.

A linear layer or a convolution applies one matrix W at each of T positions, so that its part of the Jacobian
is a sum of outer products over positions,

    J[n o, (u, c)] = sum_t delta[u, o, n, t] * input[c, n, t].

Inputs are recorded in one forward pass and deltas by one backward pass an output. A weight that is used
several times, in one module or in tied ones, has its uses lined up along the position axis: the sum is the
same. A use that the recording does not see leaves a trace in the autograd graph, and the weight then has
no fast path; nor has one that meets the examples in another order, or only some of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ticketlab.errors import Refused
from ticketlab.ntk.problem import Problem
from ticketlab.ntk.uses import Use, apart, is_plain, n_groups, n_positions, patches_of, record


@dataclass(frozen=True)
class Layer:
    """A weight with a fast path, and the bias that goes with it as one more input that is always 1."""

    weight: str
    bias: str | None
    groups: int
    """Of a convolution: unit u sees the inputs of group u // (units / groups) alone."""
    positions: int
    """T, summed over the uses of the weight; 1 for a linear layer used once."""
    live: Bool[Tensor, "unit column"]
    """The inputs of a unit's own group, then the bias if there is one."""

    @property
    def units(self) -> int:
        return self.live.shape[0]

    @property
    def inputs(self) -> int:
        return self.live.shape[1] - (self.bias is not None)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Features:
    """What a layer's kernel is made of, for one block of examples."""

    inputs: Float[Tensor, "column n position"]
    """The inputs of group 0, 1, ..., then a row of ones for the bias and a row of zeros to pad with."""
    deltas: Float[Tensor, "unit out n position"]


FEW = 16
"""Examples that are looked at before the layers are chosen."""


def find_layers(problem: Problem, x1: Tensor, x2: Tensor | None = None) -> tuple[list[Layer], int]:
    """The layers with a fast path, in the order of the parameters, and the number of outputs.

    Everything is read off two small forward passes, of one example and of a few that are spread over the inputs:
    which axis is the batch, whether the examples keep apart and in order, and how often each parameter is used.
    """
    x = _spread(x1, FEW) if x2 is None else torch.cat([_spread(x1, FEW // 2), _spread(x2, FEW // 2)])
    _, alone, _ = record(problem, x[:1])
    y, uses, counts = record(problem, x)
    if not y.requires_grad:
        return [], y.shape[1]
    separate = dict(zip(map(id, uses), apart(y, uses), strict=True))
    layers = []
    for name in problem.live:
        mine = [use for use in uses if use.weight == name]
        if (
            0 < len(mine) == counts[name]
            and all(separate[id(use)] for use in mine)
            and all(is_plain(use, 1) for use in alone if use.weight == name)
            and len({n_groups(use) for use in mine}) == 1
        ):
            layers.append(_layer(problem, mine, counts))
    return layers, y.shape[1]


def _spread(x: Tensor, n: int) -> Tensor:
    """At most n of the inputs, evenly spaced, with the first and the last; a single one twice."""
    n = max(2, min(n, len(x)))
    return x[torch.arange(n, device=x.device) * (len(x) - 1) // (n - 1)]


def _layer(problem: Problem, uses: list[Use], counts: Mapping[str, int]) -> Layer:
    name, bias = uses[0].weight, uses[0].bias
    # The bias comes along only where each of its uses is one of this weight's.
    shared = any(use.bias != bias for use in uses)
    if not bias or bias not in problem.live or shared or len(uses) != counts[bias]:
        bias = None
    live = problem.live[name].flatten(1)
    if bias is not None:
        live = torch.cat([live, problem.live[bias][:, None]], 1)
    return Layer(name, bias, n_groups(uses[0]), sum(map(n_positions, uses)), live)


def features(problem: Problem, layers: Sequence[Layer], x: Tensor) -> list[Features]:
    """Inputs and deltas of each layer for a block of examples: one forward pass, one backward pass an output.

    Raises:
        Refused: A layer that this block does not use as the examples of :func:`find_layers` did.
    """
    y, uses, counts = record(problem, x)
    by_layer = [[use for use in uses if use.weight == layer.weight] for layer in layers]
    for layer, mine in zip(layers, by_layer, strict=True):
        used = all(len(mine) == counts[name] for name in layer.names) and all(is_plain(use, len(x)) for use in mine)
        if not used or sum(map(n_positions, mine)) != layer.positions:
            raise Refused(
                f"{layer.weight!r} must meet every example alike: a block of {len(x)} uses it in another way than the "
                "first few did, as a routing by value may. Use ntk.kernel(..., method='generic')."
            )
    edges = [use.output for mine in by_layer for use in mine]
    found: list[tuple[Tensor | None, ...]] = []
    for o in range(y.shape[1]):
        one = torch.zeros_like(y)
        one[:, o] = 1
        found.append(torch.autograd.grad(y, edges, one, retain_graph=True, allow_unused=True))
    parts = iter(zip(*found, strict=True))
    return [_features(layer, mine, parts, len(x)) for layer, mine in zip(layers, by_layer, strict=True)]


def _features(layer: Layer, uses: list[Use], parts: Iterator[tuple[Tensor | None, ...]], n: int) -> Features:
    patches = [patches_of(use) for use in uses]
    like = patches[0]
    columns = layer.groups * layer.inputs
    inputs = like.new_empty(columns + 2, n, layer.positions)
    inputs[columns], inputs[columns + 1] = 1, 0
    per_output = []
    start = 0
    for patch in patches:
        stop = start + patch.shape[-1]
        inputs[:columns, :, start:stop] = patch.transpose(0, 1)
        per_output.append(next(parts))
        start = stop
    deltas = like.new_zeros(layer.units, len(per_output[0]), n, layer.positions)
    start = 0
    for use, patch, grads in zip(uses, patches, per_output, strict=True):
        stop = start + patch.shape[-1]
        for o, grad in enumerate(grads):
            if grad is not None:  # an output that the layer does not reach
                # Units stand last after a linear layer, second after a convolution.
                flat = grad.reshape(n, -1, layer.units).mT if use.convolution is None else grad.flatten(2)
                deltas[:, o, :, start:stop] = flat.transpose(0, 1)
        start = stop
    return Features(inputs, deltas)
