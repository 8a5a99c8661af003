"""The binary relative entropy and its inverse, to rounding, on numbers or arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ticketlab.arrays import as_tensor
from ticketlab.errors import Refused

Value = float | NDArray[np.float64]
"""A number, or an array where arrays were given."""

_BISECTIONS = 64  # halve [0, 1] down to the spacing of doubles


def binary_kl(q: ArrayLike, p: ArrayLike) -> Value:
    r"""Relative entropy of Bernoulli(q) to Bernoulli(p) in nats.

    .. math:: kl(q \| p) = q \ln (q / p) + (1 - q) \ln ((1 - q) / (1 - p))

    Accurate where p is close to q too; infinite at p = 0 or 1 unless q equals it.

    Args:
        q: In [0, 1], any shape.
        p: In [0, 1], broadcast against q.

    Raises:
        Refused: A probability outside [0, 1], or shapes that do not broadcast.
    """
    first, second = together(q=probability("q", q), p=probability("p", p))
    return plain(_kl(first, second, second - first))


def kl_inverse(q: ArrayLike, c: ArrayLike) -> Value:
    r"""The largest risk that an observed rate q allows within c nats (upper inverse).

    .. math:: kl^{-1}(q, c) = \sup \{ p \in [q, 1] : kl(q \| p) \le c \}

    By bisection on p - q; rounded up, as a bound must be, by at most the spacing of doubles.

    Args:
        q: In [0, 1], any shape.
        c: Nats, at least 0, broadcast against q.

    Raises:
        Refused: q outside [0, 1], c negative, or shapes that do not broadcast.
    """
    rate, budget = together(q=probability("q", q), c=nats("c", c))
    low, high = np.zeros(rate.shape), 1 - rate
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        inside = _kl(rate, rate + middle, middle) <= budget
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    risk = rate + high
    return plain(np.where(risk - rate < high, np.nextafter(risk, 1.0), risk))


def _kl(q: NDArray[np.float64], p: NDArray[np.float64], t: NDArray[np.float64]) -> NDArray[np.float64]:
    """kl(q || p) with p = q + t, as two terms that are never negative, so that nothing cancels where t is small."""
    return _term(q, p, t) + _term(1 - q, 1 - p, -t)


def _term(a: NDArray[np.float64], b: NDArray[np.float64], t: NDArray[np.float64]) -> NDArray[np.float64]:
    """a ln (a / b) + t, where b = a + t; the limit, t, where a is 0."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        u = t / a
        exact = a * np.log(a / b) + t
    near = np.abs(u) < 0.05
    small = np.where(near, u, 0.0)
    series = np.zeros_like(small)  # u - ln (1 + u) = u^2/2 - u^3/3 + ..., by Horner's rule; 0.05^13 is below rounding
    for power in range(14, 1, -1):
        series = series * small + (-1) ** power / power
    return np.where(a == 0, t, np.where(near, a * series * small**2, exact))


def numbers(name: str, given: ArrayLike) -> NDArray[np.float64]:
    """As float64, tensors too; refused where they are no real numbers."""
    value = as_tensor(given, name)
    if value.is_complex():
        raise Refused(f"{name} must be real: got {value.dtype}.")
    return value.cpu().double().numpy()


def scalar(name: str, given: float) -> float:
    """A single number, refused where there is none or more."""
    value = numbers(name, given)
    if value.ndim:
        raise Refused(f"{name} must be a single number: got shape {value.shape}. Call it once for each.")
    return float(value)


def together(**given: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Arrays broadcast against one another."""
    try:
        return list(np.broadcast_arrays(*given.values()))
    except ValueError:
        shapes = {name: value.shape for name, value in given.items()}
        raise Refused(f"{', '.join(given)} must be numbers or have shapes that broadcast: got {shapes}.") from None


def probability(name: str, given: ArrayLike) -> NDArray[np.float64]:
    """As float64, refused outside [0, 1]."""
    value = numbers(name, given)
    if not ((value >= 0) & (value <= 1)).all():
        raise Refused(f"{name} must lie in [0, 1]: got {given!r}. Pass a fraction, not a percentage.")
    return value


def nats(name: str, given: ArrayLike) -> NDArray[np.float64]:
    """As float64, refused where negative or NaN."""
    value = numbers(name, given)
    if not (value >= 0).all():
        raise Refused(f"{name} must be at least 0 nats: got {given!r}. Multiply bits by ln 2.")
    return value


def plain(value: NDArray[np.float64]) -> Value:
    """A float where there is no axis."""
    return float(value) if np.ndim(value) == 0 else value
