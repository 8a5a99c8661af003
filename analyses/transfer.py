"""Where a ticket still works: carried to another task, optimizer or initialisation (Morcos et al. 2019).

A setting is a task with a recipe, such as ``mnist``, ``mnist:0-4`` or ``mnist@sgd,0.05,0.9``. The ticket of every
source setting is found by IMP and trained in every target setting, three ways: the *mask* alone, on the initialisation
of another seed; mask and *theta0*; mask and *theta_k*, with the schedule and batches going on from step k. Beside them
stand the same starts under the mask shuffled within its layers, which has learned nothing but how many weights a
layer keeps, a mask drawn over the whole network, and the dense network. A source that is its own target shows the
target's own ticket (theta0), and what changing the seed alone costs (mask).

Where the numbers of classes differ the output layer is fresh and dense. Inputs of different sizes are refused until
``--resize`` and ``--grey`` say how to bring them to one.

With no arguments it carries tickets between two halves of the bundled digits, classes 0-4 and 5-9, in a few minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

import ticketlab as tl
from analyses.command import Places, StudyFlags, Tables, chosen_levels, device_of, joined, main, survivors
from analyses.intervals import interval, with_holm
from analyses.settings import Setting, Tickets, setting, tickets
from figures.transfer import draw
from ticketlab import masks as mask_ops
from ticketlab.engine.recipe import own_name
from ticketlab.engine.start import Start
from ticketlab.engine.transfer import carry
from ticketlab.errors import Refused
from ticketlab.printed import grouped
from ticketlab.seeds import derived_seed
from ticketlab.state import Masks

STUDY = tl.ImpConfig(
    treatments=("ticket",),
    levels=4,
    prune_fraction=0.6,
    snapshot_steps=(100,),
    recipe=tl.Recipe(steps=800),
)


@dataclass(frozen=True)
class Config(Places):
    """Tickets carried from source settings to target settings, beside shuffled masks and dense networks."""

    sources: tuple[str, ...] = ("digits:0-4", "digits:5-9")
    """Settings of the tickets: TASK[:FIRST-LAST][@OPTIMIZER,RATE[,MOMENTUM]], such as mnist or mnist:0-4@sgd,0.05."""
    targets: tuple[str, ...] | None = None
    """Settings that they are trained in; None: the sources."""
    at_levels: tuple[int, ...] | None = None
    """Levels whose tickets are carried; None: the middle one and the last."""
    theta_k: int = 100
    """Step k of the sources' dense training whose weights are carried too; 0: none."""
    resize: tuple[int, int] | None = None
    """Height and width that all images are brought to."""
    grey: bool = False
    """Grey images in place of colour ones."""
    runs: tuple[Path, ...] = ()
    """Run directories to take tickets from; those of other settings are made or resumed."""
    store: Path = Path("runs")
    """Folder of run directories."""
    study: StudyFlags = field(default_factory=lambda: STUDY)


_KEYS = ["target", "source", "carried", "level"]


@dataclass(frozen=True)
class Job:
    """A network to be trained, and what the table says of it."""

    row: dict[str, Any]
    start: Start
    first_step: int = 0


def run(config: Config) -> Tables:
    """``networks``: one row per trained network. ``contrasts``: paired differences in test error, with p-values.

    Raises:
        Refused: Settings of different input shapes, levels, seeds or steps that a run does not have, a run
            directory of no setting, or a layer of a ticket without a live weight.
    """
    wanted, targets = _wanted(config), config.targets or config.sources
    words = dict.fromkeys((*config.sources, *targets))
    device = device_of(config)
    settings = [setting(w, config.study, resize=config.resize, grey=config.grey, device=device) for w in words]
    found = tickets(settings, config.study, wanted, config.theta_k, runs=config.runs, store=config.store)
    if not any(survivors(level) for each in found.values() for level in each.levels.values()):
        raise Refused(f"some ticket must stay finite: all of levels {wanted} have diverged. Lower the learning rate.")
    networks = joined(table for target in dict.fromkeys(targets) for table in _train(config, found, target))
    networks.insert(0, "model", config.study.model)
    return {"networks": networks, "contrasts": contrasts(networks)}


