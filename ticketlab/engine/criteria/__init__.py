"""Pruning criteria: a score for every prunable weight, higher = keep.

Each is a function of ``Evidence``: one network, where it came from, and examples where it needs any. ``CRITERIA``
names them all; ``score`` evaluates one and ``find`` prunes by it, in one shot or in rounds, whether at
initialisation, early or after training is up to the states in the evidence. In a study of levels,
``ImpConfig.criterion`` names one.
"""

from __future__ import annotations

from ticketlab.engine.criteria.evidence import Criterion, Evidence, Scores, draw_examples
from ticketlab.engine.criteria.find import (
    CRITERIA,
    ROUNDS,
    ZeroScoresError,
    as_criterion,
    find,
    find_counts,
    forward_passes,
    keep,
    refuse_too_large,
    score,
)
from ticketlab.engine.criteria.weights import ZHOU

__all__ = [
    "CRITERIA",
    "ROUNDS",
    "ZHOU",
    "Criterion",
    "Evidence",
    "Scores",
    "ZeroScoresError",
    "draw_examples",
    "as_criterion",
    "find",
    "find_counts",
    "forward_passes",
    "keep",
    "refuse_too_large",
    "score",
]
