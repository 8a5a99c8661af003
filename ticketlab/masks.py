"""Masks: which weights are prunable, how many are kept, and the one prune step.

A mask is a dict of bool tensors, True = kept, one for each prunable parameter. Counts are exact and
ties are broken by index, so that a mask is a function of the scores alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ticketlab.errors import Refused
from ticketlab.seeds import stream
from ticketlab.state import Masks

Scope = Literal["global", "layer"]

_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class EmptyLayerError(Refused):
    """A pruning that would leave a layer without a live weight."""


def prunable(model: nn.Module) -> tuple[str, ...]:
    """Names of the weights that may be pruned, in the model's order.

    Weights of linear, convolution and attention projections; never biases, norms or embeddings. A weight
    tied to an embedding is left out, and so are frozen ones and those under a parametrization.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    wanted: set[int] = set()
    for module in model.modules():
        names: tuple[str, ...] = ("weight",) if isinstance(module, _WEIGHTED) else ()
        names = _PROJECTIONS if isinstance(module, nn.MultiheadAttention) else names
        wanted |= {id(getattr(module, name)) for name in names if getattr(module, name) is not None}
    found = tuple(n for n, p in model.named_parameters() if id(p) in wanted - embeddings and p.requires_grad)
    if not found:
        raise Refused(
            "the model must have a trainable linear, convolution or attention weight to prune: "
            f"found none in {type(model).__name__}."
        )
    return found


def ones(model: nn.Module) -> Masks:
    """The mask that keeps every prunable weight."""
    params = dict(model.named_parameters())
    return {name: torch.ones_like(params[name], dtype=torch.bool) for name in prunable(model)}