def _wanted(config: Config) -> tuple[int, ...]:
    """The levels to carry, after what flags alone show to be wrong."""
    study = config.study
    if study.task != STUDY.task:
        raise Refused(f"tasks are named by sources and targets: got task {study.task!r}. Use --sources instead.")
    if len(study.init_seeds) < 2:
        raise Refused(f"a mask is carried to another seed's network: two init seeds at least, got {study.init_seeds}.")
    last = max([study.levels, *(tl.load_run(folder).config.levels for folder in config.runs)])
    wanted = chosen_levels(config.at_levels, last, {max(1, study.levels // 2), study.levels}, first=1)
    if not 0 <= config.theta_k < study.recipe.steps:
        raise Refused(f"theta_k must lie in 0..{study.recipe.steps - 1}, before training ends: got {config.theta_k}.")
    return tuple(sorted(wanted))


def _train(config: Config, found: dict[str, Tickets], target: str) -> Iterator[pd.DataFrame]:
    """All networks of one target, in one stack for each first step."""
    here = found[target].setting
    model = tl.initialise(partial(_build, config, here), 0)
    jobs = list(_jobs(config, found, target))
    for first_step in sorted({job.first_step for job in jobs}):
        group = [job for job in jobs if job.first_step == first_step]
        starts, label = [job.start for job in group], f"to {target}, from step {first_step}"
        how: dict[str, Any] = {"first_step": first_step, "progress": label, "store": config.out}
        outcome = tl.train(model, starts, here.task, here.recipe, **how)
        rows = pd.DataFrame([job.row | _described(job.start.masks, here.recipe) for job in group])
        rows["first_step"] = first_step
        yield pd.concat([rows, outcome.metrics.drop(columns="replica")], axis=1)


def _build(config: Config, here: Setting) -> nn.Module:
    return tl.models.build(config.study.model, here.task.input_shape, here.task.n_classes)


def _jobs(config: Config, found: dict[str, Tickets], target: str) -> Iterator[Job]:
    """Dense networks, then the tickets of every source, the target's own among them, with their controls."""
    here, seeds = found[target], config.study.init_seeds
    some = next(iter(here.dense.theta_start.values()))
    build = partial(_build, config, here.setting)
    fresh = {seed: tl.state(tl.initialise(build, seed)).to(some.device, some.dtype) for seed in seeds}
    model = tl.initialise(build, 0)
    everything = {name: mask.to(some.device) for name, mask in mask_ops.ones(model, here.pruned).items()}
    for seed in seeds:
        about = {"source": "none", "target": target, "carried": "none", "control": "dense", "level": 0}
        order = here.order_seeds[seed]
        yield Job(about | _seeds(seed, seed, order), Start(fresh[seed], everything, order))
    for source, level in product(dict.fromkeys((*config.sources, target)), next(iter(found.values())).levels):
        finite = survivors(found[source].levels[level])
        for seed, other in zip(seeds, (*seeds[1:], seeds[0]), strict=True):
            if seed not in finite:
                continue
            order = here.order_seeds[seed]
            about = {"source": source, "target": target, "level": level}
            masks = found[source].levels[level].select(init_seed=seed).masks
            snapshots = found[source].dense.select(init_seed=seed).snapshots
            weights = {"mask": None, "theta0": snapshots[0]}
            weights |= {"theta_k": snapshots[config.theta_k]} if config.theta_k else {}
            for carried, given in weights.items():
                start = carry(model, fresh[other], masks, order, weights=given)
                row = about | {"carried": carried} | _seeds(seed, other if given is None else seed, order)
                first_step = config.theta_k if carried == "theta_k" else 0
                starts = _controls(start, carried, source == target, derived_seed("transfer", seed, level))
                for control, changed in starts.items():
                    yield Job(row | {"control": control}, changed, first_step)


def _controls(start: Start, carried: str, own: bool, seed: int) -> dict[str, Start]:
    """The carried ticket, and the same start under masks that know less.

    Under a shuffled mask theta0 is one initialisation among others, so mask and theta0 share that of the mask.
    The mask drawn over the whole network has nothing of its source but a number: one for each target.
    """
    starts = {"ticket": start}
    if carried != "theta0":
        starts["layerwise_shuffle"] = replace(start, masks=mask_ops.layerwise_shuffle(start.masks, seed))
    if carried == "mask" and own:
        starts["random_mask"] = replace(start, masks=mask_ops.random_mask(start.masks, seed))
    return starts


def _seeds(source_seed: int, init_seed: int, order_seed: int) -> dict[str, int]:
    return {"source_seed": source_seed, "init_seed": init_seed, "order_seed": order_seed}


def _described(masks: Masks, recipe: tl.Recipe) -> dict[str, Any]:
    return {
        "density": float(mask_ops.density(masks)),
        "kept": int(mask_ops.kept(masks)),
        "prunable": mask_ops.total(masks),
        "optimizer": recipe.optimizer if isinstance(recipe.optimizer, str) else own_name(recipe.optimizer),
        "learning_rate": recipe.learning_rate,
        "momentum": recipe.momentum if recipe.optimizer == "sgd" else float("nan"),
        "steps": recipe.steps,
    }


def contrasts(networks: pd.DataFrame) -> pd.DataFrame:
    """Test error of carried tickets above the same start shuffled, the target's own ticket, and the dense network.

    Differences of the networks of one source seed, with the mean's 95 % interval (Student's t). ``p_value`` is
    unadjusted, ``p_holm`` corrected for the whole table.
    """
    errors = dict(iter(networks.set_index("source_seed").groupby([*_KEYS, "control"])["test_error"]))
    none = pd.Series(dtype=float)  # where all tickets of a source diverged
    rows = []
    tickets = networks.loc[networks["control"] == "ticket", _KEYS]
    for target, source, what, level in tickets.drop_duplicates().itertuples(index=False):
        against = {
            "layerwise_shuffle": (target, source, "mask" if what == "theta0" else what, level, "layerwise_shuffle"),
            "own_ticket": (target, target, "theta0", level, "ticket"),
            "dense": (target, "none", "none", 0, "dense"),
        }
        for name, other in against.items():
            about = {"target": target, "source": source, "carried": what, "level": level, "against": name}
            gap = errors[target, source, what, level, "ticket"] - errors.get(other, none)
            rows.append(about | interval(gap, "error_above"))
    return with_holm(pd.DataFrame(rows))


def summary(tables: Tables) -> pd.DataFrame:
    """The transfer matrix: test error, mean ± sd over n networks, and the gap to shuffled masks with its 95 % interval.

    The interval and ``p_unadjusted`` are of one gap by itself, the last column is corrected for all of the contrasts.
    """
    networks, pairs = tables["networks"], tables["contrasts"]
    keys = ["target", "level", "source", "carried"]
    shown = networks[networks["control"].isin(["ticket", "dense"])]
    table = grouped(shown, keys, {"density": "density", "test_error_%": "test_error"})
    gaps = pairs[pairs["against"] == "layerwise_shuffle"].set_index(keys)
    points = [f"{m:.2f} [{a:.2f}, {b:.2f}]" for m, a, b in 100 * gaps[["error_above", "low", "high"]].to_numpy()]
    columns = {"above_shuffled_points": points, "p_unadjusted": gaps["p_value"]}
    return table.join(pd.DataFrame(columns | {f"p_holm_of_{pairs['n_family'].iloc[0]}": gaps["p_holm"]}, gaps.index))


if __name__ == "__main__":
    sys.exit(main("transfer", Config, run, draw, summary))
