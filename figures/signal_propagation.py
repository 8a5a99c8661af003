"""Where the layers of tickets and controls lie in the phase diagram, and what their Jacobians do."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.style import (
    DENSE,
    TWO_COLUMNS,
    against_density,
    below,
    label_of,
    layer_axis,
    layer_label,
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

SINGULAR = 1e12
"""Condition numbers above it are of the rounding, not of the matrix."""


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Four panels: Jacobians against density, signals and gradients by layer at the sparsest level."""
    networks, layers = tables["networks"], tables["layers"]
    with paper():
        figure, axes = plt.subplots(2, 2, figsize=(TWO_COLUMNS, 4.8))
        _against_density(axes[0, 0], networks, "mean_squared", "mean squared singular value")
        _theory(axes[0, 0], networks)
        regular = networks["condition_number"] < SINGULAR
        _against_density(axes[0, 1], networks[regular], "condition_number", "condition number (median)")
        left_out = "" if regular.all() else f"; {int((~regular).sum())} singular left out"
        axes[0, 1].set_title("Jacobian of outputs by inputs" + left_out)
        _by_layer(axes[1, 0], layers, "variance", "activation variance")
        _by_layer(axes[1, 1], layers, "gradient_norm", "gradient norm (rms, nats)")
        letter(axes.flat)
        below(figure, axes[1, 0])
        _title(figure, networks)
    return figure


def supplement(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Six panels: sigma_w^2 of three layers against the edge of chaos, Jacobian spectra, distance to isometry."""
    networks, layers, densities = tables["networks"], tables["layers"], tables["densities"]
    depths = sorted(layers["depth"].unique())
    with paper():
        figure, axes = plt.subplots(2, 3, figsize=(TWO_COLUMNS, 4.6))
        for place, depth in zip(axes[0], (depths[0], depths[len(depths) // 2], depths[-1]), strict=True):
            _sigma_w2(place, layers[layers["depth"] == depth])
        pruned = sorted(level for level in densities["level"].unique() if level > 0)
        for place, level in zip(axes[1], dict.fromkeys([*pruned[:1], *pruned[-1:]]), strict=False):
            _spectra(place, densities, level)
        _against_density(axes[1, 2], networks, "scaled_distance", "distance to\nscaled isometry", log=False)
        letter(axes.flat)
        below(figure, axes[1, 0] if pruned else axes[0, 0])
        _title(figure, networks)
    return figure


def _title(figure: Figure, networks: pd.DataFrame) -> None:
    n, k = networks["init_seed"].nunique(), networks["rewind_step"].iloc[0]
    about = f"{networks['n_inputs'].iloc[0]} training examples, at step {k}"
    figure.suptitle(f"Signal propagation, {name_task(networks)}: n = {n} replicas, {about}", fontsize=8)


def _line(treatment: str) -> dict[str, object]:
    return {k: v for k, v in look_of(treatment).items() if k != "marker"}


def _against_density(axes: Axes, table: pd.DataFrame, column: str, label: str, log: bool = True) -> None:
    """What is finite and, on a log axis, positive."""
    shown = table[np.isfinite(table[column]) & ((table[column] > 0) | (not log))]
    if shown.empty:
        said(axes, f"{label}:\nno number at any density")
        return
    against_density(axes, shown, column, label)
    if log:
        log_axis(axes)
    else:
        axes.set_ylim(bottom=0)


def _sigma_w2(axes: Axes, layer: pd.DataFrame) -> None:
    """Effective sigma_w^2 of a layer, every replica shown; order lies below the edge of chaos."""
    _against_density(axes, layer, "sigma_w2", r"effective $\sigma_w^2$")
    axes.set_title(layer_label(layer["layer"].iloc[0]))
    edge = layer["critical_sigma_w2"].iloc[0]
    if np.isfinite(edge):  # other activations than ReLU have no one edge
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, edge / 3), max(high, edge * 2.2))
        log_axis(axes)
        mark(axes, edge, "edge of chaos")


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
    note = ";\nfine dots: Gaussian theory" if densities["theory_per_log"].notna().any() else ""
    axes.set_title(f"at {100 * at['level_density'].iloc[0]:.2g} % of the weights{note}", fontsize=7)


def _theory(axes: Axes, networks: pd.DataFrame) -> None:
    for treatment in treatments(networks):
        rows = networks[(networks["treatment"] == treatment) | (networks["level"] == 0)]
        mean = rows.groupby("level_density")["mean_squared_theory"].mean()
        axes.plot(mean.index, mean, color=look_of(treatment)["color"], lw=0.7, ls=(0, (1, 1)))  # type: ignore[arg-type]
    known = networks["mean_squared_theory"].notna().any()
    axes.set_title("Jacobian" + ("; fine dots: product of $\\chi_1$" if known else " of outputs by inputs"))


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
    log_axis(axes)
    axes.set_ylabel(label)
    axes.set_title(f"at {100 * last['level_density'].iloc[0]:.2g} % of the weights")
