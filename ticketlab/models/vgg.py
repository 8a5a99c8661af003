"""VGG-11, 13, 16 and 19 with batch norm, in the form they have for CIFAR: one linear layer behind the convolutions."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from ticketlab.errors import Refused
from ticketlab.models.images import check_images, kaiming_normal_

_CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
_TIMES = (1, 2, 4, 8, 8)  # width of each stage over that of the first


def vgg(input_shape: Sequence[int], n_classes: int, *, depth: int, width: int = 64) -> nn.Sequential:
    """Five stages of 3x3 convolutions with batch norm, a 2x2 max-pool between them, the mean over what is left.

    The convolutions are those of Simonyan & Zisserman (2015), configurations A, B, D and E; their three large linear
    layers are replaced by one, as in Frankle et al. (2020). On 3x32x32 images and 10 classes VGG-16 has 14,715,584
    prunable weights and 14,724,042 parameters: the 14.7 M of that paper, whose convolutions also have biases, which
    the batch norm behind them takes away.

    Args:
        input_shape: (channels, height, width), of at least 16 pixels a side.
        n_classes: Units of the output layer.
        depth: 11, 13, 16 or 19, as the paper counts its layers.
        width: Channels of the first stage; 64 in the paper.

    Raises:
        Refused: Another depth, or inputs that are not images or too small to be halved four times.
    """
    if depth not in _CONVOLUTIONS:
        raise Refused(f"depth must be one of {', '.join(map(str, _CONVOLUTIONS))}: got {depth}.")
    channels = check_images(f"vgg_{depth}", input_shape, smallest=16)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for stage, (n, times) in enumerate(zip(_CONVOLUTIONS[depth], _TIMES, strict=True), start=1):
        for index in range(1, n + 1):
            layers[f"conv{stage}_{index}"] = nn.Conv2d(channels, times * width, 3, padding=1, bias=False)
            layers[f"norm{stage}_{index}"] = nn.BatchNorm2d(times * width)
            layers[f"relu{stage}_{index}"] = nn.ReLU()
            channels = times * width
        layers[f"pool{stage}"] = nn.MaxPool2d(2) if stage < len(_TIMES) else nn.AdaptiveAvgPool2d(1)
    layers["flatten"], layers["output"] = nn.Flatten(), nn.Linear(channels, n_classes)
    net = nn.Sequential(layers)
    kaiming_normal_(net)
    return net
