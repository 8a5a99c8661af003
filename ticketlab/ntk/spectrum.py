"""Eigenvalues of a kernel and what is read off them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ticketlab.errors import Refused
from ticketlab.ntk.axes import square_matrix
from ticketlab.ntk.jacobian import LiveJacobian
from ticketlab.ntk.matrix_free import KernelOperator
from ticketlab.shown import as_line, as_table


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of a kernel, in float64; every field has the replica axis of what it was taken of.

    Of a matrix-free operator only the largest eigenvalues are known: ``rank``, ``effective_rank``,
    ``participation_ratio`` and ``condition_number``, which need them all, are then NaN; the operator estimates two of
    them. ``trace`` is exact.
    """

    eigenvalues: Float[Tensor, "*replica d"]
    """Descending; as computed, so that a rounding error below zero shows."""
    eigenvectors: Float[Tensor, "*replica d top"]
    """Of the largest eigenvalues, one a column."""
    trace: Float[Tensor, "*replica"]
    rank: Int[Tensor, "*replica"] | Float[Tensor, "*replica"]
    """Eigenvalues that stand above the rounding of the kernel's dtype."""
    effective_rank: Float[Tensor, "*replica"]
    r"""exp of the entropy of :math:`\lambda_i / \sum \lambda` (Roy & Vetterli 2007)."""
    participation_ratio: Float[Tensor, "*replica"]
    r""":math:`(\sum \lambda)^2 / \sum \lambda^2`."""
    condition_number: Float[Tensor, "*replica"]
    """Largest over smallest eigenvalue; infinite where the smallest is lost in rounding."""

    __repr__, _repr_html_ = as_line, as_table


def spectrum(source: Tensor | LiveJacobian | KernelOperator, *, top: int = 10) -> Spectrum:
    r"""Eigenvalues, descending, of a kernel given in one of three forms.

    A *kernel* is diagonalised; eigenvalues below ``eps * d`` of the largest are noise. A *live Jacobian* gives
    them as squared singular values, which reach down to ``(eps * d)^2``, from the smaller side of J: where
    there are fewer live coordinates k than outputs, the spectrum is that of the k x k matrix J'J and the
    remaining eigenvalues are exact zeros. An *operator* gives the ``top`` largest by Lanczos iteration.

    Args:
        source: A kernel [n, n] or [n, out, n, out], stacked or not; ``ntk.jacobian(...)``; ``ntk.operator(...)``.
        top: How many eigenvectors to keep; for an operator also how many eigenvalues to compute.

    Raises:
        Refused: A kernel that is not square, symmetric and finite, or a ``top`` that the form cannot give.
    """
    if top < 0:
        raise Refused(f"top must be a number of eigenvectors, at least 0: got {top}.")
    if isinstance(source, KernelOperator):
        return _of_operator(source, top)
    if isinstance(source, LiveJacobian):
        values, vectors, floor = _of_jacobian(source)
    else:
        matrix = square_matrix(source)
        rising, columns = torch.linalg.eigh(matrix)
        values, vectors = rising.flip(-1), columns.flip(-1)
        floor = values[..., :1] * _noise(source.dtype, matrix.shape[-1])
    share = values.clamp(min=0)
    total = share.sum(-1)
    p = share / total[..., None]
    rank = (values > floor).sum(-1)
    return Spectrum(
        eigenvalues=values,
        eigenvectors=vectors[..., : min(top, vectors.shape[-1])].clone(),
        trace=values.sum(-1),
        rank=rank,
        effective_rank=torch.special.entr(p).sum(-1).exp(),
        participation_ratio=total.square() / share.square().sum(-1),
        condition_number=torch.where(rank == values.shape[-1], values[..., 0] / values[..., -1], torch.inf),
    )


def _noise(dtype: torch.dtype, d: int) -> float:
    """Relative size of what rounding leaves of a zero eigenvalue or singular value."""
    return torch.finfo(dtype).eps * d


def _of_jacobian(source: LiveJacobian) -> tuple[Tensor, Tensor, Tensor]:
    rows = source.values.flatten(-3, -2)  # [*replica, d, k]
    d, k = rows.shape[-2:]
    left, singular, _ = torch.linalg.svd(rows, full_matrices=False)
    # Beyond rank k the kernel has eigenvalues that are zero by construction.
    values = torch.nn.functional.pad(singular.double().square(), (0, d - singular.shape[-1]))
    return values, left.double(), values[..., :1] * _noise(rows.dtype, max(d, k)) ** 2


def _of_operator(source: KernelOperator, top: int) -> Spectrum:
    if not 0 < top < source.size:
        raise Refused(f"top must lie in 1 to {source.size - 1} for an operator of size {source.size}: got {top}.")
    found = source.top(top)
    unknown = torch.full_like(found.values[0], torch.nan)
    return Spectrum(found.values, found.vectors, source.trace().value, unknown, unknown, unknown, unknown)
