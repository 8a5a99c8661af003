"""Test error of dynamic sparse training, gradual pruning and tickets, against density and against training cost."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from figures.style import TWO_COLUMNS, density_axis, mean_and_replicas, name_task, paper

LOOKS: dict[str, dict[str, object]] = {
    "imp": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "gradual": {"color": "#009E73", "marker": "^", "linestyle": "-."},
    "rigl_steps": {"color": "#000000", "marker": "P", "linestyle": (0, (5, 1, 1, 1))},
    "rigl_macs": {"color": "#000000", "marker": "*", "linestyle": (0, (1, 1))},
    "rigl": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "set": {"color": "#CC79A7", "marker": "v", "linestyle": ":"},
    "static": {"color": "#56B4E9", "marker": "x", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
}
LABELS = {
    "imp": "IMP ticket",
    "gradual": "gradual pruning",
    "rigl_steps": "RigL, IMP's steps",
    "rigl_macs": "RigL, IMP's multiply-adds",
    "rigl": "RigL",
    "set": "SET",
    "static": "static",
}


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Two panels from ``networks``: error against density, and against cost with one line a density."""
    networks = tables["networks"]
    with paper():
        figure, (left, right) = plt.subplots(1, 2, figsize=(TWO_COLUMNS, 2.9), sharey=True)
        _against_density(left, networks)
        _against_cost(right, networks)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) // 2 + 1)
        n, every = networks["init_seed"].nunique(), networks["update_every"].iloc[0]
        figure.suptitle(
            f"{name_task(networks)}: n = {n} seeds (small dots), masks updated every {every} steps, "
            "as many live weights in all methods",
            fontsize=8,
        )
    return figure


def _against_density(axes: Axes, networks: pd.DataFrame) -> None:
    for method in (m for m in LOOKS if m in set(networks["method"])):
        rows = networks[networks["method"] == method]
        mean_and_replicas(axes, rows["density"], 100 * rows["test_error"], label=LABELS[method], **LOOKS[method])
    dense = networks[networks["method"] == "dense"]
    axes.axhline(100 * dense["test_error"].mean(), color="0.5", linewidth=0.9, label="dense network")
    sparse = networks.loc[networks["method"] != "dense", "density"].to_numpy()
    density_axis(axes, sparse)
    axes.set_xlim(1.15 * sparse.max(), 0.87 * sparse.min())
    axes.set_xticks(sorted(np.unique(sparse)))
    axes.set_ylabel("test error (%)")
    axes.set_title("Equal density")


def _against_cost(axes: Axes, networks: pd.DataFrame) -> None:
    """Each method's means, joined through the densities; left to right, most methods go from sparse to dense."""
    for method in (m for m in LOOKS if m in set(networks["method"])):
        rows = networks[networks["method"] == method]
        mean = rows.groupby("density")[["dense_trainings", "test_error"]].mean()
        axes.plot(mean["dense_trainings"], 100 * mean["test_error"], **LOOKS[method])  # type: ignore[arg-type]
    axes.axhline(100 * networks.loc[networks["method"] == "dense", "test_error"].mean(), color="0.5", linewidth=0.9)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.set_xlabel("multiply-adds of training, in dense trainings")
    axes.set_title("Against cost; a line joins the densities")
