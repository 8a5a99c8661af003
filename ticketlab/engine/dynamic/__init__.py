"""Sparse training whose mask moves: RigL, SET, gradual magnitude pruning; and how a budget is spread over layers.

``DropGrow`` and ``Gradual`` say when a mask moves and where to, as pure functions of one layer's weights and
gradient; ``training.train(..., dynamics=...)`` applies them, one to a replica, so that several methods, and static
masks beside them, train in one stack. On an update step the mask moves *in place of* the gradient step, as in RigL,
whatever the method: methods differ in what they choose alone. Weights and optimizer state stay with the connections
that stay. All others are dead with weight, momentum and Adam moments zero, so a grown connection starts from zero in
each of them; Adam's step counter belongs to the whole tensor and runs on.
"""

from __future__ import annotations

from ticketlab.engine.dynamic.moves import DropGrow, Dynamics, Gradual, validate
from ticketlab.engine.dynamic.spread import Spread, layer_counts, sparse_masks

__all__ = ["DropGrow", "Dynamics", "Gradual", "Spread", "layer_counts", "sparse_masks", "validate"]
