"""What training costs in multiply-adds, dense and at a mask's density."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ticketlab.functional import evaluating
from ticketlab.masks import prunable


@torch.no_grad()
def positions(model: nn.Module, x: Tensor) -> dict[str, int]:
    """How often one example uses each prunable weight: 1 in a linear layer, height * width in a convolution.

    Counted by a forward pass of ``x[:1]`` through a copy of the model; a layer called twice counts twice.
    """
    probe = copy.deepcopy(model).to(x.device, x.dtype)
    uses = dict.fromkeys(prunable(model), 0)
    for prefix, module in probe.named_modules():
        for name in ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"):
            full = f"{prefix}.{name}".removeprefix(".")
            if full in uses and (name != "out_proj.weight" or isinstance(module, nn.MultiheadAttention)):
                module.register_forward_hook(partial(_count, uses, full))
    with evaluating(probe):
        probe(x[:1])
    return uses


def _count(uses: dict[str, int], name: str, module: nn.Module, inputs: object, output: Tensor | tuple) -> None:
    out = output[0] if isinstance(output, tuple) else output
    channels = getattr(module, "out_features", None) or getattr(module, "out_channels", None) or out.shape[-1]
    uses[name] += out.numel() // int(channels)


def forward_macs(uses: Mapping[str, int], kept: Mapping[str, int]) -> int:
    """Multiply-adds of a forward pass on one example with ``kept[name]`` live weights in each layer."""
    return sum(uses[name] * kept[name] for name in kept)


def training_macs(forward: int, batch_size: int, steps: int) -> int:
    """A backward pass costs two forward passes: one for the inputs, one for the weights."""
    return 3 * forward * batch_size * steps
