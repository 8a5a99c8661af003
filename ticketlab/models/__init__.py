"""The networks of the lottery-ticket papers, by name: ``build(name, input_shape, n_classes)``.

A name may end in a width that is not the paper's: ``resnet_20_w8`` begins with 8 channels instead of 16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from ticketlab.errors import Refused, nearest
from ticketlab.models.conv import conv
from ticketlab.models.mlp import mlp
from ticketlab.models.resnet import cifar_resnet, resnet

__all__ = ["NAMES", "build", "cifar_resnet", "conv", "mlp", "resnet"]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet_300_100": partial(mlp, hidden=(300, 100)),
    "mlp_100_50": partial(mlp, hidden=(100, 50)),
    **{f"conv_{d}": partial(conv, depth=d) for d in (2, 4, 6)},
    **{f"conv_{d}_bn": partial(conv, depth=d, batch_norm=True) for d in (2, 4, 6)},
}
_SCALED: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet_{d}": partial(cifar_resnet, depth=d) for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet_{d}_padded": partial(cifar_resnet, depth=d, shortcut="padded") for d in (8, 14, 20, 32, 44, 56, 110)},
    **{f"resnet_{d}": partial(resnet, depth=d) for d in (18, 34, 50)},
}
"""Families that also take a width: any of these names with ``_w`` and a number behind it."""
NAMES = (*_MODELS, *_SCALED)


def build(name: str, input_shape: Sequence[int], n_classes: int) -> nn.Module:
    """A freshly initialised network; seed the draw with ``functional.initialise``.

    Raises:
        Refused: An unknown name (the nearest one is given), or inputs that the family cannot take.
    """
    return maker(name)(input_shape, n_classes)


def maker(name: str) -> Callable[..., nn.Module]:
    """The function (input_shape, n_classes) -> network behind a name.

    Raises:
        Refused: An unknown name, or a width for a family without one.
    """
    stem, _, width = name.partition("_w")
    if name not in NAMES and stem in _SCALED and re.fullmatch(r"[1-9][0-9]*", width):
        return partial(_SCALED[stem], width=int(width))
    if name not in NAMES:
        scaled = f" Behind {', '.join(_SCALED)} a width may stand, as in resnet_20_w8." if "_w" in name else ""
        raise Refused(nearest("model", name, NAMES) + scaled)
    return (_MODELS | _SCALED)[name]
