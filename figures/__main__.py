"""Draw every committed study: ``python -m figures``.

A study is a folder ``figures/data/FIGURE-NAME`` of CSV tables, as an analysis wrote them; its picture goes to
``figures/paper/FIGURE-NAME.{pdf,png}``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd
import tyro
from matplotlib.figure import Figure

from figures import (
    dynamic_sparsity,
    generalization_bounds,
    gradient_alignment,
    imp,
    instability,
    mask_overlap,
    mode_connectivity,
    ntk_spectrum,
    pruning_criteria,
    sign_and_value,
    signal_propagation,
    supermasks,
    transfer,
    transformer_tickets,
    width_sweep,
)
from figures.style import save

HERE = Path(__file__).parent
DRAW: dict[str, Callable[[Mapping[str, pd.DataFrame]], Figure]] = {
    "dynamic_sparsity": dynamic_sparsity.draw,
    "generalization_bounds": generalization_bounds.draw,
    "gradient_alignment": gradient_alignment.draw,
    "imp": imp.draw,
    "instability": instability.draw,
    "mask_overlap": mask_overlap.draw,
    "mode_connectivity": mode_connectivity.draw,
    "ntk_spectrum": ntk_spectrum.draw,
    "pruning_criteria": pruning_criteria.draw,
    "sign_and_value": sign_and_value.draw,
    "signal_propagation": signal_propagation.draw,
    "supermasks": supermasks.draw,
    "transfer": transfer.draw,
    "transformer_tickets": transformer_tickets.draw,
    "width_sweep": width_sweep.draw,
}


@dataclass(frozen=True)
class Config:
    """Draw every study in a folder of tables."""

    data: Path = HERE / "data"
    """Folder of studies."""
    out: Path = HERE / "paper"
    """Folder for pictures."""


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
        if figure not in DRAW:
            raise ValueError(f"{study} must begin with the name of a figure: known are {', '.join(DRAW)}.")
        tables = {path.stem: pd.read_csv(path) for path in sorted(study.glob("*.csv"))}
        written += save(DRAW[figure](tables), config.out / study.name)
    return written


def main() -> int:
    matplotlib.use("Agg")
    config = tyro.cli(Config, prog="python -m figures")
    try:
        paths = draw_all(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
