"""What are weight and pruning in attention, and what does pretraining change? (Chen et al. 2020)

IMP prunes a transformer from random weights, and from the weights of one that was pretrained on another task, to which
its tickets then rewind. Where do they keep weights: which projections, which heads; do queries and keys keep the same?
Whose mask works on whose task? Embeddings, norms and the output layer stay dense.

Arms are stored runs, which the other analyses open: ``random`` and ``pretrained`` on the task of the study, ``source``
on the task of pretraining. Barriers between init seeds are measured as trained, and after the units of the MLPs, the
heads, and the units inside heads have been matched; inside a head these trade places in query and key alike, and in
value and output. Left out are the invertible maps of a head, Q to A Q and K to A^-T K, and V to B V behind which the
output takes B^-1, of which permutations are a few.

With no arguments a small ViT is pretrained on the digits 0 to 4 and fine-tuned on all ten, in a few minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

import ticketlab as tl
from analyses.command import (
    Places,
    StudyFlags,
    Tables,
    beside,
    chosen_levels,
    device_of,
    each_network,
    followed,
    joined,
    main,
    survivors,
)
from analyses.settings import setting
from figures.transformer_tickets import draw
from ticketlab import masks as mask_ops
from ticketlab import permutation
from ticketlab.connectivity import linear_path
from ticketlab.engine.dynamic.spread import drawn, spread_over
from ticketlab.engine.start import Start
from ticketlab.engine.transfer import carry
from ticketlab.printed import across
from ticketlab.seeds import derived_seed
from ticketlab.state import Masks, State, stack_states

STUDY = tl.ImpConfig(
    model="vit_tiny_d2_w32_h4_p4",
    levels=3,
    prune_fraction=0.6,
    prunable=("blocks.*",),
    treatments=("ticket", "sibling", "reinit", "layerwise_shuffle", "random_erk"),
    init_seeds=(0, 1),
    recipe=tl.Recipe(steps=200, learning_rate=2e-3, warmup_steps=20, schedule="cosine", eval_every=100),
)
CARRIED = ("ticket", "other_task", "layerwise_shuffle", "one_shot", "random_erk")
"""Masks on the pretrained weights: the task's own ticket's, that of the other task, that one shuffled in its layers,
one-shot magnitude of the pretrained weights, and Erdos-Renyi-Kernel, all with as many weights."""


@dataclass(frozen=True)
class Config(Places):
    """Tickets of a transformer from random and from pretrained weights: heads, projections, barriers, transfer."""

    pretrain_task: str | None = "digits:0-4"
    """Task of pretraining, TASK[:FIRST-LAST] or package.module:function; None: random weights alone."""
    pretrain_model: str | None = None
    """Model that is pretrained, of the same parameters but for the output layer; None: the study's."""
    pretrain_steps: int = 600
    """Steps of pretraining, with the recipe of the study."""
    pretrain_batch: int | None = None
    """Examples per batch of pretraining; None: the study's."""
    at_levels: tuple[int, ...] | None = None
    """Levels measured beyond errors and densities, and carried between tasks; None: the middle one and the last."""
    n_alphas: int = 11
    """Points per line, both ends included."""
    n_shown: int = 1000
    """Training and test examples that lines are evaluated on, at most."""
    n_kernel: int = 10
    """Training examples of the NTK and of the Jacobian."""
    store: Path = Path("runs")
    """Folder of run directories."""
    study: StudyFlags = field(default_factory=lambda: STUDY)


@dataclass(frozen=True)
class Arm:
    """An IMP study from one kind of weights, run as far as it goes."""

    name: str
    study: tl.Study
    levels: list[tl.Level]

    def ticket(self, level: int, seed: int) -> tl.Level:
        return self.levels[level].select(treatment="ticket", init_seed=seed)


