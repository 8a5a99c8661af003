"""Iterative magnitude pruning: train, prune, rewind, level after level, with its controls in the same stack.

``levels(study, folder)`` is a generator of ``Level``: what is stored is yielded first, the rest is trained, stored
and yielded, so that a caller can stop, log, plot or resume at any level.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from ticketlab import graph
from ticketlab import masks as mask_ops
from ticketlab.engine import cost, ranks
from ticketlab.engine import store as runs
from ticketlab.engine.checkpoint import Checkpoints
from ticketlab.engine.criteria import Evidence, draw_examples, find_counts
from ticketlab.engine.level import Level
from ticketlab.engine.start import Start
from ticketlab.engine.training import train
from ticketlab.engine.treatments import Origin, own_start
from ticketlab.errors import Refused
from ticketlab.losses import LOSSES
from ticketlab.seeds import derived_seed
from ticketlab.state import Masks, State, stack_states, state

if TYPE_CHECKING:
    from ticketlab.engine.study import Study


def levels(study: Study, folder: Path | None) -> Iterator[Level]:
    """Level after level, from the folder as far as it goes, then from training."""
    dense: Level | None = None
    level: Level | None = None
    with ExitStack() as held:
        writes, refuse_lost = folder if ranks.rank() == 0 else None, None
        for number in range(study.config.levels + 1):
            stored = runs.n_stored(folder) if folder else 0
            if writes and number >= stored and refuse_lost is None:
                refuse_lost = held.enter_context(runs.writing(writes, study.description, study.environment))
                stored = runs.n_stored(writes)  # another process may have written in between
            stored = ranks.agreed(stored)
            half = (
                Checkpoints(runs.checkpoint_folder(folder, number), study.identity, study.seconds) if folder else None
            )
            if folder and number < stored:
                level = runs.read_level(folder, number, study.task.device)
                in_order = {name: level.masks[name] for name in study.names}
                level = replace(level, masks=in_order)  # a random mask of the next level counts in it
                if writes and half:
                    half.clear()  # of a process that was killed before it could
            else:
                if dense is None or level is None:
                    level = _dense(study, half)
                else:
                    level = _pruned(study, number, dense, level, half)
                if writes and half and refuse_lost:
                    refuse_lost()
                    runs.write_level(writes, level, study.identity, study.environment)
                    half.clear()
            level = replace(level, factory=study.factory)
            dense = dense or level
            yield level


def _dense(study: Study, half: Checkpoints | None) -> Level:
    """Level 0: the dense networks, their weights at step k as ``start``."""
    if study.dense is not None:
        return study.dense
    config, k = study.config, study.config.rewind_step
    starts, rows = [], []
    for init_seed, order_seed in zip(config.init_seeds, study.order_seeds, strict=True):
        rows.append({"treatment": "ticket", "init_seed": init_seed, "order_seed": order_seed})
        starts.append(Start(state(study.initialised(init_seed)), study.ones, order_seed))
    steps = sorted({0, k, *config.snapshot_steps})
    level = _train(study, 0, starts, rows, half, first_step=0, snapshot_steps=steps)
    return replace(level, start=level.snapshots[k].clone())


def _pruned(study: Study, number: int, dense: Level, previous: Level, half: Checkpoints | None) -> Level:
    """Level 1 and on: prune the tickets of the level before, rewind, train them beside their controls."""
    origins = [
        _origin(study, number, dense.select(treatment="ticket", init_seed=init), previous, init, order)
        for init, order in zip(study.config.init_seeds, study.order_seeds, strict=True)
    ]
    starts: list[Start] = []
    rows: list[dict[str, Any]] = []
    for name, treatment in study.treatments.items():
        begin = partial(own_start, name, treatment.start) if name in study.own["treatments"] else treatment.start
        for origin, lost in origins:
            start = _nowhere(origin) if lost else begin(origin)
            starts.append(start)
            rows.append({"treatment": name, "init_seed": origin.init_seed, "order_seed": start.order_seed})
    _refuse_cut(study, number, [origin.masks for origin, lost in origins if not lost])
    return _train(study, number, starts, rows, half, first_step=study.config.rewind_step)


def _origin(
    study: Study, number: int, first: Level, previous: Level, init_seed: int, order_seed: int
) -> tuple[Origin, bool]:
    """What treatments draw on, and whether the ticket's line has diverged: then nothing can follow from it."""
    config, recipe = study.config, study.config.recipe
    before = previous.select(treatment="ticket", init_seed=init_seed)
    lost = bool(before.metrics["diverged_step"].notna().iloc[0])
    origin = Origin(
        factory=study.factory,
        rewound=first.start,
        masks=_next_masks(study, before, init_seed, number, lost),
        init_seed=init_seed,
        order_seed=order_seed,
        level=number,
        trained=before.end,
        dense=first.end,
        last_learning_rate=recipe.learning_rate_at(recipe.steps - 1),
        retraining=config.retraining,
    )
    return origin, lost


