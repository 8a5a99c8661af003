"""What training costs in multiply-adds, dense and at a mask's density."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ticketlab.functional import evaluating
from ticketlab.masks import prunable


@torch.no_grad()
def positions(model: nn.Module, x: Tensor) -> dict[str, int]:
    """How often one example uses each prunable weight: 1 in a linear layer, height * width in a convolution.

    Counted by a forward pass of ``x[:1]`` through a copy of the model. A layer called twice, or a weight tied in
    two layers, counts both; a weight used other than by calling its module is not seen, and attention counts all
    its projections at the length of the query.
    """
    probe = copy.deepcopy(model).to(x.device, x.dtype if x.is_floating_point() else None)
    names = {id(p): n for n, p in probe.named_parameters()}
    uses = dict.fromkeys(prunable(model), 0)
    for module in probe.modules():
        weights = [module.out_proj.weight] if isinstance(module, nn.MultiheadAttention) else []
        for weight in (*weights, *module.parameters(recurse=False)):
            if names.get(id(weight)) in uses:
                module.register_forward_hook(partial(_count, uses, names[id(weight)]))
    with evaluating(probe):
        probe(x[:1])
    return uses


def _count(uses: dict[str, int], name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
    if getattr(module, "transposed", False):  # each input position meets every weight
        uses[name] += inputs[0].numel() // int(module.in_channels)  # type: ignore[arg-type]
        return
    out = output[0] if isinstance(output, tuple) else output
    channels = getattr(module, "out_features", None) or getattr(module, "out_channels", None) or out.shape[-1]
    uses[name] += out.numel() // int(channels)


def forward_macs(uses: Mapping[str, int], kept: Mapping[str, int]) -> int:
    """Multiply-adds of a forward pass on one example with ``kept[name]`` live weights in each layer."""
    return sum(uses[name] * kept[name] for name in kept)


def training_macs(forward: int, batch_size: int, steps: int) -> int:
    """A backward pass costs two forward passes: one for the inputs, one for the weights."""
    return 3 * forward * batch_size * steps
