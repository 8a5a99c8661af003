"""What the convolutional families share: the check of their inputs, and Kaiming normal weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ticketlab.errors import Refused


def check_images(name: str, input_shape: Sequence[int], smallest: int) -> int:
    """Number of channels; raises `Refused` unless inputs are [channels, height, width] of so many pixels a side."""
    if len(input_shape) != 3 or min(input_shape[1:]) < smallest:
        raise Refused(
            f"{name} needs images [channels, height, width] of at least {smallest} pixels a side: "
            f"got {tuple(input_shape)}. Use an mlp for other inputs."
        )
    return input_shape[0]


def kaiming_normal_(net: nn.Module) -> None:
    """Set linear and convolution weights to normal draws of variance 2 / fan in (He et al. 2015), biases to zero."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
