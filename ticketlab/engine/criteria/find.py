"""From a criterion's name to scores and masks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ticketlab import masks as mask_ops
from ticketlab.engine.criteria.evidence import Criterion, Evidence, Scores, refuse_batch_statistics
from ticketlab.engine.criteria.gradients import grasp, snip, synflow
from ticketlab.engine.criteria.second_order import obd_exact, obd_fisher, obd_gauss_newton, refuse_above_limit
from ticketlab.engine.criteria.weights import BY_SIGN, ZHOU, magnitude, random
from ticketlab.errors import Refused, nearest
from ticketlab.functional import transformable
from ticketlab.state import Masks

CRITERIA: dict[str, Criterion] = {
    "magnitude": magnitude,
    "random": random,
    "obd_exact": obd_exact,
    "obd_gauss_newton": obd_gauss_newton,
    "obd_fisher": obd_fisher,
    "snip": snip,
    "grasp": grasp,
    "synflow": synflow,
    **ZHOU,
    **BY_SIGN,
}
ROUNDS = {"synflow": 100}
"""Rounds that a criterion is defined with; 1 for all others."""


def score(criterion: str, evidence: Evidence) -> Scores:
    """The scores of a criterion, higher = keep.

    Raises:
        Refused: An unknown name, a criterion that needs inputs or labels and got none or some that do not fit, or
            scores that are not finite or all zero.
    """
    if criterion not in CRITERIA:
        raise Refused(nearest("criterion", criterion, tuple(CRITERIA)))
    with transformable():
        scores = CRITERIA[criterion](evidence)
    _refuse_not_finite(f"criterion {criterion!r}", evidence.masks, scores)
    _refuse_all_zero(evidence.masks, scores)
    return scores


def find(
    criterion: str, evidence: Evidence, density: float | Mapping[str, float], *, rounds: int | None = None
) -> Masks:
    r"""Prune one network to a density by a criterion, in one shot or in rounds with scores taken anew.

    After round i of n the density is, with d_0 that of ``evidence.masks``,

    .. math:: d_i = d_0 (d / d_0)^{i / n}

    as in Tanaka et al. (2020). Weights stay as they are between rounds; weights that are pruned stay pruned.

    Args:
        criterion: A name in ``CRITERIA``.
        evidence: At the states that the scores are to be taken at.
        density: Of the whole network, kept / prunable, with one threshold for all layers; or of each layer by name.
            The count kept is the nearest to density * prunable, halves up.
        rounds: At least 1; None: 100 for SynFlow, 1 for the others.

    Returns:
        Masks nested in ``evidence.masks``.

    Raises:
        Refused: As `score`; a density out of range, or one that leaves a layer without a live weight; scores that
            are zero all over a layer that is to be pruned by itself.
    """
    rounds = ROUNDS.get(criterion, 1) if rounds is None else rounds
    if rounds < 1:
        raise Refused(f"rounds must be at least 1: got {rounds}.")
    scope: mask_ops.Scope = "layer" if isinstance(density, Mapping) else "global"
    masks, goal = evidence.masks, _counts(evidence.masks, density)
    alive = {names: _alive(masks, names) for names in goal}
    for i in range(1, rounds + 1):
        counts = {names: round(alive[names] * (n / alive[names]) ** (i / rounds)) for names, n in goal.items()}
        masks = _keep(masks, score(criterion, replace(evidence, masks=masks, scope=scope)), counts)
    return masks


def keep(masks: Masks, scores: Scores, density: float | Mapping[str, float]) -> Masks:
    """The best-scored weights at a density, in one shot; as `find`, with scores at hand."""
    _refuse_not_finite("a criterion", masks, scores)
    return _keep(masks, scores, _counts(masks, density))


def _counts(masks: Masks, density: float | Mapping[str, float]) -> dict[tuple[str, ...], int]:
    """How many weights the layers that compete keep together."""
    if isinstance(density, Mapping) and set(density) != set(masks):
        raise Refused(f"density must name every prunable layer: got {sorted(density)} for {sorted(masks)}.")
    shares = {(name,): density[name] for name in masks} if isinstance(density, Mapping) else {tuple(masks): density}
    counts = {}
    for names, share in shares.items():
        total, alive = sum(masks[name].numel() for name in names), _alive(masks, names)
        n = math.floor(share * total + 0.5) if 0 < share <= 1 else total + 1
        if n > alive:
            raise Refused(
                f"density must lie in (0, {alive / total:.6g}], as much as is alive of {', '.join(names)}: got {share}."
            )
        if n < len(names):
            raise mask_ops.EmptyLayerError(
                f"every layer must keep a live weight: density {share} leaves {n} of {total} for {', '.join(names)}. "
                "Raise it."
            )
        counts[names] = n
    return counts


def _alive(masks: Masks, names: tuple[str, ...]) -> int:
    return sum(int(masks[name].sum()) for name in names)


def _keep(masks: Masks, scores: Scores, counts: Mapping[tuple[str, ...], int]) -> Masks:
    """So many of the best of each group of layers."""
    new = dict(masks)
    for names, n in counts.items():
        alive = _alive(masks, names)
        if n < alive:
            _refuse_all_zero({m: masks[m] for m in names}, scores)
            new |= mask_ops.prune({m: masks[m] for m in names}, {m: scores[m] for m in names}, (alive - n) / alive)
    return new


class ZeroScoresError(Refused):
    """Scores that tell no weight from another: what went would be up to the index alone."""


def _refuse_not_finite(who: str, masks: Masks, scores: Scores) -> None:
    bad = {name: int((~scores[name][mask].isfinite()).sum()) for name, mask in masks.items()}
    if any(bad.values()):
        where = ", ".join(f"{n} in {name!r}" for name, n in bad.items() if n)
        raise Refused(f"{who} must give finite scores: {where} are not. Score in float64, or before weights diverge.")


def _refuse_all_zero(masks: Masks, scores: Scores) -> None:
    pruned_further = _alive(masks, tuple(masks)) > len(masks)  # where each layer has one left there is nothing to tell
    if pruned_further and not any(bool(scores[name][mask].any()) for name, mask in masks.items()):
        raise ZeroScoresError(
            f"some live weight must have a score that differs from 0: none has in {', '.join(masks)}. "
            "Prune less, let these layers compete with others, or take another criterion or state."
        )


def as_criterion(criterion):  # until records are there
    return next((n for n, f in CRITERIA.items() if f is criterion), criterion)


def find_counts(criterion, evidence: Evidence, goal: Mapping[tuple[str, ...], int]) -> Masks:
    rounds = ROUNDS.get(criterion, 1)
    masks, scope = evidence.masks, "global" if len(goal) == 1 else "layer"
    alive = {names: _alive(masks, names) for names in goal}
    for i in range(1, rounds + 1):
        counts = {names: round(alive[names] * (n / alive[names]) ** (i / rounds)) for names, n in goal.items()}
        masks = mask_ops.keep(masks, score(criterion, replace(evidence, masks=masks, scope=scope)), counts)
    return masks


def refuse_too_large(criterion: str, model: nn.Module, names=()) -> None:
    """Raise where a criterion would take too long on this model or cannot score it, before anything is trained."""
    if criterion == "obd_exact":
        refuse_above_limit(mask_ops.total(mask_ops.ones(model)))
    if forward_passes(criterion, 1, 1, 1):  # it looks at outputs
        refuse_batch_statistics(criterion, model)


def forward_passes(criterion: str, n_examples: int, n_classes: int, n_weights: int, rounds: int | None = None) -> int:
    """What scoring costs, in forward passes of one example; a backward pass counts as two of them.

    Criteria of the weights alone cost nothing. Gauss-Newton goes backward once a class; a Hessian-vector product
    counts as two gradients.
    """
    a_round = {
        "snip": 3 * n_examples,
        "obd_fisher": 3 * n_examples,
        "grasp": (3 + 6) * n_examples,
        "obd_gauss_newton": (1 + 2 * n_classes) * n_examples,
        "obd_exact": 6 * n_weights * n_examples,
        "synflow": 3,
    }.get(criterion, 0)
    return a_round * (ROUNDS.get(criterion, 1) if rounds is None else rounds)
