"""What masks share, per layer and in the whole network, against the masks' own densities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ticketlab.errors import Refused
from ticketlab.overlap.null import EXACT_BELOW, Given, exact_p, moments, normal_p
from ticketlab.state import Masks, stack

WHOLE = "all"
"""Name of the row for the whole network, in the column ``layer``."""
_BLOCK = 2**16  # weights in one matrix product: counts stay exact in float32, and memory small
_COUNTS = 2**21  # live weights of pairs and strata that are tabulated at a time: memory again


def compare(masks_a: Masks, masks_b: Masks, *, stacked: bool = False, given: Given = "layer") -> pd.DataFrame:
    r"""Overlap of two masks in every layer and in the whole network, against the hypergeometric null.

    .. math:: J = \frac{|A \cap B|}{|A \cup B|}, \qquad
        E|A \cap B| = \frac{k_1 k_2}{d}, \qquad z = \frac{|A \cap B| - E}{\sqrt{\mathrm{Var}}}

    The null places the live weights of each layer at random, their number given; the whole network is the sum over
    layers, or similar layer densities alone would look like overlap. ``given="input"`` also keeps how many live
    weights each input of a layer has, ``given="unit"`` how many each unit has: overlap beyond these is not explained
    by which inputs (pixels) or which units are alive. p-values are two-sided (twice the smaller tail), exact where
    the variance is below 100, and normal with continuity correction otherwise.

    Nothing tells a replica axis from an axis of the layer: a conv1d weight has three too. Without ``stacked`` the first
    axis of every mask is that of units, and a stack passed so is compared as one network.

    Args:
        masks_a: True = kept; one network, or a stack where ``stacked``.
        masks_b: Of the same model.
        stacked: Whether both have a replica axis in front; replicas are then compared one by one.
        given: Within what the null places live weights at random.

    Returns:
        One row a layer, and one, ``all``, for the whole; a replica each where stacked. Columns: total, kept_a,
        kept_b, density_a, density_b, intersection, jaccard (NaN where both masks have nothing), expected
        (intersection), variance, expected_jaccard (that of the expected intersection), z (NaN where the null leaves no
        choice, as in a layer that is empty or dense), p_value (1 there).

    Raises:
        Refused: Masks of different names, shapes or replicas, or not bool.
    """
    a, b = (dict(masks) if stacked else {n: m[None] for n, m in masks.items()} for masks in (masks_a, masks_b))
    check([a, b])
    shared = {name: (a[name] & b[name]).flatten(1).sum(1).cpu().numpy() for name in a}
    rows = np.arange(len(next(iter(a.values()))))
    table = _table(shared, _counts(a, given), _counts(b, given), rows, rows)
    return table.assign(replica=np.tile(rows, len(a) + 1))[["replica", *table]] if stacked else table


def pairs(masks: Masks | Sequence[Masks], *, given: Given = "layer") -> pd.DataFrame:
    """Overlap of every two of n masks, as ``compare`` gives it, from one matrix product a layer.

    Args:
        masks: Of one model: a stack [n, ...], or a list of n single masks. Replicas, levels, criteria and tasks may
            stand side by side; their positions name them.
        given: See ``compare``.

    Returns:
        The columns of ``compare`` behind a and b, the positions of the two masks, a < b.

    Raises:
        Refused: As ``compare``; fewer than two masks.
    """
    if not isinstance(masks, Mapping):
        check([{n: m[None] for n, m in one.items()} for one in masks])
        masks = stack(masks)
    check([masks])
    n = len(next(iter(masks.values())))
    if n < 2:
        raise Refused(f"pairs needs at least two masks: got {n}.")
    a, b = np.triu_indices(n, k=1)
    shared = {name: gram(mask)[a, b] for name, mask in masks.items()}
    counts = _counts(masks, given)
    table = _table(shared, counts, counts, a, b)
    return table.assign(a=np.tile(a, len(masks) + 1), b=np.tile(b, len(masks) + 1))[["a", "b", *table]]


def gram(masks: Bool[Tensor, "n ..."]) -> Int[np.ndarray, "n n"]:
    """How many weights of one layer every two masks share."""
    total = torch.zeros(len(masks), len(masks), dtype=torch.float64, device=masks.device)
    for block in masks.flatten(1).split(_BLOCK, dim=1):
        ones = block.float()
        total += ones @ ones.T
    return total.round().long().cpu().numpy()


def check(stacks: Sequence[Mapping[str, Tensor]]) -> None:
    """Refuse stacked masks that are not of one model."""
    if not stacks or not stacks[0]:
        raise Refused("masks must name at least one layer: got none. Build them with masks.ones(model).")
    first = stacks[0]
    replicas = {len(mask) for mask in first.values() if mask.ndim}
    if len(replicas) > 1:
        raise Refused(
            f"masks must have one replica axis in front, of one length: got {sorted(replicas)}. Stack single networks "
            "with ticketlab.state.stack."
        )
    for masks in stacks:
        if set(masks) != set(first):
            raise Refused(
                f"masks must be of one model: got the layers {sorted(first)} and {sorted(masks)}. "
                "Compare the layers that both have, by name."
            )
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise Refused(
                    f"masks[{name!r}] must be bool, True = kept: got {mask.dtype}. Convert it with mask != 0."
                )
            if mask.ndim < 2 or mask.shape != first[name].shape:
                raise Refused(
                    f"masks[{name!r}] must have equal shapes and as many replicas: "
                    f"got {tuple(first[name].shape)} and {tuple(mask.shape)}, replica axis first."
                )


def _counts(masks: Masks, given: Given) -> dict[str, tuple[int, np.ndarray]]:
    """For each layer the weights of a stratum, and the live ones of every mask and stratum [n, stratum]."""
    if given not in get_args(Given):
        raise Refused(f"given must be one of {list(get_args(Given))}: got {given!r}.")
    found = {}
    for name, mask in masks.items():
        matrix = mask.reshape(len(mask), mask.shape[1], -1)  # [n, unit, input]
        gone = {"layer": (1, 2), "input": (1,), "unit": (2,)}[given]
        live = matrix.sum(gone).reshape(len(mask), -1)
        found[name] = prod(matrix.shape[d] for d in gone), live.cpu().numpy()
    return found


def _table(
    shared: Mapping[str, np.ndarray],
    counts_a: Mapping[str, tuple[int, np.ndarray]],
    counts_b: Mapping[str, tuple[int, np.ndarray]],
    a: np.ndarray,
    b: np.ndarray,
) -> pd.DataFrame:
    """Rows layer by layer, the pairs (a[i], b[i]) within each, the whole network last."""
    sizes = {name: np.full(kept.shape[1], size) for name, (size, kept) in counts_a.items()}
    kept_a, kept_b = ({name: kept for name, (_, kept) in counts.items()} for counts in (counts_a, counts_b))
    blocks = [_rows(name, shared[name], sizes[name], kept_a[name], kept_b[name], a, b) for name in shared]
    all_sizes, all_a, all_b = (np.concatenate([part[n] for n in shared], axis=-1) for part in (sizes, kept_a, kept_b))
    blocks.append(_rows(WHOLE, sum(shared.values(), np.zeros(len(a), int)), all_sizes, all_a, all_b, a, b))
    return pd.concat(blocks, ignore_index=True)


def _rows(
    layer: str, x: np.ndarray, sizes: np.ndarray, kept_a: np.ndarray, kept_b: np.ndarray, a: np.ndarray, b: np.ndarray
) -> pd.DataFrame:
    mean, variance = (moment[a, b] for moment in moments(sizes, kept_a, kept_b))
    p_value = normal_p(x, mean, variance)
    few = np.flatnonzero(variance < EXACT_BELOW)
    for part in np.array_split(few, 1 + len(few) * len(sizes) // _COUNTS):
        p_value[part] = exact_p(x[part], sizes, kept_a[a[part]], kept_b[b[part]])
    n_a, n_b, total = kept_a.sum(1)[a], kept_b.sum(1)[b], int(sizes.sum())
    with np.errstate(invalid="ignore"):  # 0 / 0 of empty layers
        z = np.where(variance > 0, (x - mean) / np.sqrt(variance), np.nan)
        jaccard, expected_jaccard = (shared / (n_a + n_b - shared) for shared in (x, mean))
    return pd.DataFrame(
        {
            "layer": layer,
            "total": total,
            "kept_a": n_a,
            "kept_b": n_b,
            "density_a": n_a / total,
            "density_b": n_b / total,
            "intersection": x,
            "jaccard": jaccard,
            "expected": mean,
            "variance": variance,
            "expected_jaccard": expected_jaccard,
            "z": z,
            "p_value": p_value,
        }
    )
