r"""Supermasks: networks whose weights are never trained, only which of them are kept.

A mask is learned through one score a weight. ``Supermask`` is the given network as a module whose trainable
parameters are those scores and whose weights are frozen, so that the one training loop trains it as any other:

- ``bernoulli`` (Zhou et al. 2019, section 5): scores are logits; a training step draws m ~ Bernoulli(sigmoid(s)) and
  the gradient goes straight through the draw, dL/ds = dL/dm sigmoid'(s). In evaluation m = [s > 0].
- ``edge_popup`` (Ramanujan et al. 2020, section 3): m keeps the largest |s| of each layer, a fixed number of them,
  and dL/ds = dL/dm sign(s).

The network computes with m w (size / kept)^p in each layer. p = 1 is the dynamic rescaling of Zhou et al.; p = 1/2
keeps the variance of the preactivations at every density, as edge-popup's scaled initialisation does.
"""

from __future__ import annotations

from ticketlab.engine.supermask.learn import RECIPES, Learned, evaluations, learn_masks
from ticketlab.engine.supermask.module import RESCALING, Method, Supermask, rescaled

__all__ = ["RECIPES", "RESCALING", "Learned", "Method", "Supermask", "evaluations", "learn_masks", "rescaled"]
