"""How far the gradients of mini-batches agree: signal, noise, and their ratio."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ticketlab.errors import Refused
from ticketlab.gradients.point import checked, flat, over_replicas, slope
from ticketlab.losses import CROSS_ENTROPY, Loss
from ticketlab.network import Network
from ticketlab.shown import as_line, as_table
from ticketlab.state import State


@dataclass(frozen=True)
class BatchStatistics:
    """Of B gradients of mini-batches of b examples, in live coordinates; float64, one per replica."""

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

    __repr__, _repr_html_ = as_line, as_table


def batch_statistics(
    model: nn.Module,
    state: State | Mapping[str, Tensor],
    x: Float[Tensor, "n *shape"],
    y: Tensor,
    *,
    batch_size: int,
    masks: Mapping[str, Tensor] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    loss: Loss = CROSS_ENTROPY,
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
    net = checked(model, state, x, y, masks=masks, buffers=buffers, loss=loss, batch_size=batch_size)
    if len(x) < 2 * batch_size:
        raise Refused(
            f"noise is measured between at least two whole batches: got {len(x)} examples for batches of {batch_size}. "
            "Pass more examples or a smaller batch_size."
        )
    return over_replicas(net, [_of_network(one, x, y, loss, batch_size) for one in net.each()])


def _of_network(net: Network, x: Tensor, y: Tensor, loss: Loss, batch_size: int) -> BatchStatistics:
    n_batches = len(x) // batch_size
    mean = directions = scatter = torch.zeros((), dtype=torch.float64, device=x.device)
    for b in range(n_batches):
        batch = slice(b * batch_size, (b + 1) * batch_size)
        g = flat(net, slope(net, x[batch], y[batch], loss, batch_size))
        # Welford's update: no difference of large sums, and never below zero.
        gap = g - mean
        mean = mean + gap / (b + 1)
        scatter = scatter + gap.square().sum() * b / (b + 1)
        directions = directions + g / g.norm()
    noise = scatter / (n_batches - 1)
    signal = mean.square().sum() - noise / n_batches
    cosine = (directions.square().sum() - n_batches) / (n_batches * (n_batches - 1))
    return BatchStatistics(n_batches, batch_size, signal, noise, signal / noise, batch_size * noise / signal, cosine)
