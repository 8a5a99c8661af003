"""Linear mode connectivity of tickets: what lies on the line between two networks.

Two questions, at every level of a run and for every rewind step k that its dense networks were kept at:

- theta_k to theta_T: is the network that training starts from joined to the one it ends in without a barrier?
- siblings: do two children of theta_k that differ in batch order alone end in one linearly connected region?
  Their error barrier is the instability of Frankle et al. (2020); below 2 % counts as stable.

With ``--align`` a third, at every level or at ``--align-levels``:

- independent: do networks of two init seeds end in one region once the hidden units of one are reordered to match
  the other's (Ainsworth et al. 2022)? Their lines are measured before and after matching.

With no arguments it makes a run on the bundled digits and measures it in a few minutes. ``--run`` measures a run
that exists; otherwise the flags say which run to make or resume.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

import ticketlab as tl
from analyses.command import (
    OfRun,
    Tables,
    chosen_levels,
    joined,
    main,
    open_run,
    survivors,
)
from figures.mode_connectivity import INDEPENDENT, MATCHED, draw
from ticketlab import permutation
from ticketlab.connectivity import Path as LinearPath
from ticketlab.connectivity import linear_path
from ticketlab.engine.start import Start
from ticketlab.engine.treatments import sibling_order
from ticketlab.errors import Refused
from ticketlab.printed import grouped
from ticketlab.state import Masks, State, stack_states


@dataclass(frozen=True)
class Config(OfRun):
    """Loss and error on the lines theta_k to theta_T and between siblings, against density and against k."""

    n_alphas: int = 31
    """Points per line, both ends included."""
    train_examples: int | None = 10_000
    """Training examples that the lines are evaluated on; None: all."""
    align: bool = False
    """Lines between init seeds too, before and after matching hidden units."""
    align_levels: tuple[int, ...] | None = None
    """Levels that --align measures, from 0; None: all."""


@dataclass(frozen=True)
class Line:
    """One measurement to make: two stacks of networks under one mask."""

    question: str
    level: int
    density: float
    rewind_step: int
    init_seeds: tuple[int, ...]
    a: State
    b: State
    masks: Masks | None
    """None where both ends are m * theta already, under masks of their own."""
    partners: tuple[int, ...] | None = None
    """Init seeds of b where they are not those of a."""


def run(config: Config) -> Tables:
    """``paths``: loss and error at every alpha. ``barriers``: their heights, by metric, split and baseline."""
    study, model, task, levels = open_run(config)
    aligned = _align_levels(config, study)
    shown = task if config.train_examples is None else task.limit(train=min(config.train_examples, len(task.train)))
    paths, barriers = [], []
    for level in levels:
        lines = list(_lines(study, level, model, task, config.out))
        if level.level in aligned:
            lines += _independent(study, level, model, task)
        for line in tqdm(lines, desc=f"lines of level {level.level}", unit="line", disable=None):
            path = linear_path(model, line.a, line.b, shown, masks=line.masks, n_alphas=config.n_alphas)
            paths.append(_labelled(line, path.table))
            barriers.append(_labelled(line, _barriers(path)))
    about = {"task": study.task, "model": study.model, "n_train": len(shown.train), "n_test": len(shown.test)}
    # Thousands of points, without the names that every row would repeat.
    return {"paths": joined(paths), "barriers": joined(barriers).assign(**about)}


def _align_levels(config: Config, study: tl.ImpConfig) -> set[int]:
    """The levels whose networks are matched across init seeds: none without ``--align``."""
    if not config.align:
        if config.align_levels is not None:
            raise Refused(f"align_levels says what --align measures: got {config.align_levels} without --align.")
        return set()
    if len(study.init_seeds) < 2:
        raise Refused(f"--align needs at least two init seeds to match: the run has {study.init_seeds}.")
    return chosen_levels(config.align_levels, study.levels, range(study.levels + 1))


def _lines(study: tl.ImpConfig, level: tl.Level, model: nn.Module, task: tl.Task, store: Path) -> Iterator[Line]:
    """Both questions at the run's k, and at level 0 for every k that was kept, of what has not diverged."""
    tickets = {seed: level.select(treatment="ticket", init_seed=seed) for seed in survivors(level)}
    starts = {study.rewind_step: {seed: ticket.start for seed, ticket in tickets.items()}}
    for k in sorted(level.snapshots):
        if k < study.recipe.steps:
            starts[k] = {seed: ticket.snapshots[k] for seed, ticket in tickets.items()}
    for k, start in sorted(starts.items()):
        ends = {seed: (start[seed], ticket.end) for seed, ticket in tickets.items()}
        siblings = _siblings(study, level, model, task, start, k, store) if tickets else {}
        for question, pairs in (("theta_k to theta_T", ends), ("siblings", siblings)):
            if pairs:
                a, b = (stack_states(side) for side in zip(*pairs.values(), strict=True))
                masks = {n: torch.stack([tickets[seed].masks[n] for seed in pairs]) for n in level.masks}
                yield Line(question, level.level, level.density, k, tuple(pairs), a, b, masks)


