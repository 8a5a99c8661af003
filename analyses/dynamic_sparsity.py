"""Sparse training that moves its mask against tickets: the same live weights, and the same cost of training.

At chosen levels of an IMP run, networks from the same initialisations, with the same batches and exactly as many live
weights as the ticket are trained by RigL, SET, static random masks (spread over layers by Erdos-Renyi-Kernel) and
gradual magnitude pruning, for the T steps that one round of IMP takes. That is far less than IMP, which trains all
levels before it too, so all four are also extended: to as many optimizer *steps* as IMP took in all its rounds up to
that level, or to as many multiply-adds (*macs*), where live weights alone count and RigL's updates need a dense
gradient.

With no arguments it makes a run on the bundled digits and trains beside it in a few minutes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Literal

import pandas as pd
from torch import nn

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
from analyses.intervals import interval, with_holm
from figures.dynamic_sparsity import draw
from ticketlab import masks as mask_ops
from ticketlab.engine import cost
from ticketlab.engine.dynamic import DropGrow, Dynamics, Gradual, Spread, layer_counts, sparse_masks
from ticketlab.engine.start import Start
from ticketlab.errors import Refused
from ticketlab.printed import grouped
from ticketlab.state import Masks, State, select

METHODS = ("static", "set", "rigl", "gradual")
Extend = Literal["none", "steps", "macs"]


@dataclass(frozen=True)
class Config(OfRun):
    """RigL, SET, static masks, gradual pruning and IMP at equal density and at equal training cost."""

    at_levels: tuple[int, ...] | None = None
    """Levels whose density is compared; None: every second one of the sparser half."""
    n_seeds: int | None = None
    """Number of init seeds of the run to use, the first ones; None: all."""
    spread: Spread = "erdos_renyi_kernel"
    """Spread of live weights over layers, of all methods but IMP."""
    update_every: int = 100
    """Steps between two updates of a mask."""
    extend: Extend = "steps"
    """Longer training of each, as long as IMP in all: in steps, in macs, or none."""
    extend_at: tuple[int, ...] | None = None
    """Levels at which training is extended; None: all that are compared."""

    def __post_init__(self) -> None:
        DropGrow(every=self.update_every)  # refused before IMP has trained


@dataclass(frozen=True)
class Problem:
    """What every network is trained from."""

    model: nn.Module
    task: tl.Task
    recipe: tl.Recipe
    init: State
    """Stacked initial weights, one for each seed."""
    init_seeds: tuple[int, ...]
    order_seeds: tuple[int, ...]
    sizes: dict[str, int]
    """Weights of each layer that is pruned."""
    config: Config

    @cached_property
    def uses(self) -> dict[str, float]:
        """How often an example uses each weight."""
        return cost.positions(self.model, self.task.train.x, tuple(self.sizes))

    def counts(self, density: float) -> dict[str, int]:
        """Live weights of each layer."""
        names, x = tuple(self.sizes), self.task.train.x
        return layer_counts(self.model, density, self.config.spread, prunable=names, x=x)


def run(config: Config) -> Tables:
    """``networks``: one row per network. ``layers``: live weights of each layer. ``contrasts``: pairs of methods."""
    study, model, task, levels = open_run(config)
    wanted = _wanted(config, study)
    problem: Problem | None = None
    spent = pd.DataFrame()
    tables, layers = [], []
    for level in levels:
        tickets = level.metrics[level.metrics["treatment"] == "ticket"].set_index("init_seed")
        spent = tickets[["steps", "macs_live"]] if level.level == 0 else spent + tickets[["steps", "macs_live"]]
        problem = problem or _problem(config, study, model, task, level)
        if level.level == 0:
            tables.append(_imp("dense", level, spent, problem))
        elif level.level in wanted:
            imp = _imp("imp", level, spent, problem)
            counts = problem.counts(int(imp["kept"].iloc[0]) / sum(problem.sizes.values()))
            tables += [imp, *_beside(problem, level, imp, counts)]
            layers += _layers(problem, level, counts)
    about = {"task": study.task, "model": study.model, "spread": config.spread, "update_every": config.update_every}
    networks = pd.concat(tables, ignore_index=True)
    dense = networks.loc[networks["method"] == "dense", "macs"].iloc[0]
    networks.insert(networks.columns.get_loc("macs") + 1, "dense_trainings", networks["macs"] / dense)
    found = {"networks": networks, "layers": joined(layers), "contrasts": contrasts(networks)}
    return {name: table.assign(**about) for name, table in found.items()}


def _wanted(config: Config, study: tl.ImpConfig) -> set[int]:
    half = range(study.levels, max(0, study.levels // 2 - 1), -2)
    wanted = chosen_levels(config.at_levels, study.levels, half, first=1)
    if config.extend_at and config.extend == "none":
        raise Refused(f"extend_at says where --extend trains longer: got {config.extend_at} beside --extend none.")
    if not set(config.extend_at or ()) <= wanted:
        raise Refused(f"extend_at must be among the compared levels {sorted(wanted)}: got {config.extend_at}.")
    if config.extend != "none" and callable(study.recipe.schedule):
        raise Refused(
            "a schedule of your own cannot be stretched to longer training: take a named one, or --extend none."
        )
    return wanted


def _problem(config: Config, study: tl.ImpConfig, model: nn.Module, task: tl.Task, dense: tl.Level) -> Problem:
    n = len(study.init_seeds) if config.n_seeds is None else config.n_seeds
    if not 2 <= n <= len(study.init_seeds):
        raise Refused(f"n_seeds must be 2 to the run's {len(study.init_seeds)} init seeds: got {n}.")
    seeds, orders = study.init_seeds[:n], (study.order_seeds or study.init_seeds)[:n]
    init = dense.snapshots[0].select(list(range(n)))
    sizes = {name: dense.masks[name][0].numel() for name in pruned_names(model, dense)}
    return Problem(model, task, study.recipe, init, seeds, orders, sizes, config)


def _imp(method: str, level: tl.Level, spent: pd.DataFrame, problem: Problem) -> pd.DataFrame:
    """IMP's networks, with the steps and the macs of all rounds up to this one."""
    rows = level.metrics[level.metrics["treatment"] == "ticket"].set_index("init_seed").loc[list(problem.init_seeds)]
    totals = spent.loc[rows.index].rename(columns={"macs_live": "macs"})
    columns = ["order_seed", "density", "kept", "prunable", "test_error", "test_loss_nats"]
    table = pd.concat([rows[columns], totals], axis=1).reset_index()
    return table.assign(method=method, level=level.level)


