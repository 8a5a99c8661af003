"""Loss and error on the lines theta_k to theta_T and between siblings, and their barriers."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from figures.style import TWO_COLUMNS, density_axis, look_of, mean_and_replicas, name_task, paper

START_END, SIBLINGS = "theta_k to theta_T", "siblings"
INDEPENDENT, MATCHED = "independent", "independent, matched"
SHADES = 5  # densities shown as curves; more cannot be told apart


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Six panels from ``paths`` and ``barriers``: one row a question, curves, then height against density and k.

    A third row where lines between init seeds were measured: before and after matching, then both barriers.
    """
    paths, barriers = tables["paths"], tables["barriers"]
    with_pairs = bool((barriers["question"] == MATCHED).any())
    with paper():
        figure, axes = plt.subplots(2 + with_pairs, 3, figsize=(TWO_COLUMNS, 4.3 + 2.1 * with_pairs))
        if with_pairs:
            _matching(axes[2], paths, barriers)
        _curves(axes[0, 0], paths, START_END, "train", "loss_nats", "training loss (nats)")
        _curves(axes[1, 0], paths, SIBLINGS, "test", "error", "test error (%)")
        _heights(axes[0, 1], _at_levels(barriers), START_END, "loss_nats", "barrier, loss (nats)")
        _heights(axes[1, 1], _at_levels(barriers), SIBLINGS, "error", "barrier, error (points)")
        dense = barriers[barriers["level"] == 0]
        _heights(axes[0, 2], dense, START_END, "loss_nats", "barrier, loss (nats)", against="rewind_step")
        _heights(axes[1, 2], dense, SIBLINGS, "error", "barrier, error (points)", against="rewind_step")
        axes[0, 0].set_title(r"$\theta_k$ ($\alpha=0$) to $\theta_T$ ($\alpha=1$)")
        axes[1, 0].set_title("two children of $\\theta_k$")
        axes[0, 1].set_title(f"tickets, k = {_rewind_step(barriers)}")
        axes[0, 2].set_title("dense networks, against k")
        n, alphas = barriers["init_seed"].nunique(), paths["alpha"].nunique()
        counts = f"{barriers['n_train'].iloc[0]} train, {barriers['n_test'].iloc[0]} test examples"
        figure.suptitle(f"{name_task(barriers)}: n = {n} replicas, {alphas} alphas, {counts}", fontsize=8)
    return figure


def _matching(row: np.ndarray, paths: pd.DataFrame, barriers: pd.DataFrame) -> None:
    """Networks of two init seeds: the line between them, before and after hidden units are matched."""
    _curves(row[0], paths, INDEPENDENT, "test", "error", "test error (%)")
    _curves(row[1], paths, MATCHED, "test", "error", "test error (%)")
    row[0].get_legend().remove()  # the curves fill the panel, and the next one names them
    row[1].set_ylim(top=1.9 * row[1].get_ylim()[1])
    row[0].set_title("two init seeds, as trained")
    row[1].set_title("two init seeds, hidden units matched")
    for question, look in ((INDEPENDENT, look_of("reinit")), (MATCHED, look_of("ticket"))):
        rows = barriers[(barriers["question"] == question) & (barriers["split"] == "test")]
        rows = rows[(rows["metric"] == "error") & (rows["baseline"] == "mean")]
        label = "as trained" if question == INDEPENDENT else "matched"
        mean_and_replicas(row[2], rows["density"], 100 * rows["barrier"], label=label, **look)
    density_axis(row[2], rows["density"].to_numpy())
    row[2].set_ylabel("barrier, error (points)")
    row[2].set_yscale("symlog", linthresh=0.1)  # matching lowers a barrier by orders of magnitude, perhaps to none
    row[2].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    row[2].set_ylim(-0.02, 3000)  # never below the mean of its ends; room for the legend
    row[2].set_yticks([0, 0.1, 1, 10, 100])
    n = rows["pairing"].nunique()
    row[2].set_title(f"test error, {n} pair{'s' if n > 1 else ''} of seeds")
    row[2].legend(title="baseline: mean", title_fontsize=7, loc="upper center", ncols=2, columnspacing=1)


def _rewind_step(table: pd.DataFrame) -> int:
    """The run's k, which every level is measured at."""
    return int(table.loc[table["level"] == table["level"].max(), "rewind_step"].iloc[0])


def _at_levels(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["rewind_step"] == _rewind_step(table)]


def _curves(axes: Axes, paths: pd.DataFrame, question: str, split: str, metric: str, ylabel: str) -> None:
    rows = _at_levels(paths)
    rows = rows[(rows["question"] == question) & (rows["split"] == split)]
    known = np.sort(rows["level"].unique())
    levels = known[np.unique(np.linspace(0, len(known) - 1, SHADES).round().astype(int))]
    for level, shade in zip(levels, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(levels))), strict=True):
        chosen = rows[rows["level"] == level]
        scale = 100 if metric == "error" else 1
        curve = scale * chosen.groupby("alpha")[metric].mean()
        axes.plot(curve.index, curve, color=shade, label=f"{100 * chosen['density'].iloc[0]:.3g} %")
    axes.set_xlabel(r"$\alpha$")
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=0)
    axes.legend(title="weights kept", title_fontsize=7, labelspacing=0.2)


def _heights(
    axes: Axes, barriers: pd.DataFrame, question: str, metric: str, ylabel: str, against: str = "density"
) -> None:
    rows = barriers[(barriers["question"] == question) & (barriers["metric"] == metric)]
    scale = 100 if metric == "error" else 1
    baseline = "mean" if question == SIBLINGS else "linear"
    steps = {k: position for position, k in enumerate(sorted(rows["rewind_step"].unique()))}  # spaced evenly
    for split, look in (("test", look_of("ticket")), ("train", look_of("reinit"))):
        chosen = rows[(rows["split"] == split) & (rows["baseline"] == baseline)]
        x = chosen["density"] if against == "density" else chosen["rewind_step"].map(steps.get)
        mean_and_replicas(axes, x, scale * chosen["barrier"], label=split, **look)
    if question == SIBLINGS:
        axes.axhline(2, color="0.4", lw=0.8, ls=":")
        axes.annotate(
            "stable below 2", (0.02, 2), xycoords=("axes fraction", "data"), va="bottom", fontsize=6.5, color="0.3"
        )
    if against == "density":
        density_axis(axes, rows["density"].to_numpy())
    else:
        axes.set_xticks(list(steps.values()), [str(k) for k in steps])
        axes.set_xlabel("k (steps)")
    axes.set_ylabel(ylabel)
    top = max(0.05, 1.1 * axes.get_ylim()[1])  # a barrier of zero is drawn as one, not on a scale of noise
    axes.set_ylim(-0.03 * top, top)
    axes.legend(title=f"baseline: {baseline}", title_fontsize=7)
