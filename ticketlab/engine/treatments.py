"""How the networks of a level start: the ticket and the controls that are trained beside it.

A treatment takes what a level has found for one initialisation seed (``Origin``) and says what is trained
from it (``Start``): weights at the rewind step, mask, batch order, what becomes of pruned weights, and at which
learning rate. ``TREATMENTS`` names them all, with all that is known of each; ``RETRAINING`` those by which the ticket
itself may go on from level to level (Renda et al. 2020). A user's own is a function of an ``Origin``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ticketlab import masks as mask_ops
from ticketlab.engine import values
from ticketlab.engine.dynamic.spread import drawn, spread_over
from ticketlab.engine.start import Start
from ticketlab.errors import Refused, check_type
from ticketlab.probing import watching_generators
from ticketlab.seeds import Factory, derived_seed, initialise
from ticketlab.shown import as_line, as_table
from ticketlab.state import Masks, Params, State, state


@dataclass(frozen=True)
class Origin:
    """What a treatment may draw on: one replica of a level."""

    factory: Factory
    """Builds the architecture with its own initialiser."""
    rewound: State
    """Weights and buffers of the dense network at the rewind step k."""
    masks: Masks
    """The ticket's."""
    init_seed: int
    order_seed: int
    level: int
    trained: State
    """The ticket of the level before at the end of its training, its pruned weights zero."""
    dense: State
    """The dense network at the end of its training."""
    last_learning_rate: float
    """Of the recipe's schedule."""
    retraining: str = "rewind"
    """How the ticket goes on from level to level, a name in ``RETRAINING``."""

    __repr__, _repr_html_ = as_line, as_table

    def draw(self, purpose: str) -> int:
        """A seed of its own for each purpose, init seed and level."""
        return derived_seed(purpose, self.init_seed, self.level)


def own_start(name: str, treatment: Callable[[Origin], Start], origin: Origin) -> Start:
    """Where a user's own treatment starts. It gets copies, for it may write into what it is given.

    Raises:
        Refused: It returns something else, or draws from a global generator.
    """
    copies: dict[str, State] = {k: getattr(origin, k).clone() for k in ("rewound", "trained", "dense")}
    masks = {n: m.clone() for n, m in origin.masks.items()}
    device = next((m.device for m in masks.values()), torch.device("cpu"))
    with watching_generators(device) as drawn:
        start = treatment(replace(origin, masks=masks, **copies))  # type: ignore[arg-type]
    check_type(f"what treatment {name!r} returns", start, Start, "Return Start(state, masks, order_seed).")
    if drawn():
        raise Refused(
            f"treatment {name!r} must not draw from a global generator, which no run can repeat. Draw from "
            "torch.Generator().manual_seed(origin.draw(purpose))."
        )
    return start


# How the ticket itself goes on.


def rewind(origin: Origin) -> Start:
    """m * theta_k: the rewound weights under the mask that pruning found (Frankle & Carbin 2019)."""
    return Start(origin.rewound, origin.masks, origin.order_seed)


def lr_rewind(origin: Origin) -> Start:
    """The trained weights of the level before; the schedule is replayed from step k (Renda et al. 2020)."""
    return Start(origin.trained, origin.masks, origin.order_seed)


def fine_tune(origin: Origin) -> Start:
    """The trained weights of the level before, trained on at the schedule's last learning rate (Han et al. 2015)."""
    return replace(lr_rewind(origin), learning_rate=origin.last_learning_rate)


RETRAINING: dict[str, Callable[[Origin], Start]] = {"rewind": rewind, "lr_rewind": lr_rewind, "fine_tune": fine_tune}


def ticket(origin: Origin) -> Start:
    """What the study prunes next: the ticket's mask on the weights that its retraining starts from."""
    return RETRAINING[origin.retraining](origin)


# The same weights, something else drawn anew.


def sibling(origin: Origin) -> Start:
    """The ticket in another batch order: with it, a pair of children of theta_k for instability analysis."""
    return replace(ticket(origin), order_seed=sibling_order(origin.order_seed, origin.level))


def sibling_order(order_seed: int, level: int) -> int:
    """The batch order of the other child of theta_k."""
    return derived_seed("sibling order", order_seed, level)


def random_mask(origin: Origin) -> Start:
    """The rewound weights under as many live weights in all, at random positions of the whole network."""
    return Start(origin.rewound, mask_ops.random_mask(origin.masks, origin.draw("random mask")), origin.order_seed)


def random_erk(origin: Origin) -> Start:
    """The rewound weights under as many live weights in all, at random positions, layers as dense as
    Erdos-Renyi-Kernel makes them (Evci et al. 2020): the fair random mask, where a uniform one starves small layers."""
    counts = spread_over({n: m.shape for n, m in origin.masks.items()}, int(mask_ops.kept(origin.masks)))
    return Start(origin.rewound, drawn(origin.masks, counts, origin.draw("random ERK mask")), origin.order_seed)


def layerwise_shuffle(origin: Origin) -> Start:
    """The rewound weights under as many live weights in each layer, at random positions within it."""
    masks = mask_ops.layerwise_shuffle(origin.masks, origin.draw("layerwise shuffle"))
    return Start(origin.rewound, masks, origin.order_seed)


def dense_restart(origin: Origin) -> Start:
    """The dense network trained again from theta_k in a batch order of its own: the noise of retraining."""
    everything = {name: torch.ones_like(mask) for name, mask in origin.masks.items()}
    order_seed = derived_seed("dense restart order", origin.order_seed, origin.level)
    return Start(origin.rewound, everything, order_seed)


