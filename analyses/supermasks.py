"""Supermasks: what masks reach on weights that are never trained (Zhou et al. 2019, Ramanujan et al. 2020).

Two questions, for every initialisation of a run:

- untrained: the error of m * theta0' for masks of every criterion, taken from the trained dense network in one shot,
  and for the run's own tickets; theta0' is the initialisation, itself or with random signs, or a constant a layer.
- learned: the error of masks learned on frozen weights, by Bernoulli logits and by edge-popup at several densities.

With no arguments it runs on the bundled digits in about a minute.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import pandas as pd
import tyro
from torch import nn
from tqdm import tqdm

import ticketlab as tl
from analyses.command import DIGITS, Tables, main, open_run
from figures.supermasks import draw
from ticketlab.engine.criteria import CRITERIA, Evidence, draw_examples, find, refuse_too_large
from ticketlab.engine.supermask import RECIPES, Method, evaluations, learn_masks
from ticketlab.engine.values import random_signs, signed_constants
from ticketlab.errors import Refused, nearest
from ticketlab.state import Masks, Params, stack, stack_states

STUDY = replace(DIGITS, treatments=("ticket",), levels=6, prune_fraction=0.4)
VALUES: dict[str, Callable[[Params, Masks, int], Params]] = {
    "init": lambda params, masks, seed: dict(params),
    "random_sign": random_signs,
    "signed_constant": lambda params, masks, seed: signed_constants(params, masks),
    "random_constant": lambda params, masks, seed: random_signs(signed_constants(params, masks), masks, seed),
}
OUTPUT_EXPONENT = math.log(0.9) / math.log(0.8)  # the output layer loses 10 % where the others lose 20 %


@dataclass(frozen=True)
class Config:
    """Error of masks on weights that are never trained, chosen by a criterion or learned."""

    run: Path | None = None
    """Take networks and tickets from this run directory; None: make or resume the run that the flags describe."""
    criteria: tuple[str, ...] = (
        *("large_final_same_sign", "large_final", "large_final_different_sign"),
        *("magnitude_increase_same_sign", "large_init", "random"),
    )
    """Of the untrained masks, names in engine.criteria."""
    values: tuple[str, ...] = ("init", "random_sign", "signed_constant", "random_constant")
    """What kept weights are in the untrained masks."""
    densities: tuple[float, ...] = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02)
    """Of every layer but the output, which keeps more: 0.9 where they keep 0.8."""
    learned_values: tuple[str, ...] = ("init", "signed_constant")
    """What the weights under learned masks are."""
    learned_densities: tuple[float, ...] = (0.5, 0.2, 0.05)
    """What edge-popup keeps of each layer."""
    learned_seeds: int = 3
    """How many of the run's initialisations, the first ones, masks are learned on."""
    learned_steps: int = 1500
    """Steps of mask learning; none are learned when 0."""
    draws: int = 10
    """Masks drawn from each network of Bernoulli logits."""
    store: Path = Path("runs")
    """Folder of run directories."""
    out: Path = Path("results")
    """Folder for tables and figures."""
    device: str | None = None
    """Such as cpu or cuda:1; None: a CUDA device if there is one."""
    study: Annotated[tl.ImpConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: STUDY)

    def __post_init__(self) -> None:
        named = [("criterion", name, tuple(CRITERIA)) for name in self.criteria]
        named += [("values", name, tuple(VALUES)) for name in (*self.values, *self.learned_values)]
        for kind, given, known in named:
            if given not in known:
                raise Refused(nearest(kind, given, known))
        checks = {
            "values must name at least one": self.values,
            "learned_values must name at least one": self.learned_values,
            "densities must lie in (0, 1]": all(0 < d <= 1 for d in self.densities),
            "learned_densities must lie in (0, 1)": all(0 < d < 1 for d in self.learned_densities),
            "learned_seeds must be at least 1": self.learned_seeds >= 1,
            "learned_steps must be at least 0": self.learned_steps >= 0,
            "draws must be at least 1": self.draws >= 1,
        }
        for rule, holds in checks.items():
            if not holds:
                raise Refused(f"{rule}: got {getattr(self, rule.split()[0])}.")


@dataclass(frozen=True)
class Problem:
    """What both questions are asked of."""

    config: Config
    study: tl.ImpConfig
    model: nn.Module
    task: tl.Task
    dense: tl.Level

    def starts(self, values: str) -> tl.State:
        """Every initialisation with these values, stacked."""
        masks = tl.masks.ones(self.model)
        states = [self.dense.select(init_seed=seed).snapshots[0] for seed in self.study.init_seeds]
        pairs = zip(states, self.study.init_seeds, strict=True)
        return stack_states([tl.State(VALUES[values](s.params, masks, seed), s.buffers) for s, seed in pairs])


