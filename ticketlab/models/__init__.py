"""The networks of the lottery-ticket papers, by name: ``build(name, input_shape, n_classes)``.

Behind most names sizes may stand that are not the paper's, a letter and a number each: ``resnet_20_w8`` begins with 8
channels instead of 16, ``vit_tiny_d6_w96_p2`` has 6 blocks of width 96 on patches of 2 pixels, ``vit_tiny_s10`` drops
10 % of the paths in its last block (stochastic depth), ``encoder_tiny_o10`` 10 % of its entries (dropout).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from ticketlab.errors import Refused, check_count, nearest
from ticketlab.imports import imported, is_own
from ticketlab.models import bert
from ticketlab.models.conv import conv
from ticketlab.models.mlp import mlp
from ticketlab.models.resnet import cifar_resnet, resnet
from ticketlab.models.transformer import BYTES, decoder, encoder
from ticketlab.models.vgg import vgg
from ticketlab.models.vit import vit

__all__ = [
    "NAMES",
    "bert",
    "build",
    "cifar_resnet",
    "conv",
    "decoder",
    "encoder",
    "maker",
    "mlp",
    "resnet",
    "vgg",
    "vit",
]

Maker = Callable[..., nn.Module]

_CIFAR = (8, 14, 20, 32, 44, 56, 110)
_MODELS: dict[str, Maker] = {
    "lenet_300_100": partial(mlp, hidden=(300, 100)),
    "mlp_100_50": partial(mlp, hidden=(100, 50)),
    **{f"conv_{d}": partial(conv, depth=d) for d in (2, 4, 6)},
    **{f"conv_{d}_bn": partial(conv, depth=d, batch_norm=True) for d in (2, 4, 6)},
    **{f"resnet_{d}": partial(cifar_resnet, depth=d) for d in _CIFAR},
    **{f"resnet_{d}_padded": partial(cifar_resnet, depth=d, shortcut="padded") for d in _CIFAR},
    **{f"resnet_{d}": partial(resnet, depth=d) for d in (18, 34, 50)},
    **{f"vgg_{d}": partial(vgg, depth=d) for d in (11, 13, 16, 19)},
    "vit_tiny": partial(vit, depth=12, width=192, heads=3),
    "vit_mini": partial(vit, depth=4, width=64, heads=4),
    "encoder_tiny": partial(encoder, depth=4, width=128, heads=4),
    "decoder_tiny": partial(decoder, depth=4, width=128, heads=4),
    "decoder_tiny_pooled": partial(decoder, depth=4, width=128, heads=4, pooled=True, vocabulary=BYTES),
    "bert_base": bert.bert,
    "bert_tiny": partial(bert.bert, depth=2, width=128, heads=2),
    "gpt2_base": bert.gpt2,
    "gpt2_tiny": partial(bert.gpt2, depth=2, width=128, heads=2),
    "llama_tiny": bert.llama,
}
NAMES = tuple(_MODELS)

_SIZES = {"w": "width", "d": "depth", "h": "heads", "p": "patch", "v": "vocabulary"}
_PERCENT = {"o": "dropout", "s": "drop_path"}
_LETTERS = {
    **{"resnet": "w", "vgg": "w", "vit": "dwhpos", "encoder": "dwhvos", "decoder": "dwhos"},
    **{"bert": "dwhvo", "gpt2": "dwho", "llama": "dwh"},
}
"""Sizes, and shares in percent, that a family takes behind its names."""


def build(name: str, input_shape: Sequence[int], n_classes: int) -> nn.Module:
    """A freshly initialised network; seed the draw with ``functional.initialise``.

    Args:
        name: One of `NAMES`, with sizes behind it or not; or ``package.module:function`` of one's own, which takes no
            arguments and draws from PyTorch's global generator.
        input_shape: Of one example: (channels, height, width), or (t,) tokens.
        n_classes: Number of classes, or of tokens for a language model.

    Raises:
        Refused: An unknown name (the nearest one is given), or inputs that the family cannot take.
    """
    for size in input_shape:
        check_count("every size of input_shape", size, 1, 10**9)
    check_count("n_classes", n_classes, 1, 10**9)
    return maker(name)(input_shape, n_classes)


def _own(name: str, _input_shape: Sequence[int], _n_classes: int) -> nn.Module:
    """What a user's own function makes; it knows the task that it is for."""
    made = imported(name, "a model")()
    if not isinstance(made, nn.Module):
        raise Refused(f"a model of one's own must be a torch.nn.Module: {name} returns {type(made).__name__}.")
    return made


def maker(name: str) -> Maker:
    """The function (input_shape, n_classes) -> network behind a name.

    Raises:
        Refused: An unknown name, or a size that its family does not take.
    """
    if name in _MODELS:
        return _MODELS[name]
    if is_own(name):
        return partial(_own, name)
    found = re.fullmatch(r"(?P<stem>.+?)(?P<sizes>(_[a-z][0-9]+)+)", name)
    if found is None or found["stem"] not in _MODELS:
        raise Refused(nearest("model", found["stem"] if found else name, NAMES))
    sizes = {size[0]: int(size[1:]) for size in found["sizes"].split("_")[1:]}
    letters = _LETTERS.get(found["stem"].partition("_")[0], "")
    if not set(sizes) <= set(letters) or min(sizes.values()) < 1 or len(sizes) < found["sizes"].count("_"):
        known = ", ".join(f"_{letter}N ({(_SIZES | _PERCENT)[letter]})" for letter in letters) or "no sizes"
        raise Refused(f"behind {found['stem']} may stand {known}, each once and at least 1: got {name!r}.")
    shares = {_PERCENT[letter]: size / 100 for letter, size in sizes.items() if letter in _PERCENT}
    return partial(_MODELS[found["stem"]], **shares, **{_SIZES[n]: size for n, size in sizes.items() if n in _SIZES})