def _independent(study: tl.ImpConfig, level: tl.Level, model: nn.Module, task: tl.Task) -> Iterator[Line]:
    """Each init seed with the next one, at the end of training, as trained and with b's hidden units matched to a's."""
    seeds = survivors(level)
    if len(seeds) < 2:
        return
    n = len(seeds) if len(seeds) > 2 else 1  # of two seeds there is one pair
    partners = tuple(seeds[(r + 1) % len(seeds)] for r in range(n))
    networks = {seed: level.select(treatment="ticket", init_seed=seed).end for seed in seeds}
    matched = []
    for seed, partner in tqdm(zip(seeds, partners, strict=False), desc="matching", unit="pair", total=n, disable=None):
        a, b = networks[seed], networks[partner]
        found = permutation.align(model, task.train.x[:100], a.params, b.params, buffers_b=b.buffers)
        matched.append(State(found.params, found.buffers))
    first = stack_states([networks[seed] for seed in seeds[:n]])
    ends = {INDEPENDENT: stack_states([networks[p] for p in partners]), MATCHED: stack_states(matched)}
    for question, second in ends.items():
        yield Line(question, level.level, level.density, study.rewind_step, seeds[:n], first, second, None, partners)


def _siblings(
    study: tl.ImpConfig,
    level: tl.Level,
    model: nn.Module,
    task: tl.Task,
    start: dict[int, State],
    k: int,
    store: Path,
) -> dict[int, tuple[State, State]]:
    """Two children of each theta_k that differ in batch order alone: from the run where it has them, or trained."""
    tickets = {seed: level.select(treatment="ticket", init_seed=seed) for seed in start}
    if "sibling" in set(level.metrics["treatment"]):
        both = [seed for seed in survivors(level, "sibling") if seed in start]
        return {seed: (tickets[seed].end, level.select(treatment="sibling", init_seed=seed).end) for seed in both}
    first = dict(zip(study.init_seeds, study.order_seeds or study.init_seeds, strict=True))
    orders = [sibling_order(first[seed], level.level) for seed in start]
    # Only a child that began with fresh optimizer state is a sibling: theta_T of a dense network is one for k = 0.
    known = level.level > 0 or k == 0
    orders = orders if known else [*(first[seed] for seed in start), *orders]
    jobs = [Start(start[seed], tickets[seed].masks, order) for seed, order in zip([*start] * 2, orders, strict=False)]
    label = f"siblings, level {level.level}, k = {k}"
    trained = tl.train(model, jobs, task, study.recipe, first_step=k, progress=label, store=store)
    ends = [None if lost else trained.end.select(r) for r, lost in enumerate(trained.metrics["diverged_step"].notna())]
    ends = [*(ticket.end for ticket in tickets.values()), *ends] if known else ends
    pairs = zip(start, ends[: len(start)], ends[len(start) :], strict=True)
    return {seed: (a, b) for seed, a, b in pairs if a is not None and b is not None}


def _barriers(path: LinearPath) -> pd.DataFrame:
    """Every barrier of a path, one row per replica, split, metric and baseline, with the largest rise."""
    rows = []
    for split, metric in path.curves:
        rises = path.rise(metric, split)
        for baseline in ("mean", "linear", "max"):
            for r, height in enumerate(path.barrier(metric, split, baseline)):
                rows.append(
                    {
                        "replica": r,
                        "split": split,
                        "metric": metric,
                        "baseline": baseline,
                        "barrier": height,
                        "rise": rises[r],
                    }
                )
    return pd.DataFrame(rows)


def _labelled(line: Line, table: pd.DataFrame) -> pd.DataFrame:
    """The table with what was measured in front; replicas are named by their init seed."""
    labels = {"question": line.question, "level": line.level, "density": line.density, "rewind_step": line.rewind_step}
    seeds = table["replica"].map(dict(enumerate(line.init_seeds)))
    front = pd.DataFrame(labels, index=table.index).assign(init_seed=seeds)
    if line.partners is not None:
        front["pairing"] = [f"{line.init_seeds[r]}-{line.partners[r]}" for r in table["replica"]]
    return pd.concat([front, table.drop(columns="replica")], axis=1)


def summary(tables: Tables) -> pd.DataFrame:
    """Barriers per step k: of siblings in test error, theta_k to theta_T in training nats; mean ± sd over n.

    Where init seeds were joined, the barriers of their pairs in test error, as they are and matched.
    """
    table = tables["barriers"]
    errors = table.query("split == 'test' and metric == 'error' and baseline == 'mean'")
    losses = table.query("split == 'train' and metric == 'loss_nats' and baseline == 'linear'")
    siblings, start_end = errors.query("question == 'siblings'"), losses.query("question == 'theta_k to theta_T'")
    keys = ["level", "density", "rewind_step"]
    nats = {"barrier_nats": "barrier", "rise_nats": "rise"}
    parts = [grouped(siblings, keys, {"instability_%": "barrier"}), grouped(start_end, keys, nats).drop(columns="n")]
    for name, question in (("independent_%", INDEPENDENT), ("matched_%", MATCHED)):
        if (rows := errors[errors["question"] == question]).size:
            parts.append(grouped(rows, keys, {name: "barrier"}).rename(columns={"n": "pairs"}))
    found = pd.concat(parts, axis=1).rename_axis(index={"rewind_step": "k"})
    return found.loc[:, ~found.columns.duplicated()]


if __name__ == "__main__":
    sys.exit(main("mode_connectivity", Config, run, draw, summary))
