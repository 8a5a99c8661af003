"""A certificate for a learner that was trained on a small part of its sample, and errs on none of the rest."""

from __future__ import annotations

import math

from scipy import optimize, stats

from ticketlab.bounds.certificates import Bound, sample, stated
from ticketlab.bounds.kl import scalar
from ticketlab.errors import Refused

_COVERS = "the network that the algorithm returns"
_ASSUMPTIONS = (
    "n i.i.d. examples; 0/1 loss; preferent compression: the same network comes of the compressed set alone, and of "
    "the sample with any of the other examples left out"
)


def pick_to_learn(n_compressed: int, n: int, delta: float = 0.05, *, n_classes: int | None = None) -> Bound:
    r"""Risk of a network that was made from k of n examples and is right on the others (Pick-to-Learn).

    The smallest t in [k / n, 1] with

    .. math:: \delta\, I_t(k + 1, n - k) \ge t\, n\, \big(I_t(k, n - k + 1) - I_t(k + 1, n - k)\big),

    I the regularised incomplete beta function: a bound of Campi & Garatti (2023, "Compression, generalization and
    learning"), used so by Paccagnan, Campi & Garatti (NeurIPS 2023). For k = n it is 1.

    Args:
        n_compressed: k, the examples that the network was trained on, in 0..n.
        n: Examples of the whole sample, at least 1.
        delta: Probability with which the bound may fail, in (0, 1).
        n_classes: Decides what is vacuous.

    Returns:
        A certificate; its ``empirical`` is 0, for the network is right on all that it was not trained on.

    Raises:
        Refused: A number out of range.
    """
    k, (size, _) = scalar("n_compressed", n_compressed), sample(n, delta)
    if not (0 <= k <= size and k % 1 == 0):
        raise Refused(f"n_compressed must be a number of examples in 0..n: got {n_compressed!r} of {n!r}.")
    value = 1.0 if k == size else _smallest(int(k), size, float(delta))
    return stated("pick_to_learn", 0.0, value, size, delta, n_classes, True, _COVERS, _ASSUMPTIONS)


def _smallest(k: int, n: int, delta: float) -> float:
    """Where the logarithms of both sides meet: their difference grows with t, from below 0 at k / n."""

    def excess(t: float) -> float:
        return math.log(delta / (t * n)) + float(stats.binom.logsf(k, n, t) - stats.binom.logpmf(k, n, t))

    low = max(k, 1e-9) / n  # for k = 0 both sides vanish at 0
    return float(optimize.brentq(excess, low, 1 - 1e-15, xtol=1e-14, rtol=1e-14))
