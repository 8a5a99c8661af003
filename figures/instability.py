"""Instability against the rewind step: barriers between children of theta_k, and their accuracies."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures import style
from figures.style import (
    TWO_COLUMNS,
    below,
    density_axis,
    label_of,
    letter,
    look_of,
    mark,
    mean_and_replicas,
    name_task,
    paper,
)

STABLE = 2.0  # points of error
DENSE: dict[str, object] = {**style.DENSE, "marker": "D"}


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Four panels from ``children``, ``networks`` and ``claims``.

    a: error barriers between children against k; b: their test error, both of dense networks and of the level that
    has children at most k; c: error above the dense network against instability, every cell a point; d: tickets and
    controls against density, for the first and the last k of which every level is there.
    """
    children, networks = tables["children"], tables["networks"]
    steps = children[children["level"] > 0].groupby("level")["rewind_step"].nunique()
    level = steps[steps == steps.max()].index.max()
    shown = children[children["level"].isin([0, level])]
    with paper():
        figure, axes = plt.subplots(2, 2, figsize=(TWO_COLUMNS, 5.0))
        _against_k(axes[0, 0], shown, 100 * shown["test_barrier_error"], "barrier of children (points)")
        mark(axes[0, 0], STABLE, "stable below 2")
        axes[0, 0].set_ylim(min(0.0, axes[0, 0].get_ylim()[0]), max(1.25 * STABLE, axes[0, 0].get_ylim()[1]))
        error = 50 * (shown["test_error_a"] + shown["test_error_b"])
        _against_k(axes[0, 1], shown, error, "test error of the children (%)")
        _claims(axes[1, 0], tables["claims"])
        _against_density(axes[1, 1], networks)
        letter(axes.flat)
        below(figure, axes[0, 0])
        density = 100 * shown.loc[shown["level"] == level, "density"].iloc[0]
        n = children["init_seed"].nunique()
        figure.suptitle(
            f"{name_task(children)}: subnetworks keep {density:.3g} % in a and b, n = {n} seeds", fontsize=8
        )
    return figure


def _against_k(axes: Axes, children: pd.DataFrame, values: pd.Series, label: str) -> None:
    """Steps spaced evenly, for 0 has no logarithm."""
    places = {k: i for i, k in enumerate(sorted(children["rewind_step"].unique()))}
    for treatment in dict.fromkeys(children["treatment"]):
        rows = children["treatment"] == treatment
        look, name = (DENSE, "dense") if treatment == "dense" else (look_of(treatment), label_of(treatment))
        mean_and_replicas(axes, children.loc[rows, "rewind_step"].map(places.get), values[rows], label=name, **look)
    axes.set_xticks(list(places.values()), [str(k) for k in places])
    axes.set_xlabel("rewind step k")
    axes.set_ylabel(label)


def _claims(axes: Axes, claims: pd.DataFrame) -> None:
    for treatment in dict.fromkeys(claims["treatment"]):
        rows = claims[claims["treatment"] == treatment]
        look = DENSE if treatment == "dense" else look_of(treatment)
        axes.plot(
            100 * rows["instability"],
            100 * rows["error_above_dense"],
            linestyle="none",
            marker=str(look["marker"]),
            color=str(look["color"]),
        )
    axes.axvline(STABLE, color="0.4", lw=0.8, ls=":")
    mark(axes, 100 * claims["dense_sd"].iloc[0], "1 sd of dense")
    axes.set_xlabel("instability (points of error)")
    axes.set_ylabel("test error above dense (points)")


def _against_density(axes: Axes, networks: pd.DataFrame) -> None:
    """Tickets rewound to the first and to the last k that went as deep; controls of the last."""
    depth = networks.groupby("rewind_step")["level"].max()
    steps = sorted(depth[depth == depth.max()].index)
    for k, fill in zip(dict.fromkeys((steps[0], steps[-1])), ("none", "full"), strict=False):
        rows = networks[networks["rewind_step"] == k]
        names = [t for t in dict.fromkeys(rows["treatment"]) if t == "ticket" or k == steps[-1]]
        for treatment in names:
            chosen = rows[(rows["treatment"] == treatment) | (rows["level"] == 0)]
            look = {**look_of(treatment), "fillstyle": fill}
            label = f"ticket, k = {k}" if treatment == "ticket" else "_"
            mean_and_replicas(axes, chosen["level_density"], 100 * chosen["test_error"], label=label, **look)
    density_axis(axes, networks.loc[networks["rewind_step"].isin(steps), "level_density"].to_numpy())
    axes.set_ylabel("test error (%)")
    axes.legend()
