"""lambda_min, movement and kernel change against width, with fitted slopes."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from figures.style import TASKS, TWO_COLUMNS, below, letter, log_axis, look_of, mean_and_replicas, paper

PANELS = {
    "lambda_min": r"$\lambda_{\min}$ of the kernel at $\theta_0$",
    "relative_movement": r"$\|\theta_T - \theta_0\| / \|\theta_0\|$",
    "kernel_change": r"$\|\Theta_T - \Theta_0\| / \|\Theta_0\|$",
}


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Three log-log panels from ``widths`` and ``slopes``; the dotted line has the slope of the theory, -1/2."""
    widths, slopes = tables["widths"], tables["slopes"].set_index("measure")
    with paper():
        figure, axes = plt.subplots(1, 3, figsize=(TWO_COLUMNS, 2.7))
        for place, (column, label) in zip(axes, PANELS.items(), strict=True):
            mean_and_replicas(place, widths["width"], widths[column], label="mean; dots: networks", **look_of("ticket"))
            fit = slopes.loc[column]
            x = np.array(sorted(widths["width"].unique()), dtype=float)
            place.plot(x, 2 ** (fit["intercept"] + fit["slope"] * np.log2(x)), color="0.4", lw=0.9, label="fit")
            if np.isfinite(fit["theory"]):
                anchor = widths.loc[widths["width"] == x[0], column].mean()
                place.plot(x, anchor * (x / x[0]) ** fit["theory"], color="0.4", ls=":", label="slope -1/2")
            reach = fit["high"] - fit["slope"]
            place.set_title(f"slope {fit['slope']:.3f}" + (f" ± {reach:.3f} (95 %)" if np.isfinite(reach) else ""))
            place.set_xscale("log", base=2)
            log_axis(place)
            place.set_xlabel("width")
            place.set_ylabel(label)
        below(figure, axes[1])
        letter(axes)
        task, depth, n_examples, steps = (widths[c].iloc[0] for c in ("task", "depth", "n_examples", "steps"))
        layers = f"{depth} hidden layer{'' if depth == 1 else 's'}"
        about = f"{TASKS.get(task, task)}, {layers}, {n_examples} examples, {steps} steps"
        figure.suptitle(f"NTK scaling, {about}, n = {widths['seed'].nunique()} per width", fontsize=8)
    return figure
