"""Supermasks: what masks reach on weights that are never trained (Zhou et al. 2019, Ramanujan et al. 2020).

Two questions, for every initialisation of a run:

- untrained: the error of m * theta0' for masks of every criterion, taken from the trained dense network in one shot,
  and for the run's own tickets; theta0' is the initialisation, itself or with random signs, or a constant a layer.
- learned: the error of masks learned on frozen weights, by Bernoulli logits and by edge-popup at several densities.

With no arguments it runs on the bundled digits in a few minutes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd
from torch import nn
from tqdm import tqdm

import ticketlab as tl
from analyses.command import OfRun, Tables, joined, main, open_run, pruned_names, survivors
from figures.supermasks import draw
from ticketlab import masks as mask_ops
from ticketlab.engine.criteria import CRITERIA, Evidence, draw_examples, find, refuse_too_large
from ticketlab.engine.supermask import RECIPES, Method, evaluations, learn_masks
from ticketlab.engine.values import random_signs, signed_constants
from ticketlab.errors import Refused, nearest
from ticketlab.printed import grouped
from ticketlab.state import Masks, Params, stack, stack_states

VALUES: dict[str, Callable[[Params, Masks, int], Params]] = {
    "init": lambda params, masks, seed: dict(params),
    "random_sign": random_signs,
    "signed_constant": lambda params, masks, seed: signed_constants(params, masks),
    "random_constant": lambda params, masks, seed: random_signs(signed_constants(params, masks), masks, seed),
}
OUTPUT_EXPONENT = math.log(0.9) / math.log(0.8)  # the output layer loses 10 % where the others lose 20 %


@dataclass(frozen=True)
class Config(OfRun):
    """Error of masks on weights that are never trained, chosen by a criterion or learned."""

    criteria: tuple[str, ...] = (
        *("large_final_same_sign", "large_final", "large_final_different_sign"),
        *("magnitude_increase_same_sign", "large_init", "random"),
    )
    """Criteria of the untrained masks, names in engine.criteria."""
    values: tuple[str, ...] = ("init", "random_sign", "signed_constant", "random_constant")
    """Values of kept weights under untrained masks."""
    densities: tuple[float, ...] = (0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02)
    """Densities of every layer but the output layer, which keeps more: 0.9 where the others keep 0.8."""
    learned_values: tuple[str, ...] = ("init", "signed_constant")
    """Values of the weights under learned masks."""
    learned_densities: tuple[float, ...] = (0.5, 0.2, 0.05)
    """Densities of each layer under edge-popup."""
    learned_seeds: int = 3
    """Number of init seeds of the run that masks are learned for, the first ones."""
    learned_steps: int = 1500
    """Steps of mask learning; 0: no mask is learned."""
    draws: int = 10
    """Masks drawn per network of Bernoulli logits."""

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
            "draws must be at most 100,000": self.draws <= 10**5,
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

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the dense networks that stayed finite, from which masks are taken."""
        return survivors(self.dense)

    def starts(self, values: str, seeds: Sequence[int]) -> tl.State:
        """Initialisations with these values, stacked."""
        networks = [self.dense.select(init_seed=seed) for seed in seeds]
        pairs = zip([(n.snapshots[0], n.masks) for n in networks], seeds, strict=True)
        return stack_states([tl.State(VALUES[values](s.params, masks, seed), s.buffers) for (s, masks), seed in pairs])


def run(config: Config) -> Tables:
    """``untrained``: one row per mask and kind of values. ``learned``: one row per mask and way to evaluate it."""
    study, model, task, levels = open_run(config)
    for criterion in config.criteria:
        refuse_too_large(criterion, model, mask_ops.prunable(model, study.prunable or None))
    dense, *sparse = levels
    problem = Problem(config, study, model, task, dense)
    tables = {"untrained": joined(_untrained(problem, sparse))}
    if config.learned_steps:
        tables["learned"] = joined(_learned(problem))
    about = {"task": study.task, "model": study.model, "dense_error": dense.metrics["test_error"].mean()}
    return {name: table.assign(**about) for name, table in tables.items()}


