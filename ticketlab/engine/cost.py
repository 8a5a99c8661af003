"""What training costs in multiply-adds, dense and at a mask's density."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ticketlab import graph
from ticketlab.masks import prunable
from ticketlab.network import network
from ticketlab.state import state


def positions(model: nn.Module, x: Tensor, names: Sequence[str] | None = None) -> dict[str, float]:
    """How often one example uses each weight: 1 in a linear layer, height * width in a convolution.

    Counted in the matrix products and convolutions of a forward pass of ``x[:1]``, see ``graph.uses``.

    Args:
        model: Any module, whose weights are cast to the dtype of ``x`` for it; not changed.
        x: Inputs [n, ...]; one is used.
        names: Weights to count; the prunable ones when None.

    Warns:
        UserWarning: Weights that no product shows, such as those of a head that evaluation leaves out: they count 0.
    """
    own, names = state(model), prunable(model) if names is None else names
    dtype = x.dtype if x.is_floating_point() else next(iter(own.params.values())).dtype
    with network(model, own.to(x.device, dtype), x[:1], finite=False).lent():
        uses = graph.uses(model, x[:1], names)
    unseen = [name for name, count in uses.items() if not count]
    if unseen:
        warnings.warn(
            f"multiply-adds leave out {len(unseen)} of {len(uses)} weights, which no matrix product or convolution "
            f"shows: {unseen[:4]}. Evaluation does not use them, or not in a product.",
            UserWarning,
            stacklevel=2,
        )
    return uses


def forward_macs(uses: Mapping[str, float], kept: Mapping[str, int]) -> int:
    """Multiply-adds of a forward pass on one example with ``kept[name]`` live weights in each layer."""
    return round(sum(uses[name] * kept[name] for name in kept))


def training_macs(forward: int, batch_size: int, steps: int) -> int:
    """A backward pass costs two forward passes: one for the inputs, one for the weights."""
    return 3 * forward * batch_size * steps