def validate(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless ``masks`` (single or stacked) fit the model: names, shapes, dtype."""
    expected = ones(model)
    if set(masks) != set(expected):
        missing, extra = sorted(set(expected) - set(masks)), sorted(set(masks) - set(expected))
        raise Refused(
            f"masks must cover every prunable parameter and no other: missing {missing}, unknown {extra}. "
            "Build them with masks.ones(model)."
        )
    axes: set[int | None] = set()
    for name, mask in masks.items():
        shape = tuple(expected[name].shape)
        if mask.dtype != torch.bool:
            raise Refused(f"masks[{name!r}] must be bool, True = kept: got {mask.dtype}. Convert it with mask != 0.")
        if tuple(mask.shape[-len(shape) :]) != shape or mask.ndim > len(shape) + 1:
            raise Refused(f"masks[{name!r}] must have shape {shape} or [replica, *{shape}]: got {tuple(mask.shape)}.")
        axes.add(mask.shape[0] if mask.ndim > len(shape) else None)
    if len(axes) > 1:
        raise Refused(f"all masks must share one replica axis: got lengths {sorted(map(str, axes))}.")


def kept(masks: Mapping[str, Tensor], *, stacked: bool = False) -> Int[Tensor, "*replica"]:
    """Number of weights kept in the whole network; one number a replica when ``stacked``."""
    return torch.stack([mask.flatten(int(stacked)).sum(-1) for mask in masks.values()]).sum(0)


def total(masks: Mapping[str, Tensor], *, stacked: bool = False) -> int:
    """Number of prunable weights of one network."""
    return sum(mask[0].numel() if stacked else mask.numel() for mask in masks.values())


def density(masks: Mapping[str, Tensor], *, stacked: bool = False) -> Tensor:
    """kept / prunable, in [0, 1], float64; one number a replica when ``stacked``."""
    return kept(masks, stacked=stacked).double() / total(masks, stacked=stacked)


def n_removed(alive: int, fraction: float) -> int:
    """How many of ``alive`` weights one prune step removes: fraction * alive, halves rounded up."""
    return math.floor(fraction * alive + 0.5)


def fractions_by_layer(
    model: nn.Module, fraction: float, *, conv: float | None = None, output: float | None = None
) -> dict[str, float]:
    """The rate of each layer under layer scope (Frankle & Carbin 2019, appendices G and H).

    Args:
        model: Its last prunable parameter is the output layer.
        fraction: Rate of the fully connected layers.
        conv: Rate of convolutions; ``fraction`` when None.
        output: Rate of the output layer; half of ``fraction`` when None, as in the paper.
    """
    names, params = prunable(model), dict(model.named_parameters())
    rates = {n: conv if conv is not None and params[n].ndim > 2 else fraction for n in names}
    rates[names[-1]] = fraction / 2 if output is None else output
    return rates


def prune(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], fractions: float | Mapping[str, float]) -> Masks:
    """Remove the least-scored of the weights still alive, an exact number of them.

    A float prunes with one threshold over the whole network (global scope); a dict prunes each layer at
    its own rate (layer scope). Of equal scores the one with the lower index is kept. The result is nested
    in ``masks``. One network; call it once for each replica.

    Args:
        masks: True = kept.
        scores: Higher = keep, the shapes of ``masks``; finite where the mask is True.
        fractions: In (0, 1), the share of the weights still alive that goes.

    Raises:
        Refused: A rate outside (0, 1), scores of other names or shapes, a non-finite score of a live
            weight, or a layer that would be left empty.
    """
    _check_scores(masks, scores)
    if isinstance(fractions, Mapping):
        if set(fractions) != set(masks):
            raise Refused(f"fractions must name every masked layer: got {sorted(fractions)} for {sorted(masks)}.")
        groups: list[tuple[tuple[str, ...], float]] = [((name,), fractions[name]) for name in masks]
    else:
        groups = [(tuple(masks), fractions)]
    new: Masks = {}
    for names, fraction in groups:
        new.update(_prune_group({n: masks[n] for n in names}, scores, fraction))
    empty = [name for name, mask in new.items() if not mask.any()]
    if empty:
        raise EmptyLayerError(
            f"pruning must leave every layer a live weight: {empty} would be empty at "
            f"{int(kept(new))} of {total(new)} weights. Prune fewer levels, a smaller fraction, or by layer."
        )
    return new


def _prune_group(masks: Masks, scores: Mapping[str, Tensor], fraction: float) -> Masks:
    if not 0 < fraction < 1:
        raise Refused(f"a prune fraction must lie in (0, 1): got {fraction} for {list(masks)}.")
    alive = torch.cat([m.flatten() for m in masks.values()])
    score = torch.cat([scores[n].flatten() for n in masks])
    live = alive.nonzero()[:, 0]
    n_keep = len(live) - n_removed(len(live), fraction)
    # A stable descending sort leaves equal scores in the order of their index.
    order = torch.sort(score[live], descending=True, stable=True).indices[:n_keep]
    new = torch.zeros_like(alive)
    new[live[order]] = True
    parts = new.split([m.numel() for m in masks.values()])
    return {name: part.view_as(mask) for (name, mask), part in zip(masks.items(), parts, strict=True)}


def _check_scores(masks: Mapping[str, Tensor], scores: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        if name not in scores or scores[name].shape != mask.shape:
            given = tuple(scores[name].shape) if name in scores else "none"
            raise Refused(f"scores[{name!r}] must have the mask's shape {tuple(mask.shape)}: got {given}.")
        bad = int((~scores[name][mask].isfinite()).sum())
        if bad:
            raise Refused(f"scores must be finite where a weight is alive: {bad} in {name!r} are not.")


def random_mask(masks: Mapping[str, Tensor], seed: int) -> Masks:
    """As many live weights in the whole network, at positions drawn uniformly over all layers.

    Nothing keeps a small layer from losing all of its weights: that is what a random mask does.
    """
    flat = torch.cat([m.flatten() for m in masks.values()])
    parts = _shuffled(flat, seed, "random_mask").split([m.numel() for m in masks.values()])
    return {name: part.view_as(mask) for (name, mask), part in zip(masks.items(), parts, strict=True)}


def layerwise_shuffle(masks: Mapping[str, Tensor], seed: int) -> Masks:
    """As many live weights in each layer, at positions drawn uniformly within it."""
    return {
        name: _shuffled(mask.flatten(), seed, f"layerwise_shuffle {name}").view_as(mask) for name, mask in masks.items()
    }


def _shuffled(flat: Tensor, seed: int, purpose: str) -> Tensor:
    order = torch.randperm(flat.numel(), generator=stream(purpose, seed))
    return flat[order.to(flat.device)]
