"""Spectra of the restricted NTK, and what tickets keep of the dense one."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.style import TWO_COLUMNS, against_density, density_axis, label_of, look_of, name_task, paper, treatments

PANELS = {
    "effective_rank": "effective rank",
    "log_spectral_distance": "log-spectral distance\nto the dense kernel",
    "subspace_overlap": "top-10 subspace overlap\nwith the dense kernel",
    "target_alignment": "centred target alignment",
}


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Six panels: spectra at the sparsest level, four measures against density, kernel regression beside training."""
    kernels, spectra = tables["kernels"], tables["spectra"]
    with paper():
        figure, axes = plt.subplots(2, 3, figsize=(TWO_COLUMNS, 4.3))
        _spectra(axes[0, 0], spectra)
        for place, (column, label) in zip(axes.flat[1:5], PANELS.items(), strict=True):
            against_density(place, kernels, column, label)
        _errors(axes[1, 2], kernels)
        axes[0, 2].legend(loc="upper left")
        n, k = kernels["init_seed"].nunique(), kernels["rewind_step"].iloc[0]
        about = f"{kernels['n_spectrum'].iloc[0]} training examples, all outputs, at step {k}"
        figure.suptitle(f"Restricted NTK, {name_task(kernels)}: n = {n} replicas, {about}", fontsize=8)
    return figure


def _spectra(axes: Axes, spectra: pd.DataFrame) -> None:
    """Trace-normalised eigenvalues, geometric means over replicas."""
    spectra = spectra[spectra["eigenvalue"] > 0]
    dense, last = spectra[spectra["level"] == 0], spectra[spectra["level"] == spectra["level"].max()]
    shown = [("dense", dense, {"color": "0.45", "linestyle": "-", "linewidth": 2.2})]
    for treatment in treatments(last):
        look = {k: v for k, v in look_of(treatment).items() if k != "marker"}
        shown.append((label_of(treatment), last[last["treatment"] == treatment], look))
    for label, rows, look in shown:
        share = rows["eigenvalue"] / rows.groupby("init_seed")["eigenvalue"].transform("sum")
        curve = np.exp(np.log(share).groupby(rows["rank"]).mean())
        axes.loglog(curve.index, curve, label=label, **look)
    axes.set_xlabel("rank")
    axes.set_ylabel("eigenvalue / trace")
    axes.set_ylim(bottom=max(1e-12, axes.get_ylim()[0]))  # below is the rounding of float64
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
    axes.set_title(f"open: regression with $\\Theta_m$, {n} examples;\nfilled: trained network", fontsize=7)
