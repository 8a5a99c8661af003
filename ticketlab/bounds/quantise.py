"""Weights rounded to a few shared values, so that a codebook and indices describe them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ticketlab.bounds.description import check_masks
from ticketlab.errors import Refused
from ticketlab.state import Params

_SWEEPS = 100


def quantise(params: Mapping[str, Tensor], masks: Mapping[str, Tensor], n_values: int) -> Params:
    """Each tensor's live values moved to the nearest of at most ``n_values`` shared ones; pruned weights are zero.

    The shared values are those of Lloyd's (1982) algorithm, which lowers the squared error from the quantiles on:
    each becomes the mean of what is nearest to it. A tensor of no more values than that stays as it is.

    Args:
        params: Floating tensors of one network.
        masks: True = kept; tensors without a mask are quantised whole.
        n_values: 1..256, the largest codebook that `encode` writes.

    Raises:
        Refused: n_values out of range, masks that do not fit, weights that are not finite.
    """
    if not isinstance(n_values, int) or not 1 <= n_values <= 256:
        raise Refused(f"n_values must lie in 1..256, an integer: got {n_values!r}. Take 2 to the bits per weight.")
    check_masks(masks, params)
    found: Params = {}
    for name, tensor in params.items():
        mask = masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
        found[name] = torch.zeros_like(tensor).masked_scatter(mask, _lloyd(tensor[mask], n_values))
    return found


def _lloyd(values: Tensor, n_values: int) -> Tensor:
    """Values [n] replaced by their centroids. Cells are runs of the sorted values, so prefix sums give every mean."""
    if len(values.unique()) <= n_values:
        return values
    ordered = values.double().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    ranks = (torch.arange(n_values, device=values.device) + 0.5) / n_values * len(values)
    centroids = ordered[ranks.long()]
    for _ in range(_SWEEPS):
        ends = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2, right=True)
        cuts = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(values))])
        counts = cuts.diff()
        centroids = torch.where(counts > 0, sums[cuts].diff() / counts.clamp(min=1), centroids)  # an empty cell stays
    nearest = torch.bucketize(values.double(), (centroids[1:] + centroids[:-1]) / 2)
    return centroids[nearest].to(values.dtype)
