"""A stored study, opened for reading."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path

import pandas as pd
import torch

from ticketlab import shown
from ticketlab.engine import store as files
from ticketlab.engine.config import ImpConfig, from_json, in_words
from ticketlab.engine.level import Level, joined
from ticketlab.errors import Refused


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

    @property
    def folders(self) -> tuple[Path, ...]:
        """All run directories, in the order of their replicas."""
        return (self.folder, *self.further)

    def __len__(self) -> int:
        return self.n_levels

    def __getitem__(self, level: int) -> Level:
        if not 0 <= level < self.n_levels:
            raise IndexError(f"{self.folder} has levels 0 to {self.n_levels - 1}: got {level}.")
        first, *others = (files.read_level(folder, level, self.device) for folder in self.folders)
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
        one, two = (files.read_config(run.folder) for run in (first, other))
        named = {"task": "their data", "model": "their network"}
        differ += [named[part] for part in named if one["fingerprint"].get(part) != two["fingerprint"].get(part)]
        differ += [part for part in ("own", "execution", "start", "ranks") if one.get(part) != two.get(part)]
        if differ:
            what = ", ".join(differ)
            raise Refused(f"runs must differ in seeds alone: {first.folder} and {other.folder} differ in {what}.")
    seeds = tuple(seed for run in parts for seed in run.config.init_seeds)
    orders = tuple(seed for run in parts for seed in run.config.order_seeds or run.config.init_seeds)
    folders = tuple(folder for run in parts for folder in run.folders)
    levels = min(len(run) for run in parts)
    config = replace(first.config, levels=levels - 1, init_seeds=seeds, order_seeds=None if orders == seeds else orders)
    return replace(first, config=config, n_levels=levels, further=folders[1:])


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
