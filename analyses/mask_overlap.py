"""What the tickets of different initialisations share: their masks, held against chance.

For every two tickets of chosen levels: Jaccard and intersection per layer, against random masks of the same layer
densities, and against random masks that also keep how many live weights each input (pixel) has. For tickets of one
level and two init seeds also the overlap after the permutation of hidden units that maximises it, against random masks
that are aligned alike: of the same layer densities, or with the same live weights of each unit and each input. Beside
them: where the live weights of the first layer are, fan-in, fan-out and dead units, and how long the weights of a level
live. A p_value is unadjusted; p_holm is corrected for all rows of its table, which aligned overlaps survive only
against many more draws than rows.

With no arguments it makes a run on the bundled digits and measures it in a few minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations, product
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm import tqdm

import ticketlab as tl
from analyses.command import OfRun, Tables, chosen_levels, main, open_run, pruned_names, survivors
from analyses.intervals import with_holm
from figures.mask_overlap import draw
from ticketlab import overlap, permutation
from ticketlab.errors import Refused
from ticketlab.printed import grouped
from ticketlab.state import Masks, select

QUANTILES = (0, 0.25, 0.5, 0.75, 1)  # of the live fan-in and fan-out of a group
GIVEN: tuple[Literal["layer", "input"], ...] = ("layer", "input")  # what the nulls of the aligned overlap keep


@dataclass(frozen=True)
class Config(OfRun):
    """Overlap of tickets across init seeds and levels, with and without alignment of their hidden units."""

    at_levels: tuple[int, ...] | None = None
    """Levels to measure, from 1; None: every second one and the last."""
    draws: int = 19
    """Random masks per kind of null that an aligned overlap is compared with."""
    restarts: int = 2
    """Starts per matching of hidden units."""


@dataclass(frozen=True)
class Tickets:
    """The masks of the measured levels, one stack of seeds each."""

    seeds: tuple[int, ...]
    densities: dict[int, float]
    masks: dict[int, Masks]


def run(config: Config) -> Tables:
    """``overlap``: one row per pair and layer; ``aligned``: and null. ``pixels``, ``units``, ``survival``: counts."""
    study, model, task, levels = open_run(config)
    if len(study.init_seeds) < 2:
        raise Refused(f"an overlap needs at least two init seeds: the run has {study.init_seeds}.")
    last = study.levels
    wanted = chosen_levels(config.at_levels, last, {*range(2, last + 1, 2), last}, first=1)
    tickets = _tickets(study, model, levels, wanted)
    groups = permutation.groups(model, task.train.x[:2])
    about = {"task": study.task, "model": study.model}
    tables = {
        "overlap": _overlap(tickets),
        "aligned": _aligned(tickets, groups, config),
        "units": _units(tickets, groups),
        "survival": _survival(tickets),
        "pixels": _pixels(tickets, task.input_shape),
    }
    long = ("pixels",)  # thousands of rows, without the names that all tables would repeat
    return {n: table if n in long else table.assign(**about) for n, table in tables.items() if len(table)}


def _tickets(study: tl.ImpConfig, model: nn.Module, levels: Iterable[tl.Level], wanted: set[int]) -> Tickets:
    """Of the seeds whose tickets are finite at all of the wanted levels; layers from the input on."""
    seeds, densities, masks = study.init_seeds, {}, {}
    for level in levels:
        if level.level in wanted:
            seeds = tuple(seed for seed in seeds if seed in survivors(level))
            densities[level.level], found = level.density, level.subset(treatment="ticket").masks
            masks[level.level] = {name: found[name] for name in pruned_names(model, level)}
    if len(seeds) < 2:
        raise Refused(f"an overlap needs two init seeds whose tickets stayed finite: left are {seeds}. Take others.")
    rows = [study.init_seeds.index(seed) for seed in seeds]
    return Tickets(seeds, densities, {level: select(found, rows) for level, found in masks.items()})


def _overlap(tickets: Tickets) -> pd.DataFrame:
    """Every two tickets of the measured levels and seeds; ``given_input`` keeps the live weights of each input."""
    names = pd.MultiIndex.from_product([list(tickets.masks), tickets.seeds], names=["level", "init_seed"]).to_frame()
    every: Masks = {n: torch.cat([m[n] for m in tickets.masks.values()]) for n in next(iter(tickets.masks.values()))}
    table, given = overlap.pairs(every), overlap.pairs(every, given="input")
    front = {f"{c}_{side}": names[c].to_numpy()[table[side]] for side in "ab" for c in ("level", "init_seed")}
    behind = {f"{c}_given_input": given[c] for c in ("expected", "variance", "z", "p_value")}
    both = pd.concat([pd.DataFrame(front), table.drop(columns=["a", "b"]).assign(**behind)], axis=1)
    return with_holm(with_holm(both), "p_value_given_input")


def _aligned(tickets: Tickets, groups: permutation.Groups, config: Config) -> pd.DataFrame:
    """Two seeds at one level, hidden units reordered to overlap the most; ``given`` says what the null keeps."""
    rows = []
    pairs = combinations(range(len(tickets.seeds)), 2)
    places = list(product(tickets.masks, pairs, GIVEN))
    for level, (a, b), given in tqdm(places, desc="aligned overlaps", unit="null", disable=None):
        one, other = ({n: m[r] for n, m in tickets.masks[level].items()} for r in (a, b))
        found = overlap.aligned(groups, one, other, given=given, draws=config.draws, restarts=config.restarts)
        names = {"level": level, "density": tickets.densities[level]}
        names |= {"init_seed_a": tickets.seeds[a], "init_seed_b": tickets.seeds[b], "given": given}
        rows.append(pd.concat([pd.DataFrame(names, index=found.index), found.assign(draws=config.draws)], axis=1))
    return with_holm(pd.concat(rows, ignore_index=True))


def _units(tickets: Tickets, groups: permutation.Groups) -> pd.DataFrame:
    """Per group of hidden units their number, how many are dead, and quantiles of their live fan-in and fan-out."""
    tables = {level: overlap.units(groups, masks) for level, masks in tickets.masks.items()}
    return _named(tickets, {level: _of_groups(table) for level, table in tables.items()})


def _of_groups(units: pd.DataFrame) -> pd.DataFrame:
    group = units.groupby(["replica", "group"], sort=False)
    counts = group["dead"].agg(units="size", dead="sum")
    sides = {f"{side}_q{round(100 * q)}": group[side].quantile(q) for side in ("fan_in", "fan_out") for q in QUANTILES}
    return counts.assign(**sides).reset_index()


def _survival(tickets: Tickets) -> pd.DataFrame:
    levels = list(tickets.masks)
    table = overlap.survival(list(tickets.masks.values()), stacked=True)
    seeds = np.array(tickets.seeds)[table["replica"]]
    places = {f"level_{side}": np.array(levels)[table[side]] for side in "ab"}
    densities = {f"density_{side}": [tickets.densities[level] for level in places[f"level_{side}"]] for side in "ab"}
    return pd.DataFrame(
        {**places, **densities, "init_seed": seeds, "layer": table["layer"], "survival": table["survival"]}
    )


def _pixels(tickets: Tickets, shape: tuple[int, ...]) -> pd.DataFrame:
    """Live weights of each input, channels summed; nothing where the first layer is a convolution or x no image."""
    first = next(iter(next(iter(tickets.masks.values())).values()))
    if first.ndim != 3 or len(shape) != 3:
        return pd.DataFrame()
    tables = {}
    for level, masks in tickets.masks.items():
        live = overlap.input_map(next(iter(masks.values())), shape).sum(1).cpu().numpy()  # [replica, row, column]
        places = np.indices(live.shape).reshape(3, -1)
        tables[level] = pd.DataFrame(dict(zip(("replica", "row", "column"), places, strict=True))).assign(
            live=live.ravel(), units=first.shape[1] * shape[0]
        )
    return _named(tickets, tables)


def _named(tickets: Tickets, tables: dict[int, pd.DataFrame]) -> pd.DataFrame:
    """One table behind level, density and init seed."""
    parts = []
    for level, table in tables.items():
        seeds = np.array(tickets.seeds)[table["replica"]]
        front = pd.DataFrame({"level": level, "density": tickets.densities[level], "init_seed": seeds})
        parts.append(pd.concat([front, table.drop(columns="replica")], axis=1))
    return pd.concat(parts, ignore_index=True)


def summary(tables: Tables) -> pd.DataFrame:
    """Overlap of tickets of two init seeds over chance, before and after alignment: mean ± sd over n pairs.

    Chance is that of random masks given the counts of layers, or of input pixels too.
    """
    pairs, aligned = tables["overlap"], tables["aligned"]
    pairs = pairs[pairs["level_a"] == pairs["level_b"]].rename(columns={"level_a": "level"})
    inputs = {"expected_given_input": "expected", "z_given_input": "z"}
    both = {"layer": pairs, "input": pairs.drop(columns=[*inputs.values()]).rename(columns=inputs)}
    before = pd.concat([rows.assign(given=given) for given, rows in both.items()])
    before = before.assign(ratio=before["intersection"] / before["expected"])
    keys = ["level", "layer", "given"]
    found = grouped(aligned, keys, {"density": "density", "aligned": "ratio", "aligned_z": "z"})
    found = found.join(grouped(before, keys, {"over_chance": "ratio", "z": "z"}).drop(columns="n"))
    return found[["density", "over_chance", "z", "aligned", "aligned_z", "n"]]


if __name__ == "__main__":
    sys.exit(main("mask_overlap", Config, run, draw, summary))
