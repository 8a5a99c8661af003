"""What masks reach on weights that are never trained."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.style import (
    TWO_COLUMNS,
    density_axis,
    letter,
    log_axis,
    mark,
    mean_and_replicas,
    name_task,
    paper,
)

CRITERIA: dict[str, dict[str, object]] = {
    "large_final_same_sign": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "magnitude_increase_same_sign": {"color": "#56B4E9", "marker": "P", "linestyle": (0, (6, 1, 1, 1))},
    "large_final": {"color": "#009E73", "marker": "^", "linestyle": "-."},
    "imp": {"color": "#000000", "marker": "D", "linestyle": (0, (5, 1))},
    "large_init": {"color": "#CC79A7", "marker": "v", "linestyle": ":"},
    "random": {"color": "#999999", "marker": "x", "linestyle": (0, (1, 1))},
    "large_final_different_sign": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
}
VALUES: dict[str, dict[str, object]] = {
    "signed_constant": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "init": {"color": "#009E73", "marker": "^", "linestyle": "-."},
    "random_sign": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    "random_constant": {"color": "#E69F00", "marker": "v", "linestyle": ":"},
}
OTHER: dict[str, object] = {"color": "#E69F00", "marker": "*", "linestyle": (0, (3, 2))}
NAMES = {"imp": "IMP tickets", "init": "initial values"}
CLASSES = {
    **dict.fromkeys(("digits", "mnist", "fashion_mnist", "cifar10", "examples.cifar_small:task"), 10),
    **{"cifar100": 100, "stdlib_topics": 8},
}
EVALUATIONS = {"deterministic": "o", "sampled": "s", "expected": "^"}


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """From ``untrained``: criteria on signed constants, then values under the best; from ``learned``: all masks.

    Lines are means over initialisations, dots are single masks.
    """
    untrained, learned = tables["untrained"], tables.get("learned")
    with paper():
        figure, axes = plt.subplots(1, 2 + (learned is not None), figsize=(TWO_COLUMNS, 3.7))
        errors = pd.concat([table["error"] for table in (untrained, learned) if table is not None])
        least = 90 * float(errors[errors > 0].min())
        for place in axes[:2]:
            density_axis(place, untrained["density"].to_numpy())
        for place in axes:
            _scale(place, untrained["task"].iloc[0], least)
        _criteria(axes[0], untrained[untrained["values"] == "signed_constant"])
        _values(axes[1], untrained)
        if learned is not None:
            _learned(axes[2], learned)
        axes[0].set_ylabel("test error (%)")
        letter(axes)
        n = f"n = {untrained['init_seed'].nunique()} initialisations"
        n += f" ({learned['init_seed'].nunique()} learned)" if learned is not None else ""
        figure.suptitle(f"Supermasks, weights never trained, {name_task(untrained)}: {n}", fontsize=8)
    return figure


def _scale(axes: Axes, task: str, least: float) -> None:
    """One scale for all panels, with the error of a guess where the task's classes are known to be alike."""
    axes.set_ylim(min(1, least), 120)
    log_axis(axes)
    if task in CLASSES:
        chance = 100 * (1 - 1 / CLASSES[task])
        mark(axes, chance, "chance")


def _criteria(axes: Axes, constants: pd.DataFrame) -> None:
    others = [name for name in constants["criterion"].unique() if name not in CRITERIA]
    for name, look in {**CRITERIA, **dict.fromkeys(others, OTHER)}.items():
        _curve(axes, constants[constants["criterion"] == name], _label(name), look)
    _legend(axes)
    axes.set_title("untrained, on signed constants")


def _values(axes: Axes, untrained: pd.DataFrame) -> None:
    """What kept weights are under the criterion made for it, and under IMP's masks with random signs."""
    for values, look in VALUES.items():
        rows = untrained[untrained["values"] == values]
        _curve(axes, rows[rows["criterion"] == "large_final_same_sign"], _label(values), look)
    tickets = untrained[(untrained["criterion"] == "imp") & (untrained["values"] == "random_sign")]
    _curve(axes, tickets, "IMP tickets, random sign", CRITERIA["imp"])
    _legend(axes)
    axes.set_title("untrained, large final same sign")


def _curve(axes: Axes, rows: pd.DataFrame, label: str, look: Mapping[str, object]) -> None:
    if len(rows):
        density = rows.groupby("target_density")["density"].transform("mean")
        mean_and_replicas(axes, density, 100 * rows["error"], label=label, **look)


def _learned(axes: Axes, learned: pd.DataFrame) -> None:
    """Colour: values. Marker: how the mask is evaluated; edge-popup's masks are joined by a line."""
    for values, look in VALUES.items():
        rows = learned[learned["values"] == values]
        logits = rows[rows["method"] == "bernoulli"]
        _curve(axes, rows[rows["method"] == "edge_popup"], f"edge-popup, {_label(values)}", look)
        for evaluation, marker in EVALUATIONS.items():
            found = logits[logits["evaluation"] == evaluation].groupby("init_seed")[["density", "error"]].mean()
            dots = {"linestyle": "none", "marker": marker, "color": look["color"], "markerfacecolor": "white"}
            axes.plot(found["density"], 100 * found["error"], markersize=5, **dots)  # type: ignore[arg-type]
    dense = 100 * learned["dense_error"].iloc[0]
    axes.axhline(dense, color="0.45", linewidth=1, label=f"dense, trained: {dense:.2g}")
    handles: list[Artist] = axes.get_legend_handles_labels()[0]
    handles += [
        Line2D(
            [], [], linestyle="none", marker=marker, color="0.3", markerfacecolor="white", label=f"Bernoulli, {name}"
        )
        for name, marker in EVALUATIONS.items()
    ]
    density_axis(axes, np.append(learned["density"].to_numpy(), 0.1))
    _legend(axes, handles)
    axes.set_title("learned")


def _legend(axes: Axes, handles: list[Artist] | None = None) -> None:
    """Below the axes, where it hides nothing."""
    handles = handles or axes.get_legend_handles_labels()[0]
    axes.legend(handles=handles, fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2))


def _label(name: str) -> str:
    return NAMES.get(name, name.replace("_", " "))
