"""How alike two kernels are: their spectra, their directions, and the targets that they fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ticketlab.errors import Refused
from ticketlab.ntk.axes import by_output, targets
from ticketlab.ntk.spectrum import Spectrum
from ticketlab.shown import as_line, as_table
from ticketlab.state import check_finite


@dataclass(frozen=True)
class Preservation:
    """How much of one spectrum another has kept."""

    eigenvalue_ratio: Float[Tensor, "*replica d"]
    """Eigenvalue of b over that of a, rank by rank; NaN where a's is lost in rounding."""
    log_spectral_distance: Float[Tensor, "*replica"]
    """Root mean square over the ranks compared of ln(lambda_b / trace_b) - ln(lambda_a / trace_a)."""
    n_compared: Int[Tensor, "*replica"]
    """The ranks that both spectra have, from the largest down."""
    subspace_overlap: Float[Tensor, "*replica"]
    """||V_a' V_b||^2 / r over the leading eigenvectors held: 1 = one subspace, r / d = two random ones."""

    __repr__, _repr_html_ = as_line, as_table


@dataclass(frozen=True)
class Drift:
    """How far a kernel has moved."""

    relative_change: Float[Tensor, "*replica"]
    """||K_end - K_start|| / ||K_start||, Frobenius norms."""
    distance: Float[Tensor, "*replica"]
    """1 - cosine of the two, free of scale: the kernel distance of Fort et al. 2020 (arXiv:2010.15110)."""

    __repr__, _repr_html_ = as_line, as_table


def preservation(a: Spectrum, b: Spectrum) -> Preservation:
    r"""How much of the spectrum ``a`` (the dense network's) is left in ``b`` (the ticket's).

    .. math:: d(a, b)^2 = \frac1r \sum_{i \le r}
              \left(\ln \frac{\lambda^b_i}{\mathrm{tr}_b} - \ln \frac{\lambda^a_i}{\mathrm{tr}_a}\right)^2

    with r the smaller of the two ranks: a rank that one of them lacks has no logarithm, and shows in
    ``n_compared``. One of the two may be a stack of replicas, or both.

    Raises:
        Refused: Spectra of kernels of two sizes, partial spectra, or spectra without eigenvectors.
    """
    if a.eigenvectors.shape[-2:] != b.eigenvectors.shape[-2:] or a.eigenvectors.shape[-1] == 0:
        raise Refused(
            "both spectra must be of kernels of one size and hold as many eigenvectors: got "
            f"{tuple(a.eigenvectors.shape)} and {tuple(b.eigenvectors.shape)}. "
            "Take them of the same inputs and outputs, with the same top > 0."
        )
    if a.rank.is_floating_point() or b.rank.is_floating_point():
        raise Refused("preservation needs whole spectra: take both of a kernel or of ntk.jacobian(...).")
    place = torch.arange(a.eigenvalues.shape[-1], device=a.eigenvalues.device)
    known_a, known_b = place < a.rank[..., None], place < b.rank[..., None]
    ratio = torch.where(known_a, b.eigenvalues.clamp(min=0) / a.eigenvalues, torch.nan)
    # One stands in for what is not compared: its logarithm is finite and dropped.
    logs = [torch.where(known_a & known_b, s.eigenvalues, 1).log() - s.trace.log()[..., None] for s in (a, b)]
    both = (known_a & known_b).sum(-1)
    squares = torch.where(known_a & known_b, (logs[1] - logs[0]).square(), 0).sum(-1)
    overlap = (a.eigenvectors.mT @ b.eigenvectors).square().sum((-2, -1)) / a.eigenvectors.shape[-1]
    return Preservation(ratio, (squares / both).sqrt(), both, overlap)


def alignment(k_a: Tensor, k_b: Tensor, centered: bool = True) -> Float[Tensor, "*replica"]:
    r"""Centred kernel alignment, in [-1, 1] and in [0, 1] for kernels of one set of inputs.

    .. math:: \frac{\langle H K_a H, H K_b H\rangle}{\|H K_a H\| \|H K_b H\|}

    H removes the mean over examples, of each output apart. Without it, two kernels with a large common mean
    look alike whatever else they do (Cortes, Mohri, Rostamizadeh 2012; Kornblith et al. 2019).

    Args:
        k_a: Kernel [n, m] or [n, out, m, out], stacked or not.
        k_b: The same axes; broadcast over replicas.
        centered: False for the plain cosine (Cristianini et al. 2001).

    Raises:
        Refused: Kernels of two shapes, or entries that are not finite.
    """
    return _cosine(*_pair(k_a, k_b, centered))


def target_alignment(k: Tensor, y: Tensor, centered: bool = True) -> Float[Tensor, "*replica"]:
    r"""Alignment of a kernel with the ideal one for its targets, :math:`Y Y^T`.

    The ideal full kernel is the same for every output and joins no two of them: :math:`Y Y^T \otimes I`.

    Args:
        k: Kernel [n, n], or [n, out, n, out], stacked or not.
        y: Targets [n, out], real; or integer labels [n], which are made one-hot.
        centered: As in :func:`alignment`.

    Raises:
        Refused: Targets that do not go with the kernel, or entries that are not finite.
    """
    y = targets(k.shape, y)
    ideal = y @ y.mT
    if k.ndim > 3:
        ideal = torch.einsum("nm,op->nomp", ideal, torch.eye(y.shape[1], dtype=y.dtype, device=y.device))
    return alignment(k, ideal.to(k.device), centered)


def rank_one_target_alignment(k: Tensor, y: Tensor, centered: bool = True) -> Float[Tensor, "*replica"]:
    r"""Alignment of a full kernel with the outer product of its targets, :math:`y y^T` with y all outputs in a row.

    Near 1 where a single direction, that of the targets, dominates the kernel. One that treats all outputs alike and
    joins no two of them scores at most :math:`1 / \sqrt{\text{out}}`: see :func:`target_alignment`.

    Args:
        k: Kernel [n, out, n, out], stacked or not.
        y: As there.
        centered: As in :func:`alignment`.

    Raises:
        Refused: As there; a kernel without axes of outputs.
    """
    if k.ndim < 4:
        raise Refused(
            f"rank_one_target_alignment needs a full kernel [n, out, n, out]: got shape {tuple(k.shape)}. "
            "Compute it with outputs='full', or take target_alignment."
        )
    y = targets(k.shape, y)
    return alignment(k, torch.einsum("no,mp->nomp", y, y).to(k.device), centered)


def drift(k_start: Tensor, k_end: Tensor) -> Drift:
    """How far the kernel has moved between two points, such as theta_0 and theta_k or theta_T.

    Raises:
        Refused: Kernels of two shapes, or entries that are not finite.
    """
    start, end = _pair(k_start, k_end, centered=False)
    return Drift((end - start).norm(dim=-1) / start.norm(dim=-1), 1 - _cosine(start, end))


def _pair(k_a: Tensor, k_b: Tensor, centered: bool) -> tuple[Tensor, Tensor]:
    a, b = by_output(k_a).double(), by_output(k_b).double()
    if a.shape[-4:] != b.shape[-4:]:
        raise Refused(
            "both kernels must be of the same inputs and outputs: "
            f"got shapes {tuple(k_a.shape)} and {tuple(k_b.shape)}."
        )
    check_finite("the first kernel", k_a)
    check_finite("the second kernel", k_b)
    if centered:
        a, b = (k - k.mean(-4, keepdim=True) for k in (a, b))
        a, b = (k - k.mean(-2, keepdim=True) for k in (a, b))
    return a.flatten(-4), b.flatten(-4)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
