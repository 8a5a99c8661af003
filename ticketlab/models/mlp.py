"""Fully connected networks: LeNet-300-100 and a smaller one for the digits."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

from torch import nn


def mlp(input_shape: Sequence[int], n_classes: int, *, hidden: Sequence[int]) -> nn.Sequential:
    """Flatten, then ReLU layers of ``hidden`` units, then a linear ``output``.

    Glorot normal weights and zero biases, as in Frankle & Carbin (2019). With hidden = (300, 100) on
    784 inputs and 10 classes it has 266,200 prunable weights.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    width = math.prod(input_shape)
    for index, units in enumerate(hidden, start=1):
        layers[f"fc{index}"] = nn.Linear(width, units)
        layers[f"relu{index}"] = nn.ReLU()
        width = units
    layers["output"] = nn.Linear(width, n_classes)
    net = nn.Sequential(layers)
    glorot_normal_(net)
    return net


def glorot_normal_(net: nn.Module) -> None:
    """Set every linear and convolution weight to a Glorot normal draw and its bias to zero, in place."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
