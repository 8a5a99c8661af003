"""Loss and error on the lines theta_k to theta_T and between siblings, and their barriers."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from figures.style import (
    TWO_COLUMNS,
    density_axis,
    keys,
    letter,
    mark,
    mean_and_replicas,
    name_task,
    paper,
    said,
)

START_END, SIBLINGS = "theta_k to theta_T", "siblings"
INDEPENDENT, MATCHED = "independent", "independent, matched"
NONE = 1e-3
"""Barriers below it, a tenth of a point or a thousandth of a nat, are said to be none, and not drawn on a scale of
rounding."""
SPLITS: dict[str, dict[str, object]] = {
    "test": {"color": "black", "marker": "o", "linestyle": "-"},
    "train": {"color": "0.55", "marker": "s", "linestyle": "--"},
}
SHADES = 5  # densities shown as curves; more cannot be told apart


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Four panels from ``paths`` and ``barriers``: siblings, and init seeds where lines between them were measured.

    a: barriers between siblings against density; b: of dense networks against k; c: lines between init seeds, as
    trained and matched; d: their barriers. Without init seeds c and d are of the line from theta_k to theta_T.
    """
    paths, barriers = tables["paths"], tables["barriers"]
    dense = barriers[barriers["level"] == 0]
    with paper():
        figure, axes = plt.subplots(2, 2, figsize=(TWO_COLUMNS, 5.2))
        _heights(axes[0, 0], _at_levels(barriers), SIBLINGS, "error", "barrier, error (points)")
        axes[0, 0].set_title(f"two children of $\\theta_k$, k = {_rewind_step(barriers)}")
        _heights(axes[0, 1], dense, SIBLINGS, "error", "barrier, error (points)", against="rewind_step")
        axes[0, 1].set_title("two children of $\\theta_k$, dense networks")
        if (barriers["question"] == MATCHED).any():
            _matching(axes[1], paths, barriers)
        else:
            _start_to_end(axes[1], paths, barriers)
        letter(axes.flat)
        figure.suptitle(_title(paths, barriers), fontsize=8)
    return figure


