"""Overlap up to the order of hidden units: a maximum, held against the maxima of random masks."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ticketlab.functional import Masks
from ticketlab.masks import layerwise_shuffle
from ticketlab.overlap.compare import compare
from ticketlab.permutation import Groups, match, permute


def aligned(
    groups: Groups, masks_a: Masks, masks_b: Masks, *, draws: int = 19, restarts: int = 2, seed: int = 0
) -> pd.DataFrame:
    r"""Overlap of two masks after the permutation of hidden units that maximises it, against chance.

    .. math:: \max_\pi |A \cap \pi(B)|

    A maximum over permutations exceeds the hypergeometric mean for random masks too. The null therefore aligns
    layerwise shuffles of b in the same way, with as many restarts.

    Args:
        groups: Of the architecture, from ``permutation.groups(model, x)``.
        masks_a: Of one network, True = kept.
        masks_b: Of another.
        draws: Random masks in the null; the least p-value is 1 / (draws + 1).
        restarts: Starts of every matching, see ``permutation.match``.
        seed: Of the shuffles and the matchings.

    Returns:
        One row a layer, and ``all``: total, kept_a, kept_b, intersection and jaccard after alignment,
        intersection_before, null_mean, null_sd (of the aligned intersection), null_jaccard (that of the mean),
        z, p_value (one-sided, more than chance: (1 + draws at least as large) / (1 + draws)).

    Raises:
        ValueError: As ``compare``; fewer than two draws.
    """
    if draws < 2:
        raise ValueError(f"draws must be at least 2, for a spread: got {draws}.")
    before = compare(masks_a, masks_b)
    table = _aligned_once(groups, masks_a, masks_b, restarts, seed)
    shuffles = [layerwise_shuffle(masks_b, seed + draw) for draw in range(draws)]
    null = np.stack(
        [_aligned_once(groups, masks_a, b, restarts, seed)["intersection"].to_numpy() for b in shuffles]
    )  # [draw, layer]
    found, mean, sd = table["intersection"].to_numpy(), null.mean(0), null.std(0, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.where(sd > 0, (found - mean) / sd, np.nan)
    columns = ["layer", "total", "kept_a", "kept_b", "intersection", "jaccard"]
    return table[columns].assign(
        intersection_before=before["intersection"],
        null_mean=mean,
        null_sd=sd,
        null_jaccard=mean / (table["kept_a"] + table["kept_b"] - mean),
        z=z,
        p_value=(1 + (null >= found).sum(0)) / (1 + draws),
    )


def _aligned_once(groups: Groups, masks_a: Masks, masks_b: Masks, restarts: int, seed: int) -> pd.DataFrame:
    matching = match(groups, masks_a, masks_b, restarts=restarts, seed=seed)
    return compare(masks_a, permute(groups, masks_b, matching.permutations))
