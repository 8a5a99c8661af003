"""Draw every committed study: ``python -m figures``.

A study is a folder ``figures/data/FIGURE-NAME`` of CSV tables, as an analysis wrote them; its picture goes to
``figures/paper/FIGURE-NAME.png``, and what its main figure leaves out to ``FIGURE-NAME-supplement.png``.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
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
    """Draw every study in a folder of tables."""

    data: Path = HOME / "data"
    """Folder of studies."""
    out: Path = HOME / "paper"
    """Folder for pictures."""
    pdf: bool = False
    """PDFs beside the PNGs."""
    titles: bool = True
    """Titles over figures, where no caption stands in for them."""


def draw_all(config: Config) -> list[Path]:
    """Draw each study whose folder begins with the name of a figure.

    Raises:
        ValueError: No such folder, or one of no known figure.
    """
    studies = sorted(path for path in config.data.glob("*") if path.is_dir())
    if not studies:
        raise ValueError(f"{config.data} must hold folders FIGURE-NAME of CSV tables: it has none.")
    written: list[Path] = []
    for study in studies:
        figure = study.name.partition("-")[0]
        if figure not in NAMES:
            raise ValueError(f"{study} must begin with the name of a figure: known are {', '.join(NAMES)}.")
        tables = {path.stem: pd.read_csv(path) for path in sorted(study.glob("*.csv"))}
        for suffix, draw in drawn(pkgutil.resolve_name(f"{__package__}.{figure}:draw")).items():
            stem = config.out / f"{study.name}{suffix}"
            written += save(draw(tables), stem, pdf=config.pdf, titles=config.titles)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one line on stderr where there is nothing to draw."""
    matplotlib.use("Agg")
    config = tyro.cli(Config, prog="python -m figures", args=argv)
    try:
        paths = draw_all(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
