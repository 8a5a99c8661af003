"""How large the first gradient is, and whether it points where the dense one does and where training goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ticketlab.errors import Refused
from ticketlab.gradients.gradient import gradient_at
from ticketlab.gradients.point import Point, check_data, point


@dataclass(frozen=True)
class Alignment:
    """Size and direction of the ticket's gradient; float64, one a replica."""

    norm: Float[Tensor, "*replica"]
    """||g|| over live coordinates; its square is the gradient flow of Evci et al. 2022 (arXiv:2010.03533)."""
    n_live: Int[Tensor, "*replica"]
    """k: kept weights, and parameters without a mask."""
    norm_per_live_weight: Float[Tensor, "*replica"]
    """||g|| / sqrt(k), the root mean square over live coordinates."""
    cosine_with_dense: Float[Tensor, "*replica"]
    """Of g with the live coordinates of the gradient at theta; NaN where no dense parameters are given."""
    cosine_with_displacement: Float[Tensor, "*replica"]
    """Of -g with theta_T - m * theta on live coordinates; NaN where no end is given."""


def alignment(
    model: nn.Module,
    params: Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, " n"],
    *,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    dense_params: Mapping[str, Tensor] | None = None,
    dense_buffers: Mapping[str, Tensor] | None = None,
    params_end: Mapping[str, Tensor] | None = None,
    batch_size: int = 500,
) -> Alignment:
    r"""Norm of the ticket's gradient and its cosines with the dense gradient and with the displacement.

    .. math:: \cos(g, m \odot \nabla L(\theta)), \qquad \cos(-g, m \odot (\theta_T - \theta)),
              \qquad g = m \odot \nabla L(m \odot \theta)

    A random direction has a cosine of 0 with standard deviation 1 / sqrt(k). Where a gradient or the displacement
    is zero the cosine is NaN.

    Args:
        dense_params: theta without the mask; what the parameters stored with a ticket are not, for pruned
            weights are zero there. With the replica axis of ``params_end``.
        dense_buffers: As ``buffers``, at ``dense_params``; those of the ticket when None.
        params_end: theta_T, with the replica axis of ``params``, or of the masks where they alone have one.
            The others as in :func:`ticketlab.gradients.gradient`.

    Raises:
        Refused: As for the gradient, or parameters of other shapes.
    """
    at = point(model, params, masks, buffers)
    check_data(at, x, y, batch_size)
    g = at.flat(gradient_at(at, x, y, batch_size))
    norm, n_live = g.norm(dim=-1), at.n_live()
    with_dense = with_displacement = torch.full_like(norm, torch.nan)
    if dense_params is not None:
        dense = _beside(at, "dense_params", dense_params, buffers if dense_buffers is None else dense_buffers)
        with_dense = _cosine(g, at.flat(gradient_at(dense, x, y, batch_size)))
    if params_end is not None:
        end = _beside(at, "params_end", params_end, buffers)
        with_displacement = _cosine(-g, at.flat(end.weights) - at.flat(at.weights))
    return Alignment(norm, n_live, norm / n_live.double().sqrt(), with_dense, with_displacement)


def _beside(at: Point, name: str, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor] | None) -> Point:
    """Other unmasked parameters of the same replicas."""
    other = point(at.model, params, None, buffers)
    if other.replicas != at.replicas:
        raise Refused(f"{name} must have the replica axis of params and masks, {at.replicas}: got {other.replicas}.")
    return other


def _cosine(a: Float[Tensor, "*replica d"], b: Float[Tensor, "*replica d"]) -> Float[Tensor, "*replica"]:
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
