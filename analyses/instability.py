"""Instability against the rewind step k: from where on does noise of SGD no longer decide where training ends?

Dense networks are trained to theta_k once. From every k two children of each network are trained in different batch
orders; the error barrier between their ends is the network's instability, below 2 % it is stable (Frankle et al. 2020).
The same is measured of the subnetworks at chosen levels: tickets that are rewound to k, and their controls. The
paper's central claim is then a table: do subnetworks match the dense network's accuracy where they are stable?

With no arguments it runs on the bundled digits in a few minutes, where networks are stable from the start. Tickets
are stored run by run, one for each k, and a stopped study goes on; children are trained again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from torch import nn

import ticketlab as tl
from analyses.command import (
    Places,
    StudyFlags,
    Tables,
    chosen_levels,
    each_network,
    followed,
    joined,
    main,
    survivors,
)
from analyses.intervals import interval
from figures.instability import draw
from ticketlab.connectivity import Path as LinearPath
from ticketlab.connectivity import linear_path, recalibrate
from ticketlab.curvature import MatrixName
from ticketlab.engine.start import Start
from ticketlab.engine.treatments import TREATMENTS, sibling_order
from ticketlab.errors import Refused
from ticketlab.printed import grouped
from ticketlab.state import Params, State, stack, stack_states

STABLE = 0.02  # of the error barrier (Frankle et al. 2020)
STUDY = tl.ImpConfig(
    levels=2, prune_fraction=0.6, treatments=("ticket", "reinit", "random_erk"), recipe=tl.Recipe(steps=400)
)


@dataclass(frozen=True)
class Config(Places):
    """Error barriers between children of theta_k, and accuracies, against k: dense networks and subnetworks."""

    rewind_steps: tuple[int, ...] = (0, 10, 50, 150)
    """Steps k of the grid, at which dense networks and subnetworks have children."""
    dense_steps: tuple[int, ...] = ()
    """Further steps k, at which dense networks alone have children: a finer grid at little cost."""
    at_levels: tuple[int, ...] | None = None
    """Levels whose subnetworks have children, from 1; None: the last."""
    n_alphas: int = 31
    """Points per line, both ends included; the largest value on a grid is a lower estimate."""
    train_examples: int = 5000
    """Training examples that lines are evaluated on, and statistics of batch norm estimated from."""
    test_examples: int | None = None
    """Test examples that lines are evaluated on; None: all."""
    curvature_examples: int = 200
    """Training examples of the loss whose curvature at theta_k is measured; 0: not measured."""
    store: Path = Path("runs")
    """Folder of run directories."""
    study: StudyFlags = field(default_factory=lambda: STUDY)


@dataclass(frozen=True)
class Parent:
    """A network at step k, and its first child where that is known."""

    treatment: str
    """``dense``, or that of a subnetwork."""
    init_seed: int
    level: int
    density: float
    start: Start
    child: State | None


def run(config: Config) -> Tables:
    """Four tables, five with curvature.

    ``children``: a row per pair, with barriers, distances and errors; ``paths``: their lines; ``networks``: accuracies
    of the runs; ``curvature``: largest eigenvalues at theta_k; ``claims``: per cell of k, level and treatment,
    instability and the error above the dense network's.
    """
    parts: dict[str, list[pd.DataFrame]] = {"networks": [], "children": [], "paths": []}
    for name, table in cells(config):
        parts.setdefault(name, []).append(table)
    tables = {name: joined(tables) for name, tables in parts.items()}
    return tables | {"claims": claims(tables["children"])}


def cells(config: Config) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of the tables, each with its name, as they come: k after k, level after level.

    Raises:
        Refused: No rewind steps or one twice, levels that the study does not have, and whatever a study refuses.
    """
    steps = sorted({*config.rewind_steps, *config.dense_steps})
    if len(steps) < len(config.rewind_steps + config.dense_steps) or not config.rewind_steps:
        raise Refused(
            "rewind_steps must be one or more steps, and no step stand twice in them and dense_steps: got "
            f"{config.rewind_steps} and {config.dense_steps}."
        )
    kept = tuple(sorted({*steps, *config.study.snapshot_steps}))
    study = tl.Study(replace(config.study, rewind_step=steps[0], snapshot_steps=kept), device=config.device)
    measured = chosen_levels(config.at_levels, config.study.levels, (config.study.levels,), first=1)
    test = len(study.task.test) if config.test_examples is None else min(config.test_examples, len(study.task.test))
    shown = study.task.limit(train=min(config.train_examples, len(study.task.train)), test=test)
    curved = None if config.curvature_examples == 0 else _curved(study, config.curvature_examples)
    about, dense = {"task": study.config.task, "model": study.config.model}, None
    for k in steps:
        study = study if dense is None else study.rewound(k, dense)
        print(f"run: {study.folder(config.store)}", flush=True)
        for level in islice(followed(study.levels(config.store)), 1 if k in config.dense_steps else None):
            dense = dense or level
            table = level.metrics.assign(rewind_step=k, level_density=level.density, **about)
            yield "networks", table.drop(columns="replica")
            if level.level == 0 or level.level in measured:
                parents = list(_dense(level, k) if level.level == 0 else _subnetworks(level))
                for rows, lines in _pairs(study, parents, k, shown, config.n_alphas, config.out):
                    yield "children", rows.assign(**about)
                    yield "paths", lines
                if curved is not None and parents:
                    yield "curvature", pd.DataFrame([_about(p, k) | curvature(study.model, p, curved) for p in parents])


