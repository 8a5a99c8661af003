"""Upper bounds on the risk, each with the statement that it makes.

The sample is n i.i.d. examples, the loss lies in [0, 1], and the prior (the code) is fixed before the sample is
seen. With probability at least 1 - delta over the sample a certificate holds for every hypothesis that it covers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from ticketlab.bounds.binomial import upper_inverse
from ticketlab.bounds.kl import Value, kl_inverse, nats, numbers, plain, probability, scalar, together
from ticketlab.errors import Refused
from ticketlab.shown import as_line, as_table

_SAMPLE = "n i.i.d. examples; loss in [0, 1]"
_CODE = f"{_SAMPLE}; a prefix-free code fixed before the sample, in which the description has this length"
_DESCRIBED = "the hypothesis described, and every other at the cost of its own description"


@dataclass(frozen=True)
class Bound:
    """An upper bound on the risk, and what it certifies. Fields are arrays where arrays were given."""

    name: str
    value: Value
    """As the formula gives it, so that Hoeffding forms can exceed 1."""
    empirical: Value
    """The loss on the sample."""
    complexity: Value
    """value - empirical: what the description, delta and n add."""
    n: int
    delta: float
    vacuous: bool | np.ndarray
    """Whether it is no better than chance, 1 - 1 / n_classes (than 1 where the number of classes is not given)."""
    certificate: bool
    """Whether the value bounds the risk of what it covers; otherwise it is a formula and no more."""
    covers: str
    """The hypotheses that it speaks of."""
    assumptions: str

    __repr__, _repr_html_ = as_line, as_table

    def __float__(self) -> float:
        return float(self.value)


def mdl(
    train_error: ArrayLike,
    kept: ArrayLike,
    total: ArrayLike,
    n: int,
    delta: float = 0.05,
    *,
    weights: Literal["trained", "seed"] = "trained",
    choice_nats: ArrayLike = 0.0,
    n_classes: int | None = None,
) -> Bound:
    r"""The formula in which sparser masks generalise better, in natural logarithms, as it is usually stated.

    .. math:: \hat L + \sqrt{\frac{\|m\|_0 \ln d + \sum_j \ln N_j + \ln (1 / \delta)}{2 n}}

    It is :func:`occam_hoeffding` with k ln d nats for the mask and nothing for the values. The choices, ln N_j nats
    each, are not in the formula as it is usually stated; a certificate pays for those that were made with the sample
    in sight, such as that of the seed. As the sum over k >= 2 of C(d, k) d^-k is below e - 2 < 1, it certifies masks
    of at least two weights over weights that a seed fixes before the sample is seen. Trained weights, rewound to
    theta_k or not, have further bits that it leaves out: for them it is a formula and no certificate.

    Args:
        train_error: Mean loss on the sample, in [0, 1].
        kept: k, in 0..total.
        total: d, the number of prunable weights, at least 1.
        n: Number of examples.
        delta: In (0, 1).
        weights: ``trained``, or ``seed`` where nothing but the mask depends on the sample.
        choice_nats: As :attr:`Description.choice_nats`, at least 0.
        n_classes: Decides what is vacuous.

    Raises:
        Refused: A number out of range.
    """
    if weights not in ("trained", "seed"):
        raise Refused(f"weights must be 'trained' or 'seed': got {weights!r}.")
    k, d, error, choices = together(
        kept=numbers("kept", kept),
        total=numbers("total", total),
        train_error=_loss(train_error),
        choice_nats=nats("choice_nats", choice_nats),
    )
    if not ((d >= 1) & (k >= 0) & (k <= d) & (k % 1 == 0) & (d % 1 == 0)).all():
        raise Refused(
            f"kept must be a count in 0..total: got {kept!r} of {total!r}. Take them from masks.kept and total."
        )
    n, log_delta = sample(n, delta)
    value = error + np.sqrt((k * np.log(d) + choices - log_delta) / (2 * n))
    if weights == "seed":
        covers = "masks of at least two weights over weights that a seed fixes before the sample is seen"
    else:
        covers = "the mask alone: the bits of trained values are left out, so no trained network"
    certified = weights == "seed" and bool((k >= 2).all())
    return stated(
        "mdl", error, value, n, delta, n_classes, certified, covers, f"{_SAMPLE}; k ln d nats a mask, and the choices"
    )


def occam_hoeffding(
    train_error: ArrayLike,
    description_nats: ArrayLike,
    n: int,
    delta: float = 0.05,
    *,
    n_classes: int | None = None,
    covers: str = _DESCRIBED,
) -> Bound:
    r"""Occam's razor with Hoeffding's inequality (Blumer et al. 1987; Shalev-Shwartz & Ben-David 2014, thm. 7.7).

    .. math:: \hat L + \sqrt{\frac{\ln (1 / \pi(h)) + \ln (1 / \delta)}{2 n}}

    Args:
        train_error: Mean loss on the sample, in [0, 1].
        description_nats: ln 1 / pi(h), at least 0; such as ``description_length(...).nats``.
        n: Number of examples.
        delta: In (0, 1).
        n_classes: Decides what is vacuous.
        covers: What the description describes.

    Raises:
        Refused: A number out of range.
    """
    error, budget, n = _paid(train_error, n, delta, description_nats=description_nats)
    value = error + np.sqrt(budget / (2 * n))
    return stated("occam_hoeffding", error, value, n, delta, n_classes, True, covers, _CODE)


def occam_kl(
    train_error: ArrayLike,
    description_nats: ArrayLike,
    n: int,
    delta: float = 0.05,
    *,
    n_classes: int | None = None,
    covers: str = _DESCRIBED,
) -> Bound:
    r"""Occam's razor with the relative-entropy form of Chernoff's inequality (Langford 2005).

    .. math:: kl^{-1} \Big( \hat L, \frac{\ln (1 / \pi(h)) + \ln (1 / \delta)}{n} \Big)

    Never above :func:`occam_hoeffding`, by Pinsker's inequality. Arguments as there.
    """
    error, budget, n = _paid(train_error, n, delta, description_nats=description_nats)
    value = kl_inverse(error, budget / n)
    return stated("occam_kl", error, value, n, delta, n_classes, True, covers, _CODE)


def binomial_tail(
    train_error: ArrayLike,
    description_nats: ArrayLike,
    n: int,
    delta: float = 0.05,
    *,
    n_classes: int | None = None,
    covers: str = _DESCRIBED,
) -> Bound:
    r"""Occam's razor with the binomial tail itself: the tightest of the three, for 0/1 loss (Langford 2005, thm. 4.1).

    .. math:: \max \{ p : P(Bin(n, p) \le n \hat L) \ge \delta \, \pi(h) \}

    Never above :func:`occam_kl`, by Chernoff's inequality. Arguments as for :func:`occam_hoeffding`, except that
    the loss must be 0/1: n times the training error must be an integer. It sums a term per error, 10^7 at most.

    Raises:
        Refused: A number out of range, or a training error that is no number of errors among n.
    """
    error, budget, n = _paid(train_error, n, delta, description_nats=description_nats)
    errors = _errors(error, n)
    if n > 10**9 or errors.max(initial=0) > 10**7:
        raise Refused(f"n must be at most 10^9, with 10^7 errors: got {n} and {errors.max(initial=0)}. Use occam_kl.")
    value = np.vectorize(upper_inverse, otypes=[float])(errors, n, -budget)
    assumptions = _CODE.replace("loss in [0, 1]", "0/1 loss")
    return stated("binomial_tail", error, value, n, delta, n_classes, True, covers, assumptions)


def pac_bayes_kl(
    train_error: ArrayLike, kl_nats: ArrayLike, n: int, delta: float = 0.05, *, n_classes: int | None = None
) -> Bound:
    r"""PAC-Bayes in relative entropy, with Maurer's (2004) constant.

    .. math:: kl^{-1} \Big( \hat L(Q), \frac{KL(Q \| P) + \ln (2 \sqrt n / \delta)}{n} \Big)

    Args:
        train_error: Mean loss of the Gibbs classifier Q on the sample, exact or itself bounded from above.
        kl_nats: KL(Q || P), at least 0, for a prior P fixed before the sample.
        n: Number of examples.
        delta: In (0, 1).
        n_classes: Decides what is vacuous.

    Raises:
        Refused: A number out of range.
    """
    error, budget, n = _pac_bayes(train_error, kl_nats, n, delta)
    return _gibbs("pac_bayes_kl", error, kl_inverse(error, budget / n), n, delta, n_classes)


def pac_bayes_mcallester(
    train_error: ArrayLike, kl_nats: ArrayLike, n: int, delta: float = 0.05, *, n_classes: int | None = None
) -> Bound:
    r"""McAllester's square-root form with Maurer's constant, which Pinsker's inequality makes of `pac_bayes_kl`.

    .. math:: \hat L(Q) + \sqrt{\frac{KL(Q \| P) + \ln (2 \sqrt n / \delta)}{2 n}}

    Arguments as for :func:`pac_bayes_kl`.
    """
    error, budget, n = _pac_bayes(train_error, kl_nats, n, delta)
    return _gibbs("pac_bayes_mcallester", error, error + np.sqrt(budget / (2 * n)), n, delta, n_classes)


def pac_bayes_catoni(
    train_error: ArrayLike,
    kl_nats: ArrayLike,
    n: int,
    delta: float = 0.05,
    *,
    betas: tuple[float, ...] = (1.0,),
    n_classes: int | None = None,
) -> Bound:
    r"""Catoni's (2007, thm. 1.2.6) form, the least over a grid of betas that is fixed before the sample.

    .. math:: \min_\beta \frac{1 - \exp(-\beta \hat L(Q) - (KL(Q \| P) + \ln (B / \delta)) / n)}{1 - e^{-\beta}}

    B is the number of betas: choosing among them costs ln B, the union bound. Other arguments as for
    :func:`pac_bayes_kl`.

    Raises:
        Refused: A number out of range, or no beta.
    """
    grid = numbers("betas", betas)
    if grid.ndim != 1 or not len(grid) or not ((grid > 0) & (grid < math.inf)).all():
        raise Refused(f"betas must be one or more positive numbers: got {betas}. Try (0.5, 1, 2, 4).")
    error, budget, n = _paid(train_error, n, delta, math.log(len(grid)), kl_nats=kl_nats)
    value = np.min([np.expm1(-beta * error - budget / n) / math.expm1(-beta) for beta in grid], axis=0)
    return _gibbs("pac_bayes_catoni", error, value, n, delta, n_classes)


def held_out(
    test_error: ArrayLike,
    n_test: int,
    delta: float = 0.05,
    *,
    method: Literal["kl", "binomial"] = "kl",
    n_classes: int | None = None,
) -> Bound:
    r"""What the test set says of one network: the yardstick beside every other bound.

    .. math:: kl^{-1} \Big( \hat L_{test}, \frac{\ln (1 / \delta)}{n_{test}} \Big)

    Args:
        test_error: Mean loss on the test set, in [0, 1].
        n_test: Number of test examples.
        delta: In (0, 1).
        method: ``kl`` for any loss in [0, 1]; ``binomial`` for 0/1 loss, tighter (Clopper & Pearson 1934).
        n_classes: Decides what is vacuous.

    Raises:
        Refused: A number out of range, an unknown method.
    """
    if method not in ("kl", "binomial"):
        raise Refused(f"method must be 'kl' or 'binomial': got {method!r}.")
    bound = {"kl": occam_kl, "binomial": binomial_tail}[method]
    found = bound(test_error, 0.0, n_test, delta)
    assumptions = f"n i.i.d. test examples; {'0/1 loss' if method == 'binomial' else 'loss in [0, 1]'}"
    covers = "one network, fixed before the test set was looked at"
    return stated("held_out", found.empirical, found.value, n_test, delta, n_classes, True, covers, assumptions)


def _gibbs(name: str, error: Value, value: Value, n: int, delta: float, n_classes: int | None) -> Bound:
    covers = "the Gibbs classifier that draws a hypothesis from Q at each input, for every Q at once"
    return stated(
        name, error, value, n, delta, n_classes, True, covers, f"{_SAMPLE}; a prior P fixed before the sample"
    )


def stated(
    name: str,
    error: Value,
    value: Value,
    n: int,
    delta: float,
    n_classes: int | None,
    certificate: bool,
    covers: str,
    assumptions: str,
) -> Bound:
    """A value with what it says, held against chance."""
    if n_classes is not None and not 2 <= scalar("n_classes", n_classes) < math.inf:
        raise Refused(f"n_classes must be at least 2: got {n_classes}.")
    chance = 1.0 if n_classes is None else 1 - 1 / n_classes
    value, error = np.broadcast_arrays(value, error)
    vacuous = value >= chance
    return Bound(
        name=name,
        value=plain(value),
        empirical=plain(error),
        complexity=plain(value - error),
        n=int(n),
        delta=float(delta),
        vacuous=vacuous if vacuous.ndim else bool(vacuous),
        certificate=certificate,
        covers=covers,
        assumptions=assumptions,
    )


def _paid(
    train_error: ArrayLike, n: int, delta: float, more: float = 0.0, **priced: ArrayLike
) -> tuple[np.ndarray, np.ndarray, int]:
    """The loss, the nats that are named plus ``more`` plus ln 1/delta, and n: all checked."""
    ((name, given),) = priced.items()
    error, price = together(train_error=_loss(train_error), **{name: nats(name, given)})
    n, log_delta = sample(n, delta)
    return error, price + more - log_delta, n


def _pac_bayes(train_error: ArrayLike, kl_nats: ArrayLike, n: int, delta: float) -> tuple[np.ndarray, np.ndarray, int]:
    n, _ = sample(n, delta)
    return _paid(train_error, n, delta, math.log(2 * math.sqrt(n)), kl_nats=kl_nats)


def _loss(given: ArrayLike) -> np.ndarray:
    """As float64; the bounds know no loss but one in [0, 1]."""
    try:
        return probability("the loss", given)
    except Refused as error:
        raise Refused(
            f"{error} Cross-entropy is unbounded: map it into [0, 1] with bounds.bounded_cross_entropy."
        ) from None


def sample(n: int, delta: float) -> tuple[int, float]:
    """n and ln delta, checked."""
    size, rate = numbers("n", n), numbers("delta", delta)
    if size.ndim or not (size >= 1 and size % 1 == 0):
        raise Refused(f"n must be a number of examples, at least 1: got {n}. Call it once for each sample size.")
    if rate.ndim or not 0 < rate < 1:
        raise Refused(f"delta must lie in (0, 1), the probability that the bound fails: got {delta}. Try 0.05.")
    return int(size), math.log(rate)


def _errors(error: np.ndarray, n: int) -> np.ndarray:
    """n times the error rate as the integer that it must be."""
    count = np.rint(n * error)
    # a rate may come in float32: that moves the count by 0.03 at most for a million examples
    if not (np.abs(n * error - count) <= np.clip(1e-6 * n * error, 1e-6, 0.05)).all():
        raise Refused(
            f"n * train_error must be a number of errors: got {n} * {error}. Pass errors / n of the same n examples, "
            "unrounded; for a loss that is not 0/1 use occam_kl."
        )
    return count.astype(np.int64)
