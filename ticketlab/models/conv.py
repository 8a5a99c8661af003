"""Conv-2, Conv-4 and Conv-6: the small VGG-like networks of Frankle & Carbin (2019), with or without batch norm."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from ticketlab.errors import Refused
from ticketlab.models.mlp import glorot_normal_

_CHANNELS = (64, 128, 256)  # two convolutions of each, then a 2x2 max-pool


def conv(input_shape: Sequence[int], n_classes: int, *, depth: int, batch_norm: bool = False) -> nn.Sequential:
    """``depth`` 3x3 convolutions in pairs, pooled, then 256-256-classes; Glorot normal weights.

    On 3x32x32 images Conv-2 has 4,300,992 prunable weights, Conv-4 2,425,024 and Conv-6 2,261,184. The paper gives
    4.3 M, 2.4 M and 1.7 M; the last does not follow from the layers it lists, which are these.

    Args:
        input_shape: (channels, height, width).
        n_classes: Units of the output layer.
        depth: 2, 4 or 6 convolutions.
        batch_norm: Normalise after each convolution, which then has no bias.

    Raises:
        Refused: Another depth, inputs that are not images, or too small to be halved depth / 2 times.
    """
    if depth not in (2, 4, 6):
        raise Refused(f"depth must be 2, 4 or 6: got {depth}.")
    if len(input_shape) != 3 or min(input_shape[1:]) < 2 ** (depth // 2):
        raise Refused(
            f"conv_{depth} needs images [channels, height, width] of at least {2 ** (depth // 2)} pixels a side: "
            f"got {tuple(input_shape)}. Use an mlp for other inputs."
        )
    channels, height, width = input_shape
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index in range(1, depth + 1):
        units = _CHANNELS[(index - 1) // 2]
        layers[f"conv{index}"] = nn.Conv2d(channels, units, 3, padding=1, bias=not batch_norm)
        if batch_norm:
            layers[f"norm{index}"] = nn.BatchNorm2d(units)
        layers[f"relu{index}"] = nn.ReLU()
        channels = units
        if index % 2 == 0:
            layers[f"pool{index // 2}"] = nn.MaxPool2d(2)
            height, width = height // 2, width // 2
    layers["flatten"] = nn.Flatten()
    layers["fc1"], layers["relu_fc1"] = nn.Linear(channels * height * width, 256), nn.ReLU()
    layers["fc2"], layers["relu_fc2"] = nn.Linear(256, 256), nn.ReLU()
    layers["output"] = nn.Linear(256, n_classes)
    net = nn.Sequential(layers)
    glorot_normal_(net)
    return net
