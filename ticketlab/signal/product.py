r"""The spectrum of J J' for products of random matrices: what theory says of a network with Gaussian weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ticketlab.errors import Refused, check_count

_STEPS = 90  # heights above the real axis at which a root is looked up


def fuss_catalan(n_factors: int, order: int) -> float:
    r"""Moment of J J' for a product of L square Gaussian matrices of variance 1/n: C((L+1) k, k) / (L k + 1).

    Pennington et al. 2017; the spectrum ends at (L+1)^(L+1) / L^L.

    Raises:
        Refused: Fewer than one factor, or a negative order.
    """
    check_count("n_factors", n_factors, 1, 10**4)
    check_count("order", order, 0, 10**4)
    return math.comb((n_factors + 1) * order, order) / (n_factors * order + 1)


def singular_value_density(
    singular_values: Float[np.ndarray, " s"],
    widths: Sequence[int],
    sigma_w2: Sequence[float],
    active: Sequence[float] | float = 0.5,
) -> Float[np.ndarray, " s"]:
    r"""Density of the singular values of W_L D_{L-1} ... D_1 W_1 in the limit of large widths.

    W_l is Gaussian of variance sigma_w^2 / fan_in (or masked at random: then p sigma_w^2 counts), D_l a diagonal of
    ones and zeros that is free of it, as for ReLU, with a share ``active`` of ones. With S-transforms multiplied,
    each taken at its layer's ratio r_l = n_out / n_l of widths, M = tr(lambda - JJ')^{-1} JJ' / n_out solves

    .. math:: \lambda M \prod_{l<L} (1 + r_l M) = (1 + M) \prod_{l \le L} \sigma_l^2 (1 + r_{l-1} M)
              \prod_{l<L} (p_l + r_l M),

    a polynomial (Pennington et al. 2017, section 3, for equal widths; Burda et al. 2010 for unequal ones).

    Args:
        singular_values: Positive; where the density is wanted.
        widths: n_0 (input) to n_L (output), with n_L the least of them.
        sigma_w2: One a layer.
        active: Shares of active units, one a hidden layer or one for all; 1 for a linear network.

    Returns:
        Density in the singular value, 2 s rho(s^2); zeros lost to inactive units (an atom at 0) are not in it.

    Raises:
        Refused: Lengths that do not agree, an output wider than another layer, shares outside (0, 1].
    """
    n_layers = len(widths) - 1
    shares = [active] * (n_layers - 1) if isinstance(active, int | float) else list(active)
    if n_layers < 1 or len(sigma_w2) != n_layers or len(shares) != n_layers - 1:
        raise Refused(
            f"{len(widths)} widths need {n_layers} sigma_w2 and {n_layers - 1} active shares: "
            f"got {len(sigma_w2)} and {len(shares)}."
        )
    s = np.asarray(singular_values, dtype=np.float64)
    if min(widths) != widths[-1] or not all(0 < p <= 1 for p in shares) or not (s > 0).all() or min(sigma_w2) <= 0:
        raise Refused(
            "the output must be the narrowest layer, shares in (0, 1], variances and singular values positive: "
            f"got widths {tuple(widths)}, shares {shares}, variances {tuple(sigma_w2)}."
        )
    ratio = widths[-1] / np.asarray(widths, dtype=np.float64)
    # Polynomials in M, lowest power first; lambda times one of them against the other.
    with_lambda, without = np.polynomial.Polynomial([0.0, 1.0]), np.polynomial.Polynomial([1.0, 1.0])
    for layer in range(n_layers):
        without = without * sigma_w2[layer] * np.polynomial.Polynomial([1.0, ratio[layer]])
    for share, r in zip(shares, ratio[1:-1], strict=True):
        with_lambda = with_lambda * np.polynomial.Polynomial([1.0, r])
        without = without * np.polynomial.Polynomial([share, r])
    return 2 * s * _density(s**2, with_lambda.coef, without.coef)


def _density(
    eigenvalues: Float[np.ndarray, " s"], with_lambda: Float[np.ndarray, " i"], without: Float[np.ndarray, " j"]
) -> Float[np.ndarray, " s"]:
    """-Im G / pi just above the real axis, with G = (1 + M) / lambda.

    Of the roots the physical one is that which goes to (first moment) / lambda far up in the upper half-plane; it is
    followed down from there, where G has no singularity.
    """
    degree = max(len(with_lambda), len(without)) - 1
    a, b = (np.pad(p, (0, degree + 1 - len(p))) for p in (with_lambda, without))
    heights = (eigenvalues + b[0]) * np.geomspace(1e4, 1e-10, _STEPS)[:, None]
    followed = b[0] / (eigenvalues + 1j * heights[0])
    companion = np.zeros((len(eigenvalues), degree, degree), dtype=complex)
    companion[:, np.arange(1, degree), np.arange(degree - 1)] = 1
    for height in heights:
        coefficients = (eigenvalues + 1j * height)[:, None] * a - b
        companion[:, :, -1] = -coefficients[:, :-1] / coefficients[:, -1:]
        roots = np.linalg.eigvals(companion)
        nearest = np.abs(roots - followed[:, None]).argmin(1)
        followed = roots[np.arange(len(roots)), nearest]
    return np.maximum(0.0, -followed.imag) / (math.pi * eigenvalues)
