"""How the networks of a level start: the ticket and the controls that are trained beside it.

A treatment takes what a level has found for one initialisation seed (``Origin``) and says what is trained
from it (``Start``): weights at the rewind step, mask, batch order. ``TREATMENTS`` names them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ticketlab import masks as mask_ops
from ticketlab.functional import Masks, State, initialise, state, stream


@dataclass(frozen=True)
class Origin:
    """What a treatment may draw on: one replica of a level."""

    factory: Callable[[], nn.Module]
    """Builds the architecture with its own initialiser."""
    rewound: State
    """Weights and buffers of the dense network at the rewind step k."""
    masks: Masks
    """The ticket's."""
    init_seed: int
    order_seed: int
    level: int


@dataclass(frozen=True)
class Start:
    """What is trained: one replica."""

    state: State
    masks: Masks
    order_seed: int


def derived_seed(purpose: str, *seeds: int) -> int:
    """A seed of its own for each purpose, far from the small numbers that users give."""
    return stream(purpose, *seeds).initial_seed()


def ticket(origin: Origin) -> Start:
    """m * theta_k: the rewound weights under the mask that pruning found."""
    return Start(origin.rewound, origin.masks, origin.order_seed)


def sibling(origin: Origin) -> Start:
    """The ticket in another batch order: with it, a pair of children of theta_k for instability analysis."""
    return Start(origin.rewound, origin.masks, sibling_order(origin.order_seed, origin.level))


def sibling_order(order_seed: int, level: int) -> int:
    """The batch order of the other child of theta_k."""
    return derived_seed("sibling order", order_seed, level)


def reinit(origin: Origin) -> Start:
    """The ticket's mask on a fresh draw from the model's own initialiser; same steps and batches."""
    seed = derived_seed("reinit", origin.init_seed, origin.level)
    fresh = state(initialise(origin.factory, seed))
    some = next(iter(origin.rewound.params.values()))
    return Start(fresh.to(some.device, some.dtype), origin.masks, origin.order_seed)


def random_mask(origin: Origin) -> Start:
    """The rewound weights under as many live weights in all, at random positions of the whole network."""
    seed = derived_seed("random mask", origin.init_seed, origin.level)
    return Start(origin.rewound, mask_ops.random_mask(origin.masks, seed), origin.order_seed)


def layerwise_shuffle(origin: Origin) -> Start:
    """The rewound weights under as many live weights in each layer, at random positions within it."""
    seed = derived_seed("layerwise shuffle", origin.init_seed, origin.level)
    return Start(origin.rewound, mask_ops.layerwise_shuffle(origin.masks, seed), origin.order_seed)


def dense_restart(origin: Origin) -> Start:
    """The dense network trained again from theta_k in a batch order of its own: the noise of retraining."""
    everything = {name: torch.ones_like(mask) for name, mask in origin.masks.items()}
    order_seed = derived_seed("dense restart order", origin.order_seed, origin.level)
    return Start(origin.rewound, everything, order_seed)


TREATMENTS: dict[str, Callable[[Origin], Start]] = {
    "ticket": ticket,
    "reinit": reinit,
    "random_mask": random_mask,
    "layerwise_shuffle": layerwise_shuffle,
    "dense_restart": dense_restart,
    "sibling": sibling,
}
