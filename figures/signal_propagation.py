"""Where the layers of tickets and controls lie in the phase diagram, and what their Jacobians do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import ScaledTranslation

from figures.style import (
    TWO_COLUMNS,
    against_density,
    label_of,
    layer_axis,
    layer_label,
    look_of,
    mean_and_replicas,
    name_task,
    paper,
    treatments,
)

_APART = 5 / 72  # inches between paths that would coincide
DENSE = {"color": "0.45", "linestyle": "-", "linewidth": 2.2}


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Nine panels: the phase diagram and sigma_w^2 of two layers, Jacobian spectra and measures, signals by layer."""
    networks, layers, densities = tables["networks"], tables["layers"], tables["densities"]
    with paper():
        figure, axes = plt.subplots(3, 3, figsize=(TWO_COLUMNS, 6.3))
        _phase_diagram(axes[0, 0], layers)
        for place, depth in zip(axes[0, 1:], (layers["depth"].min(), layers["depth"].max()), strict=True):
            _sigma_w2(place, layers[layers["depth"] == depth])
        _spectra(axes[1, 0], densities, sorted(densities["level"].unique())[-2:][0])
        _spectra(axes[1, 1], densities, densities["level"].max())
        _against_density(axes[1, 2], networks, "mean_squared", "mean squared singular value")
        _theory(axes[1, 2], networks)
        _against_density(axes[2, 0], networks, "condition_number", "condition number (median)")
        _by_layer(axes[2, 1], layers, "variance", "activation variance")
        _by_layer(axes[2, 2], layers, "gradient_norm", "gradient norm (rms, nats)")
        axes[0, 1].legend(loc="best")
        n, k = networks["init_seed"].nunique(), networks["rewind_step"].iloc[0]
        about = f"{networks['n_inputs'].iloc[0]} training examples, at step {k}"
        figure.suptitle(f"Signal propagation, {name_task(networks)}: n = {n} replicas, {about}", fontsize=8)
    return figure


def _line(treatment: str) -> dict[str, object]:
    return {k: v for k, v in look_of(treatment).items() if k != "marker"}


def _against_density(axes: Axes, table: pd.DataFrame, column: str, label: str) -> None:
    """What is finite and positive, on a log axis."""
    against_density(axes, table[np.isfinite(table[column]) & (table[column] > 0)], column, label)
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _phase_diagram(axes: Axes, layers: pd.DataFrame) -> None:
    """Paths through the plane of sigma_w^2 and sigma_b^2, from the dense network to the sparsest.

    For ReLU chi_1 does not depend on sigma_b^2: order and chaos meet in a vertical line. Where every bias is zero
    the paths would hide one another: they are then drawn side by side, and the axis has one tick.
    """
    top = 1.2 * layers["sigma_b2"].max()
    depths = sorted(layers["depth"].unique())
    shown = dict(zip(dict.fromkeys([depths[0], depths[len(depths) // 2], depths[-1]]), "os^", strict=False))
    paths = [(depth, treatment) for depth in shown for treatment in treatments(layers)]
    apart = 0 if top else _APART
    for place, (depth, treatment) in enumerate(paths):
        layer = layers[layers["depth"] == depth]
        rows = layer[(layer["treatment"] == treatment) | (layer["level"] == 0)]
        mean = rows.groupby("level")[["sigma_w2", "sigma_b2"]].mean()
        up = ScaledTranslation(0, apart * ((len(paths) - 1) / 2 - place), axes.figure.dpi_scale_trans)
        line: dict[str, Any] = {**_line(treatment), "linewidth": 0.7}
        dots: dict[str, Any] = {"color": line["color"], "alpha": np.linspace(0.2, 1, len(mean)), "linewidths": 0}
        axes.plot(mean["sigma_w2"], mean["sigma_b2"], transform=axes.transData + up, **line)
        axes.scatter(mean["sigma_w2"], mean["sigma_b2"], 7, marker=shown[depth], transform=axes.transData + up, **dots)
    edge, low = layers["critical_sigma_w2"].iloc[0], layers.loc[layers["sigma_w2"] > 0, "sigma_w2"].min() / 2
    high = 1.5 * layers["sigma_w2"].max()
    if np.isfinite(edge):  # other activations than ReLU have no one edge
        high = max(4 * edge, high)
        axes.axvspan(low, edge, color="0.93", lw=0, zorder=0)
        axes.axvspan(edge, high, color="0.78", lw=0, zorder=0)
        axes.axvline(edge, color="0.3", lw=0.9)
        for name, left, right in (("ordered", low, edge), ("chaotic", edge, high)):
            axes.text(np.sqrt(left * right), 0.97, name, fontsize=6, ha="center", va="top",
                      transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set(xscale="log", xlim=(low, high), ylim=(-top / 2, top) if top else (-1, 1))
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= top])
    axes.set(xlabel=r"effective $\sigma_w^2$", ylabel=r"effective $\sigma_b^2$")
    axes.grid(visible=False)
    names = layers.drop_duplicates("depth").set_index("depth")["layer"].map(layer_label)
    marks = [axes.scatter([], [], 7, "0.3", marker=mark, label=names[depth]) for depth, mark in shown.items()]
    axes.legend(handles=marks, loc="lower left", handletextpad=0, borderpad=0.1, fontsize=6)
    note = "" if top else ",\n" + r"all at $\sigma_b^2 = 0$, side by side"
    axes.set_title("from dense (faint) to sparse, means" + note, fontsize=7)


def _sigma_w2(axes: Axes, layer: pd.DataFrame) -> None:
    """The phase diagram's axis sigma_w^2 against density, every replica shown, with the edge of chaos."""
    _against_density(axes, layer, "sigma_w2", r"effective $\sigma_w^2$")
    axes.set_title(layer_label(layer["layer"].iloc[0]))
    edge = layer["critical_sigma_w2"].iloc[0]
    if np.isfinite(edge):
        axes.axhline(edge, color="0.3", lw=0.9)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, edge / 3), max(high, edge * 1.6))
        axes.annotate("edge of chaos", (0.98, edge), (0, 2), axes.get_yaxis_transform(), textcoords="offset points",
                      ha="right", fontsize=6)  # fmt: skip


def _spectra(axes: Axes, densities: pd.DataFrame, level: int) -> None:
    """Histograms as lines; thin dots: Gaussian weights of the same sigma_w^2."""
    shown = [("dense", densities[densities["level"] == 0], DENSE)]
    at = densities[densities["level"] == level]
    shown += [(label_of(t), at[at["treatment"] == t], _line(t)) for t in treatments(at)]
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
        axes.plot(mean.index, mean, color=look_of(treatment)["color"], lw=0.7, ls=(0, (1, 1)))  # type: ignore[arg-type]
    axes.set_title(r"fine dots: product of $\chi_1$", fontsize=7)


def _by_layer(axes: Axes, layers: pd.DataFrame, column: str, label: str) -> None:
    """At the sparsest level, with the dense network in grey."""
    last = layers[layers["level"] == layers["level"].max()]
    dense = layers[layers["level"] == 0].groupby("depth")[column].mean()
    axes.plot(dense.index, dense, label="dense", **DENSE)  # type: ignore[arg-type]
    for treatment in treatments(last):
        rows = last[last["treatment"] == treatment]
        mean_and_replicas(axes, rows["depth"], rows[column], label=label_of(treatment), **look_of(treatment))
    names = layers.drop_duplicates("depth").set_index("depth")["layer"].sort_index()
    layer_axis(axes, names.index, names)
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(label)
    axes.set_title(f"at {100 * last['level_density'].iloc[0]:.2g} % of the weights; grey: dense", fontsize=7)