def _untrained(problem: Problem, sparse: list[tl.Level]) -> Iterator[pd.DataFrame]:
    test, every = problem.task.test, list(_masks(problem, sparse))
    for criterion, target, masks in tqdm(every, desc="untrained", unit="mask", disable=None):
        stacked, seeds = stack(list(masks.values())), list(masks)
        density = mask_ops.density(stacked, stacked=True).tolist()
        for values in problem.config.values:
            start = problem.starts(values, seeds)
            loss, error = tl.evaluate(problem.model, start, test.x, test.y, masks=stacked)
            found = {"density": density, "loss_nats": loss.tolist(), "error": error.tolist()}
            about = {"criterion": criterion, "values": values, "target_density": target}
            yield pd.DataFrame({"init_seed": seeds, **about, **found})


def _masks(problem: Problem, sparse: list[tl.Level]) -> Iterator[tuple[str, float, dict[int, Masks]]]:
    """Masks by seed, of every criterion at every density, and those of the run's tickets (criterion ``imp``)."""
    model = problem.model
    output = tl.graph.output_layers(model, problem.task.train.x)
    for criterion in problem.config.criteria:
        for target in problem.config.densities:
            goal = {n: target ** (OUTPUT_EXPONENT if n in output else 1) for n in pruned_names(model, problem.dense)}
            found = {}
            for seed in problem.seeds:
                one = problem.dense.select(init_seed=seed)
                x, y = draw_examples(problem.task, problem.study.score_examples, seed)
                evidence = Evidence(model, one.masks, one.snapshots[0], one.end, x, y, seed)
                found[seed] = find(criterion, evidence, goal)
            yield criterion, target, found
    for level in sparse:
        tickets = {seed: level.select(treatment="ticket", init_seed=seed).masks for seed in survivors(level)}
        if tickets:
            yield "imp", level.density, tickets


def _learned(problem: Problem) -> Iterator[pd.DataFrame]:
    """Every kind of values and every seed in one stack, for each method and density."""
    config, seeds = problem.config, problem.seeds[: problem.config.learned_seeds]
    kinds = [(values, seed) for values in config.learned_values for seed in seeds]
    frozen = stack_states([problem.starts(values, [seed]).select(0) for values, seed in kinds])
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
            prunable=pruned_names(problem.model, problem.dense),
            progress=f"{method}, {density:g}",
            store=config.out,
        )
        table = evaluations(problem.model, learned, problem.task.test, draws=config.draws)
        lost = learned.metrics["diverged_step"].notna().to_numpy()[table["replica"]]
        table.loc[lost, ["loss_nats", "error"]] = math.nan
        names = pd.DataFrame(kinds, columns=["values", "init_seed"]).assign(method=method, target_density=density)
        yield names.rename_axis("replica").reset_index().merge(table, on="replica").drop(columns="replica")


def summary(tables: Tables) -> pd.DataFrame:
    """The best density of every untrained kind of mask, and every learned one: mean ± sd over n networks."""
    untrained = tables["untrained"].assign(evaluation="untrained").rename(columns={"criterion": "mask"})
    learned = tables["learned"].rename(columns={"method": "mask"}) if "learned" in tables else untrained[:0]
    keys = ["mask", "values", "evaluation"]
    both = pd.concat([untrained, learned])
    means = both.groupby([*keys, "target_density"], sort=False)["error"].mean().reset_index()
    best = means.loc[means.groupby(keys, sort=False)["error"].idxmin()]
    shown = both.merge(best[[*keys, "target_density"]])
    return grouped(shown, keys, {"density": "density", "error_%": "error"})


if __name__ == "__main__":
    sys.exit(main("supermasks", Config, run, draw, summary))
