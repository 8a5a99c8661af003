"""Residual networks of He et al. (2016): ResNet-20 and its kin for small images, ResNet-18, 34 and 50 for larger ones.

Convolutions have no bias and are followed by batch norm; weights are Kaiming normal (fan in), norms start at 1 and 0.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ticketlab.errors import Refused
from ticketlab.models.images import check_images, kaiming_normal_

Shortcut = Literal["projection", "padded"]

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
_LARGE = 64  # pixels a side above which the stem of ResNet-18 and its kin is that for ImageNet


class Padded(nn.Module):
    """Option A of He et al. (2016): every second pixel, and zeros for the channels that are new; no parameters."""

    def __init__(self, channels: int, units: int, stride: int) -> None:
        super().__init__()
        self.new, self.stride = units - channels, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new))

    def extra_repr(self) -> str:
        return f"new={self.new}, stride={self.stride}"


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, channels: int, units: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(channels, units, 3, stride), nn.BatchNorm2d(units)
        self.relu1 = nn.ReLU()
        self.conv2, self.norm2 = _conv(units, units, 3), nn.BatchNorm2d(units)
        self.shortcut = _shortcut(channels, units, stride, shortcut)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last with four times as many units, beside a shortcut."""

    def __init__(self, channels: int, units: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(channels, units, 1), nn.BatchNorm2d(units)
        self.relu1 = nn.ReLU()
        self.conv2, self.norm2 = _conv(units, units, 3, stride), nn.BatchNorm2d(units)
        self.relu2 = nn.ReLU()
        self.conv3, self.norm3 = _conv(units, 4 * units, 1), nn.BatchNorm2d(4 * units)
        self.shortcut = _shortcut(channels, 4 * units, stride, shortcut)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        y = self.relu2(self.norm2(self.conv2(y)))
        return self.relu3(self.norm3(self.conv3(y)) + self.shortcut(x))


def cifar_resnet(
    input_shape: Sequence[int], n_classes: int, *, depth: int, width: int = 16, shortcut: Shortcut = "projection"
) -> nn.Sequential:
    """ResNet-20, 32, 56, 110 for small images: a 3x3 stem, three stages of ``width``, 2 and 4 times ``width`` units.

    On 3x32x32 images and 10 classes ResNet-20 has 272,474 parameters, 269,722 with padded shortcuts (the 0.27 M of
    He et al. 2016, table 6). Projections are the default because the studies of lottery tickets use them (Frankle
    et al. 2020, 274K), and because zeros tied to the last channels leave no permutation of the residual stream.

    Args:
        input_shape: (channels, height, width).
        n_classes: Units of the output layer.
        depth: 6 n + 2, for n blocks per stage: 8, 14, 20, 26, 32 and on.
        width: Channels of the first stage; 16 in the paper.
        shortcut: Where the number of channels changes, a 1x1 convolution with batch norm (``projection``, option B)
            or every second pixel beside zeros (``padded``, option A).

    Raises:
        Refused: Another depth or shortcut, or inputs that are not images.
    """
    if depth < 8 or depth % 6 != 2:
        raise Refused(f"depth must be 6 n + 2 for n blocks per stage, 8, 14, 20, ...: got {depth}.")
    channels = check_images(f"resnet_{depth}", input_shape, smallest=1)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"], layers["norm1"], layers["relu1"] = _conv(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU()
    channels = width
    for index, units in enumerate((width, 2 * width, 4 * width)):
        layers[f"stage{index + 1}"], channels = _stage(Block, channels, units, (depth - 2) // 6, index, shortcut)
    return _with_output(layers, channels, n_classes)


def resnet(input_shape: Sequence[int], n_classes: int, *, depth: int, width: int = 64) -> nn.Sequential:
    """ResNet-18, 34 or 50: four stages, projection shortcuts, the stride of a bottleneck on its 3x3 convolution.

    On 3x224x224 images and 1000 classes they have 11,689,512, 21,797,672 and 25,557,032 parameters, as published.

    Args:
        input_shape: (channels, height, width). Up to 64 pixels a side the stem is one 3x3 convolution, as for CIFAR;
            above, a 7x7 one with stride 2 and a max-pool.
        n_classes: Units of the output layer.
        depth: 18 or 34 of basic blocks, 50 of bottlenecks.
        width: Channels of the stem; 64 in the paper.

    Raises:
        Refused: Another depth, or inputs that are not images.
    """
    if depth not in _BLOCKS:
        raise Refused(f"depth must be one of {', '.join(map(str, _BLOCKS))}: got {depth}.")
    channels = check_images(f"resnet_{depth}", input_shape, smallest=1)
    block = Bottleneck if depth >= 50 else Block
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if max(input_shape[1:]) > _LARGE:
        layers["conv1"] = _conv(channels, width, 7, stride=2)
    else:
        layers["conv1"] = _conv(channels, width, 3)
    layers["norm1"], layers["relu1"] = nn.BatchNorm2d(width), nn.ReLU()
    if max(input_shape[1:]) > _LARGE:
        layers["pool1"] = nn.MaxPool2d(3, stride=2, padding=1)
    channels = width
    for index, n_blocks in enumerate(_BLOCKS[depth]):
        units = width * 2**index
        layers[f"stage{index + 1}"], channels = _stage(block, channels, units, n_blocks, index, "projection")
    return _with_output(layers, channels, n_classes)


def _conv(channels: int, units: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, units, kernel, stride=stride, padding=kernel // 2, bias=False)


def _shortcut(channels: int, units: int, stride: int, shortcut: Shortcut) -> nn.Module:
    if channels == units and stride == 1:
        return nn.Identity()
    if shortcut == "padded":
        return Padded(channels, units, stride)
    if shortcut != "projection":
        raise Refused(f"shortcut must be 'projection' or 'padded': got {shortcut!r}.")
    return nn.Sequential(OrderedDict(conv=_conv(channels, units, 1, stride), norm=nn.BatchNorm2d(units)))


def _stage(
    block: type[Block] | type[Bottleneck], channels: int, units: int, n_blocks: int, index: int, shortcut: Shortcut
) -> tuple[nn.Sequential, int]:
    """Blocks of one width, the first of which halves the image in all stages but the first; and their channels."""
    blocks: list[nn.Module] = []
    for place in range(n_blocks):
        blocks.append(block(channels, units, 2 if index and not place else 1, shortcut))
        channels = units * (4 if block is Bottleneck else 1)
    return nn.Sequential(*blocks), channels


def _with_output(layers: OrderedDict[str, nn.Module], channels: int, n_classes: int) -> nn.Sequential:
    layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["output"] = nn.Linear(channels, n_classes)
    net = nn.Sequential(layers)
    kaiming_normal_(net)
    return net