def _nowhere(origin: Origin) -> Start:
    """The start of a line that has diverged: not a number, so that no table takes it for a result."""
    lost = {n: torch.full_like(p, math.nan) for n, p in origin.rewound.params.items()}
    return Start(State(lost, origin.rewound.buffers), origin.masks, origin.order_seed)


def _next_masks(study: Study, ticket: Level, init_seed: int, number: int, lost: bool) -> Masks:
    counts = mask_ops.counts_after(ticket.masks, study.rates)
    if lost:  # so many, by index: which, no scores can tell
        nothing = {n: torch.zeros_like(m, dtype=torch.float32) for n, m in ticket.masks.items()}
        return mask_ops.keep(ticket.masks, nothing, counts)
    seed, loss = derived_seed("criterion", init_seed, number), LOSSES[study.task.loss]
    x, y = draw_examples(study.task, study.config.score_examples, init_seed)
    start = ticket.start
    evidence = Evidence(study.model, ticket.masks, start, ticket.end, x, y, seed, study.config.scope, loss)
    return find_counts(study.criterion, evidence, counts)


def _refuse_cut(study: Study, number: int, masks: list[Masks]) -> None:
    """A layer may end empty as long as a live path is left from input to output; said once for each such level."""
    for one in masks:
        empty = [name for name, mask in one.items() if not mask.any()]
        if empty:
            live = graph.refuse_cut(study.model, one, study.task.train.x)
            warnings.warn(
                f"level {number} leaves {len(empty)} of {len(one)} layers without a live weight, {empty[:4]}: "
                f"{int(mask_ops.kept(live))} of {int(mask_ops.kept(one))} kept weights are still on a path from an "
                "input to an output.",
                RuntimeWarning,
                stacklevel=3,
            )
            return


def _train(
    study: Study,
    number: int,
    starts: list[Start],
    rows: list[dict[str, Any]],
    half: Checkpoints | None,
    *,
    first_step: int,
    snapshot_steps: list[int] | tuple[()] = (),
) -> Level:
    density = float(mask_ops.density(starts[0].masks))
    outcome = train(
        study.model,
        starts,
        study.task,
        study.config.recipe,
        first_step=first_step,
        snapshot_steps=snapshot_steps,
        execution=study.execution,
        checkpoints=half,
        progress=f"level {number}/{study.config.levels}, density {density:.3g}" if study.progress else False,
    )
    results = outcome.metrics.drop(columns="replica")
    table = pd.concat([pd.DataFrame(rows), _costs(study, starts, first_step), results], axis=1)
    table.insert(0, "replica", range(len(starts)))
    table.insert(1, "level", number)
    return Level(
        number,
        density,
        outcome.masks,
        stack_states([start.begun for start in starts]),
        outcome.end,
        table,
        outcome.curves,
        outcome.snapshots,
        outcome.wall_seconds,
        outcome.execution,
    )


def _costs(study: Study, starts: list[Start], first_step: int) -> pd.DataFrame:
    """What each replica keeps and what its training costs."""
    recipe = study.config.recipe
    steps = recipe.steps - first_step
    dense = cost.forward_macs(study.uses, {n: m.numel() for n, m in starts[0].masks.items()})
    rows = []
    for start in starts:
        used = {n: m | (start.begun.params[n] != 0) if start.frozen else m for n, m in start.masks.items()}
        live = cost.forward_macs(study.uses, {n: int(m.sum()) for n, m in used.items()})
        rows.append(
            {
                "density": float(mask_ops.density(start.masks)),
                "effective_density": _effective_density(study, start.masks),
                "kept": int(mask_ops.kept(start.masks)),
                "prunable": mask_ops.total(start.masks),
                "first_step": first_step,
                "steps": steps,
                "macs_dense": cost.training_macs(dense, recipe.batch_size, steps),
                "macs_live": cost.training_macs(live, recipe.batch_size, steps),
            }
        )
    return pd.DataFrame(rows)


def _effective_density(study: Study, masks: Masks) -> float:
    try:
        return float(mask_ops.density(graph.effective_masks(study.model, masks, study.task.train.x)))
    except Refused:  # a model that cannot run in float64
        return math.nan
