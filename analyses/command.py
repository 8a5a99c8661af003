"""What every analysis shares: flags from frozen dataclasses, one-line errors, where results go, which levels to measure."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import matplotlib
import pandas as pd
import tyro
from matplotlib.figure import Figure
from torch import nn

import ticketlab as tl
from figures.style import save
from ticketlab.engine.treatments import TREATMENTS
from ticketlab.errors import Refused

Tables = Mapping[str, pd.DataFrame]
StudyFlags = Annotated[tl.ImpConfig, tyro.conf.arg(name="")]

DIGITS = tl.ImpConfig(recipe=tl.Recipe(steps=1500))
"""What an analysis runs on without arguments: scikit-learn's digits, seconds a level on two cores."""


@dataclass(frozen=True)
class Places:
    """Where an analysis reads, computes and writes."""

    store: Path = Path("runs")
    """Folder of run directories."""
    out: Path = Path("results")
    """Folder for tables and figures: OUT/ANALYSIS/RUN."""
    device: str | None = None
    """Such as cpu or cuda:1; None: a CUDA device if there is one."""


@dataclass(frozen=True)
class OfRun(Places):
    """The flags of an analysis that measures a run."""

    run: Path | None = None
    """Run directory to measure; None: make or resume the run that the flags of the study describe."""
    study: StudyFlags = field(default_factory=lambda: DIGITS)


class Opened(NamedTuple):
    """A run, open for measuring."""

    study: tl.ImpConfig
    model: nn.Module
    task: tl.Task
    levels: Iterator[tl.Level]


C = TypeVar("C", bound=Places)


def main(
    name: str,
    config_type: type[C],
    run: Callable[[C], Tables],
    draw: Callable[[Tables], Figure],
    summary: Callable[[Tables], pd.DataFrame],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse flags, run, write ``OUT/NAME/RUN/{*.csv,config.json,NAME.pdf,NAME.png}``, print a short table and paths.

    Returns:
        Exit code: 0, or 2 with one line on stderr where the input was at fault; a bug keeps its traceback.
    """
    try:
        flags = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
        config = tyro.cli(config_type, prog=f"python -m analyses.{name}", args=argv, config=flags)
        folder = result_folder(name, config)
        tables = run(config)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    matplotlib.use("Agg")
    described = asdict(config)  # type: ignore[call-overload]
    if isinstance(config, OfRun) and config.run:  # then the flags of the study were not used, but those of the run
        described["study"] = asdict(tl.load_run(config.run).config)
    paths = write(folder, tables, described)
    paths += save(draw(tables), folder / name)
    print(summary(tables).to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print("\n".join(["", *map(str, paths)]))
    return 0


def result_folder(name: str, config: Places) -> Path:
    """A folder of its own for each run and each choice of flags, there to be written to before hours are spent.

    Raises:
        Refused: A place that cannot be written.
    """
    places = {f.name for f in fields(Places)} | {"run", "study"}
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in places}
    changed = {n: v for n, v in own.items() if v != _default(type(config), n)}
    parts = [_of_what(config)] + ([_digest(changed)] if changed else [])
    folder = config.out / name / "-".join(part for part in parts if part)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".{os.getpid()}").touch()
        (folder / f".{os.getpid()}").unlink()
    except OSError as error:
        raise Refused(f"--out must be a place to write to: {folder}: {error.strerror}. Choose another.") from error
    return folder


def _of_what(config: Places) -> str:
    if not isinstance(config, OfRun):
        return "" if any(True for f in fields(config) if f.name not in {p.name for p in fields(Places)}) else "all"
    if config.run is not None:
        return config.run.resolve().name
    return f"{config.study.task}-{config.study.model}-{_digest(asdict(config.study))}"


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:6]


def _default(config_type: type, name: str) -> Any:
    own = next(f for f in fields(config_type) if f.name == name)
    return own.default if own.default_factory is MISSING else own.default_factory()


def open_run(config: OfRun) -> Opened:
    """The study in a run directory, or the one to make or resume; its network, data and levels.

    Raises:
        Refused: Flags of a study beside ``--run``, where they would do nothing; a run that is none.
    """
    if config.run is None:
        study = tl.Study(config.study, device=config.device)
        print(f"run: {study.folder(config.store)}", file=sys.stderr)
        return Opened(study.config, study.model, study.task, study.levels(config.store))
    default = _default(type(config), "study")
    changed = [f.name for f in fields(default) if getattr(default, f.name) != getattr(config.study, f.name)]
    if changed:
        raise Refused(f"flags of the study do nothing beside --run, which has its own: leave out those of {changed}.")
    run = tl.load_run(config.run)
    model, task = tl.model_and_task(run.config, device=config.device)
    return Opened(run.config, model, task, iter(tl.load_run(config.run, device=task.device)))


def chosen_levels(wanted: Collection[int] | None, last: int, default: Collection[int], first: int = 0) -> set[int]:
    """The levels that a flag asks for, or the default among those of the run.

    Args:
        wanted: What was given; None: the default.
        last: The run's last level.
        default: Levels measured otherwise.
        first: The first that can be measured.

    Raises:
        Refused: None at all, or one that the run does not have.
    """
    found = set(default if wanted is None else wanted)
    if not found or not found <= set(range(first, last + 1)):
        raise Refused(f"levels must lie in {first}..{last}, those of the run: got {sorted(found)}. Choose others.")
    return found


def each_network(level: tl.Level) -> Iterator[tl.Level]:
    """Each replica by itself, of those that a measure of m * theta at the start tells apart and that did not diverge.

    Siblings start as their tickets do, and where pruned weights are frozen m * theta is another network.
    """
    told = {name for name, t in TREATMENTS.items() if not (t.alike or t.frozen)}
    for treatment, seed, diverged in level.metrics[["treatment", "init_seed", "diverged_step"]].itertuples(index=False):
        if (treatment in told or treatment not in TREATMENTS) and pd.isna(diverged):
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
