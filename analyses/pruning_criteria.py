"""How good are the masks of each pruning criterion, and what does finding them cost?

A run of iterative magnitude pruning says how many weights are kept at each level. At chosen levels every other
method finds a mask with as many, and all masks, methods x seeds, are trained in one stack from the weights that the
tickets are rewound to, in their batch order. The cost of finding a mask is counted in multiply-adds, in multiples
of one dense training: what was trained before it could be found, and the scoring.

A method is ``criterion[@stage][*rounds][/scope]``: ``snip``, ``magnitude@early``, ``snip*100``, ``synflow/layer``.
The stage is where scores are taken: at ``init``, ``early`` or ``trained``. Under ``/global``, which holds where
nothing is said, one threshold prunes the network; under ``/layer`` each layer keeps as many weights as in the ticket of
that level, under ``/erk`` as many as Erdos-Renyi-Kernel gives it: ``random/erk`` is the fair random mask. Stage and
rounds are those of the criterion's authors where they are left out.

With no arguments it makes a run on the bundled digits and measures it in a few minutes.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
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
    pruned_names,
    survivors,
)
from figures.pruning_criteria import draw
from ticketlab import graph
from ticketlab.engine import cost
from ticketlab.engine.criteria import CRITERIA, ZHOU, Criterion, Evidence, Scores, ZeroScoresError, find_counts, score
from ticketlab.engine.dynamic import layer_counts
from ticketlab.engine.start import Start
from ticketlab.errors import Refused, nearest
from ticketlab.losses import LOSSES, Loss
from ticketlab.masks import Scope, n_alive, prunable
from ticketlab.printed import across, grouped
from ticketlab.state import Masks

STAGES = ("init", "early", "trained")
METHODS = (
    *("random", "random/erk", "snip", "snip*10", "grasp", "synflow"),
    *("magnitude@early", "magnitude", "obd_gauss_newton", "obd_fisher"),
    *ZHOU,
    *("large_final_same_sign", "magnitude_increase_same_sign", "large_final_different_sign"),
)


@dataclass(frozen=True)
class Config(OfRun):
    """Accuracy of the masks of every criterion at equal density, and what it costs to find them."""

    methods: tuple[str, ...] = METHODS
    """Methods to compare with the run's tickets, each criterion[@stage][*rounds][/scope]."""
    at_levels: tuple[int, ...] | None = None
    """Levels whose densities are compared; None: every second one, the last where there is none."""
    replicas: int | None = None
    """Number of init seeds of the run to use, the first ones; None: all."""
    early_step: int = 100
    """Step of the dense training at which @early takes its scores."""

    def __post_init__(self) -> None:
        if len(set(self.methods)) < len(self.methods):
            raise Refused(f"methods must be given once: got {self.methods}.")
        for name in self.methods:
            parse(name)
        if self.replicas is not None and self.replicas < 1:
            raise Refused(f"replicas must be at least 1: got {self.replicas}.")


@dataclass(frozen=True)
class Method:
    """A criterion with all that it leaves open."""

    name: str
    criterion: str
    stage: str
    rounds: int
    scope: Literal["global", "layer", "erk"]


def parse(name: str) -> Method:
    """The method of a name, what is left out filled in as in the literature."""
    found = re.fullmatch(r"(\w+)(?:@(\w+))?(?:\*([1-9]\d*))?(?:/(global|layer|erk))?", name)
    if not found:
        raise Refused(f"a method must be criterion[@stage][*rounds][/global, /layer or /erk]: got {name!r}.")
    criterion, stage, rounds, scope = found.groups()
    if criterion not in CRITERIA:
        raise Refused(nearest("criterion", criterion, tuple(CRITERIA)))
    record = CRITERIA[criterion]
    stage = stage or record.stage
    if stage not in STAGES:
        raise Refused(nearest("stage", stage, STAGES))
    return Method(name, criterion, stage, int(rounds or record.rounds), scope or "global")  # type: ignore[arg-type]


