"""How far the gradients of mini-batches agree: signal, noise, and their ratio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ticketlab.errors import Refused
from ticketlab.gradients.gradient import gradient_at
from ticketlab.gradients.point import check_data, point


@dataclass(frozen=True)
class BatchStatistics:
    """Of B gradients of mini-batches of b examples, in live coordinates; float64, one a replica."""

    n_batches: int
    batch_size: int
    signal: Float[Tensor, "*replica"]
    """Unbiased estimate of ||E g||^2: the mean inner product of two batches. Negative where noise drowns it."""
    noise: Float[Tensor, "*replica"]
    """Unbiased estimate of tr Cov(g), of a mini-batch of this size."""
    signal_to_noise: Float[Tensor, "*replica"]
    """signal / noise, a ratio of unbiased estimates."""
    noise_scale: Float[Tensor, "*replica"]
    """b noise / signal, in examples: the batch size at which the two are equal (McCandlish et al. 2018)."""
    pairwise_cosine: Float[Tensor, "*replica"]
    """Mean cosine of the gradients of two batches."""


def batch_statistics(
    model: nn.Module,
    params: Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    y: Int[Tensor, " n"],
    *,
    batch_size: int,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
) -> BatchStatistics:
    r"""Signal-to-noise ratio of the ticket's gradient across mini-batches.

    .. math:: \mathrm{SNR} = \frac{\|E g\|^2}{\mathrm{tr\,Cov}(g)}, \qquad
              \widehat{\mathrm{tr\,Cov}} = \frac1{B-1} \sum_b \|g_b - \bar g\|^2, \qquad
              \widehat{\|E g\|^2} = \|\bar g\|^2 - \frac1B \widehat{\mathrm{tr\,Cov}}

    Without the correction B batches of pure noise would show a ratio near 1/B. Both estimates are what
    McCandlish et al. 2018 (arXiv:1812.06162, appendix A.1) get from batches of b and of B b examples.

    Args:
        x: Inputs in random order, cut into batches as they come; what does not fill a batch is not used.
        batch_size: b, such that at least two batches are filled. The ratio grows in proportion to it.
            The others as in :func:`ticketlab.gradients.gradient`.

    Raises:
        Refused: As for the gradient, or fewer than two batches.
    """
    at = point(model, params, masks, buffers)
    check_data(at, x, y, batch_size)
    n_batches = len(x) // batch_size
    if n_batches < 2:
        raise Refused(
            f"noise is measured between at least two whole batches: got {len(x)} examples for batches of {batch_size}. "
            "Pass more examples or a smaller batch_size."
        )
    mean = directions = scatter = torch.zeros((), dtype=torch.float64, device=x.device)
    for b in range(n_batches):
        batch = slice(b * batch_size, (b + 1) * batch_size)
        g = at.flat(gradient_at(at, x[batch], y[batch], batch_size))
        # Welford's update: no difference of large sums, and never below zero.
        gap = g - mean
        mean = mean + gap / (b + 1)
        scatter = scatter + gap.square().sum(-1) * b / (b + 1)
        directions = directions + g / g.norm(dim=-1, keepdim=True)
    noise = scatter / (n_batches - 1)
    signal = mean.square().sum(-1) - noise / n_batches
    cosine = (directions.square().sum(-1) - n_batches) / (n_batches * (n_batches - 1))
    return BatchStatistics(n_batches, batch_size, signal, noise, signal / noise, batch_size * noise / signal, cosine)