def _beside(problem: Problem, level: tl.Level, imp: pd.DataFrame, counts: dict[str, int]) -> list[pd.DataFrame]:
    """All methods at the density of a level, and again at IMP's cost."""
    config, recipe = problem.config, problem.recipe
    tables = [_train(problem, level.level, counts, recipe, METHODS)]
    if config.extend != "none" and (config.extend_at is None or level.level in config.extend_at):
        recipes = {method: _extended(problem, counts, recipe, imp, method) for method in METHODS}
        for longer in dict.fromkeys(recipes.values()):  # one stack for all of as many steps
            together = tuple(method for method in METHODS if recipes[method] == longer)
            tables.append(_train(problem, level.level, counts, longer, together, suffix=f"_{config.extend}"))
    return tables


def _extended(problem: Problem, counts: dict[str, int], recipe: tl.Recipe, imp: pd.DataFrame, method: str) -> tl.Recipe:
    """The recipe stretched to IMP's steps or macs; milestones, warm-up and looks in proportion."""
    if problem.config.extend == "steps":
        steps = int(imp["steps"].iloc[0])
    else:
        once = _macs(problem, counts, _dynamics(problem, method, counts, seed=0), recipe)
        steps = round(recipe.steps * float(imp["macs"].iloc[0]) / once)
    factor = steps / recipe.steps
    return replace(
        recipe,
        steps=steps,
        milestones=tuple(round(m * factor) for m in recipe.milestones),
        warmup_steps=round(recipe.warmup_steps * factor),
        eval_every=max(1, round(recipe.eval_every * factor)),
    )


def _train(
    problem: Problem, level: int, counts: dict[str, int], recipe: tl.Recipe, methods: tuple[str, ...], suffix: str = ""
) -> pd.DataFrame:
    """Methods x seeds in one stack."""
    jobs = [(method, r) for method in methods for r in range(len(problem.init_seeds))]
    starts = [_start(problem, method, counts, r) for method, r in jobs]
    label = f"level {level}, {', '.join(methods)}{suffix}"
    outcome = tl.train(problem.model, starts, problem.task, recipe, progress=label, store=problem.config.out)
    results = outcome.metrics[["test_error", "test_loss_nats"]]
    rows = []
    for i, (start, (method, r)) in enumerate(zip(starts, jobs, strict=True)):
        last = select(outcome.masks, i)
        rows.append(
            {
                "init_seed": problem.init_seeds[r],
                "order_seed": problem.order_seeds[r],
                "density": float(mask_ops.density(last)),
                "kept": int(mask_ops.kept(last)),
                "prunable": mask_ops.total(last),
                "steps": recipe.steps,
                "macs": _macs(problem, counts, start.dynamics, recipe),
                "method": method + suffix,
                "level": level,
                "moved": _moved(start.masks, last) if results["test_error"].notna()[i] else float("nan"),
            }
        )
    return pd.concat([pd.DataFrame(rows), results], axis=1)


