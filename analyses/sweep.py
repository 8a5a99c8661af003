"""Studies in blocks of seeds, and what is to be measured of each, on the workers of a Dask cluster or here.

A plan is a TOML file::

    seeds_per_block = 1
    measures = ["imp", "mode_connectivity --n-alphas 11"]  # analyses, with flags of their own

    [study]                     # what is left out is as in ticketlab.ImpConfig
    task = "mnist"
    model = "lenet_300_100"
    levels = 20
    init_seeds = [0, 1, 2, 3, 4]
    recipe.steps = 5000

    [over]                      # every combination is a study
    rewind_step = [0, 500]
    "recipe.learning_rate" = [0.0012, 0.0006]

A block is a run directory, and ``--run A B C`` of any analysis reads several as one. The same command goes on where it
was: what is trained or measured stays.
"""

from __future__ import annotations

import itertools
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import tyro
from tqdm import tqdm

import ticketlab as tl
from analyses.command import config_of, result_folder
from ticketlab import console
from ticketlab.commands import guarded, parsed
from ticketlab.engine.config import from_json
from ticketlab.engine.sweep import one_thread, spread, sweep
from ticketlab.errors import Refused, nearest


@dataclass(frozen=True)
class Config:
    """Train the studies of a plan in blocks of seeds, and measure them, on a cluster or here."""

    plan: tyro.conf.Positional[Path]
    """TOML file: [study], [over], measures, seeds_per_block (see python -m analyses.sweep --help)."""
    store: Path = Path("runs")
    """Folder of run directories, under the same name on every worker."""
    out: Path = Path("results")
    """Folder for tables and figures: OUT/ANALYSIS/STUDY."""
    scheduler: str | None = None
    """Address of a Dask scheduler, such as tcp://10.0.0.1:8786."""
    local: int | None = None
    """Worker processes on this machine in its place; none of both: one block after another in this process."""
    resources: Annotated[str | None, tyro.conf.arg(metavar="NAME=AMOUNT")] = None
    """What a block takes of its worker, such as GPU=1 for workers started with --resources GPU=1."""
    device: str | None = None
    """Device to compute on; None: a worker's CUDA device if it has one."""


@dataclass(frozen=True)
class Plan:
    """What a file asks for."""

    studies: tuple[tl.ImpConfig, ...]
    measures: tuple[tuple[str, ...], ...] = ()
    """Name of an analysis and its flags."""
    seeds_per_block: int = 1


def read_plan(path: Path) -> Plan:
    """The studies and measures that a file names.

    Raises:
        Refused: No TOML, keys or values that a study does not have, an analysis that does not exist.
    """
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise Refused(f"{path} must be a plan in TOML: {error}. See python -m analyses.sweep --help.") from error
    known = {"study": dict, "over": dict, "measures": list, "seeds_per_block": int}
    wrong = [k for k, v in found.items() if k not in known or not isinstance(v, known[k])]
    over = found["over"] if isinstance(found.get("over"), dict) else {}
    wrong += [f"over.{k}" for k, v in over.items() if not isinstance(v, list) or not v]
    if wrong:
        raise Refused(f"{path} must have study and over (tables of lists), measures, seeds_per_block: {wrong} is not.")
    choices = [dict(zip(over, values, strict=True)) for values in itertools.product(*over.values())]
    studies = tuple(_study(path, found.get("study", {}), choice) for choice in choices)
    measures = tuple(tuple(shlex.split(str(line))) for line in found.get("measures", []))
    for name, *_ in measures:
        if name not in console.questions():
            raise Refused(nearest("measure", name, tuple(console.questions())))
    return Plan(studies, measures, found.get("seeds_per_block", 1))


def _study(path: Path, base: Mapping[str, Any], choice: Mapping[str, Any]) -> tl.ImpConfig:
    recipe = dict(base.get("recipe", {})) | {
        name.removeprefix("recipe."): value for name, value in choice.items() if name.startswith("recipe.")
    }
    values = dict(base) | {name: value for name, value in choice.items() if not name.startswith("recipe.")}
    try:
        return from_json({**values, "recipe": recipe})
    except Refused as error:
        raise Refused(f"{path}: {error}") from error


def run(config: Config) -> list[Path]:
    """Folders of what was trained and measured: run directories, then tables."""
    plan = read_plan(config.plan)
    resources = _resources(config.resources)
    with _client(config) as client:
        folders = sweep(
            plan.studies,
            config.store,
            client=client,
            seeds=plan.seeds_per_block,
            device=config.device,
            resources=resources,
        )
        items = [(measure, study) for measure in plan.measures for study in folders]
        with tqdm(total=len(items), desc="measures", unit="study", disable=None) as bar:
            work = partial(_measured, config.out, config.device)
            measured = spread(work, items, client, report=bar.update, resources=resources)
    return [*itertools.chain(*folders), *measured]


def _measured(
    out: Path, device: str | None, item: tuple[tuple[str, ...], list[Path]], report: Callable[[], None]
) -> Path:
    """One analysis of one study, unless its figure is there: where its tables are."""
    (name, *flags), runs = item
    argv = ["--run", *map(str, runs), "--out", str(out), *flags, *(["--device", device] if device else [])]
    config = config_of(name, console.analysis(name).Config, argv)
    assert config is not None  # no help was asked for
    folder = result_folder(name, config)
    if not (folder / f"{name}.png").exists():
        with one_thread(), redirect_stdout(StringIO()), redirect_stderr(StringIO()) as told:
            code = console.main([name, *argv])
        if code:
            raise Refused(
                f"ticketlab {shlex.join([name, *argv])} ended with exit code {code}: {told.getvalue().strip()}"
            )
    report()
    return folder


@contextmanager
def _client(config: Config) -> Iterator[Any]:
    if config.scheduler is None and config.local is None:
        yield None
        return
    if config.scheduler is not None and config.local is not None:
        raise Refused("--scheduler and --local exclude each other: workers are there, or here. Leave one out.")
    if config.local is not None and config.local < 1:
        raise Refused(f"--local must be at least 1 worker: got {config.local}.")
    try:
        from distributed import Client, LocalCluster  # noqa: PLC0415
    except ImportError as error:
        raise Refused("clusters need Dask: pip install 'ticketlab[cluster]'.") from error
    if config.local is not None:
        quiet = {"dashboard_address": None, "silence_logs": 50}
        with LocalCluster(n_workers=config.local, threads_per_worker=1, **quiet) as cluster, Client(cluster) as client:
            yield client
        return
    try:
        client = Client(config.scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise Refused(f"--scheduler must be the address of a Dask scheduler: {config.scheduler}: {error}.") from error
    with client:
        yield client


def _resources(given: str | None) -> dict[str, float] | None:
    if given is None:
        return None
    try:
        pairs = [part.split("=") for part in given.split(",")]
        return {name: float(amount) for name, amount in pairs}
    except ValueError as error:
        raise Refused(f"--resources must be NAME=AMOUNT, such as GPU=1: got {given!r}.") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure, and print where everything is; exit codes as of ``commands.guarded``."""

    def answer() -> int:
        config = parsed(Config, argv, prog="ticketlab sweep", description=__doc__)
        print("\n".join(map(str, run(config))))
        return 0

    return guarded(answer)


if __name__ == "__main__":
    sys.exit(main())
