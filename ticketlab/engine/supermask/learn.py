"""Masks learned on frozen weights by the one training loop, and what they score."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import pandas as pd
import torch
from torch import Tensor, nn

from ticketlab import masks as mask_ops
from ticketlab.data import Split, Task
from ticketlab.engine.recipe import Recipe
from ticketlab.engine.supermask.module import RESCALING, Method, Supermask, rescaled
from ticketlab.engine.training import Outcome, train
from ticketlab.errors import Refused, nearest
from ticketlab.functional import evaluate, n_replicas
from ticketlab.seeds import stream
from ticketlab.state import Masks, Params, State, stack_states

RECIPES: dict[Method, Recipe] = {
    "bernoulli": Recipe(optimizer="adam", learning_rate=0.1),
    "edge_popup": Recipe(optimizer="sgd", learning_rate=0.1, weight_decay=5e-4, schedule="cosine"),
}
"""Of the scores. Edge-popup's is its authors'. Zhou et al. take SGD at 100 for 440,000 steps: Adam needs fewer."""


@dataclass(frozen=True)
class Learned:
    """Masks learned on frozen weights. Tensors have the replica axis first; tables have a ``replica`` column."""

    method: Method
    masks: Masks
    """True = kept, as in evaluation."""
    scores: Params
    """Of every prunable weight: logits, or what edge-popup ranks by magnitude."""
    frozen: State
    """The network under the masks: weights as they were given, buffers as training left them."""
    rescaling: float
    """The power p of (size / kept)^p."""
    metrics: pd.DataFrame
    """One row a replica: kept, density, loss and error on every split."""
    curves: pd.DataFrame
    """replica, step, loss_nats, error on the validation set."""
    wall_seconds: float

    @property
    def params(self) -> Params:
        """What the masked network computes with, rescaling included: for ``tl.evaluate`` and the measures."""
        return rescaled(self.frozen.params, self.masks, self.rescaling, stacked=True)


def learn_masks(
    model: nn.Module,
    frozen: State,
    task: Task,
    recipe: Recipe,
    order_seeds: Sequence[int],
    *,
    method: Method = "bernoulli",
    density: float = 0.5,
    rescaling: float | None = None,
    draw_seeds: Sequence[int] | None = None,
    description: str = "learn masks",
    progress: bool = True,
) -> Learned:
    """Learn R masks on R networks whose weights stay exactly as they are.

    Args:
        model: The architecture; all its prunable weights are masked, other parameters are kept.
        frozen: Stacked weights and buffers, such as an initialisation or ``engine.values.signed_constants`` of it.
        task: Data on one device.
        recipe: Of the scores; see ``RECIPES``.
        order_seeds: R seeds of batch orders.
        method: ``bernoulli`` or ``edge_popup``.
        density: What edge-popup keeps of each layer; the probability that bernoulli begins with, whose deterministic
            mask therefore begins with every weight above 0.5 and with none at 0.5 or below.
        rescaling: The power p of (size / kept)^p; the method's own in ``RESCALING`` when None.
        draw_seeds: R seeds of first scores and of drawn masks; ``order_seeds`` when None (the streams are apart).
        description: Label of the progress bar.
        progress: Show a progress bar where the output is a terminal.

    Warns:
        RuntimeWarning: A deterministic mask that leaves a layer without a weight, and so outputs without a
            signal. Masks drawn from the same logits (``evaluations``) still have a meaning.

    Raises:
        Refused: An unknown method, a density outside (0, 1) or one that leaves a layer empty, or what ``train``
            refuses.

    References:
        Zhou et al. 2019, "Deconstructing Lottery Tickets"; Ramanujan et al. 2020, "What's Hidden in a Randomly
        Weighted Neural Network?".
    """
    seeds = order_seeds if draw_seeds is None else draw_seeds
    _check(model, frozen, method, density, order_seeds, seeds)
    module = Supermask(model, method, density, RESCALING[method] if rescaling is None else rescaling)
    begun = stack_states([module.begin(frozen.select(r), seed) for r, seed in enumerate(seeds)])
    # One network after another: draws come from a generator each, and NumPy ranks scores fastest.
    outcome = train(
        module, begun, {}, task, recipe, order_seeds, execution="loop", description=description, progress=progress
    )
    found = _learned(module, outcome)
    empty = {n: (~mask.flatten(1).any(1)).nonzero()[:, 0].tolist() for n, mask in found.masks.items()}
    if any(empty.values()):
        where = ", ".join(f"{name!r} in replicas {replicas}" for name, replicas in empty.items() if replicas)
        warnings.warn(
            f"a learned mask keeps no weight of {where}: no probability came above 0.5, so that the deterministic "
            "network is constant there. Look at sampled masks, begin with a higher density or train longer.",
            RuntimeWarning,
            stacklevel=2,
        )
    return found


def _check(
    model: nn.Module, frozen: State, method: str, density: float, order_seeds: Sequence[int], draw_seeds: Sequence[int]
) -> None:
    if method not in get_args(Method):
        raise Refused(nearest("method", method, get_args(Method)))
    if not 0 < density < 1:
        raise Refused(f"density must lie in (0, 1): got {density}.")
    if not n_replicas(model, frozen.params) == len(order_seeds) == len(draw_seeds):
        raise Refused(
            f"frozen must be stacked with one replica for each order seed and draw seed: got "
            f"{n_replicas(model, frozen.params)}, {len(order_seeds)}, {len(draw_seeds)}. Use functional.stack_states."
        )
    sizes = {name: mask.numel() for name, mask in mask_ops.ones(model).items()}
    empty = [name for name, size in sizes.items() if size - mask_ops.n_removed(size, 1 - density) < 1]
    if method == "edge_popup" and empty:
        raise Refused(f"density must leave every layer a weight: {density} leaves none in {empty}. Raise it.")


def _learned(module: Supermask, outcome: Outcome) -> Learned:
    scores = {name: outcome.end.params[f"scores.{i}"] for i, name in enumerate(module.names)}
    masks = {n: torch.stack([module._kept(one) for one in s]).bool() for n, s in scores.items()}
    parts = [{n.removeprefix("net."): t for n, t in part.items() if n.startswith("net.")} for part in outcome.end]
    table = outcome.metrics.copy()
    table.insert(1, "kept", mask_ops.kept(masks, stacked=True).tolist())
    table.insert(2, "density", mask_ops.density(masks, stacked=True).tolist())
    return Learned(
        module.method, masks, scores, State(*parts), module.power, table, outcome.curves, outcome.wall_seconds
    )


def evaluations(model: nn.Module, learned: Learned, split: Split, *, draws: int = 10, seed: int = 0) -> pd.DataFrame:
    """Loss and error of learned masks in every way that they can be used.

    ``deterministic`` is the mask of ``learned.masks``. For bernoulli there are two more: ``sampled`` draws whole
    masks, as Zhou et al. report, and ``expected`` puts the probabilities themselves in the mask's place, one network
    in which every weight is scaled.

    Args:
        model: The architecture.
        learned: Masks of R replicas.
        split: What they are evaluated on.
        draws: Masks drawn a replica.
        seed: Of the draws.

    Returns:
        One row a replica, ``evaluation`` and ``draw``: density, loss_nats, error.
    """
    ways: list[tuple[str, int, Params]] = [("deterministic", 0, learned.masks)]
    if learned.method == "bernoulli":
        chances = {name: logits.sigmoid() for name, logits in learned.scores.items()}
        ways.append(("expected", 0, chances))
        ways += [("sampled", draw, _sample(chances, stream("mask sample", seed, draw))) for draw in range(draws)]
    rows = []
    for evaluation, draw, masks in ways:
        params = rescaled(learned.frozen.params, masks, learned.rescaling, stacked=True)
        loss, error = evaluate(model, params, split.x, split.y, buffers=learned.frozen.buffers)
        kept = torch.stack([mask.flatten(1).sum(1, dtype=torch.float64) for mask in masks.values()]).sum(0)
        found = {"density": kept / mask_ops.total(masks, stacked=True), "loss_nats": loss, "error": error}
        about = {"replica": range(len(loss)), "evaluation": evaluation, "draw": draw}
        rows.append(pd.DataFrame({**about, **{name: values.tolist() for name, values in found.items()}}))
    return pd.concat(rows, ignore_index=True)


def _sample(chances: Mapping[str, Tensor], generator: torch.Generator) -> Masks:
    return {n: torch.rand(p.shape, generator=generator, dtype=p.dtype).to(p.device) < p for n, p in chances.items()}
