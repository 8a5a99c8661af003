"""The networks of the lottery-ticket papers, by name: ``build(name, input_shape, n_classes)``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from ticketlab.errors import Refused, nearest
from ticketlab.models.conv import conv
from ticketlab.models.mlp import mlp

__all__ = ["NAMES", "build", "conv", "mlp"]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet_300_100": partial(mlp, hidden=(300, 100)),
    "mlp_100_50": partial(mlp, hidden=(100, 50)),
    **{f"conv_{d}": partial(conv, depth=d) for d in (2, 4, 6)},
    **{f"conv_{d}_bn": partial(conv, depth=d, batch_norm=True) for d in (2, 4, 6)},
}
NAMES = tuple(_MODELS)


def build(name: str, input_shape: Sequence[int], n_classes: int) -> nn.Module:
    """A freshly initialised network; seed the draw with ``functional.initialise``.

    Raises:
        Refused: An unknown name (the nearest one is given), or inputs that the family cannot take.
    """
    if name not in _MODELS:
        raise Refused(nearest("model", name, NAMES))
    return _MODELS[name](input_shape, n_classes)
