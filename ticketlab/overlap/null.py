r"""What two random masks share: sums of independent hypergeometric counts, their moments and tail probabilities.

A *stratum* is a set of weights within which every placement of the live ones is equally likely: a whole layer, or
the weights of one input or of one unit.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache, reduce
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.special import gammaln, ndtr
from torch import Tensor

from ticketlab.masks import layerwise_shuffle
from ticketlab.seeds import stream
from ticketlab.state import Masks

Given = Literal["layer", "input", "unit"]
EXACT_BELOW = 100.0
"""Variance of the intersection below which p-values are exact, and from which they are normal."""
_ROUNDS = 100  # of trades
_TERMS = 96  # of a tail sum: its terms fall by exp(-96^2 / 200) at the largest variance that is summed


def random_masks(masks: Masks, seed: int, given: Given) -> Masks:
    """One draw from the null: as many live weights in every stratum, at positions drawn uniformly within it."""
    if given == "layer":
        return layerwise_shuffle(masks, seed)
    along = 0 if given == "input" else 1  # of [unit, input]
    drawn = {}
    for name, mask in masks.items():
        matrix = mask.reshape(len(mask), -1)
        order = torch.rand(matrix.shape, generator=stream(f"null given {given} {name}", seed)).argsort(along)
        drawn[name] = matrix.gather(along, order.to(mask.device)).view_as(mask)
    return drawn


def margin_masks(masks: Masks, seed: int, n: int) -> list[Masks]:
    r"""``n`` random masks with as many live weights in every unit and in every input of every layer.

    Each is 100 rounds of trades away from one hidden mask, itself 100 rounds away from the one given (Besag & Clifford
    1989). A round is symmetric, so under the null that places live weights uniformly within both margins the mask
    given and the n drawn are exchangeable, whether the rounds have mixed or not: p-values by rank are exact. LeNet's
    first layer, 300 x 784, has forgotten where it began after some 60 rounds.
    """
    hub = {name: _traded(mask, stream(f"null hub {name}", seed)) for name, mask in masks.items()}
    return [
        {name: _traded(mask, stream(f"null trades {name}", seed, i)) for name, mask in hub.items()} for i in range(n)
    ]


def _traded(mask: Bool[Tensor, "unit ..."], generator: torch.Generator) -> Bool[Tensor, "unit ..."]:
    """Units paired at random deal anew, between them, the inputs that one of the two has: curveball's global trades.

    Strona et al. (2014), Carstens et al. (2018): the stationary distribution is uniform over all masks of both margins.
    """
    matrix = mask.reshape(len(mask), -1).cpu().clone()
    place = torch.arange(matrix.shape[1])
    for _ in range(_ROUNDS):
        one, other = torch.randperm(len(matrix), generator=generator)[: len(matrix) // 2 * 2].view(2, -1)
        a, b = matrix[one], matrix[other]
        differ = a ^ b
        order = torch.rand(a.shape, generator=generator).masked_fill_(~differ, 2).argsort(1)
        dealt = torch.zeros_like(a).scatter_(1, order, place < (a & differ).sum(1, keepdim=True))
        matrix[one], matrix[other] = (a & b) | dealt, (a & b) | (differ & ~dealt)
    return matrix.view_as(mask).to(mask.device)


def moments(
    total: Int[np.ndarray, " stratum"], kept_a: Int[np.ndarray, "m stratum"], kept_b: Int[np.ndarray, "n stratum"]
) -> tuple[Float[np.ndarray, "m n"], Float[np.ndarray, "m n"]]:
    r"""Mean and variance of \|A n B\|, summed over strata, for every two uniformly placed masks of given counts.

    .. math:: \sum \frac{k_1 k_2}{d}, \qquad \sum \frac{k_1 k_2 (d - k_1)(d - k_2)}{d^2 (d - 1)}
    """
    d, a, b = (np.asarray(count, dtype=np.float64) for count in (total, kept_a, kept_b))
    return (a / d) @ b.T, (a * (d - a) / (d * d * np.maximum(d - 1, 1))) @ (b * (d - b)).T


def normal_p(x: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Two-sided, with a continuity correction of 1/2; 1 where the null leaves no choice."""
    distance = np.maximum(np.abs(x - mean) - 0.5, 0)
    return np.minimum(1, 2 * ndtr(-distance / np.sqrt(np.maximum(variance, np.finfo(float).tiny))))


