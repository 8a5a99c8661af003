r"""Weight matching: the hidden-unit permutation that brings one network closest to another.

Coordinate descent over groups (Ainsworth et al. 2022, algorithm 1): with all other groups held, the best
permutation of one is a linear assignment on the products summed over every tensor and axis that it touches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ticketlab.errors import Refused, check_count
from ticketlab.network import network
from ticketlab.permutation.groups import groups as groups_of
from ticketlab.permutation.permute import Groups, Permutations, assert_same_function, is_stacked, permute
from ticketlab.seeds import stream
from ticketlab.shown import as_line, as_table
from ticketlab.state import Buffers, Masks, Params, State, check_finite


@dataclass(frozen=True)
class Matching:
    """The best permutation found for b, and how far each start came."""

    permutations: Permutations = field(repr=False)
    objective: float
    r"""\sum <a, \pi(b)> over all tensors, the largest of ``objectives``."""
    objectives: tuple[float, ...]
    """One a start: from the identity, layer by layer from the input, then from random permutations."""

    __repr__, _repr_html_ = as_line, as_table


@dataclass(frozen=True)
class Alignment:
    """A network with its hidden units reordered; it computes the same function."""

    params: Params = field(repr=False)
    """pi(m * theta)."""
    buffers: Buffers = field(repr=False)
    masks: Masks | None = field(repr=False)
    matching: Matching

    __repr__, _repr_html_ = as_line, as_table


@dataclass(frozen=True)
class _Pair:
    """Two sets of tensors with every axis split into its factors."""

    groups: Groups
    a: dict[str, Tensor]
    b: dict[str, Tensor]
    labels: dict[str, tuple[str | None, ...]]
    """The group of each factor, None where the order is fixed."""
    alone: dict[str, Tensor]
    """For each group, the products over tensors that no other group runs along: they never change."""

    def touching(self, group: str) -> list[str]:
        return [name for name, labels in self.labels.items() if group in labels]


def match(
    groups: Groups, a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, restarts: int = 4, seed: int = 0
) -> Matching:
    r"""The permutation of b's hidden units that maximises the sum of products with a.

    .. math:: \max_\pi \sum_{\text{tensors}} \langle a, \pi(b) \rangle,
        \quad\text{the same } \pi \text{ as } \min_\pi \lVert a - \pi(b) \rVert^2

    Weights, biases and norm parameters all count; given masks, the objective is the number of weights alive in both.
    The problem is NP-hard: every start climbs to a local maximum, and the best is returned. Where a group runs
    along two axes of one tensor (a convolution inside a residual stream) the assignment is on the linearised
    objective, and a step is taken only if it climbs. Computed in float64, in which counts are exact.

    Args:
        groups: Of the architecture, from ``groups(model, x)``.
        a: Parameters (times their masks) or masks of one network; the names decide what counts.
        b: The same tensors of the other.
        restarts: Starts: the first from the identity, the second layer by layer from the input, the others random.
        seed: Of the random starts and of the order in which groups are visited.

    Returns:
        Permutations for ``permute``; new unit i of b is its old unit ``permutations[group][i]``.

    Raises:
        Refused: Different names or shapes, stacked tensors, entries that are not finite, or no restarts.

    Ainsworth, Hayase & Srinivasa, "Git Re-Basin", 2022.
    """
    check_count("restarts", restarts, 1, 10**6)
    pair = _pair(groups, a, b)
    starts = [_start(pair, restart, seed) for restart in range(restarts)]
    found = [_climb(pair, start, stream("matching order", seed, r)) for r, start in enumerate(starts)]
    objectives = tuple(_objective(pair, permutations, list(pair.labels)) for permutations in found)
    best = max(range(restarts), key=objectives.__getitem__)
    return Matching(found[best], objectives[best], objectives)


def align(
    model: nn.Module,
    x: Tensor,
    params_a: State | Params,
    params_b: State | Params,
    *,
    masks_a: Masks | None = None,
    masks_b: Masks | None = None,
    buffers_b: Buffers | None = None,
    restarts: int = 4,
    seed: int = 0,
) -> Alignment:
    """Reorder the hidden units of network b to match those of a, and check on ``x`` that b computes what it did.

    Args:
        model: Lends its forward pass.
        x: Example inputs [n, ...] to trace with and to compare functions on.
        params_a: Of the network that stays; a State, or parameters alone.
        params_b: Of the network that is permuted; with its buffers where the forward pass reads some.
        masks_a: True = kept; weights are matched as m * theta.
        masks_b: True = kept; permuted along.
        buffers_b: In place of those of a State.
        restarts: See ``match``.
        seed: See ``match``.

    Raises:
        Refused: Tensors that do not fit the model, its groups or one another; buffers that are not known; a
            permutation that changed the function.
    """
    a = network(model, params_a, masks=masks_a)
    b = network(model, params_b, x, masks=masks_b, buffers=buffers_b)
    groups = groups_of(model, x)
    matching = match(groups, a.params, b.params, restarts=restarts, seed=seed)
    moved, carried = (permute(groups, tensors, matching.permutations) for tensors in (b.params, b.buffers))
    assert_same_function(model, (b.params, b.buffers), (moved, carried), x)
    masks = None if masks_b is None else permute(groups, masks_b, matching.permutations)
    return Alignment(moved, carried, masks, matching)


def _pair(groups: Groups, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> _Pair:
    if set(a) != set(b) or not a:
        raise Refused(f"a and b must have the same tensors, at least one: got {sorted(a)} and {sorted(b)}.")
    stacked = [name for tensors in (a, b) for name, t in tensors.items() if is_stacked(groups, name, t)]
    if stacked:
        raise Refused(f"match takes one pair of networks: {stacked[0]!r} is stacked. Call it for each replica.")
    check_finite("a", a)
    check_finite("b", b)
    labels = {n: tuple(g for axis in groups.axes[n] for g, _ in axis) for n in a}
    shapes = {n: [size for axis in groups.axes[n] for _, size in axis] for n in a}
    split_a, split_b = ({n: tensors[n].double().reshape(shapes[n]) for n in a} for tensors in (a, b))
    pair = _Pair(groups, split_a, split_b, labels, {})
    for group, size in groups.sizes.items():
        names = [n for n in pair.touching(group) if [g for g in labels[n] if g is not None] == [group]]
        total = torch.zeros(size, size, dtype=torch.float64)
        pair.alone[group] = sum((_inner(pair, n, labels[n].index(group), {}) for n in names), total)
    return pair


def _start(pair: _Pair, restart: int, seed: int) -> Permutations:
    if restart == 0:
        return {group: torch.arange(size) for group, size in pair.groups.sizes.items()}
    if restart == 1:
        return _layer_by_layer(pair)
    generator = stream("matching start", seed, restart)
    return {group: torch.randperm(size, generator=generator) for group, size in pair.groups.sizes.items()}


def _layer_by_layer(pair: _Pair) -> Permutations:
    """Each group in turn from what is settled before it: a network that is b permuted is found at once."""
    settled: Permutations = {}
    for group in pair.groups.sizes:
        settled[group] = _assign(_products(pair, group, settled))
    return settled


def _climb(pair: _Pair, permutations: Permutations, order: torch.Generator) -> Permutations:
    """Improve one group after another until none can be; ends because the objective rises every time."""
    improved = True
    while improved:
        improved = False
        names = list(pair.groups.sizes)
        for index in torch.randperm(len(names), generator=order):
            group = names[index]
            proposal = permutations | {group: _assign(_products(pair, group, permutations))}
            before, after = (_objective(pair, p, pair.touching(group)) for p in (permutations, proposal))
            if after > before + 1e-12 * abs(before):
                permutations, improved = proposal, True
    return permutations


def _products(pair: _Pair, group: str, permutations: Permutations) -> Tensor:
    """[units of a, units of b]: inner products over all that touches the group, other factors permuted as they are.

    Tensors that another group without a permutation runs along are left out.
    """
    total = pair.alone[group]
    for name in pair.touching(group):
        for place, label in enumerate(pair.labels[name]):
            others = [g for i, g in enumerate(pair.labels[name]) if i != place and g is not None]
            if label == group and others and permutations.keys() >= set(others):
                total = total + _inner(pair, name, place, permutations)
    return total


def _inner(pair: _Pair, name: str, place: int, permutations: Permutations) -> Tensor:
    """Inner products of every slice of a with every slice of b along one factor of a tensor."""
    b = _permuted(pair.b[name], pair.labels[name], permutations, skip=place)
    rows, columns = (t.movedim(place, 0).reshape(t.shape[place], -1) for t in (pair.a[name], b))
    return (rows @ columns.T).cpu()


def _permuted(b: Tensor, labels: tuple[str | None, ...], permutations: Permutations, skip: int | None = None) -> Tensor:
    for place, group in enumerate(labels):
        if group is not None and place != skip:
            b = b.index_select(place, permutations[group].to(b.device))
    return b


def _assign(products: Tensor) -> Tensor:
    return torch.from_numpy(linear_sum_assignment(products.numpy(), maximize=True)[1])


def _objective(pair: _Pair, permutations: Permutations, names: list[str]) -> float:
    parts = [(pair.a[n] * _permuted(pair.b[n], pair.labels[n], permutations)).sum() for n in names]
    return float(sum(parts))
