"""Pruning criteria: a score for every prunable weight, higher = keep.

Each is a function of ``Evidence``: one network, where it came from, and examples where it needs any. ``CRITERIA`` has
the record of each: what it needs, where its authors take it, what it costs. ``score`` evaluates one and ``find``
prunes by it, in one shot or in rounds, whether at initialisation, early or after training is up to the states in the
evidence. In a study of levels, ``ImpConfig.criterion`` names one. One of your own is passed in place of a name: a
function of ``Evidence``, or a ``Criterion`` that says more of it.
"""

from __future__ import annotations

from ticketlab.engine.criteria.evidence import Criterion, Evidence, Scores, draw_examples
from ticketlab.engine.criteria.find import (
    CRITERIA,
    AnyCriterion,
    ZeroScoresError,
    as_criterion,
    find,
    find_counts,
    keep,
    own_scores,
    refuse_too_large,
    score,
)
from ticketlab.engine.criteria.weights import ZHOU

__all__ = [
    "CRITERIA",
    "ZHOU",
    "AnyCriterion",
    "Criterion",
    "Evidence",
    "Scores",
    "ZeroScoresError",
    "as_criterion",
    "draw_examples",
    "find",
    "find_counts",
    "keep",
    "own_scores",
    "refuse_too_large",
    "score",
]