def run(config: Config) -> Tables:
    """``untrained``: one row a mask and kind of values. ``learned``: one row a mask and way to evaluate it."""
    study, model, task, levels = open_run(config.run, config.study, config.store, config.device)
    for criterion in config.criteria:
        refuse_too_large(criterion, model)
    dense, *sparse = levels
    problem = Problem(config, study, model, task, dense)
    tables = {"untrained": pd.concat(list(_untrained(problem, sparse)), ignore_index=True)}
    if config.learned_steps:
        tables["learned"] = pd.concat(list(_learned(problem)), ignore_index=True)
    about = {"task": study.task, "model": study.model, "dense_error": dense.metrics["test_error"].mean()}
    return {name: table.assign(**about) for name, table in tables.items()}


def _untrained(problem: Problem, sparse: list[tl.Level]) -> Iterator[pd.DataFrame]:
    starts = {values: problem.starts(values) for values in problem.config.values}
    test = problem.task.test
    for criterion, target, masks in tqdm(list(_masks(problem, sparse)), desc="untrained", unit="mask", disable=None):
        density = tl.masks.density(masks, stacked=True).tolist()
        for values, start in starts.items():
            loss, error = tl.evaluate(problem.model, start.params, test.x, test.y, masks=masks, buffers=start.buffers)
            found = {"density": density, "loss_nats": loss.tolist(), "error": error.tolist()}
            about = {"criterion": criterion, "values": values, "target_density": target}
            yield pd.DataFrame({"init_seed": problem.study.init_seeds, **about, **found})


def _masks(problem: Problem, sparse: list[tl.Level]) -> Iterator[tuple[str, float, Masks]]:
    """Stacked masks of every criterion at every density, and those of the run's tickets (criterion ``imp``)."""
    seeds, model = problem.study.init_seeds, problem.model
    output = tl.masks.prunable(model)[-1]
    for criterion in problem.config.criteria:
        for target in problem.config.densities:
            goal = {n: target ** (OUTPUT_EXPONENT if n == output else 1) for n in tl.masks.prunable(model)}
            found = []
            for seed in seeds:
                one = problem.dense.select(init_seed=seed)
                x, y = draw_examples(problem.task, problem.study.score_examples, seed)
                evidence = Evidence(model, one.masks, one.snapshots[0], one.end, x, y, seed)
                found.append(find(criterion, evidence, goal))
            yield criterion, target, stack(found)
    for level in sparse:
        tickets = [level.select(treatment="ticket", init_seed=seed).masks for seed in seeds]
        yield "imp", level.density, stack(tickets)


def _learned(problem: Problem) -> Iterator[pd.DataFrame]:
    """Every kind of values and every seed in one stack, for each method and density."""
    config, seeds = problem.config, problem.study.init_seeds[: problem.config.learned_seeds]
    kinds = [(values, seed) for values in config.learned_values for seed in seeds]
    stacks = [problem.starts(values) for values in config.learned_values]
    frozen = stack_states([stacked.select(r) for stacked in stacks for r in range(len(seeds))])
    plans: list[tuple[Method, float]] = [("bernoulli", 0.5), *(("edge_popup", d) for d in config.learned_densities)]
    for method, density in plans:
        recipe = replace(
            RECIPES[method],
            steps=config.learned_steps,
            batch_size=problem.study.recipe.batch_size,
            eval_every=problem.study.recipe.eval_every,
        )
        learned = learn_masks(
            *(problem.model, frozen, problem.task, recipe, [seed for _, seed in kinds]),
            method=method,
            density=density,
            progress=f"{method}, {density:g}",
        )
        table = evaluations(problem.model, learned, problem.task.test, draws=config.draws)
        names = pd.DataFrame(kinds, columns=["values", "init_seed"]).assign(method=method, target_density=density)
        yield names.rename_axis("replica").reset_index().merge(table, on="replica").drop(columns="replica")


def summary(tables: Tables) -> pd.DataFrame:
    """The best density of every untrained kind of mask, and every learned one: mean error in percent."""
    untrained = tables["untrained"].assign(evaluation="untrained").rename(columns={"criterion": "mask"})
    learned = tables["learned"].rename(columns={"method": "mask"}) if "learned" in tables else untrained[:0]
    keys = ["mask", "values", "evaluation"]
    both = pd.concat([untrained, learned])
    means = both.groupby([*keys, "target_density"], sort=False)[["density", "error"]].mean().reset_index()
    best = means.loc[means.groupby(keys, sort=False)["error"].idxmin()]
    return best.assign(**{"error_%": 100 * best["error"]}).drop(columns=["error", "target_density"])


if __name__ == "__main__":
    sys.exit(main("supermasks", Config, run, draw, summary))