def exact_p(
    x: Int[np.ndarray, " n"],
    total: Int[np.ndarray, " stratum"],
    kept_a: Int[np.ndarray, "n stratum"],
    kept_b: Int[np.ndarray, "n stratum"],
) -> Float[np.ndarray, " n"]:
    """Two-sided: twice the smaller tail, at most 1; the tails of one hypergeometric count or of a sum of several.

    The variance of the sum must be below ``EXACT_BELOW``.
    """
    rows, back = np.unique(np.column_stack([x, kept_a, kept_b]), axis=0, return_inverse=True)
    x, kept_a, kept_b = rows[:, 0], *np.split(rows[:, 1:], 2, axis=1)
    if len(total) == 1:
        return _one_stratum(x, int(total[0]), kept_a[:, 0], kept_b[:, 0])[back]
    sums = zip(x, kept_a, kept_b, strict=True)
    return np.array([_several_strata(int(count), total, a, b) for count, a, b in sums])[back]


def log_pmf(x: np.ndarray, total: float | np.ndarray, kept_a: np.ndarray, kept_b: np.ndarray) -> np.ndarray:
    """ln P(|A n B| = x); relative error of the probability near 1e-9 for a million weights."""

    def log_choose(n: np.ndarray | float, k: np.ndarray) -> np.ndarray:
        return gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)

    return log_choose(kept_a, x) + log_choose(total - kept_a, kept_b - x) - log_choose(total, kept_b)


def _one_stratum(x: np.ndarray, d: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The tail on the side of x as p(x) (1 + r + r r' + ...) with the ratios r of successive probabilities."""
    x, a, b = (count.astype(np.float64)[:, None] for count in (x, a, b))
    step = np.arange(_TERMS)
    up = x + step
    rising = (a - up) * (b - up) / ((up + 1) * np.maximum(d - a - b + up + 1, 1))
    down = x - step
    falling = down * (d - a - b + down) / ((a - down + 1) * (b - down + 1))
    ratios = np.maximum(np.where(x > a * b / d, rising, falling), 0)
    ratios[np.cumsum(ratios == 0, axis=1) > 0] = 0  # beyond the end of the support
    here = np.exp(log_pmf(x, d, a, b))[:, 0]
    tail = here * (1 + np.cumprod(ratios, axis=1).sum(1))
    return np.minimum(1, 2 * np.minimum(tail, 1 - tail + here))


def _several_strata(x: int, total: np.ndarray, kept_a: np.ndarray, kept_b: np.ndarray) -> float:
    """The strata that leave a choice, convolved; those of equal counts come together, as powers of one."""
    a, b = np.minimum(kept_a, kept_b), np.maximum(kept_a, kept_b)
    free = (a > 0) & (b < total)
    place = x - int(a[~free].sum())  # where one mask is empty or dense, the other's live weights decide
    total, a, b = total[free], a[free], b[free]
    equal = sorted(Counter(zip(total.tolist(), a.tolist(), b.tolist(), strict=True)).items())
    strata = [_pmf(*counts, times) for counts, times in equal]
    low = sum(start for start, _ in strata)
    mean, variance = moments(total, a[None], b[None])
    size = _end(mean.item(), variance.item()) - low  # what is cut off adds to nothing below it
    pmf = reduce(lambda one, other: np.convolve(one, other)[:size], (part for _, part in strata), np.ones(1))
    place -= low
    return float(min(1, 2 * min(pmf[: max(place + 1, 0)].sum(), pmf[max(place, 0) :].sum())))


@lru_cache(maxsize=2**14)
def _pmf(d: int, a: int, b: int, times: int) -> tuple[int, np.ndarray]:
    """The probabilities of a sum of equal strata, a <= b, that exceed 1e-100, and the count that they begin at."""
    mean, variance = (times * m.item() for m in moments(np.array([d]), np.array([[a]]), np.array([[b]])))
    if times > 1:
        (low, one), (more, other) = (_pmf(d, a, b, part) for part in (times // 2, times - times // 2))
        return low + more, np.convolve(one, other)[: _end(mean, variance) - low - more]
    low = max(0, a + b - d, int(mean - _reach(variance)))
    support = np.arange(low, min(a + 1, _end(mean, variance)), dtype=np.float64)
    return low, np.exp(log_pmf(support, d, np.array(a), np.array(b)))


def _end(mean: float, variance: float) -> int:
    """From this count on probabilities are below 1e-100."""
    return int(mean + _reach(variance)) + 2


def _reach(variance: float) -> float:
    """Distance from the mean beyond which probabilities are below 1e-100, by Bernstein's inequality."""
    return 77 + math.sqrt(77**2 + 461 * variance)