def _dynamics(problem: Problem, method: str, counts: dict[str, int], seed: int) -> Dynamics | None:
    every = problem.config.update_every
    if method == "gradual":
        return Gradual(counts, every=every)
    growth = {"rigl": "gradient", "set": "random"}
    return DropGrow(growth[method], every=every, seed=seed) if method in growth else None  # type: ignore[arg-type]


def _start(problem: Problem, method: str, counts: dict[str, int], r: int) -> Start:
    """RigL, SET and static training start from the same random mask, gradual pruning from a dense network."""
    begun, seed = problem.sizes if method == "gradual" else counts, problem.init_seeds[r]
    masks = sparse_masks(problem.model, begun, seed, prunable=tuple(counts))
    masks = {name: mask.to(problem.task.device) for name, mask in masks.items()}
    dynamics = _dynamics(problem, method, counts, seed)
    return Start(problem.init.select(r), masks, problem.order_seeds[r], dynamics=dynamics)


def _macs(problem: Problem, counts: dict[str, int], dynamics: Dynamics | None, recipe: tl.Recipe) -> int:
    """Multiply-adds of a training in which live weights alone cost anything.

    A descent costs three forward passes of the live network (``cost.training_macs``). An update takes its place: with
    RigL a forward pass and the gradient of the activations, both sparse, and a dense gradient of the weights (Evci et
    al. 2020, appendix H); with SET and gradual pruning nothing.
    """
    live, dense = cost.forward_macs(problem.uses, counts), cost.forward_macs(problem.uses, problem.sizes)
    updates = dynamics.update_steps(recipe.steps) if dynamics else range(0)
    if isinstance(dynamics, Gradual):
        return sum(
            cost.training_macs(
                cost.forward_macs(
                    problem.uses,
                    {name: dynamics.kept_at(name, size, step, recipe.steps) for name, size in problem.sizes.items()},
                ),
                recipe.batch_size,
                1,
            )
            for step in range(recipe.steps)
            if step not in updates
        )
    descents = cost.training_macs(live, recipe.batch_size, recipe.steps - len(updates))
    looks = isinstance(dynamics, DropGrow) and dynamics.growth == "gradient"
    return descents + (len(updates) * recipe.batch_size * (2 * live + dense) if looks else 0)


def _moved(before: Masks, after: Masks) -> float:
    """The share of live weights at the end that were dead at the start."""
    new = sum(int((after[name] & ~before[name]).sum()) for name in after)
    return new / int(mask_ops.kept(after))


def _layers(problem: Problem, level: tl.Level, counts: dict[str, int]) -> list[pd.DataFrame]:
    """Live weights of each layer in the ticket of the first seed that stayed finite and in the other methods' masks."""
    first = [seed for seed in problem.init_seeds if seed in survivors(level)][:1]
    tickets = [level.select(treatment="ticket", init_seed=seed).masks for seed in first]
    rows = [
        {"level": level.level, "layer": name, "size": size, "imp": int(ticket[name].sum()), "others": counts[name]}
        for ticket in tickets
        for name, size in problem.sizes.items()
    ]
    return [pd.DataFrame(rows)] if rows else []


def contrasts(networks: pd.DataFrame) -> pd.DataFrame:
    """Differences in test error between every two methods, paired by seed, with 95 % intervals by Student's t.

    ``p_value`` is unadjusted, ``p_holm`` corrected for the whole table.
    """
    rows = []
    for level, group in networks[networks["level"] > 0].groupby("level"):
        wide = group.pivot(index="init_seed", columns="method", values="test_error")
        for a, b in combinations(sorted(wide), 2):
            about = {"level": level, "density": group["density"].iloc[0], "a": a, "b": b}
            rows.append(about | interval(wide[a] - wide[b], "error_a_minus_b"))
    return with_holm(pd.DataFrame(rows))


def summary(tables: Tables) -> pd.DataFrame:
    """Test error by level and method, mean ± sd over n seeds, and whether it differs from IMP's.

    ``p_unadjusted`` is of one paired difference by itself, the last column is corrected for all of the contrasts.
    """
    pairs, keys = tables["contrasts"], ["level", "method"]
    imp = pd.concat([pairs[pairs[a] == "imp"].set_index(["level", b]).rename_axis(keys) for a, b in ("ab", "ba")])
    named = {"p_value": "p_unadjusted", "p_holm": f"p_holm_of_{pairs['n_family'].iloc[0]}"}
    networks = tables["networks"].sort_values([*keys], kind="stable")
    columns = {
        "density": "density",
        "test_error_%": "test_error",
        "steps": "steps",
        "dense_trainings": "dense_trainings",
    }
    return grouped(networks, keys, columns).join(imp[list(named)].rename(columns=named))


if __name__ == "__main__":
    sys.exit(main("dynamic_sparsity", Config, run, draw, summary))
