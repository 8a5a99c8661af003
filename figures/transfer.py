"""Test error of tickets carried between settings: every network, beside shuffled masks and dense networks."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.style import TASKS, TWO_COLUMNS, letter, look_of, name_model, paper

CARRIED = {"mask": "mask", "theta0": r"$\theta_0$", "theta_k": r"$\theta_{k}$"}
SHOWN = {"ticket": "carried ticket", "layerwise_shuffle": "shuffled in layers", "random_mask": "random mask"}
OFFSETS = {"ticket": -0.22, "layerwise_shuffle": 0.06, "random_mask": 0.32}


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """The transfer matrix from ``networks``: a panel per density and target, sources side by side in each."""
    networks = tables["networks"]
    targets, levels = list(networks["target"].unique()), sorted(networks.loc[networks["level"] > 0, "level"].unique())
    names = _names(networks)
    with paper():
        columns = min(2, len(targets))
        n_rows = len(levels) * -(-len(targets) // columns)
        size = (TWO_COLUMNS, 0.9 + 1.75 * n_rows)
        figure, axes = plt.subplots(n_rows, columns, figsize=size, squeeze=False)
        panels = [(level, target) for level in levels for target in targets]
        for i, (place, (level, target)) in enumerate(zip(axes.flat, panels, strict=False)):
            rows = networks[(networks["target"] == target) & networks["level"].isin([0, level])]
            _panel(place, rows, names, named=i >= len(panels) - columns or len(targets) > columns)
            place.set_title(_title(rows, names[target]), fontsize=7.5)
        for place in axes[:, 0]:
            place.set_ylabel("test error (%)")
        for place in axes.flat[len(panels) :]:
            place.set_axis_off()
        letter(axes.flat[: len(panels)])
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle(_heading(networks), fontsize=8)
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, names: Mapping[str, str], *, named: bool) -> None:
    """Means as bars, networks as dots; from left to right the sources, in each what is carried."""
    dense = 100 * rows.loc[rows["control"] == "dense", "test_error"]
    spread = dense.std() if len(dense) > 1 else 0.0
    axes.axhspan(dense.mean() - spread, dense.mean() + spread, color="0.85", lw=0, label="dense, mean ± sd")
    sources = [s for s in rows["source"].unique() if s != "none"]
    carried = [c for c in CARRIED if c in set(rows["carried"])]
    ticks = []
    for s, source in enumerate(sources):
        for c, what in enumerate(carried):
            place = s * (len(carried) + 0.6) + c
            ticks.append((place, CARRIED[what]))
            for control, label in SHOWN.items():
                here = rows["control"].eq(control) & rows["source"].eq(source) & rows["carried"].eq(what)
                first = place == 0
                alone = not (rows["source"].eq(source) & rows["carried"].eq(what) & rows["control"].ne("ticket")).any()
                x = place if alone else place + OFFSETS[control]
                _networks(axes, x, 100 * rows.loc[here, "test_error"], control, label, first)
        middle = s * (len(carried) + 0.6) + (len(carried) - 1) / 2
        if named:
            own = "\n(its own)" if source == rows["target"].iloc[0] else ""
            axes.annotate(
                f"from {names[source]}{own}", (middle, 0), (0, -18), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="center", va="top", fontsize=7 if len(sources) < 3 else 5.5,
            )  # fmt: skip
        if s:
            axes.axvline(s * (len(carried) + 0.6) - 0.8, color="0.8", lw=0.6)
    low, high = axes.get_ylim()
    axes.set_ylim(bottom=max(low, -0.02 * high))  # the band may reach below zero
    axes.set_xlim(-0.6, ticks[-1][0] + 0.6)
    axes.set_xticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.grid(axis="x", visible=False)


def _networks(axes: Axes, x: float, errors: pd.Series, control: str, label: str, first: bool) -> None:
    if errors.dropna().empty:
        return
    look = look_of(control)
    dots = x + 0.05 * (np.arange(len(errors)) - (len(errors) - 1) / 2)
    axes.plot(
        dots, errors, linestyle="none", marker=str(look["marker"]), color=str(look["color"]), alpha=0.7,
        markersize=3, mew=0, label=label if first else None,
    )  # fmt: skip
    axes.hlines(errors.mean(), x - 0.13, x + 0.13, color=str(look["color"]), lw=1.4)


def _title(rows: pd.DataFrame, name: str) -> str:
    tickets = rows[rows["control"] == "ticket"]
    n = tickets.groupby(["source", "carried"])["test_error"].count()
    n_text = f"{n.min()}" if n.min() == n.max() else f"{n.min()} to {n.max()}"
    density = tickets.loc[tickets["source"] == tickets["target"], "density"].mean()  # a fresh output layer is dense
    return f"on {name}: {100 * density:.3g} % kept, n = {n_text}"


def _names(networks: pd.DataFrame) -> dict[str, str]:
    """Each setting, such as ``mnist:0-4@sgd,0.05``, in words; the optimizer of every target where there are several."""
    words = dict.fromkeys([*networks["target"], *networks["source"]])
    recipes = networks.groupby("target")[["optimizer", "learning_rate"]].first()
    names = {}
    for word in words:
        setting, _, recipe = word.partition("@")
        task, _, classes = setting.partition(":")
        if any("@" in w for w in words) and word in recipes.index:
            recipe = f"{recipes.loc[word, 'optimizer']} {recipes.loc[word, 'learning_rate']:g}"
        optimizer, *numbers = recipe.replace(",", " ").split(" ")
        optimizer = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}.get(optimizer, optimizer)
        recipe = " ".join([optimizer, *numbers])
        names[word] = f"{TASKS.get(task, task)}{' ' * bool(classes)}{classes}{', ' * bool(recipe)}{recipe}"
    return names


def _heading(networks: pd.DataFrame) -> str:
    k = networks.loc[networks["carried"] == "theta_k", "first_step"]
    late = rf", with $\theta_k$ (k = {int(k.iloc[0])})" if len(k) else ""
    return (
        f"Tickets of {name_model(networks['model'].iloc[0])} carried as the mask alone (to another seed's "
        rf"initialisation), with $\theta_0${late}"
        "\nDots: networks; bars: their means"
    )
