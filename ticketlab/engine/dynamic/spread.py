"""How a budget of live weights is spread over layers, and random masks that keep to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import nn

from ticketlab import masks as mask_ops
from ticketlab.errors import Refused, nearest
from ticketlab.state import Masks

Spread = Literal["uniform", "first_dense", "erdos_renyi", "erdos_renyi_kernel"]


def layer_counts(model: nn.Module, density: float, spread: Spread = "erdos_renyi_kernel") -> dict[str, int]:
    r"""How many weights each layer keeps at a density of the whole network, to the weight.

    .. math:: n_l = N_l \min(1, \epsilon r_l), \quad \sum_l n_l = \mathrm{round}(density \cdot \sum_l N_l)

    with r_l = 1 (``uniform``; ``first_dense``: but the first layer dense, Evci et al. 2020), r_l = sum(shape) /
    prod(shape) (``erdos_renyi_kernel``, Evci et al. 2020), or the same of input and output channels alone
    (``erdos_renyi``, Mocanu et al. 2018). Layers that would exceed their size are made dense and epsilon is solved
    for again. Fractions go to the layers with the largest remainders, of equal ones to the first.

    Args:
        model: Its prunable weights.
        density: kept / prunable, in (0, 1].
        spread: The rule above.

    Raises:
        Refused: A density outside (0, 1], or one that leaves a layer empty or cannot pay for a dense first layer.
    """
    if spread not in get_args(Spread):
        raise Refused(nearest("spread", spread, get_args(Spread)))
    if not 0 < density <= 1:
        raise Refused(f"density must lie in (0, 1]: got {density}.")
    shapes = {name: mask.shape for name, mask in mask_ops.ones(model).items()}
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    budget = math.floor(density * sum(sizes.values()) + 0.5)
    exact = _solve({name: _raw(shape, spread) for name, shape in shapes.items()}, sizes, budget, spread)
    counts = {name: math.floor(share + 1e-9) for name, share in exact.items()}
    remainders = sorted(counts, key=lambda name: counts[name] - exact[name])  # a stable sort: ties to the first layer
    for name in remainders[: budget - sum(counts.values())]:
        counts[name] += 1
    empty = [name for name, count in counts.items() if count < 1]
    if empty:
        raise Refused(
            f"every layer must keep a live weight: {empty} would have none of {budget} at density {density} under "
            f"{spread!r}. Keep more, or take 'erdos_renyi_kernel', which keeps small layers denser."
        )
    return counts


def _raw(shape: torch.Size, spread: Spread) -> float:
    if spread == "erdos_renyi":
        return (shape[0] + shape[1]) / (shape[0] * shape[1])
    return sum(shape) / shape.numel() if spread == "erdos_renyi_kernel" else 1.0


def _solve(raw: Mapping[str, float], sizes: Mapping[str, int], budget: int, spread: Spread) -> dict[str, float]:
    """Real counts that sum to the budget: epsilon * raw * size, or the size of a layer made dense."""
    dense = {next(iter(sizes))} if spread == "first_dense" else set()
    while True:
        left = budget - sum(sizes[name] for name in dense)
        rest = [name for name in sizes if name not in dense]
        if left < 0 or (left == 0 and rest):
            first = next(iter(sizes))
            raise Refused(
                f"the budget must pay for a dense first layer and more: got {budget} for {sizes[first]} weights of "
                f"{first!r}. Keep more, or take another spread."
            )
        epsilon = left / sum(raw[name] * sizes[name] for name in rest) if rest else 0.0
        over = {name for name in rest if epsilon * raw[name] > 1}
        if not over:
            return {name: float(sizes[name]) if name in dense else epsilon * raw[name] * sizes[name] for name in sizes}
        dense |= over  # epsilon rises when they leave the sum, so all of them would be over again


def sparse_masks(model: nn.Module, kept: Mapping[str, int], seed: int) -> Masks:
    """Masks with exactly ``kept[name]`` live weights in each layer, at positions drawn uniformly.

    Raises:
        Refused: Other layers than the model's, or a count outside 1..size.
    """
    full = mask_ops.ones(model)
    if set(kept) != set(full):
        raise Refused(f"kept must name every prunable layer: got {sorted(kept)} for {sorted(full)}.")
    wrong = {name: count for name, count in kept.items() if not 1 <= count <= full[name].numel()}
    if wrong:
        raise Refused(f"each layer must keep 1 to all of its weights: got {wrong}. Take layer_counts(...).")
    first = {name: (torch.arange(m.numel()) < kept[name]).view_as(m) for name, m in full.items()}
    return {name: m.to(full[name].device) for name, m in mask_ops.layerwise_shuffle(first, seed).items()}
