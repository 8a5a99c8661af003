"""Overlap up to the order of hidden units: a maximum, held against the maxima of random masks."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ticketlab.errors import check_count
from ticketlab.overlap.compare import compare
from ticketlab.overlap.null import Given, margin_masks, random_masks
from ticketlab.permutation import Groups, match, permute
from ticketlab.state import Masks


def aligned(
    groups: Groups,
    masks_a: Masks,
    masks_b: Masks,
    *,
    given: Given = "input",
    draws: int = 19,
    restarts: int = 2,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Overlap of two masks after the permutation of hidden units that maximises it, against chance.

    .. math:: \max_\pi |A \cap \pi(B)|

    A maximum over permutations exceeds the hypergeometric mean for random masks too, and the more so where units
    differ in size, because it brings large units together. The null therefore aligns random masks in the same way,
    with as many restarts, and keeps of b, each name more than the one before:

    - ``layer``: how many live weights each layer has;
    - ``unit``: also how many each unit has;
    - ``input``: also how many each input of a layer has (a pixel, or a hidden unit of b). Masks that share nothing but
      these two margins score 1. ``compare(given="input")`` keeps the inputs' alone: units in a given order cannot be
      brought together.

    Args:
        groups: Of the architecture, from ``permutation.groups(model, x)``.
        masks_a: Of one network, True = kept.
        masks_b: Of another.
        given: Within what the null places b's live weights at random.
        draws: Random masks in the null; the least p-value is 1 / (draws + 1).
        restarts: Starts of every matching, see ``permutation.match``.
        seed: Of the random masks and the matchings.

    Returns:
        One row a layer, and ``all``: total, kept_a, kept_b, intersection and jaccard after alignment,
        intersection_before, null_mean, null_sd (of the aligned intersection), null_jaccard (that of the mean),
        ratio (intersection / null_mean), z, p_value (one-sided, more than chance: (1 + draws at least as large) /
        (1 + draws)).

    Raises:
        Refused: As ``compare``; fewer than two draws.
    """
    check_count("draws", draws, 2, 10**5)  # one has no spread
    before = compare(masks_a, masks_b, given=given)
    table = _aligned_once(groups, masks_a, masks_b, restarts, seed)
    null = np.stack(
        [
            _aligned_once(groups, masks_a, b, restarts, seed)["intersection"].to_numpy()
            for b in _drawn(masks_b, given, draws, seed)
        ]
    )  # [draw, layer]
    found, mean, sd = table["intersection"].to_numpy(), null.mean(0), null.std(0, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.where(sd > 0, (found - mean) / sd, np.nan)
        ratio = found / mean
    columns = ["layer", "total", "kept_a", "kept_b", "intersection", "jaccard"]
    return table[columns].assign(
        intersection_before=before["intersection"],
        null_mean=mean,
        null_sd=sd,
        null_jaccard=mean / (table["kept_a"] + table["kept_b"] - mean),
        ratio=ratio,
        z=z,
        p_value=(1 + (null >= found).sum(0)) / (1 + draws),
    )


def _drawn(masks: Masks, given: Given, draws: int, seed: int) -> list[Masks]:
    if given == "input":
        return margin_masks(masks, seed, draws)
    return [random_masks(masks, seed + draw, given) for draw in range(draws)]


def _aligned_once(groups: Groups, masks_a: Masks, masks_b: Masks, restarts: int, seed: int) -> pd.DataFrame:
    matching = match(groups, masks_a, masks_b, restarts=restarts, seed=seed)
    return compare(masks_a, permute(groups, masks_b, matching.permutations))
