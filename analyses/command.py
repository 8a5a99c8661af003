"""What every analysis shares: flags from frozen dataclasses, one-line errors, where results go, what is measured."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import matplotlib
import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn

import ticketlab as tl
from analyses import presets
from analyses.presets import DIGITS
from analyses.usage import usage
from figures.style import drawn, save
from ticketlab.commands import guarded, parsed, try_folder, usable
from ticketlab.engine import ranks
from ticketlab.engine.presets import PRESETS
from ticketlab.engine.store import read_config
from ticketlab.engine.study import study_of
from ticketlab.engine.treatments import TREATMENTS
from ticketlab.engine.verify import check_made
from ticketlab.errors import Refused
from ticketlab.printed import as_text

Tables = Mapping[str, pd.DataFrame]
StudyFlags = Annotated[tl.ImpConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Places:
    """Where an analysis computes and writes."""

    out: Path = Path("results")
    """Folder for tables and figures, OUT/ANALYSIS/RUN, and for an analysis' own trainings, OUT/trainings."""
    device: str | None = None
    """Device to compute on, such as cpu or cuda:1; None: a CUDA device if there is one."""


@dataclass(frozen=True)
class OfRun(Places):
    """The flags of an analysis that measures a run."""

    run: tuple[Path, ...] = ()
    """Run directory to measure, or several of one study with other seeds; none: make or resume that of the flags."""
    store: Path = Path("runs")
    """Folder of run directories."""
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
        Exit code: 0, or that of ``commands.guarded``; a bug keeps its traceback.
    """

    def answer() -> int:
        with ranks.joined():  # of processes that train together the first alone writes and speaks
            if ranks.rank() == 0:
                return only()
            with redirect_stdout(StringIO()):
                config = config_of(name, config_type, sys.argv[1:] if argv is None else argv)
                return 0 if config is None or run(config) else 1

    def only() -> int:
        config = config_of(name, config_type, sys.argv[1:] if argv is None else argv)
        if config is None:
            return 0
        folder = result_folder(name, config)
        try:
            tables = run(config)
        except KeyboardInterrupt as stopped:
            stopped.args = (_left(config),)
            raise
        paths = _write_all(folder, name, config, tables, draw)
        print(as_text(summary(tables), title=(summary.__doc__ or name).partition("\n")[0]))
        print("\n".join(["", *map(str, paths)]))
        return 0

    return guarded(answer)


def config_of(name: str, config_type: type[C], argv: Sequence[str]) -> C | None:
    """The config that the flags describe; None where they ask for the short help, which is printed."""
    default, rest = presets.taken_off(config_type, argv)
    if {"-h", "--help"} & {*rest}:
        print(usage(name, default))
        return None
    about = f"{config_type.__doc__}\n\n--preset NAME [--small] begins with a paper's study: {', '.join(PRESETS)}."
    return parsed(
        config_type,
        ["--help" if flag == "--help-all" else flag for flag in rest],
        prog=f"python -m analyses.{name}",
        description=about,
        default=default,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )


def _left(config: Places) -> str:
    """What an analysis that was stopped leaves behind."""
    store = getattr(config, "store", None)
    if store is None or getattr(config, "run", False):
        return "nothing new is stored; the same command starts again."
    return f"every finished level is stored in {store}; the same command goes on from there."


def _write_all(folder: Path, name: str, config: Places, tables: Tables, draw: Callable[[Tables], Figure]) -> list[Path]:
    matplotlib.use("Agg")
    described = asdict(config)
    if isinstance(config, OfRun) and config.run:  # then the flags of the study were not used, but those of the run
        described["study"] = asdict(tl.load_run(config.run).config)
    with usable(folder):
        paths = write(folder, tables, described)
    pictures = {suffix: make(tables) for suffix, make in drawn(draw).items()}
    with usable(folder):
        for suffix, figure in pictures.items():
            paths = paths + save(figure, folder / f"{name}{suffix}")
    return paths


def result_folder(name: str, config: Places) -> Path:
    """A folder of its own for each run and each choice of flags, tried before hours are spent.

    Raises:
        Refused: A place that cannot be written.
    """
    known = {f.name for f in fields(OfRun)} if isinstance(config, OfRun) else {f.name for f in fields(Places)}
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in known}
    changed = {n: v for n, v in own.items() if v != _default(type(config), n)}
    parts = [_of_run(config)] if isinstance(config, OfRun) else [] if changed else ["default"]
    folder = config.out / name / "-".join(parts + ([_digest(changed)] if changed else []))
    try_folder(folder)
    return folder


def _of_run(config: OfRun) -> str:
    if config.run:
        first, *others = (path.resolve().name for path in config.run)
        return "-".join([first, *([_digest({"runs": others})] if others else [])])
    names = f"{config.study.task}-{config.study.model}".replace(":", ".")
    return f"{names}-{_digest(asdict(config.study))}"


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:6]


def _default(config_type: type, name: str) -> Any:
    own = next(f for f in fields(config_type) if f.name == name)
    return own.default if own.default_factory is MISSING else own.default_factory()


def device_of(config: Places) -> str:
    """The device that was asked for, or a CUDA device if there is one."""
    return config.device or ("cuda" if torch.cuda.is_available() else "cpu")


def open_run(config: OfRun) -> Opened:
    """The study in a run directory, or the one to make or resume; its network, data and levels.

    Raises:
        Refused: Flags of a study, or a store, beside ``--run``, where they would do nothing; a run that is none.
    """
    if not config.run:
        study = tl.Study(config.study, device=config.device)
        print(f"run: {study.folder(config.store)}", flush=True)
        return Opened(study.config, study.model, study.task, followed(study.levels(config.store)))
    default = _default(type(config), "study")
    changed = [f.name for f in fields(default) if getattr(default, f.name) != getattr(config.study, f.name)]
    changed += ["store"] if config.store != _default(type(config), "store") else []
    if changed:
        raise Refused(f"flags of the study do nothing beside --run, which has its own: leave out those of {changed}.")
    run = tl.load_run(config.run)
    study = study_of(run.config, device=config.device)
    for folder in run.folders:
        check_made(read_config(folder), study)
    return Opened(run.config, study.model, study.task, followed(tl.load_run(config.run, device=study.task.device)))


def followed(levels: Iterable[tl.Level]) -> Iterator[tl.Level]:
    """Levels in which all that follows from a ticket that diverged has no result: version 0.1 went on from it.

    Raises:
        Refused: No dense network is left to measure.
    """
    lost: set[int] = set()
    for level in levels:
        table = level.metrics.copy()
        results = [name for name in table if name.endswith(("_nats", "_error"))]
        table.loc[table["init_seed"].isin(lost), results] = float("nan")
        table.loc[table["init_seed"].isin(lost) & table["diverged_step"].isna(), "diverged_step"] = 0
        left = replace(level, metrics=table)
        lost = set(table["init_seed"]) - set(survivors(left))
        if level.level == 0 and not survivors(left):
            raise Refused("some dense network must stay finite: all have diverged. Lower the learning rate or warm up.")
        yield left


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


def survivors(level: tl.Level, treatment: str = "ticket") -> tuple[int, ...]:
    """Init seeds of the networks of a treatment that have not diverged."""
    rows = level.metrics[(level.metrics["treatment"] == treatment) & level.metrics["diverged_step"].isna()]
    return tuple(rows["init_seed"].tolist())


def each_network(level: tl.Level) -> Iterator[tuple[dict[str, Any], tl.Level]]:
    """Each replica by itself, of those that a measure of m * theta at the start tells apart and that did not diverge.

    Before it what tables say of it: level, treatment, init_seed, density, test_error and level_density.

    Siblings start as their tickets do, and where pruned weights are frozen m * theta is another network.
    """
    hidden = {name for name, treatment in TREATMENTS.items() if treatment.alike or treatment.frozen}
    for treatment in dict.fromkeys(level.metrics["treatment"]):
        for seed in survivors(level, treatment) if treatment not in hidden else ():
            network = level.select(treatment=treatment, init_seed=seed)
            about = network.metrics[["level", "treatment", "init_seed", "density", "test_error"]].iloc[0].to_dict()
            yield about | {"level_density": level.density}, network


def beside(state: tl.State, x: Tensor) -> tl.State:
    """The state on the device and in the dtype of inputs; in float64 beside tokens."""
    return state.to(x.device, x.dtype if x.is_floating_point() else torch.float64)


def pruned_names(model: nn.Module, level: tl.Level) -> tuple[str, ...]:
    """What masks name, in the model's order, which a stored level does not keep."""
    return tuple(name for name, _ in model.named_parameters() if name in level.masks)


def joined(parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """One table.

    Raises:
        Refused: No part at all: every network that it would tell of has diverged.
    """
    found = list(parts)
    if not found:
        raise Refused("some network must stay finite: all that were to be measured have diverged. Take other levels.")
    return pd.concat(found, ignore_index=True)


def write(folder: Path, tables: Tables, config: Mapping[str, object]) -> list[Path]:
    """Tables as CSV with 8 significant digits and the config as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{table}.csv" for table in tables]
    for path, table in zip(paths, tables.values(), strict=True):
        table.to_csv(path, index=False, float_format="%.8g")
    paths.append(folder / "config.json")
    paths[-1].write_text(json.dumps(config, indent=2, default=str) + "\n")
    return paths
