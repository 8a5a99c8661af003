"""Which part of a ticket's start matters: signs, values, or what pruned weights become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.style import TWO_COLUMNS, density_axis, label_of, letter, look_of, mean_and_replicas, name_task, paper

KEPT = ("ticket", "reinit_keep_sign", "reshuffle_keep_sign", "signed_constant")
LOST = ("reinit", "reshuffle", "random_sign", "random_constant")
PRUNED = ("ticket", "frozen_init", "frozen_unless_shrunk", "fine_tune", "lr_rewind")
BLUE, VERMILION, GREY = "#0072B2", "#D55E00", "0.45"
BELOW: dict[str, Any] = {"fontsize": 6, "loc": "upper center", "bbox_to_anchor": (0.5, -0.18)}  # hides nothing there
SHADES = {**dict.fromkeys(KEPT, BLUE), **dict.fromkeys(LOST, VERMILION)}


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Three panels from ``starts``: signs against density, pruned weights against density, all at the sparsest level.

    Lines are means over replicas, dots are the replicas.
    """
    table = tables["starts"]
    with paper():
        figure, axes = plt.subplots(1, 3, figsize=(TWO_COLUMNS, 3.9), width_ratios=(1, 1, 0.8))
        figure.set_layout_engine("constrained", w_pad=0.1)
        _signs(axes[0], table)
        _pruned(axes[1], table)
        _sparsest(axes[2], table)
        letter(axes)
        n, steps = table["init_seed"].nunique(), int((table["first_step"] + table["steps"]).max())
        figure.suptitle(f"{name_task(table)}: n = {n} per start, means and replicas, {steps} steps", fontsize=8)
    return figure


def _signs(axes: Axes, table: pd.DataFrame) -> None:
    """Every start on the ticket's mask: blue keeps the signs, vermilion draws them anew."""
    for group, dashes in ((KEPT, "-"), (LOST, "--")):
        for treatment in _shown(table, group):
            look = {**look_of(treatment), "color": SHADES[treatment], "linestyle": dashes}
            _against_density(axes, table, treatment, look)
    axes.legend(title="solid: signs kept; dashed: lost", title_fontsize=6, **BELOW)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("test error at the end (%)")
    axes.set_title("signs and values")


def _pruned(axes: Axes, table: pd.DataFrame) -> None:
    for treatment in _shown(table, PRUNED):
        _against_density(axes, table, treatment, look_of(treatment), "pruned weights zero" * (treatment == "ticket"))
    axes.set_ylim(bottom=0)
    axes.legend(**BELOW)
    axes.set_title("what pruned weights become")


def _sparsest(axes: Axes, table: pd.DataFrame) -> None:
    """Every start at the sparsest level, the best on top."""
    last = table[table["level"] == table["level"].max()]
    order = last.groupby("treatment")["test_error"].mean().sort_values(ascending=False).index
    for place, treatment in enumerate(order):
        errors = 100 * last.loc[last["treatment"] == treatment, "test_error"]
        color, marker = SHADES.get(treatment, GREY), "s" if treatment in LOST else "o"
        face = "white" if treatment in LOST else color
        axes.plot(errors, [place] * len(errors), linestyle="none", marker=marker, color=color, markerfacecolor=face)
        axes.plot([errors.mean()] * 2, [place - 0.3, place + 0.3], color="black", linewidth=1.2)
    axes.set_yticks(range(len(order)), [label_of(t) for t in order], fontsize=6)
    axes.set_xlabel("test error at the end (%)")
    axes.set_xlim(left=0)
    density = last.loc[last["treatment"] == "ticket", "density"].iloc[0]
    axes.set_title(f"at {100 * density:.2g} % of the weights")
    marks = [Line2D([], [], linestyle="none", marker="o", color=BLUE, label="signs kept")]
    marks += [Line2D([], [], linestyle="none", marker="s", color=VERMILION, markerfacecolor="white", label="lost")]
    axes.legend(handles=marks, **BELOW)


def _shown(table: pd.DataFrame, treatments: Sequence[str]) -> list[str]:
    return [t for t in treatments if t in set(table["treatment"])]


def _against_density(
    axes: Axes, table: pd.DataFrame, treatment: str, look: Mapping[str, object], label: str = ""
) -> None:
    rows = table[(table["treatment"] == treatment) | (table["level"] == 0)]
    mean_and_replicas(axes, rows["density"], 100 * rows["test_error"], label=label or label_of(treatment), **look)
    density_axis(axes, np.asarray(table["density"]))
