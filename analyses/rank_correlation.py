"""Rank correlation over a grid of networks, pooled over groups, with an interval over init seeds."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats

from ticketlab.seeds import stream

Within = Literal["all", "level", "level and treatment"]
"""Networks that are ranked together: all of them; those of one level, by treatment and seed; by seed alone."""


def rank_correlation(
    a: Float[np.ndarray, "*draw level treatment seed"],
    b: Float[np.ndarray, "*draw level treatment seed"],
    within: Within,
) -> Float[np.ndarray, "*draw"]:
    """Correlation of ranks taken, and centred, within groups: Spearman's, pooled over the groups."""
    *draws, n_levels, n_treatments, _ = a.shape
    groups = {"all": 1, "level": n_levels, "level and treatment": n_levels * n_treatments}[within]
    a, b = np.where(np.isfinite(a + b), a, np.nan), np.where(np.isfinite(a + b), b, np.nan)
    ranks = []
    for values in (a, b):
        rank = stats.rankdata(values.reshape(*draws, groups, -1), axis=-1, nan_policy="omit")
        known = np.isfinite(rank)
        mean = np.where(known, rank, 0).sum(-1, keepdims=True) / np.maximum(1, known.sum(-1, keepdims=True))
        ranks.append(np.where(known, rank - mean, 0).reshape(*draws, -1))
    p, q = ranks
    scale = np.sqrt((p * p).sum(-1) * (q * q).sum(-1))
    return np.where(scale > 0, (p * q).sum(-1) / np.where(scale > 0, scale, 1), np.nan)


def bootstrap(
    a: Float[np.ndarray, "level treatment seed"],
    b: Float[np.ndarray, "level treatment seed"],
    within: Within,
    n_draws: int = 1000,
) -> tuple[float, float]:
    """95 % percentile interval of the rank correlation over init seeds drawn with replacement; NaN for one seed."""
    n_seeds = a.shape[-1]
    draws = torch.randint(n_seeds, (n_draws, n_seeds), generator=stream("bootstrap", 0)).numpy()
    p, q = (np.moveaxis(values[..., draws], -2, 0) for values in (a, b))  # [draw, level, treatment, seed]
    found = rank_correlation(p, q, within)
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, (0.025, 0.975)) if n_seeds > 1 and len(found) else (np.nan, np.nan)
    return float(low), float(high)


def p_value(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided, of Spearman's test; NaN where fewer than three networks or no two values differ."""
    known = np.isfinite(a + b)
    if known.sum() < 3 or np.ptp(a[known]) == 0 or np.ptp(b[known]) == 0:
        return float("nan")
    return float(stats.spearmanr(a[known], b[known]).pvalue)