def _curved(study: tl.Study, n: int) -> tl.Task:
    """The examples of the curvature.

    Raises:
        Refused: None at all or fewer are there, or a network whose second derivatives are not to be had.
    """
    task = study.task.limit(train=n)
    first = Parent("dense", 0, 0, 1.0, Start(tl.state(study.model), tl.masks.ones(study.model, study.names), 0), None)
    curvature(study.model, first, task.limit(train=min(n, 8)))  # before anything is trained
    return task


def curvature(model: nn.Module, parent: Parent, task: tl.Task) -> dict[str, float]:
    """Largest eigenvalues of Hessian and Gauss-Newton matrix at theta_k, batch norm statistics estimated anew."""
    begun, masks = parent.start.begun, parent.start.masks
    at = State(begun.params, recalibrate(model, begun, task.train.x, masks=masks))
    return {
        f"{matrix}_top": float(tl.curvature.top_eigenvalues(model, at, task, matrix=matrix, masks=masks).values[0])
        for matrix in get_args(MatrixName)
    }


def _about(parent: Parent, k: int) -> dict[str, Any]:
    return {
        "rewind_step": k,
        "level": parent.level,
        "density": parent.density,
        "treatment": parent.treatment,
        "init_seed": parent.init_seed,
    }


def _dense(level: tl.Level, k: int) -> Iterator[Parent]:
    """Only a child that began with fresh optimizer state is one: the network that went on is one for k = 0 alone."""
    for seed in survivors(level):
        one = level.select(treatment="ticket", init_seed=seed)
        order = int(one.metrics["order_seed"].iloc[0])
        start = Start(one.snapshots[k], one.masks, order)
        yield Parent("dense", seed, 0, 1.0, start, one.end if k == 0 else None)


def _subnetworks(level: tl.Level) -> Iterator[Parent]:
    """Those whose weights at the start are a draw or a rewinding: the others have no k."""
    for about, one in each_network(level):
        treatment = about["treatment"]
        if treatment in TREATMENTS and TREATMENTS[treatment].seed_fixed:
            start = Start(one.start, one.masks, int(one.metrics["order_seed"].iloc[0]))
            yield Parent(treatment, about["init_seed"], level.level, about["density"], start, one.end)


