"""Draw every committed study: ``python -m figures``.

A study is a folder ``figures/data/FIGURE-NAME`` of CSV tables, as an analysis wrote them; its picture goes to
``figures/paper/FIGURE-NAME.png``, and what its main figure leaves out to ``FIGURE-NAME-supplement.png``.
"""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import matplotlib
import pandas as pd
import tyro

from figures.style import drawn, save

HERE = Path(__file__).parent
HOME = HERE if (HERE / "data").is_dir() else Path()  # the working directory, where no studies come with the figures
NAMES = sorted({path.stem for path in HERE.glob("*.py")} - {"style", "__main__", "__init__"})


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
        ValueError: No such folder, or one of no known figure.
    """
    if config.run:
        runs = {run: config.names[0] if config.names else run.resolve().parent.name for run in config.run}
        return [path for run, name in runs.items() for path in _drawn(name, run, run / name, config)]
    studies = sorted(path for path in config.data.glob("*") if path.is_dir())
    if not studies:
        raise ValueError(f"{config.data} must hold folders FIGURE-NAME of CSV tables: it has none.")
    unknown = set(config.names) - {study.name for study in studies}
    if unknown:
        known = ", ".join(study.name for study in studies)
        raise ValueError(f"{', '.join(sorted(unknown))} must be a study in {config.data}: there are {known}.")
    chosen = [study for study in studies if study.name in config.names or not config.names]
    with ProcessPoolExecutor(min(len(chosen), os.cpu_count() or 1)) as pool:  # a study per core
        figures, stems = [study.name.partition("-")[0] for study in chosen], [config.out / s.name for s in chosen]
        return [path for paths in pool.map(_drawn, figures, chosen, stems, repeat(config)) for path in paths]


def _drawn(figure: str, folder: Path, stem: Path, config: Config) -> list[Path]:
    if figure not in NAMES:
        raise ValueError(f"{figure} must be the name of a figure to draw {folder}: known are {', '.join(NAMES)}.")
    tables = {path.stem: pd.read_csv(path) for path in sorted(folder.glob("*.csv"))}
    if not tables:
        raise ValueError(f"{folder} must hold the CSV tables of an analysis: it has none.")
    written: list[Path] = []
    for suffix, draw in drawn(pkgutil.resolve_name(f"{__package__}.{figure}:draw")).items():
        without = None if config.titles else draw
        written += save(draw(tables), Path(f"{stem}{suffix}"), pdf=config.pdf, draw=without)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 with one line on stderr where there is nothing to draw, 141 where nobody reads the paths."""
    matplotlib.use("Agg")
    config = tyro.cli(Config, prog="python -m figures", args=argv)
    try:
        print("\n".join(map(str, draw_all(config))), flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
