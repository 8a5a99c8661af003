"""A stored study, opened for reading."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ticketlab.engine import store as runs
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
        return runs.read_level(self.folder, level, self.device)

    def __iter__(self) -> Iterator[Level]:
        return (self[level] for level in range(self.n_levels))


def load_run(folder: str | Path, device: torch.device | str = "cpu") -> Run:
    """Open a run directory for reading.

    Raises:
        Refused: Not a run directory, or no level in it is whole; a device that is not there.

    Warns:
        RuntimeWarning: A level is missing between others: the run is read up to it.
    """
    path, place = Path(folder).expanduser(), runs.place(device)
    stored = runs.read_config(path)["config"]
    n_levels = runs.n_stored(path)
    config = from_json(stored | {"levels": max(0, n_levels - 1)})
    if n_levels == 0:
        raise Refused(f"{path} must hold at least level 0: it has none. Resume the run with analyses.imp.")
    if beyond := runs.n_beyond(path):
        warnings.warn(
            f"level {n_levels} of {path} is missing, and the {beyond} after it are not read. Resume the run.",
            RuntimeWarning,
            stacklevel=2,
        )
    return Run(path, config, n_levels, place)
