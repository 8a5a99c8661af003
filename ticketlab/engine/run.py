"""A stored study, opened for reading."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pandas as pd
import torch

from ticketlab.engine import store as files
from ticketlab.engine.config import ImpConfig, from_json
from ticketlab.engine.level import Level
from ticketlab.errors import Refused


@dataclass(frozen=True)
class Run:
    """A stored study: its config and its levels, read one at a time."""

    folder: Path
    config: ImpConfig
    n_levels: int
    device: torch.device | str = "cpu"
    """Where the tensors of a level are put."""

    def __len__(self) -> int:
        return self.n_levels

    def __getitem__(self, level: int) -> Level:
        if not 0 <= level < self.n_levels:
            raise IndexError(f"{self.folder} has levels 0 to {self.n_levels - 1}: got {level}.")
        return files.read_level(self.folder, level, self.device)

    def __iter__(self) -> Iterator[Level]:
        return (self[level] for level in range(self.n_levels))

    def __repr__(self) -> str:
        return f"Run of {self.config.model} on {self.config.task}, {self.n_levels} levels in {self.folder}"

    @property
    def metrics(self) -> pd.DataFrame:
        """One row per level and network: ``level``, ``level_density`` (that of the ticket), and `Level.metrics`."""
        tables = [level.metrics.assign(level=level.level, level_density=level.density) for level in self]
        return pd.concat(tables, ignore_index=True)


def load_run(folder: str | Path, device: torch.device | str = "cpu") -> Run:
    """Open a run directory for reading.

    Raises:
        Refused: Not a run directory, or no level in it is whole; a device that is not there.

    Warns:
        RuntimeWarning: A level is missing between others: the run is read up to it.
    """
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
    """Every stored level of a run, or missing one between others, with its fault; None where all checksums hold.

    Raises:
        Refused: Not a run directory, or a description that is not what was stored.
    """
    path = Path(folder).expanduser()
    files.read_config(path)
    n_levels = files.n_stored(path)
    faults = {level: _fault(path, level) for level in range(n_levels)}
    if beyond := files.n_beyond(path):
        faults[n_levels] = f"{path} lacks a whole level {n_levels}, and holds {beyond} after it. Resume the run."
    return faults


def _fault(path: Path, level: int) -> str | None:
    try:
        files.read_level(path, level)
    except Refused as error:
        return str(error)
    return None
