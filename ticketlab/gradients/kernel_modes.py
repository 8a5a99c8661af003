"""The gradient seen in output space: how much of it lies along the leading eigenfunctions of the restricted NTK."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from ticketlab import ntk
from ticketlab.errors import Refused
from ticketlab.gradients.point import checked
from ticketlab.losses import CROSS_ENTROPY, Loss
from ticketlab.shown import as_line, as_table
from ticketlab.state import State


@dataclass(frozen=True)
class NtkOverlap:
    """Of the leading eigenvectors of Theta_m, from the largest eigenvalue down; float64."""

    eigenvalues: Float[Tensor, "*replica top"]
    residual_share: Float[Tensor, "*replica top"]
    """(v_i . r)^2 / ||r||^2: how much of what is still wrong lies along each; 1 / (n outputs) for a random r."""
    gradient_share: Float[Tensor, "*replica top"]
    """lambda_i (v_i . r)^2 / r' Theta_m r: how much of the squared gradient norm each makes up."""
    squared_norm: Float[Tensor, "*replica"]
    """r' Theta_m r / n^2, the squared norm of the ticket's gradient."""

    __repr__, _repr_html_ = as_line, as_table


def ntk_overlap(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    y: Tensor,
    *,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    loss: Loss = CROSS_ENTROPY,
    top: int = 10,
) -> NtkOverlap:
    r"""Overlap of the residual, and of the gradient, with the top eigenfunctions of the restricted NTK.

    .. math:: g = \frac1n J^T r, \qquad r_n = \partial \ell(f(x_n), y_n) / \partial f(x_n), \qquad
              \|g\|^2 = \frac{r^T \Theta_m r}{n^2} = \frac1{n^2} \sum_i \lambda_i (v_i \cdot r)^2

    For the cross-entropy r = softmax(f) - onehot(y). Under gradient flow the part of the residual along v_i is what
    the eigenvalue lambda_i acts on: a start whose residual lies in the leading eigenfunctions learns fast (Arora et
    al. 2019, arXiv:1901.08584).

    Args:
        x: Few inputs: the kernel has a side of n * outputs.
        top: Number of eigenvectors, in 1..n * outputs. The others as in :func:`ticketlab.gradients.gradient`.

    Raises:
        Refused: As for the gradient and for :func:`ticketlab.ntk.kernel`, or a ``top`` out of range.
    """
    net = checked(model, state, x, y, masks=masks, buffers=buffers, loss=loss)
    residual = loss.residual(net(x), y).double().flatten(0 if net.replicas is None else 1)  # [*replica, n * outputs]
    if not 0 < top <= residual.shape[-1]:
        raise Refused(f"top must lie in 1..{residual.shape[-1]}, the kernel's side: got {top}.")
    kernel = ntk.kernel(model, net.params, x, masks=net.masks, buffers=net.buffers)
    spectrum = ntk.spectrum(kernel, top=residual.shape[-1])
    squares = (spectrum.eigenvectors.mT @ residual[..., None])[..., 0].square()  # [*replica, n * outputs]
    energy = spectrum.eigenvalues.clamp(min=0) * squares
    total = energy.sum(-1)
    return NtkOverlap(
        eigenvalues=spectrum.eigenvalues[..., :top],
        residual_share=squares[..., :top] / residual.square().sum(-1, keepdim=True),
        gradient_share=energy[..., :top] / total[..., None],
        squared_norm=total / len(x) ** 2,
    )
