"""Which weights may have a fast path: those of linear layers and convolutions that meet each example by itself.

Such a layer applies one matrix W at each of T positions, so that its part of the Jacobian is a sum of outer products
over positions,

    J[n o, (u, c)] = sum_t delta[u, o, n, t] * input[c, n, t].

A weight that is used several times, in one module or in tied ones, has its uses lined up along the position axis: the
sum is the same. A use that the recording does not see leaves a trace in the autograd graph, and the weight then has
no fast path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ticketlab.errors import Refused
from ticketlab.ntk.problem import Problem
from ticketlab.ntk.uses import Use, is_plain, n_groups, n_positions, record
from ticketlab.shown import as_line, as_table

T = TypeVar("T")


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

    __repr__, _repr_html_ = as_line, as_table

    @property
    def units(self) -> int:
        return self.live.shape[0]

    @property
    def inputs(self) -> int:
        return self.live.shape[1] - (self.bias is not None)

    @cached_property
    def n_live(self) -> int:
        return int(self.live.count_nonzero())

    @property
    def names(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


@dataclass(frozen=True)
class Features:
    """What a layer's kernel is made of, for one block of examples."""

    inputs: Float[Tensor, "column n position"]
    """The inputs of group 0, 1, ..., then a row of ones for the bias and a row of zeros to pad with."""
    deltas: Float[Tensor, "unit out n position"]

    __repr__, _repr_html_ = as_line, as_table


class Unlike(Exception):
    """Some layers do not meet a block of examples as they met one alone. Caught by `retried`: no user sees it."""

    def __init__(self, weights: Sequence[str]) -> None:
        super().__init__(", ".join(weights))
        self.weights = weights


def retried(compute: Callable[[list[Layer]], T], layers: list[Layer]) -> T:
    """The computation with as many of the layers as prove right in every block; the others are left to `generic`."""
    while True:
        try:
            return compute(layers)
        except Unlike as unlike:
            layers = [layer for layer in layers if layer.weight not in unlike.weights]


def find_layers(problem: Problem, x: Tensor) -> tuple[list[Layer], int]:
    """The layers that may have a fast path, in the order of the parameters, and the number of outputs.

    Everything is read off a forward pass of the first example alone: where the batch axis stands, and how often each
    parameter is used. That the other examples are treated alike is checked in `features`, block by block.
    """
    y, uses, counts = record(problem, x[:1])
    if not y.requires_grad:
        raise Refused(
            "outputs must have a derivative: no parameter that requires a gradient reaches them. Look for no_grad "
            "or detach in the model's forward pass."
        )
    layers = []
    for name in problem.live:
        mine = [use for use in uses if use.weight == name]
        plain = all(is_plain(use, 1) for use in mine) and len({n_groups(use) for use in mine}) == 1
        if 0 < len(mine) == counts[name] and plain:
            layers.append(_layer(problem, mine, counts))
    return layers, y.shape[1]


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
