r"""Mean-field theory of wide random networks: how lengths and correlations travel through depth.

Weights are N(0, sigma_w^2 / fan_in), biases N(0, sigma_b^2); the squared length q of pre-activations and the
correlation c of two inputs follow

.. math:: q' = \sigma_w^2 E[\phi(u)^2] + \sigma_b^2, \quad c' = (\sigma_w^2 E[\phi(u_1)\phi(u_2)] + \sigma_b^2) / q^*

(Poole et al. 2016, eqs. 3 and 5; Schoenholz et al. 2017, sections 2 and 3). Parameters are *variances*.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from ticketlab.errors import Refused
from ticketlab.signal.activations import Activation, Elementwise, elementwise
from ticketlab.signal.quadrature import mean, mean_of_pair

_GRID = 10.0 ** np.arange(-10, 12.01, 0.25)  # squared lengths between which fixed points are bracketed
_EQUAL = 1e-12  # relative: below is rounding
_SHORT = 1e-20  # the limit q -> 0, which sees both sides of a kink at 0


@dataclass(frozen=True)
class MeanField:
    """The fixed point of both maps and what becomes of perturbations there."""

    activation: str
    sigma_w2: float
    sigma_b2: float
    q_star: float
    """Stable fixed point of the length map."""
    chi1: float
    """sigma_w^2 E[phi'(u)^2] at q*: below 1 ordered, above 1 chaotic, 1 at the edge of chaos."""
    c_star: float
    """Fixed point of the correlation map that inputs with 0 <= c < 1 go to; NaN where q* = 0."""
    xi_q: float
    """Layers in which a deviation of q from q* falls by 1/e; infinite where it does not fall exponentially."""
    xi_c: float
    """The same for c; NaN where q* = 0."""
    note: str
    """What the numbers alone do not say; empty where there is nothing."""


def q_map(activation: Activation, q: float, sigma_w2: float, sigma_b2: float) -> float:
    r"""Squared length after one layer: sigma_w^2 E[phi(sqrt(q) z)^2] + sigma_b^2 (Poole et al. 2016, eq. 3).

    Raises:
        Refused: An unknown or unsuitable activation, a negative or infinite variance or q.
    """
    phi = elementwise(activation)
    check_variances(sigma_w2=sigma_w2, sigma_b2=sigma_b2, q=q)
    return sigma_w2 * mean(phi, lambda u: phi(u) ** 2, q) + sigma_b2


def c_map(activation: Activation, c: float, q: float, sigma_w2: float, sigma_b2: float) -> float:
    r"""Correlation after one layer, of two inputs that both have the squared length q before it.

    .. math:: (\sigma_w^2 E[\phi(u_1) \phi(u_2)] + \sigma_b^2) / q', \quad q' = \sigma_w^2 E[\phi(u)^2] + \sigma_b^2

    At q = q* it is the map of Poole et al. 2016, eq. 5.

    Args:
        activation: A name, or an elementwise callable.
        c: In [-1, 1].
        q: Positive.
        sigma_w2: Weight variance times fan-in.
        sigma_b2: Bias variance.

    Raises:
        Refused: Values out of these ranges, or a layer whose outputs are all zero.
    """
    phi = elementwise(activation)
    check_variances(sigma_w2=sigma_w2, sigma_b2=sigma_b2, q=q)
    if not -1 <= c <= 1 or q == 0:
        raise Refused(f"c must lie in [-1, 1] and q be positive, or there is no correlation: got {c} and {q}.")
    after = q_map(phi, q, sigma_w2, sigma_b2)
    if after == 0:
        raise Refused("a layer without output has no correlation: sigma_w2 or sigma_b2 must be positive.")
    return 1 - sigma_w2 * _half_distance(phi, q, c) / after


def chi(activation: Activation, q: float, sigma_w2: float, c: float = 1.0) -> float:
    r"""Slope of the correlation map at c: sigma_w^2 E[phi'(u_1) phi'(u_2)]; at c = 1 it is chi_1.

    At c = 1 and any q it is also the mean squared singular value of one layer's Jacobian (Pennington et al. 2017).
    A map with a kink keeps this slope at c = 1, approached as sqrt(1 - c).

    Raises:
        Refused: As for ``c_map``.
    """
    phi = elementwise(activation)
    check_variances(sigma_w2=sigma_w2, q=q)
    if not -1 <= c <= 1:
        raise Refused(f"c must lie in [-1, 1]: got {c}.")
    q = max(q, _SHORT)
    if abs(c) == 1:
        return sigma_w2 * mean(phi, lambda u: phi.derivative(u) * phi.derivative(c * u), q)
    return sigma_w2 * mean_of_pair(phi, lambda u, v: phi.derivative(u) * phi.derivative(v), q, c)


def mean_field(activation: Activation, sigma_w2: float, sigma_b2: float, *, q_start: float | None = None) -> MeanField:
    r"""Fixed point, edge-of-chaos criterion and correlation lengths of a wide random network.

    .. math:: \xi_c^{-1} = -\ln(\sigma_w^2 E[\phi'(u_1)\phi'(u_2)])_{c^*}, \quad
              \xi_q^{-1} = -\ln(\chi_1 + \sigma_w^2 E[\phi''\phi])

    (Schoenholz et al. 2017, eqs. 8 and 9). For q the slope is taken as sigma_w^2 E[phi phi' u] / q*, the same by
    Stein's lemma, which needs no phi'' and so holds through kinks. A Bernoulli(p) mask maps sigma_w^2 to
    p sigma_w^2.

    Args:
        activation: tanh, relu, leaky_relu (slope 0.01), erf, gelu, silu, linear, or an elementwise callable.
        sigma_w2: Weight variance times fan-in.
        sigma_b2: Bias variance.
        q_start: The squared length from which the network starts; needed only where it decides between several ends.

    Raises:
        Refused: Lengths grow without bound, or as far as the activation is resolved; every length is a fixed
            point, or several ends are possible; an unknown activation, a negative variance, a callable that is not
            elementwise.
    """
    phi = elementwise(activation)
    check_variances(sigma_w2=sigma_w2, sigma_b2=sigma_b2)
    q = _q_star(phi, sigma_w2, sigma_b2, q_start)
    slope_q = q_slope(phi, q, sigma_w2)
    if q == 0:
        note = "q* = 0: signals die out, so their correlation has no fixed point of its own"
        chi1 = chi(phi, 0.0, sigma_w2)
        return MeanField(phi.name, sigma_w2, sigma_b2, 0.0, chi1, math.nan, _depth(slope_q), math.nan, note)
    chi1 = chi(phi, q, sigma_w2)
    c = _c_star(phi, q, sigma_w2, chi1)
    slope_c = chi1 if c == 1 else chi(phi, q, sigma_w2, c)
    return MeanField(phi.name, sigma_w2, sigma_b2, q, chi1, c, _depth(slope_q), _depth(slope_c), "")


def q_slope(activation: Activation, q: float, sigma_w2: float) -> float:
    r"""Derivative of the length map: sigma_w^2 E[phi(u) phi'(u) u] / q = chi_1 + sigma_w^2 E[phi'' phi]."""
    phi = elementwise(activation)
    if q == 0:  # only asked where phi(0) = 0, and then the two slopes are one
        return chi(phi, 0.0, sigma_w2)
    return sigma_w2 * mean(phi, lambda u: phi(u) * phi.derivative(u) * u, q) / q


def resolved(phi: Elementwise) -> np.ndarray:
    """The squared lengths of the grid up to which Gaussian integrals of phi are exact: all but for one like sin."""
    return _GRID[9 * np.sqrt(_GRID) < phi.reach]


def fixed_points(phi: Elementwise, difference: Callable[[float], float]) -> tuple[list[float], float]:
    """Zeros of difference(q), and its sign at the largest q where it is not rounding: 0 where it is zero everywhere.

    Bracketed on a grid of q > 0 over 22 decades; a pair of zeros closer than a quarter decade is missed.
    ``difference`` is relative to q.
    """
    grid = resolved(phi)
    values = np.array([difference(q) for q in grid])
    grid, values = grid[np.abs(values) > _EQUAL], values[np.abs(values) > _EQUAL]
    found = []
    for i in np.flatnonzero(np.sign(values[:-1]) * np.sign(values[1:]) < 0):
        low, high = math.log(grid[i]), math.log(grid[i + 1])
        found.append(math.exp(brentq(lambda s: difference(math.exp(s)), low, high, xtol=1e-15)))
    return found, float(np.sign(values[-1])) if len(values) else 0.0


def is_stable(phi: Elementwise, q: float, sigma_w2: float, sigma_b2: float) -> bool:
    """Whether lengths a little off return to q, or at least do not leave it, on both sides."""

    def off(nearby: float) -> float:
        return (q_map(phi, nearby, sigma_w2, sigma_b2) - nearby) / nearby

    if q == 0:
        return off(1e-4) <= _EQUAL
    return off(q * 1.001) <= _EQUAL and off(q / 1.001) >= -_EQUAL


def _q_star(phi: Elementwise, sigma_w2: float, sigma_b2: float, q_start: float | None) -> float:
    def growth(q: float) -> float:
        return (q_map(phi, q, sigma_w2, sigma_b2) - q) / q

    where = f"for {phi.name} at sigma_w2 = {sigma_w2:g}, sigma_b2 = {sigma_b2:g}"
    crossings, beyond = fixed_points(phi, growth)
    if beyond == 0:
        raise Refused(f"the length map must have one fixed point: {where} every q is one. Use chi for a q of yours.")
    if q_map(phi, 0.0, sigma_w2, sigma_b2) == 0:
        crossings.insert(0, 0.0)
    ends = [q for q in crossings if is_stable(phi, q, sigma_w2, sigma_b2)]
    if beyond > 0:
        ends.append(math.inf)
    if q_start is not None:
        check_variances(q_start=q_start)
        ends = [_end(crossings, ends, growth(q_start) if q_start else 0.0, q_start)]
    onwards = "lengths grow without bound"
    if phi.reach < math.inf:
        last = resolved(phi)[-1]
        onwards = f"lengths still grow at q = {last:.3g}, beyond which {phi.name} varies too fast to be integrated"
    if ends == [math.inf]:
        raise Refused(f"the length map must have a stable fixed point: {where} {onwards}.")
    if len(ends) != 1:
        finite = [q for q in ends if q < math.inf]
        raise Refused(
            f"the length map must have one stable end: {where} it has {finite or 'none'}"
            f"{f', and {onwards}' if math.inf in ends else ''} "
            f"(all fixed points: {crossings}). Pass q_start to say where the network starts."
        )
    return ends[0]


def _end(crossings: list[float], ends: list[float], growth: float, q_start: float) -> float:
    """Where an increasing length map leads from q_start: the next end upwards where it grows, downwards otherwise."""
    if abs(growth) < _EQUAL:
        return q_start
    ahead = [q for q in ends if (q > q_start) == (growth > 0)]
    if not ahead:
        raise Refused(f"no fixed point lies ahead of q_start = {q_start}: known are {crossings}.")
    return min(ahead) if growth > 0 else max(ahead)


def _half_distance(phi: Elementwise, q: float, c: float) -> float:
    """E (phi(u1) - phi(u2))^2 / 2, which keeps its digits as c nears 1: E phi^2 minus E phi(u1) phi(u2)."""
    if abs(c) == 1:
        return mean(phi, lambda u: (phi(u) - phi(c * u)) ** 2, q) / 2
    return mean_of_pair(phi, lambda u, v: (phi(u) - phi(v)) ** 2, q, c) / 2


def _c_star(phi: Elementwise, q: float, sigma_w2: float, chi1: float) -> float:
    """1 where chi_1 <= 1. The map is convex on [0, 1], so beyond that there is exactly one fixed point below 1."""
    if chi1 <= 1 + _EQUAL:
        return 1.0

    def excess(c: float) -> float:
        return sigma_w2 * _half_distance(phi, q, c) / (q * (1 - c)) - 1

    near = 1 - 1e-9
    if excess(near) <= 0:
        return 1.0
    if excess(0.0) >= -1e-14:
        return 0.0
    return float(brentq(excess, 0.0, near, xtol=1e-14))


def _depth(slope: float) -> float:
    """-1 / ln |slope|."""
    slope = abs(slope)
    if slope >= 1 - _EQUAL:
        return math.inf
    return -1 / math.log(slope) if slope > 0 else 0.0


def check_variances(**values: float) -> None:
    for name, value in values.items():
        if not (isinstance(value, int | float | np.floating) and math.isfinite(value) and value >= 0):
            raise Refused(f"{name} must be finite and at least 0 (it is a variance): got {value!r}.")
