"""Masks of every pruning criterion: test error against density, and against what finding them costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from figures.style import TWO_COLUMNS, density_axis, mean_and_replicas, name_task, paper

# Told apart by colour, marker and dash; a panel holds at most as many methods.
LOOKS: tuple[dict[str, object], ...] = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "v", "linestyle": ":"},
    {"color": "#56B4E9", "marker": "x", "linestyle": (0, (5, 1, 1, 1))},
    {"color": "#E69F00", "marker": "D", "linestyle": (0, (1, 1))},
    {"color": "#6F4E37", "marker": "P", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
    {"color": "#999999", "marker": "*", "linestyle": (0, (6, 2))},
)
PANELS = ("before training", "early or trained", "Zhou et al.: large or small", "Zhou et al.: movement, signs")


LABELS = {
    "imp": "IMP",
    "large_init_large_final": "large at both ends",
    "small_init_small_final": "small at both ends",
    "large_final_same_sign": "large final, same sign",
    "large_final_different_sign": "large final, other sign",
    "magnitude_increase": "increase",
    "magnitude_increase_same_sign": "increase, same sign",
    "obd_gauss_newton": "OBD, Gauss-Newton",
    "obd_fisher": "OBD, Fisher",
}
BELOW: dict[str, Any] = {
    **{"loc": "upper center", "bbox_to_anchor": (0.42, -0.22), "fontsize": 5.5},
    **{"ncol": 2, "columnspacing": 0.5, "handlelength": 1.8, "handletextpad": 0.4},
}


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Four panels of error against density, each with IMP in black, and two of error against cost at one density."""
    table = tables["networks"]
    methods = [m for m in table["method"].unique() if m not in ("dense", "imp")]
    with paper():
        figure, axes = plt.subplots(2, 3, figsize=(TWO_COLUMNS, 6.0))
        places = dict(zip(PANELS, (axes[0, 0], axes[0, 1], axes[1, 0], axes[1, 1]), strict=True))
        for title, place in places.items():
            shown = [m for m in methods if _panel(table[table["method"] == m].iloc[0]) == title]
            _against_density(place, table, title, {m: LOOKS[i % len(LOOKS)] for i, m in enumerate(shown)})
        levels = sorted(table.loc[table["level"] > 0, "level"].unique())
        for place, level in zip(axes[:, 2], (levels[(len(levels) - 1) // 2], levels[-1]), strict=True):
            _against_cost(place, table[table["level"].isin([0, level])], level)
        n, steps, k = table["init_seed"].nunique(), table["steps"].iloc[0], table["rewind_step"].iloc[0]
        about = f"{steps} steps from the weights of step {k}, early: step {table['early_step'].iloc[0]}"
        figure.suptitle(f"{name_task(table)}: {about}; mean of n = {n}, dots: replicas", fontsize=8)
    return figure


def _panel(method: pd.Series) -> str:
    if method["criterion"] in ("magnitude_increase", "movement") or method["criterion"].endswith("_sign"):
        return PANELS[3]
    if method["criterion"].startswith(("large_", "small_")):
        return PANELS[2]
    return PANELS[0] if method["stage"] == "init" else PANELS[1]


def _against_density(axes: Axes, table: pd.DataFrame, title: str, looks: Mapping[str, Mapping[str, object]]) -> None:
    dense, imp = (table[table["method"] == m] for m in ("dense", "imp"))
    error = 100 * dense["test_error"]
    spread = error.std() if len(error) > 1 else 0.0
    axes.axhspan(error.mean() - spread, error.mean() + spread, color="0.85", lw=0, label="dense, mean ± sd")
    for method, look in looks.items():
        rows = table[table["method"] == method]
        mean_and_replicas(axes, rows["level_density"], 100 * rows["test_error"], label=_label(method), **look)
        for density in rows.loc[rows["cuts_the_network"].astype(bool), "level_density"].unique():
            axes.plot(density, 0.97, "x", color=look["color"], transform=axes.get_xaxis_transform())
    mean_and_replicas(
        axes,
        imp["level_density"],
        100 * imp["test_error"],
        label="IMP",
        color="black",
        marker=".",
        linestyle="-",
        linewidth=1.6,
    )
    density_axis(axes, table["level_density"].to_numpy())
    axes.set_xlim(left=1.15 * imp["level_density"].max())
    _percent_axis(axes)
    axes.set_title(title)
    axes.set_ylabel("test error (%)")
    axes.legend(**BELOW)


def _against_cost(axes: Axes, table: pd.DataFrame, level: int) -> None:
    """Mean error of each method over the cost of its mask, by kind; named where none is cheaper and as accurate."""
    dense = table.loc[table["method"] == "dense", "test_error"].mean()
    axes.axhline(100 * dense, color="0.6", lw=1, label="dense, mean")
    rows = table[table["level"] == level]
    means = rows.groupby("method")[["dense_trainings", "test_error"]].mean().dropna()
    about = means["dense_trainings"].mask(lambda cost: cost > 0.5, means["dense_trainings"].round(1))
    means = means.assign(about=about).sort_values(["about", "test_error"])
    best = math.inf
    for method, (spent, error, _) in means.iterrows():
        kind = "IMP" if method == "imp" else _panel(rows[rows["method"] == method].iloc[0])
        look = {"color": "black", "marker": "."} if kind == "IMP" else LOOKS[PANELS.index(kind)]
        axes.plot(spent, 100 * error, linestyle="none", color=look["color"], marker=look["marker"], ms=4, label=kind)
        if error < best:
            best = error
            place: dict[str, Any] = {"xytext": (0, -6), "ha": "center", "va": "top"}  # below
            if spent < 1e-5:
                place = {"xytext": (3, 3), "ha": "left", "va": "bottom"}
            elif spent > 0.5:
                place = {"xytext": (-4, 0), "ha": "right", "va": "center"}
            if kind == "IMP":
                place = {"xytext": (0, 3), "ha": "center", "va": "bottom"}
            axes.annotate(_label(str(method)), (spent, 100 * error), textcoords="offset points", fontsize=5.5, **place)
    axes.set_xscale("symlog", linthresh=1e-4, linscale=0.5)
    axes.set_xlim(-1e-4, 100)
    axes.set_xticks([0, 1e-3, 1e-2, 0.1, 1, 10], ["0", "", "0.01", "", "1", "10"])
    axes.minorticks_off()
    axes.set_xlabel("cost of mask (dense trainings)")
    axes.set_ylabel("test error (%)")
    axes.margins(y=0.12)
    _percent_axis(axes)
    axes.set_title(f"at {100 * rows['level_density'].iloc[0]:.2g} % of the weights")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), **BELOW)


def _label(method: str) -> str:
    return LABELS.get(method, method.replace("_", " "))


def _percent_axis(axes: Axes) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = (1, 2, 5, 10, 20, 50, 100) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100)
    axes.set_yticks([t for t in ticks if low <= t <= high])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
