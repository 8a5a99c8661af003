"""Accuracy and early stopping of tickets and controls against density."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.style import (
    ABOVE,
    TWO_COLUMNS,
    density_axis,
    label_of,
    letter,
    log_axis,
    look_of,
    mark,
    mean_and_replicas,
    name_task,
    paper,
    said,
    treatments,
)


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Two panels from ``levels`` (one row per level and replica): test error and early-stop step.

    Lines are means over replicas, dots are the replicas, the band is the dense networks' mean +- one standard
    deviation.
    """
    table = tables["levels"]
    with paper():
        figure, (left, right) = plt.subplots(1, 2, figsize=(TWO_COLUMNS, 3.1))
        _panel(left, table, "test_error", 100, "test error at the end (%)")
        steps = int((table["first_step"] + table["steps"]).max())
        _early_stop(right, table, steps)
        log_axis(left)
        n = table["init_seed"].nunique()
        left.legend(title=f"mean of n = {n}, dots: replicas", title_fontsize=7, ncols=2, **ABOVE)
        letter((left, right))
        figure.suptitle(f"{name_task(table)}: {steps} steps, rewound to step {table['first_step'].max()}", fontsize=8)
    return figure


def _early_stop(axes: Axes, table: pd.DataFrame, steps: int) -> None:
    if (table["early_stop_step"] == steps).all():
        words = f"the validation loss of every network\nis least at the last step, {steps}"
        said(axes, words)
        return
    _panel(axes, table, "early_stop_step", 1, "step of least validation loss")
    mark(axes, steps, "last step of training")
    axes.set_ylim(0, 1.05 * steps)


def _panel(axes: Axes, table: pd.DataFrame, column: str, scale: float, ylabel: str) -> None:
    dense = scale * table.loc[table["level"] == 0, column].astype(float)
    spread = dense.std() if len(dense) > 1 else 0.0
    axes.axhspan(dense.mean() - spread, dense.mean() + spread, color="0.85", lw=0, label="dense, mean ± sd")
    densities = table.loc[table["treatment"] == "ticket"].groupby("level")["density"].first()
    for treatment in [t for t in treatments(table) if t != "sibling"]:
        rows = table[(table["treatment"] == treatment) | (table["level"] == 0)]
        # Where a control keeps all weights, it still stands at the density of its level.
        x = rows["level"].map(densities)
        mean_and_replicas(axes, x, scale * rows[column].astype(float), label=label_of(treatment), **look_of(treatment))
    density_axis(axes, np.asarray(densities))
    axes.set_ylabel(ylabel)
