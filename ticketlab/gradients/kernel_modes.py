"""The gradient seen in output space: how much of it lies along the leading eigenfunctions of the restricted NTK."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ticketlab import ntk
from ticketlab.errors import Refused
from ticketlab.gradients.point import check_data, point


@dataclass(frozen=True)
class NtkOverlap:
    """Of the leading eigenvectors of Theta_m, from the largest eigenvalue down; float64."""

    eigenvalues: Float[Tensor, "*replica top"]
    residual_share: Float[Tensor, "*replica top"]
    """(v_i . r)^2 / ||r||^2: how much of what is still wrong lies along each; 1 / (n classes) for a random r."""
    gradient_share: Float[Tensor, "*replica top"]
    """lambda_i (v_i . r)^2 / r' Theta_m r: how much of the squared gradient norm each makes up."""
    squared_norm: Float[Tensor, "*replica"]
    """r' Theta_m r / n^2, the squared norm of the ticket's gradient."""


def ntk_overlap(
    model: nn.Module,
    params: Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, " n"],
    *,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    top: int = 10,
) -> NtkOverlap:
    r"""Overlap of the residual, and of the gradient, with the top eigenfunctions of the restricted NTK.

    .. math:: g = \frac1n J^T r, \qquad r = \mathrm{softmax}(f) - \mathrm{onehot}(y), \qquad
              \|g\|^2 = \frac{r^T \Theta_m r}{n^2} = \frac1{n^2} \sum_i \lambda_i (v_i \cdot r)^2

    Under gradient flow the part of the residual along v_i is what the eigenvalue lambda_i acts on: a start whose
    residual lies in the leading eigenfunctions learns fast (Arora et al. 2019, arXiv:1901.08584).

    Args:
        x: Few inputs: the kernel has a side of n * classes.
        top: Number of eigenvectors, in 1..n * classes. The others as in :func:`ticketlab.gradients.gradient`.

    Raises:
        Refused: As for the gradient and for :func:`ticketlab.ntk.kernel`, or a ``top`` out of range.
    """
    at = point(model, params, masks, buffers)
    check_data(at, x, y, len(x) or 1)
    with torch.no_grad():
        at.loss_sum({}, x, y)  # refuses labels that are not the model's
        logits = at.logits({}, x)
    if not 0 < top <= logits.shape[-2] * logits.shape[-1]:
        raise Refused(f"top must lie in 1..{logits.shape[-2] * logits.shape[-1]}, the kernel's side: got {top}.")
    residual = (logits.softmax(-1) - F.one_hot(y.long(), logits.shape[-1])).double().flatten(-2)
    spectrum = ntk.spectrum(ntk.kernel(model, params, x, masks=masks, buffers=buffers), top=residual.shape[-1])
    squares = (spectrum.eigenvectors.mT @ residual[..., None])[..., 0].square()  # [*replica, n * classes]
    energy = spectrum.eigenvalues.clamp(min=0) * squares
    total = energy.sum(-1)
    return NtkOverlap(
        eigenvalues=spectrum.eigenvalues[..., :top],
        residual_share=squares[..., :top] / residual.square().sum(-1, keepdim=True),
        gradient_share=energy[..., :top] / total[..., None],
        squared_norm=total / len(x) ** 2,
    )