@dataclass
class _Finder:
    """Masks by every method from the dense networks of a run; one-shot scores are kept for all densities."""

    study: tl.ImpConfig
    early_step: int
    model: nn.Module
    task: tl.Task
    dense: tl.Level
    store: Path
    """Where its trainings are kept."""
    scores: dict[tuple[str, int], Scores]

    def evidence(self, method: Method, init_seed: int) -> Evidence:
        network = self.dense.select(init_seed=init_seed)
        states = {"init": network.snapshots[0], "early": network.snapshots.get(self.early_step), "trained": network.end}
        state = states[method.stage]
        if state is None:
            raise Refused(
                f"{method.name} needs the dense networks at step {self.early_step}: the run has them at "
                f"{sorted(network.snapshots)}. Choose one of these as early_step."
            )
        masks = {name: network.masks[name] for name in pruned_names(self.model, self.dense)}
        x, y = tl.criteria.draw_examples(self.task, self.study.score_examples, init_seed)
        loss: Loss = LOSSES[self.task.loss]
        scope: Scope = "global" if method.scope == "global" else "layer"
        return Evidence(self.model, masks, network.snapshots[0], state, x, y, init_seed, scope, loss)

    def masks(self, method: Method, init_seed: int, ticket: Masks) -> Masks | None:
        """As many weights as the ticket has; None where the method scores nothing but zeros, or cuts the network."""
        counts = {(tuple(ticket) if method.scope == "global" else (name,)): 0 for name in ticket}
        counts = {names: n_alive(ticket, names) for names in counts}
        if method.scope == "erk":
            density = float(tl.masks.density(ticket))
            counts = {(n,): k for n, k in layer_counts(self.model, density, prunable=tuple(ticket)).items()}
        evidence, criterion = self.evidence(method, init_seed), CRITERIA[method.criterion]
        try:
            if method.rounds == 1:
                key = method.name, init_seed
                if key not in self.scores:
                    self.scores[key] = score(method.criterion, evidence)
                criterion = Criterion(lambda _: self.scores[key])
            found = find_counts(criterion, evidence, counts, rounds=method.rounds)
        except ZeroScoresError:
            return None
        try:
            graph.refuse_cut(self.model, found, self.task.train.x)
        except Refused:
            return None
        return found

    def dense_trainings(self, method: Method) -> float:
        """What comes before the mask is known, the rewind point included, in dense trainings."""
        study, everything = self.study, {n: m[0].numel() for n, m in self.dense.masks.items()}
        uses = cost.positions(self.model, self.task.train.x, pruned_names(self.model, self.dense))
        forward = cost.forward_macs(uses, everything)
        training = cost.training_macs(forward, study.recipe.batch_size, study.recipe.steps)
        n = min(study.score_examples, len(self.task.train))
        size, record = sum(everything.values()), CRITERIA[method.criterion]
        passes = record.forward_passes(n, self.task.n_classes, size, method.rounds)
        steps = {"init": 0, "early": self.early_step, "trained": study.recipe.steps}[method.stage]
        return max(steps, study.rewind_step) / study.recipe.steps + passes * forward / training


def run(config: Config) -> Tables:
    """``networks``: one row per method, level and replica; methods ``dense`` and ``imp`` are those of the run."""
    methods = [parse(name) for name in config.methods]
    if not config.run and any(m.stage == "early" for m in methods):
        steps = tuple(sorted({*config.study.snapshot_steps, config.early_step}))
        config = replace(config, study=replace(config.study, snapshot_steps=steps))
    study, model, task, levels = open_run(config)
    wanted = _wanted(config, study.levels)
    if config.replicas is not None and config.replicas > len(study.init_seeds):
        raise Refused(f"replicas must be 1 to the run's {len(study.init_seeds)} init seeds: got {config.replicas}.")
    order_seeds = (study.order_seeds or study.init_seeds)[: config.replicas]
    study = replace(study, init_seeds=study.init_seeds[: config.replicas], order_seeds=order_seeds)
    for method in methods:
        tl.criteria.refuse_too_large(method.criterion, model, prunable(model, study.prunable or None))
    finder, tables, spent = None, [], _Spent()
    for level in levels:
        tickets = level.metrics.query("treatment == 'ticket' and init_seed in @study.init_seeds")
        finder = finder or _Finder(study, config.early_step, model, task, level, config.out, {})
        if level.level == 0 or level.level in wanted:
            found = spent.before(tickets)
            tables.append(
                tickets.assign(method="imp" if level.level else "dense", level_density=level.density, **found)
            )
        if level.level in wanted:
            tables.append(_compared(finder, methods, level))
        spent.add(tickets)
    about = {"task": study.task, "model": study.model, "steps": study.recipe.steps, "rewind_step": study.rewind_step}
    kept = [*_LABELS, "density", "kept", *_COSTS, "early_stop_step", *_RESULTS]
    networks = joined(tables).reindex(columns=kept)
    return {"networks": networks.assign(**about, early_step=config.early_step)}


