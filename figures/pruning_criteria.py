"""Masks of every pruning criterion: test error against density, and against what finding them costs."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from figures.style import TWO_COLUMNS, density_axis, letter, mean_and_replicas, name_task, paper

PANELS = ("before training", "early or trained", "Zhou et al.: large or small", "Zhou et al.: movement, signs")
_STYLES: tuple[dict[str, object], ...] = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "v", "linestyle": ":"},
    {"color": "#56B4E9", "marker": "x", "linestyle": (0, (5, 1, 1, 1))},
    {"color": "#E69F00", "marker": "D", "linestyle": (0, (1, 1))},
    {"color": "#6F4E37", "marker": "P", "linestyle": (0, (3, 1, 1, 1, 1, 1))},
    {"color": "#999999", "marker": "*", "linestyle": (0, (6, 2))},
)
_KNOWN = (
    ("random", "random/erk", "random/layer", "snip", "snip*10", "grasp", "synflow"),
    ("magnitude@early", "magnitude", "magnitude/layer", "obd_gauss_newton", "obd_fisher", "obd_exact"),
    ("large_final", "small_final", "large_init", "small_init", "large_init_large_final", "small_init_small_final"),
    ("magnitude_increase", "movement", "large_final_same_sign", "large_final_different_sign",
     "magnitude_increase_same_sign"),
)  # fmt: skip
LOOKS = {name: look for names in _KNOWN for name, look in zip(names, _STYLES, strict=False)}
"""Look of a method, told apart in its panel by colour, marker and dash, whatever else is drawn."""


COLORS = (*(str(style["color"]) for style in _STYLES[: len(PANELS)]), "black")
"""Of the kinds of ``PANELS``, and of IMP."""
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
BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.2), "ncol": 2, "columnspacing": 1}


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Four panels of error against density, one for each kind of criterion and each with IMP in black, on one scale."""
    table = tables["networks"]
    with paper():
        figure, axes = plt.subplots(2, 2, figsize=(TWO_COLUMNS, 6.4), sharey=True)
        for title, place in zip(PANELS, axes.flat, strict=True):
            shown = [m for m in _methods(table) if _panel(table[table["method"] == m].iloc[0]) == title]
            _against_density(place, table, title, {m: look_of_method(m) for m in shown})
        for place in axes[:, 1]:
            place.tick_params(labelleft=True)
        _percent_axis(axes[0, 0])
        letter(axes.flat)
        _title(figure, table)
    return figure


def supplement(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Two panels: error against the cost of the mask, at a middle density and at the last, on one scale."""
    table = tables["networks"]
    levels = sorted(table.loc[table["level"] > 0, "level"].unique())
    with paper():
        figure, axes = plt.subplots(1, 2, figsize=(TWO_COLUMNS, 4.2), sharey=True)
        for place, level in zip(axes, (levels[(len(levels) - 1) // 2], levels[-1]), strict=True):
            _against_cost(place, table[table["level"].isin([0, level])], level)
        axes[1].tick_params(labelleft=True)
        _percent_axis(axes[0])
        letter(axes)
        _title(figure, table)
    return figure


def _title(figure: Figure, table: pd.DataFrame) -> None:
    n, steps, k = table["init_seed"].nunique(), table["steps"].iloc[0], table["rewind_step"].iloc[0]
    about = f"{steps} steps from the weights of step {k}, early: step {table['early_step'].iloc[0]}"
    figure.suptitle(f"{name_task(table)}: {about}; mean of n = {n}, dots: replicas", fontsize=8)


def _methods(table: pd.DataFrame) -> list[str]:
    found = [m for m in table["method"].unique() if m not in ("dense", "imp")]
    return sorted(found, key=lambda m: list(LOOKS).index(m) if m in LOOKS else len(LOOKS))


def look_of_method(method: str) -> Mapping[str, object]:
    """That of ``LOOKS``, or one that follows from the name."""
    return LOOKS.get(method, _STYLES[zlib.crc32(method.encode()) % len(_STYLES)])


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
    axes.set_title(title)
    axes.set_ylabel("test error (%)")
    axes.legend(**BELOW)


def _against_cost(axes: Axes, table: pd.DataFrame, level: int) -> None:
    """Mean error of each method over the cost of its mask, by kind; numbered where none is cheaper and as accurate."""
    dense = table.loc[table["method"] == "dense", "test_error"].mean()
    axes.axhline(100 * dense, color="0.6", lw=1, label="dense, mean")
    rows = table[table["level"] == level]
    means = rows.groupby("method")[["dense_trainings", "test_error"]].mean().dropna()
    kinds = {m: "IMP" if m == "imp" else _panel(rows[rows["method"] == m].iloc[0]) for m in means.index}
    for kind, color, marker in zip((*PANELS, "IMP"), COLORS, "os^vX", strict=True):
        own = means[[kinds[m] == kind for m in means.index]]
        axes.plot(own["dense_trainings"], 100 * own["test_error"], marker, color=color, ms=4, label=kind)
    for number, method in enumerate(_frontier(means), 1):
        spent, error = means.loc[method]
        axes.annotate(str(number), (spent, 100 * error), (0, -4), textcoords="offset points", fontsize=6, ha="center",
                      va="top", weight="bold")  # fmt: skip
        axes.plot([], [], linestyle="none", marker=f"${number}$", color="black", ms=4, label=_label(method))
    axes.set_xscale("symlog", linthresh=1e-4, linscale=0.5)
    axes.set_xlim(-3e-5, 100)
    axes.set_xticks([0, 1e-3, 1e-2, 0.1, 1, 10], ["0", "", "0.01", "", "1", "10"])
    axes.minorticks_off()
    axes.set_xlabel("cost of mask (dense trainings)")
    axes.set_ylabel("test error (%)")
    axes.set_title(f"at {100 * rows['level_density'].iloc[0]:.2g} % of the weights")
    axes.legend(**BELOW)


def _frontier(means: pd.DataFrame) -> list[str]:
    """Methods that no cheaper one is as accurate as, from the cheapest on; costs beside a training are rounded."""
    about = means["dense_trainings"].mask(lambda cost: cost > 0.5, means["dense_trainings"].round(1))
    ordered = means.assign(about=about).sort_values(["about", "test_error"])["test_error"]
    return [str(m) for m in ordered.index[ordered <= ordered.cummin()] if m != "imp"]


def _label(method: str) -> str:
    return LABELS.get(method, method.replace("_", " "))


def _percent_axis(axes: Axes) -> None:
    """The scale of all panels, up to that of networks that are no better than chance."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(0.85 * low, min(110, high))
    ticks = (1, 2, 5, 10, 20, 50, 100) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 70, 100)
    axes.set_yticks([t for t in ticks if 0.85 * low <= t <= min(110, high)])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
