"""Draw every committed study: ``python -m figures``.

A study is a folder ``figures/data/FIGURE-NAME`` of CSV tables, as an analysis wrote them; its picture goes to
``figures/paper/FIGURE-NAME.png``, and what its main figure leaves out to ``FIGURE-NAME-supplement.png``.
"""

from __future__ import annotations

import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import active_children
from pathlib import Path

import matplotlib
import pandas as pd
import tyro

from figures.style import drawn, save
from ticketlab.commands import guarded, parsed, try_folder
from ticketlab.errors import Refused

HERE = Path(__file__).parent
HOME = HERE if (HERE / "data").is_dir() else Path()  # the working directory, where no studies come with the figures
NAMES = sorted({path.stem for path in HERE.glob("*.py")} - {"style", "__main__", "__init__"})
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Config:
    """Draw every study in a folder of tables, or those named, or the tables of a run of one's own."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Studies to draw, such as imp-mnist, none for all; beside --run the name of its figure, such as imp."""
    run: tuple[Path, ...] = ()
    """Folders of tables that an analysis wrote, results/NAME/RUN; pictures go there."""
    data: Path = HOME / "data"
    """Folder of studies."""
    out: Path = HOME / "paper"
    """Folder for pictures of studies."""
    pdf: bool = False
    """PDFs beside the PNGs."""
    titles: bool = True
    """Titles over figures; otherwise captions beside them, as text files."""


def draw_all(config: Config) -> list[Path]:
    """Draw each study whose folder begins with the name of a figure, or the tables of a run.

    Raises:
        Refused: No such folder, one of no known figure, tables that are broken or of another figure, or flags that do
            nothing.
    """
    if config.run:
        if len(config.names) > 1 or (config.data, config.out) != (Config.data, Config.out):
            raise Refused(
                "--run must have one figure's name beside it at most, and no --data or --out: leave them out."
            )
        runs = {run: config.names[0] if config.names else run.resolve().parent.name for run in config.run}
        return [path for run, name in runs.items() for path in _drawn(name, run, run / name, config)]
    studies = sorted(path for path in config.data.glob("*") if path.is_dir())
    if not studies:
        raise Refused(f"{config.data} must hold folders FIGURE-NAME of CSV tables: it has none.")
    unknown = set(config.names) - {study.name for study in studies}
    if unknown:
        known = ", ".join(study.name for study in studies)
        raise Refused(f"{', '.join(sorted(unknown))} must be a study in {config.data}: there are {known}.")
    chosen = [study for study in studies if study.name in config.names or not config.names]
    try_folder(config.out)
    figures, stems = [study.name.partition("-")[0] for study in chosen], [config.out / s.name for s in chosen]
    with _processes(len(chosen)) as pool:
        with _signals_wait():
            pictures = pool.map(_drawn, figures, chosen, stems, repeat(config))
        return [path for paths in pictures for path in paths]


@contextmanager
def _processes(most: int) -> Iterator[ProcessPoolExecutor]:
    """A process per core, a study each; none outlives an error or a signal."""
    others = active_children()
    with ProcessPoolExecutor(min(most, os.cpu_count() or 1), initializer=_deaf) as pool:
        try:
            yield pool
        except BaseException as error:
            for child in active_children() if isinstance(error, KeyboardInterrupt) else ():
                if child not in others:
                    child.kill()
            pool.shutdown(cancel_futures=True)
            raise


def _deaf() -> None:
    """A terminal signals all its processes: the first one alone answers, and ends the others."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """While processes start: what a signal raises in a hook of a fork is lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = {number: signal.signal(number, lambda n, _: heard.append(n)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action or signal.SIG_DFL)
        for first in heard[:1]:
            signal.raise_signal(first)


def _drawn(figure: str, folder: Path, stem: Path, config: Config) -> list[Path]:
    if figure not in NAMES:
        raise Refused(f"{figure} must be the name of a figure to draw {folder}: known are {', '.join(NAMES)}.")
    tables = {path.stem: _read(path) for path in sorted(folder.glob("*.csv"))}
    if not tables:
        raise Refused(f"{folder} must hold the CSV tables of an analysis: it has none.")
    written: list[Path] = []
    for suffix, draw in drawn(pkgutil.resolve_name(f"{__package__}.{figure}:draw")).items():
        without = None if config.titles else draw
        try:
            picture = draw(tables)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise Refused(
                f"{folder} must hold the tables that {figure} writes, whole: {why}. Make it again."
            ) from error
        written += save(picture, Path(f"{stem}{suffix}"), pdf=config.pdf, draw=without)
    return written


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except ValueError as error:  # those of pandas, and bytes that are no text
        raise Refused(f"{path} must be a CSV table: {str(error).strip()}. Run its analysis again.") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, and print the paths; exit codes as of ``commands.guarded``."""
    return guarded(lambda: _answer(parsed(Config, argv, prog="python -m figures")))


def _answer(config: Config) -> int:
    matplotlib.use("Agg")
    print("\n".join(map(str, draw_all(config))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
