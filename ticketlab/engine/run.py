"""A stored study, opened for reading."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ticketlab import shown
from ticketlab.data import Task
from ticketlab.engine import store as files
from ticketlab.engine.config import ImpConfig, from_json, in_words
from ticketlab.engine.level import Level, joined
from ticketlab.engine.study import model_and_task
from ticketlab.errors import Refused
from ticketlab.losses import LOSSES
from ticketlab.network import evaluate


@dataclass(frozen=True)
class Run:
    """A stored study: its config and its levels, read one at a time."""

    folder: Path
    config: ImpConfig
    n_levels: int
    device: torch.device | str = "cpu"
    """Where the tensors of a level are put."""
    further: tuple[Path, ...] = ()
    """Run directories of the same study with other seeds, whose replicas stand behind."""

    def __len__(self) -> int:
        return self.n_levels

    def __getitem__(self, level: int) -> Level:
        if not 0 <= level < self.n_levels:
            raise IndexError(f"{self.folder} has levels 0 to {self.n_levels - 1}: got {level}.")
        first, *others = (files.read_level(folder, level, self.device) for folder in (self.folder, *self.further))
        return joined([first, *others]) if others else first

    def __iter__(self) -> Iterator[Level]:
        return (self[level] for level in range(self.n_levels))

    def __repr__(self) -> str:
        more = f" and {len(self.further)} more" * bool(self.further)
        return f"Run of {self.config.model} on {self.config.task}, {self.n_levels} levels in {self.folder}{more}"

    def _repr_html_(self) -> str:
        return shown.table(repr(self), in_words(self.config))

    @property
    def metrics(self) -> pd.DataFrame:
        """One row per level and network: ``level``, ``level_density`` (that of the ticket), and `Level.metrics`."""
        tables = [level.metrics.assign(level=level.level, level_density=level.density) for level in self]
        return pd.concat(tables, ignore_index=True)


def load_run(folder: str | Path | Sequence[str | Path], device: torch.device | str = "cpu") -> Run:
    """Open a run directory for reading, or several of one study with different seeds as one.

    Args:
        folder: One, or several: their replicas stand one behind another, as many levels as all of them have.
        device: Where the tensors of a level are put.

    Raises:
        Refused: Not a run directory, or no level in it is whole; a device that is not there; several that differ in
            more than their seeds, or share one.

    Warns:
        RuntimeWarning: A level is missing between others: the run is read up to it.
    """
    if not isinstance(folder, str | Path):
        return _together([load_run(one, device) for one in folder])
    path, place = Path(folder).expanduser(), files.place(device)
    stored = files.read_config(path)["config"]
    n_levels = files.n_stored(path)
    config = from_json(stored | {"levels": max(0, n_levels - 1)})
    if n_levels == 0:
        raise Refused(f"{path} must hold at least level 0: it has none. Resume the run with ticketlab imp.")
    if beyond := files.n_beyond(path):
        warnings.warn(
            f"level {n_levels} of {path} is missing, and the {beyond} after it are not read. Resume the run.",
            RuntimeWarning,
            stacklevel=2,
        )
    return Run(path, config, n_levels, place)


def _together(parts: Sequence[Run]) -> Run:
    """Blocks of seeds of one study."""
    if not parts:
        raise Refused("load_run needs a run directory: got an empty list.")
    first = parts[0]
    for other in parts[1:]:
        same = [_without_seeds(run.config) for run in (first, other)]
        differ = [f.name for f in fields(same[0]) if getattr(same[0], f.name) != getattr(same[1], f.name)]
        data, theirs = (files.read_config(run.folder)["fingerprint"]["task"] for run in (first, other))
        if differ or data != theirs:
            what = ", ".join(differ) or "their data"
            raise Refused(f"runs must differ in seeds alone: {first.folder} and {other.folder} differ in {what}.")
    seeds = tuple(seed for run in parts for seed in run.config.init_seeds)
    orders = tuple(seed for run in parts for seed in run.config.order_seeds or run.config.init_seeds)
    levels = min(len(run) for run in parts)
    config = replace(first.config, levels=levels - 1, init_seeds=seeds, order_seeds=None if orders == seeds else orders)
    return replace(first, config=config, n_levels=levels, further=tuple(run.folder for run in parts[1:]))


def _without_seeds(config: ImpConfig) -> ImpConfig:
    return replace(config, levels=0, init_seeds=(0,), order_seeds=None)


def runs(store: str | Path = "runs") -> pd.DataFrame:
    """What a store holds: one row per run directory.

    Returns:
        run (folder), task, model, levels (stored), seeds and treatments (their numbers), megabytes, changed (date).

    Raises:
        Refused: No such folder, or a run in it whose description is not whole.
    """
    root = Path(store).expanduser()
    if not root.is_dir():
        raise Refused(f"{root} must be a folder of run directories: there is none. Name the store of the runs.")
    columns = ["run", "task", "model", "levels", "seeds", "treatments", "megabytes", "changed"]
    return pd.DataFrame([_row(path) for path in sorted(root.iterdir()) if files.is_run(path)], columns=columns)


def _row(path: Path) -> dict[str, object]:
    config = files.read_config(path)["config"]
    stats = [file.stat() for file in path.rglob("*") if file.is_file()]
    return {
        "run": path.name,
        "task": config["task"],
        "model": config["model"],
        "levels": files.n_stored(path),
        "seeds": len(config["init_seeds"]),
        "treatments": len(config["treatments"]),
        "megabytes": sum(stat.st_size for stat in stats) / 1e6,
        "changed": datetime.fromtimestamp(max(stat.st_mtime for stat in stats)).isoformat(" ", "minutes"),
    }


def verify(folder: str | Path) -> dict[int, str | None]:
    """Every stored level of a run, or missing one between others, with its fault; None where it is whole.

    Held against one another are every file and its checksum; masks and those of the level before, in which they lie;
    counts and masks; results and weights, which are finite or of a network that diverged. Where the config names data
    and model, test errors are evaluated again.

    Raises:
        Refused: Not a run directory, a description that is not what was stored, or other data under its name.
    """
    path = Path(folder).expanduser()
    stored = files.read_config(path)
    n_levels = files.n_stored(path)
    measure = _evaluation(from_json(stored["config"] | {"levels": 0}), stored) if n_levels else None
    faults: dict[int, str | None] = {}
    before: Level | None = None
    for number in range(n_levels):
        try:
            level = files.read_level(path, number)
        except Refused as error:
            faults[number], before = str(error), None
            continue
        found = _inconsistent(level, before) or (measure(level) if measure else None)
        faults[number] = found and f"{path}: level {number} {found}. Train it again in another store."
        before = level
    if beyond := files.n_beyond(path):
        faults[n_levels] = f"{path} lacks a whole level {n_levels}, and holds {beyond} after it. Resume the run."
    return faults


def _inconsistent(level: Level, before: Level | None) -> str | None:
    """What of a level that can be read does not hold together."""
    table = level.metrics
    for row, replica in zip(table.itertuples(), range(len(table)), strict=True):
        kept = sum(int(mask[replica].sum()) for mask in level.masks.values())
        if kept != row.kept:
            return f"has {kept} live weights in replica {replica}, where its metrics say {row.kept}"
        finite = all(bool(t[replica].isfinite().all()) for t in level.end.params.values())
        if pd.isna(row.diverged_step) and not finite:
            return f"has weights that are not finite in replica {replica}, which has not diverged"
        if pd.isna(row.diverged_step) == pd.isna(row.test_error):
            return f"has a result of replica {replica} although it diverged, or none although it did not"
    tickets = table[table["treatment"] == "ticket"]
    for replica, seed in zip(tickets["replica"], tickets["init_seed"], strict=True) if before else ():
        parent = before.select(treatment="ticket", init_seed=int(seed)).masks if before else {}
        if any(bool((mask[replica] & ~parent[name]).any()) for name, mask in level.masks.items()):
            return f"has live weights in the ticket of seed {seed} that the level before has pruned"
    return None


def _evaluation(config: ImpConfig, stored: Mapping[str, Any]) -> Callable[[Level], str | None] | None:
    """What evaluates a level again; None where the data or the model are a user's own.

    Raises:
        Refused: Data that are not those of the run.
    """
    if stored.get("own"):
        return None
    try:
        model, task = model_and_task(config)
    except Refused:
        return None
    check_data(stored, task)

    def measure(level: Level) -> str | None:
        loss, state = LOSSES[task.loss], level.end.to(task.device, getattr(torch, config.dtype))
        _, error = evaluate(model, state, task.test.x, task.test.y, loss=loss)
        apart = (error.cpu() - torch.tensor(level.metrics["test_error"].to_numpy(float))).abs().nan_to_num()
        worst = int(apart.argmax())
        most = max(1.5 / len(task.test), 1e-3)  # examples on the boundary, which another machine may round otherwise
        said = f"errs in replica {worst} on {float(error[worst]):.4f} of the test set, where its metrics say "
        return said + f"{level.metrics['test_error'][worst]:.4f}" if float(apart[worst]) > most else None

    return measure


def check_data(stored: Mapping[str, Any], task: Task) -> None:
    """Refuse data that are not those that a run was trained on."""
    known, found = stored["fingerprint"]["task"], task.fingerprint()
    if known != found:
        raise Refused(
            f"the data of {task.name} must be those of the run, with the fingerprint {known}: here they have {found}. "
            "Point TICKETLAB_DATA at the same files."
        )
