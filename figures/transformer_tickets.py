"""Tickets of a transformer from random and from pretrained weights: errors, projections, heads, masks carried over."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.style import (
    TASKS,
    TWO_COLUMNS,
    density_axis,
    label_of,
    letter,
    look_of,
    mean_and_replicas,
    name_task,
    paper,
)

PROJECTIONS = {
    "query": ("#0072B2", "o"),
    "key": ("#56B4E9", "s"),
    "value": ("#D55E00", "^"),
    "output": ("#E69F00", "v"),
    "MLP": ("#999999", "D"),
}
FILLED = {"random": "none", "pretrained": "full"}
"""Open markers: random weights; filled: pretrained."""
MASKS = {
    "ticket": ("own ticket", "#0072B2", "o"),
    "other_task": ("other task's", "#56B4E9", "P"),
    "layerwise_shuffle": ("that, shuffled", "#CC79A7", "v"),
    "one_shot": ("one-shot magnitude", "#E69F00", "s"),
    "random_erk": ("random (ERK)", "#009E73", "d"),
}


def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Four panels.

    a: test error of tickets and controls against density, from random and from pretrained weights (``networks``);
    b: density of each projection of the tickets against that of the network (``projections``, ``layers``); c: every
    head of the sparsest tickets (``heads``); d: masks of either task on the pretrained weights (``transfer``), or where
    there was no pretraining the barriers between tickets (``barriers``).
    """
    networks = tables["networks"]
    main_arm = "pretrained" if "pretrained" in set(networks["arm"]) else "random"
    with paper():
        figure, axes = plt.subplots(2, 2, figsize=(TWO_COLUMNS, 5.2))
        _errors(axes[0, 0], networks[networks["arm"] != "source"])
        _projections(axes[0, 1], tables, main_arm)
        _heads(axes[1, 0], tables["heads"])
        if "transfer" in tables:
            _transfer(axes[1, 1], tables["transfer"])
        else:
            _barriers(axes[1, 1], tables["barriers"])
        letter(axes.flat)
        n, source = networks["init_seed"].nunique(), networks["source"].iloc[0]
        learned = "" if source == "none" else f"\npretrained on {_task(source)}"
        figure.suptitle(f"{name_task(networks)}: n = {n} seeds{learned}", fontsize=8)
    return figure


def _errors(axes: Axes, networks: pd.DataFrame) -> None:
    """Tickets of both arms; controls of the pretrained one, or of the only one there is."""
    arms = [arm for arm in FILLED if arm in set(networks["arm"])]
    for arm in arms:
        rows = networks[networks["arm"] == arm]
        for treatment in (t for t in dict.fromkeys(rows["treatment"]) if t != "sibling"):
            if treatment != "ticket" and arm != arms[-1]:
                continue
            chosen = rows[(rows["treatment"] == treatment) | (rows["level"] == 0)]
            label = f"ticket, {arm} weights" if treatment == "ticket" else label_of(treatment)
            look = {**look_of(treatment), "fillstyle": FILLED[arm]}
            mean_and_replicas(axes, chosen["level_density"], 100 * chosen["test_error"], label=label, **look)
    density_axis(axes, networks["level_density"].to_numpy())
    axes.set_ylabel("test error (%)")
    low, high = axes.get_ylim()
    axes.set_ylim(top=high + 0.6 * (high - low))  # room for the legend
    axes.legend(loc="upper center", ncols=2, columnspacing=1, handlelength=1.8)


def _projections(axes: Axes, tables: Mapping[str, pd.DataFrame], arm: str) -> None:
    heads, layers = (
        t[(t["arm"] == arm) & (t["treatment"] == "ticket")] for t in (tables["projections"], tables["layers"])
    )
    keys = ["level_density", "init_seed"]
    parts = {name: rows.groupby(keys)["density"].mean() for name, rows in heads.groupby("projection")}
    rest = layers[layers["layer"].str.contains("mlp|fc|intermediate|linear", case=False)]
    parts["MLP"] = rest.groupby(keys)["layer_density"].mean()
    for name, (color, marker) in PROJECTIONS.items():
        if len(parts.get(name, ())):
            at = parts[name].reset_index()
            label = name if name == "MLP" else f"{name} of heads"
            mean_and_replicas(axes, at["level_density"], 100 * at.iloc[:, -1], label=label, color=color, marker=marker)
    least = heads["level_density"].min()
    axes.plot([least, 1], [100 * least, 100], color="0.4", lw=0.8, ls=":", label="all alike")
    axes.set_yscale("log")
    density_axis(axes, heads["level_density"].to_numpy())
    _percent(axes)
    axes.set_ylabel("kept in each (%)")
    axes.legend()


