"""What generalisation bounds certify about tickets and their controls, and what the quoted formula says."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.style import (
    TWO_COLUMNS,
    below,
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
    """Four panels: certificates of coded networks and their terms, of masks on untrained weights, and the formula."""
    table = tables["bounds"]
    with paper():
        figure, axes = plt.subplots(2, 2, figsize=(TWO_COLUMNS, 5.6))
        _certificates(axes[0, 0], table, "quantised", "trained, weights rounded to few values: certificate")
        if axes[0, 0].lines:
            below(figure, axes[0, 0])
        letter(axes.flat)
        _terms(axes[0, 1], table)
        _certificates(axes[1, 0], table, "untrained", "masks on untrained weights: certificate")
        _formula(axes[1, 1], table)
        n, delta = table["init_seed"].nunique(), table["delta"].iloc[0]
        sample = f"{table['n_train'].iloc[0]:,} training examples, $\\delta$ = {delta:g}"
        figure.suptitle(f"Generalisation bounds, {name_task(table)}: n = {n} replicas, {sample}", fontsize=8)
    return figure


def _certificates(axes: Axes, table: pd.DataFrame, hypothesis: str, title: str) -> None:
    """The certified error (filled) and the true test error of the same networks (open)."""
    shown = table[table["hypothesis"] == hypothesis]
    if shown.empty:
        said(axes, f"{title.partition(':')[0]}:\nnone, for no seed describes weights\nthat were trained to step k > 0")
        return
    for treatment in treatments(shown):
        rows = shown[(shown["treatment"] == treatment) | (shown["level"] == 0)]
        certified = rows[rows["bound"] == "binomial_tail"]
        look = look_of(treatment)
        mean_and_replicas(axes, certified["level_density"], 100 * certified["value"], label=label_of(treatment), **look)
        true = 100 * certified.groupby("level_density")["test_error"].mean()
        axes.plot(true.index, true, markerfacecolor="white", **look)  # type: ignore[arg-type]
    _finish(axes, table, title)
    axes.set_ylim(0, 104)
    axes.set_ylabel("test error (%)\nfilled: certified, open: true")


def _terms(axes: Axes, table: pd.DataFrame) -> None:
    """What the certificates of the quantised networks are made of; the held-out bound beside them."""
    shown = table[(table["hypothesis"] == "quantised") & (table["bound"] == "binomial_tail")]
    for treatment in treatments(shown):
        rows = shown[(shown["treatment"] == treatment) | (shown["level"] == 0)]
        look = look_of(treatment)
        for term, face in (("complexity", look["color"]), ("empirical", "white")):
            mean = 100 * rows.groupby("level_density")[term].mean()
            axes.plot(mean.index, mean, markerfacecolor=face, **look)  # type: ignore[arg-type]
    _finish(axes, table, "its two terms")
    axes.set_ylim(0, 104)
    axes.set_ylabel("terms of the certificate (%)\nfilled: complexity, open: training")


def _formula(axes: Axes, table: pd.DataFrame) -> None:
    """k ln d beside certificates of the same tickets, where they have any, and the test set's own bound."""
    tickets = table[table["treatment"] == "ticket"]
    shown = (
        ("trained", "mdl", "formula $k\\,\\ln d$ on trained weights:\nno certificate", "#000000", "x", "--"),
        ("trained", "binomial_tail", "certificate, float32 weights", "#D55E00", "s", "-."),
        ("quantised", "binomial_tail", "certificate, few values", "#0072B2", "o", "-"),
        ("quantised", "held_out", "held-out bound, few values", "#009E73", "^", ":"),
    )
    for hypothesis, bound, label, color, marker, line in shown:
        rows = tickets[(tickets["hypothesis"] == hypothesis) & (tickets["bound"] == bound)]
        look = {"color": color, "marker": marker, "linestyle": line}
        mean_and_replicas(axes, rows["level_density"], 100 * rows["value"], label=label, **look)
    _finish(axes, table, "tickets: formula and certificates")
    log_axis(axes)
    axes.set_ylabel("bound on the test error (%)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, fontsize=6)


def _finish(axes: Axes, table: pd.DataFrame, title: str) -> None:
    chance = 100 * (1 - 1 / table["n_classes"].iloc[0])
    density_axis(axes, table["level_density"].to_numpy())
    mark(axes, chance, "chance")
    axes.set_title(title, fontsize=7)
