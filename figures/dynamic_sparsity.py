"""Test error of dynamic sparse training, gradual pruning and tickets, against density and against training cost."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from figures.style import TWO_COLUMNS, density_axis, letter, mean_and_replicas, name_task, paper

LOOKS: dict[str, dict[str, object]] = {
    "imp": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "gradual": {"color": "#009E73", "marker": "^", "linestyle": "-."},
    "rigl": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "set": {"color": "#CC79A7", "marker": "v", "linestyle": ":"},
    "static": {"color": "#56B4E9", "marker": "x", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
}
LABELS = {"imp": "IMP ticket", "gradual": "gradual pruning", "rigl": "RigL", "set": "SET", "static": "static"}
LENGTHS = {"": "steps of one level", "_steps": "steps of all of IMP", "_macs": "multiply-adds of all of IMP"}
"""What follows a method's name, and how long it was trained."""


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Panels from ``networks``: error against density, one for each length of training, and error against cost."""
    networks = tables["networks"]
    lengths = [end for end in LENGTHS if f"rigl{end}" in set(networks["method"])]
    with paper():
        figure, axes = plt.subplots(1, len(lengths) + 1, figsize=(TWO_COLUMNS, 2.9), sharey=True, squeeze=False)
        for place, end in zip(axes[0], lengths, strict=False):
            _against_density(place, networks, end)
        _against_cost(axes[0, -1], networks, lengths)
        axes[0, 0].set_ylabel("test error (%)")
        for place in axes[0]:
            place.tick_params(labelleft=True)
        letter(axes[0])
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        n, every = networks["init_seed"].nunique(), networks["update_every"].iloc[0]
        figure.suptitle(
            f"{name_task(networks)}: n = {n} seeds (small dots), masks updated every {every} steps, "
            "as many live weights in all methods",
            fontsize=8,
        )
    return figure


def _against_density(axes: Axes, networks: pd.DataFrame, end: str) -> None:
    for method, look in LOOKS.items():
        rows = networks[networks["method"] == (method if method == "imp" else method + end)]
        if len(rows):
            mean_and_replicas(axes, rows["density"], 100 * rows["test_error"], label=LABELS[method], **look)
    dense = networks[networks["method"] == "dense"]
    axes.axhline(100 * dense["test_error"].mean(), color="0.5", linewidth=0.9, label="dense network")
    sparse = networks.loc[networks["method"] != "dense", "density"].to_numpy()
    density_axis(axes, sparse)
    axes.set_xlim(1.15 * sparse.max(), 0.87 * sparse.min())
    axes.set_xticks(sorted(np.unique(sparse)))
    axes.set_title(f"trained for the {LENGTHS[end]}", fontsize=7)


def _against_cost(axes: Axes, networks: pd.DataFrame, lengths: list[str]) -> None:
    """Each method's means, joined through the densities; most go from sparse on the left to dense on the right."""
    for method, look in LOOKS.items():
        for end in lengths:
            rows = networks[networks["method"] == method + end]
            mean = rows.groupby("density")[["dense_trainings", "test_error"]].mean()
            face = {"markerfacecolor": "white", "alpha": 0.6} if end else {}
            axes.plot(mean["dense_trainings"], 100 * mean["test_error"], **look | face)  # type: ignore[arg-type]
    axes.axhline(100 * networks.loc[networks["method"] == "dense", "test_error"].mean(), color="0.5", linewidth=0.9)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.set_xlabel("multiply-adds, in dense trainings")
    axes.set_title("against cost" + ("; pale: longer" if any(lengths) else ""), fontsize=7)
