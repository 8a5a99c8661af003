"""Masks learned on frozen weights by the one training loop, and what they score."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from ticketlab import masks as mask_ops
from ticketlab.data import Split, Task
from ticketlab.engine.kept import train
from ticketlab.engine.recipe import Recipe
from ticketlab.engine.start import Start
from ticketlab.engine.supermask.module import Method, Supermask, rescaled
from ticketlab.engine.training import Outcome
from ticketlab.errors import Refused, check_count
from ticketlab.losses import CROSS_ENTROPY, Loss
from ticketlab.network import apply, evaluate, n_replicas
from ticketlab.probing import close
from ticketlab.seeds import stream
from ticketlab.shown import as_line, as_table
from ticketlab.state import Masks, Params, State

RECIPES: dict[Method, Recipe] = {
    "bernoulli": Recipe(optimizer="adam", learning_rate=0.1),
    "edge_popup": Recipe(optimizer="sgd", learning_rate=0.1, weight_decay=5e-4, schedule="cosine"),
}
"""Of the scores. Edge-popup's is its authors'. Zhou et al. take SGD at 100 for 440,000 steps: Adam needs fewer."""


@dataclass(frozen=True)
class Learned:
    """Masks learned on frozen weights. Tensors have the replica axis first; tables have a ``replica`` column."""

    method: Method
    masks: Masks = field(repr=False)
    """True = kept, as in evaluation."""
    scores: Params = field(repr=False)
    """Of every prunable weight: logits, or what edge-popup ranks by magnitude."""
    frozen: State = field(repr=False)
    """The network under the masks: weights as they were given, buffers as training left them."""
    rescaling: float
    """The power p of (size / kept)^p."""
    metrics: pd.DataFrame = field(repr=False)
    """One row per replica: kept, density, loss and error on every split."""
    curves: pd.DataFrame = field(repr=False)
    """replica, step, loss_nats, error on the validation set."""
    wall_seconds: float

    __repr__, _repr_html_ = as_line, as_table

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
    prunable: Sequence[str] | None = None,
    progress: bool | str = "learn masks",
    store: str | Path | None = None,
) -> Learned:
    """Learn R masks on R networks whose weights stay exactly as they are.

    Args:
        model: The architecture; its prunable weights are masked, other parameters are kept.
        frozen: Stacked weights and buffers, such as an initialisation or ``engine.values.signed_constants`` of it.
        task: Data on one device.
        recipe: Of the scores; see ``RECIPES``.
        order_seeds: R seeds of batch orders.
        method: ``bernoulli`` or ``edge_popup``.
        density: What edge-popup keeps of each layer; the probability that bernoulli begins with, whose deterministic
            mask therefore begins with every weight above 0.5 and with none at 0.5 or below.
        rescaling: The power p of (size / kept)^p; the method's own in ``RESCALING`` when None.
        draw_seeds: R seeds of first scores and of drawn masks; ``order_seeds`` when None (the streams are apart).
        prunable: Weights that are masked, by name, as in ``masks.prunable``; the model's own when None.
        progress: Show a progress bar where the output is a terminal; a string is its label.
        store: Where the training is kept, as of ``tl.train``; None: nowhere.

    Warns:
        RuntimeWarning: A deterministic mask that leaves a layer without a weight, and so outputs without a
            signal. Masks drawn from the same logits (``evaluations``) still have a meaning.

    Raises:
        Refused: An unknown method, a density outside (0, 1) or one that leaves a layer empty, weights that reach the
            outputs by another way than their module, or what ``train`` refuses.

    References:
        Zhou et al. 2019, "Deconstructing Lottery Tickets"; Ramanujan et al. 2020, "What's Hidden in a Randomly
        Weighted Neural Network?".
    """
    seeds = order_seeds if draw_seeds is None else draw_seeds
    module = Supermask(model, method, density, rescaling, prunable)
    _check(module, model, frozen, order_seeds, seeds)
    _check_reached(module, model, frozen.select(0), task.train.x[:2])
    begun = [module.begin(frozen.select(r), seed) for r, seed in enumerate(seeds)]
    starts = [Start(one, {}, order_seed) for one, order_seed in zip(begun, order_seeds, strict=True)]
    # One network after another, for draws come from a generator each.
    outcome = train(module, starts, task, recipe, execution="loop", progress=progress, store=store)
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
    module: Supermask, model: nn.Module, frozen: State, order_seeds: Sequence[int], draw_seeds: Sequence[int]
) -> None:
    replicas, density = n_replicas(model, frozen.params), module.density
    if not replicas == len(order_seeds) == len(draw_seeds):
        raise Refused(
            f"frozen must be stacked with one replica for each order seed and draw seed: got {replicas}, "
            f"{len(order_seeds)}, {len(draw_seeds)}. Use state.stack_states."
        )
    sizes = {name: score.numel() for name, score in zip(module.names, module.scores, strict=True)}
    empty = [name for name, size in sizes.items() if size - mask_ops.n_removed(size, 1 - density) < 1]
    if module.method == "edge_popup" and empty:
        raise Refused(f"density must leave every layer a weight: {density} leaves none in {empty}. Raise it.")


def _check_reached(module: Supermask, model: nn.Module, frozen: State, x: Tensor) -> None:
    """What a closure or a hook holds of the module is not masked: compare with the module at masked weights."""
    begun = module.begin(frozen, 0)
    scores = {}
    for i, name in enumerate(module.names):
        weight = frozen.params[name]
        scores[name] = torch.randn(weight.shape, generator=stream(f"check {i}", 0), dtype=weight.dtype).to(
            weight.device
        )
    masks = {name: module.kept(score).bool() for name, score in scores.items()}
    params = rescaled(frozen.params, masks, module.power)
    begun.params.update({f"scores.{i}": score for i, score in enumerate(scores.values())})
    expected = apply(model, State(params, frozen.buffers), x)
    if not close(apply(module, begun, x), expected):
        raise Refused(
            "a mask must reach all that is computed with a weight: this model's outputs depend on one that is read "
            "other than as its module's attribute, such as by a closure. Let the forward pass read module.weight."
        )


def _learned(module: Supermask, outcome: Outcome) -> Learned:
    scores = {name: outcome.end.params[f"scores.{i}"] for i, name in enumerate(module.names)}
    masks = {n: torch.stack([module.kept(one) for one in s]).bool() for n, s in scores.items()}
    parts = [{n.removeprefix("net."): t for n, t in part.items() if n.startswith("net.")} for part in outcome.end]
    frozen = State(parts[0] | {n: outcome.end.params[f"frozen.{i}"] for i, n in enumerate(module.names)}, parts[1])
    table = outcome.metrics.copy()
    table.insert(1, "kept", mask_ops.kept(masks, stacked=True).tolist())
    table.insert(2, "density", mask_ops.density(masks, stacked=True).tolist())
    return Learned(module.method, masks, scores, frozen, module.power, table, outcome.curves, outcome.wall_seconds)


def evaluations(
    model: nn.Module, learned: Learned, split: Split, *, draws: int = 10, seed: int = 0, loss: Loss = CROSS_ENTROPY
) -> pd.DataFrame:
    """Loss and error of learned masks in every way that they can be used.

    ``deterministic`` is the mask of ``learned.masks``. For bernoulli there are two more: ``sampled`` draws whole
    masks, as Zhou et al. report, and ``expected`` puts the probabilities themselves in the mask's place, one network
    in which every weight is scaled.

    Args:
        model: The architecture.
        learned: Masks of R replicas.
        split: What they are evaluated on.
        draws: Masks drawn per replica.
        seed: Seed of the draws.
        loss: Loss of the task.

    Returns:
        One row per replica, ``evaluation`` and ``draw``: density, loss_nats, error.

    Raises:
        Refused: Draws outside 1..10^5, which are held at once.
    """
    check_count("draws", draws, 1, 10**5)
    ways: list[tuple[str, int, Params]] = [("deterministic", 0, learned.masks)]
    if learned.method == "bernoulli":
        chances = {name: logits.sigmoid() for name, logits in learned.scores.items()}
        ways.append(("expected", 0, chances))
        ways += [("sampled", draw, _sample(chances, stream("mask sample", seed, draw))) for draw in range(draws)]
    rows = []
    for evaluation, draw, masks in ways:
        params = rescaled(learned.frozen.params, masks, learned.rescaling, stacked=True)
        nats, error = evaluate(model, State(params, learned.frozen.buffers), split.x, split.y, loss=loss)
        kept = torch.stack([mask.flatten(1).sum(1, dtype=torch.float64) for mask in masks.values()]).sum(0)
        found = {"density": kept / mask_ops.total(masks, stacked=True), "loss_nats": nats, "error": error}
        about = {"replica": range(len(nats)), "evaluation": evaluation, "draw": draw}
        rows.append(pd.DataFrame({**about, **{name: values.tolist() for name, values in found.items()}}))
    return pd.concat(rows, ignore_index=True)


def _sample(chances: Mapping[str, Tensor], generator: torch.Generator) -> Masks:
    return {n: torch.rand(p.shape, generator=generator, dtype=p.dtype).to(p.device) < p for n, p in chances.items()}
