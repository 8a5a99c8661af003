"""What every analysis shares: flags from a frozen dataclass, one-line errors, the files it leaves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, TypeVar

import matplotlib
import pandas as pd
import tyro
from matplotlib.figure import Figure
from torch import nn

import ticketlab as tl
from figures.style import save
from ticketlab.engine.treatments import FROZEN
from ticketlab.errors import Refused

Tables = Mapping[str, pd.DataFrame]

DIGITS = tl.ImpConfig(recipe=tl.Recipe(steps=1500))
"""What an analysis runs on without arguments: scikit-learn's digits, seconds a level on two cores."""


class Config(Protocol):
    """What ``main`` needs of a config: a frozen dataclass with a folder for results."""

    @property
    def out(self) -> Path: ...


C = TypeVar("C", bound=Config)


def main(
    name: str,
    config_type: type[C],
    run: Callable[[C], Tables],
    draw: Callable[[Tables], Figure],
    summary: Callable[[Tables], pd.DataFrame],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse flags, run, write ``OUT/NAME/{*.csv,config.json,NAME.pdf,NAME.png}``, print a short table and the paths.

    Returns:
        Exit code: 0, or 2 with one line on stderr where the input was at fault.
    """
    try:
        config = tyro.cli(
            config_type, prog=f"python -m analyses.{name}", args=argv, config=(tyro.conf.OmitArgPrefixes,)
        )
        tables = run(config)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    folder = config.out / name
    described = asdict(config)  # type: ignore[call-overload]
    if described.get("run"):  # then the flags of the study were not used, but those of the run
        described["study"] = asdict(tl.load_run(described["run"]).config)
    paths = write(folder, tables, described)
    paths += save(draw(tables), folder / name)
    print(summary(tables).to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print("\n".join(["", *map(str, paths)]))
    return 0


def open_run(
    folder: Path | None, study: tl.ImpConfig, store: Path, device: str | None
) -> tuple[tl.ImpConfig, nn.Module, tl.Task, Iterator[tl.Level]]:
    """The study in a run directory, or the one to make or resume; its network, data and levels."""
    study = study if folder is None else tl.load_run(folder).config
    model, task = tl.model_and_task(study, device=device)
    if folder is not None:
        return study, model, task, iter(tl.load_run(folder, device=task.device))
    print(f"run: {tl.run_folder(study, store)}", file=sys.stderr)
    return study, model, task, tl.imp(study, store=store, device=task.device)


def each_network(level: tl.Level) -> Iterator[tl.Level]:
    """Each replica by itself, of those that a measure of m * theta at the start tells apart.

    Siblings start as their tickets do, and where pruned weights are frozen m * theta is another network.
    """
    for treatment, seed in level.metrics[["treatment", "init_seed"]].itertuples(index=False):
        if treatment not in ("sibling", *FROZEN):
            yield level.select(treatment=treatment, init_seed=seed)


def write(folder: Path, tables: Tables, config: Mapping[str, object]) -> list[Path]:
    """Tables as CSV with 8 significant digits and the config as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{table}.csv" for table in tables]
    for path, table in zip(paths, tables.values(), strict=True):
        table.to_csv(path, index=False, float_format="%.8g")
    paths.append(folder / "config.json")
    paths[-1].write_text(json.dumps(config, indent=2, default=str) + "\n")
    return paths