def run(config: Config) -> Tables:
    """Raw rows per network, each with its ``arm``.

    ``networks``: as ``Level.metrics``; ``layers``: density of every pruned parameter; ``projections`` and ``heads``: of
    every head; ``overlap``: of query and key; ``barriers``: of the lines between tickets; ``measures``: NTK and
    Jacobian at the start; ``transfer``: networks trained under masks of either task on the pretrained weights.

    Raises:
        Refused: A network without attention, a pretraining task whose network has other parameters, and whatever a
            study refuses.
    """
    device = device_of(config)
    flags = replace(config.study, snapshot_steps=())
    study = tl.Study(flags, device=device)
    found = tl.attention.layers(study.model, study.task.train.x[:2])  # refused before anything is trained
    middle = max(1, flags.levels // 2)
    wanted = chosen_levels(config.at_levels, flags.levels, {middle, flags.levels}, first=1)
    source = None if config.pretrain_task is None else _pretraining(config, study)
    arms = [_run(config, "random", study)]
    if source is not None:
        print(f"run: {source.folder(config.store)}", flush=True)
        (level,) = followed(source.levels(config.store))
        weights = level.select(treatment="ticket", init_seed=source.config.init_seeds[0]).end
        start, alone = _received(study, weights), replace(flags, model=source.config.model, treatments=("ticket",))
        arms.append(_run(config, "pretrained", tl.Study(flags, device=device, start=start)))
        arms.append(_run(config, "source", tl.Study(alone, task=source.task, device=device, start=weights)))
    parts: dict[str, list[pd.DataFrame]] = {}
    for arm in arms:
        for name, table in _measured(config, arm, found, wanted):
            parts.setdefault(name, []).append(table.assign(arm=arm.name))
    if source is not None:
        parts["transfer"] = [
            table for pair in ((arms[1], arms[2]), (arms[2], arms[1])) for table in _transfer(*pair, wanted, config.out)
        ]
    about = {"task": config.study.task, "model": config.study.model, "source": config.pretrain_task or "none"}
    return {name: joined(tables).assign(**about) for name, tables in parts.items()}


def _pretraining(config: Config, study: tl.Study) -> tl.Study:
    """The study whose one dense network is pretrained: level 0 of a stored run."""
    flags, word = study.config, str(config.pretrain_task)
    if word.rpartition(":")[2].isidentifier() and ":" in word:  # package.module:function
        task = tl.load_task(word, device=study.task.device, dtype=getattr(torch, flags.dtype))
    else:
        task = setting(word, flags, resize=None, grey=False, device=study.task.device).task
    recipe = replace(
        flags.recipe,
        steps=config.pretrain_steps,
        batch_size=config.pretrain_batch or flags.recipe.batch_size,
        eval_every=max(1, config.pretrain_steps // 4),
    )
    alone = replace(
        flags,
        model=config.pretrain_model or config.study.model,
        levels=0,
        init_seeds=flags.init_seeds[:1],
        order_seeds=None,
        treatments=("ticket",),
        rewind_step=0,
        recipe=recipe,
    )
    source = tl.Study(alone, task=task, device=study.task.device)
    _received(study, tl.state(source.model))  # what does not fit is refused before hours are spent
    return source


def _received(study: tl.Study, weights: State) -> State:
    """The pretrained weights in the study's network, whose output layer is fresh where it has other outputs."""
    some = next(iter(weights.params.values()))
    fresh = tl.state(study.model).to(some.device, some.dtype)
    everything = {name: torch.ones_like(weights.params[name], dtype=torch.bool) for name in study.names}
    return carry(study.model, fresh, everything, 0, weights=weights).begun


def _run(config: Config, name: str, study: tl.Study) -> Arm:
    print(f"run: {study.folder(config.store)}", flush=True)
    return Arm(name, study, list(followed(study.levels(config.store))))


def _measured(
    config: Config, arm: Arm, found: tuple[tl.attention.Layer, ...], wanted: set[int]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """The tables of an arm, level after level, each with its name."""
    task = arm.study.task
    shown = task.limit(train=min(config.n_shown, len(task.train)), test=min(config.n_shown, len(task.test)))
    for level in arm.levels:
        yield "networks", level.metrics.drop(columns="replica").assign(level_density=level.density)
        for about, one in each_network(level):
            whole = {n: float(m.double().mean()) for n, m in one.masks.items()}
            yield "layers", pd.DataFrame({"layer": whole.keys(), "layer_density": whole.values()}).assign(**about)
            if set(one.masks) & {layer.query.parameter for layer in found}:
                yield "projections", _beside(about, tl.attention.densities(found, one.masks))
                yield "heads", _beside(about, tl.attention.heads(found, one.masks))
                if about["treatment"] == "ticket" and level.level:
                    yield "overlap", _beside(about, tl.attention.query_key_overlap(found, one.masks))
        if level.level in wanted or level.level == 0:
            yield from (("barriers", table) for table in _barriers(arm, level, shown, config.n_alphas))
            if arm.name != "source":
                yield "measures", _measures(arm, level, config.n_kernel)


def _beside(about: Mapping[str, Any], table: pd.DataFrame) -> pd.DataFrame:
    """Rows of a head behind what is known of its network, whose density has another name."""
    names = {k: v for k, v in about.items() if k not in ("density", "test_error")}
    return pd.DataFrame({**{k: [v] * len(table) for k, v in names.items()}, **table.to_dict("list")})


def _barriers(arm: Arm, level: tl.Level, shown: tl.Task, n_alphas: int) -> Iterator[pd.DataFrame]:
    """Lines between a ticket's children in two batch orders, and between init seeds: as trained, and matched."""
    model, x = arm.study.model, arm.study.task.train.x[:20]
    tickets = {seed: arm.ticket(level.level, seed).end for seed in survivors(level)}
    second = {seed: level.select(treatment="sibling", init_seed=seed).end for seed in survivors(level, "sibling")}
    pairs = {"siblings": [(seed, tickets[seed], second[seed]) for seed in tickets if seed in second]}
    seeds = list(tickets)
    if arm.name == "random" and len(seeds) > 1:
        n = len(seeds) if len(seeds) > 2 else 1  # of two seeds there is one pair
        next_to = [(seed, tickets[seed], tickets[seeds[(r + 1) % len(seeds)]]) for r, seed in enumerate(seeds[:n])]
        pairs["init seeds"] = next_to
        pairs["init seeds, matched"] = [(seed, a, _matched(model, x, a, b)) for seed, a, b in next_to]
    for question, each in pairs.items():
        if each:
            a, b = stack_states([a for _, a, _ in each]), stack_states([b for _, _, b in each])
            path = linear_path(model, a, b, shown, n_alphas=n_alphas)
            yield pd.DataFrame(
                {
                    "question": question,
                    "level": level.level,
                    "level_density": level.density,
                    "init_seed": [seed for seed, _, _ in each],
                    "test_barrier_error": path.barrier("error", "test", "mean"),
                    "train_barrier_loss_nats": path.barrier("loss_nats", "train", "mean"),
                }
            )


def _matched(model: nn.Module, x: torch.Tensor, a: State, b: State) -> State:
    aligned = permutation.align(model, x, a.params, b.params, buffers_b=b.buffers)
    return State(aligned.params, aligned.buffers)


def _measures(arm: Arm, level: tl.Level, n: int) -> pd.DataFrame:
    """Restricted NTK and input-output Jacobian of every network at its start; of tokens, from their embeddings."""
    model = arm.study.model
    data = arm.study.task.limit(train=n).to(dtype=torch.float64).train
    embeddings = (name for name, module in model.named_modules() if isinstance(module, nn.Embedding))
    tokens = None if data.x.is_floating_point() else next(embeddings, None)
    rows = []
    for about, one in tqdm(list(each_network(level)), desc=f"measures, {arm.name}, level {level.level}", disable=None):
        at = beside(one.start, data.x)
        kernel = tl.ntk.kernel(model, at, data.x, masks=one.masks)
        spectrum = tl.ntk.spectrum(kernel)
        values = tl.signal.jacobian_singular_values(model, at, data.x, masks=one.masks, source=tokens)
        rows.append(
            about
            | {
                "ntk_trace": float(spectrum.trace),
                "ntk_effective_rank": float(spectrum.effective_rank),
                "ntk_target_alignment": float(tl.ntk.target_alignment(kernel, data.y)),
                "jacobian_mean_squared": float(values.square().mean()),
            }
        )
    return pd.DataFrame(rows)


def _transfer(arm: Arm, other: Arm, wanted: set[int], store: Path) -> Iterator[pd.DataFrame]:
    """Masks of either task on the pretrained weights, trained on the task of ``arm``: one stack per level."""
    study, k = arm.study, arm.study.config.rewind_step
    for level in sorted(wanted):
        rows, starts = [], []
        for seed, order in zip(study.config.init_seeds, study.order_seeds, strict=True):
            if all(seed in survivors(one.levels[level]) for one in (arm, other)):
                begun = arm.ticket(0, seed).start
                carried = carry(study.model, begun, other.ticket(level, seed).masks, order).masks
                for name, masks in _masks(begun, arm.ticket(level, seed).masks, carried, seed, level).items():
                    about = {"target": study.config.task, "level": level, "mask": name, "init_seed": seed}
                    rows.append(about | {"density": float(mask_ops.density(masks)), "kept": int(mask_ops.kept(masks))})
                    starts.append(Start(begun, masks, order))
        if rows:
            label = f"masks on {study.config.task}, level {level}"
            how: dict[str, Any] = {"first_step": k, "progress": label, "store": store}
            outcome = tl.train(study.model, starts, study.task, study.config.recipe, **how)
            errors = outcome.metrics[["test_error", "test_loss_nats", "diverged_step"]]
            yield pd.concat([pd.DataFrame(rows), errors], axis=1)


def _masks(begun: State, own: Masks, carried: Masks, seed: int, level: int) -> dict[str, Masks]:
    """The masks of ``CARRIED`` by name."""
    kept, shapes = int(mask_ops.kept(own)), {n: m.shape for n, m in own.items()}
    sizes = {n: begun.params[n].abs() for n in own}
    everything = {n: torch.ones_like(m) for n, m in own.items()}
    masks = (
        own,
        carried,
        mask_ops.layerwise_shuffle(carried, derived_seed("carried mask, shuffled", seed, level)),
        mask_ops.keep(everything, sizes, {tuple(own): kept}),
        drawn(own, spread_over(shapes, kept), derived_seed("ERK beside carried masks", seed, level)),
    )
    return dict(zip(CARRIED, masks, strict=True))


def summary(tables: Tables) -> pd.DataFrame:
    """Test error in percent per arm and level, mean ± sd over n, and the shares of tickets' dead and blind heads."""
    networks = tables["networks"].assign(density=tables["networks"]["level_density"])
    errors = across(networks, ["arm", "level", "density"], "treatment", "test_error")
    tickets = tables["heads"].query("treatment == 'ticket'").groupby(["arm", "level"])
    lost = 100 * tickets[["dead", "blind"]].mean().add_suffix("_heads_%")
    return errors.join(lost)


if __name__ == "__main__":
    sys.exit(main("transformer_tickets", Config, run, draw, summary))
