"""Scores from the weights alone: magnitude, noise, and the criteria of Zhou et al. (2019), table S1.

w_i is a weight at the start, w_f at the end; the largest scores are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ticketlab.engine.criteria.evidence import Criterion, Evidence, Scores
from ticketlab.seeds import stream


def random(evidence: Evidence) -> Scores:
    """Uniform noise: the control that every criterion has to beat."""
    return {
        name: torch.rand(mask.shape, dtype=torch.float64, generator=stream(f"random score {name}", evidence.seed)).to(
            mask.device
        )
        for name, mask in evidence.masks.items()
    }


def magnitude(evidence: Evidence) -> Scores:
    """|w_f| (Han et al. 2015; Frankle & Carbin 2019); large final of Zhou et al."""
    return {name: w.abs() for name, w in evidence.final.items()}


def small_final(evidence: Evidence) -> Scores:
    """-|w_f|."""
    return {name: -w.abs() for name, w in evidence.final.items()}


def large_init(evidence: Evidence) -> Scores:
    """|w_i|."""
    return {name: w.abs() for name, w in evidence.initial.items()}


def small_init(evidence: Evidence) -> Scores:
    """-|w_i|."""
    return {name: -w.abs() for name, w in evidence.initial.items()}


def large_init_large_final(evidence: Evidence) -> Scores:
    """Large at both ends: the weights above one percentile of |w_i| and the same of |w_f|.

    Zhou et al. find the percentile by bisection. Both ranks are above t exactly when the lesser of them is, so
    the lesser rank as a score keeps the same weights at every density.
    """
    return _lesser_rank(evidence, large_init(evidence), magnitude(evidence))


def small_init_small_final(evidence: Evidence) -> Scores:
    """Small at both ends: the weights below one percentile of |w_i| and the same of |w_f|."""
    return _lesser_rank(evidence, small_init(evidence), small_final(evidence))


def magnitude_increase(evidence: Evidence) -> Scores:
    """|w_f| - |w_i|."""
    initial = evidence.initial
    return {name: w.abs() - initial[name].abs() for name, w in evidence.final.items()}


def movement(evidence: Evidence) -> Scores:
    """|w_f - w_i|."""
    initial = evidence.initial
    return {name: (w - initial[name]).abs() for name, w in evidence.final.items()}


def _by_sign(criterion: Callable[[Evidence], Scores], ranked: bool, same: bool, evidence: Evidence) -> Scores:
    """The criterion's score where training kept the sign (or changed it), and 0 elsewhere.

    Zhou et al. do so with large final and magnitude increase; of the latter, weights of the group that shrank fall
    behind the other group. ``ranked`` counts places from 1 in place of scores: beside -|w|, zeros would come first.
    Where a density asks for more than the group has, zeros are kept by index, as all ties are: compare below that.
    """
    scores, initial, final = criterion(evidence), evidence.initial, evidence.final
    if ranked:
        scores = {name: rank + 1 for name, rank in _ranks(evidence, scores).items()}
    group = {name: (initial[name].sign() == final[name].sign()) == same for name in scores}
    return {name: torch.where(group[name], score, 0) for name, score in scores.items()}


def _lesser_rank(evidence: Evidence, one: Scores, other: Scores) -> Scores:
    others = _ranks(evidence, other)
    return {name: torch.minimum(rank, others[name]) for name, rank in _ranks(evidence, one).items()}


def _ranks(evidence: Evidence, scores: Scores) -> Scores:
    """How many live weights a weight stands above, in the network or in its layer; -1 where it is pruned.

    Of equal scores the lower index stands above, as ``masks.prune`` has it.
    """
    if evidence.scope == "layer":
        return {
            name: _rank(scores[name].flatten(), mask.flatten()).view_as(mask) for name, mask in evidence.masks.items()
        }
    flat = [torch.cat([part[name].flatten() for name in evidence.masks]) for part in (scores, evidence.masks)]
    parts = _rank(*flat).split([mask.numel() for mask in evidence.masks.values()])
    return {name: part.view_as(mask) for (name, mask), part in zip(evidence.masks.items(), parts, strict=True)}


def _rank(scores: Tensor, alive: Tensor) -> Tensor:
    live = alive.nonzero()[:, 0]
    order = torch.sort(scores[live], descending=True, stable=True).indices
    ranks = torch.full_like(scores, -1, dtype=torch.int64)
    ranks[live[order]] = torch.arange(len(live) - 1, -1, -1, device=scores.device)
    return ranks


ZHOU: dict[str, Criterion] = {
    "large_final": Criterion(magnitude),
    "small_final": Criterion(small_final),
    "large_init": Criterion(large_init, stage="init"),
    "small_init": Criterion(small_init, stage="init"),
    "large_init_large_final": Criterion(large_init_large_final),
    "small_init_small_final": Criterion(small_init_small_final),
    "magnitude_increase": Criterion(magnitude_increase),
    "movement": Criterion(movement),
}
WEIGHTS: dict[str, Criterion] = {
    "magnitude": Criterion(magnitude),
    "random": Criterion(random, stage="init"),
    **ZHOU,
    **{
        f"{name}_{group}_sign": Criterion(partial(_by_sign, criterion.score, name.startswith("small"), group == "same"))
        for name, criterion in ZHOU.items()
        for group in ("same", "different")
    },
}
