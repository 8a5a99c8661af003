"""First gradients of tickets and their controls, and what they foretell of the final accuracy."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.style import (
    TWO_COLUMNS,
    against_density,
    density_axis,
    look_of,
    name_task,
    paper,
    treatments,
)

PANELS = {
    "norm_per_live_weight": "gradient norm\nper live weight (nats)",
    "cosine_with_dense": "cosine with the\ndense gradient",
    "cosine_with_displacement": "cosine of $-g$ with\n$\\theta_T - \\theta$",
    "signal_to_noise": "signal to noise\n$\\|E g\\|^2$ / tr Cov $g$",
    "realised_nats": "loss decrease (nats;\nopen: $\\eta \\|g\\|^2$)",
    "gradient_share": "share of $\\|g\\|^2$ in\nthe top NTK modes",
}
MEASURES = {
    "norm": "gradient norm",
    "norm_per_live_weight": "norm per live weight",
    "cosine_with_dense": "cosine with dense",
    "cosine_with_displacement": "cosine with displacement",
    "signal_to_noise": "signal to noise",
    "pairwise_cosine": "cosine between batches",
    "first_order_nats": "decrease, first order",
    "second_order_nats": "decrease, second order",
    "realised_nats": "decrease, realised",
    "residual_share": "residual in NTK modes",
    "gradient_share": "gradient in NTK modes",
}
SCOPES = {
    "level": {"color": "#0072B2", "marker": "o"},
    "level and treatment": {"color": "#D55E00", "marker": "s", "markerfacecolor": "white"},
}
FOLLOWED = {
    "cosine_with_dense": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "cosine_with_displacement": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "signal_to_noise": {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    "realised_nats": {"color": "#CC79A7", "linestyle": ":", "marker": "v"},
}


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Six measures against density, then their rank correlation with the final accuracy, pooled and by level."""
    networks, correlations = tables["networks"], tables["correlations"]
    with paper():
        figure, axes = plt.subplot_mosaic(
            [[*list(PANELS)[:3]], [*list(PANELS)[3:]], ["pooled", "by level", "by level"]],
            figsize=(TWO_COLUMNS, 6.6),
            gridspec_kw={"height_ratios": (1, 1, 1.25)},
        )
        for column, label in PANELS.items():
            against_density(axes[column], networks, column, label)
        axes["norm_per_live_weight"].set_yscale("log")
        _predicted(axes["realised_nats"], networks)
        if (networks["realised_nats"] > 0).all():
            axes["realised_nats"].set_yscale("log")
        handles = axes["norm_per_live_weight"].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=len(handles[0]))
        _pooled(axes["pooled"], correlations)
        _by_level(axes["by level"], networks, correlations)
        figure.suptitle(_title(networks), fontsize=8)
    return figure


def _title(networks: pd.DataFrame) -> str:
    first = networks.iloc[0]
    return (
        f"First gradients, {name_task(networks)}: n = {networks['init_seed'].nunique()} replicas, "
        f"{first['n_examples']} training examples at step {first['rewind_step']}\n"
        f"batches of {first['batch_size']} for the noise, one step at $\\eta$ = {first['step_size']:g}, "
        f"{first['top']} eigenfunctions of the NTK of {first['n_kernel']} examples"
    )


def _rows(networks: pd.DataFrame, treatment: str) -> pd.DataFrame:
    """Of one treatment; the dense networks, from which all of them come, belong to each."""
    return networks[(networks["treatment"] == treatment) | (networks["level"] == 0)]


def _predicted(axes: Axes, networks: pd.DataFrame) -> None:
    """The first order of each treatment as open markers, over the realised decrease."""
    for treatment in treatments(networks):
        mean = _rows(networks, treatment).groupby("level_density")["first_order_nats"].mean()
        look = {**look_of(treatment), "linestyle": "none", "markerfacecolor": "white", "markersize": 2.5}
        axes.plot(mean.index, mean, **look)  # type: ignore[arg-type]


def _pooled(axes: Axes, correlations: pd.DataFrame) -> None:
    """One row a measure; the interval is a jackknife over seeds."""
    place = np.arange(len(MEASURES))[::-1]
    for shift, (scope, look) in zip((0.17, -0.17), SCOPES.items(), strict=True):
        rows = correlations[correlations["within"] == scope].set_index("measure").reindex(list(MEASURES))
        axes.hlines(place + shift, rows["low"], rows["high"], color=look["color"], linewidth=1)
        axes.plot(rows["rho"], place + shift, linestyle="none", markersize=3, **look)  # type: ignore[arg-type]
    axes.axvline(0, color="0.6", linewidth=0.6, zorder=0)
    axes.set_yticks(place, list(MEASURES.values()))
    axes.set_xlim(-1, 1)
    axes.set_xlabel("rank correlation with test accuracy\n(95 % over seeds)")
    axes.set_title("ranked within a level; open:\nwithin a level and treatment", fontsize=7)


def _by_level(axes: Axes, networks: pd.DataFrame, correlations: pd.DataFrame) -> None:
    """Spearman's correlation among the networks of each level; filled where p < 0.05 after Holm's correction."""
    density = networks.groupby("level")["level_density"].first()
    single = correlations[correlations["within"] == "one level"]
    for measure, look in FOLLOWED.items():
        rows = single[single["measure"] == measure]
        x = density.reindex(rows["level"]).to_numpy()
        face = np.where(rows["p_holm"] < 0.05, look["color"], "white")
        axes.plot(x, rows["rho"], color=look["color"], linestyle=look["linestyle"], label=MEASURES[measure], zorder=1)
        axes.scatter(x, rows["rho"], c=face, edgecolors=look["color"], marker=look["marker"], s=12, zorder=2)
    axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
    density_axis(axes, networks["level_density"].to_numpy())
    axes.set_ylim(-1.05, 1.05)
    axes.set_ylabel("rank correlation with test accuracy")
    n = int(single["n"].max()) if len(single) else 0
    family = int(single["n_family"].max()) if len(single) else 0
    axes.set_title(f"among the {n} networks of each level; filled: p < 0.05 by Holm, of {family}", fontsize=7)
    axes.legend(loc="best", ncol=2)
