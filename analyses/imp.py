"""Find tickets by iterative magnitude pruning: accuracy and early stopping against density, beside the controls.

With no arguments it runs on the bundled digits in well under a minute. A run is stored as it goes: stopped and
started again it goes on where it was, and a finished one is only read.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro

import ticketlab as tl
from analyses.command import DIGITS, Tables, main
from figures.imp import draw


@dataclass(frozen=True)
class Config:
    """Find tickets by iterative magnitude pruning and show accuracy and early stopping against density."""

    study: Annotated[tl.ImpConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: DIGITS)
    store: Path = Path("runs")
    """Folder of run directories."""
    out: Path = Path("results")
    """Folder for tables and figures."""
    device: str | None = None
    """Such as cpu or cuda:1; None: a CUDA device if there is one."""


def run(config: Config) -> Tables:
    """One row a level and replica: what ``Level.metrics`` holds, with the names of task and model."""
    folder = tl.run_folder(config.study, config.store)
    print(f"run: {folder}", file=sys.stderr)
    levels = list(tl.imp(config.study, store=config.store, device=config.device))
    table = pd.concat([level.metrics for level in levels], ignore_index=True)
    table.insert(0, "task", config.study.task)
    table.insert(1, "model", config.study.model)
    return {"levels": table}


def summary(tables: Tables) -> pd.DataFrame:
    """Mean test error in percent, one row a level and one column a treatment."""
    table = tables["levels"]
    wide = 100 * table.pivot_table(index="level", columns="treatment", values="test_error", sort=False)
    density = table[table["treatment"] == "ticket"].groupby("level")["density"].first()
    wide.insert(0, "density", density)
    return wide.rename(columns={c: f"{c}_test_error_%" for c in wide if c != "density"}).reset_index()


if __name__ == "__main__":
    sys.exit(main("imp", Config, run, draw, summary))
