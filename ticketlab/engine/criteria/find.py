"""From a criterion to scores and masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ticketlab import masks as mask_ops
from ticketlab.engine.criteria.evidence import Criterion, Evidence, Scores
from ticketlab.engine.criteria.gradients import GRADIENTS
from ticketlab.engine.criteria.second_order import CURVATURE
from ticketlab.engine.criteria.weights import WEIGHTS
from ticketlab.errors import Refused, nearest
from ticketlab.probing import watching_generators
from ticketlab.state import Masks, check_finite

AnyCriterion = str | Criterion | Callable[[Evidence], Scores]
"""A name in ``CRITERIA``, a record of your own, or a function that scores evidence."""

CRITERIA: dict[str, Criterion] = {**WEIGHTS, **CURVATURE, **GRADIENTS}


def as_criterion(criterion: AnyCriterion) -> Criterion:
    """The record of a criterion; of a bare function one that knows no more than how it scores.

    Raises:
        Refused: An unknown name, or nothing that scores.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str):
        if criterion not in CRITERIA:
            raise Refused(nearest("criterion", criterion, tuple(CRITERIA)))
        return CRITERIA[criterion]
    if not callable(criterion):
        raise Refused(
            f"a criterion must be a name, a Criterion, or a function of Evidence: got {type(criterion).__name__}."
        )
    return Criterion(criterion)


def _name(criterion: AnyCriterion) -> str:
    known = [name for name, record in CRITERIA.items() if criterion == name or criterion is record]
    function = criterion.score if isinstance(criterion, Criterion) else criterion
    return known[0] if known else getattr(function, "__name__", type(function).__name__)


def score(criterion: AnyCriterion, evidence: Evidence) -> Scores:
    """The scores of a criterion, higher = keep.

    Args:
        criterion: A name in ``CRITERIA``, or a criterion of your own.
        evidence: At the states that the scores are to be taken at.

    Raises:
        Refused: An unknown name; inputs or labels that are needed and missing, or do not fit; more live weights than
            the criterion's limit; scores of other names, shapes or dtypes than the masks', not finite, or all zero.
    """
    name, record = _name(criterion), as_criterion(criterion)
    _refuse_above_limit(name, record, mask_ops.n_alive(evidence.masks, tuple(evidence.masks)))
    try:
        unmasked = {n: p for n, p in evidence.end.params.items() if n not in evidence.masks}
        check_finite("parameters", unmasked)  # those with a mask show in their scores
        scores = record.score(evidence) if record in CRITERIA.values() else own_scores(record.score, evidence)
        mask_ops.check_scores(evidence.masks, scores)
        unknown = sorted(set(scores) - set(evidence.masks))
        if unknown:
            raise Refused(f"scores must be of masked weights alone: got {unknown} too, which no mask names.")
    except Refused as error:
        raise Refused(f"criterion {name!r}: {error}") from error
    scores = {n: scores[n].detach() for n in evidence.masks}
    _refuse_all_zero(evidence.masks, scores)
    return scores


def own_scores(function: Callable[[Evidence], Scores], evidence: Evidence) -> Scores:
    """What a user's own criterion gives. It gets copies, for it may write into what it is given.

    Raises:
        Refused: It draws from a global generator.
    """
    with watching_generators(next(iter(evidence.masks.values())).device) as drawn:
        scores = function(evidence.copied())
    if drawn():
        raise Refused(
            "it must not draw from a global generator, which no run can repeat. Draw from "
            "torch.Generator().manual_seed(evidence.seed)."
        )
    return scores


def find(
    criterion: AnyCriterion, evidence: Evidence, density: float | Mapping[str, float], *, rounds: int | None = None
) -> Masks:
    """Prune one network to a density by a criterion, in one shot or in rounds with scores taken anew.

    Args:
        criterion: A name in ``CRITERIA``, or a criterion of your own.
        evidence: At the states that the scores are to be taken at.
        density: Of the whole network, kept / prunable, with one threshold for all layers; or of each layer by name.
            The count kept is the nearest to density * prunable, halves up.
        rounds: At least 1; the criterion's own number when None: 100 for SynFlow, 1 for the others.

    Returns:
        Masks nested in ``evidence.masks``; a layer may end empty.

    Raises:
        Refused: As `score`; a density out of range, or scores that are zero all over what is to be pruned.
    """
    return find_counts(criterion, evidence, mask_ops.counts_at(evidence.masks, density), rounds=rounds)


def find_counts(
    criterion: AnyCriterion, evidence: Evidence, counts: mask_ops.Groups, *, rounds: int | None = None
) -> Masks:
    r"""Prune one network to exact counts, such as those of ``masks.counts_after``; otherwise as `find`.

    After round i of n a group of layers keeps, of a_0 weights alive and a to be left,

    .. math:: a_i = a_0 (a / a_0)^{i / n}

    to the nearest, as in Tanaka et al. (2020). Weights stay as they are; what is pruned stays pruned.
    """
    rounds = as_criterion(criterion).rounds if rounds is None else rounds
    if rounds < 1:
        raise Refused(f"rounds must be at least 1: got {rounds}.")
    masks, scope = evidence.masks, "global" if len(counts) == 1 else "layer"
    alive = {names: mask_ops.n_alive(masks, names) for names in counts}
    for i in range(1, rounds + 1):
        left = {names: round(n and alive[names] * (n / alive[names]) ** (i / rounds)) for names, n in counts.items()}
        at = replace(evidence, masks=masks, scope=scope)  # type: ignore[arg-type]
        masks = _keep(masks, score(criterion, at), left)
    return masks


def keep(masks: Masks, scores: Scores, density: float | Mapping[str, float]) -> Masks:
    """The best-scored weights at a density, in one shot; as `find`, with scores at hand."""
    return _keep(masks, scores, mask_ops.counts_at(masks, density))


def _keep(masks: Masks, scores: Scores, counts: mask_ops.Groups) -> Masks:
    mask_ops.check_scores(masks, scores)
    for names, n in counts.items():
        if n < mask_ops.n_alive(masks, names):
            _refuse_all_zero({m: masks[m] for m in names}, scores)
    return mask_ops.keep(masks, scores, counts)


class ZeroScoresError(Refused):
    """Scores that tell no weight from another: what went would be up to the index alone."""


def _refuse_all_zero(masks: Masks, scores: Mapping[str, Tensor]) -> None:
    some = any(bool(scores[name][mask].any()) for name, mask in masks.items())
    if not some and mask_ops.n_alive(masks, tuple(masks)) > 1:
        raise ZeroScoresError(
            f"some live weight must have a score that differs from 0: none has in {', '.join(masks)}. "
            "Prune less, let these layers compete with others, or take another criterion or state."
        )


def refuse_too_large(criterion: AnyCriterion, model: nn.Module, prunable: Sequence[str] | None = None) -> None:
    """Raise where a criterion would take too long on this model, before anything is trained."""
    size = mask_ops.total(mask_ops.ones(model, prunable))
    _refuse_above_limit(_name(criterion), as_criterion(criterion), size)


def _refuse_above_limit(name: str, record: Criterion, live: int) -> None:
    if record.limit is not None and live > record.limit:
        raise Refused(
            f"criterion {name!r} needs at most {record.limit} live weights: got {live}. Take another: of curvature "
            "'obd_gauss_newton', the same as 'obd_exact' with ReLU, or 'obd_fisher'."
        )