# The ticket's mask on other values (Zhou et al. 2019, section 4).


def reinit(origin: Origin) -> Start:
    """The ticket's mask on a fresh draw from the model's own initialiser; same steps and batches.

    Parameters that are not trained stay those of the ticket: they are no part of what is drawn.
    """
    return Start(_fresh(origin), origin.masks, origin.order_seed)


def reinit_keep_sign(origin: Origin) -> Start:
    """The fresh draw's magnitudes with the signs of the rewound weights."""
    fresh = _fresh(origin)
    signed = values.with_signs_of(fresh.params, origin.rewound.params, origin.masks)
    return Start(State(signed, fresh.buffers), origin.masks, origin.order_seed)


def reshuffle(origin: Origin) -> Start:
    """The rewound values of a layer's live weights, dealt out among them anew."""
    return _valued(origin, values.reshuffled(origin.rewound.params, origin.masks, origin.draw("reshuffle")))


def reshuffle_keep_sign(origin: Origin) -> Start:
    """The same, but a positive value goes to a positive weight and a negative one to a negative weight."""
    seed = origin.draw("reshuffle, signs kept")
    return _valued(origin, values.reshuffled(origin.rewound.params, origin.masks, seed, keep_signs=True))


def random_sign(origin: Origin) -> Start:
    """The rewound magnitudes, each with a sign drawn anew."""
    return _valued(origin, values.random_signs(origin.rewound.params, origin.masks, origin.draw("random sign")))


def signed_constant(origin: Origin) -> Start:
    """The standard deviation of the layer's rewound weights, with the sign of each."""
    return _valued(origin, values.signed_constants(origin.rewound.params, origin.masks))


def random_constant(origin: Origin) -> Start:
    """The same constants with signs drawn anew: nothing but the mask is left of the ticket."""
    constants = values.signed_constants(origin.rewound.params, origin.masks)
    return _valued(origin, values.random_signs(constants, origin.masks, origin.draw("random constant")))


# What pruned weights become (Zhou et al. 2019, section 3). Measures of these networks take no masks.


def frozen_init(origin: Origin) -> Start:
    """The dense network at step k, of which only the ticket's weights are trained: pruned ones stay as they are."""
    return Start(origin.rewound, origin.masks, origin.order_seed, frozen=True)


def frozen_unless_shrunk(origin: Origin) -> Start:
    """Pruned weights that dense training moved toward zero become zero; the others stay at their rewound value."""
    rewound, trained = origin.rewound.params, origin.dense.params
    stays = {n: m | (trained[n].abs() >= rewound[n].abs()) for n, m in origin.masks.items()}
    params = {n: p * stays[n] if n in stays else p for n, p in rewound.items()}
    return replace(_valued(origin, params), frozen=True)


def _fresh(origin: Origin) -> State:
    some = next(iter(origin.rewound.params.values()))
    model = initialise(origin.factory, origin.draw("reinit"))
    fresh = state(model).to(some.device, some.dtype)
    if not any((fresh.params[n] != p).any() for n, p in origin.rewound.params.items()):
        raise Refused(
            "reinit must draw weights anew: the factory gave the ticket's own for another seed. Let it initialise its "
            "modules from PyTorch's global generator, and pass pretrained weights as start=."
        )
    stays = {n: origin.rewound.params[n] for n, p in model.named_parameters() if not p.requires_grad}
    return State({**fresh.params, **stays}, fresh.buffers)


def _valued(origin: Origin, params: Params) -> Start:
    return Start(State(params, origin.rewound.buffers), origin.masks, origin.order_seed)


@dataclass(frozen=True)
class Treatment:
    """A way to start, and what the rest of the project has to know of it."""

    start: Callable[[Origin], Start]
    redraws: bool = False
    """Whether it draws weights anew from the factory."""
    seed_fixed: bool = False
    """Whether the weights at the start, rewound to step 0, are a function of seeds alone."""
    alike: bool = False
    """Whether m * theta at the start is the ticket's too."""
    frozen: bool = False
    """Whether pruned weights keep their values, so that the network at the start is not m * theta."""


TREATMENTS: dict[str, Treatment] = {
    "ticket": Treatment(ticket, seed_fixed=True),
    "reinit": Treatment(reinit, redraws=True, seed_fixed=True),
    "random_mask": Treatment(random_mask, seed_fixed=True),
    "random_erk": Treatment(random_erk, seed_fixed=True),
    "layerwise_shuffle": Treatment(layerwise_shuffle, seed_fixed=True),
    "dense_restart": Treatment(dense_restart, seed_fixed=True),
    "sibling": Treatment(sibling, alike=True),
    "lr_rewind": Treatment(lr_rewind),
    "fine_tune": Treatment(fine_tune),
    "reinit_keep_sign": Treatment(reinit_keep_sign, redraws=True, seed_fixed=True),
    "reshuffle": Treatment(reshuffle, seed_fixed=True),
    "reshuffle_keep_sign": Treatment(reshuffle_keep_sign, seed_fixed=True),
    "random_sign": Treatment(random_sign, seed_fixed=True),
    "signed_constant": Treatment(signed_constant, seed_fixed=True),
    "random_constant": Treatment(random_constant, seed_fixed=True),
    "frozen_init": Treatment(frozen_init, frozen=True),
    "frozen_unless_shrunk": Treatment(frozen_unless_shrunk, frozen=True),
}