def _wanted(config: Config, last: int) -> set[int]:
    return chosen_levels(config.at_levels, last, set(range(2, last + 1, 2)) or {last}, first=1)


_LABELS = ("method", "criterion", "stage", "rounds", "scope", "level", "level_density", "init_seed", "cuts_the_network")
_COSTS = ("dense_trainings", "live_trainings")
_RESULTS = ("test_error", "test_loss_nats", "train_error", "train_loss_nats", "early_stop_test_error")


class _Spent:
    """What a run has trained before a level, for each replica, in dense trainings."""

    def __init__(self) -> None:
        self.dense: pd.Series | float = 0.0
        self.live: pd.Series | float = 0.0
        self.unit: pd.Series | None = None

    def before(self, tickets: pd.DataFrame) -> dict[str, Any]:
        costs = zip(_COSTS, (self.dense, self.live), strict=True)
        return {n: tickets["init_seed"].map(c) if isinstance(c, pd.Series) else c for n, c in costs}

    def add(self, tickets: pd.DataFrame) -> None:
        rows = tickets.set_index("init_seed")
        self.unit = rows["macs_dense"] if self.unit is None else self.unit
        self.dense = self.dense + rows["macs_dense"] / self.unit
        self.live = self.live + rows["macs_live"] / self.unit


def _compared(finder: _Finder, methods: list[Method], level: tl.Level) -> pd.DataFrame:
    """The masks of every method with as many weights as the tickets of a level, trained in one stack."""
    study, rows, masks = finder.study, [], []
    finite = [i for i, seed in enumerate(study.init_seeds) if seed in survivors(level)]
    pairs = [(method, i) for method in methods for i in finite]
    orders = study.order_seeds or study.init_seeds
    for method, i in tqdm(pairs, desc=f"masks of level {level.level}", unit="mask", disable=None):
        ticket = level.select(treatment="ticket", init_seed=study.init_seeds[i]).masks
        found = finder.masks(method, study.init_seeds[i], ticket)
        spent = finder.dense_trainings(method)
        about = {"method": method.name, "criterion": method.criterion, "stage": method.stage, "rounds": method.rounds}
        about |= {"scope": method.scope, "level": level.level, "level_density": level.density}
        about |= {"init_seed": study.init_seeds[i], "order_seed": orders[i], "cuts_the_network": found is None}
        rows.append({**about, "dense_trainings": spent, "live_trainings": spent})
        masks.append(found)
    table = pd.DataFrame(rows)
    trained = [r for r, found in enumerate(masks) if found is not None]
    if not trained:
        return table
    kept = [found for found in masks if found is not None]
    starts = [
        Start(finder.dense.select(init_seed=rows[r]["init_seed"]).start, mask, rows[r]["order_seed"])
        for r, mask in zip(trained, kept, strict=True)
    ]
    label = f"{len(trained)} networks at density {level.density:.3g}"
    how: dict[str, Any] = {"first_step": study.rewind_step, "progress": label, "store": finder.store}
    outcome = tl.train(finder.model, starts, finder.task, study.recipe, **how)
    results = outcome.metrics.drop(columns="replica").set_axis(trained)
    results["kept"] = [int(tl.masks.kept(found)) for found in kept]
    results["density"] = [float(tl.masks.density(found)) for found in kept]
    return table.join(results)


def summary(tables: Tables) -> pd.DataFrame:
    """Test error in percent at each density, and the cost of the sparsest mask in dense trainings: mean ± sd over n."""
    table = tables["networks"].sort_values("level_density", ascending=False, kind="stable")
    table = table.assign(kept=[f"{100 * d:.3g} %" for d in table["level_density"]])
    last = table[table["level"].isin([0, table["level"].max()])]
    cost = grouped(last, ["method"], {"dense_trainings": "dense_trainings"})["dense_trainings"]
    shown = across(table, ["method"], "kept", "test_error").join(cost)
    return shown.loc[[m for m in tables["networks"]["method"].unique() if m in shown.index]]


if __name__ == "__main__":
    sys.exit(main("pruning_criteria", Config, run, draw, summary))
