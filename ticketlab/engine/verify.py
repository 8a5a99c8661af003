"""Whether what is stored is whole, holds together, and is what the config makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ticketlab import masks as mask_ops
from ticketlab.data import Task
from ticketlab.engine import store as files
from ticketlab.engine.config import from_json
from ticketlab.engine.level import Level
from ticketlab.engine.study import Study, study_of
from ticketlab.errors import Refused
from ticketlab.losses import LOSSES
from ticketlab.network import evaluate
from ticketlab.seeds import Factory
from ticketlab.state import select


def verify(folder: str | Path, *, model: Factory | None = None, task: Task | None = None) -> dict[int, str | None]:
    """Every stored level of a run, or missing one between others, with its fault; None where it is whole.

    Held against one another are every file and its checksum; masks and those of the level before, in which they lie;
    counts, densities and masks; pruned weights, which are zero or where they started; results and weights, which are
    finite or of a network that diverged. Test errors are evaluated again, where network and data are there: named by
    the config, or given.

    Args:
        folder: Run directory.
        model: Makes the network, where it was one of your own.
        task: The data, where they were your own.

    Raises:
        Refused: Not a run directory, a description that is not what was stored, other data or another network than
            those of the run.
    """
    path = Path(folder).expanduser()
    stored = files.read_config(path)
    n_levels = files.n_stored(path)
    study = _study(stored, model, task) if n_levels else None
    faults: dict[int, str | None] = {}
    before: Level | None = None
    for number in range(n_levels):
        try:
            level = files.read_level(path, number)
        except Refused as error:
            faults[number], before = str(error), None
            continue
        found = _inconsistent(level, before) or (_errors(level, study) if study else None)
        faults[number] = found and f"{path}: level {number} {found}. Train it again in another store."
        before = level
    if beyond := files.n_beyond(path):
        faults[n_levels] = f"{path} lacks a whole level {n_levels}, and holds {beyond} after it. Resume the run."
    return faults


def _inconsistent(level: Level, before: Level | None) -> str | None:
    """What of a level that can be read does not hold together."""
    table = level.metrics
    tickets = table[table["treatment"] == "ticket"]
    for replica, seed in zip(tickets["replica"], tickets["init_seed"], strict=True) if before else ():
        parent = before.select(treatment="ticket", init_seed=int(seed)).masks if before else {}
        if any(bool((mask[replica] & ~parent[name]).any()) for name, mask in level.masks.items()):
            return f"has live weights in the ticket of seed {seed} that the level before has pruned"
    for row, replica in zip(table.itertuples(), range(len(table)), strict=True):
        fault = _of_replica(level, replica, row)
        if fault:
            return f"has in replica {replica} {fault}"
    return None


def _of_replica(level: Level, replica: int, row: Any) -> str | None:
    masks, end, start = (select(part, replica) for part in (level.masks, level.end.params, level.start.params))
    kept, density = int(mask_ops.kept(masks)), float(mask_ops.density(masks))
    if kept != row.kept:
        return f"{kept} live weights, where its metrics say {row.kept}"
    if not np.isclose(density, row.density, rtol=1e-6):
        return f"density {density:.6g}, where its metrics say {row.density:.6g}"
    lost = pd.notna(row.diverged_step)
    if lost != pd.isna(row.test_error):
        return "a result although it diverged, or none although it did not"
    if lost:
        return None
    if not all(bool(t.isfinite().all()) for t in end.values()):
        return "weights that are not finite, although it has not diverged"
    moved = [n for n, m in masks.items() if bool(((end[n] != 0) & (end[n] != start[n]) & ~m).any())]
    return f"pruned weights of {moved[0]} that are neither zero nor where they started" if moved else None


def _study(stored: Mapping[str, Any], model: Factory | None, task: Task | None) -> Study | None:
    """The study that the config makes; None where its data or network are a user's own, and not given.

    Raises:
        Refused: Data or a network that are not those of the run.
    """
    config = from_json(stored["config"] | {"levels": 0})
    try:
        found = study_of(config, model=model, task=task)
    except Refused:
        if model is not None or task is not None:
            raise
        return None
    check_made(stored, found)
    return found


def check_made(stored: Mapping[str, Any], study: Study) -> None:
    """Refuse data or a network that are not those that a run was made with.

    Of a network that began from given weights only the data are compared: the config does not say where they are from.
    """
    known, found = stored["fingerprint"], study.description["fingerprint"]
    if known["task"] != found["task"]:
        raise Refused(
            f"the data of {study.task.name} must be those of the run, with the fingerprint {known['task']}: here they "
            f"have {found['task']}. Point TICKETLAB_DATA at the same files."
        )
    if known.get("model") not in (None, found["model"]) and not stored.get("start"):
        raise Refused(
            f"{study.config.model} must make the network of the run, with the fingerprint {known['model']}: here it is "
            f"{found['model']}, of other layers, values or operations. Take the code that the run was made with."
        )


def _errors(level: Level, study: Study) -> str | None:
    """Test errors that are not what the stored networks have."""
    task, expected = study.task, torch.tensor(level.metrics["test_error"].to_numpy(float))
    found = _evaluated(level, study).cpu()
    apart = (found - expected).abs().nan_to_num()
    worst = int(apart.argmax())
    most = max(1.5 / len(task.test), 1e-3)  # examples on the boundary, which another machine may round otherwise
    if float(apart[worst]) <= most:
        return None
    return (
        f"errs in replica {worst} on {float(found[worst]):.4f} of the test set, where its metrics say "
        f"{float(expected[worst]):.4f}"
    )


def _evaluated(level: Level, study: Study) -> Tensor:
    task = study.task
    state = level.end.to(task.device, getattr(torch, study.config.dtype))
    return evaluate(study.model, state, task.test.x, task.test.y, loss=LOSSES[task.loss])[1]
