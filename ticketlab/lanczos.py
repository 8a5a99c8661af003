"""The largest eigenvalues of a symmetric matrix that is known by its products alone, by Lanczos (ARPACK)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from ticketlab.errors import Refused

Product = Callable[[np.ndarray], np.ndarray]
_BASIS = 20  # ARPACK's smallest basis; a matrix up to that side is built column by column


class Pairs(NamedTuple):
    """Eigenvalues, descending, and what belongs to them."""

    values: Float[np.ndarray, " k"]
    vectors: Float[np.ndarray, "side k"]
    """Orthonormal columns."""
    residuals: Float[np.ndarray, " k"]
    """|A v - lambda v| of each."""


def largest(
    product: Product, side: int, k: int, generator: torch.Generator, *, tolerance: float, max_products: int = 10_000
) -> Pairs:
    """The k largest eigenvalues of A, repeated ones as often as they occur.

    ARPACK asks for residuals relative to each eigenvalue, which one of zero never meets: the matrix is shifted by twice
    its root mean square eigenvalue s, so that the largest is at least s. From one start vector Lanczos sees one vector
    of an eigenvalue that occurs several times: what is beside those found is searched until nothing larger is left.

    Args:
        product: v -> A v, float64.
        side: Of A.
        k: In 1..side.
        generator: Of start vectors.
        tolerance: Of residuals, relative to the shifted eigenvalues.
        max_products: Of one search.

    Raises:
        Refused: No convergence within ``max_products``.
    """
    if side <= max(_BASIS, 2 * k + 1):
        whole = np.stack([product(unit) for unit in np.eye(side)], 1)
        vectors = np.linalg.eigh((whole + whole.T) / 2)[1][:, side - k :]
        applied = whole @ vectors
    else:
        vectors = _vectors(product, side, k, generator, tolerance, max_products)
        applied = np.stack([product(v) for v in vectors.T], 1)
    values = (vectors * applied).sum(0)  # Rayleigh's quotients
    order = np.argsort(values)[::-1]
    residuals = np.linalg.norm(applied - values * vectors, axis=0)
    return Pairs(values[order], vectors[:, order], residuals[order])


def _vectors(
    product: Product, side: int, k: int, generator: torch.Generator, tolerance: float, max_products: int
) -> Float[np.ndarray, "side k"]:
    def drawn() -> Float[np.ndarray, " side"]:
        return torch.randn(side, generator=generator, dtype=torch.float64).numpy()

    start = drawn()
    shift = 2 * np.linalg.norm(product(start)) / np.linalg.norm(start)
    if shift == 0:  # A = 0, as of a network whose units are all dead: any vectors will do
        return np.eye(side, k)

    def shifted(v: np.ndarray) -> np.ndarray:
        return product(v) + shift * v

    values, vectors = _ritz(shifted, start, k, tolerance, max_products)
    while k > 1:
        least = np.sort(values)[-k]

        def beside(v: np.ndarray, known: np.ndarray = vectors, low: float = least - shift) -> np.ndarray:
            inside = known.T @ v
            found = shifted(v - known @ inside)
            return found + known @ (low * inside - known.T @ found)

        value, vector = _ritz(beside, drawn(), 1, tolerance, max_products)
        if value[0] <= least + tolerance * values.max():
            break
        values, vectors = np.append(values, value), np.hstack([vectors, vector])
    return vectors[:, np.argsort(values)[-k:]]


def _ritz(
    product: Product, start: np.ndarray, k: int, tolerance: float, max_products: int
) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, "side k"]]:
    """The k largest eigenvalues that ARPACK finds, and their vectors."""
    basis = max(_BASIS, 2 * k + 1)
    operator = LinearOperator((len(start), len(start)), matvec=product, dtype=np.float64)
    restarts = max(1, (max_products - basis) // (basis - k))
    try:
        return eigsh(operator, k, which="LA", v0=start, ncv=basis, maxiter=restarts, tol=tolerance)
    except ArpackNoConvergence as error:
        raise Refused(
            f"Lanczos must converge within max_products: {len(error.eigenvalues)} of {k} eigenvalues have in "
            f"{max_products}, at tolerance {tolerance:.1e}. Raise either, or ask for fewer."
        ) from error
