"""Where the layers of tickets and controls lie beside the edge of chaos, and what their Jacobians do."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from figures.style import (
    LABELS,
    LOOKS,
    TWO_COLUMNS,
    against_density,
    mean_and_replicas,
    name_task,
    paper,
    treatments,
)

DENSE = {"color": "0.45", "linestyle": "-", "linewidth": 2.2}


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Nine panels: sigma_w^2 of three layers, Jacobian spectra and their measures, signals by layer."""
    networks, layers, densities = tables["networks"], tables["layers"], tables["densities"]
    with paper():
        figure, axes = plt.subplots(3, 3, figsize=(TWO_COLUMNS, 6.3))
        depths = sorted(layers["depth"].unique())
        shown = [depths[0], depths[len(depths) // 2], depths[-1]]
        for place, depth in zip(axes[0], shown, strict=True):
            _phase(place, layers[layers["depth"] == depth])
        _spectra(axes[1, 0], densities, sorted(densities["level"].unique())[-2:][0])
        _spectra(axes[1, 1], densities, densities["level"].max())
        _against_density(axes[1, 2], networks, "mean_squared", "mean squared singular value")
        _theory(axes[1, 2], networks)
        _against_density(axes[2, 0], networks, "condition_number", "condition number (median)")
        _by_layer(axes[2, 1], layers, "variance", "activation variance")
        _by_layer(axes[2, 2], layers, "gradient_norm", "gradient norm (rms, nats)")
        axes[0, 0].legend(loc="best")
        n, k = networks["init_seed"].nunique(), networks["rewind_step"].iloc[0]
        about = f"{networks['n_inputs'].iloc[0]} training examples, at step {k}"
        figure.suptitle(f"Signal propagation, {name_task(networks)}: n = {n} replicas, {about}", fontsize=8)
    return figure


def _line(treatment: str) -> dict[str, object]:
    return {k: v for k, v in LOOKS[treatment].items() if k != "marker"}


def _against_density(axes: Axes, table: pd.DataFrame, column: str, label: str) -> None:
    """What is finite and positive, on a log axis."""
    against_density(axes, table[np.isfinite(table[column]) & (table[column] > 0)], column, label)
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _phase(axes: Axes, layer: pd.DataFrame) -> None:
    """The phase diagram's axis sigma_w^2, with the edge of chaos: for ReLU it does not depend on sigma_b^2."""
    _against_density(axes, layer, "sigma_w2", r"effective $\sigma_w^2$")
    edge = layer["critical_sigma_w2"].iloc[0]
    axes.axhline(edge, color="0.3", lw=0.9)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, edge / 3), max(high, edge * 1.6))
    axes.annotate("edge of chaos", (0.98, edge), (0, 2), axes.get_yaxis_transform(), textcoords="offset points",
                  ha="right", fontsize=6)  # fmt: skip
    axes.set_title(layer["layer"].iloc[0])


def _spectra(axes: Axes, densities: pd.DataFrame, level: int) -> None:
    """Histograms as lines; thin dots: Gaussian weights of the same sigma_w^2."""
    shown = [("dense", densities[densities["level"] == 0], DENSE)]
    at = densities[densities["level"] == level]
    shown += [(LABELS[t], at[at["treatment"] == t], _line(t)) for t in treatments(at)]
    for label, rows, look in shown:
        axes.plot(rows["singular_value"], rows["density_per_log"], label=label, **look)  # type: ignore[arg-type]
        axes.plot(rows["singular_value"], rows["theory_per_log"], color=look["color"], lw=0.7, ls=(0, (1, 1)))
    axes.set_xscale("log")
    axes.set_xlabel("singular value s")
    axes.set_ylabel("share per unit of ln s")
    axes.set_title(
        f"at {100 * at['level_density'].iloc[0]:.2g} % of the weights;\nfine dots: Gaussian theory", fontsize=7
    )


def _theory(axes: Axes, networks: pd.DataFrame) -> None:
    for treatment in treatments(networks):
        rows = networks[(networks["treatment"] == treatment) | (networks["level"] == 0)]
        mean = rows.groupby("level_density")["mean_squared_theory"].mean()
        axes.plot(mean.index, mean, color=LOOKS[treatment]["color"], lw=0.7, ls=(0, (1, 1)))  # type: ignore[arg-type]
    axes.set_title(r"fine dots: product of $\chi_1$", fontsize=7)


def _by_layer(axes: Axes, layers: pd.DataFrame, column: str, label: str) -> None:
    """At the sparsest level, with the dense network in grey."""
    last = layers[layers["level"] == layers["level"].max()]
    dense = layers[layers["level"] == 0].groupby("depth")[column].mean()
    axes.plot(dense.index, dense, label="dense", **DENSE)  # type: ignore[arg-type]
    for treatment in treatments(last):
        rows = last[last["treatment"] == treatment]
        mean_and_replicas(axes, rows["depth"], rows[column], label=LABELS[treatment], **LOOKS[treatment])
    names = layers.drop_duplicates("depth").set_index("depth")["layer"].sort_index()
    axes.set_xticks(names.index, names)
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(label)
    axes.set_title(f"at {100 * last['level_density'].iloc[0]:.2g} % of the weights; grey: dense", fontsize=7)
