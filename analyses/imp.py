"""Find tickets by iterative magnitude pruning: accuracy and early stopping against density, beside the controls.

With no arguments it runs on the bundled digits in a few minutes. A run is stored as it goes: stopped and
started again it goes on where it was, and a finished one is only read.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pandas as pd

from analyses.command import OfRun, Tables, main, open_run
from figures.imp import draw
from ticketlab.printed import across


@dataclass(frozen=True)
class Config(OfRun):
    """Find tickets by iterative magnitude pruning and show accuracy and early stopping against density."""


def run(config: Config) -> Tables:
    """One row per level and replica: what ``Level.metrics`` holds, with the names of task and model."""
    study, _, _, levels = open_run(config)
    table = pd.concat([level.metrics for level in levels], ignore_index=True)
    table.insert(0, "task", study.task)
    table.insert(1, "model", study.model)
    return {"levels": table}


def summary(tables: Tables) -> pd.DataFrame:
    """Test error in percent per level and treatment: mean ± sd over n networks."""
    table = tables["levels"]
    density = table[table["treatment"] == "ticket"].groupby("level")["density"].first()
    table = table.assign(density=table["level"].map(density))
    return across(table, ["level", "density"], "treatment", "test_error")


if __name__ == "__main__":
    sys.exit(main("imp", Config, run, draw, summary))
