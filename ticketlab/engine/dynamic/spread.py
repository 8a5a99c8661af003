"""How a budget of live weights is spread over layers, and random masks that keep to it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ticketlab import graph
from ticketlab import masks as mask_ops
from ticketlab.errors import Refused, nearest
from ticketlab.state import Masks

Spread = Literal["uniform", "first_dense", "erdos_renyi", "erdos_renyi_kernel"]


def layer_counts(
    model: nn.Module,
    density: float,
    spread: Spread = "erdos_renyi_kernel",
    *,
    prunable: Sequence[str] | None = None,
    x: Tensor | None = None,
) -> dict[str, int]:
    r"""How many weights each layer keeps at a density of the whole network, to the weight.

    .. math:: n_l = N_l \min(1, \epsilon r_l), \quad \sum_l n_l = \mathrm{round}(density \cdot \sum_l N_l)

    with r_l = 1 (``uniform``; ``first_dense``: but the first layer dense, Evci et al. 2020), r_l = sum(shape) /
    prod(shape) (``erdos_renyi_kernel``, Evci et al. 2020), or the same of input and output channels alone
    (``erdos_renyi``, Mocanu et al. 2018). Layers that would exceed their size are made dense and epsilon is solved
    for again. Fractions go to the layers with the largest remainders, of equal ones to the first.

    Args:
        model: Any module.
        density: kept / prunable, in (0, 1].
        spread: The rule above.
        prunable: Weights that may be pruned, by name, as in ``masks.prunable``; the model's own when None.
        x: Inputs, from which the first layer is found; needed by ``first_dense`` unless the model is a chain of
            ``nn.Sequential``, whose order of registration is that of the forward pass.

    Raises:
        Refused: A density outside (0, 1], one that leaves a layer empty or cannot pay for a dense first layer, or a
            network without one first layer.
    """
    if spread not in get_args(Spread):
        raise Refused(nearest("spread", spread, get_args(Spread)))
    if not 0 < density <= 1:
        raise Refused(f"density must lie in (0, 1]: got {density}.")
    shapes = {name: mask.shape for name, mask in mask_ops.ones(model, prunable).items()}
    first = _first_layer(model, tuple(shapes), x) if spread == "first_dense" else None
    budget = math.floor(density * sum(shape.numel() for shape in shapes.values()) + 0.5)
    return spread_over(shapes, budget, spread, first)


def spread_over(
    shapes: Mapping[str, torch.Size], budget: int, spread: Spread = "erdos_renyi_kernel", first: str | None = None
) -> dict[str, int]:
    """How many of ``budget`` weights each layer keeps, to the weight; ``first``: a layer to make dense.

    Raises:
        Refused: A budget that leaves a layer empty, or cannot pay for a dense first layer.
    """
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    exact = _solve({name: _raw(shape, spread) for name, shape in shapes.items()}, sizes, budget, first)
    counts = {name: math.floor(share + 1e-9) for name, share in exact.items()}
    remainders = sorted(counts, key=lambda name: counts[name] - exact[name])  # a stable sort: ties to the first layer
    for name in remainders[: budget - sum(counts.values())]:
        counts[name] += 1
    empty = [name for name, count in counts.items() if count < 1]
    if empty:
        raise Refused(
            f"every layer must keep a live weight: {empty} would have none of {budget} under {spread!r}. Keep more, or "
            "take 'erdos_renyi_kernel', which keeps small layers denser."
        )
    return counts


def _raw(shape: torch.Size, spread: Spread) -> float:
    if spread == "erdos_renyi":
        return (shape[0] + shape[1]) / (shape[0] * shape[1])
    return sum(shape) / shape.numel() if spread == "erdos_renyi_kernel" else 1.0


def _first_layer(model: nn.Module, names: tuple[str, ...], x: Tensor | None) -> str:
    if x is not None:
        found = graph.input_layers(model, x, names)
        if len(found) != 1:
            raise Refused(
                f"the spread 'first_dense' needs one layer that meets the inputs: found {list(found)}. Take another."
            )
        return found[0]
    if not all(isinstance(m, nn.Sequential) for m in model.modules() if next(m.children(), None) is not None):
        raise Refused(
            "the first layer is found from a forward pass, for the order of registration does not tell it: pass some "
            "inputs as x=, or take another spread."
        )
    return names[0]


def _solve(raw: Mapping[str, float], sizes: Mapping[str, int], budget: int, first: str | None) -> dict[str, float]:
    """Real counts that sum to the budget: epsilon * raw * size, or the size of a layer made dense."""
    dense = set() if first is None else {first}
    while True:
        left = budget - sum(sizes[name] for name in dense)
        rest = [name for name in sizes if name not in dense]
        if left < 0 or (left == 0 and rest):
            raise Refused(
                f"the budget must pay for a dense first layer and more: got {budget} for {sizes[first or rest[0]]} "
                f"weights of {first!r}. Keep more, or take another spread."
            )
        epsilon = left / sum(raw[name] * sizes[name] for name in rest) if rest else 0.0
        over = {name for name in rest if epsilon * raw[name] > 1}
        if not over:
            return {name: float(sizes[name]) if name in dense else epsilon * raw[name] * sizes[name] for name in sizes}
        dense |= over  # epsilon rises when they leave the sum, so all of them would be over again


def sparse_masks(
    model: nn.Module, kept: Mapping[str, int], seed: int, *, prunable: Sequence[str] | None = None
) -> Masks:
    """Masks with exactly ``kept[name]`` live weights in each layer, at positions drawn uniformly.

    Args:
        model: Any module.
        kept: A count for each prunable layer, from `layer_counts` or of another mask; some may be 0, not all.
        seed: Seed of the positions.
        prunable: Weights that may be pruned, by name; the model's own when None.

    Raises:
        Refused: Other layers than the prunable ones, or a count outside 0..size.
    """
    full = mask_ops.ones(model, prunable)
    if set(kept) != set(full):
        raise Refused(f"kept must name every prunable layer: got {sorted(kept)} for {sorted(full)}.")
    wrong = {name: count for name, count in kept.items() if not 0 <= count <= full[name].numel()}
    if wrong or not any(kept.values()):
        raise Refused(f"each layer must keep 0 to all of its weights, some layer one: got {wrong or dict(kept)}.")
    return drawn(full, kept, seed)


def drawn(like: Masks, kept: Mapping[str, int], seed: int) -> Masks:
    """Masks of these shapes with exactly ``kept[name]`` live weights in each layer, at positions drawn uniformly."""
    first = {name: (torch.arange(m.numel()) < kept[name]).view_as(m) for name, m in like.items()}
    return {name: m.to(like[name].device) for name, m in mask_ops.layerwise_shuffle(first, seed).items()}
