"""First gradients of tickets and their controls, and what they foretell of the final accuracy."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.style import (
    ABOVE,
    TWO_COLUMNS,
    against_density,
    below,
    density_axis,
    letter,
    log_axis,
    look_of,
    name_task,
    paper,
    treatments,
)

PANELS = {
    "norm_per_live_weight": "gradient norm\nper live weight (nats)",
    "cosine_with_displacement": "cosine of $-g$ with\n$\\theta_T - \\theta$",
    "signal_to_noise": "signal to noise\n$\\|E g\\|^2$ / tr Cov $g$",
}
FURTHER = {
    "cosine_with_dense": "cosine with the\ndense gradient",
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
# Measures and scopes are black and grey: colours are those of treatments.
SCOPES: dict[str, dict[str, object]] = {
    "level": {"color": "black", "marker": "o", "label": "a level"},
    "level and treatment": {
        **{"color": "0.5", "marker": "s", "markerfacecolor": "white"},
        "label": "a level and treatment",
    },
}
FOLLOWED = {
    "cosine_with_dense": {"color": "0.65", "linestyle": "-", "marker": "o"},
    "cosine_with_displacement": {"color": "black", "linestyle": "-", "marker": "s"},
    "signal_to_noise": {"color": "0.4", "linestyle": "--", "marker": "^"},
    "realised_nats": {"color": "black", "linestyle": ":", "marker": "v"},
}


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Four panels: three measures against density, and how each of all measures ranks with the final accuracy."""
    networks, correlations = tables["networks"], tables["correlations"]
    with paper():
        figure, axes = plt.subplots(2, 2, figsize=(TWO_COLUMNS, 5.2))
        for place, (column, label) in zip(axes.flat, PANELS.items(), strict=False):
            against_density(place, networks, column, label)
        log_axis(axes[0, 0])
        _pooled(axes[1, 1], correlations)
        letter(axes.flat)
        below(figure, axes[0, 0])
        figure.suptitle(_title(networks), fontsize=8)
    return figure


def supplement(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Four panels: three more measures against density, and the correlations level by level."""
    networks, correlations = tables["networks"], tables["correlations"]
    with paper():
        figure, axes = plt.subplots(2, 2, figsize=(TWO_COLUMNS, 5.2))
        for place, (column, label) in zip(axes.flat, FURTHER.items(), strict=False):
            against_density(place, networks, column, label)
        _predicted(axes[0, 1], networks)
        if (networks["realised_nats"] > 0).all():
            log_axis(axes[0, 1])
        _by_level(axes[1, 1], networks, correlations)
        letter(axes.flat)
        below(figure, axes[0, 0])
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
    axes.set_xticks((-1, -0.5, 0, 0.5, 1))
    axes.set_xlabel("rank correlation with test accuracy\n(95 % over seeds)")
    axes.legend(title="networks ranked within", title_fontsize=7, **ABOVE, ncols=2)


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
    axes.set_ylabel("rank correlation\nwith test accuracy")
    n = int(single["n"].max()) if len(single) else 0
    family = int(single["n_family"].max()) if len(single) else 0
    note = f"{n} networks per level; filled: p < 0.05 by Holm, of {family}"
    axes.legend(title=note, title_fontsize=7, **ABOVE, ncols=2)
