"""A training that is kept: done once, then read from where it was stored.

``store/trainings/<task>-<hash>`` is a run directory of one level. The hash is of all that decides a bit: the starts,
tensor by tensor, the recipe, the data, and what the module does on a few examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ticketlab import masks as mask_ops
from ticketlab.data import Task
from ticketlab.engine import ranks, training
from ticketlab.engine import store as runs
from ticketlab.engine.checkpoint import Checkpoints
from ticketlab.engine.identity import behaviour, optimizer_effect, schedule_effect
from ticketlab.engine.level import Level
from ticketlab.engine.recipe import Recipe, own_name
from ticketlab.engine.start import Start
from ticketlab.engine.training import Outcome
from ticketlab.engine.watch import OnEval
from ticketlab.errors import Refused
from ticketlab.network import Execution
from ticketlab.state import State


def train(
    model: nn.Module,
    starts: Sequence[Start],
    task: Task,
    recipe: Recipe,
    *,
    first_step: int = 0,
    snapshot_steps: Sequence[int] = (),
    execution: Execution = "auto",
    progress: bool | str = True,
    on_eval: OnEval | None = None,
    store: str | Path | None = None,
    checkpoint_minutes: float = 10.0,
) -> Outcome:
    """Train R replicas, as `training.train` does; with a ``store`` once, and then read what came of it.

    Args:
        model: The architecture; its own weights, buffers and mode are not used or changed.
        starts: One per replica, all with masks of the same names.
        task: Data on one device, and the loss.
        recipe: Optimizer, schedule, batch size, precision of a step; evaluation is in true float32.
        first_step: The rewind step k.
        snapshot_steps: Steps in [first_step, steps] at which the networks are kept.
        execution: How the stack is computed.
        progress: Show a progress bar where the output is a terminal; a string is its label.
        on_eval: Called with (step, rows) after each look at the validation set, a row per replica still alive.
        store: Folder in which trainings are kept, a folder for each; what is there may be deleted at any time. None:
            nothing is kept.
        checkpoint_minutes: Time after which a kept training leaves a checkpoint, from which a killed one goes on.

    Raises:
        Refused: As `training.train`; ``on_eval`` beside a store, which would hear nothing of what is read.
    """

    def trained(half: Checkpoints | None) -> Outcome:
        return training.train(
            model,
            starts,
            task,
            recipe,
            first_step=first_step,
            snapshot_steps=snapshot_steps,
            execution=execution,
            progress=progress,
            on_eval=on_eval,
            checkpoints=half,
        )

    if store is None:
        return trained(None)
    if on_eval is not None:
        raise Refused("on_eval hears nothing of a training that is read from a store: leave one of the two out.")
    description = _description(model, starts, task, recipe, first_step, snapshot_steps, execution)
    identity = runs.identity(description)
    folder = Path(store).expanduser() / "trainings" / f"{task.name}-{identity}"
    environment = {**runs.environment(task.device), "execution": execution}
    first = ranks.rank() == 0
    with runs.writing(folder, description, environment) if first else nullcontext(_nothing) as refuse_lost:
        half = Checkpoints(runs.checkpoint_folder(folder, 0), identity, 60 * checkpoint_minutes)
        if ranks.agreed(runs.n_stored(folder)):
            if first:
                half.clear()  # of a process that was killed before it could
            return _outcome(runs.read_level(folder, 0, task.device))
        outcome = trained(half)
        if first:
            refuse_lost()
            runs.write_level(folder, _level(outcome, starts), identity, environment)
            half.clear()
    return outcome


def _nothing() -> None:
    """Of processes that do not write."""


def _level(outcome: Outcome, starts: Sequence[Start]) -> Level:
    """As a level is stored, but for the starts, whose checksums are in the description."""
    density = float(mask_ops.density(starts[0].masks)) if starts[0].masks else 1.0
    metrics = outcome.metrics.assign(treatment="training")
    nothing = State({}, {})
    parts = (outcome.end, metrics, outcome.curves, outcome.snapshots, outcome.wall_seconds, outcome.execution)
    return Level(0, density, outcome.masks, nothing, *parts)


def _outcome(level: Level) -> Outcome:
    metrics = level.metrics.drop(columns="treatment")
    parts = (level.curves, level.wall_seconds, level.masks, level.execution)
    return Outcome(level.end, level.snapshots, metrics, *parts)


def _description(
    model: nn.Module,
    starts: Sequence[Start],
    task: Task,
    recipe: Recipe,
    first_step: int,
    snapshot_steps: Sequence[int],
    execution: Execution,
) -> dict[str, Any]:
    told: dict[str, Any] = asdict(recipe)
    if callable(recipe.optimizer):
        effect = optimizer_effect(recipe.optimizer, model)
        told["optimizer"] = {own_name(recipe.optimizer): runs.identity(effect)}
    if callable(recipe.schedule):
        told["schedule"] = {own_name(recipe.schedule): runs.identity(schedule_effect(recipe))}
    config = {
        "recipe": told,
        "first_step": first_step,
        "snapshot_steps": sorted(snapshot_steps),
        "execution": execution,
        "ranks": ranks.size(),
        "starts": [_start(start) for start in starts],
    }
    dtype = next((p.dtype for p in starts[0].state.params.values() if p.is_floating_point()), torch.float32)
    does = runs.identity(behaviour(model, task, dtype, starts[0].begun))
    return runs.plain({"config": config, "fingerprint": {"task": task.fingerprint(), "model": does}})


def _start(start: Start) -> dict[str, Any]:
    parts = {"params": start.state.params, "buffers": start.state.buffers, "masks": start.masks}
    plain = {"order_seed": start.order_seed, "frozen": start.frozen, "learning_rate": start.learning_rate}
    return {**plain, "dynamics": repr(start.dynamics), **{part: _checksum(t) for part, t in parts.items()}}


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
