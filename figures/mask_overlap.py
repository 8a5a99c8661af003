"""What tickets share beyond chance, and where their live weights are."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.style import (
    TWO_COLUMNS,
    density_axis,
    layer_label,
    letter,
    mean_and_replicas,
    name_task,
    paper,
    said,
    some_layers,
)

WHOLE = "all"


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Four panels: overlap over chance, free and aligned; live weights of each pixel; dead units."""
    pairs, aligned = tables["overlap"], tables["aligned"]
    with paper():
        figure, axes = plt.subplots(2, 2, figsize=(TWO_COLUMNS, 5.4))
        _over_chance(axes[0, 0], aligned, pairs)
        _over_aligned_chance(axes[0, 1], aligned)
        _pixels(figure, axes[1, 0], tables.get("pixels"))
        _units(axes[1, 1], tables["units"])
        letter(axes.flat)
        seeds = pd.unique(pairs[["init_seed_a", "init_seed_b"]].to_numpy().ravel())
        n = len(seeds) * (len(seeds) - 1) // 2
        about = f"{len(seeds)} init seeds, {n} pairs per level; dots are pairs or tickets, lines their means"
        figure.suptitle(f"Overlap of tickets, {name_task(pairs)}\n{about}", fontsize=8)
    return figure


def _layers(table: pd.DataFrame, column: str = "layer") -> dict[str, dict[str, object]]:
    return some_layers([name for name in table[column].unique() if name != WHOLE])


def _over_chance(axes: Axes, aligned: pd.DataFrame, pairs: pd.DataFrame) -> None:
    """Intersection over its mean under the null, two seeds at one level, with the band of the smallest layer."""
    rows = pairs[pairs["level_a"] == pairs["level_b"]]
    density = rows["level_a"].map(aligned.groupby("level")["density"].first())
    for layer, look in _layers(rows).items():
        own = rows["layer"] == layer
        mean_and_replicas(
            axes, density[own], (rows["intersection"] / rows["expected"])[own], label=layer_label(layer), **look
        )
        given = (rows["intersection"] / rows["expected_given_input"])[own].groupby(density[own]).mean()
        axes.plot(given.index, given, **{**look, "markerfacecolor": "white"})  # type: ignore[arg-type]
        spread = (1.96 * rows["variance"] ** 0.5 / rows["expected"])[own].groupby(density[own]).mean()
        axes.fill_between(spread.index, (1 - spread).clip(lower=0), 1 + spread, color=look["color"], alpha=0.12, lw=0)
    _finish(axes, density, "shared / expected", "bands: 95 % of random masks\nopen: live weights of inputs given")


def _over_aligned_chance(axes: Axes, aligned: pd.DataFrame) -> None:
    """The same after alignment, over the mean of random masks aligned alike."""
    for layer, look in _layers(aligned).items():
        rows = aligned[aligned["layer"] == layer]
        ratio, free = rows["intersection"] / rows["null_mean"], rows["given"] == "layer"
        mean_and_replicas(axes, rows["density"][free], ratio[free], label=layer_label(layer), **look)
        given = ratio[~free].groupby(rows["density"][~free]).mean()
        axes.plot(given.index, given, **{**look, "markerfacecolor": "white"})  # type: ignore[arg-type]
        spread = (1.96 * rows["null_sd"] / rows["null_mean"])[~free].groupby(rows["density"][~free]).mean()
        axes.fill_between(spread.index, (1 - spread).clip(lower=0), 1 + spread, color=look["color"], alpha=0.12, lw=0)
    draws = aligned["draws"].iloc[0]
    title = f"over random masks aligned alike ({draws} draws)\nopen: live weights of units and inputs given"
    _finish(axes, aligned["density"], "shared / expected, aligned", title)


def _finish(axes: Axes, density: pd.Series, label: str, title: str) -> None:
    axes.axhline(1, color="0.4", lw=0.8, ls=":")
    density_axis(axes, density.to_numpy())
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=7)
    axes.legend()


def _pixels(figure: Figure, axes: Axes, pixels: pd.DataFrame | None) -> None:
    """Share of the first layer's weights alive at each pixel, mean over seeds, at the sparsest level."""
    if pixels is None:
        said(axes, "no map of pixels: the first layer\nis a convolution, which uses all alike")
        return
    last = pixels[pixels["level"] == pixels["level"].max()]
    share = 100 * last["live"] / last["units"]
    image = share.groupby([last["row"], last["column"]]).mean().unstack()
    shown = axes.imshow(image.to_numpy(), cmap="viridis", vmin=0)
    figure.colorbar(shown, ax=axes, shrink=0.8)
    axes.grid(False)
    axes.set_xlabel("pixel column")
    axes.set_ylabel("pixel row")
    density, n = 100 * last["density"].iloc[0], last["init_seed"].nunique()
    axes.set_title(f"live weights of a pixel (%)\nat {density:.2g} % of the weights, mean of n = {n}", fontsize=7)


def _units(axes: Axes, units: pd.DataFrame) -> None:
    """Dead hidden units of each group, in percent of its units."""
    for group, look in _layers(units, "group").items():
        own = units[units["group"] == group]
        mean_and_replicas(axes, own["density"], 100 * own["dead"] / own["units"], label=layer_label(group), **look)
    density_axis(axes, units["density"].to_numpy())
    axes.set_ylim(-0.05, max(1.0, axes.get_ylim()[1]))  # none dead is drawn as none, not on a scale of noise
    axes.set_ylabel("dead hidden units (%)")
    axes.legend()
