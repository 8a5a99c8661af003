"""The binomial tail in log space, where its own numbers underflow, and its inverse."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import gammaln


def log_cdf(errors: int, n: int, p: float) -> float:
    """ln P(Binomial(n, p) <= errors) as a sum of its terms: right at thousands of nats, where a tail of doubles is 0.

    Args:
        errors: In 0..n.
        n: Number of trials, at least 1.
        p: Probability of an error, in [0, 1].
    """
    return _log_cdf(_log_coefficients(errors, n), n, p)


def upper_inverse(errors: int, n: int, log_delta: float) -> float:
    r"""The largest risk under which so few errors are not rarer than delta (Langford 2005, def. 3.2).

    .. math:: \overline{Bin}(k, n, \delta) = \max \{ p : P(Bin(n, p) \le k) \ge \delta \}

    The upper end of a one-sided Clopper-Pearson interval, for deltas down to exp(-10^6) and beyond; rounded up
    by at most the spacing of doubles.

    Args:
        errors: k, in 0..n.
        n: Sample size, at least 1.
        log_delta: ln delta, at most 0.
    """
    if errors == n:
        return 1.0
    coefficients = _log_coefficients(errors, n)
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:  # until the two are neighbours
        if _log_cdf(coefficients, n, middle) >= log_delta:
            low = middle
        else:
            high = middle
    return high


def _log_coefficients(errors: int, n: int) -> np.ndarray:
    """ln C(n, i) for i = 0..errors."""
    i = np.arange(errors + 1)
    return gammaln(n + 1) - gammaln(i + 1) - gammaln(n - i + 1)


def _log_cdf(coefficients: np.ndarray, n: int, p: float) -> float:
    if p in (0.0, 1.0):
        return 0.0 if p == 0.0 or len(coefficients) == n + 1 else -math.inf
    i = np.arange(len(coefficients))
    terms = coefficients + i * math.log(p) + (n - i) * math.log1p(-p)
    largest = terms.max()
    return min(0.0, float(largest + np.log(np.exp(terms - largest).sum())))