def _pairs(
    study: tl.Study, parents: Sequence[Parent], k: int, shown: tl.Task, n_alphas: int, store: Path
) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Two children of every parent, those that are missing trained in one stack; the lines of a treatment at a time."""
    if not parents:  # all have diverged
        return
    missing = [p for p in parents if p.child is None]
    jobs = [p.start for p in missing]
    jobs += [replace(p.start, order_seed=sibling_order(p.start.order_seed, p.level)) for p in parents]
    label = f"children, k = {k}, level {parents[0].level}"
    how: dict[str, Any] = {"first_step": k, "progress": label, "store": store}
    trained = tl.train(study.model, jobs, study.task, study.config.recipe, **how)
    lost = trained.metrics["diverged_step"].notna()
    ends = [None if lost[r] else trained.end.select(r) for r in range(len(jobs))]
    firsts = dict(zip(map(id, missing), ends, strict=False))
    pairs = [
        (p, p.child if p.child is not None else firsts[id(p)], b)
        for p, b in zip(parents, ends[len(missing) :], strict=True)
    ]
    for treatment in dict.fromkeys(p.treatment for p in parents):
        whole = [(p, a, b) for p, a, b in pairs if p.treatment == treatment and a is not None and b is not None]
        if whole:
            yield _measured(study.model, whole, k, shown, n_alphas)


def _measured(
    model: nn.Module, pairs: Sequence[tuple[Parent, State, State]], k: int, shown: tl.Task, n_alphas: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    parents = [p for p, _, _ in pairs]
    a, b = (stack_states(list(side)) for side in ([a for _, a, _ in pairs], [b for _, _, b in pairs]))
    path = linear_path(model, a, b, shown, masks=stack([p.start.masks for p in parents]), n_alphas=n_alphas)
    front = pd.DataFrame([_about(p, k) for p in parents])
    apart = pd.DataFrame([_distances(p.start.begun.params, x.params, y.params) for p, x, y in pairs])
    lines = front.merge(path.table, left_index=True, right_on="replica").drop(columns="replica")
    return pd.concat([front, _heights(path), apart], axis=1), lines


def _heights(path: LinearPath) -> pd.DataFrame:
    """Barriers above the mean of the ends, and the errors of the ends."""
    ends = {f"test_error_{side}": path.curves["test", "error"][at] for side, at in (("a", 0), ("b", -1))}
    barriers = {
        f"{split}_barrier_{metric}": path.barrier(metric, split, "mean")
        for split in ("train", "test")
        for metric in ("error", "loss_nats")
    }
    return pd.DataFrame({**barriers, **ends})


def _distances(start: Params, a: Params, b: Params) -> dict[str, float]:
    """Between the children, of all parameters; and how far the first has come from theta_k."""
    # by name: what was stored and read again stands in another order than what was trained just now
    flat = [torch.cat([params[name].double().flatten() for name in start]) for params in (start, a, b)]
    travelled = [one - flat[0] for one in flat[1:]]
    cosine = torch.nn.functional.cosine_similarity(flat[1], flat[2], dim=0)
    together = torch.nn.functional.cosine_similarity(travelled[0], travelled[1], dim=0)
    return {
        "l2_distance": float((flat[1] - flat[2]).norm()),
        "cosine_distance": 1 - float(cosine),
        "travelled_cosine": float(together),
        "l2_travelled": float(travelled[0].norm()),
    }


def claims(children: pd.DataFrame) -> pd.DataFrame:
    """Per k, level and treatment: instability with its 95 % interval, and the error above the dense network's.

    ``error_above_dense`` is the mean of both children's test errors, less that of the dense network's first child
    from the least k, paired by seed. ``matching``: within one standard deviation of the dense networks' error, in the
    mean over n seeds. ``stable``: the mean error barrier is below 2 %.
    """
    errors = children.assign(error=children[["test_error_a", "test_error_b"]].mean(axis=1))
    first = errors["rewind_step"].min()
    dense = errors[(errors["treatment"] == "dense") & (errors["rewind_step"] == first)].set_index("init_seed")[
        "test_error_a"
    ]
    rows = []
    keys = ["rewind_step", "level", "density", "treatment"]
    for cell, group in errors.groupby(keys, sort=False):
        unstable = interval(group["test_barrier_error"], "instability")
        above = interval((group.set_index("init_seed")["error"] - dense).dropna(), "error_above_dense")
        sd = float(dense.std(ddof=1)) if len(dense) > 1 else np.nan
        rows.append(
            dict(zip(keys, cell, strict=True))
            | {
                f"instability_{k}" if k in ("low", "high") else k: v
                for k, v in unstable.items()
                if k not in ("sd", "p_value")
            }
            | {"stable": unstable["instability"] < STABLE, "error": float(group["error"].mean())}
            | {k if k == "error_above_dense" else f"above_{k}": v for k, v in above.items() if k not in ("n", "sd")}
            | {"dense_sd": sd, "matching": above["error_above_dense"] <= sd}
        )
    return pd.DataFrame(rows)


def summary(tables: Tables) -> pd.DataFrame:
    """Instability and test error per step k, density and treatment: mean ± sd over n pairs of children."""
    keys = ["rewind_step", "level", "density", "treatment"]
    children = tables["children"]
    children = children.assign(error=children[["test_error_a", "test_error_b"]].mean(axis=1))
    shown = grouped(children, keys, {"instability_%": "test_barrier_error", "error_%": "error"})
    claimed = tables["claims"].set_index(keys)
    shown = shown.assign(stable=claimed["stable"], matching=claimed["matching"])
    shown["above_dense_%"] = (100 * claimed["error_above_dense"]).map("{:.2f}".format)
    shown = shown.droplevel("level").rename_axis(index={"rewind_step": "k"})
    return shown[["instability_%", "stable", "error_%", "above_dense_%", "matching", "n"]]


if __name__ == "__main__":
    sys.exit(main("instability", Config, run, draw, summary))
