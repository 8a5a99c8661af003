"""Spectra of the restricted NTK, and what tickets keep of the dense one."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.style import (
    ABOVE,
    DENSE,
    TWO_COLUMNS,
    against_density,
    below,
    density_axis,
    label_of,
    letter,
    look_of,
    name_task,
    paper,
    treatments,
)

PANELS = {
    "effective_rank": "effective rank",
    "log_spectral_distance": "log-spectral distance\nto the dense kernel",
    "subspace_overlap": "top-10 subspace overlap\nwith the dense kernel",
    "target_alignment": "centred target alignment",
}


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Four panels: spectra at the sparsest level, rank and alignment, and kernel regression beside training."""
    kernels, spectra = tables["kernels"], tables["spectra"]
    with paper():
        figure, axes = plt.subplots(2, 2, figsize=(TWO_COLUMNS, 5.0))
        _spectra(axes[0, 0], spectra)
        for place, column in ((axes[0, 1], "effective_rank"), (axes[1, 0], "target_alignment")):
            against_density(place, kernels, column, PANELS[column])
        _errors(axes[1, 1], kernels)
        below(figure, axes[0, 1])
        letter(axes.flat)
        figure.suptitle(_title(kernels), fontsize=8)
    return figure


def supplement(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Distance to the dense kernel, in eigenvalues and in eigenvectors."""
    kernels = tables["kernels"]
    with paper():
        figure, axes = plt.subplots(1, 2, figsize=(TWO_COLUMNS, 2.8))
        for place, column in zip(axes, ("log_spectral_distance", "subspace_overlap"), strict=True):
            against_density(place, kernels, column, PANELS[column])
        below(figure, axes[0])
        letter(axes)
        figure.suptitle(_title(kernels), fontsize=8)
    return figure


def _title(kernels: pd.DataFrame) -> str:
    n, k = kernels["init_seed"].nunique(), kernels["rewind_step"].iloc[0]
    about = f"{kernels['n_spectrum'].iloc[0]} training examples, all outputs, at step {k}"
    return f"Restricted NTK, {name_task(kernels)}: n = {n} replicas, {about}"


def _spectra(axes: Axes, spectra: pd.DataFrame) -> None:
    """Trace-normalised eigenvalues, geometric means over replicas."""
    spectra = spectra[spectra["share_of_trace"] > 0]
    dense, last = spectra[spectra["level"] == 0], spectra[spectra["level"] == spectra["level"].max()]
    shown = [("dense", dense, DENSE)]
    for treatment in treatments(last):
        look = {k: v for k, v in look_of(treatment).items() if k != "marker"}
        shown.append((label_of(treatment), last[last["treatment"] == treatment], look))
    for label, rows, look in shown:
        curve = np.exp(np.log(rows["share_of_trace"]).groupby(rows["rank"]).mean())
        axes.loglog(curve.index, curve, label=label, **look)
    axes.set_xlabel("rank")
    axes.set_ylabel("eigenvalue / trace")
    axes.set_ylim(bottom=max(1e-12, axes.get_ylim()[0]))  # below is the rounding of float64
    axes.legend(handles=axes.lines[:1], loc="lower left")
    axes.set_title(f"at {100 * last['level_density'].iloc[0]:.2g} % of the weights")


def _errors(axes: Axes, kernels: pd.DataFrame) -> None:
    """Kernel regression (open markers) beside the trained network (filled)."""
    for treatment in treatments(kernels):
        rows = kernels[(kernels["treatment"] == treatment) | (kernels["level"] == 0)]
        look = look_of(treatment)
        for column, face in (("regression_error", "white"), ("test_error", look["color"])):
            mean = 100 * rows.groupby("level_density")[column].mean()
            axes.plot(mean.index, mean, markerfacecolor=face, **look)  # type: ignore[arg-type]
    density_axis(axes, kernels["level_density"].to_numpy())
    axes.set_ylim(bottom=0)
    axes.set_ylabel("test error (%)")
    n = kernels["n_regression"].iloc[0]
    for face, label in (("0.3", "trained network"), ("white", f"regression with $\\Theta_m$, {n} examples")):
        axes.plot([], [], "o", color="0.3", markerfacecolor=face, label=label)
    axes.legend(ncols=2, columnspacing=0.8, handletextpad=0, **ABOVE)