def supplement(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Four panels: the line from theta_k to theta_T, its barriers against density and k, and lines of siblings."""
    paths, barriers = tables["paths"], tables["barriers"]
    dense = barriers[barriers["level"] == 0]
    with paper():
        figure, axes = plt.subplots(2, 2, figsize=(TWO_COLUMNS, 5.2))
        _start_to_end(axes[0], paths, barriers)
        _curves(axes[1, 0], paths, SIBLINGS, "test", "error", "test error (%)")
        axes[1, 0].set_title("two children of $\\theta_k$")
        _heights(axes[1, 1], dense, START_END, "loss_nats", "barrier, loss (nats)", against="rewind_step")
        axes[1, 1].set_title(r"$\theta_k$ to $\theta_T$, dense networks")
        letter(axes.flat)
        figure.suptitle(_title(paths, barriers), fontsize=8)
    return figure


def _title(paths: pd.DataFrame, barriers: pd.DataFrame) -> str:
    n, alphas = barriers["init_seed"].nunique(), paths["alpha"].nunique()
    counts = f"{barriers['n_train'].iloc[0]} train, {barriers['n_test'].iloc[0]} test examples"
    return f"{name_task(barriers)}: n = {n} replicas, {alphas} alphas, {counts}"


def _start_to_end(row: np.ndarray, paths: pd.DataFrame, barriers: pd.DataFrame) -> None:
    _curves(row[0], paths, START_END, "train", "loss_nats", "training loss (nats)")
    row[0].set_title(r"$\theta_k$ ($\alpha=0$) to $\theta_T$ ($\alpha=1$)")
    _heights(row[1], _at_levels(barriers), START_END, "loss_nats", "barrier, loss (nats)")
    row[1].set_title(rf"$\theta_k$ to $\theta_T$, k = {_rewind_step(barriers)}")


def _matching(row: np.ndarray, paths: pd.DataFrame, barriers: pd.DataFrame) -> None:
    """Networks of two init seeds: the line between them as trained and (dashed) with hidden units matched."""
    _curves(row[0], paths, INDEPENDENT, "test", "error", "test error (%)")
    _curves(row[0], paths, MATCHED, "test", "error", "test error (%)", linestyle="--")
    row[0].set_ylim(top=1.35 * row[0].get_ylim()[1])
    row[0].legend(*keys(row[0]), title="weights kept; dashed: units matched", title_fontsize=7, ncols=3,
                  loc="upper center", columnspacing=1)  # fmt: skip
    row[0].set_title("two init seeds")
    for question, look in ((INDEPENDENT, SPLITS["test"]), (MATCHED, {**SPLITS["train"], "linestyle": ":"})):
        rows = barriers[(barriers["question"] == question) & (barriers["split"] == "test")]
        rows = rows[(rows["metric"] == "error") & (rows["baseline"] == "mean")]
        label = "as trained" if question == INDEPENDENT else "matched"
        mean_and_replicas(row[1], rows["density"], 100 * rows["barrier"], label=label, **look)
    density_axis(row[1], rows["density"].to_numpy())
    row[1].set_ylabel("barrier, error (points)")
    row[1].set_yscale("symlog", linthresh=0.1)  # matching lowers a barrier by orders of magnitude, perhaps to none
    row[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    row[1].set_ylim(-0.02, 3000)  # never below the mean of its ends; room for the legend
    row[1].set_yticks([0, 0.1, 1, 10, 100])
    n = rows["pairing"].nunique()
    row[1].set_title(f"two init seeds, test error, {n} pair{'s' if n > 1 else ''}")
    row[1].legend(title="baseline: mean", title_fontsize=7, loc="upper center", ncols=2, columnspacing=1)


def _rewind_step(table: pd.DataFrame) -> int:
    """The run's k, which every level is measured at."""
    return int(table.loc[table["level"] == table["level"].max(), "rewind_step"].iloc[0])


def _at_levels(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["rewind_step"] == _rewind_step(table)]


def _curves(
    axes: Axes, paths: pd.DataFrame, question: str, split: str, metric: str, ylabel: str, linestyle: str = "-"
) -> None:
    rows = _at_levels(paths)
    rows = rows[(rows["question"] == question) & (rows["split"] == split)]
    known = np.sort(rows["level"].unique())
    levels = known[np.unique(np.linspace(0, len(known) - 1, SHADES).round().astype(int))]
    for level, shade in zip(levels, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(levels))), strict=True):
        chosen = rows[rows["level"] == level]
        scale = 100 if metric == "error" else 1
        curve = scale * chosen.groupby("alpha")[metric].mean()
        axes.plot(curve.index, curve, linestyle, color=shade, label=f"{100 * chosen['density'].iloc[0]:.3g} %")
    axes.set_xlabel(r"$\alpha$")
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=0)
    axes.legend(title="weights kept", title_fontsize=7, labelspacing=0.2)


def _heights(
    axes: Axes, barriers: pd.DataFrame, question: str, metric: str, ylabel: str, against: str = "density"
) -> None:
    scale = 100 if metric == "error" else 1
    baseline = "mean" if question == SIBLINGS else "linear"
    rows = barriers[(barriers["question"] == question) & (barriers["metric"] == metric)]
    rows = rows[rows["baseline"] == baseline]
    if rows.groupby(["split", against])["barrier"].mean().abs().max() < NONE:
        where = "density" if against == "density" else "k"
        words = f"no barrier at any {where}:\nmeans below {scale * NONE:g} {'points' if metric == 'error' else 'nats'}"
        said(axes, words)
        return
    steps = {k: position for position, k in enumerate(sorted(rows["rewind_step"].unique()))}  # spaced evenly
    for split, look in SPLITS.items():
        chosen = rows[rows["split"] == split]
        x = chosen["density"] if against == "density" else chosen["rewind_step"].map(steps.get)
        mean_and_replicas(axes, x, scale * chosen["barrier"], label=split, **look)
    if question == SIBLINGS:
        mark(axes, 2, "stable below 2")
    if against == "density":
        density_axis(axes, rows["density"].to_numpy())
    else:
        axes.set_xticks(list(steps.values()), [str(k) for k in steps])
        axes.set_xlabel("k (steps)")
    axes.set_ylabel(ylabel)
    top = 1.35 * axes.get_ylim()[1]  # room for the legend
    axes.set_ylim(-0.03 * top, top)
    axes.legend(title=f"baseline: {baseline}", title_fontsize=7, loc="upper center", ncols=2)