def _percent(axes: Axes) -> None:
    low, high = axes.get_ylim()
    ticks = [t for t in (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1) if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()


def _heads(axes: Axes, heads: pd.DataFrame) -> None:
    """Density of every head at the last level, layer by layer; dead and blind ones are marked."""
    last = heads[(heads["level"] == heads["level"].max()) & (heads["treatment"] == "ticket")]
    arms = [arm for arm in FILLED if arm in set(last["arm"])]
    layers = list(dict.fromkeys(last["layer"]))
    for i, arm in enumerate(arms):
        rows = last[last["arm"] == arm]
        at = rows["layer"].map(layers.index) + 0.3 * (i - (len(arms) - 1) / 2)
        within = (rows["head"] - rows["head"].max() / 2) / (rows["head"].max() + 1) * 0.22
        lost = rows["dead"].astype(bool) | rows["blind"].astype(bool)
        face = "none" if FILLED[arm] == "none" else "#0072B2"
        label = f"{arm} weights: {int(rows['dead'].sum())} dead, {int(rows['blind'].sum())} blind of {len(rows)}"
        axes.scatter(
            (at + within)[~lost],
            100 * rows["density"][~lost],
            s=14,
            facecolors=face,
            edgecolors="#0072B2",
            lw=0.8,
            label=label,
        )
        axes.scatter((at + within)[lost], 100 * rows["density"][lost], s=18, marker="x", color="#D55E00", lw=1)
    axes.set_xticks(range(len(layers)), [str(i + 1) for i in range(len(layers))])
    axes.set_xlabel("attention layer, from the input")
    axes.set_ylabel("kept in each head (%)")
    axes.set_ylim(0, 1.45 * 100 * last["density"].max())
    axes.legend(loc="upper left")


def _transfer(axes: Axes, transfer: pd.DataFrame) -> None:
    """The sparsest level; replicas beside their means."""
    last = transfer[transfer["level"] == transfer["level"].max()]
    targets = list(dict.fromkeys(last["target"]))
    for i, (mask, (label, color, marker)) in enumerate(MASKS.items()):
        rows = last[last["mask"] == mask]
        offset = 0.16 * (i - (len(MASKS) - 1) / 2)
        places = rows["target"].map(targets.index) + offset
        axes.scatter(places, 100 * rows["test_error"], s=8, color=color, marker=marker, alpha=0.35, lw=0)
        means = 100 * rows.groupby("target", sort=False)["test_error"].mean()
        at = [targets.index(target) + offset for target in means.index]
        axes.plot(at, means, linestyle="none", marker=marker, color=color, label=label)
    names = [textwrap.fill(f"trained on {_task(target)}", 20) for target in targets]
    axes.set_xticks(range(len(targets)), names)
    axes.set_xlim(-0.6, len(targets) - 0.4)
    low, high = 100 * last["test_error"].min(), 100 * last["test_error"].max()
    axes.set_ylim(max(0, low - 0.1 * (high - low) - 1), high + 0.55 * (high - low) + 1)
    axes.set_ylabel(f"test error at {100 * last['density'].mean():.2g} % (%)")
    axes.legend(loc="upper left", ncols=2, title="mask on the pretrained weights", title_fontsize=7)


def _task(word: str) -> str:
    """A task in words, its name with a digest or with classes behind it, such as ``digits:0-4`` and ``digits_0-4``."""
    known = TASKS.get(word) or TASKS.get(word.partition(".")[0])
    name, classes = re.fullmatch(r"(.*?)(?:[:_]([\d,-]+))?", word).groups("")  # type: ignore[union-attr]
    return known or f"{TASKS.get(name, name)} {classes}".strip()


def _barriers(axes: Axes, barriers: pd.DataFrame) -> None:
    looks = {"siblings": ("#56B4E9", "x"), "init seeds": ("#D55E00", "s"), "init seeds, matched": ("#0072B2", "o")}
    words = {"siblings": "two batch orders", "init seeds": "two init seeds", "init seeds, matched": "the same, matched"}
    for question, (color, marker) in looks.items():
        arm = "random" if "random" in set(barriers["arm"]) else "pretrained"
        rows = barriers[(barriers["question"] == question) & (barriers["arm"] == arm)]
        if len(rows):
            mean_and_replicas(
                axes,
                rows["level_density"],
                100 * rows["test_barrier_error"],
                label=words[question],
                color=color,
                marker=marker,
            )
    density_axis(axes, np.asarray(barriers["level_density"]))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("error barrier of tickets (points)")
    axes.legend()
